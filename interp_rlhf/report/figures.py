"""Runs → figures: which numbers go into which plot, with captions and texts for readers who cannot see it.

In: loaded runs. Out: figures made of panels (one SVG each). It must not know HTML or Markdown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .groups import MEASURE
from .plots import Line, arm_style, depth_style, heat_map, line_plot
from .text import show

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .groups import MetricGroup
    from .runs import Metrics, Run

_TITLES = {"cka": "CKA", "cosine": "cosine similarity", "auroc": "AUROC"}
_OVERLAID = 4  # with several arms, up to so many hook points get a panel each, in which the arms lie over each other


@dataclass
class Panel:
    """One plot."""

    name: str
    svg: str
    alt: str
    captions: list[str] = field(default_factory=list)
    file: str = ""


@dataclass
class Figure:
    """Plots that belong together on a shared step axis."""

    key: str
    title: str
    caption: str
    panels: list[Panel] = field(default_factory=list)

    def add(self, name: str, svg: str, alt: str, captions: Sequence[str] = ()) -> None:
        """Append a panel under a file name that is unique within the figure."""
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-") or "plot"
        self.panels.append(Panel(name, svg, alt, list(captions), f"{self.key}-{len(self.panels) + 1:02d}-{slug}.svg"))


def metric_figures(runs: Sequence[Run], groups: Sequence[MetricGroup]) -> list[Figure]:
    """One figure per group of metrics, one panel per metric, the arms overlaid."""
    x_range = _step_range(step for run in runs for series in run.metrics.values() for step in series)
    figures = []
    for group in groups:
        figure = Figure(group.key, group.title, group.caption)
        for name in group.names:
            lines = [
                _line(run.label, index, run.metrics[name]) for index, run in enumerate(runs) if name in run.metrics
            ]
            _add_lines(figure, name, lines, x_range)
        figures.append(figure)
    return figures


def has_measure(groups: Sequence[MetricGroup]) -> bool:
    """True if any metric is a measure that no reward has seen."""
    return any(MEASURE.fullmatch(name) for group in groups for name in group.names)


def drift_figures(runs: Sequence[Run]) -> list[Figure]:
    """Hook point metrics over step, heat maps of layer and step, and monitors over step."""
    x_range = _step_range(step for run in runs for step in run.evaluations)
    lines = Figure("drift", "Drift per hook point", "Policy against reference at each hook point, over step.")
    maps = Figure(
        "layers", "Layer by step", "The same numbers as a map: early layers at the bottom, time to the right."
    )
    points = sorted({point for run in runs for point in run.hook_points}, key=_natural)
    for metric in sorted({name for run in runs for family in run.hook_points.values() for name in family}):
        about = next((run.about[metric] for run in runs if metric in run.about), "")
        _add_hook_point_lines(lines, runs, points, metric, x_range, about)
        limits = _value_range(family.get(metric, {}) for run in runs for family in run.hook_points.values())
        for run in runs:
            _add_heat_map(maps, run, metric, limits or (0.0, 1.0), several=len(runs) > 1)
    monitors = Figure(
        "drift-monitors", "Monitors during drift evaluation", "Scored on the evaluation texts, over step."
    )
    for monitor in sorted({name for run in runs for name in run.monitors}, key=_natural):
        _add_metrics(monitors, monitor, [run.monitors.get(monitor, {}) for run in runs], runs, x_range)
    return [figure for figure in (lines, maps, monitors) if figure.panels]


def _add_metrics(
    figure: Figure, prefix: str, families: Sequence[Metrics], runs: Sequence[Run], x_range: tuple[int, int]
) -> None:
    for metric in sorted({name for family in families for name in family}):
        lines = [
            _line(run.label, index, family[metric])
            for index, (run, family) in enumerate(zip(runs, families, strict=True))
            if metric in family
        ]
        _add_lines(figure, f"{prefix}: {_title(metric)}", lines, x_range)


def _add_hook_point_lines(
    figure: Figure, runs: Sequence[Run], points: list[str], metric: str, x_range: tuple[int, int], about: str
) -> None:
    """If there are few hook points, a panel per hook point with all arms; otherwise a panel per arm with all hook points.

    Args:
        about (`str`): range and direction of the metric, shown below each panel; empty in older logs.
    """
    series = {
        (run.label, point): run.hook_points[point][metric]
        for run in runs
        for point in points
        if metric in run.hook_points.get(point, {})
    }
    y_range = _value_range(series.values())
    if len(runs) > 1 and len(points) <= _OVERLAID:
        for point in points:
            lines = [
                _line(run.label, index, series[run.label, point])
                for index, run in enumerate(runs)
                if (run.label, point) in series
            ]
            _add_lines(figure, f"{_title(metric)} at {point}", lines, x_range, y_range, about)
        return
    for run in runs:
        lines = [
            Line(point, depth_style(index, len(points)), *_sorted(series[run.label, point]))
            for index, point in enumerate(points)
            if (run.label, point) in series
        ]
        _add_lines(
            figure, _title(metric) + (f", {run.label}" if len(runs) > 1 else ""), lines, x_range, y_range, about
        )


def _add_heat_map(figure: Figure, run: Run, metric: str, limits: tuple[float, float], several: bool) -> None:
    points = sorted((point for point, family in run.hook_points.items() if family.get(metric)), key=_natural)
    steps = sorted({step for point in points for step in run.hook_points[point][metric]})
    values = [[run.hook_points[point][metric].get(step) for step in steps] for point in points]
    finite = [value for row in values for value in row if value is not None]
    if len(points) < 2 or len(steps) < 2 or not finite:
        return
    name = _title(metric) + (f", {run.label}" if several else "")
    alt = (
        f"Heat map of {name}: {len(points)} hook points from {points[0]} to {points[-1]}, {len(steps)} evaluations "
        f"from step {steps[0]} to {steps[-1]}, values from {show(min(finite))} to {show(max(finite))}."
    )
    figure.add(name, heat_map(name, _without_common_part(points), steps, values, limits), alt)


def _add_lines(
    figure: Figure,
    name: str,
    lines: Sequence[Line],
    x_range: tuple[int, int],
    y_range: tuple[float, float] | None = None,
    about: str = "",
) -> None:
    lines = [line for line in lines if line.steps]
    if not lines:
        return
    ends = [_first_to_last(line, named=len(lines) > 1) for line in lines]
    figure.add(
        name,
        line_plot(name, lines, x_range, y_range),
        f"Line plot of {name} over steps {x_range[0]} to {x_range[1]}. {'; '.join(ends)}.",
        [*([about] if about else []), *(ends if len(ends) <= 6 else [])],
    )


def _first_to_last(line: Line, named: bool) -> str:
    finite = [value for value in line.values if value is not None]
    missing = len(line.values) - len(finite)
    words = (
        " → ".join(show(value) for value in (finite[:1] + finite[-1:] if len(finite) > 1 else finite)) or "no value"
    )
    if missing:
        words += f" ({missing} of {len(line.values)} not finite)"
    return f"{line.label}: {words}" if named else words


def _line(label: str, index: int, series: dict[int, float | None]) -> Line:
    return Line(label, arm_style(index), *_sorted(series))


def _sorted(series: dict[int, float | None]) -> tuple[list[int], list[float | None]]:
    steps = sorted(series)
    return steps, [series[step] for step in steps]


def _step_range(steps: Iterable[int]) -> tuple[int, int]:
    known = set(steps) or {0}
    return min(known), max(known)


def _value_range(family: Iterable[dict[int, float | None]]) -> tuple[float, float] | None:
    """Lowest and highest value: axes and colours that arms share can be compared by eye."""
    finite = [value for series in family for value in series.values() if value is not None]
    return (min(finite), max(finite)) if finite else None


def _title(metric: str) -> str:
    return _TITLES.get(metric.lower(), metric.replace("_", " "))


def _natural(name: str) -> list[tuple[int, str]]:
    """`model.layers.9` before `model.layers.10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _without_common_part(names: Sequence[str]) -> list[str]:
    """`layers.5`, `layers.15` for `model.layers.5`, `model.layers.15`: row labels are narrow."""
    split = [name.split(".") for name in names]
    common = 0
    while all(len(parts) > common + 2 for parts in split) and len({parts[common] for parts in split}) == 1:
        common += 1
    return [".".join(parts[common:]) for parts in split]
