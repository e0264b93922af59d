"""Interventions: the policy's activation is changed in its training forward, and in no other.

In: a subspace or a direction. Out: the change of an activation. They must not know when they are open: `loss_terms` opens them
around the trainer's loss, never for the reference, for evaluation or for generation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..concepts.card import load_card
from ..concepts.readout import Readout
from ..concepts.subspace import Subspace
from ..messages import as_list
from .from_mapping import check_options, from_mapping

TRAINERS = ("DPO", "KTO", "SFT")


@dataclass(frozen=True, eq=False, kw_only=True)
class ConceptAblation:
    """Takes a concept out of the residual stream while the model learns, so that it learns without it: h − Qᵀ Q h.

    The gradient is projected along with the activation: nothing below learns through the subspace either. At inference nothing is
    changed.

    Source: concept ablation fine-tuning, CAFT (arXiv 2507.16795). Deviations:
    1. One hook point per intervention; attach several for several layers.
    2. KTO's estimate of the KL, a pass of the policy too, is made on the changed model.

    Args:
        subspace (`Subspace`): what is taken out; see `Subspace.from_readouts`, `spanned_by` and `from_pca`.
        random_direction (`int`, *optional*): the control: a seed, from which a random subspace of the same rank is drawn,
            orthogonal to this one, that takes its place.
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
    def readouts(self) -> list[Readout]:
        """Readouts that are claims about one model, checked against it."""
        return list(self.subspace.sources)

    def change(self, activation: torch.Tensor) -> torch.Tensor:
        return self.subspace.ablate(activation)


@dataclass(frozen=True, eq=False, kw_only=True)
class PreventativeSteering:
    """Adds a concept while the model learns, so that it need not learn it: h + α v.

    Source: persona vectors (arXiv 2507.21509). Deviations:
    1. v is the readout's direction (of latents, what they write) at unit length; α is the length of the step, in the
       activation's own units.
    2. KTO's estimate of the KL, a pass of the policy too, is made on the changed model.

    Args:
        readout (`Readout`): the concept.
        alpha (`float`): α; a negative one steers away.
        random_direction (`int`, *optional*): the control: a seed, from which v is drawn.
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
    def readouts(self) -> list[Readout]:
        """Readouts that are claims about one model, checked against it."""
        return [self.readout]

    def change(self, activation: torch.Tensor) -> torch.Tensor:
        step: torch.Tensor = self._step  # type: ignore[attr-defined]
        return activation + step.to(activation)


TrainingIntervention = ConceptAblation | PreventativeSteering
KINDS: dict[str, type] = {"concept_ablation": ConceptAblation, "preventative_steering": PreventativeSteering}


def make_intervention(given: Any) -> TrainingIntervention:
    """Intervention of what a user wrote: an object, or, in a recipe, a mapping with `kind`, `card` or `cards`, and options.

    Raises:
        `ValueError`: an unknown kind or option.
    """
    if isinstance(given, ConceptAblation | PreventativeSteering):
        return given
    made: TrainingIntervention = from_mapping(given, KINDS, "intervention", _load)
    return made


def _load(kind: str, options: dict[str, Any]) -> None:
    if kind == "concept_ablation" and "cards" in options:
        readouts = [Readout.from_card(load_card(card)) for card in as_list(options.pop("cards"))]
        options["subspace"] = Subspace.from_readouts(readouts)
    if kind == "preventative_steering" and "card" in options:
        options["readout"] = Readout.from_card(load_card(options.pop("card")))
