"""`concept_anchor`: holds a concept's score near the reference's.

In: a readout. Out: squared differences of its scores. It must not know trainers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .control import pooled_scores, trained_through
from .registry import register_term
from .term import LossTerm, OneConcept, TermValues

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...activations.tap import TokenReadout
    from ...concepts.readout import Readout
    from .batch import TermBatch


@register_term("concept_anchor")
@dataclass(frozen=True, eq=False, kw_only=True)
class ConceptAnchor(OneConcept, LossTerm):
    """Holds a concept's score near the reference's: λ (⟨h_θ, r⟩ − ⟨h_0, r⟩)².

    Source: ProCon (arXiv 2509.06795), which anchors the projection on the refusal direction during fine-tuning. Deviations:
    1. r is any probe or direction, as fitted and calibrated. The difference is in log-odds for every norm of r.
    2. The squared difference of each counted token is averaged over a sequence's tokens, then over sequences, so that long
       sequences do not weigh more. `pooled=True` squares the difference of pooled scores instead.
    3. The caller chooses the schedule. The paper's schedule is strong early (`Schedule(kind="decay")`).
    4. A card's `transform` is left out, since it may clip.
    5. A readout with the pooling `attention` is held token by token. With `pooled=True` its attention is held too.

    Args:
        readout (`Readout`): the concept.
        pooled (`bool`, defaults to `False`): anchor a sequence's pooled score.
        random_direction (`int`, *optional*): seed of the control: a random direction of the same norm replaces the concept's.
        weight (`float`), schedule (`Schedule`), name (`str`): as for every term.

    Raises:
        `ValueError`: a value of the wrong type, or a negative weight.

    Example:
        >>> from interp_rlhf import ConceptAnchor, attach
        >>> attachment = attach(dpo_trainer, regularizers=[ConceptAnchor(readout=readout, weight=0.1)])
        >>> attachment.terms.terms[0].name
        'anchor_concept'
    """

    pooled: bool = False
    random_direction: int | None = None

    def prepare(self) -> None:
        self.complete("readout", trained_through(self.readout, self.random_direction))

    @property
    def default_name(self) -> str:
        return f"anchor_{self.readout.name}"

    @property
    def reference_readouts(self) -> Sequence[TokenReadout]:
        return [self.readout]

    def pushes(self) -> dict[Readout, int]:
        return {}

    def compute(self, batch: TermBatch, weight: float) -> TermValues:
        tokens = batch.tokens(self.include_end_of_turn)
        now = self.readout(batch.policy(self.readout.hook_point, tokens))  # (N, 1)
        start = batch.reference(self.readout, tokens)
        if self.pooled:
            gap = pooled_scores(self.readout, now, tokens) - pooled_scores(self.readout, start, tokens)  # (M,)
            gap = gap.masked_fill(~tokens.any, 0)
            values = gap.pow(2)
        else:
            each = self.readout.scale * (now - start)[:, 0]
            gap, values = tokens.means(each), tokens.means(each.pow(2))
        return TermValues(weight * values, {"squared_gap": values, "drift": gap})
