"""Counts the sequences of an optimizer step, so that accumulation, ranks and padding do not change a term's mean.

In: the batches of an optimizer step, or a rollout batch. Out: the factor of a micro-batch's sum. It must not know terms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from ...activations.counted import counted
from ...activations.ranks import sum_of_all_ranks
from ..trl import loss_spans_the_step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...activations.chat_marks import ChatMarks

# Key prefix in a rollout batch. Each row holds: rows of all ranks, divided by the rows of all ranks that have a counted token.
SHARE_KEY = "interp_share/"


class SequenceCounts(ABC):
    """Counts the sequences of an optimizer step that have a counted token.

    Args:
        trainer (`Trainer`): a built trainer of TRL.
        marks (`ChatMarks`): the tokens that its chat template writes around turns.
        flags (`Sequence[bool]`): distinct values of the terms' `include_end_of_turn`, sorted.
    """

    def __init__(self, trainer: Any, marks: ChatMarks, flags: Sequence[bool]):
        self.trainer, self._marks, self._flags = trainer, marks, flags

    def window(self, batches: Sequence[Mapping[str, Any]]) -> None:  # noqa: B027, rollouts need no window
        """Take the micro-batches of the next optimizer step on this rank."""

    def shares(self, output: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Values that travel with a rollout batch, by key."""
        return {}

    @abstractmethod
    def of_step(self, inputs: Mapping[str, Any], flag: bool, rows: int) -> float:
        """Number of counted sequences in the whole step, on all ranks.

        Args:
            inputs (`dict`): one micro-batch.
            flag (`bool`): a term's `include_end_of_turn`.
            rows (`int`): rows of the micro-batch.
        """

    def factor(
        self, inputs: Mapping[str, Any], num_items: Any, flag: bool, per_pair: bool, counts: torch.Tensor
    ) -> float:
        """Factor of a micro-batch's sum.

        With this factor, the sums of all micro-batches and ranks add up to the mean over the step's counted sequences. A term per
        pair corrects the trainer's own loss, so it is weighted like that loss: by the mean of the micro-batch.

        Args:
            inputs (`dict`): the micro-batch.
            num_items: the trainer's argument to `compute_loss`.
            flag (`bool`): the term's `include_end_of_turn`.
            per_pair (`bool`): the term's `per_pair`.
            counts (`torch.BoolTensor` of shape (U,)): True for sequences or pairs that count.
        """
        trainer = self.trainer
        if not trainer.model.training or per_pair:
            return 1 / max(int(counts.sum()), 1)
        steps, ranks = trainer.current_gradient_accumulation_steps, trainer.accelerator.num_processes
        everywhere = self.of_step(inputs, flag, len(counts))
        scaled = loss_spans_the_step(trainer, num_items)
        # Engines average gradients over ranks. The trainer divides by the accumulation unless the loss already did.
        return ranks * (1 if scaled else steps) / everywhere if everywhere else 0.0

    def _everywhere(self, counts: Sequence[int], device: Any) -> list[int]:
        """Sums over all ranks."""
        return list(sum_of_all_ranks(torch.tensor(counts, device=device), self.trainer.accelerator).tolist())


class WindowCounts(SequenceCounts):
    """Counts over the micro-batches of a step, before the first micro-batch."""

    def __init__(self, trainer: Any, marks: ChatMarks, flags: Sequence[bool]):
        super().__init__(trainer, marks, flags)
        self._units: dict[bool, int] = {}

    def window(self, batches: Sequence[Mapping[str, Any]]) -> None:
        if not self._flags:
            return
        units = [sum(int(counted(batch, self._marks, flag).any.sum()) for batch in batches) for flag in self._flags]
        self._units = dict(zip(self._flags, self._everywhere(units, self.trainer.accelerator.device), strict=True))

    def of_step(self, inputs: Mapping[str, Any], flag: bool, rows: int) -> float:
        assert flag in self._units, "`get_batch_samples` comes before `compute_loss`"
        return self._units[flag]


class RolloutCounts(SequenceCounts):
    """Counts over a rollout batch. The result travels with each row, because the trainer shuffles and splits the rows."""

    def shares(self, output: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        rows, device = len(output["completion_ids"]), output["completion_ids"].device
        counts = [rows, *(int(counted(output, self._marks, flag).any.sum()) for flag in self._flags)]
        counts = self._everywhere(counts, device)
        return {
            f"{SHARE_KEY}{int(flag)}": torch.full((rows,), counts[0] / max(count, 1), device=device)
            for flag, count in zip(self._flags, counts[1:], strict=True)
        }

    def of_step(self, inputs: Mapping[str, Any], flag: bool, rows: int) -> float:
        steps, ranks = self.trainer.current_gradient_accumulation_steps, self.trainer.accelerator.num_processes
        return rows * steps * ranks / float(inputs[f"{SHARE_KEY}{int(flag)}"][0])
