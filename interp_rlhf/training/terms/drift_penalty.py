"""`drift_penalty`: holds the activation near the reference's, whole or in a subspace.

In: a hook point or a subspace. Out: squared distances relative to the reference's norm. It must not know trainers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from .readouts import Whole
from .registry import register_term
from .term import LossTerm, TermValues

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from ...activations.tap import TokenReadout
    from ...concepts.readout import Readout
    from ...concepts.subspace import Subspace
    from ..make import CardFiles
    from .batch import TermBatch
    from .term import TermContext


@dataclass(frozen=True, eq=False)
class Projection:
    """Readout of an activation's R coordinates in a subspace, and of its squared norm: (..., R + 1)."""

    name: str
    subspace: Subspace

    @property
    def hook_point(self) -> str:
        return self.subspace.hook_point

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.subspace.coordinates(activation), activation.pow(2).sum(-1, keepdim=True)], dim=-1)


@register_term("drift_penalty")
@dataclass(frozen=True, eq=False, kw_only=True)
class DriftPenalty(LossTerm):
    """Holds the activation near the reference's: λ ‖P (h_θ − h_0)‖² / ‖h_0‖² per token, on the whole stream or in a subspace.

    This is feature distillation in the residual stream. The division makes layers of different norm weigh alike.

    Args:
        hook_point (`str`, *optional*): where, for the whole stream.
        subspace (`Subspace`, *optional*): P is the projection on it; in a recipe, `cards`. GRPO and RLOO need one: their
            reference pass comes before batches are shuffled, and only scores travel with the batch.
        weight (`float`), schedule (`Schedule`), name (`str`): as for every term.

    Raises:
        `ValueError`: both or neither of `hook_point` and `subspace`, a value of the wrong type, or a negative weight.

    Example:
        >>> from interp_rlhf import DriftPenalty, attach
        >>> attachment = attach(dpo_trainer, regularizers=[DriftPenalty(hook_point="model.layers.1", weight=0.1)])
        >>> attachment.terms.terms[0].name
        'drift_model_layers_1'
    """

    hook_point: str | None = None
    subspace: Subspace | None = None

    def prepare(self) -> None:
        if (self.hook_point is None) == (self.subspace is None):
            raise ValueError(
                f"`DriftPenalty` was given `hook_point={self.hook_point!r}` and "
                f"{'a' if self.subspace is not None else 'no'} `subspace` – expected just one: a subspace knows its hook point."
            )

    @property
    def default_name(self) -> str:
        return f"drift_{self.policy_point.replace('.', '_')}"

    @property
    def policy_point(self) -> str:
        point = self.hook_point if self.subspace is None else self.subspace.hook_point
        assert point is not None
        return point

    @cached_property
    def _compared(self) -> TokenReadout:
        """The readout on the reference."""
        return Whole(self.policy_point) if self.subspace is None else Projection(self.name, self.subspace)

    @property
    def reference_readouts(self) -> Sequence[TokenReadout]:
        return [self._compared]

    @property
    def claims(self) -> Sequence[Readout]:
        return list(self.subspace.sources) if self.subspace is not None else []

    def pushes(self) -> dict[Readout, int]:
        return {}

    @classmethod
    def from_options(cls, options: dict[str, Any], files: CardFiles) -> Self:
        options = dict(options)
        if "cards" in options:
            options["subspace"] = files.subspace(options.pop("cards"))
        return super().from_options(options, files)

    def refuse(self, context: TermContext) -> None:
        name = f"`{self.name}`"
        if self.subspace is not None:
            self.subspace.check_model(context.trainer.model)
        elif context.has_rollouts:
            raise ValueError(
                f"{name} compares the whole stream – expected a `subspace` in a `{type(context.trainer).__name__}`: its "
                "reference pass comes before batches are shuffled, and only scores travel with the batch. Pass "
                "`subspace=Subspace.from_readouts([…])` or `from_pca`."
            )
        elif context.has_precomputed_reference:
            raise ValueError(
                f"`precompute_ref_log_probs` is True and {name} compares the whole stream – expected a `subspace`: the "
                "reference's scores are computed once and kept, and whole activations would not fit. Pass a `subspace`, or set "
                "`precompute_ref_log_probs=False`."
            )

    def compute(self, batch: TermBatch, weight: float) -> TermValues:
        tokens = batch.tokens(self.include_end_of_turn)
        now = batch.policy(self.policy_point, tokens)  # (N, D)
        start = batch.reference(self._compared, tokens)
        if self.subspace is None:
            square, norm = (now - start).pow(2).sum(-1), start.pow(2).sum(-1)
        else:
            square = (self.subspace.coordinates(now) - start[:, :-1]).pow(2).sum(-1)
            norm = start[:, -1]
        values = tokens.means(square / norm.clamp(min=torch.finfo(norm.dtype).tiny))
        return TermValues(weight * values, {"relative_square": values})
