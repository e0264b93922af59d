"""Quality of a sparse autoencoder on text that it was not trained on, next to PCA with as many numbers per token.

In: an autoencoder and activations, block by block. Out: `HeldOut`. It must not know where activations come from.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from .cache import (
    CachedActivations,
    check_cache,
    fill_cache,
    holds,
)
from .cache_names import HELD_OUT
from .cutting import FORWARD_TOKENS
from .quality import ErrorSums, LatentSums
from .stream import in_order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn

    from .autoencoder import SparseAutoencoder
    from .cache import (
        CacheType,
    )
    from .stream import Contexts


@dataclass(frozen=True)
class HeldOut:
    """Quality of an autoencoder on held-out activations.

    Attributes:
        tokens (`int`): N, the number of tokens.
        explained_variance (`float`): 1 − Σ ‖h − ĥ‖² / Σ ‖h − h̄‖² over tokens, h̄ their mean; 1 = perfect, 0 = no better than the
            mean.
        explained_variance_per_token (`float`): mean over tokens of 1 − ‖h − ĥ‖² / ‖h − h̄‖². Every token counts the same.
        l0 (`float`): mean number of latents that are on.
        dead_fraction (`float`): share of latents that are never on.
        pca (`float`, *optional*): explained variance of the k principal components of the training activations about their mean.
        pca_here (`float`): the same for the components of these tokens, the most that k directions can explain.
    """

    tokens: int
    explained_variance: float
    explained_variance_per_token: float
    l0: float
    dead_fraction: float
    pca: float | None
    pca_here: float

    def entry(self) -> dict[str, float | int | None]:
        """The values for JSON, rounded to four places."""
        return {name: round(value, 4) if value is not None else None for name, value in asdict(self).items()}


class Moments:
    """Mean and covariance of activations (N, D), added block by block in double precision."""

    def __init__(self, activations: Iterable[torch.Tensor] = ()):
        self.count = 0
        self.total: torch.Tensor = torch.zeros(())
        self.products: torch.Tensor = torch.zeros(())
        for rows in activations:
            self.add(rows)

    def add(self, rows: torch.Tensor) -> None:
        """Add the activations of more tokens."""
        values = rows.double()
        self.count += len(values)
        self.total = self.total + values.sum(0)
        self.products = self.products + values.T @ values

    @property
    def mean(self) -> torch.Tensor:
        """Mean activation (D,)."""
        return self.total / self.count

    def about(self, center: torch.Tensor) -> torch.Tensor:
        """Scatter matrix Σ (h − center)(h − center)ᵀ (D, D)."""
        off = self.mean - center
        centred = self.products - self.count * torch.outer(self.mean, self.mean)
        return centred + self.count * torch.outer(off, off)

    def components(self, k: int) -> torch.Tensor:
        """Principal components (k, D), orthonormal."""
        return torch.linalg.eigh(self.about(self.mean)).eigenvectors[:, -k:].T


def explained_by(components: torch.Tensor, center: torch.Tensor, moments: Moments) -> float:
    """Explained variance of orthonormal components (k, D) about a centre (D,)."""
    scatter = moments.about(center)
    missed = scatter.trace() - (components @ scatter @ components.T).trace()
    return float(1 - missed / moments.about(moments.mean).trace())


def read_held_out(
    model: nn.Module, contexts: Contexts, hook_point: str, progress: str | None = None
) -> list[torch.Tensor]:
    """Activations of all contexts, in blocks. In float32 they take 4 D bytes a token."""
    blocks = []
    with tqdm(total=contexts.tokens, desc=progress, unit="token", disable=progress is None, leave=False) as bar:
        for rows in in_order(model, contexts, hook_point):
            blocks.append(rows)
            bar.update(len(rows))
    return blocks


@torch.no_grad()
def held_out(
    sae: SparseAutoencoder, blocks: Callable[[], Iterable[torch.Tensor]], k: int, trained_on: Moments | None = None
) -> HeldOut:
    """Evaluate an autoencoder.

    Args:
        blocks (`Callable`): gives the activations in blocks (n, D) at every call.
        k (`int`): number of principal components to compare with.
        trained_on (`Moments`, *optional*): moments of the training activations.
    """
    moments = Moments(blocks())
    errors, latents = ErrorSums(moments.mean), LatentSums(sae.size)
    for rows in blocks():
        errors.add(rows, sae(rows))
        latents.add(sae.encode(rows))
    k = min(k, sae.width)
    pca = None if trained_on is None else explained_by(trained_on.components(k), trained_on.mean, moments)
    return HeldOut(
        tokens=moments.count,
        explained_variance=1 - errors.fvu,
        explained_variance_per_token=errors.explained_per_token,
        l0=latents.l0,
        dead_fraction=latents.dead_fraction,
        pca=pca,
        pca_here=explained_by(moments.components(k), moments.mean, moments),
    )


def evaluate(
    sae: SparseAutoencoder,
    model: nn.Module,
    contexts: Contexts,
    k: int,
    *,
    cache: str | Path | None = None,
    cache_type: CacheType = "float16",
    progress: bool = True,
) -> HeldOut:
    """Evaluate an autoencoder on contexts that it was not trained on.

    Args:
        k (`int`): number of principal components to compare with.
        cache (`str` or `Path`, *optional*): folder for activations. These activations go into a subfolder. Without a cache they
            stay in memory, 4 D bytes a token. `pca` is measured only if the cache holds all training activations.

    Raises:
        `ValueError`: the autoencoder was trained on these contexts, or `cache` holds other files.
    """
    point = sae.spec.hook_point
    training = sae.spec.training
    check_other_contexts(training.get("texts"), contexts)
    if cache is None:
        found = read_held_out(model, contexts, point, "reading held-out activations" if progress else None)
        return held_out(sae, lambda: found, k)
    check_cache(Path(cache))
    folder = Path(cache) / f"{HELD_OUT}{contexts.fingerprint.removeprefix('sha256:')[:12]}"
    fill_cache(folder, model, contexts, point, dtype=cache_type, progress=progress)
    trained_on = None
    if training and holds(cache, hook_point=point, **{name: training.get(name) for name in ("texts", "model")}):
        trained_on = Moments(CachedActivations(cache, FORWARD_TOKENS, 0).in_order())
    return held_out(sae, CachedActivations(folder, FORWARD_TOKENS, 0).in_order, k, trained_on)


def check_other_texts(texts: Sequence[str], other: Sequence[str]) -> None:
    """Raises `ValueError` if a text to evaluate on is also a training text. White space around texts is ignored."""
    seen = {text.strip() for text in texts} - {""}
    if shared := [index for index, text in enumerate(other) if text.strip() in seen]:
        raise ValueError(
            f"{len(shared)} of the {len(other)} texts to evaluate on are trained on, text {shared[0]} the first – expected other "
            "texts. Remove them from one of the two."
        )


def check_other_contexts(trained_on: str | None, contexts: Contexts) -> None:
    """Raises `ValueError` if the contexts to evaluate on have the fingerprint of the training contexts."""
    if trained_on == contexts.fingerprint:
        raise ValueError(
            "The text to evaluate on is the one that is trained on, token by token – expected another. Name other texts."
        )
