"""What every part of a card is made of: a strict model, and the form of its digests.

In: values from YAML. Out: checked values. It must not know what a card contains.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class Strict(BaseModel):
    """Every unknown key and every wrong type is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False)


class Difference(Strict):
    """A number with its 95 % interval; no bounds where there are too few prompts to resample."""

    value: float
    low: float | None = None
    high: float | None = None
