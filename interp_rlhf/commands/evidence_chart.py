"""The evidence of a card, drawn with plain characters: one row per AUROC, all on one axis.

In: findings. Out: lines. A new kind of evidence gets a function `Evidence -> list[str]` in `SECTIONS`. It must not know how the
findings were made, and it must not print.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..concepts.named_evidence import controls_of, estimates_of, findings_of
from .console import shown_estimate
from .evidence_lines import evidence_line, further_lines, gain_of, title_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..concepts.card import Evidence, Findings

WIDTH = 51  # columns of the axis


def drawn_evidence(evidence: Evidence) -> list[str]:
    """Lines with everything that the evidence says."""
    return [line for section in SECTIONS for line in section(evidence)]


class Axis:
    """Positions of AUROCs on a line of `WIDTH` characters, which ends at 1 and starts at a tenth below the lowest value."""

    def __init__(self, lowest: float):
        self.start = max(0.0, min(0.4, math.floor(lowest * 10) / 10))

    def __call__(self, value: float) -> int:
        place = round((value - self.start) / (1 - self.start) * (WIDTH - 1))
        return min(max(place, 0), WIDTH - 1)

    def drawn(self, marks: dict[float, str], span: tuple[float, float] | None = None) -> str:
        """A row: chance as a dotted line, then the span, then the marks. Later marks cover earlier ones."""
        row = [" "] * WIDTH
        row[self(0.5)] = "┊"
        if span is not None:
            first, last = map(self, span)
            row[first : last + 1] = "─" * (last + 1 - first)
            row[first], row[last] = "├", "┤"
        for value, mark in marks.items():
            row[self(value)] = mark
        return "".join(row)

    def scale(self) -> str:
        """The axis with its numbers."""
        row = [" "] * (WIDTH + 2)
        for value in (self.start, 0.5, 0.75, 1.0):
            text = f"{value:g}"
            row[self(value) : self(value) + len(text)] = text
        return "".join(row)


def _charts(evidence: Evidence) -> list[str]:
    lines: list[str] = []
    for title, findings in findings_of(evidence).items():
        lines += ["", title_of(title, findings), *_chart(findings)]
        controls = controls_of(findings)
        rest = {name: text for name, text in further_lines(findings).items() if name not in controls}
        lines += [evidence_line(name, text) for name, text in ({"the probe adds": gain_of(findings)} | rest).items()]
    return lines


def _chart(findings: Findings) -> list[str]:
    estimates, controls = estimates_of(findings), controls_of(findings)
    bounds = [estimate.auroc if estimate.low is None else estimate.low for estimate in estimates.values()]
    axis = Axis(min(*bounds, *(control.mean for control in controls.values())))
    lines = [evidence_line("AUROC", axis.scale())]
    for name, estimate in estimates.items():
        span = None if estimate.low is None or estimate.high is None else (estimate.low, estimate.high)
        lines.append(evidence_line(name, f"{axis.drawn({estimate.auroc: '●'}, span)}  {shown_estimate(estimate)}"))
    for name, control in controls.items():
        said = f"{control.mean:.3f}, p95 {control.p95:.3f} of {control.repeats}"
        lines.append(evidence_line(name, f"{axis.drawn({control.mean: '○', control.p95: '▏'})}  {said}"))
    marks = "● AUROC, ├─┤ 95 % interval, ┊ chance, ○ mean of a control, ▏ its 95th percentile"
    return [*lines, evidence_line("", marks)]


def _made_by(evidence: Evidence) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in evidence.versions.items())
    return ["", f"written by: {evidence.command}", f"with: seed {evidence.seed}, {versions}"]


SECTIONS: tuple[Callable[[Evidence], list[str]], ...] = (_charts, _made_by)
