"""Tiny real models with a real tokenizer, made in process and saved to a folder; no network, no hub."""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", CI="1",
    TOKENIZERS_PARALLELISM="false", OMP_WAIT_POLICY="PASSIVE",
)  # fmt: skip

from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, make_model, make_tokenizer

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    """Folder of a tiny saved model of a family; TRL loads its reference from it."""
    made: dict[str, Path] = {}

    def folder(family: str = "llama", **changes) -> Path:
        key = family + repr(sorted(changes.items()))
        if key not in made:
            path = tmp_path_factory.mktemp(family)
            make_model(family, tokenizer, **changes).save_pretrained(path)
            tokenizer.save_pretrained(path)
            made[key] = path
        return made[key]

    return folder


@pytest.fixture
def load(model_folder):
    """A fresh copy of a tiny model, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    def loaded(family: str = "llama", **changes):
        return AutoModelForCausalLM.from_pretrained(model_folder(family, **changes), dtype=torch.float32)

    return loaded


@pytest.fixture(scope="session")
def data():
    """Folder of the shared public data; skips where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"public data are not at {SHARED / 'data'}")
    return SHARED / "data"


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return request.param
