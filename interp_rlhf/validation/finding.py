"""`find_latents`: the latents of a sparse autoencoder that tell two sets of examples apart, next to methods without one.

In: a model, a sparse autoencoder, labelled examples. Out: `LatentsFound`. The fit part alone decides latents,
pooling and controls. The held-out part gives the reported numbers. It must not know what a latent is used for afterwards.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..concepts.examples import Examples
from ..concepts.linear import LinearProbe
from ..sae.autoencoder import describe, random_dictionary
from ..sae.reading import counted_batch, pool_latents
from . import baselines
from .dictionaries import aurocs
from .overlap import require_apart
from .split import split_examples
from .statistics import auroc_difference, auroc_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ..activations.batch import TokenBatch
    from ..sae.autoencoder import SparseAutoencoder
    from ..sae.reading import PooledLatents

AurocInterval = tuple[float, float, float]
COMPARED_DICTIONARIES = 3
_COLUMNS = 1024  # latents that are ranked at a time


@dataclass(frozen=True)
class FoundLatent:
    """A latent that separates the labels.

    Attributes:
        index (`int`): index of the latent.
        sign (`int`): 1 if it is higher on label 1 in the fit part, −1 if it is higher on label 0.
        fit_auroc (`float`): AUROC on the fit part, under this sign: at least 0.5. Latents are ranked by it.
        held_out (`tuple[float, float, float]`): AUROC on the held-out part with its 95 % interval, under the same sign.
    """

    index: int
    sign: int
    fit_auroc: float
    held_out: AurocInterval


@dataclass(frozen=True)
class LatentsFound:
    """The latents that separate the labels best, and the methods to compare them with.

    Attributes:
        sae (`dict`): description of the autoencoder.
        concept (`tuple[str, str]`): names of label 0 and label 1.
        pooling (`str`): `mean` or `max` over the counted tokens of an example. The pooling whose best latent separates the fit
            part better is chosen, and the mean in a tie.
        latents (`list[FoundLatent]`): the best by fit AUROC, best first.
        probe, tfidf (`tuple[float, float, float]`): held-out AUROC of a dense probe on the mean activation of the same
            tokens at the same hook point, and of a text classifier that sees only words.
        random (`list[tuple[float, float, float]]`): held-out AUROC of the best latent of random dictionaries, chosen the same
            way, one per seed.
        less_probe, less_tfidf, less_random (`tuple[float, float, float]`): held-out AUROC of the best latent minus theirs, on
            the same rows, with intervals. `less_random` compares with the best random dictionary on the held-out part.
        examples (`tuple[int, int]`): number of rows in the fit part and in the held-out part.
        l0 (`float`): mean number of latents that are on per token in the fit part.
    """

    sae: dict[str, Any]
    concept: tuple[str, str]
    pooling: str
    latents: list[FoundLatent]
    probe: AurocInterval
    tfidf: AurocInterval
    random: list[AurocInterval]
    less_probe: AurocInterval
    less_tfidf: AurocInterval
    less_random: AurocInterval
    examples: tuple[int, int]
    l0: float

    def event(self) -> dict[str, Any]:
        """Fields of the run log's event `latents_found`."""
        return asdict(self)


@dataclass(frozen=True)
class _Part:
    """Examples and their tokens. The first token of each example does not count."""

    examples: Examples
    batch: TokenBatch

    @property
    def labels(self) -> np.ndarray:
        return self.examples.labels

    def auroc(self, scores: np.ndarray, seed: int) -> AurocInterval:
        """AUROC of scores (N,) with its interval."""
        return auroc_interval(self.labels, scores, self.examples.groups, seed)

    def difference(self, scores: np.ndarray, others: np.ndarray, seed: int) -> AurocInterval:
        """AUROC of `scores` (N,) minus the AUROC of `others`, with its interval."""
        return auroc_difference(self.labels, scores, others, self.examples.groups, seed)


def find_latents(
    model: Any,
    tokenizer: Any,
    sae: SparseAutoencoder,
    examples: Examples,
    held_out: Examples | float = 0.5,
    *,
    top: int = 10,
    seed: int = 0,
    dictionaries: int = COMPARED_DICTIONARIES,
    progress: bool = False,
) -> LatentsFound:
    """Latents whose pooled activation separates the labels.

    It takes two passes over the fit part and one over the held-out part. Memory holds means and maxima (examples, S) of the fit
    part, for all random dictionaries at a time. It never holds (tokens, S).

    Args:
        model (`nn.Module`), tokenizer: the causal LM whose activations are encoded, with its adapters as they are.
        examples (`Examples`): labelled; the fit part where the held-out part is given.
        held_out (`Examples` or `float`, defaults to 0.5): the held-out part, or its share of the prompts.
        top (`int`, defaults to 10): how many latents to report.
        seed (`int`, defaults to 0): of the split, the random dictionaries and the bootstrap.
        dictionaries (`int`, defaults to 3): how many random dictionaries.

    Raises:
        `ValueError`: the parts share a prompt or lack a label, an example has no counted token, or the autoencoder belongs to
            another model.
    """
    sae.check_model(model)
    if top < 1 or dictionaries < 1:
        raise ValueError(f"`top` is {top} and `dictionaries` {dictionaries} – expected at least 1 of each.")
    fit, rest = _two_parts(model, tokenizer, examples, held_out, seed)
    (ranking,), means = _rank(model, fit, [sae], top, "fit part" if progress else None)
    weight, _ = LinearProbe(seed=seed).fit(means.double().numpy(), fit.labels, fit.examples.groups)
    others = [random_dictionary(sae, seed + i, k=max(1, round(ranking.l0))) for i in range(dictionaries)]
    rankings, _ = _rank(model, fit, others, 1, "random dictionaries on the fit part" if progress else None)
    label = "held-out part" if progress else None
    (scores, *columns), means = _score(model, rest, [sae, *others], [ranking, *rankings], label)
    best, drawn = scores[:, 0], [column[:, 0] for column in columns]
    random = [rest.auroc(column, seed) for column in drawn]
    best_random = drawn[int(np.argmax([auroc for auroc, *_ in random]))]
    probe = means.double().numpy() @ weight
    tfidf = baselines.tfidf(fit.examples.texts, fit.labels, rest.examples.texts)
    return LatentsFound(
        sae=describe(sae), concept=examples.label_names, pooling=ranking.pooling,
        latents=[
            FoundLatent(index, sign, auroc, rest.auroc(scores[:, i], seed))
            for i, (index, sign, auroc) in enumerate(zip(ranking.indices, ranking.signs, ranking.aurocs, strict=True))
        ],
        probe=rest.auroc(probe, seed), tfidf=rest.auroc(tfidf, seed), random=random,
        less_probe=rest.difference(best, probe, seed), less_tfidf=rest.difference(best, tfidf, seed),
        less_random=rest.difference(best, best_random, seed),
        examples=(len(fit.examples), len(rest.examples)), l0=ranking.l0,
    )  # fmt: skip


def _two_parts(
    model: Any, tokenizer: Any, examples: Examples, held_out: Examples | float, seed: int
) -> tuple[_Part, _Part]:
    """Fit part and held-out part, which share no prompt."""
    both = (examples, held_out) if isinstance(held_out, Examples) else split_examples(examples, seed, held_out)
    require_apart(*both)
    fit, rest = (_Part(rows, counted_batch(model, tokenizer, rows.rows)) for rows in both)
    return fit, rest


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
    read, means = pool_latents(model, fit.batch, [sae.latents() for sae in saes], progress=progress)
    return [_ranking(one, fit.labels, top) for one in read], means


def _ranking(read: PooledLatents, labels: np.ndarray, top: int) -> _Ranking:
    aurocs_of = {"mean": _aurocs_of_latents(read.means, labels), "max": _aurocs_of_latents(read.maxima, labels)}
    apart = {pooling: np.abs(values - 0.5) for pooling, values in aurocs_of.items()}
    pooling = max(apart, key=lambda name: apart[name].max())  # the first of equal ones
    order = np.argsort(-apart[pooling], kind="stable")[:top]
    chosen = aurocs_of[pooling][order]
    signs = np.where(chosen >= 0.5, 1, -1)
    return _Ranking(pooling, order.tolist(), signs.tolist(), (0.5 + apart[pooling][order]).tolist(), read.l0)


def _score(
    model: Any, part: _Part, saes: Sequence[SparseAutoencoder], rankings: Sequence[_Ranking], progress: str | None
) -> tuple[list[np.ndarray], torch.Tensor]:
    """Pooled and signed values (N, top) of each dictionary's ranked latents, and the mean activations (N, D)."""
    chosen = [sae.latents(ranking.indices) for sae, ranking in zip(saes, rankings, strict=True)]
    read, means = pool_latents(model, part.batch, chosen, progress=progress)
    values = [
        (one.means if ranking.pooling == "mean" else one.maxima).double().numpy() * np.array(ranking.signs)
        for one, ranking in zip(read, rankings, strict=True)
    ]
    return values, means


def _aurocs_of_latents(values: torch.Tensor, labels: np.ndarray) -> np.ndarray:
    """AUROC of every column of (N, S), in groups of columns, since the ranks are float64."""
    return np.concatenate([aurocs(part.numpy(), labels) for part in values.split(_COLUMNS, dim=1)])
