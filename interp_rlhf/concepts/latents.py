"""Latents with given weights: the encoder of a sparse autoencoder as a readout.

In: an activation (..., D). Out: latents (..., S). Only an elementwise activation function is known here, so that a choice of
latents is exact: rows of the encoder that nobody reads are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, eq=False)
class Latents:
    """ReLU or JumpReLU latents: f(E (h − center) + bias).

    Attributes:
        name (`str`): scores and metrics are kept by it.
        hook_point (`str`): where it reads.
        encoder (`torch.FloatTensor` of shape (S, D)): one row per latent.
        bias (`torch.FloatTensor` of shape (S,)).
        center (`torch.FloatTensor` of shape (D,), *optional*): subtracted from the activation first.
        threshold (`torch.FloatTensor` of shape (S,), *optional*): a latent at or below it is 0 (JumpReLU, arXiv 2407.14435);
            ReLU without it.
    """

    name: str
    hook_point: str
    encoder: torch.Tensor
    bias: torch.Tensor
    center: torch.Tensor | None = None
    threshold: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.encoder.dim() != 2:
            raise ValueError(f"`encoder` of `{self.name}` has shape {tuple(self.encoder.shape)} – expected (S, D).")
        count, width = self.encoder.shape
        for field, size in {"bias": count, "center": width, "threshold": count}.items():
            tensor = getattr(self, field)
            if tensor is not None and tuple(tensor.shape) != (size,):
                raise ValueError(f"`{field}` of `{self.name}` has shape {tuple(tensor.shape)} – expected ({size},).")
        for field in ("encoder", "bias", "center", "threshold"):
            tensor = getattr(self, field)
            if tensor is not None:  # a readout never gets a gradient
                object.__setattr__(self, field, tensor.detach().float())

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        """Latents (..., S) of an activation (..., D), float32."""
        own = self._on(activation.device)
        assert own.bias is not None
        # The centre is folded into the bias: one matrix product, and no copy of the activation.
        bias = own.bias if own.center is None else own.bias - own.encoder @ own.center
        before = torch.nn.functional.linear(activation, own.encoder, bias)
        if own.threshold is None:
            return before.relu()
        return before * (before > own.threshold)

    def choose(self, indices: Sequence[int]) -> Latents:
        """The same readout of some latents only, in the order given.

        Raises:
            `ValueError`: an index out of range.
        """
        outside = [index for index in indices if not 0 <= index < len(self.encoder)]
        if outside:
            raise ValueError(
                f"Latents {outside} – expected indices from 0 to {len(self.encoder) - 1} of `{self.name}`."
            )
        rows = torch.tensor(list(indices), dtype=torch.long)
        threshold = None if self.threshold is None else self.threshold[rows]
        return replace(self, encoder=self.encoder[rows], bias=self.bias[rows], threshold=threshold)

    def _on(self, device: torch.device) -> Latents:
        if self.encoder.device == device:
            return self
        # Moved once: a frozen readout has no other state.
        for field in ("encoder", "bias", "center", "threshold"):
            tensor = getattr(self, field)
            if tensor is not None:
                object.__setattr__(self, field, tensor.to(device))
        return self
