"""The plot of a causal check.

In: the findings. Out: an SVG file. It must not know how they were measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .svg import svg_figure

if TYPE_CHECKING:
    from pathlib import Path

    from .causal_findings import CausalFindings


def plot_causal(findings: CausalFindings, path: str | Path, title: str) -> None:
    """Write an SVG file: left the dose curve, right the effects of steering and silencing next to all controls."""
    with svg_figure(path, (8.5, 3.4), columns=2) as (figure, (left, right)):
        _draw_doses(left, findings)
        _draw_effects(right, findings)
        figure.suptitle(f"{title}: {findings.verdict}", fontsize=10)


def _draw_doses(axes: Any, findings: CausalFindings) -> None:
    doses = findings.doses
    axes.plot([d.alpha for d in doses], [d.value for d in doses], color="tab:grey", linewidth=1, zorder=1)
    for counts, marker, label in ((True, "o", "counts"), (False, "x", "text out of its limits")):
        shown = [d for d in doses if d.counts == counts]
        if shown:
            axes.scatter([d.alpha for d in shown], [d.value for d in shown], marker=marker, label=label, zorder=2)
    for alpha in (-findings.compared_at, findings.compared_at):
        axes.axvline(alpha, linestyle=":", color="tab:grey", linewidth=1)
    axes.set_xlabel("dose, in standard deviations of the activation", fontsize=8)
    axes.set_ylabel(f"{findings.measure}, typical value", fontsize=8)
    axes.legend(fontsize=7)


def _draw_effects(axes: Any, findings: CausalFindings) -> None:
    names, places = ["steer", "project out", "set to mean"], [2, 1, 0]
    effects = [findings.steer, findings.project, findings.mean]
    for place, effect, kind in zip(places, effects, ("steer", "silence", "silence"), strict=True):
        for control in findings.controls:
            value = getattr(control, kind)
            if value is not None:
                colour = {"random": "tab:grey", "same variance": "tab:purple"}.get(control.kind, "tab:orange")
                axes.scatter([value], [place - 0.15], marker="|", color=colour, s=60)
        if effect is None:
            axes.text(0, place + 0.1, "not tested", fontsize=7)
            continue
        low, high = effect.typical.low, effect.typical.high
        if low is not None and high is not None:
            axes.plot([low, high], [place + 0.1] * 2, color="tab:blue")
        axes.scatter([effect.typical.value], [place + 0.1], color="tab:blue", zorder=3)
        axes.plot([effect.bound] * 2, [place - 0.3, place + 0.3], linestyle=":", color="tab:red")
    axes.set_yticks(places, names, fontsize=8)
    axes.set_xlabel(
        f"typical move of {findings.measure}: concept (blue), random (grey),\nsame variance (purple), foreign (orange), bound of "
        "chance (red)",
        fontsize=7,
    )
