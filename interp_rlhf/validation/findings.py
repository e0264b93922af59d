"""Numbers of the check as a card holds them: rounded, with None for a number that is not defined.

In: statistics. Out: parts of `Findings`. It must not know models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..concepts.card import Adds, Calibration, Difference, Estimate, PromptFindings
from .statistics import auroc_interval, calibration, draws, enough_prompts, shares

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .added import Added
    from .prompts import Swapped


def number(value: float) -> float | None:
    """The number with four digits. None if it is not finite."""
    return round(float(value), 4) if np.isfinite(value) else None


def difference(interval: Sequence[float]) -> Difference:
    """A difference for a card. It has no bounds with too few prompts to resample."""
    value, low, high = interval
    return Difference(value=round(float(value), 4), low=number(low), high=number(high))


def estimate(interval: Sequence[float]) -> Estimate:
    """An AUROC for a card. It has no bounds with too few prompts to resample."""
    auroc, low, high = interval
    return Estimate(auroc=round(auroc, 4), low=number(low), high=number(high))


def added_finding(result: Added) -> Adds | None:
    """The gain from a probe, for a card. None with too few prompts."""
    if not np.isfinite(result.auroc.value):
        return None
    return Adds(
        auroc=difference(result.auroc), log_loss=difference(result.log_loss),
        **{
            name: round(getattr(result, name), 4)
            for name in ("auroc_without", "auroc_with", "log_loss_without", "log_loss_with")
        },
    )  # fmt: skip


def calibration_finding(labels: np.ndarray, log_odds: np.ndarray) -> Calibration:
    """Slope, intercept, Brier score and log-loss."""
    slope, intercept, brier, loss = calibration(labels, log_odds)
    return Calibration(
        slope=number(slope), intercept=number(intercept), brier=round(brier, 4), log_loss=round(loss, 4)
    )


def prompt_finding(
    *, tfidf: Estimate, both: Estimate, probe: Estimate, within: tuple[float, float, float, int], swapped: Swapped | None,
    seed: int,
) -> PromptFindings:  # fmt: skip
    """The score's dependence on the prompt alone, and the share of its variance that is due to the answer."""
    share = kept = None
    if swapped is not None and np.isfinite(swapped.share):
        bounds = [np.nan, np.nan]
        if enough_prompts(swapped.labels, swapped.groups):
            drawn = shares(swapped.own, swapped.other, draws(swapped.groups, seed))
            bounds = list(np.nanpercentile(drawn, [2.5, 97.5]))
        share = difference((swapped.share, *bounds))
        if len(set(swapped.labels.tolist())) == 2:
            kept = estimate(auroc_interval(swapped.labels, swapped.other, swapped.groups, seed))
    auroc, low, high, prompts = within
    return PromptFindings(
        tfidf=tfidf, tfidf_with_completion=both, probe=probe,
        within=None if prompts == 0 else estimate((auroc, low, high)), prompts_with_both_labels=prompts,
        answer_share=share, other_answers=kept,
    )  # fmt: skip
