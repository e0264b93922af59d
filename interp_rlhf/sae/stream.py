"""Activations of texts as an endless shuffled stream in bounded memory. Sparse autoencoders are trained on it.

In: texts, a tokenizer, a model and a hook point, or activations on disk. Out: batches (N, D) in random order. It must not know
their purpose. The stream can stop anywhere and resume at the same activation.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..activations.batch import TokenBatch
from ..activations.collect import read_activations
from ..activations.outliers import norm_outliers
from ..concepts.examples import read_rows
from ..messages import as_list
from .cutting import FORWARD_TOKENS, context_slices

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import nn


def load_corpus(paths: Sequence[str | Path]) -> list[str]:
    """Texts from files. A `.txt` file is one text. A JSONL or CSV file, or a `datasets` path, has one text per row, in `text`.

    Raises:
        `FileNotFoundError`: a file does not exist.
        `ValueError`: a row has no `text`, or all texts are white space.
    """
    texts: list[str] = []
    paths = as_list(paths)
    for path in map(str, paths):
        if Path(path).suffix == ".txt":
            if not Path(path).exists():
                raise FileNotFoundError(f"`{path}` does not exist – expected a text file.")
            texts.append(Path(path).read_text(encoding="utf-8-sig"))
            continue
        for index, row in enumerate(read_rows(path)):
            if not isinstance(row.get("text"), str):
                raise ValueError(f"Row {index} of `{path}` has the keys {sorted(row)} – expected `text`, a string.")
            texts.append(row["text"])
    if not any(text.strip() for text in texts):
        raise ValueError(f"{', '.join(f'`{path}`' for path in paths)} – expected text, and there is none.")
    return texts


@dataclass(frozen=True)
class Contexts:
    """Token ids of texts, cut into contexts that a model reads one by one.

    No context holds two texts, so the model reads each text as if it were alone. The end of a text is a shorter context.

    Attributes:
        ids (`torch.IntTensor` of shape (T,)): ids of all texts, without the tokens that the tokenizer adds around a text.
        starts (`torch.LongTensor` of shape (C + 1,)): start of each context; the last entry is the end of the last context.
        prefix (`tuple[int, ...]`): ids that every context begins with. The tokenizer adds them before a text.
        special (`torch.LongTensor`): ids that do not count.
        length (`int`): most tokens of a context, prefix included.
    """

    ids: torch.Tensor
    starts: torch.Tensor
    prefix: tuple[int, ...]
    special: torch.Tensor
    length: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def left_out(self) -> int:
        """Number of tokens at the start of each context that do not count. Any first token draws attention."""
        return max(1, len(self.prefix))

    @property
    def tokens(self) -> int:
        """Number of tokens that count, with norm outliers."""
        counted = ~torch.isin(self.ids.long(), self.special)
        if not self.prefix:
            counted[self.starts[:-1]] = False
        return int(counted.sum())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the ids and the cuts."""
        digest = hashlib.sha256(repr((self.prefix, self.length, self.special.tolist())).encode())
        digest.update(self.ids.numpy().tobytes())
        digest.update(self.starts.numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"

    def batch(self, rows: Sequence[int]) -> TokenBatch:
        """Some contexts, right-padded."""
        prefix = list(self.prefix)
        special = set(self.special.tolist())
        ids = [self.ids[self.starts[row] : self.starts[row + 1]].tolist() for row in rows]
        first = self.left_out - len(prefix)
        counts = [[i >= first and token not in special for i, token in enumerate(line)] for line in ids]
        return TokenBatch.from_ids([prefix] * len(ids), ids, counts=counts)

    def spread(self, tokens: int | None) -> Contexts:
        """Contexts with about `tokens` tokens in total, spread evenly over the texts; all contexts if `tokens` is None."""
        if tokens is None or tokens >= self.tokens:
            return self
        count = max(1, round(len(self) * tokens / self.tokens))
        rows = [i * len(self) // count for i in range(count)]
        parts = [self.ids[self.starts[row] : self.starts[row + 1]] for row in rows]
        starts = torch.tensor([0, *map(len, parts)]).cumsum(0)
        return Contexts(torch.cat(parts), starts, self.prefix, self.special, self.length)


def cut(texts: Iterable[str], tokenizer: Any, length: int) -> Contexts:
    """Cut texts into contexts of at most `length` tokens, one text after the other. Ids take 4 bytes a token; texts are not kept.

    Raises:
        `ValueError`: `length` is too small, or no token of the texts counts.
    """
    prefix = _prefix(tokenizer)
    if length - len(prefix) < 2:
        raise ValueError(f"`context` is {length} – expected at least {len(prefix) + 2} tokens.")
    parts, sizes = [], [0]
    for text in [texts] if isinstance(texts, str) else texts:
        ids = tokenizer(text=text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces = list(context_slices(len(ids), length, len(prefix)))
        parts.append(torch.tensor(ids[: pieces[-1].stop] if pieces else [], dtype=torch.int32))
        sizes += [piece.stop - piece.start for piece in pieces]
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.long)
    ids = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int32)
    contexts = Contexts(ids, torch.tensor(sizes).cumsum(0), prefix, special, length)
    if contexts.tokens < 1:
        raise ValueError(f"{len(parts)} texts without a token that counts – expected some text.")
    return contexts


class Source(Protocol):
    """Activations of a corpus, in another order in each epoch."""

    @property
    def tokens(self) -> int:
        """About the number of activations in an epoch, never too low."""

    @property
    def block(self) -> int:
        """Most activations of one block."""

    def blocks(self, epoch: int, start: int = 0) -> Iterator[torch.Tensor]:
        """Blocks (n, D) of an epoch, float32, from block `start` on. Every call gives the same blocks."""


class ModelActivations:
    """Activations read by the model, once per epoch.

    Args:
        model (`nn.Module`): the model. It runs up to the hook point, with its adapters as they are.
        contexts (`Contexts`): the contexts to read.
        hook_point (`str`): module path whose output is read.
        block (`int`): about the number of activations in a block.
        seed (`int`): seed of the order.
    """

    def __init__(self, model: nn.Module, contexts: Contexts, hook_point: str, block: int, seed: int):
        self.model = model
        self.contexts = contexts
        self.hook_point = hook_point
        self.rows = max(1, min(block, FORWARD_TOKENS) // contexts.length)
        self.seed = seed

    @property
    def tokens(self) -> int:
        return self.contexts.tokens

    @property
    def block(self) -> int:
        return self.rows * self.contexts.length

    def blocks(self, epoch: int, start: int = 0) -> Iterator[torch.Tensor]:
        groups = order(len(self.contexts), self.seed, epoch).split(self.rows)
        for group in groups[start:]:
            yield activations_of(self.model, self.contexts, group.tolist(), self.hook_point)


def activations_of(model: nn.Module, contexts: Contexts, rows: Sequence[int], hook_point: str) -> torch.Tensor:
    """Activations (N, D) of some contexts, float32, for tokens that count and are no norm outliers."""
    found = read_activations(model, contexts.batch(rows), [hook_point], batch_tokens=FORWARD_TOKENS)[hook_point]
    return found[~norm_outliers(found)]


def in_order(
    model: nn.Module, contexts: Contexts, hook_point: str, rows: Sequence[int] | None = None
) -> Iterator[torch.Tensor]:
    """Activations (n, D) of contexts in their order, in blocks of about one forward. Default: all contexts."""
    rows = range(len(contexts)) if rows is None else rows
    count = max(1, FORWARD_TOKENS // contexts.length)
    for start in range(0, len(rows), count):
        yield activations_of(model, contexts, rows[start : start + count], hook_point)


def order(count: int, seed: int, epoch: int) -> torch.Tensor:
    """A permutation that depends only on seed and epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


class ShuffleBuffer:
    """Random batches from a buffer of at most `size` activations, which is refilled when half of it is used.

    Args:
        source (`Source`): source of activations, epoch after epoch, in blocks of at most a quarter of the buffer.
        size (`int`): most activations in the buffer.
        batch (`int`): activations per batch, at most half of the buffer.
        seed (`int`): seed of the order.
    """

    def __init__(self, source: Source, size: int, batch: int, seed: int):
        assert source.block <= size // 4
        assert batch <= size // 2
        self.source = source
        self.size = size
        self.batch = batch
        self._random = torch.Generator().manual_seed(seed)
        self._data: torch.Tensor | None = None  # (size, D)
        self._filled = torch.zeros(0, dtype=torch.long)  # slots in use; batches are taken from the end
        self._free = torch.arange(size)
        self._epoch = self._block = 0
        self._stream: Iterator[torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self._filled)

    def next(self) -> torch.Tensor:
        """A batch (N, D), float32."""
        data = self.fill()
        taken, self._filled = self._filled[-self.batch :], self._filled[: -self.batch]
        self._free = torch.cat([self._free, taken])
        return data[taken]

    def fill(self) -> torch.Tensor:
        """Refill the buffer if half of it is used, and return its slots (size, D)."""
        if len(self) >= max(self.size // 2, self.batch):
            assert self._data is not None
            return self._data
        while len(self._free) >= self.source.block:
            self._put(self._read())
        self._filled = self._filled[torch.randperm(len(self), generator=self._random)]
        assert self._data is not None
        return self._data

    def held(self) -> torch.Tensor:
        """A copy of the activations in the buffer (N, D)."""
        return self.fill()[self._filled]

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """Tensors and numbers from which `restore` rebuilds this buffer."""
        assert self._data is not None
        tensors = {"held": self._data[self._filled], "random": self._random.get_state()}
        return tensors, {"epoch": self._epoch, "block": self._block}

    def restore(self, tensors: dict[str, torch.Tensor], position: dict[str, int]) -> None:
        """Set the buffer to the state that `state` returned, and drop its present content."""
        held = tensors["held"]
        self._free, self._filled = torch.arange(self.size), torch.zeros(0, dtype=torch.long)
        self._put(held)
        self._random.set_state(tensors["random"])
        self._epoch, self._block = position["epoch"], position["block"]
        self._stream = None

    def _put(self, rows: torch.Tensor) -> None:
        if self._data is None:
            self._data = torch.empty(self.size, rows.shape[1])
        slots, self._free = self._free[: len(rows)], self._free[len(rows) :]
        self._data[slots] = rows
        self._filled = torch.cat([self._filled, slots])

    def _read(self) -> torch.Tensor:
        if self._stream is None:
            self._stream = self.source.blocks(self._epoch, self._block)
        for rows in self._stream:
            self._block += 1
            return rows
        self._epoch, self._block = self._epoch + 1, 0
        self._stream = self.source.blocks(self._epoch)
        self._block = 1
        return next(self._stream)


def _prefix(tokenizer: Any) -> tuple[int, ...]:
    """Ids that the tokenizer puts before a text."""
    bare = tokenizer(text="a", add_special_tokens=False)["input_ids"]
    whole = tokenizer(text="a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return tuple(whole[:start])
