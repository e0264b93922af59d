"""Activations on disk. The model reads a corpus once; later epochs and later trainings read files.

In: a model, contexts, a hook point. Out: a folder of safetensors files, and a `Source` that reads it. It must not know what the
activations are for.

`cache.json` describes the folder. `activations-00000.safetensors` and the files after it hold the activations of 256 contexts
each, in the order of the texts. Each file is written whole or not at all, so an interrupted run goes on where it stopped.

The default is float16. It takes half the disk of float32 (1.15 kB a token at D = 576), is as quick to read, and has a rounding
error of about 1e-7 of the variance. Activations beyond the range of float16 raise an error; float32 holds them.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tqdm.auto import tqdm

from ..activations.identity import identity
from ..concepts.artifact import write_atomically
from .cache_names import CACHE_HEAD, HELD_OUT, SHARDS
from .stream import activations_of, in_order, order

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from .stream import Contexts

CacheType = Literal["float16", "float32"]
SHARD_CONTEXTS = 256
# Largest relative distance of the first context's activations from the cached ones. Another CPU or library moves them less than
# this, other weights move them more.
CACHE_TOLERANCE = 0.01


class CachedActivations:
    """Activations of a folder, in another order of blocks in each epoch.

    Args:
        folder (`str` or `Path`): a complete folder of `fill_cache`.
        block (`int`): activations read at a time.
        seed (`int`): seed of the order.
    """

    def __init__(self, folder: str | Path, block: int, seed: int):
        self.seed = seed
        self._pieces: list[tuple[Path, int, int]] = []
        for path, rows in _files_and_rows(Path(folder)):
            self._pieces += [(path, start, min(start + block, rows)) for start in range(0, rows, block)]

    @property
    def tokens(self) -> int:
        return sum(stop - start for _, start, stop in self._pieces)

    @property
    def block(self) -> int:
        return max(stop - start for _, start, stop in self._pieces)

    def blocks(self, epoch: int, start: int = 0) -> Iterator[torch.Tensor]:
        for index in order(len(self._pieces), self.seed, epoch)[start:].tolist():
            yield self._read(index)

    def in_order(self) -> Iterator[torch.Tensor]:
        """All activations in the order of the texts."""
        return map(self._read, range(len(self._pieces)))

    def _read(self, index: int) -> torch.Tensor:
        path, start, stop = self._pieces[index]
        with _activations(path) as found:
            rows: torch.Tensor = found[start:stop]
        return rows.to(torch.float32, copy=True)  # torch owns this memory, see `load_tensors`


def cached_tokens(folder: str | Path) -> int:
    """Number of activations in a folder: tokens that count and are no norm outliers.

    Raises:
        `ValueError`: a file is truncated.
    """
    return sum(rows for _, rows in _files_and_rows(Path(folder)))


def holds(folder: str | Path, **head: Any) -> bool:
    """True if a folder has all activations and its `cache.json` has these entries, such as `texts`."""
    folder = Path(folder)
    if not (folder / CACHE_HEAD).exists():
        return False
    there = _read_head(folder / CACHE_HEAD)
    files = -(-there["contexts"] // SHARD_CONTEXTS)
    return all(there.get(key) == value for key, value in head.items()) and len(_files(folder)) == files


def fill_cache(
    folder: str | Path,
    model: nn.Module,
    contexts: Contexts,
    hook_point: str,
    *,
    dtype: CacheType = "float16",
    progress: bool = False,
) -> None:
    """Write the activations of contexts into a folder. Files that are there already are kept.

    Raises:
        `ValueError`: the folder holds activations of another model, hook point or text (the message names the differences), or
            it holds other files, or float16 cannot hold the activations.
    """
    from safetensors.torch import save

    folder = Path(folder)
    first = _first(model, contexts, hook_point)
    _open(folder, _head(model, contexts, hook_point, dtype), first)
    bar = tqdm(total=contexts.tokens, desc="reading activations", unit="token", disable=not progress, leave=False)
    with bar:
        for number, start in enumerate(range(0, len(contexts), SHARD_CONTEXTS)):
            part = range(start, min(start + SHARD_CONTEXTS, len(contexts)))
            path = folder / f"{SHARDS}{number:05}.safetensors"
            if path.exists():
                bar.update(sum(int(contexts.starts[row + 1] - contexts.starts[row]) for row in part))
                continue
            blocks = []
            for rows in in_order(model, contexts, hook_point, part):
                blocks.append(rows.to(getattr(torch, dtype)))
                bar.update(len(rows))
            activations = torch.cat(blocks)
            if not torch.isfinite(activations).all():
                raise ValueError(
                    f"Activations at `{hook_point}` do not fit into {dtype} – expected finite numbers. "
                    "Keep them as float32, in another folder. If that does not help, the model itself gives infinities or NaN."
                )
            write_atomically(path, save({"activations": activations}))


def check_cache(folder: Path) -> None:
    """Raises `ValueError` if a folder is neither empty nor a cache of activations."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`{folder}` is a file – expected a folder for activations. Name another one.")
    if (folder / CACHE_HEAD).exists() or not folder.exists():
        return
    if any(not path.name.startswith(HELD_OUT) for path in folder.iterdir()):
        raise ValueError(
            f"`{folder}` holds files and no `{CACHE_HEAD}` – expected a cache of activations or an empty folder."
        )


def _open(folder: Path, head: dict[str, Any], first: list[float]) -> None:
    path = folder / CACHE_HEAD
    check_cache(folder)
    if not path.exists():
        write_atomically(path, json.dumps({**head, "first": first}, indent=1).encode())
        return
    there = _read_head(path)
    differing = [
        f"  - `{key}` is {there.get(key)!r} in the cache – here {value!r}"
        for key, value in head.items()
        if there.get(key) != value
    ]
    if not differing:
        old, new = torch.tensor(there["first"]), torch.tensor(first)
        if old.shape != new.shape or (moved := float((old - new).norm() / old.norm())) > CACHE_TOLERANCE:
            by = "" if old.shape != new.shape else f" by {moved:.1%}"
            differing = [f"  - the activations of the first context differ{by}: other weights, adapters or precision"]
    if differing:
        listed = "\n".join(differing)
        raise ValueError(
            f"`{folder}` holds other activations than those asked for:\n{listed}\nName another folder, or delete this one."
        )


def _head(model: nn.Module, contexts: Contexts, hook_point: str, dtype: str) -> dict[str, Any]:
    return {
        "format": 1,
        "model": identity(model, hook_point),
        "hook_point": hook_point,
        "context": contexts.length,
        "contexts": len(contexts),
        "texts": contexts.fingerprint,
        "dtype": dtype,
    }


def _first(model: nn.Module, contexts: Contexts, hook_point: str) -> list[float]:
    """Mean activation of the first context. It differs between weights or adapters that share a digest."""
    return [float(f"{value:.5g}") for value in activations_of(model, contexts, [0], hook_point).mean(0).tolist()]


def _read_head(path: Path) -> dict[str, Any]:
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        head = None
    if not isinstance(head, dict) or not isinstance(head.get("contexts"), int) or "first" not in head:
        raise ValueError(
            f"`{path}` does not say what the cache holds – expected a JSON object with `contexts` and `first`. "
            f"Delete `{path.parent}`, or name another folder."
        )
    return head


def _files_and_rows(folder: Path) -> Iterator[tuple[Path, int]]:
    for path in _files(folder):
        with _activations(path) as found:
            yield path, found.get_shape()[0]


@contextmanager
def _activations(path: Path) -> Iterator[Any]:
    """The tensor of a file, for slicing."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file.get_slice("activations")
    except SafetensorError as error:
        raise ValueError(
            f"`{path}` ({path.stat().st_size} bytes) is not a whole safetensors file of activations ({error}) – it may be "
            "truncated. Delete it: the same command then reads these activations again."
        ) from None


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{SHARDS}*.safetensors"))
