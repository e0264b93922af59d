"""The evidence of a card, printed line by line.

In: findings of `probe check`. Out: lines on the terminal. It must not know how the findings were made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..concepts.named_evidence import controls_of, estimates_of
from .console import shown_estimate

if TYPE_CHECKING:
    from ..concepts.card import Findings


def print_findings(title: str, findings: Findings) -> None:
    """Print the gain from the probe, all AUROCs, the calibration and the controls of one data set."""
    print("\n" + title_of(title, findings))
    lines = {"the probe adds": gain_of(findings)}
    lines |= {name: f"AUROC {shown_estimate(estimate)}" for name, estimate in estimates_of(findings).items()}
    for name, text in (lines | further_lines(findings)).items():
        print(evidence_line(name, text))


def title_of(title: str, findings: Findings) -> str:
    """Which examples, and how many."""
    near = f", {findings.near_duplicates} nearly rows of the fit" if findings.near_duplicates else ""
    return f"{title}: {findings.examples} examples, {findings.positives} positive{near}"


def evidence_line(name: str, text: str) -> str:
    """A line whose name ends where those of the other lines end."""
    return f"{name:>28}  {text}"


def gain_of(findings: Findings) -> str:
    """What the probe adds to all baselines."""
    adds = findings.adds
    if adds is None:
        return "not enough prompts to say"
    return (
        f"AUROC {shown_estimate(adds.auroc, '+')} to {adds.auroc_without:.3f} of all baselines, "
        f"saves {shown_estimate(adds.log_loss, '+')} nats of {adds.log_loss_without:.3f}"
    )


def further_lines(findings: Findings) -> dict[str, str]:
    """What stands after the AUROCs, by the name of its line: the answer's share, calibration, controls, autoencoder."""
    lines = {}
    if findings.prompt is not None and findings.prompt.answer_share is not None:
        share = shown_estimate(findings.prompt.answer_share)
        lines["of the answer"] = f"{share} of the score's variance under one prompt"
    calibration = findings.calibration
    if calibration is not None:
        slope = "labels are separated"
        if calibration.slope is not None:
            slope = f"slope {calibration.slope:.2f}, intercept {calibration.intercept:+.2f}"
        lines["calibration"] = f"{slope}, Brier score {calibration.brier:.3f}, log-loss {calibration.log_loss:.3f}"
    for name, control in controls_of(findings).items():
        lines[name] = f"AUROC {control.mean:.3f}, 95th percentile {control.p95:.3f} of {control.repeats}"
    sae = findings.sae
    if sae is not None:
        lines["autoencoder here"] = (
            f"explained variance {sae.explained_variance:.3f}, L0 {sae.l0:.1f}, {sae.dead_fraction:.1%} of {sae.latents} "
            f"latents never on in {sae.tokens} tokens"
        )
    return lines | _by_group(findings)


def _by_group(findings: Findings) -> dict[str, str]:
    """A line per group, and one that names the smallest group and the one with the lowest AUROC."""
    groups = findings.by_group
    if not groups:
        return {}
    lines = {}
    for group in groups:
        auroc = "one label only" if group.probe is None else f"AUROC {shown_estimate(group.probe)}"
        rates = [
            f"{rate:.0%} of {what}" for rate, what in (
                (group.true_positive_rate, "the positive"), (group.false_positive_rate, "the negative"),
            ) if rate is not None
        ]  # fmt: skip
        slope = group.calibration.slope if group.calibration is not None else None
        fit = "" if slope is None else f", slope {slope:.2f}"
        lines[f"group {group.name}"] = (
            f"{auroc}; says yes to {' and '.join(rates)}{fit}; {group.examples} examples, {group.positives} positive, "
            f"{group.prompts} prompts"
        )
    rated = [group for group in groups if group.probe is not None]
    lowest = min(rated, key=lambda group: group.probe.auroc if group.probe is not None else 1.0, default=None)
    said = f"smallest: {groups[0].name} ({groups[0].examples} examples)"
    return lines | {"of the groups": said + (f"; lowest AUROC: {lowest.name}" if lowest is not None else "")}
