"""The gate: it decides if a card's evidence is enough for a reward.

In: a card. Out: the reasons why not; an empty list if it passes. A card that fails can still be a monitor. It must not know
models, and imports neither torch nor TRL.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from .statistics import MIN_PER_LABEL, MIN_PROMPTS

if TYPE_CHECKING:
    from ..concepts.card import Card, Findings

logger = logging.getLogger(__name__)

# With a smaller share of variance between answers, a score is nearly a function of the prompt: all answers to one prompt get
# nearly the same reward.
ANSWER_SHARE = 0.1
# The same holds for a score that keeps more than this share of its AUROC above 0.5 when each prompt has another prompt's answer.
KEPT = 0.75


def gate(card: Card, require_causal: bool = False) -> list[str]:
    """Reasons why a card may not be a reward or a penalty. The list is empty if it may.

    The probe's AUROC must lie above 0.5 and above both controls, by the lower bound of its 95 % interval against the 95th
    percentile of the control: on held-out examples, and on the model's own completions where the card has them. Latents of a
    sparse autoencoder must also beat as many latents of random dictionaries. A score that is nearly a function of the prompt is
    no reward: it cannot tell answers apart. Text baselines, and what the probe adds to them, do not gate: they are there to be
    read.

    Args:
        require_causal (`bool`, defaults to `False`): also require the verdict `causal` of the causal check. A frozen reading is a
            valid reward without it: the policy cannot move what it reads, and only its text counts. Require it if the readout
            reads the policy (`reader: policy` or `both`), if it is a term in the loss or is steered or ablated, or if you claim
            that the model uses the concept.
    """
    evidence = card.evidence
    if evidence is None:
        return ["it has no evidence"]
    if evidence.readout != card.readout_digest:
        return ["its evidence was written for another readout (artifact, hook point, pooling or model changed since)"]
    if card.readout.kind == "sae_latents" and evidence.held_out.random_dictionary is None:
        return ["its evidence lacks the random-dictionary control"]
    reasons = []
    for findings, where in (
        (evidence.held_out, "held-out examples"), (evidence.completions, "the model's own completions"),
    ):  # fmt: skip
        if findings is not None:
            reasons += _below_controls(findings, where) + _of_the_prompt(findings, where)
    return reasons + (_not_causal(card) if require_causal else [])


def require_passed(card: Card, path: object, require_causal: bool = False) -> None:
    """Raises `ValueError` for a card that may not be a reward. Warns about evidence that older versions wrote."""
    reasons = gate(card, require_causal)
    if not reasons and card.evidence is not None and card.evidence.held_out.calibration is None:
        logger.warning(
            "The evidence of `%s` was written before 0.3: it says neither what the probe adds to the words, nor whether its "
            "score is the answer's or the prompt's. Write it again with `interp-rlhf probe check %s … --replace`.", path, path,
        )  # fmt: skip
    if reasons:
        raise ValueError(
            f"`{path}` may not be a {card.role}: {'; '.join(reasons)} – expected evidence above the controls. Run "
            f"`interp-rlhf probe check {path} …`, or use the card as a monitor (`role: monitor`)."
        )


def _not_causal(card: Card) -> list[str]:
    causal = card.causal
    if causal is None:
        return ["it has no causal check, which `require_causal` asks for (`interp-rlhf probe causal`)"]
    if causal.readout != card.readout_digest:
        return ["its causal check was written for another readout"]
    if causal.verdict != "causal":
        return [f"its causal check says `{causal.verdict}`: {'; '.join(causal.reasons)}"]
    return []


def _of_the_prompt(findings: Findings, where: str) -> list[str]:
    prompt = findings.prompt
    if prompt is None:
        return []
    share, kept = prompt.answer_share, prompt.other_answers
    if share is not None and share.value < ANSWER_SHARE:
        return [
            f"on {where} its score is nearly a function of the prompt: {share.value:.0%} of its variance is the answer's, less "
            f"than {ANSWER_SHARE:.0%}"
        ]
    sure = kept is not None and kept.low is not None and kept.low > 0.5
    if kept is not None and sure and kept.auroc - 0.5 > KEPT * (findings.probe.auroc - 0.5):
        return [
            f"on {where} its score tells the prompts apart, not the answers: with another prompt's answer in the place of each "
            f"its AUROC is still {kept.auroc:.3f}, of {findings.probe.auroc:.3f}"
        ]
    return []


def _below_controls(findings: Findings, where: str) -> list[str]:
    low = findings.probe.low
    if low is None:
        return [
            f"on {where} there are not enough prompts for an interval ({findings.examples} examples; it takes {MIN_PROMPTS} "
            f"prompts, {MIN_PER_LABEL} with each label)"
        ]
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
