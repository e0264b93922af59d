"""The interface of terms: readouts, values for the loss, pushed readouts, refusals, and options in a recipe.

In: activations of the counted tokens with their graph, and the reference's scores of the same tokens. Out: values per sequence
or per pair, already weighted, with the metrics that explain them. It must not know how a trainer cuts its batches: `loss`
reduces the values.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ..from_mapping import check_options, from_fields
from ..schedule import Schedule
from ..trl import ROLLOUT_KINDS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self, TypeGuard

    import torch

    from ...activations.tap import TokenReadout
    from ...concepts.readout import Readout
    from ..make import CardFiles
    from .batch import TermBatch
    from .pairs import PairLoss


class TermValues(NamedTuple):
    """Result of a term on a batch of U sequences or pairs.

    Attributes:
        values (`torch.Tensor` of shape (U,), *optional*): values with their graph. Their mean is added to the loss. None if the
            term adds nothing itself.
        metrics (`dict[str, torch.Tensor]`): one number per sequence or pair, by name.
    """

    values: torch.Tensor | None
    metrics: dict[str, torch.Tensor]


@dataclass(frozen=True)
class TermContext:
    """The trainer and the monitors that a term is used with.

    Attributes:
        trainer (`Trainer`): a built trainer of TRL.
        kind (`str`): `DPO`, `KTO`, `SFT`, `GRPO` or `RLOO`.
        monitors (`Sequence[Readout]`): the monitors of the same call of `attach`.
    """

    trainer: Any
    kind: str
    monitors: Sequence[Readout] = ()

    @property
    def has_rollouts(self) -> bool:
        """True if the trainer generates what it trains on."""
        return self.kind in ROLLOUT_KINDS

    @property
    def has_precomputed_reference(self) -> bool:
        """True if the trainer computes its reference's log-probs once, before training."""
        return self.kind in ("DPO", "KTO") and bool(self.trainer.precompute_ref_logps)


@dataclass(frozen=True, eq=False, kw_only=True)
class Term(ABC):
    """Base class of all terms. Subclass `LossTerm` or `MarginShift`, and register the class with `register_term`.

    Attributes:
        weight (`float`): λ. At 0 a run is bit for bit that of plain TRL.
        schedule (`Schedule`): change of λ over the run; constant by default.
        name (`str`): metrics are logged under `interp/<name>/`. By default it is made of the kind and the concept.
    """

    weight: float
    schedule: Schedule = field(default_factory=Schedule)
    name: str = ""

    # The name in recipes; `register_term` sets it.
    kind: ClassVar[str] = ""
    # Trainers that the term works in.
    trainers: ClassVar[tuple[str, ...]] = ("DPO", "GRPO", "KTO", "RLOO", "SFT")
    # True if values are per pair of a preference trainer, not per sequence.
    per_pair: ClassVar[bool] = False
    # True if a negative λ is allowed.
    allows_negative_weight: ClassVar[bool] = False
    # True if a card needs evidence that passes the gate, because the policy learns from the score.
    needs_evidence: ClassVar[bool] = False
    # True if a monitor with another artifact must watch the pushed readout.
    needs_holdout: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)
        which = type(self).__name__
        if not math.isfinite(self.weight):
            raise ValueError(f"`weight` of a `{which}` is {self.weight!r} – expected a finite number.")
        if self.weight < 0 and not self.allows_negative_weight:
            raise ValueError(
                f"`weight` of a `{which}` is {self.weight} – expected 0 or more: a negative weight would reward what the term "
                "is there to prevent."
            )
        self.prepare()
        if not self.name:
            self.complete("name", self.default_name)

    def complete(self, name: str, value: Any) -> None:
        """Set a field during construction (in `prepare`). Afterwards terms are frozen."""
        object.__setattr__(self, name, value)

    def prepare(self) -> None:  # noqa: B027, most terms have nothing to do
        """Check and complete the fields of a new term.

        Raises:
            `ValueError`: a field has a value that the term cannot use.
        """

    @property
    def default_name(self) -> str:
        """Name of a term whose `name` is empty."""
        return self.kind or type(self).__name__

    @property
    @abstractmethod
    def policy_point(self) -> str | None:
        """Hook point whose activation the term needs from the policy's training pass; None if it needs none."""

    @property
    def reference_readouts(self) -> Sequence[TokenReadout]:
        """Readouts that the term needs on the frozen reference."""
        return []

    @property
    def claims(self) -> Sequence[Readout]:
        """Readouts that were fitted on one model: `attach` checks that the reference is that model."""
        return []

    @property
    def include_end_of_turn(self) -> bool:
        """True if the end-of-turn tokens that close an answer count."""
        return True

    @abstractmethod
    def pushes(self) -> dict[Readout, int]:
        """Readouts that training with this term pushes: +1 up, −1 down. Empty for a term that only holds or measures.

        The drift verdict needs them: a pushed readout that moves alone is a sign of obfuscated activations.
        """

    def refuse(self, context: TermContext) -> None:  # noqa: B027, most terms work wherever their trainer does
        """Refuse a trainer in which this term would be wrong or have no effect.

        Raises:
            `ValueError`: the term does not work in this trainer. The message says what to do.
        """

    @classmethod
    def from_options(cls, options: dict[str, Any], files: CardFiles) -> Self:
        """Create the term from a recipe's mapping.

        Args:
            options (`dict`): the mapping without `kind`; a `card` becomes the field `readout`.
            files (`CardFiles`): loads cards and autoencoders.

        Raises:
            `ValueError`: an option is unknown or missing, or the card is not allowed for this use.
        """
        options = dict(options)
        if "card" in options and any(field.name == "readout" for field in fields(cls)):
            options["readout"] = files.readout(options.pop("card"), cls.needs_evidence)
        if "schedule" in options:
            options["schedule"] = Schedule.from_option(options["schedule"])
        return from_fields(cls, options, "regularizer", cls.kind)

    @abstractmethod
    def evaluate(self, batch: TermBatch, weight: float) -> TermValues:
        """Values and metrics of a batch at the current weight."""

    @abstractmethod
    def shift_reference(
        self, log_probs: torch.Tensor, batch: TermBatch, loss: PairLoss, weight: float
    ) -> torch.Tensor:
        """The reference's log-probs (2P,) of a batch of pairs for the trainer's loss, with this term's shift."""


def is_term(asked: Any) -> TypeGuard[Term]:
    """True if an object is a term."""
    return isinstance(asked, Term)


@dataclass(frozen=True, eq=False, kw_only=True)
class LossTerm(Term):
    """A term that adds its values to the loss."""

    @abstractmethod
    def compute(self, batch: TermBatch, weight: float) -> TermValues:
        """Values on a batch, already multiplied by the current weight.

        Args:
            batch (`TermBatch`): the batch.
            weight (`float`): λ times the schedule's factor.

        Returns:
            `TermValues`: one value per sequence, or per pair if `per_pair` is True.
        """

    def evaluate(self, batch: TermBatch, weight: float) -> TermValues:
        return self.compute(batch, weight)

    def shift_reference(
        self, log_probs: torch.Tensor, batch: TermBatch, loss: PairLoss, weight: float
    ) -> torch.Tensor:
        return log_probs


@dataclass(frozen=True, eq=False, kw_only=True)
class MarginShift(Term):
    """A term that lowers the reference's log-probs inside a preference trainer's own loss, and adds nothing itself."""

    trainers: ClassVar[tuple[str, ...]] = ("DPO",)
    per_pair: ClassVar[bool] = True

    @abstractmethod
    def scores(self, batch: TermBatch) -> torch.Tensor:
        """Scores (2P,) from which the shift is computed, chosen completions first."""

    @abstractmethod
    def shift(self, scores: torch.Tensor, loss: PairLoss, weight: float) -> torch.Tensor:
        """Amounts (2P,) by which the reference's log-probs are lowered."""

    def evaluate(self, batch: TermBatch, weight: float) -> TermValues:
        """The scores, and DPO's rewards without any shift."""
        assert batch.pairs is not None
        rewards = batch.pairs.beta * (batch.pairs.log_probs.detach() - batch.pairs.unshifted_reference)
        metrics: dict[str, torch.Tensor] = {}
        for what, values in {"score": self.scores(batch), "rewards": rewards}.items():
            chosen, rejected = values.chunk(2)
            metrics |= {f"{what}/chosen": chosen, f"{what}/rejected": rejected, f"{what}/margins": chosen - rejected}
        metrics["rewards/accuracies"] = (metrics["rewards/margins"] > 0).float()
        return TermValues(None, metrics)

    def shift_reference(
        self, log_probs: torch.Tensor, batch: TermBatch, loss: PairLoss, weight: float
    ) -> torch.Tensor:
        return log_probs - self.shift(self.scores(batch), loss, weight)


@dataclass(frozen=True, eq=False, kw_only=True)
class OneConcept:
    """Mix-in for a term on one readout. Put it before `LossTerm` or `MarginShift` in the bases.

    Attributes:
        readout (`Readout`): the concept; in a recipe, a `card`.
    """

    readout: Readout
    kind: ClassVar[str] = ""

    @property
    def default_name(self) -> str:
        return f"{self.kind or type(self).__name__}_{self.readout.name}"

    @property
    def policy_point(self) -> str | None:
        return self.readout.hook_point

    @property
    def claims(self) -> Sequence[Readout]:
        return [self.readout]

    @property
    def include_end_of_turn(self) -> bool:
        return bool(self.readout.include_end_of_turn)
