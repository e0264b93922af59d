"""A training batch as terms see it: the counted tokens, the policy's activations of them, and the reference's scores.

In: the trainer's inputs, the activations that a tap kept, and the reference's scores. Out: tensors over the N counted
tokens. It must not know terms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...activations.counted import counted

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from ...activations.chat_marks import ChatMarks
    from ...activations.counted import Counted
    from ...activations.tap import TokenReadout
    from .pairs import Pairs


class TermBatch:
    """A training batch as a term sees it.

    Args:
        inputs (`dict`): the trainer's batch.
        marks (`ChatMarks`): the tokens that the chat template writes around turns.
        activations (`dict[str, torch.Tensor]`): hook point to the policy's activation (B, T, D), with its graph.
        references (`dict[TokenReadout, torch.Tensor]`): readout to the reference's scores (B, T, K).
        pairs (`Pairs`, *optional*): the pairs of a preference trainer, if a term needs them.
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        marks: ChatMarks,
        activations: Mapping[str, torch.Tensor],
        references: Mapping[TokenReadout, torch.Tensor],
        pairs: Pairs | None,
    ):
        self.pairs = pairs
        self._inputs, self._marks = inputs, marks
        self._activations, self._references = activations, references
        self._tokens: dict[bool, Counted] = {}
        self._chosen: dict[tuple[str, int], torch.Tensor] = {}

    def tokens(self, include_end_of_turn: bool) -> Counted:
        """The N counted tokens."""
        if include_end_of_turn not in self._tokens:
            self._tokens[include_end_of_turn] = counted(self._inputs, self._marks, include_end_of_turn)
        return self._tokens[include_end_of_turn]

    def policy(self, hook_point: str, tokens: Counted) -> torch.Tensor:
        """Activations (N, D) of the policy, float32, with their graph."""
        # Terms at one hook point share the selection and the memory of its gradient.
        key = (hook_point, id(tokens))
        if key not in self._chosen:
            activation = self._activations[hook_point]
            self._chosen[key] = activation[tokens.mask.to(activation.device)].float().to(tokens.mask.device)
        return self._chosen[key]

    def has_reference(self, readout: TokenReadout) -> bool:
        """True if the reference's scores of this readout are known."""
        return readout in self._references

    def reference(self, readout: TokenReadout, tokens: Counted) -> torch.Tensor:
        """Scores (N, K) of a readout on the reference, float32, without gradient."""
        return self._references[readout].to(tokens.mask.device)[tokens.mask]
