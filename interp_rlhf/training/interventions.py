"""Interventions: they change the policy's activation in its training forward only.

In: a subspace or a direction. Out: the change of an activation. They must not know when they are open: `terms.loss` opens them
around the trainer's loss, never for the reference, for evaluation or for generation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .from_mapping import check_options, from_fields

if TYPE_CHECKING:
    from typing import Self

    from ..concepts.readout import Readout
    from ..concepts.subspace import Subspace
    from .make import CardFiles

TRAINERS = ("DPO", "KTO", "SFT")


@dataclass(frozen=True, eq=False, kw_only=True)
class ConceptAblation:
    """Removes a concept from the residual stream during training, so that the model learns without it: h − Qᵀ Q h.

    The gradient is projected too, so lower layers do not learn through the subspace. Inference does not change.

    Source: concept ablation fine-tuning, CAFT (arXiv 2507.16795). Deviations:
    1. One hook point per intervention; attach several for several layers.
    2. KTO estimates its KL with a pass of the policy. That pass runs on the changed model too.

    Args:
        subspace (`Subspace`): the subspace to remove; see `Subspace.from_readouts`, `spanned_by` and `from_pca`. In a recipe,
            `cards`.
        random_direction (`int`, *optional*): seed of the control: a random subspace of the same rank, orthogonal to `subspace`,
            replaces it.

    Raises:
        `ValueError`: a value of the wrong type.

    Example:
        >>> from interp_rlhf import ConceptAblation, Subspace, attach
        >>> ablation = ConceptAblation(subspace=Subspace.from_readouts([readout]))
        >>> attachment = attach(sft_trainer, interventions=[ablation])
        >>> ablation.hook_point
        'model.layers.1'
    """

    subspace: Subspace
    random_direction: int | None = None

    def __post_init__(self) -> None:
        check_options(self)
        if self.random_direction is not None:
            object.__setattr__(self, "subspace", self.subspace.random(self.random_direction))

    @property
    def hook_point(self) -> str:
        return self.subspace.hook_point

    @property
    def claims(self) -> list[Readout]:
        """Readouts that were fitted on one model: `attach` checks that the reference is that model."""
        return list(self.subspace.sources)

    def check_model(self, model: Any) -> None:
        """Raises `ValueError` if the subspace was made on another model."""
        self.subspace.check_model(model)

    @classmethod
    def from_options(cls, options: dict[str, Any], files: CardFiles) -> Self:
        """The intervention that a recipe's mapping means; `cards` become the subspace."""
        options = dict(options)
        if "cards" in options:
            options["subspace"] = files.subspace(options.pop("cards"))
        return from_fields(cls, options, "intervention", "concept_ablation")

    def change(self, activation: torch.Tensor) -> torch.Tensor:
        return self.subspace.ablate(activation)


@dataclass(frozen=True, eq=False, kw_only=True)
class PreventativeSteering:
    """Adds a concept while the model learns, so that the model need not learn it: h + α v.

    Source: persona vectors (arXiv 2507.21509). Deviations:
    1. v is the readout's direction at unit length; for latents, their decoder direction. α is the length of the step, in the
       units of the activation.
    2. KTO estimates its KL with a pass of the policy. That pass runs on the changed model too.

    Args:
        readout (`Readout`): the concept; in a recipe, a `card`.
        alpha (`float`): α; a negative one steers away.
        random_direction (`int`, *optional*): seed of the control: a random v replaces the readout's direction.

    Raises:
        `ValueError`: a value of the wrong type, or a step that is not finite or has no direction.

    Example:
        >>> from interp_rlhf import PreventativeSteering, attach
        >>> attachment = attach(sft_trainer, interventions=[PreventativeSteering(readout=readout, alpha=2.0)])
    """

    readout: Readout
    alpha: float
    random_direction: int | None = None

    def __post_init__(self) -> None:
        check_options(self)
        weight = self.readout.direction
        if self.random_direction is not None:
            weight = torch.randn(weight.shape, generator=torch.Generator().manual_seed(self.random_direction))
        if not torch.isfinite(weight).all() or weight.norm() == 0 or not math.isfinite(self.alpha):
            raise ValueError(
                f"`PreventativeSteering` on `{self.readout.name}` has a direction of norm {float(weight.norm())} and `alpha` "
                f"{self.alpha} – expected finite numbers and a direction that is not 0."
            )
        object.__setattr__(self, "_step", self.alpha * weight / weight.norm())

    @property
    def hook_point(self) -> str:
        return self.readout.hook_point

    @property
    def claims(self) -> list[Readout]:
        """Readouts that were fitted on one model: `attach` checks that the reference is that model."""
        return [self.readout]

    def check_model(self, model: Any) -> None:
        """Does nothing: `attach` checks the readout as a claim."""

    @classmethod
    def from_options(cls, options: dict[str, Any], files: CardFiles) -> Self:
        """The intervention that a recipe's mapping means; a `card` becomes the readout."""
        options = dict(options)
        if "card" in options:
            options["readout"] = files.readout(options.pop("card"))
        return from_fields(cls, options, "intervention", "preventative_steering")

    def change(self, activation: torch.Tensor) -> torch.Tensor:
        step: torch.Tensor = self._step  # type: ignore[attr-defined]
        return activation + step.to(activation)


TrainingIntervention = ConceptAblation | PreventativeSteering
INTERVENTIONS: dict[str, type[TrainingIntervention]] = {
    "concept_ablation": ConceptAblation,
    "preventative_steering": PreventativeSteering,
}
