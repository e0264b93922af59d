"""How far a run moved its monitors, from its run log.

In: a run log. Out: monitor to shift. It must not know models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..runlog.events import DriftEvent
from ..runlog.log import read_events

if TYPE_CHECKING:
    from pathlib import Path


def shifts_of_run(path: str | Path, what: str = "The run log") -> dict[str, float]:
    """The last movement of every monitor in a run log, in standard deviations.

    Raises:
        `ValueError`: the log has no evaluation with monitors.
    """
    events = [event for event in read_events(path) if isinstance(event, DriftEvent) and event.monitors]
    if not events:
        raise ValueError(
            f"{what} `{path}` has no `drift` event with monitors – expected the run log of a run that watched the same monitors."
        )
    return {name: entry.shift for name, entry in events[-1].monitors.items() if entry.shift is not None}
