"""Where latents are on: the texts that turn them on, the texts that almost do, and how often they are on.

In: a model, a sparse autoencoder, texts. Out: contexts, density and histogram of each latent, and the quality of the whole
autoencoder on these texts. All S latents are computed for one block of tokens at a time. It must not know labels, nor the look
of a page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import linear, max_pool1d

from ..concepts.latents import blocks, normalize
from .quality import ErrorSums, LatentSums
from .reading import read_blocks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..concepts.latents import Latents
    from .autoencoder import SparseAutoencoder
    from .reading import Block, ReadingOptions

# Bins between 0 and a power of two. A larger value merges neighbouring bins, so no value is read twice.
BINS = 64


@dataclass(frozen=True)
class Window:
    """Tokens around one token, with the activation of a latent on each.

    Attributes:
        text (`int`), position (`int`): index of the text, and of the central token among the text's tokens.
        pieces (`list[str]`), token_ids (`list[int]`): the tokens of the window.
        activations (`list[float | None]`): activation on each token; None on a token that does not count.
        peak (`int`): index of the central token in the window.
        value (`float`, *optional*): activation on the central token. In a near miss it is the pre-activation; in a random window
            it is None.
    """

    text: int
    position: int
    pieces: list[str]
    token_ids: list[int]
    activations: list[float | None]
    peak: int
    value: float | None


@dataclass
class LatentContexts:
    """Contexts and statistics of one latent.

    Attributes:
        index (`int`): index of the latent.
        density (`float`): share of counted tokens on which it is on, in [0, 1].
        mean (`float`), maximum (`float`): mean and maximum of its activations above 0; both are 0 if it is never on.
        histogram (`dict`): `edges` (N + 1) and `counts` (N) of its activations above 0.
        top (`list[Window]`): windows around its highest activations, one per context, highest first.
        near (`list[Window]`): windows in which it is never on, around its highest pre-activations.
        off (`list[Window]`): windows in which it is never on, drawn at random from the same texts.
    """

    index: int
    density: float
    mean: float
    maximum: float
    histogram: dict[str, list[float]]
    top: list[Window]
    near: list[Window]
    off: list[Window]


@dataclass(frozen=True)
class Survey:
    """Statistics of all latents on the texts.

    Attributes:
        texts, contexts, tokens (`int`): numbers of texts, of contexts and of tokens that count.
        outliers (`int`): tokens that do not count because their norm stands out.
        fvu (`float`): fraction of variance unexplained, lower = better; see `SparseAutoencoder.fvu`.
        l0 (`float`): mean number of latents that are on.
        dead (`float`): share of latents that were never on.
        density, mean (`torch.Tensor` of shape (S,)): share of tokens on which each latent is on, and its mean over all tokens.
    """

    texts: int
    contexts: int
    tokens: int
    outliers: int
    fvu: float
    l0: float
    dead: float
    density: torch.Tensor
    mean: torch.Tensor


def survey(
    model: Any, tokenizer: Any, sae: SparseAutoencoder, texts: Sequence[str | Mapping[str, Any]], how: ReadingOptions
) -> Survey:
    """Statistics of all latents, by one pass over texts.

    Raises:
        `ValueError`: the texts have fewer than two tokens that count.
    """
    totals = _Totals(sae)
    for block in read_blocks(model, tokenizer, sae, texts, how, "all latents"):
        totals.add(block)
    return totals.survey(len(texts))


def require_windows(contexts: int) -> None:
    """Raises `ValueError` if no window of a kind would be kept."""
    if contexts < 1:
        raise ValueError(f"`contexts` is {contexts} – expected at least 1 window of each kind per latent.")


def gather_contexts(
    model: Any,
    tokenizer: Any,
    sae: SparseAutoencoder,
    texts: Sequence[str | Mapping[str, Any]],
    indices: Sequence[int],
    how: ReadingOptions,
    *,
    contexts: int = 10,
    seed: int = 0,
    whole: bool = True,
) -> tuple[list[LatentContexts], Survey | None]:
    """Contexts of chosen latents, by one pass over texts.

    The first token of a context does not count. A token whose norm stands out in its context does not count either
    (`norm_outliers`). Activations are rounded to twelve bits before they are compared, because the last bits depend on the
    batches. Equal activations keep the order of the texts. Equal windows are shown once.

    Args:
        indices (`Sequence[int]`): the latents. If the architecture allows it, only their rows of the encoder are read.
        contexts (`int`, defaults to 10): most windows of each kind per latent.
        seed (`int`, defaults to 0): seed of the random windows.
        whole (`bool`, defaults to `True`): also survey all latents, in the same pass.

    Raises:
        `ValueError`: an index is out of range, `contexts` is below 1, or the texts have fewer than two tokens that count.
    """
    require_windows(contexts)
    chosen = sae.latents(indices)
    totals = _Totals(sae) if whole else None
    kept = _Chosen(sae, chosen, indices, contexts, seed, how.window)
    for block in read_blocks(model, tokenizer, sae, texts, how, "latents"):
        if totals is not None:
            totals.add(block)
        kept.add(block)
    return kept.finish(tokenizer), None if totals is None else totals.survey(len(texts))


class _Totals:
    """Sums over all S latents and all counted tokens."""

    def __init__(self, sae: SparseAutoencoder):
        self.sae = sae
        self.errors, self.latents = ErrorSums(), LatentSums(sae.size)
        self.contexts = self.outliers = 0

    @torch.no_grad()
    def add(self, block: Block) -> None:
        sae, device = self.sae, self.sae.encoder.device
        size = next(blocks(block.activations, sae.size)).shape[0]
        activations, targets = block.activations[block.kept], block.targets[block.kept]
        for few, wanted in zip(activations.split(size), targets.split(size), strict=True):
            here = few.to(device)
            latents = sae.encode(here)  # (n, S)
            self.latents.add(latents)
            rebuilt = sae.decode(latents, here)
            rebuilt = rebuilt if sae.skip is None else rebuilt + here @ sae.skip.T
            self.errors.add(wanted, rebuilt.cpu())
        self.contexts += len(block.texts)
        self.outliers += block.outliers

    def survey(self, texts: int) -> Survey:
        tokens = self.latents.tokens
        if tokens < 2:
            raise ValueError(
                f"{tokens} tokens count in these texts – expected at least two. The first of each context does not count."
            )
        return Survey(
            texts, self.contexts, tokens, self.outliers, self.errors.fvu, self.latents.l0, self.latents.dead_fraction,
            self.latents.density, self.latents.mean,
        )  # fmt: skip


_Key = tuple[float, int, int]


@dataclass
class _Best:
    """The windows with the highest keys. Among equal windows the one with the highest key is kept."""

    size: int
    entries: dict[tuple[int, ...], tuple[_Key, Window]] = field(default_factory=dict)

    @property
    def floor(self) -> float:
        full = len(self.entries) >= self.size
        return min(key[0] for key, _ in self.entries.values()) if full else -np.inf

    def offer(self, key: _Key, window: Window) -> None:
        ids = tuple(window.token_ids)
        if ids in self.entries and self.entries[ids][0] >= key:
            return
        self.entries[ids] = (key, window)
        if len(self.entries) > self.size:
            del self.entries[min(self.entries, key=lambda ids: self.entries[ids][0])]

    def windows(self) -> list[Window]:
        return [window for _, window in sorted(self.entries.values(), key=lambda entry: entry[0], reverse=True)]


class _Chosen:
    """Windows, histogram and density of K latents."""

    def __init__(
        self, sae: SparseAutoencoder, chosen: Latents, indices: Sequence[int], contexts: int, seed: int, window: int
    ):
        self.chosen, self.indices, self.seed, self.window = chosen, list(indices), seed, window
        self.normalization = sae.spec.normalization
        self.rows = chosen.chosen
        bias = sae.encoder_bias[self.indices]
        self.bias = bias if sae.center is None else bias - self.rows @ sae.center
        count = len(self.indices)
        self.best = {kind: [_Best(contexts) for _ in range(count)] for kind in ("top", "near", "off")}
        self.tokens = 0
        self.on = torch.zeros(count, dtype=torch.long)
        self.sum = torch.zeros(count, dtype=torch.float64)
        self.maximum = torch.zeros(count)
        self.high = torch.zeros(count)  # upper end of the histogram, a power of two
        self.bins = torch.zeros(count, BINS, dtype=torch.long)

    @torch.no_grad()
    def add(self, block: Block) -> None:
        activations = block.activations.to(self.rows.device)
        values = self.chosen(activations).cpu()  # (N, K)
        before = linear(normalize(activations, self.normalization)[0], self.rows, self.bias).cpu()
        self._count(values[block.kept])
        counted = block.counted[:, None]  # (B, 1, T)
        padded, padded_before = (_padded(part, block.batch.attention_mask) for part in (values, before))  # (B, K, T)
        padded = padded.masked_fill(~counted, 0.0)
        self._offer("top", block, padded, _to_twelve_bits(padded.masked_fill(padded == 0, -torch.inf)), padded)
        width = 2 * self.window + 1
        off = (max_pool1d(padded, width, 1, self.window) == 0) & counted
        self._offer("near", block, padded, _to_twelve_bits(padded_before.masked_fill(~off, -torch.inf)), padded_before)
        drawn = torch.zeros(block.counted.shape)
        for row, (text, start) in enumerate(zip(block.texts, block.starts, strict=True)):
            length = int(block.batch.attention_mask[row].sum())
            numbers = np.random.default_rng((self.seed, text, start)).random(length, dtype=np.float32)
            drawn[row, :length] = torch.from_numpy(numbers)
        self._offer("off", block, padded, drawn[:, None].expand_as(off).masked_fill(~off, -torch.inf), None)

    def _count(self, values: torch.Tensor) -> None:
        self.tokens += len(values)
        self.on += (values > 0).sum(0)
        self.sum += values.double().sum(0)
        highest = values.amax(0) if len(values) else torch.zeros_like(self.maximum)
        self.maximum = torch.maximum(self.maximum, highest)
        power = torch.ldexp(torch.ones_like(highest), torch.frexp(highest).exponent)  # the next power of two
        wanted = torch.where(highest > 0, torch.maximum(self.high, power), self.high)
        while (grow := (self.high > 0) & (self.high < wanted)).any():
            pairs = self.bins[grow].view(-1, BINS // 2, 2).sum(-1)
            self.bins[grow] = torch.cat([pairs, torch.zeros_like(pairs)], 1)
            self.high[grow] *= 2
        self.high = wanted
        token, latent = (values > 0).nonzero(as_tuple=True)
        bins = (values[token, latent] / self.high[latent] * BINS).long().clamp(max=BINS - 1)
        self.bins.view(-1).index_add_(0, latent * BINS + bins, torch.ones_like(bins))

    def _offer(
        self, kind: str, block: Block, values: torch.Tensor, keys: torch.Tensor, shown: torch.Tensor | None
    ) -> None:
        """Offer each context's position with the highest key (B, K, T) to the windows of each latent, with its shown value."""
        highest, places = keys.max(-1)  # (B, K)
        floors = torch.tensor([best.floor for best in self.best[kind]])
        for row, latent in (highest > floors).nonzero().tolist():
            best, key, place = self.best[kind][latent], float(highest[row, latent]), int(places[row, latent])
            if key <= best.floor:
                continue
            value = None if shown is None else float(shown[row, latent, place])
            window = self._window_of(block, row, place, values[row, latent], value)
            best.offer((key, -window.text, -window.position), window)

    def _window_of(self, block: Block, row: int, place: int, values: torch.Tensor, value: float | None) -> Window:
        length = int(block.batch.attention_mask[row].sum())
        shown = slice(max(0, place - self.window), min(length, place + self.window + 1))
        counts = block.counted[row, shown].tolist()
        activations = [x if counted else None for x, counted in zip(values[shown].tolist(), counts, strict=True)]
        ids = block.batch.input_ids[row, shown].tolist()
        return Window(block.texts[row], block.starts[row] + place, [], ids, activations, place - shown.start, value)

    def finish(self, tokenizer: Any) -> list[LatentContexts]:
        entries = []
        for i, index in enumerate(self.indices):
            windows = {
                kind: [_with_pieces(w, tokenizer) for w in best[i].windows()] for kind, best in self.best.items()
            }
            on = int(self.on[i])
            entries.append(
                LatentContexts(
                    index, on / max(self.tokens, 1), float(self.sum[i]) / max(on, 1), float(self.maximum[i]),
                    self._histogram(i), **windows,
                )
            )  # fmt: skip
        return entries

    def _histogram(self, i: int) -> dict[str, list[float]]:
        """Edges and counts up to the highest bin that is not empty: 17 to 32 bins."""
        counts = self.bins[i].view(-1, 2).sum(1)
        filled = int(counts.nonzero().max()) + 1 if counts.any() else 0
        step = float(self.high[i]) * 2 / BINS
        return {"edges": [step * edge for edge in range(filled + 1)], "counts": counts[:filled].tolist()}


def _padded(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values (N, K) of real tokens as (B, K, T), 0 on padding."""
    found = values.new_zeros(*mask.shape, values.shape[1])
    found[mask] = values
    return found.transpose(1, 2)


def _to_twelve_bits(values: torch.Tensor) -> torch.Tensor:
    """Values rounded to twelve bits."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 4096).round() / 4096, exponent)


def _with_pieces(window: Window, tokenizer: Any) -> Window:
    return Window(**{**vars(window), "pieces": pieces(tokenizer, window.token_ids)})


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text of each token. Joined, the pieces give the whole text, unless a character is split between two tokens."""
    texts = [tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False) for end in range(len(ids) + 1)]
    if all(after.startswith(before) for before, after in pairwise(texts)):
        return [after[len(before) :] for before, after in pairwise(texts)]
    return [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in ids]
