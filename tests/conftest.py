"""Tiny real models with a real tokenizer, made in process and saved to a folder; no network, no hub."""

from __future__ import annotations

import os
from collections import Counter

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


_DESELECTED: list[pytest.Item] = []
_COMMANDS = {  # file with slow tests: the command that runs them
    "test_engines.py": "make test-engines", "test_ppo.py": "make test-engines", "test_terms.py": "make test-engines",
    "test_recipes.py": "make test-recipes",
    "test_rewards.py": "make test-compiled", "test_real_model.py": "make test-real-model",
    "test_sae_interop.py": "make test-interop", "test_evidence.py": "make test-evidence", "test_causal.py": "make test-evidence",
    "test_benchmarks.py": "make test-benchmarks",
}  # fmt: skip


def pytest_deselected(items):
    _DESELECTED.extend(item for item in items if item.get_closest_marker("slow"))


def pytest_terminal_summary(terminalreporter):
    """Say at the end which tests did not run: skipped ones by reason, slow ones by the command that runs them."""
    reasons = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", []))
    slow = Counter(item.path.name for item in _DESELECTED)
    if reasons or slow:
        terminalreporter.section("not run")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:4d} skipped: {reason}")
    for name, count in slow.most_common():
        terminalreporter.line(f"{count:4d} slow in {name}: {_COMMANDS.get(name, 'python -m pytest -m slow')}")


def _reason(report) -> str:
    said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return said.removeprefix("Skipped: ")
