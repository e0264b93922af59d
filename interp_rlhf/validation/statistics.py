"""AUROC with an interval, and paired differences: the statistics that evidence is made of.

In: scores, labels, and the group (prompt) of each row. Out: numbers. Rows of one prompt are resampled together, since they
are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 1000


def auroc_interval(
    labels: np.ndarray, scores: np.ndarray, groups: Sequence[str], seed: int, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """AUROC and its 95 % percentile interval from a bootstrap over groups.

    Args:
        labels (`np.ndarray` of shape (N,)): 0 or 1.
        scores (`np.ndarray` of shape (N,)): higher = label 1.
        groups (`Sequence[str]`): rows of one group are drawn together.
        seed (`int`): of the bootstrap.

    Returns:
        `tuple[float, float, float]`: AUROC in [0, 1], lower and upper bound.
    """
    found = weighted_aurocs(labels, scores, _counts(len(labels), groups, seed, resamples))
    return _interval(found, (0.0, 1.0))


def auroc_difference(
    labels: np.ndarray,
    scores: np.ndarray,
    others: np.ndarray,
    groups: Sequence[str],
    seed: int,
    resamples: int = RESAMPLES,
) -> tuple[float, float, float]:
    """AUROC of `scores` less that of `others` on the same rows, and its 95 % percentile interval: both are resampled alike."""
    counts = _counts(len(labels), groups, seed, resamples)
    return _interval(weighted_aurocs(labels, scores, counts) - weighted_aurocs(labels, others, counts), (-1.0, 1.0))


def _counts(rows: int, groups: Sequence[str], seed: int, resamples: int) -> np.ndarray:
    """How often each row was drawn, (resamples + 1, rows); the first line is the sample itself."""
    members = _members(groups)
    draws = np.random.default_rng(seed).integers(len(members), size=(resamples, len(members)))
    times = np.zeros((resamples, len(members)))
    np.add.at(times, (np.arange(resamples)[:, None], draws), 1)
    member_of = np.empty(rows, dtype=np.int64)
    for index, own in enumerate(members):
        member_of[own] = index
    return np.concatenate([np.ones((1, rows)), times[:, member_of]])


def _interval(found: np.ndarray, without: tuple[float, float]) -> tuple[float, float, float]:
    bounds = found[1:][np.isfinite(found[1:])]
    low, high = np.percentile(bounds, [2.5, 97.5]) if len(bounds) else without
    return float(found[0]), float(low), float(high)


def weighted_aurocs(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC under many weightings of the same rows at once: what a bootstrap needs a thousand times.

    Args:
        weights (`np.ndarray` of shape (R, N)): one weighting per line.

    Returns:
        `np.ndarray` of shape (R,): the share of (positive, negative) pairs in order, ties one half; NaN where a class has no
        weight.
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # rows of equal score are one group
    positive = np.add.reduceat(weights[:, order] * labels[order], starts, axis=1)
    negative = np.add.reduceat(weights[:, order] * (1 - labels[order]), starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    pairs = positive.sum(1) * negative.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((positive * below).sum(1) / pairs)


def mean_interval(
    values: np.ndarray, seed: int, groups: Sequence[str] | None = None, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Mean and its 95 % percentile interval from a bootstrap, over groups where they are given.

    Paired comparisons pass differences per row.
    """
    members = _members(groups if groups is not None else [str(i) for i in range(len(values))])
    sums = np.array([values[rows].sum() for rows in members])
    counts = np.array([len(rows) for rows in members])
    draws = np.random.default_rng(seed).integers(len(members), size=(resamples, len(members)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def _members(groups: Sequence[str]) -> list[np.ndarray]:
    order: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        order.setdefault(group, []).append(row)
    return [np.array(rows) for rows in order.values()]
