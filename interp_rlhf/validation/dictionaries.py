"""Extra evidence for a card of latents: the quality of its autoencoder here, and a comparison with random dictionaries.

In: a model, tokenized examples, the autoencoder. Out: explained variance, L0 and dead latents on the examples' own tokens; scores
of random dictionaries with the same choice of latents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..activations.collect import read_activations
from ..activations.outliers import norm_outliers
from ..concepts.card import SaeFindings
from ..concepts.linear import LinearProbe
from ..concepts.pooling import pool
from ..sae.quality import LatentSums
from .controls import PERMUTATIONS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..activations.batch import TokenBatch
    from ..concepts.latents import Latents
    from ..sae.autoencoder import SparseAutoencoder

ROWS_AT_A_TIME = 64


class RandomDictionaries:
    """Latents of random dictionaries, as many of each as the card weighs, chosen and weighed on the fit's examples.

    The choice is by the AUROC of a latent's mean, in either direction. A random dictionary so has the same chance to be right by
    luck as the card's autoencoder, whose latents were also chosen among all of them.

    Args:
        drawn (`Sequence[SparseAutoencoder]`): random dictionaries of the shape of the card's autoencoder.
        count (`int`): K, latents that the card weighs.
        strength (`float`, *optional*): regularization of the card's fit.
    """

    def __init__(
        self,
        model: Any,
        batch: TokenBatch,
        labels: np.ndarray,
        drawn: Sequence[SparseAutoencoder],
        count: int,
        method: str,
        strength: float | None,
        progress: bool = False,
    ):
        means = all_mean_latents(model, batch, drawn, "random dictionaries on the fit" if progress else None)
        self.readouts: list[tuple[Latents, torch.Tensor]] = []
        for dictionary, values in zip(drawn, means, strict=True):
            best, weight = _choose_columns(values, labels, count, method, strength)
            self.readouts.append((dictionary.latents(best.tolist()), torch.tensor(weight, dtype=torch.float32)))

    def scores(self, model: Any, batch: TokenBatch, pooling: str, progress: bool = False) -> np.ndarray:
        """Pooled scores (N, dictionaries) of a batch."""
        pooled = []
        point = self.readouts[0][0].hook_point
        for part, read in _parts(model, batch, [point], "random dictionaries" if progress else None):
            scores = torch.zeros(*part.completion_mask.shape, len(self.readouts))
            columns = [latents(read[point]) @ weight for latents, weight in self.readouts]
            scores[part.completion_mask] = torch.stack(columns, dim=-1)
            pooled.append(pool(scores, part.completion_mask, pooling).double().numpy())
        return np.concatenate(pooled)


def permuted_choices(
    means: np.ndarray,
    labels: np.ndarray,
    sae: SparseAutoencoder,
    count: int,
    method: str,
    strength: float | None,
    seed: int,
) -> tuple[Latents, np.ndarray]:
    """Latents chosen and weighed on permuted labels, `PERMUTATIONS` times.

    The choice must be repeated too. If only the fit of the weights saw permuted labels, the choice would stay the same, and one
    latent has only two weights: up and down.

    Args:
        means (`np.ndarray` of shape (N, S)): all latents on the fit's examples.
        count (`int`): K, latents per choice.

    Returns:
        The U latents that were chosen at least once, and weights (permutations, U) on them.
    """
    rng = np.random.default_rng(seed)
    choices = [_choose_columns(means, rng.permutation(labels), count, method, strength) for _ in range(PERMUTATIONS)]
    union = sorted({int(index) for best, _ in choices for index in best})
    place = {index: i for i, index in enumerate(union)}
    weights = np.zeros((PERMUTATIONS, len(union)))
    for row, (best, weight) in enumerate(choices):
        weights[row, [place[int(index)] for index in best]] = weight
    return sae.latents(union), weights


def _choose_columns(
    means: np.ndarray, labels: np.ndarray, count: int, method: str, strength: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the latents whose mean separates the labels best, in either direction, and a probe's weights on them."""
    best = np.argsort(-np.abs(aurocs(means, labels) - 0.5), kind="stable")[:count]
    return best, LinearProbe(method, strength).fit(means[:, best], labels)[0]


def sae_findings(model: Any, batch: TokenBatch, sae: SparseAutoencoder, progress: bool = False) -> SaeFindings:
    """Explained variance (1 − FVU, over tokens), mean L0 and share of latents that are never on, on a batch's counted tokens.

    The first token of a row and tokens whose norm stands out are left out. For a transcoder this is the variance of its
    predicted output.
    """
    point, target = sae.spec.hook_point, sae.spec.output_point or sae.spec.hook_point
    read: dict[str, list[torch.Tensor]] = {point: [], target: []}  # an autoencoder has one point only
    for part, activations_at in _parts(model, batch, list(read), "the autoencoder on the text" if progress else None):
        real = part.attention_mask.bool()
        first = (real & (real.cumsum(1) == 1))[part.completion_mask]
        for name, parts in read.items():
            parts.append(activations_at[name][~first])
    whole = {name: torch.cat(parts) for name, parts in read.items()}
    kept = ~norm_outliers(whole[point])
    whole = {name: activations[kept] for name, activations in whole.items()}
    values = whole[point]
    sums = LatentSums(sae.size)
    for block in values.split(1024):
        sums.add(sae.encode(block))
    return SaeFindings(
        explained_variance=round(1 - sae.fvu(values, whole[target]), 4), l0=round(sums.l0, 2),
        dead_fraction=round(sums.dead_fraction, 4), latents=sae.size, tokens=len(values),
    )  # fmt: skip


def all_mean_latents(
    model: Any, batch: TokenBatch, saes: Sequence[SparseAutoencoder], progress: str | None = None
) -> list[np.ndarray]:
    """Mean of every latent over counted tokens, (N, S) for each autoencoder at one hook point, by one forward.

    (T, S) is held only for a block of tokens.
    """
    means_of: list[list[torch.Tensor]] = [[] for _ in saes]
    point = saes[0].spec.hook_point
    for part, read in _parts(model, batch, [point], progress):
        activations = read[point]
        rows = part.completion_mask.nonzero()[:, 0]
        lengths = part.completion_mask.sum(1).clamp(min=1)
        for sae, means in zip(saes, means_of, strict=True):
            total = torch.zeros(len(part), sae.size, dtype=torch.float64)
            for start in range(0, len(rows), 512):
                total.index_add_(0, rows[start : start + 512], sae.encode(activations[start : start + 512]).double())
            means.append(total / lengths[:, None])
    return [torch.cat(means).numpy() for means in means_of]


def aurocs(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """AUROC of every column of (N, S): the share of (positive, negative) pairs in order, ties one half."""
    from scipy.stats import rankdata

    ranks = rankdata(values, axis=0)
    positive = labels == 1
    count = int(positive.sum())
    above = ranks[positive].sum(0) - count * (count + 1) / 2
    return np.asarray(above / (count * (len(labels) - count)))


def _parts(
    model: Any, batch: TokenBatch, hook_points: Sequence[str], progress: str | None
) -> Iterator[tuple[TokenBatch, dict[str, torch.Tensor]]]:
    """Some rows at a time, with the activations (n, D) of their counted tokens by hook point."""
    starts = range(0, len(batch), ROWS_AT_A_TIME)
    for start in tqdm(starts, desc=progress, disable=progress is None, leave=False):
        part = batch.part(slice(start, start + ROWS_AT_A_TIME))
        yield part, read_activations(model, part, hook_points)
