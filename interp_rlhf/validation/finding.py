"""`find_latents`: which latents of a sparse autoencoder tell two sets of examples apart, beside what does so without one.

In: a model, a sparse autoencoder, labelled examples. Out: `Found`. Latents, pooling and every control are chosen on the fit part
alone and reported on the held-out part. It must not know what a latent is used for afterwards.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..concepts.examples import Examples
from ..concepts.linear import LinearProbe
from ..sae.autoencoder import random_dictionary
from ..sae.reading import counted_batch, pooled
from . import baselines
from .dictionaries import aurocs
from .inspecting import describe
from .overlap import require_apart
from .split import split_examples
from .statistics import auroc_difference, auroc_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ..activations.batch import TokenBatch
    from ..sae.autoencoder import SparseAutoencoder
    from ..sae.reading import Pooled

Interval = tuple[float, float, float]
RANDOM_DICTIONARIES = 3
_COLUMNS = 1024  # latents that are ranked at a time


@dataclass(frozen=True)
class FoundLatent:
    """A latent that separates.

    Attributes:
        index (`int`): which.
        sign (`int`): 1 where it is higher on label 1, −1 where on label 0; by the fit part.
        fit_auroc (`float`): by which it was ranked, sign included: at least 0.5.
        held_out (`tuple[float, float, float]`): AUROC on the held-out part with its 95 % interval, under the same sign.
    """

    index: int
    sign: int
    fit_auroc: float
    held_out: Interval


@dataclass(frozen=True)
class Found:
    """The latents that separate best, and what they have to be seen beside.

    Attributes:
        sae (`dict`): which autoencoder.
        concept (`tuple[str, str]`): names of label 0 and label 1.
        pooling (`str`): `mean` or `max` over the counted tokens of an example: that whose best latent separates the fit part
            better, the mean where they tie.
        latents (`list[FoundLatent]`): the best by fit AUROC, best first.
        probe, tfidf (`tuple[float, float, float]`): held-out AUROC of a dense probe on the mean activation at the same hook
            point (of the same tokens), and of a text classifier that sees words only.
        random (`list[tuple[float, float, float]]`): held-out AUROC of the best latent of random dictionaries, chosen the same
            way, one per seed.
        less_probe, less_tfidf, less_random (`tuple[float, float, float]`): held-out AUROC of the best latent less theirs, on the
            same rows, with intervals; the random dictionary is the best of them on the held-out part.
        examples (`tuple[int, int]`), l0 (`float`): rows of fit and held-out part; mean number of latents that are on, in the fit.
    """

    sae: dict[str, Any]
    concept: tuple[str, str]
    pooling: str
    latents: list[FoundLatent]
    probe: Interval
    tfidf: Interval
    random: list[Interval]
    less_probe: Interval
    less_tfidf: Interval
    less_random: Interval
    examples: tuple[int, int]
    l0: float

    def event(self) -> dict[str, Any]:
        """Fields of the run log's event `latents_found`."""
        return asdict(self)


@dataclass(frozen=True)
class _Part:
    """Examples as the model reads them; the first token of each does not count."""

    examples: Examples
    batch: TokenBatch

    @property
    def labels(self) -> np.ndarray:
        return self.examples.labels


def find_latents(
    model: Any,
    tokenizer: Any,
    sae: SparseAutoencoder,
    examples: Examples,
    held_out: Examples | float = 0.5,
    *,
    top: int = 10,
    seed: int = 0,
    dictionaries: int = RANDOM_DICTIONARIES,
    progress: bool = False,
) -> Found:
    """Latents whose pooled activation separates the labels.

    Two passes over the fit part, one over the other. Held in memory are means and maxima (examples, S) of the fit part, of all
    random dictionaries at a time; never (tokens, S).

    Args:
        model (`nn.Module`), tokenizer: what the autoencoder reads, as its adapters stand.
        examples (`Examples`): labelled; the fit part where the held-out part is given.
        held_out (`Examples` or `float`, defaults to 0.5): the held-out part, or its share of the prompts.
        top (`int`, defaults to 10): how many latents to report.
        seed (`int`, defaults to 0): of the split, the random dictionaries and the bootstrap.
        dictionaries (`int`, defaults to 3): how many random dictionaries.

    Raises:
        `ValueError`: parts that share a prompt or lack a label, an example without a counted token, another model's autoencoder.
    """
    sae.check_model(model)
    if top < 1 or dictionaries < 1:
        raise ValueError(f"`top` is {top} and `dictionaries` {dictionaries} – expected at least 1 of each.")
    fit_rows, rest_rows = (
        (examples, held_out) if isinstance(held_out, Examples) else split_examples(examples, seed, held_out)
    )
    require_apart(fit_rows, rest_rows)
    fit, rest = (_Part(rows, counted_batch(model, tokenizer, rows.rows)) for rows in (fit_rows, rest_rows))
    groups, labels = rest.examples.groups, rest.labels

    def interval(scores: np.ndarray) -> Interval:
        return auroc_interval(labels, scores, groups, seed)

    def less(scores: np.ndarray, others: np.ndarray) -> Interval:
        return auroc_difference(labels, scores, others, groups, seed)

    (ranking,), means = _rank(model, fit, [sae], top, "fit part" if progress else None)
    weight, _ = LinearProbe(seed=seed).fit(means.double().numpy(), fit.labels, fit.examples.groups)
    others = [random_dictionary(sae, seed + i, k=max(1, round(ranking.l0))) for i in range(dictionaries)]
    rankings, _ = _rank(model, fit, others, 1, "random dictionaries on the fit part" if progress else None)
    label = "held-out part" if progress else None
    (scores, *columns), means = _score(model, rest, [sae, *others], [ranking, *rankings], label)
    drawn = [column[:, 0] for column in columns]
    random = [interval(column) for column in drawn]
    probe, tfidf = (
        means.double().numpy() @ weight,
        baselines.tfidf(fit.examples.texts, fit.labels, rest.examples.texts),
    )
    best = scores[:, 0]
    return Found(
        sae=describe(sae), concept=examples.label_names, pooling=ranking.pooling,
        latents=[
            FoundLatent(index, sign, auroc, interval(scores[:, i]))
            for i, (index, sign, auroc) in enumerate(zip(ranking.indices, ranking.signs, ranking.aurocs, strict=True))
        ],
        probe=interval(probe), tfidf=interval(tfidf), random=random,
        less_probe=less(best, probe), less_tfidf=less(best, tfidf),
        less_random=less(best, drawn[int(np.argmax([auroc for auroc, *_ in random]))]),
        examples=(len(fit.examples), len(rest.examples)), l0=ranking.l0,
    )  # fmt: skip


@dataclass(frozen=True)
class _Ranking:
    pooling: str
    indices: list[int]
    signs: list[int]
    aurocs: list[float]
    l0: float


def _rank(
    model: Any, fit: _Part, saes: Sequence[SparseAutoencoder], top: int, progress: str | None
) -> tuple[list[_Ranking], torch.Tensor]:
    """The best latents of each dictionary, and the mean activations (N, D)."""
    found, means = pooled(model, fit.batch, [sae.latents() for sae in saes], progress=progress)
    return [_ranking(one, fit.labels, top) for one in found], means


def _ranking(read: Pooled, labels: np.ndarray, top: int) -> _Ranking:
    found = {"mean": _aurocs(read.means, labels), "max": _aurocs(read.maxima, labels)}
    apart = {pooling: np.abs(values - 0.5) for pooling, values in found.items()}
    pooling = max(apart, key=lambda name: apart[name].max())  # the first of equal ones
    order = np.argsort(-apart[pooling], kind="stable")[:top]
    chosen = found[pooling][order]
    signs = np.where(chosen >= 0.5, 1, -1)
    return _Ranking(pooling, order.tolist(), signs.tolist(), (0.5 + apart[pooling][order]).tolist(), read.l0)


def _score(
    model: Any, part: _Part, saes: Sequence[SparseAutoencoder], rankings: Sequence[_Ranking], progress: str | None
) -> tuple[list[np.ndarray], torch.Tensor]:
    """Pooled and signed values (N, top) of each dictionary's ranked latents, and the mean activations (N, D)."""
    chosen = [sae.latents(ranking.indices) for sae, ranking in zip(saes, rankings, strict=True)]
    found, means = pooled(model, part.batch, chosen, progress=progress)
    values = [
        (read.means if ranking.pooling == "mean" else read.maxima).double().numpy() * np.array(ranking.signs)
        for read, ranking in zip(found, rankings, strict=True)
    ]
    return values, means


def _aurocs(values: torch.Tensor, labels: np.ndarray) -> np.ndarray:
    """AUROC of every column of (N, S), some at a time: ranks are of float64."""
    return np.concatenate([aurocs(part.numpy(), labels) for part in values.split(_COLUMNS, dim=1)])
