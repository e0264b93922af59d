"""Reads texts as contexts and contexts as activations, one block of tokens at a time.

In: a model, texts or labelled examples. Out: blocks of contexts with their activations, and latents pooled over examples. The
first token of a context does not count. A token whose norm stands out in its context does not count either: the activations of
attention sinks are unlike all others and would dominate every number. (tokens, S) is never held. It must not know the purpose of
the reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..activations.batch import TokenBatch, tokenize_examples
from ..activations.collect import read_activations
from ..activations.counted import end_of_turn_ids
from ..activations.outliers import norm_outliers
from ..concepts.latents import blocks
from .cutting import context_slices

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ..concepts.latents import Latents
    from .autoencoder import SparseAutoencoder

_TEXTS = 64  # texts tokenized at a time


@dataclass(frozen=True)
class ReadingOptions:
    """Options for cutting and reading texts.

    Attributes:
        context_length (`int`, defaults to 256): most tokens of a context. A longer text is cut. If it has a
            beginning-of-sequence token, each part begins with it.
        window (`int`, defaults to 16): tokens shown on each side of a token.
        batch_tokens (`int`, defaults to 4096): tokens per forward.
        progress (`bool`): show progress bars.
    """

    context_length: int = 256
    window: int = 16
    batch_tokens: int = 4096
    progress: bool = False

    def __post_init__(self) -> None:
        if self.context_length < 3 or self.window < 1 or self.batch_tokens < 1:
            raise ValueError(f"{self} – expected contexts of at least 3 tokens, and the others at least 1.")


@dataclass(frozen=True)
class Block:
    """Contexts that are read together, with the activations (N, D) of all real tokens, row by row."""

    batch: TokenBatch
    counted: torch.Tensor  # (B, T)
    texts: list[int]
    starts: list[int]  # position of each context's start in its text
    activations: torch.Tensor
    targets: torch.Tensor
    outliers: int  # tokens that do not count because their norm stands out in their context

    @property
    def kept(self) -> torch.Tensor:
        """Mask (N,) of the tokens that count."""
        return self.counted[self.batch.attention_mask]


def counted_batch(model: Any, tokenizer: Any, rows: Sequence[str | Mapping[str, Any]]) -> TokenBatch:
    """Token batch of whole examples.

    Raises:
        `ValueError`: an example has no token that counts.
    """
    batch = tokenize_examples(rows, tokenizer, end_of_turn_ids=end_of_turn_ids(model, tokenizer))
    if not batch.completion_mask.any(1).all():
        row = int((~batch.completion_mask.any(1)).nonzero()[0])
        raise ValueError(f"Example {row} has no token that counts after its first – expected two. Remove it.")
    return batch


@dataclass(frozen=True)
class PooledLatents:
    """Latents over the counted tokens of each of N examples.

    Attributes:
        means, maxima (`torch.FloatTensor` of shape (N, K)): mean and maximum of each latent over an example's tokens.
        l0 (`float`): mean number of the K latents that are on per token.
    """

    means: torch.Tensor
    maxima: torch.Tensor
    l0: float


@torch.no_grad()
def pool_latents(
    model: Any, batch: TokenBatch, readouts: Sequence[Latents], *, rows: int = 64, progress: str | None = None
) -> tuple[list[PooledLatents], torch.Tensor]:
    """Latents of several dictionaries at one hook point, and the mean activation (N, D), by one forward.

    A token whose norm stands out in its example does not count.

    Args:
        rows (`int`, defaults to 64): number of rows whose activations (tokens, D) are held at a time.
    """
    (point,) = {latents.hook_point for latents in readouts}
    sums = [torch.zeros(len(batch), latents.size) for latents in readouts]
    maxima = [torch.zeros(len(batch), latents.size) for latents in readouts]
    activations = torch.zeros(len(batch), readouts[0].width)
    on, tokens = [0] * len(readouts), torch.zeros(len(batch), 1)
    starts = range(0, len(batch), rows)
    for start in tqdm(starts, desc=progress, unit="batch", disable=progress is None, leave=False):
        part = batch.part(slice(start, start + rows))
        found = read_activations(model, part, [point])[point]
        for row, every in enumerate(found.split(part.completion_mask.sum(1).tolist()), start):
            kept = every[~norm_outliers(every)]
            activations[row], tokens[row] = kept.mean(0), len(kept)
            for i, latents in enumerate(readouts):
                for few in blocks(kept.to(latents.encoder.device), len(latents.encoder)):
                    values = latents(few)
                    sums[i][row] += values.sum(0).cpu()
                    maxima[i][row] = torch.maximum(maxima[i][row], values.amax(0).cpu())
                    on[i] += int((values > 0).sum())
    count = max(float(tokens.sum()), 1.0)
    every_one = zip(sums, maxima, on, strict=True)
    return [PooledLatents(total / tokens, highest, times / count) for total, highest, times in every_one], activations


def read_blocks(
    model: Any,
    tokenizer: Any,
    sae: SparseAutoencoder,
    texts: Sequence[str | Mapping[str, Any]],
    how: ReadingOptions,
    label: str,
) -> Iterator[Block]:
    """Blocks of contexts in the order of the texts, each about one forward. `label` names the progress bar."""
    point, target = sae.spec.hook_point, sae.spec.output_point or sae.spec.hook_point
    with tqdm(total=len(texts), desc=label, unit="text", disable=not how.progress, leave=False) as bar:
        for pending in _contexts(texts, tokenizer, how, end_of_turn_ids(model, tokenizer)):
            lengths = [len(ids) for _, _, ids, _ in pending]
            batch = TokenBatch.from_ids([[] for _ in pending], [ids for _, _, ids, _ in pending])
            counted = torch.zeros_like(batch.attention_mask)
            for row, (length, (*_, counts)) in enumerate(zip(lengths, pending, strict=True)):
                counted[row, :length] = torch.tensor(counts)
            every = batch.attention_mask
            activations = read_activations(model, batch, [point, target], tokens=every, batch_tokens=how.batch_tokens)
            apart = torch.cat([norm_outliers(own) for own in activations[point].split(lengths)])
            outliers = int((counted[batch.attention_mask] & apart).sum())
            counted[batch.attention_mask] &= ~apart
            numbers, starts = [number for number, *_ in pending], [start for _, start, *_ in pending]
            yield Block(batch, counted, numbers, starts, activations[point], activations[target], outliers)
            bar.update(numbers[-1] + 1 - bar.n)


_Context = tuple[int, int, list[int], list[bool]]


def _contexts(
    texts: Sequence[str | Mapping[str, Any]], tokenizer: Any, how: ReadingOptions, ends: set[int]
) -> Iterator[list[_Context]]:
    """Groups of contexts (text, start, ids, flags of counted ids). Each group has about the tokens of one forward."""
    pending: list[_Context] = []
    tokens = 0
    for first in range(0, len(texts), _TEXTS):
        batch = tokenize_examples(texts[first : first + _TEXTS], tokenizer, end_of_turn_ids=ends)
        for row in range(len(batch)):
            real = batch.attention_mask[row]
            ids, counts = batch.input_ids[row][real].tolist(), batch.completion_mask[row][real].tolist()
            for start, part, which in _cut(ids, counts, tokenizer.bos_token_id, how.context_length):
                pending.append((first + row, start, part, which))
                tokens += len(part)
                if tokens >= how.batch_tokens:
                    yield pending
                    pending, tokens = [], 0
    if pending:
        yield pending


def _cut(
    ids: list[int], counts: list[bool], bos: int | None, length: int
) -> Iterator[tuple[int, list[int], list[bool]]]:
    """Start, ids and flags of counted ids, for each context of one text that has a counted token."""
    head = 1 if ids and bos is not None and ids[0] == bos and not counts[0] else 0
    for piece in context_slices(len(ids) - head, length, head):
        which = [False] * head + counts[head:][piece]
        which[0] = False
        if any(which):
            yield piece.start, ids[:head] + ids[head:][piece], which
