"""The run log: what happened in a run, as append-only JSON lines.

In: events of training callbacks, rewards and the demo. Out: a file that is valid up to its last complete
line after any crash, and the list of its events. Knows nothing of torch, TRL or plots.

One line is one event, with the keys `event`, `time` (Unix seconds) and, where it has one, `step`:

| event | further keys |
|---|---|
| `run` | `title`, `arm`, `model`, `trainer`, `cards` (list of `name`, `role`, `sha256`), `settings` |
| `metric` | `metrics` (name to number): everything that the trainer logged at this step |
| `drift` | `texts`, `tokens`, `hook_points` (path to metrics), `monitors` (name to metrics), `overhead_seconds` |
| `samples` | `when` (`before`, `train`, `after`), `rows` (list of `prompt`, `completion`, `scores`) |
| `table` | `title`, `columns`, `rows`, `note`: a result that the run itself worked out |
| `latents` | `sae`, `chosen`, `texts`, `tokens`, `fvu`, `l0`, `dead`, `latents` (one page each): `Inspection.event()` |
| `latents_found` | `sae`, `concept`, `pooling`, `latents` (AUROCs), `probe`, `tfidf`, `random`: `Found.event()` |
| `end` | `seconds` |
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEMA = 1
EVENTS = ("run", "metric", "drift", "samples", "table", "verdict", "latents", "latents_found", "end")


class RunLog:
    """Append-only writer of one run's events.

    Args:
        path (`str` or `Path`): file to append to; its folder is made. A line that a crash left incomplete at the end
            of the file is closed first, so that the next event starts on a line of its own.
        writable (`bool`, defaults to `True`): `False` makes `append` do nothing: ranks other than 0 pass it.
    """

    def __init__(self, path: str | os.PathLike[str], writable: bool = True):
        self.path = Path(path)
        self.writable = writable
        if writable:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._close_torn_line()

    def append(self, event: str, step: int | None = None, **fields: Any) -> None:
        """Write one event as one line, flushed to the operating system before it returns.

        Raises:
            `ValueError`: an event that is not one of `EVENTS`.
            `OSError`: the file cannot be written (a full disk); earlier lines stay as they are.
        """
        if event not in EVENTS:
            raise ValueError(f"`event` is {event!r}; expected one of {', '.join(EVENTS)}.")
        if not self.writable:
            return
        record: dict[str, Any] = {"event": event, "time": round(time.time(), 3)}
        if step is not None:
            record["step"] = int(step)
        record.update(fields)
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
    """Events of a run log in the order in which they were written.

    Lines that a crash tore are skipped: they never were complete. A `run` event at step s above 0 is a resumption
    from the checkpoint
    of that step: what the same arm had logged after it is left out, since it did not happen in the run that there is now.

    Raises:
        `FileNotFoundError`: no such file.
        `ValueError`: not one complete event in it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"`{path}` does not exist – expected a run log (JSON lines). Runs write theirs to `<output_dir>/interp.jsonl`."
        )
    events = _in_force(_complete_events(path))
    if not events:
        raise ValueError(
            f"`{path}` holds no complete event – expected a run log, one JSON object with `event` per line."
        )
    return events


def _in_force(events: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    kept: list[tuple[str, dict[str, Any]]] = []
    arm = ""
    for event in events:
        if event["event"] == "run":
            arm = str(event.get("arm", ""))
            if step := event.get("step"):
                kept = [(of, old) for of, old in kept if of != arm or not _undone(old, step)]
        kept.append((arm, event))
    return [event for _, event in kept]


def _undone(event: dict[str, Any], step: int) -> bool:
    at = event.get("step")
    if not isinstance(at, int) or event["event"] == "run":
        return False
    # Samples of training are of the rollout for the next step: the checkpoint came before them.
    return at > step or (at == step and event["event"] == "samples" and event.get("when") == "train")


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
    """JSON has no NaN and no infinity: they become `None`, and a reader shows them as missing."""
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
