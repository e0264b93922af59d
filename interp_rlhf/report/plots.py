"""Lines and heat maps as SVG text.

In: numbers over steps. Out: one SVG document per plot, the same bytes for the same numbers. Text stays text, so that
it can be read aloud, searched and set in the reader's font. It must not know run logs or pages.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .text import shorten, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008): told apart with every common colour vision deficiency, and on paper by their dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_PLOT_WIDTH = (
    4.2  # inches; at 72 units per inch 302 units, about the width of a phone: text is readable there unscaled
)
_MARKED = 40  # a line of at most so many points has a marker on each
_RC: dict[str, Any] = {
    "svg.hashsalt": "interp_rlhf",
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#3d434d",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlecolor": "#1b1f24",
    "axes.titlelocation": "left",
    "xtick.color": "#3d434d",
    "ytick.color": "#3d434d",
    "legend.fontsize": 9,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "lines.linewidth": 1.7,
    "lines.markersize": 3.6,
}


@dataclass(frozen=True)
class Style:
    """The look of one line, which no other line of the plot has."""

    colour: str
    dashes: Any
    marker: str


@dataclass(frozen=True)
class Line:
    """One series. A `None` among the values is a hole in the line."""

    label: str
    style: Style
    steps: Sequence[int]
    values: Sequence[float | None]


def arm_style(index: int) -> Style:
    """Colour, dashes and marker of the `index`-th arm: the same in every plot, unique for the first 35."""
    turn = index // len(COLOURS)
    return Style(COLOURS[index % len(COLOURS)], DASHES[(index + turn) % len(DASHES)], MARKERS[index % len(MARKERS)])


def depth_style(index: int, count: int) -> Style:
    """Style of the `index`-th of `count` hook points: dark is early in the model, light is late."""
    import matplotlib
    from matplotlib.colors import to_hex

    share = index / (count - 1) if count > 1 else 0.0
    dashes = DASHES[index % len(DASHES)] if count <= 4 else "-"
    return Style(to_hex(matplotlib.colormaps["viridis"](0.05 + 0.75 * share)), dashes, MARKERS[index % len(MARKERS)])


def line_plot(
    title: str, lines: Sequence[Line], x_range: tuple[int, int], y_range: tuple[float, float] | None = None
) -> str:
    """Series over step as an SVG document.

    Args:
        title (`str`): shown above the plot, shortened in its middle if it is long.
        lines (`Sequence[Line]`): with two or more, a legend names the first, the last and up to four between.
        x_range (`tuple[int, int]`): first and last step of the axis, shared by the plots of a page.
        y_range (`tuple[float, float]`, *optional*): lowest and highest value, where plots share that axis too.

    Returns:
        `str`: the SVG document.
    """
    from matplotlib.ticker import MaxNLocator

    rows = math.ceil(len(_in_legend(lines)) / _legend_columns(lines)) if len(lines) > 1 else 0
    with _Drawing(legend_rows=rows) as (figure, axes):
        for line in lines:
            _draw(axes, line)
        axes.set_title(shorten(title, 38))
        axes.set_xlabel("step")
        margin = max((x_range[1] - x_range[0]) * 0.03, 0.5)
        axes.set_xlim(x_range[0] - margin, x_range[1] + margin)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if y_range is not None:
            pad = (y_range[1] - y_range[0]) * 0.06 or max(abs(y_range[0]) * 0.05, 0.01)
            axes.set_ylim(y_range[0] - pad, y_range[1] + pad)
        if all(value is None for line in lines for value in line.values):
            axes.text(0.5, 0.5, "no finite value was logged", ha="center", transform=axes.transAxes, color="#a40000")
        if len(lines) > 1:
            _legend(figure, axes, _in_legend(lines))
        return _svg(figure)


def heat_map(
    title: str,
    rows: Sequence[str],
    steps: Sequence[int],
    values: Sequence[Sequence[float | None]],
    limits: tuple[float, float],
    columns: Sequence[str] = (),
    across: str = "step of evaluation",
) -> str:
    """Values per row and step, or per row and named column, as an SVG document, the first row at the bottom; a hole is grey.

    Args:
        title (`str`): shown above the map.
        rows (`Sequence[str]`): one name per row, for hook points in the order of the model.
        steps (`Sequence[int]`): one per column.
        values (`Sequence[Sequence[float | None]]`): one sequence per row, one value per step.
        limits (`tuple[float, float]`): values of the darkest and the lightest colour, shared by the arms. Limits of opposite sign
            and equal size have white at 0 between two colours.
        columns (`Sequence[str]`): names of the columns, in place of steps.
        across (`str`): what the columns are.

    Returns:
        `str`: the SVG document.
    """
    with _Drawing(height=min(1.6 + 0.16 * len(rows), 5.5) + (0.6 if columns else 0)) as (figure, axes):
        cells = [[math.nan if value is None else value for value in row] for row in values]
        axes.set_facecolor("#d5d8dd")
        axes.grid(False)
        colours = "RdBu_r" if limits[0] == -limits[1] else "viridis"
        mesh = axes.pcolormesh(cells, cmap=colours, vmin=limits[0], vmax=limits[1], edgecolors="face", linewidth=0.2)
        bar = figure.colorbar(mesh, ax=axes, pad=0.02)
        bar.outline.set_visible(False)
        axes.set_title(shorten(title, 38))
        axes.set_xlabel(across)
        names = [shorten(name, 16) for name in columns] or [show(step) for step in steps]
        ticks = _evenly(len(names), 16 if columns else 6)
        turned = 90 if columns else 0
        axes.set_xticks([tick + 0.5 for tick in ticks], [names[tick] for tick in ticks], rotation=turned)
        shown = _evenly(len(rows), 12)
        axes.set_yticks([row + 0.5 for row in shown], [shorten(rows[row], 20) for row in shown])
        return _svg(figure)


class _Drawing:
    """A figure with the report's own settings, independent of the user's matplotlib settings."""

    def __init__(self, legend_rows: int = 0, height: float = 2.5):
        self._height = height + 0.2 * legend_rows

    def __enter__(self) -> tuple[Figure, Axes]:
        from matplotlib import style
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self._style = style.context(["default", _RC])
        self._style.__enter__()
        figure = Figure(figsize=(_PLOT_WIDTH, self._height), layout="constrained")
        FigureCanvasSVG(figure)
        return figure, figure.add_subplot()

    def __exit__(self, *error: Any) -> None:
        self._style.__exit__(*error)


def _draw(axes: Axes, line: Line) -> None:
    values = [math.nan if value is None else value for value in line.values]
    finite = {index for index, value in enumerate(line.values) if value is not None}
    alone = sorted(index for index in finite if not {index - 1, index + 1} & finite)
    axes.plot(
        line.steps,
        values,
        color=line.style.colour,
        linestyle=line.style.dashes,
        marker=line.style.marker,
        # A point without a neighbour would be invisible without its marker.
        markevery=None if len(values) <= _MARKED else alone,
    )


def _in_legend(lines: Sequence[Line]) -> list[Line]:
    return [lines[index] for index in _evenly(len(lines), 6)]


def _legend_columns(lines: Sequence[Line]) -> int:
    return 2 if all(len(line.label) <= 22 for line in lines) else 1


def _legend(figure: Figure, axes: Axes, lines: Sequence[Line]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=line.style.colour, linestyle=line.style.dashes, marker=line.style.marker)
        for line in lines
    ]
    # Labels are set afterwards: matplotlib drops a label that starts with an underscore.
    placed = [str(index) for index in range(len(lines))]
    legend = figure.legend(handles, placed, loc="outside lower left", ncols=_legend_columns(lines), frameon=False)
    for text, line in zip(legend.get_texts(), lines, strict=True):
        text.set_text(shorten(line.label, 48))


def _evenly(count: int, at_most: int) -> list[int]:
    """Up to `at_most` of `count` positions, evenly spread, the first and the last among them."""
    if count <= at_most:
        return list(range(count))
    return sorted({round(index * (count - 1) / (at_most - 1)) for index in range(at_most)})


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The font that lays the text out may lack a glyph; the reader's browser sets the text in its own fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", buffer.getvalue(), flags=re.DOTALL)
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
