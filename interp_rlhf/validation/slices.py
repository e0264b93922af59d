"""Evidence by group: what a probe is worth for each topic, language or source of the examples.

In: labels, scores and the group of each row. Out: one `GroupFindings` per group, the smallest first. It must not know models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..concepts.card import GroupFindings
from .findings import calibration_finding, estimate
from .statistics import auroc_interval

if TYPE_CHECKING:
    from collections.abc import Sequence


def findings_by_group(
    labels: np.ndarray,
    scores: np.ndarray,
    log_odds: np.ndarray,
    prompts: Sequence[str],
    slices: Sequence[str],
    seed: int,
) -> list[GroupFindings]:
    """Findings of every group, by number of examples, then by name.

    Args:
        labels (`np.ndarray` of shape (N,)): 0 or 1.
        scores (`np.ndarray` of shape (N,)), log_odds (`np.ndarray` of shape (N,)): the probe's score and its calibrated log-odds.
        prompts (`Sequence[str]`): the prompt of each row, which the bootstrap draws.
        slices (`Sequence[str]`): the group of each row.
    """
    groups = np.array(slices)
    found = []
    for name in sorted(set(slices)):
        rows = np.flatnonzero(groups == name)
        its = labels[rows]
        both = len(set(its.tolist())) == 2
        own = [prompts[row] for row in rows.tolist()]
        found.append(
            GroupFindings(
                name=name, examples=len(rows), positives=int(its.sum()), prompts=len(set(own)),
                probe=estimate(auroc_interval(its, scores[rows], own, seed)) if both else None,
                true_positive_rate=_share_above_zero(log_odds[rows][its == 1]),
                false_positive_rate=_share_above_zero(log_odds[rows][its == 0]),
                calibration=calibration_finding(its, log_odds[rows]) if both else None,
            )
        )  # fmt: skip
    return sorted(found, key=lambda one: one.examples)


def _share_above_zero(log_odds: np.ndarray) -> float | None:
    return round(float((log_odds > 0).mean()), 4) if len(log_odds) else None
