"""What the probes benchmark prints: means, medians and quartiles with an interval.

In: one value per set, seed or pair. Out: a line of the table. It must not know what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from timing import RESAMPLES, Row


@dataclass(frozen=True)
class Quantity:
    """One line of the table; `interval` is the 95 % bootstrap interval, or the quartiles where `note` says so."""

    name: str
    value: float
    interval: tuple[float, float]
    target: str = ""
    note: str = ""


def mean_of(name: str, values: Sequence[float], seed: int, target: str = "", note: str = "") -> Quantity:
    """Mean over sets or seeds, with a bootstrap interval; paired if the values are differences."""
    sample = np.asarray(values)
    draws = np.random.default_rng(seed).choice(sample, (RESAMPLES, len(sample))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Quantity(name, float(sample.mean()), (float(low), float(high)), target, note)


def median_of(name: str, values: Sequence[float], seed: int, target: str = "", note: str = "") -> Quantity:
    """Median of ratios, with a bootstrap interval, as in the other benchmarks."""
    row = Row(name, values, target, note)
    return Quantity(name, row.median, row.interval(seed), target, note)


def quartiles_of(name: str, values: Sequence[float | None]) -> Quantity:
    """Median and quartiles of the values that are not `None`."""
    present = [value for value in values if value is not None]
    low, middle, high = np.quantile(present, [0.25, 0.5, 0.75])
    return Quantity(
        name,
        float(middle),
        (float(low), float(high)),
        note=f"median and quartiles, {len(present)} of {len(values)} sets",
    )
