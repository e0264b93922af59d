"""Settings of a causal check.

In: numbers. Out: checked settings. It must not know models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

RANDOM = 10
# Foreign directions that a check needs.
FOREIGN = 3


@dataclass(frozen=True, kw_only=True)
class CausalSettings:
    """Settings of `causal_check`.

    Args:
        doses (`Sequence[float]`): doses α in standard deviations of the activation along the direction, without 0: at least four,
            each with both signs.
        random (`int`, defaults to 10): number of random directions, at least 10.
        occurs (`float`, *optional*): value of the measure above which the concept occurs. By default the middle between the
            lowest and the highest value over all prompts and doses that count.
        max_new_tokens (`int`, defaults to 24): length of an answer.
        batch_rows (`int`, defaults to 64): answers that are generated at once.
        seed (`int`, defaults to 0): seed of directions and bootstraps.

    Raises:
        `ValueError`: too few doses or random directions, or a number that is out of range.

    Example:
        >>> from interp_rlhf import CausalSettings
        >>> CausalSettings(doses=(-4, -2, 2, 4), max_new_tokens=16).random
        10
    """

    doses: Sequence[float] = (-6.0, -4.0, -2.0, -1.0, 1.0, 2.0, 4.0, 6.0)
    random: int = RANDOM
    occurs: float | None = None
    max_new_tokens: int = 24
    batch_rows: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        doses = list(self.doses)
        bad = [dose for dose in doses if not math.isfinite(dose) or dose == 0]
        if bad or len(set(doses)) < 4 or min(doses) > 0 or max(doses) < 0:
            raise ValueError(
                f"`doses` is {doses} – expected at least four finite ones on both sides of 0, such as -4, -2, 2, 4. The dose 0 "
                "is always among them."
            )
        if {-dose for dose in doses} != set(doses):
            raise ValueError(f"`doses` is {doses} – expected each dose with both signs: −α is compared with α.")
        if self.random < RANDOM:
            raise ValueError(
                f"`random` is {self.random} – expected at least {RANDOM} random directions: fewer say little about chance."
            )
        for name in ("max_new_tokens", "batch_rows"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"`{name}` is {value} – expected at least 1.")
        if self.occurs is not None and not math.isfinite(self.occurs):
            raise ValueError(f"`occurs` is {self.occurs} – expected a finite value of the measure.")
