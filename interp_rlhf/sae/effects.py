"""What latents write: the tokens that they promote, and the directions that they are like.

In: decoder rows and the model, or other directions. Out: token lists and cosines, without any text. It must not know on which
texts a latent is on.
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
    """A token, and by how much one unit of activation moves its logit, relative to the mean over the vocabulary."""

    token: int
    piece: str
    effect: float


@torch.no_grad()
def promotions(
    model: Any, tokenizer: Any, sae: SparseAutoencoder, indices: Sequence[int], count: int = 10
) -> list[tuple[list[Promotion], list[Promotion]]]:
    """Tokens that each latent promotes and suppresses most, straight through the unembedding, strongest first.

    The logit lens on the decoder: W_U (gain ⊙ d). The final norm's gain is folded in, and its centring where it is a LayerNorm;
    its scale, which depends on the token, is 1; later layers are left out. It says what a late latent does, and little of an
    early one.

    Returns:
        Per latent the promoted and the suppressed; empty where the decoder's width is not the unembedding's.
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
    """Gain (D,) of the norm before the unembedding, and whether that norm centres; ones where the model has none.

    The gain is measured, not read: some keep it less 1 in their weight. For an x of mean 0 and mean square 1, a norm gives
    gain ⊙ x + bias.
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
        `ValueError`: a readout at another hook point than the one at which the autoencoder writes: there is no common space.
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
