"""Changes of single rows of a batch: steering, and silencing of one coordinate, each row its own.

In: a model, a hook point, one change per row. Out: passes in which every row's activation is changed. It must not know what is
measured, nor why a row is changed.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .hook_points import on_activation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn


@dataclass(frozen=True, eq=False)
class Change:
    """Change of an activation h (D,): h − (⟨h, axis⟩ − level) · axis + step.

    Attributes:
        step (`torch.FloatTensor` of shape (D,)): what is added.
        axis (`torch.FloatTensor` of shape (D,)): unit vector of the coordinate that is set to `level`, or zeros.
        level (`float`): value that the coordinate is set to. 0 projects it out.
    """

    step: torch.Tensor
    axis: torch.Tensor
    level: float = 0.0

    @classmethod
    def steering(cls, step: torch.Tensor) -> Change:
        """Adds a step (D,)."""
        return cls(step, torch.zeros_like(step))

    @classmethod
    def silencing(cls, axis: torch.Tensor, level: float = 0.0) -> Change:
        """Sets the coordinate along a unit vector (D,) to `level`."""
        return cls(torch.zeros_like(axis), axis, level)


@contextmanager
def changed(
    model: nn.Module, hook_point: str, changes: Sequence[Change], attention_mask: torch.Tensor
) -> Iterator[None]:
    """In it, the model's passes run with one change per row, on every token except a row's first.

    A row's first token is often an attention sink: its activation is many times larger, and what changes it changes every token.
    The pass that comes first is the one that `attention_mask` (B, T) belongs to. Later passes are steps of a generation.
    """
    step = torch.stack([change.step for change in changes])[:, None]  # (B, 1, D)
    axis = torch.stack([change.axis for change in changes])[:, None]
    level = torch.tensor([change.level for change in changes])[:, None, None]
    mask = attention_mask.bool().cpu()
    later = mask & (mask.cumsum(1) > 1)
    prefill = [later]

    def see(activation: torch.Tensor) -> torch.Tensor:
        along, move = axis.to(activation), step.to(activation)
        coordinate = (activation * along).sum(-1, keepdim=True)
        new = activation - (coordinate - level.to(activation)) * along + move
        if not prefill:
            return new
        return torch.where(prefill.pop()[..., None].to(activation.device), new, activation)

    handle = on_activation(model, hook_point, see)
    try:
        yield
    finally:
        handle.remove()
