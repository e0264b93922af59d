"""Schedules: the change of a term's weight over a run. It depends only on the step, so a resumed run repeats it.

In: an optimizer step. Out: a factor of the weight. It must not know terms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class Schedule(BaseModel):
    """Factor of a weight at each optimizer step.

    Args:
        kind (`str`, defaults to `"constant"`): `constant`: 1. `warmup`: from `floor` up to 1, linearly. `decay`: from 1 down to
            `floor`, linearly: strong early, as in ProCon (arXiv 2509.06795).
        steps (`int` or `float`, defaults to 1.0): optimizer steps that the change takes; a float up to 1 is a share of the run.
        floor (`float`, defaults to 0): the factor at the weak end, 0 or more.

    Raises:
        `ValueError`: an unknown kind or field, or a value out of range.

    Example:
        >>> from interp_rlhf import Schedule
        >>> warmup = Schedule(kind="warmup", steps=100)
        >>> [warmup.factor(step, max_steps=1000) for step in (0, 50, 100, 900)]
        [0.0, 0.5, 1.0, 1.0]
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: Literal["constant", "warmup", "decay"] = "constant"
    steps: int | float = Field(default=1.0, gt=0)
    floor: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _sensible(self) -> Schedule:
        if isinstance(self.steps, float) and self.steps > 1:
            raise ValueError(
                f"`steps` is {self.steps} – expected a whole number of steps, or a share of the run up to 1.0"
            )
        return self

    @classmethod
    def from_option(cls, asked: Any) -> Schedule:
        """Schedule from a recipe's mapping. YAML reads `1e2` steps as a float; here it becomes a whole number.

        Raises:
            `ValueError`: a key is unknown, or a value is wrong.
        """
        if isinstance(asked, cls):
            return asked
        if isinstance(asked, Mapping):
            steps = asked.get("steps")
            asked = dict(asked)
            if isinstance(steps, float) and steps > 1 and steps.is_integer():
                asked["steps"] = int(steps)
        try:
            return cls.model_validate(asked)
        except ValidationError as error:
            said = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors())
            raise ValueError(
                f"`schedule` is {asked!r} ({said}) – expected a mapping such as `{{kind: warmup, steps: 100, floor: 0.0}}`."
            ) from None

    def factor(self, step: int, max_steps: int) -> float:
        """Factor at an optimizer step, counted from 0, of a run of `max_steps` steps."""
        if self.kind == "constant":
            return 1.0
        length = self.steps * max_steps if isinstance(self.steps, float) else self.steps
        done = min(1.0, step / length) if length > 0 else 1.0
        return self.floor + (1 - self.floor) * (done if self.kind == "warmup" else 1 - done)
