"""Latents of a sparse autoencoder as a readout. Only the latents that are needed are computed where that is possible.

In: an activation (..., D). Out: latents (..., K). If a latent depends on no other (ReLU, JumpReLU, gated), reading K latents
needs K rows of the encoder and is exact. TopK and group-max need all S latents to know which are on. They are computed in
blocks of tokens, so that (B, T, S) is never in memory. It must not know files or the use of its latents.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch.nn.functional import linear

from ..activations.hook_points import hidden_size, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..activations.canaries import Canaries

Normalization = Literal["none", "constant_norm_rescale", "layer_norm"]
# Added to the norm or the standard deviation by sae-lens' normalizations.
EPSILON = 1e-5
# All latents are computed in blocks of tokens: as many tokens as give 16 MiB of pre-activations (tokens, S), and at least as many
# as a matrix product needs to be fast.
BLOCK_NUMBERS, BLOCK_TOKENS = 2**22, 128
# `top` keeps little per block. Larger blocks are faster there, because the encoder is loaded into the cache less often.
WHOLE_BLOCK_TOKENS = 512
# How many numbers are masked at a time, and the minimum of rows. Such a mask stays in the cache and is smaller than all latents.
MASKED_NUMBERS, MASKED_ROWS = 2**16, 64


class LatentSource(Protocol):
    """The part of a sparse autoencoder that a fit on latents needs."""

    def latents(self, indices: int | Sequence[int] | None = None, name: str = "sae") -> Latents:
        """Some of its latents as a readout."""

    def check_model(self, model: Any) -> None:
        """Raises `ValueError` for a model that it was not trained on."""

    def description(self) -> dict[str, Any]:
        """Its description in an artifact: size, architecture, k, grouped, normalization and source, as plain values."""


@dataclass(frozen=True, eq=False)
class Latents:
    """Latents with given weights: f(E (norm(h) − center) + bias).

    Attributes:
        name (`str`): the key of its scores and metrics.
        hook_point (`str`): module path of the activation that it reads.
        encoder (`torch.FloatTensor` of shape (S, D)): one row per latent.
        bias (`torch.FloatTensor` of shape (S,)): bias of the latents. For gated latents, bias of the gate.
        center (`torch.FloatTensor` of shape (D,), *optional*): subtracted from the activation first.
        threshold (`torch.FloatTensor` of shape (S,), *optional*): a latent at or below it is 0 (JumpReLU, arXiv 2407.14435).
            Without a threshold the latents are ReLU.
        gate_scale, gate_bias (`torch.FloatTensor` of shape (S,), *optional*): a latent whose gate E h + bias is positive has the
            magnitude ReLU(gate_scale · E h + gate_bias) (gated, arXiv 2404.16014, where gate_scale is e^r).
        k (`int`, *optional*): only the k largest of all S are on (TopK, arXiv 2406.04093).
        grouped (`bool`, defaults to `False`): instead, the largest of each of k groups of neighbours is on (group-max).
        normalization (`str`, defaults to `"none"`): normalization of the activation, the first step: `constant_norm_rescale` to
            the norm √D, `layer_norm` to mean 0 and standard deviation 1.
        columns (`torch.LongTensor` of shape (K,), *optional*): indices of the latents that are returned, if all S are needed to
            compute them.
        decoder (`torch.FloatTensor` of shape (K, D), *optional*): direction that each returned latent writes. Ablation and
            steering use it.
        claim (`tuple[Canaries, torch.Tensor]`, *optional*): canaries of the model that the autoencoder was trained on, and the
            directions along which the canaries were read.

    Example:
        >>> import torch
        >>> from interp_rlhf import Latents
        >>> latents = Latents("signs", "model.layers.1", torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), torch.zeros(3))
        >>> latents(torch.tensor([2.0, -3.0]))  # ReLU of ⟨encoder row, activation⟩ + bias
        tensor([2., 0., 0.])
        >>> latents.choose([2, 0])(torch.tensor([2.0, -3.0]))
        tensor([0., 2.])
    """

    name: str
    hook_point: str
    encoder: torch.Tensor
    bias: torch.Tensor
    center: torch.Tensor | None = None
    threshold: torch.Tensor | None = None
    gate_scale: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None
    k: int | None = None
    grouped: bool = False
    normalization: Normalization = "none"
    columns: torch.Tensor | None = None
    decoder: torch.Tensor | None = None
    claim: tuple[Canaries, torch.Tensor] | None = None

    def __post_init__(self) -> None:
        self._check_shapes()
        for field in _WEIGHTS:
            tensor = getattr(self, field)
            if tensor is not None:  # a readout never gets a gradient
                object.__setattr__(self, field, tensor.detach().float())
        if self.columns is not None:
            object.__setattr__(self, "columns", self.columns.long())
        if self.threshold is not None:  # ReLU comes first, so a negative threshold acts as 0
            object.__setattr__(self, "threshold", self.threshold.clamp(min=0))
        # The center is folded into the bias: one matrix product, and no copy of the activation.
        shift = 0.0 if self.center is None else self.encoder @ self.center
        object.__setattr__(self, "_offset", self.bias - shift)
        if self.gate_scale is not None and self.gate_bias is not None:
            object.__setattr__(self, "_gate_offset", self.gate_bias - self.gate_scale * shift)

    def _check_shapes(self) -> None:
        """Raises `ValueError` for tensors or options that do not fit together."""
        if self.encoder.dim() != 2 or not len(self.encoder):
            raise ValueError(
                f"`encoder` of `{self.name}` has shape {tuple(self.encoder.shape)} – expected (S, D) with at least one latent."
            )
        count, width = self.encoder.shape
        expected = {"bias": count, "center": width, "threshold": count, "gate_scale": count, "gate_bias": count}
        for field, size in expected.items():
            tensor = getattr(self, field)
            if tensor is not None and tuple(tensor.shape) != (size,):
                raise ValueError(f"`{field}` of `{self.name}` has shape {tuple(tensor.shape)} – expected ({size},).")
        if (self.gate_scale is None) != (self.gate_bias is None):
            raise ValueError(f"`{self.name}` has one of `gate_scale` and `gate_bias` – expected both or neither.")
        if self.k is not None and not 0 < self.k <= count:
            raise ValueError(f"`k` of `{self.name}` is {self.k} – expected 1 to {count}, its number of latents.")
        if self.grouped and (self.k is None or count % self.k):
            raise ValueError(f"`{self.name}` has {count} latents in {self.k} groups – expected groups of equal size.")
        if self.columns is not None and self.k is None:
            raise ValueError(
                f"`columns` of `{self.name}` are given without `k` – expected encoder rows of the chosen latents instead."
            )
        if self.decoder is not None and len(self.decoder) != self.size:
            raise ValueError(
                f"`decoder` of `{self.name}` has shape {tuple(self.decoder.shape)} – expected ({self.size}, D)."
            )

    @property
    def size(self) -> int:
        """K, the number of latents that it returns."""
        return len(self.encoder) if self.columns is None else len(self.columns)

    @property
    def width(self) -> int:
        """D, the model width."""
        return self.encoder.shape[1]

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        """Latents (..., K) of an activation (..., D), float32. The gradient is that of the latents that are on."""
        self._move_to(activation.device)
        normalized = normalize(activation, self.normalization)[0]
        if self.k is None:
            return self._elementwise(normalized)
        flat = normalized.reshape(-1, self.width)
        if self.columns is None:
            parts = [self._on(part)[0] for part in blocks(flat, len(self.encoder))]
            values = torch.cat(parts) if parts else flat.new_zeros(0, self.size)
        else:  # the blocks only say which latents are on, so the gradient has only the columns that are returned
            before = linear(flat, self.encoder[self.columns], self._offset[self.columns])  # type: ignore[attr-defined]
            values = before.relu().masked_fill(~self._kept(flat), 0.0)
        return values.view(*activation.shape[:-1], self.size)

    @property
    def chosen(self) -> torch.Tensor:
        """Encoder rows (K, D) of the returned latents."""
        return self.encoder if self.columns is None else self.encoder[self.columns]

    @property
    def written(self) -> torch.Tensor:
        """Directions (K, D) that its latents write; ablation uses them. Without a decoder, their encoder rows."""
        return self.chosen if self.decoder is None or self.decoder.shape[1] != self.width else self.decoder

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its weights by name, for a file."""
        return {name: getattr(self, name) for name in (*_WEIGHTS, "columns") if getattr(self, name) is not None}

    def check_model(self, model: Any) -> None:
        """Raises `ValueError` for a model without the hook point or of another width."""
        resolve(model, self.hook_point)
        if (width := hidden_size(model)) != self.width:
            raise ValueError(
                f"Latents `{self.name}` at `{self.hook_point}` have width {self.width} – the model's is {width}. They are "
                "latents of another model: take an autoencoder of this one."
            )

    def with_rows(self, rows: torch.Tensor) -> Latents:
        """The same readout with other encoder rows (K, D) for the returned latents. They write the rows that they read."""
        encoder, rows = self.encoder.clone(), rows.to(self.encoder.device)
        encoder[slice(None) if self.columns is None else self.columns] = rows
        return replace(self, encoder=encoder, decoder=rows)

    def choose(self, indices: Sequence[int], name: str | None = None) -> Latents:
        """The same readout of some of its latents, in the given order.

        Raises:
            `ValueError`: an index out of range.
        """
        outside = [index for index in indices if not 0 <= index < self.size]
        if outside or not len(indices):
            raise ValueError(
                f"Latents {outside} – expected indices from 0 to {self.size - 1} of `{self.name}`, at least one."
            )
        rows = torch.tensor(list(indices), dtype=torch.long, device=self.encoder.device)
        decoder = None if self.decoder is None else self.decoder[rows]
        if self.k is not None:
            columns = rows if self.columns is None else self.columns[rows]
            return replace(self, name=name or self.name, columns=columns, decoder=decoder)
        per_latent = ("encoder", "bias", "threshold", "gate_scale", "gate_bias")
        chosen = {field: getattr(self, field)[rows] for field in per_latent if getattr(self, field) is not None}
        return replace(self, name=name or self.name, decoder=decoder, **chosen)

    def top(self, activation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (N, k) and indices (N, k) of the latents that are on, for an activation (..., D) of N tokens. TopK only.

        If fewer than k latents are positive, the other values are 0.
        """
        assert self.k is not None
        assert self.columns is None
        self._move_to(activation.device)
        flat = normalize(activation, self.normalization)[0].reshape(-1, self.width)
        size = max(WHOLE_BLOCK_TOKENS, block_size(len(self.encoder)))
        parts = [self._top(part) for part in flat.split(size)] if len(flat) else []
        if not parts:
            return flat.new_zeros(0, self.k), torch.zeros(0, self.k, dtype=torch.long, device=flat.device)
        values, indices = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(indices)

    def _elementwise(self, activation: torch.Tensor) -> torch.Tensor:
        if self.gate_scale is not None:
            before = linear(activation, self.encoder)
            magnitude = torch.addcmul(self._gate_offset, before, self.gate_scale).relu()  # type: ignore[attr-defined]
            return magnitude.masked_fill(before <= -self._offset, 0.0)  # type: ignore[attr-defined]
        before = linear(activation, self.encoder, self._offset)  # type: ignore[attr-defined]
        if self.threshold is None:
            return before.relu() if before.requires_grad else before.relu_()
        if before.requires_grad:
            return before.masked_fill(before <= self.threshold, 0.0)
        # A product with the mask: `masked_fill` takes three times as long, since the processor has to guess at every number.
        for part in before.view(-1, before.shape[-1]).split(max(MASKED_ROWS, MASKED_NUMBERS // before.shape[-1])):
            part.mul_(part > self.threshold)
        return before

    def _top(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = linear(flat, self.encoder, self._offset)  # type: ignore[attr-defined]  # (n, S)
        assert self.k is not None
        if not self.grouped:
            values, indices = before.topk(self.k, dim=-1, sorted=False)
        else:
            values, indices = before.unflatten(-1, (self.k, -1)).max(dim=-1)
            indices = indices + torch.arange(self.k, device=flat.device) * (len(self.encoder) // self.k)
        return values.relu(), indices

    def _on(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All latents (n, S) of a block, and the indices (n, k) of the latents that are on."""
        values, indices = self._top(flat)
        return flat.new_zeros(len(flat), len(self.encoder)).scatter(1, indices, values), indices

    @torch.no_grad()
    def _kept(self, flat: torch.Tensor) -> torch.Tensor:
        """Mask (N, K) of the columns that are on."""
        masks = []
        for part in blocks(flat, len(self.encoder)):
            on = torch.zeros(len(part), len(self.encoder), dtype=torch.bool, device=part.device)
            masks.append(on.scatter_(1, self._top(part)[1], True)[:, self.columns])
        return torch.cat(masks) if masks else torch.zeros(0, self.size, dtype=torch.bool, device=flat.device)

    def _move_to(self, device: torch.device) -> None:
        """Move the weights to the device of the activation, once.

        This changes a frozen object, but no value in it. A copy per device would keep the weights twice, and a copy that is made
        on the device would compute the folded bias there, with other last bits.
        """
        if self.encoder.device == device:
            return
        for field in (*_WEIGHTS, "columns", "_offset", "_gate_offset"):
            tensor = getattr(self, field, None)
            if tensor is not None:
                object.__setattr__(self, field, tensor.to(device))


def normalize(
    activation: torch.Tensor, how: Normalization
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | float]:
    """Normalize an activation (..., D) as an autoencoder expects it. Its output goes back by `output · scale + mean`.

    Source: sae-lens' `normalize_activations`. The standard deviation is the unbiased one. The way back leaves out the 1e-5 that
    the way there adds to it.

    Returns:
        `tuple`: the normalized activation, float32; the scale (..., 1) or None; the mean (..., 1) or 0.
    """
    activation = activation.float()
    if how == "constant_norm_rescale":
        scale = activation.shape[-1] ** 0.5 / activation.norm(dim=-1, keepdim=True)
        return activation * scale, 1 / scale, 0.0
    if how == "layer_norm":
        mean = activation.mean(-1, keepdim=True)
        std = activation.std(-1, keepdim=True)
        return (activation - mean) / (std + EPSILON), std, mean
    return activation, None, 0.0


def blocks(flat: torch.Tensor, latents: int) -> Iterator[torch.Tensor]:
    """Blocks of tokens (n, D) of (N, D) whose pre-activations take little memory. No block for no tokens."""
    return iter(flat.split(block_size(latents))) if len(flat) else iter(())


def block_size(latents: int) -> int:
    """Number of tokens in a block."""
    return max(BLOCK_TOKENS, BLOCK_NUMBERS // latents)


_WEIGHTS = tuple(
    field.name
    for field in dataclasses.fields(Latents)
    if "Tensor" in str(field.type) and field.name not in ("columns", "claim")
)
