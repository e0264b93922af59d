"""Preference pairs as terms see them, and the losses of DPO in which a change of the margin is exact.

In: the log-probs of a batch of pairs, chosen completions first. Out: the margin that DPO puts into its loss. It must not know
concepts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from .term import TermContext

# Loss types of `DPOTrainer` whose value depends on β · (chosen − rejected score) alone, and those that first divide each score
# by its completion's length.
MARGIN_LOSSES = ("discopop", "exo_pair", "hinge", "robust", "sigmoid")
LENGTH_NORMALIZED_LOSSES = ("ipo", "sigmoid_norm")


class Pairs(NamedTuple):
    """A batch of P pairs in a preference trainer. Rows: all chosen completions, then all rejected completions.

    Attributes:
        log_probs (`torch.Tensor` of shape (2P,)): log-probs of the policy, summed over completion tokens, with their graph.
        reference (`torch.Tensor` of shape (2P,)): log-probs of the reference in the loss, after all shifts.
        lengths (`torch.Tensor` of shape (2P,)): completion tokens, as TRL's length-normalized losses count them.
        beta (`float`), loss_types (`list[tuple[str, float]]`): β, and each loss type of the trainer with its weight.
        unshifted_reference (`torch.Tensor` of shape (2P,)): log-probs of the reference before any shift.
    """

    log_probs: torch.Tensor
    reference: torch.Tensor
    lengths: torch.Tensor
    beta: float
    loss_types: list[tuple[str, float]]
    unshifted_reference: torch.Tensor


class PairLoss(NamedTuple):
    """Values of DPO's loss on a batch of P pairs that a shift of the margin needs.

    Attributes:
        beta (`float`): β.
        loss_type (`str`): the first loss type.
        lengths (`torch.Tensor` of shape (2P,)): completion tokens.
    """

    beta: float
    loss_type: str
    lengths: torch.Tensor


def margin(pairs: Pairs, loss_type: str) -> torch.Tensor:
    """The margin z (P,): the input of the sigmoid in `DPOTrainer`'s loss of this type, with reverse KL."""
    scores = pairs.log_probs - pairs.reference
    if loss_type in LENGTH_NORMALIZED_LOSSES:
        scores = scores / pairs.lengths.clamp(min=1)
    chosen, rejected = scores.chunk(2)
    return pairs.beta * (chosen - rejected)


def refuse_losses(context: TermContext, name: str, exact: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Refuse a DPO loss in which a term's formula does not hold.

    Args:
        context (`TermContext`): the trainer.
        name (`str`): name of the term.
        exact (`Sequence[str]`): loss types in which the formula holds.
        settings (`dict`): options of the trainer, with the values that the formula needs.

    Raises:
        `ValueError`: the trainer has another loss type, or another value of an option.
    """
    trainer = context.trainer
    wrong = [loss for loss in trainer.loss_types if loss not in exact]
    if wrong:
        raise ValueError(
            f"`loss_type` is {', '.join(f'`{loss}`' for loss in wrong)} – expected one of "
            f"{', '.join(f'`{loss}`' for loss in sorted(exact))} with `{name}`: the other losses do not depend on "
            "β · (chosen − rejected score) alone, so the term would have another formula."
        )
    for setting, needed in settings.items():
        value = getattr(trainer, setting, getattr(trainer.args, setting, needed))
        if value != needed:
            raise ValueError(
                f"`{setting}` is {value!r} – expected {needed!r} with `{name}`: its formula holds for that value only."
            )
