"""Loaded runs → what both pages say, already in words and figures.

In: runs. Out: the values that the templates show: strings, numbers to print, and lists of them. It must not know HTML or
Markdown.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from .figures import drift_figures, has_measure, metric_figures
from .groups import group_metrics
from .latent_pages import latents_content
from .notes import LATENT_NOTES, NOTES, PATCHING_NOTES
from .patching_pages import patching_content
from .plots import arm_style
from .samples import compare_samples, token_readout
from .text import MISSING, as_number, show, show_seconds, visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .runs import ResultTable, Run

_PROMINENT = 12  # samples beyond these are folded away
_MOVED = 200  # rows of the table of what moved a monitor


def page_content(runs: Sequence[Run], title: str | None = None) -> dict[str, Any]:
    """Everything the templates need.

    Args:
        runs (`Sequence[Run]`): the arms, in the order in which they are shown.
        title (`str`, *optional*): heading. Defaults to the title of the runs where they share one.

    Returns:
        `dict[str, Any]`: the variables of `template.html.j2` and `template.md.j2`.
    """
    names = {name for run in runs for name, series in run.metrics.items() if series}
    groups, rest = group_metrics(names)
    titles = list(dict.fromkeys(run.title for run in runs if run.title))
    readout = token_readout(runs)
    samples = compare_samples(runs, readout)
    content: dict[str, Any] = {
        "title": visible(title) if title else titles[0] if len(titles) == 1 else "Training report",
        "runs": [_run_header(run, index) for index, run in enumerate(runs)],
        "several": len(runs) > 1,
        "tables": _shown_tables(runs),
        "figures": metric_figures(runs, groups),
        "has_measure": has_measure(groups),
        "others": [_last_values(runs, name) for name in rest],
        "labels": [run.label for run in runs],
        "drift_figures": drift_figures(runs),
        "drift_costs": [_drift_cost(run) for run in runs if run.evaluations],
        "verdicts": [_verdict(run) for run in runs if run.verdicts],
        "moved": _moved_rows(runs),
        "inspections": latents_content(
            [(run.label if len(runs) > 1 else "", one) for run in runs for one in run.inspections]
        ),
        "patchings": patching_content(
            [(run.label if len(runs) > 1 else "", one) for run in runs for one in run.patchings]
        ),
        "token_readout": readout,
        "samples": samples[:_PROMINENT],
        "more_samples": samples[_PROMINENT:],
        "notes": _notes(runs),
        "nothing": all(run.empty for run in runs),
    }
    content["sections"] = _sections(content)
    return content


def _sections(content: dict[str, Any]) -> list[tuple[str, str]]:
    """Anchors and names of the sections that this page has."""
    sections = [
        ("verdict", "Verdict", content["verdicts"]),
        ("runs", "Runs", True),
        ("results", "Results", content["tables"]),
        ("training", "Training", content["figures"] or content["others"]),
        ("drift", "Drift", content["drift_costs"]),
        ("moved", "What moved it", content["moved"]),
        ("patching", "Where it acts", content["patchings"]),
        ("latents", "Latents", content["inspections"]),
        ("samples", "Samples", content["samples"]),
        ("reading", "How to read this", True),
    ]
    return [(anchor, name) for anchor, name, there in sections if there]


def _notes(runs: Sequence[Run]) -> tuple[tuple[str, str], ...]:
    trained = () if all(run.only_read for run in runs) else NOTES
    patched = PATCHING_NOTES if any(run.patchings for run in runs) else ()
    return patched + (LATENT_NOTES if any(run.inspections or run.searches for run in runs) else ()) + trained


def _run_header(run: Run, index: int) -> dict[str, Any]:
    style = arm_style(index)
    dashes = "" if style.dashes == "-" else " ".join(f"{1.7 * length:g}" for length in style.dashes[1])
    started = MISSING
    if run.started is not None:
        started = f"{datetime.fromtimestamp(run.started, UTC):%Y-%m-%d %H:%M:%S} UTC"
    state = f"finished after {show_seconds(run.seconds)}"
    if not run.ended:
        state = f"still running or ended without an end event, last seen after {show_seconds(run.seconds)}"
    return {
        "label": run.label,
        "colour": style.colour,
        "dashes": dashes,
        "model": run.model or "model not logged",
        "trainer": f"trained with {run.trainer}" if run.trainer else "trainer not logged",
        "cards": [
            (card["name"], card["role"] or "role not logged", _short_hash(card["sha256"])) for card in run.cards
        ],
        "seed": show(run.settings["seed"]) if "seed" in run.settings else None,
        "settings": [(name, show(value)) for name, value in run.settings.items()],
        "started": started,
        "steps": f"{show(run.last_step)} step{'' if run.last_step == 1 else 's'} done",
        "state": state,
        "only_read": run.only_read,
        "ended": run.ended,
        "restarts": run.starts - 1,
        "source": run.source,
    }


def _short_hash(sha256: str) -> str:
    return sha256.removeprefix("sha256:")[:12] or "no sha256"


def _shown_tables(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Tables of all runs; those of one title and the same columns become one, with a column that names the run."""
    alike: dict[tuple[str, ...], list[tuple[Run, ResultTable]]] = {}
    for run in runs:
        for table in run.tables.values():
            alike.setdefault((table.title, *table.columns), []).append((run, table))
    return [_table(found, len(runs) > 1) for found in alike.values()]


def _table(tables: list[tuple[Run, ResultTable]], several: bool) -> dict[str, Any]:
    first = tables[0][1]
    rows = [row for _, table in tables for row in table.rows]
    columns = list(zip(first.columns, _numeric(rows, len(first.columns)), strict=True))
    shown = [[show(value) for value in row] for row in rows]
    title = first.title
    if len(tables) > 1:
        columns = [("run", False), *columns]
        names = [run.label for run, table in tables for _ in table.rows]
        shown = [[name, *row] for name, row in zip(names, shown, strict=True)]
    elif several:
        title = f"{title} – {tables[0][0].label}"
    notes = dict.fromkeys(table.note for _, table in tables if table.note)
    return {"title": title, "columns": columns, "rows": shown, "note": " ".join(notes)}


def _numeric(rows: Iterable[Sequence[Any]], width: int) -> list[bool]:
    """True if a column holds numbers only (and holes)."""
    columns = list(zip(*rows, strict=True)) or [()] * width
    return [
        any(as_number(value) is not None for value in column)
        and all(value is None or as_number(value) is not None for value in column)
        for column in columns
    ]


def _last_values(runs: Sequence[Run], name: str) -> dict[str, Any]:
    """The last value of a metric that no plot shows, per arm, and the step at which it was logged."""
    cells = []
    for run in runs:
        series = run.metrics.get(name)
        step = max(series) if series else None
        cells.append((show(series[step]) if series and step is not None else MISSING, show(step)))
    return {"name": name, "cells": cells}


def _drift_cost(run: Run) -> dict[str, str]:
    texts, tokens = zip(*run.evaluations.values(), strict=True)
    share = run.overhead_seconds / run.seconds if run.seconds > 0 else None
    return {
        "label": run.label,
        "evaluations": show(len(run.evaluations)),
        "texts": _span(texts),
        "tokens": _span(tokens),
        "overhead": show_seconds(run.overhead_seconds),
        "share": MISSING if share is None else f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %",
        "elapsed": show_seconds(run.seconds),
    }


def _span(amounts: Iterable[Any]) -> str:
    """`64`, or `60 to 64` where evaluations differ."""
    numbers = sorted({number for amount in amounts if (number := as_number(amount)) is not None})
    return (
        " to ".join(show(int(number)) for number in (numbers[:1] + numbers[-1:] if len(numbers) > 1 else numbers))
        or MISSING
    )


def _verdict(run: Run) -> dict[str, Any]:
    """The latest verdict of a run, and those before it."""
    last = run.verdicts[-1]
    alarms = [verdict for verdict in run.verdicts if verdict.alarm]
    return {
        "label": run.label,
        "name": last.name,
        "step": show(last.step),
        "because": last.because,
        "next": last.next,
        "earlier": "" if last.alarm or not alarms else f"{alarms[-1].name} at step {show(alarms[-1].step)}",
        "tone": "alarm" if alarms else "calm" if last.name == "steady" else "note",
        "extra": [(name, show(value)) for name, value in last.fields.items()],
        "history": [(show(verdict.step), verdict.name) for verdict in run.verdicts],
    }


def _moved_rows(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Answers and batches that moved a monitor, the latest evaluation first."""
    rows = [(run, moved) for run in runs for moved in run.moved]
    rows.sort(key=lambda row: (-row[1].step, row[1].batch, row[1].monitor, -abs(row[1].change or 0)))
    return [
        {
            "run": run.label,
            "step": show(moved.step),
            "monitor": moved.monitor,
            "kind": "training batch" if moved.batch else "fixed prompt",
            "prompt": moved.prompt,
            "completion": moved.completion,
            "change": show(moved.change),
        }
        for run, moved in rows[:_MOVED]
    ]
