"""The event of `interp-rlhf locate`.

In: what `attribution_patching` computed. Out: as for `events`. It must not know torch, models or pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .events import Event
from .patching_records import PatchingEntry


@dataclass(frozen=True, kw_only=True)
class PatchingEvent(PatchingEntry, Event):
    """Where in a model a contrast acts."""

    event: ClassVar[str] = "patching"
