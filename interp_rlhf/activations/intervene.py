"""Interventions: a hook that changes the activation at a hook point in the passes that it is open for.

In: a model, a hook point and a change. Out: the changed activation, seen by everything above, gradient included. It must not
know which trainer runs it, nor when it may be open.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .hook_points import adapters_off, first_adapter_layer, on_activation
from .own_passes import is_reading

if TYPE_CHECKING:
    from torch import nn

Replacement = Callable[[torch.Tensor], torch.Tensor]


class Intervention:
    """Hook that replaces an activation h (B, T, D) by `change(h)` while it is open; never in a reference pass.

    Attributes:
        open (`bool`): False at first.
        fired (`int`): passes that it has changed.
    """

    def __init__(self, model: nn.Module, hook_point: str, change: Replacement):
        self.open = False
        self.fired = 0
        self._change = change
        self._adapter_layer = first_adapter_layer(model)
        self._handle = on_activation(model, hook_point, self._run)

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()

    def _run(self, activation: torch.Tensor) -> torch.Tensor | None:
        if not self.open or is_reading() or adapters_off(self._adapter_layer):
            return None
        self.fired += 1
        return self._change(activation)
