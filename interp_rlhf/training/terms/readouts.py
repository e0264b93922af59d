"""Readouts that only terms need: the whole activation, and a readout under a second name.

In: an activation. Out: the values that a tap keeps. They must not know which model the activation comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ...activations.tap import TokenReadout


@dataclass(frozen=True)
class Whole:
    """Readout that keeps the whole activation, for terms that compare all of it."""

    hook_point: str

    @property
    def name(self) -> str:
        return f"activation@{self.hook_point}"

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        return activation


@dataclass(frozen=True, eq=False)
class Keyed:
    """A readout under a unique name: two terms may read the same concept."""

    name: str
    readout: TokenReadout

    @property
    def hook_point(self) -> str:
        return self.readout.hook_point

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        return self.readout(activation)
