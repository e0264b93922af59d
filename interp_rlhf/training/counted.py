"""Which tokens of a training batch count, and to which sequence each belongs.

In: a batch as a trainer feeds it: padded on either side, or packed. Out: `Counted`, through which every term reduces: the mean
over sequences of the mean over that sequence's counted tokens. One path for all trainers, so that padding, packing,
accumulation and ranks cannot move a term.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Counted:
    """Counted tokens of a batch, N of them in M sequences.

    Attributes:
        mask (`torch.BoolTensor` of shape (B, T)): True on them.
        sequence (`torch.LongTensor` of shape (N,)): which sequence each belongs to, 0 to M − 1, in order of the batch.
        sequences (`int`): M. A row of the batch is one sequence, unless it is packed.
    """

    mask: torch.Tensor
    sequence: torch.Tensor
    sequences: int

    @property
    def counts(self) -> torch.Tensor:
        """How many tokens of each sequence count, (M,)."""
        return torch.bincount(self.sequence, minlength=self.sequences)

    def means(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over each sequence's counted tokens, (M, ...), of values (N, ...); 0 where none counts."""
        sums = values.new_zeros((self.sequences, *values.shape[1:])).index_add(0, self.sequence, values)
        return sums / self.counts.clamp(min=1).view(-1, *[1] * (values.dim() - 1))

    def rows(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (N, K) laid out as one row per sequence, (M, L, K), and the mask (M, L) of those that are there."""
        counts = self.counts
        longest = int(counts.max()) if self.sequences else 0
        mask = torch.arange(longest, device=values.device) < counts[:, None]
        return values.new_zeros((*mask.shape, *values.shape[1:])).masked_scatter(
            mask.view(*mask.shape, *[1] * (values.dim() - 1)).expand(*mask.shape, *values.shape[1:]), values
        ), mask

    @property
    def any(self) -> torch.Tensor:
        """Which sequences have a counted token, (M,)."""
        return self.counts > 0


def input_ids(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Ids (B, T) that the policy's training pass runs over."""
    if "prompt_ids" in inputs:  # GRPO and RLOO
        return torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    ids: torch.Tensor = inputs["input_ids"]
    return ids


def counted(inputs: Mapping[str, Any], leave_out: Collection[int] = ()) -> Counted:
    """Counted tokens of a batch: those that the trainer's own loss counts.

    Args:
        inputs (`dict`): what `compute_loss` gets.
        leave_out (`set[int]`): ids of tokens that do not count, such as end-of-turn tokens.
    """
    ids = input_ids(inputs)
    # Packed or padding-free batches are one long row, and come with positions instead of an attention mask.
    position_ids = inputs.get("position_ids") if "attention_mask" not in inputs else None
    if "prompt_ids" in inputs:
        completion = inputs["completion_mask"].bool()
        if inputs.get("tool_mask") is not None:
            completion = completion & inputs["tool_mask"].bool()
        mask = torch.cat([torch.zeros_like(inputs["prompt_ids"], dtype=torch.bool), completion], dim=1)
    elif "labels" in inputs:
        # A label at t is scored at position t − 1, so the first token of a sequence is never counted.
        mask = inputs["labels"] != -100
        mask[:, 0] = False
        if position_ids is not None:
            mask &= position_ids != 0
    else:
        mask = inputs["completion_mask"].bool()
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    sequences = len(ids)
    if position_ids is not None:
        # A sequence begins where positions start anew. Padding at the end does so too, hence only those are sequences
        # that have a counted token.
        starts = (position_ids == 0).flatten().cumsum(0).view_as(ids)
        present = starts[mask].unique()
        rows = torch.searchsorted(present, starts)
        sequences = len(present)
    if leave_out:
        mask = mask & ~torch.isin(ids, torch.tensor(sorted(leave_out), device=ids.device))
    return Counted(mask, rows[mask], sequences)
