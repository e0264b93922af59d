"""A causal check, printed line by line.

In: its findings. Out: lines. It must not know how the findings were made, and it must not print.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .console import shown_estimate
from .evidence_lines import evidence_line

if TYPE_CHECKING:
    from ..concepts.causal_findings import CausalFindings, Effect

_BAR = 21  # columns of the drawn dose curve


def causal_lines(findings: CausalFindings) -> list[str]:
    """The doses, drawn, each effect next to its controls, and the verdict."""
    values = [dose.value for dose in findings.doses]
    low, span = min(values), (max(values) - min(values)) or 1.0
    lines = ["", f"causal check: {findings.measure}, {findings.prompts} prompts, σ = {findings.sigma:.3g}"]
    for dose in findings.doses:
        mark = "" if dose.counts else ", out of its limits"
        compared = "  ← compared with controls" if dose.alpha and abs(dose.alpha) == findings.compared_at else ""
        bar = ("·" * round((dose.value - low) / span * (_BAR - 1)) + "●").ljust(_BAR)
        said = (
            f"perplexity {dose.perplexity:.1f}, empty {dose.empty:.0%}, repeated {dose.repeated:.0%}{mark}{compared}"
        )
        lines.append(evidence_line(f"{dose.alpha:+g} σ", f"{bar} {dose.value:+.3f}  {said}"))
    lines.append(evidence_line("a rising curve explains", f"{findings.monotone:.0%}"))
    lines += [
        evidence_line(name, "not tested" if one is None else _shown_effect(one))
        for name, one in findings.effects.items()
    ]
    other = findings.other
    if other is not None:
        flag = ", the recipes disagree" if other.disagrees else ""
        said = f"{other.verdict}; cosine {other.cosine:.2f}, weighted {other.weighted_cosine:.2f}{flag}"
        lines.append(evidence_line(other.method.replace("_", " "), said))
    reasons = f" ({'; '.join(findings.reasons)})" if findings.reasons else ""
    return [*lines, f"causal verdict: {findings.verdict}{reasons}"]


def _shown_effect(effect: Effect) -> str:
    beats = ", ".join(f"{name} {part.value:.0%}" for name, part in effect.beats.items())
    return (
        f"{shown_estimate(effect.typical, '+')}, {effect.share.value:.0%} of {effect.prompts} as predicted, chance up to "
        f"{effect.bound:.3f}; beats {beats}: {'yes' if effect.passes else 'no'}"
    )
