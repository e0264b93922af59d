"""A sparse autoencoder as a measure of drift: which of its latents changed, and how much of the activations it still explains.

In: activations of the same tokens on two models, or of one text on one. Out: numbers for the log. It must not know trainers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..activations.outliers import norm_outliers
from ..runlog.events import ChangedLatentEntry, SaeEntry
from ..sae.quality import LatentSums

if TYPE_CHECKING:
    import torch

    from ..sae.autoencoder import SparseAutoencoder

CHANGED = 10  # latents that are named


def changed_latents(sae: SparseAutoencoder, before: torch.Tensor, after: torch.Tensor) -> SaeEntry:
    """The latents of two models on the same N tokens. Tokens whose norm is an outlier are left out.

    Args:
        before, after (`torch.Tensor` of shape (N, D)): activations at the autoencoder's hook point.

    Returns:
        `SaeEntry`: FVU (lower = better), the mean number of latents that are on, and the latents whose mean over tokens changed
        most.
    """
    outliers = norm_outliers(before, after)
    pair = [values[~outliers] for values in (before, after)]
    (old, old_on), (new, new_on) = (_means(sae, values) for values in pair)
    top = (new - old).abs().topk(min(CHANGED, sae.size)).indices.tolist()
    rows = [
        ChangedLatentEntry(
            latent=i, before=round(float(old[i]), 4), after=round(float(new[i]), 4),
            on_before=round(float(old_on[i]), 4), on_after=round(float(new_on[i]), 4),
        )
        for i in top if new[i] != old[i]
    ]  # fmt: skip
    return SaeEntry(
        hook_point=sae.spec.hook_point, tokens=len(pair[0]), fvu_before=sae.fvu(pair[0]), fvu=sae.fvu(pair[1]),
        l0_before=float(old_on.sum()), l0=float(new_on.sum()), changed=rows,
    )  # fmt: skip


def unexplained(sae: SparseAutoencoder, activations: torch.Tensor) -> float:
    """FVU on activations (N, D) without tokens whose norm is an outlier; NaN for fewer than two tokens."""
    kept = activations[~norm_outliers(activations)] if len(activations) else activations
    return sae.fvu(kept) if len(kept) > 1 else float("nan")


def _means(sae: SparseAutoencoder, activations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (S,) of every latent over tokens, and the share (S,) of tokens on which it is on."""
    sums = LatentSums(sae.size)
    for part in activations.split(256):
        sums.add(sae.encode(part))
    return sums.mean, sums.density
