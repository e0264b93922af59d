"""`concept_penalty`: trains against a concept's score on the policy's own activations.

In: a readout. Out: softplus of its log-odds. It must not know trainers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn.functional import softplus

from .control import pooled_scores, trained_through
from .registry import register_term
from .term import LossTerm, OneConcept, TermValues

if TYPE_CHECKING:
    from ...concepts.readout import Readout
    from .batch import TermBatch


@register_term("concept_penalty")
@dataclass(frozen=True, eq=False, kw_only=True)
class ConceptPenalty(OneConcept, LossTerm):
    """Trains directly against a concept's score: λ softplus(± s). s is the log-odds on the policy's own activations.

    **Models game this term.** Its gradient runs through the probe. The quickest way to lower it is to move the activation off
    the probe's direction, not to change the text. In one DPO replication the term fell from 3.22 to 0.007 within 20 steps, while
    a refitted probe still told the texts apart. The Obfuscation Atlas (arXiv 2602.15515) advises against such terms. This one is
    for the study of that effect, so it needs `allow_differentiable_probe=True` and a monitor with another artifact.

    Args:
        readout (`Readout`): the concept; its calibrated and pooled score is a log-odds. A card's `transform` is left out. A card
            needs evidence that passes the gate.
        encourage (`bool`, defaults to `False`): train towards the concept, not against it.
        allow_differentiable_probe (`bool`): must be True. It confirms that you have read this warning.
        random_direction (`int`, *optional*): seed of the control: a random direction of the same norm replaces the concept's.
        weight (`float`), schedule (`Schedule`), name (`str`): as for every term.

    Raises:
        `ValueError`: `allow_differentiable_probe` is not True, a value of the wrong type, or a negative weight.

    Example:
        >>> from interp_rlhf import ConceptPenalty, attach
        >>> term = ConceptPenalty(readout=readout, weight=0.1, allow_differentiable_probe=True)
        >>> attachment = attach(dpo_trainer, regularizers=[term], monitors=["witness.yaml"])
        >>> attachment.terms.terms[0].name
        'penalty_concept'
    """

    encourage: bool = False
    allow_differentiable_probe: bool = False
    random_direction: int | None = None

    needs_evidence: ClassVar[bool] = True
    needs_holdout: ClassVar[bool] = True

    def prepare(self) -> None:
        self.complete("readout", trained_through(self.readout, self.random_direction))
        if self.allow_differentiable_probe is not True:
            raise ValueError(
                f"`ConceptPenalty` on `{self.readout.name}` was given "
                f"`allow_differentiable_probe={self.allow_differentiable_probe!r}` "
                "– expected True. The gradient through a probe teaches the model to move its activations off the probe, not to "
                "write other text: the score falls within some steps, and the behaviour stays. Use the score as a reward on "
                "rollouts (`ConceptReward`) or hold it with a `ConceptAnchor`; to study the effect, pass the flag and a holdout "
                "monitor."
            )

    @property
    def default_name(self) -> str:
        return f"penalty_{self.readout.name}"

    def pushes(self) -> dict[Readout, int]:
        return {self.readout: 1 if self.encourage else -1}

    def compute(self, batch: TermBatch, weight: float) -> TermValues:
        tokens = batch.tokens(self.include_end_of_turn)
        scores = pooled_scores(
            self.readout, self.readout(batch.policy(self.readout.hook_point, tokens)), tokens
        )  # (M,)
        scores = torch.where(tokens.any, scores, torch.zeros_like(scores))
        values = softplus(-scores if self.encourage else scores) * tokens.any
        return TermValues(weight * values, {"penalty": values, "score": scores})
