"""Loaded runs → the report as JSON, for programs.

In: runs. Out: mappings of plain values. It must not know HTML or Markdown.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .runs import Metrics, Run


def as_json(runs: Sequence[Run], title: str) -> dict[str, Any]:
    """The report for programs: verdicts, the last value of every metric, and the drift of the evaluation that was written last.

    With `load_best_model_at_end`, the last evaluation is that of the kept checkpoint, which is not the last step.
    """
    return {
        "title": title,
        "runs": [
            {
                "run": run.label,
                "model": run.model,
                "trainer": run.trainer,
                "last_step": run.last_step,
                "ended": run.ended,
                "seconds": round(run.seconds, 3),
                "cards": run.cards,
                "verdicts": [
                    {"step": v.step, "verdict": v.name, "because": v.because, "next": v.next, "alarm": v.alarm}
                    for v in run.verdicts
                ],
                "metrics": _latest(run.metrics),
                "hook_points": {point: _at(family, run.last_evaluated) for point, family in run.hook_points.items()},
                "monitors": {monitor: _at(family, run.last_evaluated) for monitor, family in run.monitors.items()},
                "settings": run.settings,
                "tables": [vars(table) for table in run.tables.values()],
                "moved": [vars(moved) for moved in run.moved],
                "latents": [asdict(inspection) for inspection in run.inspections],
                "patchings": [one.to_json() for one in run.patchings],
                "overhead_seconds": round(run.overhead_seconds, 3),
            }
            for run in runs
        ],
    }


def _latest(family: Metrics) -> dict[str, float | None]:
    return {name: series[max(series)] for name, series in sorted(family.items()) if series}


def _at(family: Metrics, step: int) -> dict[str, float | None]:
    """Every metric at a step, if it has a value there."""
    return {name: series[step] for name, series in sorted(family.items()) if step in series}
