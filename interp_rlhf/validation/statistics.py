"""AUROC with an interval, and paired differences: the statistics that evidence is made of.

In: scores, labels, and the group (prompt) of each row. Out: numbers. Rows of one prompt are resampled together, since they
are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import roc_auc_score

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
    members = _members(groups)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        rows = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        if 0 < labels[rows].sum() < len(rows):
            drawn.append(roc_auc_score(labels[rows], scores[rows]))
    low, high = np.percentile(drawn, [2.5, 97.5]) if drawn else (0.0, 1.0)
    return float(roc_auc_score(labels, scores)), float(low), float(high)


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
