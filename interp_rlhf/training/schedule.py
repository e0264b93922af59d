"""Schedules: how a term's weight moves over a run, as a pure function of the step, so that a resumed run repeats it.

In: an optimizer step. Out: a factor of the weight.
"""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["constant", "warmup", "decay"]
KINDS: tuple[str, ...] = get_args(Kind)


class Schedule(BaseModel):
    """Factor of a weight by step.

    Attributes:
        kind (`str`, defaults to `"constant"`): `constant`: 1. `warmup`: from `floor` up to 1, linearly. `decay`: from 1 down to
            `floor`, linearly: strong early, as ProCon has it (arXiv 2509.06795).
        steps (`int` or `float`, defaults to 1.0): optimizer steps that the change takes; a float up to 1 is a share of the run.
        floor (`float`, defaults to 0): the factor at the far end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: Kind = "constant"
    steps: int | float = Field(default=1.0, gt=0)
    floor: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _sensible(self) -> Schedule:
        if isinstance(self.steps, float) and self.steps > 1:
            raise ValueError(
                f"`steps` is {self.steps} – expected a whole number of steps, or a share of the run up to 1.0"
            )
        return self

    def factor(self, step: int, max_steps: int) -> float:
        """Factor at an optimizer step, counted from 0, of a run of `max_steps`."""
        if self.kind == "constant":
            return 1.0
        length = self.steps * max_steps if isinstance(self.steps, float) else self.steps
        done = min(1.0, step / length) if length > 0 else 1.0
        return self.floor + (1 - self.floor) * (done if self.kind == "warmup" else 1 - done)
