"""Numbers and tables as the terminal shows them.

In: estimates, intervals, rows. Out: text. It must not know commands or models.
"""

from __future__ import annotations

import math
from typing import Any


def print_aligned(columns: list[str], rows: list[list[str]]) -> None:
    """Print a table. The last column is aligned to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns) - 1)]
    for row in [columns, *rows]:
        print("  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))


def shown_interval(interval: tuple[float, float, float], sign: str = "") -> str:
    """A value with the bounds of its interval; `sign` is `+` if the value is a difference."""
    value, low, high = (format(number, f"{sign}.3f") for number in interval)
    return f"{value} [{low}, {high}]" if math.isfinite(interval[1]) else f"{value} (not enough prompts)"


def shown_estimate(estimate: Any, sign: str = "") -> str:
    """An estimate of a card's evidence, with its interval if it has one."""
    value = estimate.auroc if hasattr(estimate, "auroc") else estimate.value
    if estimate.low is None:
        return f"{value:{sign}.3f} (not enough prompts for an interval)"
    return f"{value:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"
