"""The gain from a probe over all text baselines together, on examples that no fit has seen.

In: labels, scores of the probe and of the baselines, prompts. Out: `Added`. It must not know the source of a score.

Comparing two plain stacks, one with the probe as one more column, favours a probe that knows nothing new. A second copy of a
baseline is shrunk less. A ready-made mix of baselines need not be learned. The log of a length fits a line better than the
length. So only the part of the score that the baselines cannot predict is added to their prediction, by one coefficient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..concepts.linear import equal_classes, log_loss, losses
from .statistics import Interval, draws, enough_prompts, group_numbers, logistic, weighted_aurocs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NAN = float("nan")

OUTER_FOLDS = 5
REPEATS = 3  # draws of the outer folds, over which log-odds are averaged
# Penalties of `logistic`. The smallest ones are for labels that the baselines separate.
RIDGES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-6, 1e-8)
FARTHEST = 5.0  # standard deviations: where outliers are cut
WIDER = (
    (1 / OUTER_FOLDS + 1 / (OUTER_FOLDS - 1)) / (1 / OUTER_FOLDS)
) ** 0.5  # 1.5, Nadeau & Bengio's correction; see `added`


@dataclass(frozen=True)
class Added:
    """The gain from a probe's score over baselines.

    Attributes:
        auroc (`Interval`): AUROC with the probe minus AUROC without it, and its 95 % interval. Above 0 = it adds.
        log_loss (`Interval`): log-loss without the probe minus log-loss with it, in nats, with both labels equally likely, and
            its 95 % interval. Above 0 = it adds.
        auroc_without, auroc_with (`float`): in [0, 1].
        log_loss_without, log_loss_with (`float`): in nats; 0.693 = always one half.
        left_out (`list[str]`): baselines that are constant or not finite somewhere; `probe` if its score is not finite.
        prompts (`int`): number of prompts.
    """

    auroc: Interval
    log_loss: Interval
    auroc_without: float
    auroc_with: float
    log_loss_without: float
    log_loss_with: float
    left_out: list[str]
    prompts: int


def added(
    labels: np.ndarray, probe: np.ndarray, baselines: Mapping[str, np.ndarray], groups: Sequence[str], seed: int
) -> Added:
    """The gain from the probe's score over all baselines together, by nested cross-validation over prompts.

    For each of five outer folds, on the other four:

    1. Baselines together: ridge logistic regression on their standardized scores and normal scores of their ranks (so that a bent
       baseline counts as a straight one), its penalty chosen by log-loss in five inner folds. It gives log-odds out of fold.
    2. The new part of the probe: its score less what a linear regression on the same columns predicts at equal label.
       The log-odds of two normal classes split in this way: those of the baselines, plus those of the probe given the baselines.
    3. One coefficient for the new part, added to the log-odds of 1, times max(0, 1 − 2 var / coefficient²): one that is not
       clearly larger than its standard error counts as 0, and the two predictions are then the same.

    Log-odds are averaged over three draws of the outer folds. Their log-loss is that of probabilities cut to [1/(n + 2),
    1 − 1/(n + 2)], n prompts (Laplace's rule): n prompts cannot show that an error is rarer. Without the cut, a second score that
    separates the labels perfectly would lower the log-loss without limit.

    Intervals: bootstrap over prompts of the predictions, 1.5 times as wide. Resampling predictions ignores that the fits would
    differ on other examples, too. Nadeau & Bengio (2003, "Inference for the generalization error") put the variance of K folds
    at 1/K + 1/(K − 1) instead of 1/K of a fold's. In simulations they hold 0 in 95 of 100 cases and more where nothing is added.

    Limits. It speaks of these baselines as they were fitted: a probe that reads the same words with different errors adds to
    them, as a second noisy reading adds to the first (Westfall & Yarkoni 2016). Many prompts make that visible. A baseline may be
    bent but must be monotone: a property that only very short and very long texts share counts as new next to a length.

    Args:
        labels (`np.ndarray` of shape (N,)): 0 or 1.
        probe (`np.ndarray` of shape (N,)): the probe's score, in any unit.
        baselines (`dict[str, np.ndarray]`): name to scores (N,), in any unit and sign.
        groups (`Sequence[str]`): prompt of each row; rows of one prompt are in one fold and drawn together.
        seed (`int`): of folds and bootstrap.

    Returns:
        `Added`: numbers are NaN with too few prompts (see `enough_prompts`) or where the probe's score is not finite.
    """
    usable = {name: scores for name, scores in baselines.items() if np.isfinite(scores).all() and np.ptp(scores) > 0}
    left_out = [name for name in baselines if name not in usable]
    finite = bool(np.isfinite(probe).all())
    numbers = group_numbers(groups)
    prompts = len(np.unique(numbers))
    if not finite or not enough_prompts(labels, groups):
        nothing = Interval(NAN, NAN, NAN)
        return Added(nothing, nothing, NAN, NAN, NAN, NAN, left_out + ([] if finite else ["probe"]), prompts)
    columns = np.stack([*usable.values()], axis=1).astype(float) if usable else np.zeros((len(labels), 0))
    limit = float(np.log(prompts + 1))
    both = _nested_log_odds(labels, probe.astype(float), columns, numbers, limit, seed)
    times = np.concatenate([np.ones((1, len(labels))), draws(groups, seed)])
    without, with_probe = (weighted_aurocs(labels, log_odds, times) for log_odds in both)
    lost, kept = (_mean_losses(labels, np.clip(log_odds, -limit, limit), times) for log_odds in both)
    return Added(
        _widened(with_probe - without), _widened(lost - kept),
        float(without[0]), float(with_probe[0]), float(lost[0]), float(kept[0]), left_out, prompts,
    )  # fmt: skip


def _nested_log_odds(
    labels: np.ndarray, probe: np.ndarray, columns: np.ndarray, numbers: np.ndarray, limit: float, seed: int
) -> np.ndarray:
    """Log-odds (2, N) without and with the probe. The fits of a row did not see its prompt."""
    log_odds = np.zeros((2, len(labels)))
    for repeat in range(REPEATS):
        rng = np.random.default_rng([seed, repeat])
        folds = _deal_prompts(labels, numbers, rng)
        for fold in range(OUTER_FOLDS):
            test, fit = folds == fold, folds != fold
            inner = _deal_prompts(labels[fit], numbers[fit], rng)
            ours, theirs = _standardized(columns[fit], columns[test])
            fit_odds, test_odds = _together(ours, labels[fit], inner, theirs, limit)
            fit_rest, test_rest = _new_part(probe[fit], probe[test], ours, theirs, labels[fit])
            coefficient = _coefficient(fit_rest, labels[fit], fit_odds, numbers[fit])
            log_odds[0, test] += test_odds / REPEATS
            log_odds[1, test] += (test_odds + coefficient * test_rest) / REPEATS
    return log_odds


def _deal_prompts(labels: np.ndarray, numbers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fold of each row (N,), by prompt. Prompts are sorted by their share of label 1, ties by chance, and dealt out in turn."""
    _, numbers = np.unique(numbers, return_inverse=True)
    share = np.bincount(numbers, labels) / np.bincount(numbers)
    dealt = np.empty(len(share), dtype=np.int64)
    dealt[np.lexsort((rng.random(len(share)), share))] = np.arange(len(share)) % OUTER_FOLDS
    return np.asarray(dealt[numbers])


def _standardized(fit: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standardized scores and normal scores of ranks (N, 2 F) of both. The fit's rows set the scale."""
    from scipy.special import ndtri

    spread = fit.std(0)
    center, spread = fit.mean(0), np.where(spread > 0, spread, np.inf)
    sides = []
    for rows in (fit, test):
        ranks = np.empty_like(rows)
        for column, ordered in enumerate(np.sort(fit, axis=0).T):
            ranks[:, column] = sum(np.searchsorted(ordered, rows[:, column], side) for side in ("left", "right")) / 2
        normal = ndtri((ranks + 0.5) / (len(fit) + 1))
        sides.append(np.concatenate([np.clip((rows - center) / spread, -FARTHEST, FARTHEST), normal], axis=1))
    return sides[0], sides[1]


def _together(
    fit: np.ndarray, labels: np.ndarray, inner: np.ndarray, test: np.ndarray, limit: float
) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds by all baselines for the fit's rows (out of the inner folds, which choose the penalty) and for the test's rows."""
    log_odds = np.zeros((len(RIDGES), len(labels)))
    for fold in range(OUTER_FOLDS):
        held = inner == fold
        weights, solution = equal_classes(labels[~held]), None
        for i, penalty in enumerate(RIDGES):
            solution = logistic(fit[~held], labels[~held], weights, penalty, solution)
            log_odds[i, held] = solution[0] + fit[held] @ solution[1:]
    log_odds = np.clip(log_odds, -limit, limit)
    best = int(np.argmin([log_loss(labels, line) for line in log_odds]))
    solution = logistic(fit, labels, equal_classes(labels), RIDGES[best])
    return log_odds[best], solution[0] + test @ solution[1:]


def _new_part(
    fit: np.ndarray, test: np.ndarray, columns: np.ndarray, others: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The part of the probe's score that the baselines do not predict at equal label, with each of the fit's rows left out."""
    center, spread = fit.mean(), fit.std() or np.inf
    fit, test = (np.clip((scores - center) / spread, -FARTHEST, FARTHEST) for scores in (fit, test))
    rows = np.concatenate([np.ones((len(fit), 1)), labels[:, None], columns], axis=1)
    ridge = np.full(rows.shape[1], 1e-3 * len(rows))  # scores and ranks of one baseline are nearly the same column
    ridge[:2] = 0
    inverse = np.linalg.inv(rows.T @ rows + np.diag(ridge))
    coefficients = inverse @ (rows.T @ fit)
    leverage = np.einsum("ij,jk,ik->i", rows, inverse, rows)
    left = (fit - rows @ coefficients) / (1 - leverage) + coefficients[1] * labels
    middle = float(equal_classes(labels) @ left)
    return left - middle, test - coefficients[0] - others @ coefficients[2:] - middle


def _coefficient(new: np.ndarray, labels: np.ndarray, log_odds: np.ndarray, numbers: np.ndarray) -> float:
    """Coefficient of the new part next to fixed log-odds, shrunk by its variance (White's, summed by prompt)."""
    spread = float(new.std())
    if spread < 1e-9:
        return 0.0
    weights, penalty = equal_classes(labels), 1e-3
    bias, slope = logistic((new / spread)[:, None], labels, weights, penalty, offset=log_odds)
    likely = 1 / (1 + np.exp(-np.clip(log_odds + bias + slope * new / spread, -500, 500)))
    rows = np.stack([np.ones(len(new)), new / spread], axis=1)
    inverse = np.linalg.inv((rows * (weights * likely * (1 - likely))[:, None]).T @ rows + penalty * np.eye(2))
    gradients = rows * (weights * (labels - likely))[:, None]
    by_prompt = np.zeros((int(numbers.max()) + 1, 2))
    np.add.at(by_prompt, numbers, gradients)
    variance = (inverse @ by_prompt.T @ by_prompt @ inverse)[1, 1]
    return float(slope / spread * max(0.0, 1 - 2 * variance / slope**2)) if slope else 0.0


def _mean_losses(labels: np.ndarray, log_odds: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Log-loss (R,) under many weightings (R, N), with both labels equally likely. NaN if a label has no weight."""
    rows = losses(labels, log_odds)
    with np.errstate(invalid="ignore", divide="ignore"):
        sides = [
            times[:, labels == label] @ rows[labels == label] / times[:, labels == label].sum(1) for label in (0, 1)
        ]
    return np.asarray(sum(sides) / 2)


def _widened(values: np.ndarray) -> Interval:
    """The first value, with the percentile interval of the others, `WIDER` times as wide."""
    value = float(values[0])
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return Interval(value, value + WIDER * (float(low) - value), value + WIDER * (float(high) - value))
