"""Effects of latents: the tokens that they promote, and the directions that resemble them.

In: decoder rows and the model, or other directions. Out: token lists and cosines; no text is read. It must not know on
which texts a latent is on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..activations.hook_points import backbone, decoder_layers, unwrap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..concepts.readout import Readout
    from .autoencoder import SparseAutoencoder

_ROWS = 64  # latents whose effects (V,) are held at a time


@dataclass(frozen=True)
class Promotion:
    """A token, and the change of its logit per unit of activation, relative to the mean over the vocabulary."""

    token: int
    piece: str
    effect: float


@torch.no_grad()
def promotions(
    model: Any, tokenizer: Any, sae: SparseAutoencoder, indices: Sequence[int], count: int = 10
) -> list[tuple[list[Promotion], list[Promotion]]]:
    """Tokens that each latent promotes and suppresses most, directly through the unembedding, strongest first.

    This is the logit lens on the decoder: W_U (gain ⊙ d). It includes the gain of the final norm, and its centring for a
    LayerNorm. The scale of that norm depends on the token and is taken as 1. Later layers are left out, so the result describes
    a late latent well and an early latent poorly.

    Returns:
        Promoted and suppressed tokens of each latent; empty lists if the decoder and the unembedding differ in width.
    """
    head = unwrap(model).get_output_embeddings()
    if head is None or head.weight.shape[1] != sae.decoder.shape[1]:
        return [([], []) for _ in indices]
    unembedding = head.weight[: len(tokenizer)].float()
    gain, centred = final_gain(model)
    tokens_moved = []
    for start in range(0, len(indices), _ROWS):
        rows = sae.decoder[list(indices[start : start + _ROWS])].to(unembedding.device)
        rows = rows - rows.mean(1, keepdim=True) if centred else rows
        effects = (rows * gain.to(rows.device)) @ unembedding.T  # (n, V)
        effects = effects - effects.mean(1, keepdim=True)
        for effect in effects:
            kept = min(count, len(effect))
            ends = [effect.topk(kept, largest=largest) for largest in (True, False)]
            promoted, suppressed = (
                [
                    Promotion(token, tokenizer.decode([token]), value)
                    for value, token in zip(*map(torch.Tensor.tolist, end), strict=True)
                ]
                for end in ends
            )
            tokens_moved.append((promoted, suppressed))
    return tokens_moved


def final_gain(model: Any) -> tuple[torch.Tensor, bool]:
    """Gain (D,) of the norm before the unembedding, and True if that norm centres. Without such a norm the gain is 1.

    The gain is measured, not read: the weight of some norms is the gain minus 1. For an x of mean 0 and mean square 1, a norm
    gives gain ⊙ x + bias.
    """
    core: Any = backbone(model)
    names = {module: name for name, module in unwrap(model).named_modules()}
    inside = tuple(f"{layer}." for layer in decoder_layers(model))
    norms: list[Any] = [
        module for module in core.modules()
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None
        and module.weight.dim() == 1 and not names[module].startswith(inside)
    ]  # fmt: skip
    if not norms:
        return torch.ones(unwrap(model).config.get_text_config().hidden_size), False
    norm: Any = norms[-1]
    weight = norm.weight
    x = torch.ones(len(weight), device=weight.device, dtype=weight.dtype)
    x[1::2] = -1
    if len(x) % 2:
        x[-3:] = torch.tensor([2.0, -1.0, -1.0])
    unit = x.float() / x.float().pow(2).mean().sqrt()
    return (norm(x).float() - norm(-x).float()) / (2 * unit), isinstance(norm, nn.LayerNorm)


def cosines(sae: SparseAutoencoder, indices: Sequence[int], readouts: Sequence[Readout]) -> list[dict[str, float]]:
    """Cosine of each latent's decoder row with each readout's direction, in [−1, 1]; 0 for a decoder row of zeros.

    Raises:
        `ValueError`: a readout is at another hook point than the autoencoder's output: they share no space.
    """
    point = sae.spec.output_point or sae.spec.hook_point
    wrong = [f"`{readout.name}` at `{readout.hook_point}`" for readout in readouts if readout.hook_point != point]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)} – expected readouts at `{point}`, where the autoencoder writes: directions of two hook points "
            "cannot be compared. Leave them out, or fit them there."
        )
    rows = nn.functional.normalize(sae.decoder[list(indices)].cpu(), dim=1)
    found = {r.name: rows @ nn.functional.normalize(r.direction.float().cpu(), dim=0) for r in readouts}
    return [{name: float(values[i]) for name, values in found.items()} for i in range(len(indices))]
