"""The documentation of the run log, made from its classes: `python -m interp_rlhf.runlog.document > docs/run_log.md`.

In: the classes of the events. Out: a Markdown page with a table of keys for each. It must not know logs.
"""

from __future__ import annotations

from typing import get_args, get_type_hints

from .events import SCHEMA, Event
from .log import CLASSES, in_force
from .records import Record, own_fields

HEAD = f"""# The run log

A run writes `interp.jsonl` into its output folder. Each line is one event, a JSON object with the keys `event`, `time` (Unix
seconds) and, for most events, `step` (optimizer steps). Lines are only ever appended. A kill leaves at most the last line
incomplete, and readers skip that line. Numbers that are not finite are written as null.

This page is made from the classes in `interp_rlhf/runlog/events.py`, `latent_events.py` and `patching_events.py`, by
`python -m interp_rlhf.runlog.document > docs/run_log.md`.

*Since* is the version of the run log in which the key appeared. This is version {SCHEMA}. A key marked *optional* is left out
when there is nothing to say. `interp_rlhf.runlog.log.read_events` returns a log of any version as these classes. It keeps unknown
keys under `other`, and treats a value of another type as missing.

## Restarts

"""


def page() -> str:
    """The whole page as Markdown."""
    rule = " ".join((in_force.__doc__ or "").split("\n\n", 1)[1].split())
    parts = [_section(one, f"## `{one.event}`") for one in CLASSES]
    seen: dict[type[Record], None] = {}
    for event in CLASSES:
        _collect(event, seen)
    parts += ["## Records inside events\n", *(_section(one, f"### {one.__name__}") for one in seen)]
    return HEAD + rule + "\n\n" + "\n".join(parts)


def _collect(cls: type[Record], seen: dict[type[Record], None]) -> None:
    """The records inside a record, in the order in which they occur."""
    for inner in get_type_hints(cls).values():
        for one in _records_in(inner):
            if one not in seen:
                seen[one] = None
                _collect(one, seen)


def _records_in(hint: object) -> list[type[Record]]:
    if isinstance(hint, type) and issubclass(hint, Record):
        return [hint]
    return [one for inner in get_args(hint) for one in _records_in(inner)]


def _section(cls: type[Record], title: str) -> str:
    about = (cls.__doc__ or "").split("\n")[0]
    rows = [
        f"| `{one.name}` | {_spelled(one.type)} | {one.metadata['about']} | {one.metadata['unit']} | "
        f"{'optional' if one.metadata['optional'] else ''} | {one.metadata['since']} |"
        for one in own_fields(cls)
        if one.name not in ("time", "step") or not issubclass(cls, Event)
    ]
    return "\n".join(
        [title, "", about, "", "| key | type | what | unit, range | | since |", "|---|---|---|---|---|---|", *rows, ""]
    )


def _spelled(annotation: str) -> str:
    return f"`{annotation.replace(' | None', ' or null')}`".replace("|", "or")


if __name__ == "__main__":
    print(page(), end="")
