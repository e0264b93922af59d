"""Plots as SVG files, the same bytes for the same figure.

In: a path and the layout of a figure. Out: axes to draw on, and the file. It must not know what is drawn.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def svg_figure(path: str | Path, size: tuple[float, float], columns: int = 1) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes (an array if there are several columns). The file is written when the block ends.

    Args:
        size (`tuple[float, float]`): width and height in inches.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=size, layout="constrained")
    try:
        yield figure, axes
        figure.savefig(path, format="svg", metadata={"Date": None})
    finally:
        pyplot.close(figure)
