"""The choice of a hook point and a pooling, by cross-validation over prompts.

In: features of labelled examples at hook points, under poolings. Out: the best candidate, and the AUROC of each. It must not know
models: the caller reads the features.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from ..messages import as_list
from .attention import fit_attention
from .linear import cross_validate, fold_aurocs, log_loss, platt
from .pooling import ATTENTION, FITTED, POOLINGS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

    from .attention import Query, Tokens
    from .linear import CrossValidated

    # Train and test rows of each fold.
    Splits = Sequence[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class SweepPoint:
    """Cross-validated AUROC of one hook point under one pooling.

    Attributes:
        hook_point (`str`): module path that was read.
        auroc (`float`), std (`float`): mean and standard deviation over folds, which are split by prompt.
        pooling (`str`): the pooling that the probe was fitted for.
        log_loss (`float`): log-loss of the scores out of fold after calibration on them, in nats. Both labels weigh alike.
    """

    hook_point: str
    auroc: float
    std: float
    pooling: str = "mean"
    log_loss: float = float("nan")


@dataclass(frozen=True, eq=False)
class Features:
    """Activations of the examples at one hook point.

    Attributes:
        hook_point (`str`): module path that was read.
        pooled (`dict[str, np.ndarray]`): pooling to pooled activations (N, D).
        tokens (`Tokens`, *optional*): activations of single tokens, for the poolings that `pooled` lacks.
    """

    hook_point: str
    pooled: dict[str, np.ndarray]
    tokens: Tokens | None


@dataclass(frozen=True, eq=False)
class Candidate:
    """A hook point and a pooling, with the result of their cross-validation.

    Attributes:
        chosen (`CrossValidated`): the regularization that does best, and the probes of its folds.
        features (`np.ndarray` of shape (N, D)): pooled activations.
        query (`Query`, *optional*): under `attention`, the query that pooled them.
    """

    hook_point: str
    pooling: str
    chosen: CrossValidated
    features: np.ndarray = field(repr=False)
    query: Query | None = None


def fitted_poolings(pooling: str | Sequence[str]) -> list[str]:
    """Poolings to fit for, each once.

    Raises:
        `ValueError`: none, or one that a probe cannot be fitted for.
    """
    poolings = list(dict.fromkeys(as_list(pooling)))
    if unknown := [how for how in poolings if how not in FITTED]:
        known = ", ".join(f"`{how}`" for how in FITTED)
        hint = " A fit for `mean` is calibrated for it too." if unknown[0] in POOLINGS else ""
        raise ValueError(f"`pooling` of the fit is `{unknown[0]}` – expected {known}, or several of them.{hint}")
    if not poolings:
        raise ValueError("`pooling` is empty – expected what to fit for, such as `mean`.")
    return poolings


def best_candidate(
    sets: Iterator[Features], poolings: Sequence[str], labels: np.ndarray, splits: Splits, method: str,
    strengths: Sequence[float], progress: int | None,
) -> tuple[Candidate, list[SweepPoint]]:  # fmt: skip
    """The candidate with the highest cross-validated AUROC, of equal ones that with the lowest log-loss; and a point for each.

    Args:
        sets (`Iterator[Features]`): features of each hook point. It is read once.
        poolings (`Sequence[str]`): what to fit for.
        progress (`int`, *optional*): number of hook points, to show a progress bar.
    """
    best: tuple[tuple[float, float], Candidate] | None = None
    curve: list[SweepPoint] = []
    total = None if progress is None else progress * len(poolings)
    with tqdm(total=total, desc="fitting", unit="fit", disable=progress is None, leave=False) as bar:
        for features in sets:
            for how in poolings:
                candidate = _candidate(features, how, labels, splits, method, strengths)
                point = _sweep_point(candidate, labels, splits)
                curve.append(point)
                bar.update()
                rank = (point.auroc, -point.log_loss)
                if best is None or rank > best[0]:
                    best = rank, candidate
    assert best is not None
    return best[1], curve


def _candidate(
    features: Features, how: str, labels: np.ndarray, splits: Splits, method: str, strengths: Sequence[float]
) -> Candidate:
    if how == ATTENTION:
        assert features.tokens is not None
        attended = fit_attention(features.tokens, labels, splits, method, strengths)
        return Candidate(features.hook_point, how, attended.chosen, attended.features, attended.query)
    if how in features.pooled:
        pooled = features.pooled[how]
    else:
        assert features.tokens is not None
        pooled = features.tokens.pooled(how)
    return Candidate(features.hook_point, how, cross_validate(pooled, labels, splits, method, strengths), pooled)


def _sweep_point(candidate: Candidate, labels: np.ndarray, splits: Splits) -> SweepPoint:
    scores = candidate.chosen.scores
    scale, offset = platt(labels, scores)
    auroc, std = fold_aurocs(labels, scores, splits)
    return SweepPoint(candidate.hook_point, auroc, std, candidate.pooling, log_loss(labels, scale * scores + offset))
