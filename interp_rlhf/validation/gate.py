"""The gate: whether a card's evidence is enough for it to be a reward.

In: a card. Out: the reasons why not, none where it passes. Imports neither torch nor TRL. A card that fails can still be
a monitor.
"""

from __future__ import annotations

from ..concepts.card import Card, Findings


def gate(card: Card) -> list[str]:
    """Reasons why a card may not be a reward or a penalty; an empty list where it may.

    The probe's AUROC must lie above 0.5 and above both controls, by the lower bound of its 95 % interval against the 95th
    percentile of the control: on held-out examples, and on the model's own completions where the card has them. Latents of a
    sparse autoencoder must also beat as many latents of random dictionaries. Text baselines do not gate: they are there to be
    read.
    """
    evidence = card.evidence
    if evidence is None:
        return ["it has no evidence"]
    if evidence.readout != card.readout_digest:
        return ["its evidence was written for another readout (artifact, hook point, pooling or model changed since)"]
    if card.readout.kind == "sae_latents" and evidence.held_out.random_dictionary is None:
        return ["its evidence lacks the random-dictionary control"]
    reasons = _below_controls(evidence.held_out, "held-out examples")
    if evidence.completions is not None:
        reasons += _below_controls(evidence.completions, "the model's own completions")
    return reasons


def require_passed(card: Card, path: object) -> None:
    """Raises `ValueError` for a card that may not be a reward."""
    reasons = gate(card)
    if reasons:
        raise ValueError(
            f"`{path}` may not be a {card.role}: {'; '.join(reasons)} – expected evidence above the controls. Run "
            f"`interp-rlhf probe check {path} …`, or use the card as a monitor (`role: monitor`)."
        )


def _below_controls(findings: Findings, where: str) -> list[str]:
    low = findings.probe.low
    bars = {
        "chance": 0.5,
        "the 95th percentile of its permutation control": findings.permutation.p95,
        "the 95th percentile of random directions": findings.random_direction.p95,
    }
    if findings.random_dictionary is not None:
        bars["the 95th percentile of random dictionaries"] = findings.random_dictionary.p95
    reasons = []
    if findings.sae is not None and findings.sae.explained_variance <= 0:
        reasons.append(f"on {where} its autoencoder explains no variance ({findings.sae.explained_variance:.3f})")
    return reasons + [
        f"on {where} its AUROC {findings.probe.auroc:.3f} has the lower bound {low:.3f}, not above {bar} ({value:.3f})"
        for bar, value in bars.items()
        if low <= value
    ]
