"""The statistics of evidence: AUROC with an interval, paired differences, calibration.

In: scores, labels, and the group (prompt) of each row. Out: numbers. Rows of one prompt are resampled together, since they
are not independent. A number that is not defined is NaN, and so is an interval from too few prompts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.stats import rankdata

from ..concepts.linear import equal_classes, log_loss, losses

if TYPE_CHECKING:
    from collections.abc import Sequence

RESAMPLES = 1000
MIN_PROMPTS = 10  # fewer groups give no interval: a bootstrap of three prompts sees only three values
MIN_PER_LABEL = 5  # an AUROC needs this many groups with each label


class Interval(NamedTuple):
    """A number with its 95 % interval. The bounds are NaN with too few prompts. All three are NaN without a value."""

    value: float
    low: float
    high: float


def enough_prompts(labels: np.ndarray, groups: Sequence[str]) -> bool:
    """True if there are `MIN_PROMPTS` groups, `MIN_PER_LABEL` of them with each label. An AUROC's interval needs these."""
    holds = [{group for group, its in zip(groups, labels, strict=True) if its == label} for label in (0, 1)]
    return len(holds[0] | holds[1]) >= MIN_PROMPTS and min(map(len, holds)) >= MIN_PER_LABEL


def auroc_interval(
    labels: np.ndarray, scores: np.ndarray, groups: Sequence[str], seed: int, resamples: int = RESAMPLES
) -> Interval:
    """AUROC and its 95 % percentile interval from a bootstrap over groups.

    Args:
        labels (`np.ndarray` of shape (N,)): 0 or 1.
        scores (`np.ndarray` of shape (N,)): higher = label 1.
        groups (`Sequence[str]`): group of each row. Rows of one group are drawn together.
        seed (`int`): seed of the bootstrap.

    Returns:
        `Interval`: AUROC in [0, 1], lower and upper bound. The bounds are NaN with too few groups (see
        `enough_prompts`). All three are NaN if a score is NaN.
    """
    if np.isnan(scores).any():
        return Interval(float("nan"), float("nan"), float("nan"))
    return _percentiles(weighted_aurocs(labels, scores, _counts(labels, groups, seed, resamples)))


def auroc_difference(
    labels: np.ndarray,
    scores: np.ndarray,
    others: np.ndarray,
    groups: Sequence[str],
    seed: int,
    resamples: int = RESAMPLES,
) -> Interval:
    """AUROC of `scores` less that of `others` on the same rows, with its 95 % percentile interval. One bootstrap resamples both.

    The bounds are NaN with too few groups (see `enough_prompts`). All three are NaN if a score is NaN.
    """
    if np.isnan(scores).any() or np.isnan(others).any():
        return Interval(float("nan"), float("nan"), float("nan"))
    counts = _counts(labels, groups, seed, resamples)
    return _percentiles(weighted_aurocs(labels, scores, counts) - weighted_aurocs(labels, others, counts))


def _counts(labels: np.ndarray, groups: Sequence[str], seed: int, resamples: int) -> np.ndarray:
    """How often each row was drawn, (resamples + 1, N). The first is the sample itself; too few groups have only this one."""
    once = np.ones((1, len(labels)))
    return np.concatenate([once, draws(groups, seed, resamples)]) if enough_prompts(labels, groups) else once


def draws(groups: Sequence[str], seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """How often a bootstrap over groups draws each row, (resamples, N). Rows of one group have the same count."""
    member_of = group_numbers(groups)
    count = int(member_of.max()) + 1
    drawn = np.random.default_rng(seed).integers(count, size=(resamples, count))
    times = np.zeros((resamples, count))
    np.add.at(times, (np.arange(resamples)[:, None], drawn), 1)
    return np.asarray(times[:, member_of])


def group_numbers(groups: Sequence[str]) -> np.ndarray:
    """Each row's group as a number (N,), counted in order of appearance."""
    order: dict[str, int] = {}
    return np.array([order.setdefault(group, len(order)) for group in groups], dtype=np.int64)


def _percentiles(values: np.ndarray) -> Interval:
    bounds = values[1:][np.isfinite(values[1:])]
    low, high = np.percentile(bounds, [2.5, 97.5]) if len(bounds) else (np.nan, np.nan)
    return Interval(float(values[0]), float(low), float(high))


def weighted_aurocs(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC under many weightings of the same rows at once. A bootstrap needs a thousand of them.

    Args:
        weights (`np.ndarray` of shape (R, N)): one weighting per line.

    Returns:
        `np.ndarray` of shape (R,): the share of (positive, negative) pairs in the right order; a tie counts one half. NaN if a
        class has no weight, or a row with weight has the score NaN. Infinite scores rank like any other.
    """
    unknown = np.isnan(scores)
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    starts = np.flatnonzero(
        np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]
    )  # equal scores: one group
    positive = np.add.reduceat(weights[:, order] * labels[order], starts, axis=1)
    negative = np.add.reduceat(weights[:, order] * (1 - labels[order]), starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    pairs = positive.sum(1) * negative.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        aurocs = (positive * below).sum(1) / pairs
    return np.where((weights[:, unknown] != 0).any(1), np.nan, aurocs)


def auroc_within(
    labels: np.ndarray, scores: np.ndarray, groups: Sequence[str], seed: int, resamples: int = RESAMPLES
) -> tuple[float, float, float, int]:
    """AUROC over pairs of one positive and one negative of the same group. The prompt alone cannot raise it.

    Pairs of all groups are pooled, so a group with more pairs counts more; ties count one half.

    Args:
        labels (`np.ndarray` of shape (N,)): 0 or 1.
        scores (`np.ndarray` of shape (N,)): higher = label 1.
        groups (`Sequence[str]`): group of each row. The bootstrap draws groups with both labels.
        seed (`int`): seed of the bootstrap.

    Returns:
        `tuple[float, float, float, int]`: AUROC in [0, 1], lower and upper bound of its 95 % percentile interval, and the number
        of groups that hold both labels. The bounds are NaN with fewer than `MIN_PROMPTS` such groups, the AUROC is NaN with
        none, or if a score in one of them is NaN.
    """
    numbers = group_numbers(groups)
    size = int(numbers.max()) + 1 if len(numbers) else 0
    pairs = np.bincount(numbers, labels == 1, size) * np.bincount(numbers, labels == 0, size)
    both = pairs > 0
    count = int(both.sum())
    kept = both[numbers]
    if not count or np.isnan(scores[kept]).any():
        return float("nan"), float("nan"), float("nan"), count
    order = np.flatnonzero(kept)[np.lexsort((scores[kept], numbers[kept]))]
    group, score = numbers[order], scores[order]
    new = np.concatenate([[True], group[1:] != group[:-1]])
    starts = np.flatnonzero(
        new | np.concatenate([[True], score[1:] != score[:-1]])
    )  # rows of equal score in one group
    positive = np.add.reduceat((labels[order] == 1).astype(float), starts)
    negative = np.add.reduceat((labels[order] == 0).astype(float), starts)
    below = np.cumsum(negative) - negative / 2
    start_groups = group[starts]
    before = np.cumsum(np.bincount(numbers[kept], labels[kept] == 0, size)) - np.bincount(
        numbers[kept], labels[kept] == 0, size
    )
    wins = np.bincount(start_groups, positive * (below - before[start_groups]), size)[both]
    pairs = pairs[both]
    value = float(wins.sum() / pairs.sum())
    if count < MIN_PROMPTS:
        return value, float("nan"), float("nan"), count
    drawn = np.random.default_rng(seed).integers(count, size=(resamples, count))
    low, high = np.percentile(wins[drawn].sum(1) / pairs[drawn].sum(1), [2.5, 97.5])
    return value, float(low), float(high), count


def mean_interval(
    values: np.ndarray, seed: int, groups: Sequence[str] | None = None, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Mean and its 95 % percentile interval from a bootstrap. If groups are given, it draws groups.

    Paired comparisons pass differences per row. The bounds are NaN with fewer than `MIN_PROMPTS` groups.
    """
    numbers = group_numbers(groups) if groups is not None else np.arange(len(values))
    counts = np.bincount(numbers)
    if len(counts) < MIN_PROMPTS:
        return float(values.mean()), float("nan"), float("nan")
    sums = np.bincount(numbers, values)
    drawn = np.random.default_rng(seed).integers(len(counts), size=(resamples, len(counts)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def calibration(labels: np.ndarray, log_odds: np.ndarray) -> tuple[float, float, float, float]:
    """Calibration of log-odds, with both labels weighted to be equally likely.

    Slope and intercept are those of the logistic regression of the label on the log-odds (Cox 1958, "Two further applications of
    a model for binary regression"; Van Calster et al. 2019, "Calibration: the Achilles heel of predictive analytics"), both
    fitted together.

    Args:
        labels (`np.ndarray` of shape (N,)): 0 or 1.
        log_odds (`np.ndarray` of shape (N,)): of label 1, in nats.

    Returns:
        `tuple[float, float, float, float]`: slope (1 = calibrated, below 1 = too extreme, above 1 = too timid), intercept in nats
        (0 = calibrated, above 0 = label 1 is more likely than one half at log-odds of 0), Brier score (0 to 1, lower is
        better, 0.25 = always one half) and log-loss in nats (lower is better, 0.693 = always one half). Slope and intercept are
        NaN if a threshold separates the labels, the log-odds are all equal, or one is infinite. All four are NaN if one of the
        log-odds is NaN or a label is missing.
    """
    if np.isnan(log_odds).any() or len(np.unique(labels)) < 2:
        return (float("nan"),) * 4
    weights = equal_classes(labels)
    brier = float(weights @ (_sigmoid(log_odds) - labels) ** 2)
    loss = log_loss(labels, log_odds)
    high, low = log_odds[labels == 1], log_odds[labels == 0]
    if high.min() >= low.max() or high.max() <= low.min() or not np.isfinite(log_odds).all():
        return float("nan"), float("nan"), brier, loss
    center, spread = log_odds.mean(), log_odds.std()
    bias, slope = logistic(((log_odds - center) / spread)[:, None], labels, weights, 1e-9) / np.array([1.0, spread])
    return float(slope), float(bias - slope * center), brier, loss


def logistic(
    features: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    penalty: float,
    start: np.ndarray | None = None,
    offset: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Logistic regression by Newton's method. With a dozen features, it takes at most a few hundred microseconds.

    Args:
        features (`np.ndarray` of shape (N, F)): features of about unit variance.
        labels (`np.ndarray` of shape (N,)): 0 or 1.
        weights (`np.ndarray` of shape (N,)): weights of the rows, with sum 1.
        penalty (`float`, above 0): half of it times the squared norm of the coefficients is added to the mean log-loss; the
            intercept is free.
        start (`np.ndarray` of shape (F + 1,), *optional*): coefficients to start from, such as the solution for a
            similar penalty.
        offset (`np.ndarray` of shape (N,), *optional*): log-odds that are added to those of the features.

    Returns:
        `np.ndarray` of shape (F + 1,): intercept, coefficients.
    """
    rows = np.concatenate([np.ones((len(features), 1)), features], axis=1)
    ridge = np.full(rows.shape[1], penalty)
    ridge[0] = 1e-9
    solution = np.zeros(rows.shape[1]) if start is None else start

    def objective(at: np.ndarray) -> float:
        return float(weights @ losses(labels, offset + rows @ at) + 0.5 * ridge @ at**2)

    value = objective(solution)
    for _ in range(100):
        likely = _sigmoid(offset + rows @ solution)
        gradient = rows.T @ (weights * (likely - labels)) + ridge * solution
        curvature = (rows * (weights * likely * (1 - likely))[:, None]).T @ rows + np.diag(ridge)
        step = np.linalg.solve(curvature, gradient)
        if gradient @ step < 1e-12:
            break
        size = 1.0
        while (after := objective(solution - size * step)) > value and size > 1e-6:
            size /= 2
        solution, value = solution - size * step, after
    return solution


def _sigmoid(log_odds: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * log_odds))


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's correlation of two arrays (N,); None if one does not vary or there are fewer than three finite pairs."""
    kept = np.isfinite(a) & np.isfinite(b)
    a, b = a[kept], b[kept]
    if len(a) < 3 or any(np.ptp(values) <= 1e-12 * np.abs(values).max() for values in (a, b)):
        return None
    return float(np.corrcoef(a, b)[0, 1])


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation of two columns, ties by their mean rank; None as for `correlation`."""
    return correlation(*(rankdata(values) for values in (a, b)))


def shares(original: np.ndarray, swapped: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`Swapped.share` (R,) under many weightings (R, M). The scores are those with the original and with the swapped answers."""
    total = weights.sum(1)
    within = (weights * (original - swapped) ** 2).sum(1) / 2 / total
    mean = (weights * (original + swapped)).sum(1) / 2 / total
    square = (weights * (original**2 + swapped**2)).sum(1) / 2 / total
    variance = square - mean**2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(variance > 1e-12 * np.maximum(square, 1e-300), within / variance, np.nan))
