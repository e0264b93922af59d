"""The run log: what happened in a run, one event per line, appended to a file of JSON lines.

In: events of callbacks, rewards and the demo. Out: a file that is valid up to its last complete line after any crash,
and the events that still count. `docs/run_log.md` lists the keys. It must not know torch, TRL or plots.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .events import SCHEMA, DriftEvent, EndEvent, Event, MetricEvent, RunEvent, SamplesEvent, TableEvent, VerdictEvent
from .latent_events import LatentsEvent, LatentsFoundEvent
from .patching_events import PatchingEvent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CLASSES: tuple[type[Event], ...] = (
    RunEvent, MetricEvent, DriftEvent, SamplesEvent, TableEvent, VerdictEvent, LatentsEvent, LatentsFoundEvent, PatchingEvent,
    EndEvent,
)  # fmt: skip
EVENTS = {one.event: one for one in CLASSES}


class RunLog:
    """Append-only writer of one run's events.

    Args:
        path (`str` or `Path`): file to append to. Its folder is made. If a crash left an incomplete line at the end of the file,
            that line is closed first, so that the next event starts on a new line.
        writable (`bool`, defaults to `True`): `False` makes `append` do nothing. Ranks other than 0 pass it.
    """

    def __init__(self, path: str | os.PathLike[str], writable: bool = True):
        self.path = Path(path)
        self.writable = writable
        if writable:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._close_torn_line()

    def append(self, event: Event | str, step: int | None = None, **fields: Any) -> None:
        """Write one event as one line. The line has reached the operating system when this returns.

        Args:
            event (`Event` or `str`): the event, or the name of one whose keys are `fields`.
            step (`int`, *optional*): optimizer step to which the event belongs.

        Raises:
            `ValueError`: a name that is not one of `EVENTS`.
            `OSError`: the file cannot be written (a full disk). Earlier lines stay as they are.
        """
        if isinstance(event, Event):
            name, step = event.event, event.step if step is None else step
            fields = event.fields()
        else:
            name = event
        if name not in EVENTS:
            raise ValueError(f"`event` is {name!r} – expected one of {', '.join(EVENTS)}.")
        if not self.writable:
            return
        record: dict[str, Any] = {"event": name, "time": round(time.time(), 3)}
        if step is not None:
            record["step"] = int(step)
        record |= fields
        if name == RunEvent.event:
            record.setdefault("schema", SCHEMA)
        line = json.dumps(jsonable(record), ensure_ascii=False, allow_nan=False)
        # One write call per line: a kill between two events never tears one.
        with self.path.open("ab") as file:
            file.write(line.encode("utf-8", "backslashreplace") + b"\n")

    def _close_torn_line(self) -> None:
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        with self.path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def read_run_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run log that still count, in the order in which they were written.

    Lines that a crash tore are skipped. `in_force` says what a restarted run no longer says.

    Raises:
        `FileNotFoundError`: no such file.
        `ValueError`: the file has no complete event.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"`{path}` does not exist – expected a run log (JSON lines). Runs write theirs to `<output_dir>/interp.jsonl`."
        )
    lines = in_force(list(_complete_events(path)))
    if not lines:
        raise ValueError(
            f"`{path}` holds no complete event – expected a run log, one JSON object with `event` per line."
        )
    return lines


def read_events(path: str | os.PathLike[str]) -> list[Event]:
    """The events of a run log that still count. See `read_run_log` for the errors raised."""
    return [parse(line) for line in read_run_log(path)]


def parse(line: dict[str, Any]) -> Event:
    """The event of a line. Values of another type than documented count as missing."""
    event: Event = EVENTS[line["event"]].from_json(line)
    return event


def in_force(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a log says after restarts: the one rule for everybody who reads it.

    A `run` event at step s, after an earlier `run` event of the same arm, is a restart. If s is above 0, the run resumed from the
    checkpoint of step s: what the arm had logged about later steps is left out, and so are the samples of training at step s
    (they belong to the rollout of the next step). If s is 0, the arm began again: all of its earlier lines are left out. A `run`
    event without a step, in logs of others, restarts just before the first metrics that follow it.
    """
    kept: list[tuple[str, dict[str, Any]]] = []
    arm = ""
    for position, line in enumerate(lines):
        if line["event"] == RunEvent.event:
            arm = str(line.get("arm") or "")
            step = _restarted_at(lines, position)
            if step is not None and any(of == arm and old["event"] == RunEvent.event for of, old in kept):
                kept = [(of, old) for of, old in kept if of != arm or not _undone(old, step)]
        kept.append((arm, line))
    return [line for _, line in kept]


def _restarted_at(lines: Sequence[dict[str, Any]], position: int) -> int | None:
    """Step from which the `run` event at a position goes on; None if the log does not say."""
    step = _step_of(lines[position])
    if step is not None:
        return step
    following: list[int] = []
    for line in lines[position + 1 :]:
        if line["event"] == RunEvent.event:
            break
        if line["event"] == MetricEvent.event and (step := _step_of(line)) is not None:
            following.append(step)
    return max(min(following) - 1, 0) if following else None


def _undone(line: dict[str, Any], step: int) -> bool:
    """True if a restart from a step makes an earlier line of its arm invalid."""
    if step == 0:
        return True
    at = _step_of(line)
    if at is None or line["event"] == RunEvent.event:
        return False
    of_next_step = line["event"] == SamplesEvent.event and line.get("when") == "train"
    return at > step or (at == step and of_next_step)


def _step_of(line: dict[str, Any]) -> int | None:
    step = line.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def _complete_events(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and record.get("event") in EVENTS:
                yield record


def jsonable(value: Any) -> Any:
    """A value that JSON can hold. NaN and infinity become `None`, which readers show as missing."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, bool | str | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item"):  # a scalar of numpy or torch
        return jsonable(value.item())
    return str(value)
