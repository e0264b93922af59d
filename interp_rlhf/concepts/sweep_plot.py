"""The plot of a sweep.

In: the points of a sweep. Out: an SVG file. It must not know how the points were computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .svg import svg_figure

if TYPE_CHECKING:
    from pathlib import Path

    from .sweep import SweepPoint


def plot_sweep(curve: list[SweepPoint], path: str | Path, title: str) -> None:
    """Write an SVG file of the cross-validated AUROC by hook point, one line per pooling, with the spread over folds."""
    with svg_figure(path, (7, 3.2)) as (_, axes):
        points = list(dict.fromkeys(point.hook_point for point in curve))
        poolings = list(dict.fromkeys(point.pooling for point in curve))
        for number, pooling in enumerate(poolings):
            line = [point for point in curve if point.pooling == pooling]
            places = [points.index(point.hook_point) + 0.08 * (number - (len(poolings) - 1) / 2) for point in line]
            axes.errorbar(
                places,
                [p.auroc for p in line],
                yerr=[p.std for p in line],
                marker="o",
                capsize=3,
                label=f"fitted for {pooling}",
            )
        axes.axhline(0.5, linestyle=":", color="grey")
        axes.set_xticks(range(len(points)), points, rotation=60, ha="right", fontsize=7)
        if len(poolings) > 1:
            axes.legend(fontsize=7)
        axes.set(ylabel="AUROC (mean ± std over folds)", title=title)
