"""The other door: TRL's trainers as subclasses that take what `attach` takes.

In: a trainer's own arguments and those of `attach`, by keyword. Out: a trainer that is attached already. One mechanism: they
call `attach`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer, SFTTrainer

from .attachment import attach
from .training.mixin import LossMixin, RolloutMixin
from .training.ppo.trainer import PPOTrainer

if TYPE_CHECKING:
    from .attachment import Attachment

ATTACH_KEYWORDS = (
    "regularizers", "interventions", "monitors", "measures", "drift", "reference", "run_log", "arm", "samples_every",
)  # fmt: skip


class _Attached:
    """Takes the keywords of `attach`, passes on the others, and attaches.

    Attributes:
        attachment (`Attachment`): what `attach` returned.
    """

    attachment: Attachment

    def __init__(self, *args: Any, **kwargs: Any):
        ours = {name: kwargs.pop(name) for name in ATTACH_KEYWORDS if name in kwargs}
        super().__init__(*args, **kwargs)
        self.attachment = attach(self, **ours)


class InterpDPOTrainer(_Attached, LossMixin, DPOTrainer):
    """`DPOTrainer` that also takes the keywords of `attach`."""


class InterpKTOTrainer(_Attached, LossMixin, KTOTrainer):
    """`KTOTrainer` that also takes the keywords of `attach`."""


class InterpSFTTrainer(_Attached, LossMixin, SFTTrainer):
    """`SFTTrainer` that also takes the keywords of `attach`."""


class InterpGRPOTrainer(_Attached, RolloutMixin, GRPOTrainer):
    """`GRPOTrainer` that also takes the keywords of `attach`."""


class InterpPPOTrainer(_Attached, PPOTrainer):
    """`PPOTrainer` that also takes the keywords of `attach`."""


class InterpRLOOTrainer(_Attached, RolloutMixin, RLOOTrainer):
    """`RLOOTrainer` that also takes the keywords of `attach`."""
