"""Subclasses of TRL's trainers that take the keywords of `attach`.

In: a trainer's own arguments, and those of `attach` by keyword. Out: a trainer that is attached already. It must not know more:
the subclasses only call `attach`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer, SFTTrainer

from . import attach
from .training.mixin import LossMixin, RolloutMixin
from .training.ppo.trainer import PPOTrainer

if TYPE_CHECKING:
    from .attachment import Attachment

ATTACH_KEYWORDS = (
    "regularizers", "interventions", "monitors", "measures", "drift", "reference", "run_log", "arm", "samples_every",
)  # fmt: skip


class _Attached:
    """Takes the keywords of `attach`, passes the others to the trainer, and attaches.

    Attributes:
        attachment (`Attachment`): what `attach` returned.
    """

    attachment: Attachment

    def __init__(self, *args: Any, **kwargs: Any):
        ours = {name: kwargs.pop(name) for name in ATTACH_KEYWORDS if name in kwargs}
        super().__init__(*args, **kwargs)
        self.attachment = attach(self, **ours)


class InterpDPOTrainer(_Attached, LossMixin, DPOTrainer):
    """`DPOTrainer` that also takes the keywords of `attach`: terms, interventions and monitors in the
    loss of preference pairs.

    Args:
        *args, **kwargs: those of `DPOTrainer`, and those of `attach` after `trainer`.

    Raises:
        `ValueError`: see `attach`.

    Attributes:
        attachment (`Attachment`): what `attach` returned.

    Example:
        >>> from datasets import Dataset
        >>> from interp_rlhf import InterpDPOTrainer
        >>> from trl import DPOConfig
        >>> rows = Dataset.from_list([{"prompt": "how are you", "chosen": " warm and kind", "rejected": " cold"}] * 4)
        >>> config = DPOConfig(output_dir="runs", use_cpu=True, bf16=False, report_to="none")
        >>> trainer = InterpDPOTrainer(
        ...     model="tiny", args=config, train_dataset=rows, processing_class=tokenizer,
        ...     regularizers=["warmth.yaml"],
        ... )
        >>> [term.name for term in trainer.attachment.terms.terms]
        ['anchor_warmth']
    """


class InterpKTOTrainer(_Attached, LossMixin, KTOTrainer):
    """`KTOTrainer` that also takes the keywords of `attach`: terms, interventions and monitors in the
    loss of single judged completions.

    Args:
        *args, **kwargs: those of `KTOTrainer`, and those of `attach` after `trainer`.

    Raises:
        `ValueError`: see `attach`.

    Attributes:
        attachment (`Attachment`): what `attach` returned.

    Example:
        >>> from datasets import Dataset
        >>> from interp_rlhf import InterpKTOTrainer
        >>> from trl import KTOConfig
        >>> rows = Dataset.from_list([{"prompt": "how are you", "completion": " warm and kind", "label": True}] * 4)
        >>> config = KTOConfig(output_dir="runs", use_cpu=True, bf16=False, report_to="none")
        >>> trainer = InterpKTOTrainer(
        ...     model="tiny", args=config, train_dataset=rows, processing_class=tokenizer,
        ...     regularizers=["warmth.yaml"],
        ... )
        >>> [term.name for term in trainer.attachment.terms.terms]
        ['anchor_warmth']
    """


class InterpSFTTrainer(_Attached, LossMixin, SFTTrainer):
    """`SFTTrainer` that also takes the keywords of `attach`: terms, interventions and monitors in the
    loss of supervised fine-tuning.

    Args:
        *args, **kwargs: those of `SFTTrainer`, and those of `attach` after `trainer`.

    Raises:
        `ValueError`: see `attach`.

    Attributes:
        attachment (`Attachment`): what `attach` returned.

    Example:
        >>> from datasets import Dataset
        >>> from interp_rlhf import InterpSFTTrainer
        >>> from trl import SFTConfig
        >>> rows = Dataset.from_list([{"prompt": "how are you", "completion": " warm and kind"}] * 4)
        >>> config = SFTConfig(output_dir="runs", use_cpu=True, bf16=False, report_to="none")
        >>> trainer = InterpSFTTrainer(
        ...     model="tiny", args=config, train_dataset=rows, processing_class=tokenizer,
        ...     regularizers=["warmth.yaml"],
        ... )
        >>> [term.name for term in trainer.attachment.terms.terms]
        ['anchor_warmth']
    """


class InterpGRPOTrainer(_Attached, RolloutMixin, GRPOTrainer):
    """`GRPOTrainer` that also takes the keywords of `attach`: concept rewards, terms and monitors on
    its rollouts.

    Args:
        *args, **kwargs: those of `GRPOTrainer`, and those of `attach` after `trainer`.

    Raises:
        `ValueError`: see `attach`.

    Attributes:
        attachment (`Attachment`): what `attach` returned.

    Example:
        >>> from datasets import Dataset
        >>> from interp_rlhf import ConceptReward, InterpGRPOTrainer
        >>> from trl import GRPOConfig
        >>> rows = Dataset.from_list([{"prompt": "how are you"}] * 4)
        >>> config = GRPOConfig(output_dir="runs", use_cpu=True, bf16=False, report_to="none")
        >>> trainer = InterpGRPOTrainer(
        ...     model="tiny", args=config, train_dataset=rows, processing_class=tokenizer,
        ...     reward_funcs=[ConceptReward.from_card("warmth.yaml")],
        ...     monitors=["witness.yaml"],
        ... )
        >>> trainer.attachment.rollout is not None
        True
    """


class InterpPPOTrainer(_Attached, PPOTrainer):
    """`PPOTrainer` that also takes the keywords of `attach`: concept rewards (also per token), terms and
    monitors on its rollouts.

    Args:
        *args, **kwargs: those of `PPOTrainer`, and those of `attach` after `trainer`.

    Raises:
        `ValueError`: see `attach`.

    Attributes:
        attachment (`Attachment`): what `attach` returned.

    Example:
        >>> from datasets import Dataset
        >>> from interp_rlhf import ConceptReward, InterpPPOTrainer, PPOConfig
        >>> rows = Dataset.from_list([{"prompt": "how are you"}] * 8)
        >>> config = PPOConfig(output_dir="runs", use_cpu=True, bf16=False, report_to="none")
        >>> trainer = InterpPPOTrainer(
        ...     model="tiny", args=config, train_dataset=rows, processing_class=tokenizer,
        ...     reward_funcs=[ConceptReward.from_card("warmth.yaml")],
        ...     monitors=["witness.yaml"],
        ... )
        >>> trainer.attachment.rollout is not None
        True
    """


class InterpRLOOTrainer(_Attached, RolloutMixin, RLOOTrainer):
    """`RLOOTrainer` that also takes the keywords of `attach`: concept rewards, terms and monitors on
    its rollouts.

    Args:
        *args, **kwargs: those of `RLOOTrainer`, and those of `attach` after `trainer`.

    Raises:
        `ValueError`: see `attach`.

    Attributes:
        attachment (`Attachment`): what `attach` returned.

    Example:
        >>> from datasets import Dataset
        >>> from interp_rlhf import ConceptReward, InterpRLOOTrainer
        >>> from trl import RLOOConfig
        >>> rows = Dataset.from_list([{"prompt": "how are you"}] * 4)
        >>> config = RLOOConfig(output_dir="runs", use_cpu=True, bf16=False, report_to="none")
        >>> trainer = InterpRLOOTrainer(
        ...     model="tiny", args=config, train_dataset=rows, processing_class=tokenizer,
        ...     reward_funcs=[ConceptReward.from_card("warmth.yaml")],
        ...     monitors=["witness.yaml"],
        ... )
        >>> trainer.attachment.rollout is not None
        True
    """
