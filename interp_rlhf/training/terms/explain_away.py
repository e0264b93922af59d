"""`explain_away`: a concept's score on the reference explains part of a preference. The policy need not learn that part.

In: a readout. Out: a shift of the reference's log-probs. It must not know how DPO turns them into a loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .control import pooled_scores
from .pairs import LENGTH_NORMALIZED_LOSSES, MARGIN_LOSSES, refuse_losses
from .registry import register_term
from .term import MarginShift, OneConcept

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ...activations.tap import TokenReadout
    from ...concepts.readout import Readout
    from .batch import TermBatch
    from .pairs import PairLoss
    from .term import TermContext


@register_term("explain_away")
@dataclass(frozen=True, eq=False, kw_only=True)
class ExplainAway(OneConcept, MarginShift):
    """EA-DPO: a concept explains part of a preference away. With a negative λ it amplifies that part.

    −log σ(β D_θ + λ ΔA), ΔA = A(x, y⁺) − A(x, y⁻) on the reference. The policy need not learn what the concept's score already
    explains of the preference. This is plain DPO with a reference log-prob of y that is lower by (λ/β) A(x, y). The term is
    computed that way and adds nothing to the loss. TRL's `rewards/*` contain the shift; the rewards without it are logged under
    `interp/<name>/`.

    Source: Goodfire (arXiv 2606.12360). Deviations:
    1. A is a probe's calibrated, pooled and transformed score, or a latent's.
    2. `ipo` and `sigmoid_norm` divide by the length. For them the shift is multiplied by it first.
    3. A pair with a completion without counted tokens stays as in plain DPO.

    Args:
        readout (`Readout`): the concept. A card needs evidence that passes the gate.
        weight (`float`): λ, also negative.
        schedule (`Schedule`), name (`str`): as for every term.

    Raises:
        `ValueError`: a value of the wrong type.

    Example:
        >>> from interp_rlhf import ExplainAway, attach
        >>> attachment = attach(dpo_trainer, regularizers=[ExplainAway(readout=readout, weight=1.0)])
        >>> attachment.terms.terms[0].name
        'explain_concept'
    """

    allows_negative_weight: ClassVar[bool] = True
    needs_evidence: ClassVar[bool] = True

    @property
    def default_name(self) -> str:
        return f"explain_{self.readout.name}"

    @property
    def policy_point(self) -> None:
        return None

    @property
    def reference_readouts(self) -> Sequence[TokenReadout]:
        return [self.readout]

    def pushes(self) -> dict[Readout, int]:
        return {self.readout: -1 if self.weight > 0 else 1}

    def refuse(self, context: TermContext) -> None:
        settings = {"f_divergence_type": "reverse_kl", "ld_alpha": None, "use_liger_kernel": False}
        refuse_losses(context, self.name, (*MARGIN_LOSSES, *LENGTH_NORMALIZED_LOSSES), settings)
        losses = context.trainer.loss_types
        if len({loss in LENGTH_NORMALIZED_LOSSES for loss in losses}) > 1:
            raise ValueError(
                f"`loss_type` mixes {', '.join(f'`{loss}`' for loss in losses)} – expected that all or none divide by the "
                f"length with `{self.name}`: one reference cannot be shifted by two amounts."
            )

    def scores(self, batch: TermBatch) -> torch.Tensor:
        """A (2P,) of every completion; 0 for both completions of a pair if one of them has no counted token."""
        tokens = batch.tokens(self.include_end_of_turn)
        scores = pooled_scores(self.readout, batch.reference(self.readout, tokens), tokens)
        both_count = tokens.any.view(2, -1).all(0).repeat(2)
        return scores.masked_fill(~both_count, 0)

    def shift(self, scores: torch.Tensor, loss: PairLoss, weight: float) -> torch.Tensor:
        shift = weight / loss.beta * scores
        return shift * loss.lengths if loss.loss_type in LENGTH_NORMALIZED_LOSSES else shift
