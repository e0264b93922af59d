"""Other packages that read activations, as functions of the same texts: lmprobe and TransformerLens.

In: a saved model. Out: for each contestant a function that gives the activation (B, T, D) at one block, or a sentence that says
why it cannot run. They are comparators only (`pip install 'interp-rlhf[bench]'`); the package imports neither.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

Reader = Callable[[], torch.Tensor]
NOT_INSTALLED = "not installed (pip install 'interp-rlhf[bench]')"


def lmprobe_reader(folder: Path, block: int, input_ids: torch.Tensor, texts: list[str]) -> Reader:
    """One `extract_batch` of lmprobe's local backend; it tokenizes, which takes well under a hundredth of the time."""
    from lmprobe.extraction import ActivationExtractor

    extractor = ActivationExtractor(str(folder), device="cpu", layers=block, batch_size=len(texts), backend="local")
    return lambda: extractor.extract_batch(texts, [block])[0]


def transformer_lens_reader(folder: Path, block: int, input_ids: torch.Tensor, texts: list[str]) -> Reader:
    """One `run_with_cache` of TransformerLens' bridge with a name filter."""
    return _bridge_reader(folder, block, input_ids)


def transformer_lens_stop_reader(folder: Path, block: int, input_ids: torch.Tensor, texts: list[str]) -> Reader:
    """The same with its own early stop, `stop_at_layer`."""
    return _bridge_reader(folder, block, input_ids, stop_at_layer=block + 1)


def _bridge_reader(folder: Path, block: int, input_ids: torch.Tensor, **changes: int) -> Reader:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
    point = f"blocks.{block}.hook_out"

    def run() -> torch.Tensor:
        with torch.no_grad():
            _, cache = bridge.run_with_cache(input_ids, names_filter=point, **changes)
        return cache[point]

    return run


PEERS: dict[str, Callable[[Path, int, torch.Tensor, list[str]], Reader]] = {
    "lmprobe": lmprobe_reader,
    "transformer_lens": transformer_lens_reader,
    "transformer_lens_stop_at_layer": transformer_lens_stop_reader,
}


def load(name: str, folder: Path, block: int, input_ids: torch.Tensor, texts: list[str]) -> Reader | str:
    """A contestant, or a sentence that says why it cannot run: it is not installed, or it does not take this model."""
    try:
        return PEERS[name](folder, block, input_ids, texts)
    except ImportError as error:
        return NOT_INSTALLED if error.name in ("lmprobe", "transformer_lens") else f"could not be imported: {error}"
    except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        # What a comparator raises for a model or an argument that its version does not know.
        return f"could not run: {type(error).__name__}: {error}"
