#!/usr/bin/env python3
"""Counts what the limits of this code base are about: sizes, imports, names, private names, examples.

    python tools/measure.py                       the working tree
    python tools/measure.py --rev v0.3.0          a git revision
    python tools/measure.py --before v0.3.0       both, side by side
    python tools/measure.py --list functions      what was counted, with file and line

In: the package's source. Out: a table, JSON, or the offenders of one figure. It imports nothing but the standard library and
runs no code of the package. Exit code 1 with `--check` if a figure is over its limit.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from figures import figures_of
from source_tree import revision, working_tree

if TYPE_CHECKING:
    from figures import Figure

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    root = Path(arguments.root)
    try:
        now = figures_of(revision(root, arguments.rev) if arguments.rev else working_tree(root))
        before = figures_of(revision(root, arguments.before)) if arguments.before else None
        if arguments.list:
            print("\n".join(listed(now, arguments.list)))
        elif arguments.rooms:
            print("\n".join(by_room(now)))
        elif arguments.json:
            print(json.dumps(as_json(now, before)))
        else:
            print("\n".join(table(now, before, arguments.rev or "working tree", arguments.before)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(arguments.check and not all(figure.within for figure in now))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rev", help="git revision to count (default: the working tree)")
    made.add_argument("--before", metavar="REV", help="git revision to print next to it")
    made.add_argument("--list", metavar="FIGURE", help="print the offenders of a figure, or of `all`")
    made.add_argument("--rooms", action="store_true", help="print all offenders against a limit, grouped by room")
    made.add_argument("--json", action="store_true", help="print the figures as JSON")
    made.add_argument("--check", action="store_true", help="exit with 1 if a figure is over its limit")
    made.add_argument("--root", default=ROOT, help="root of the repository (default: this one)")
    return made


def table(now: list[Figure], before: list[Figure] | None, name: str, name_before: str | None) -> list[str]:
    """A Markdown table: the figures, those of the revision before, and the limits."""
    earlier = {figure.key: figure for figure in before or []}
    rows = [["figure", *([name_before] if name_before else []), name, "limit"]]
    for figure in now:
        then = [f"{earlier[figure.key].value:,g}"] if earlier else []
        limit = "" if figure.limit is None else f"≤ {figure.limit}" if figure.limit else "0"
        value = f"{figure.value:,g}" if figure.within else f"**{figure.value:,g}**"
        rows.append([f"{figure.title} (`{figure.key}`)", *then, value, limit])
    rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
    return [f"| {' | '.join(row)} |" for row in rows]


def as_json(now: list[Figure], before: list[Figure] | None) -> dict[str, dict[str, float | int | None]]:
    earlier = {figure.key: {"before": figure.value} for figure in before or []}
    return {
        figure.key: {**earlier.get(figure.key, {}), "value": figure.value, "limit": figure.limit} for figure in now
    }


def listed(figures: list[Figure], key: str) -> list[str]:
    keys = [figure.key for figure in figures]
    if key not in (*keys, "all"):
        raise ValueError(f"`--list {key}` – expected one of {', '.join(f'`{k}`' for k in sorted(keys))}, or `all`")
    if key != "all":
        return next(figure.offenders for figure in figures if figure.key == key)
    return [line for f in figures if f.offenders for line in ("", f"{f.title} ({f.key}): {f.value:,g}", *f.offenders)]


def by_room(figures: list[Figure]) -> list[str]:
    """What is still to mend, one section per room. Variables are a rule without a limit, so they are listed too."""
    rooms: dict[str, list[str]] = {}
    for figure in figures:
        for line in figure.offenders if figure.key == "variables" or not figure.within else []:
            rooms.setdefault(line.split("/")[0].split(".py")[0], []).append(f"{figure.key:14} {line}")
    return [line for room in sorted(rooms) for line in ("", f"== {room} ({len(rooms[room])})", *rooms[room])]


if __name__ == "__main__":
    sys.exit(main())
