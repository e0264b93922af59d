"""Quality of an autoencoder: unexplained variance, number of latents that are on, and dead latents.

In: targets, reconstructions and latents, a block of tokens at a time. Out: numbers over all tokens. It must not know models or
texts. Callers leave out the tokens that do not count.
"""

from __future__ import annotations

import torch


def variance_unexplained(error: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Fraction of variance unexplained (FVU) over tokens held in memory: Σ ‖error‖² / Σ ‖y − ȳ‖², with gradients.

    In [0, ∞), lower = better; 1 = no better than the mean. Explained variance is 1 − FVU.

    Args:
        error (`torch.Tensor` of shape (N, D)): reconstruction minus target, or the reverse.
        target (`torch.Tensor` of shape (N, D)): y; ȳ is its mean over these tokens.
    """
    return error.pow(2).sum() / (target - target.mean(0)).pow(2).sum()


class ErrorSums:
    """Fraction of variance unexplained over blocks of tokens, in double precision. No block is kept.

    Args:
        mean (`torch.Tensor` of shape (D,), *optional*): mean target over all tokens, for `explained_per_token`.
    """

    def __init__(self, mean: torch.Tensor | None = None):
        self.tokens = 0
        self._mean = mean
        self._missed = self._squares = self._per_token = 0.0
        self._total: torch.Tensor = torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def add(self, target: torch.Tensor, output: torch.Tensor) -> None:
        """Count a block: targets and reconstructions (n, D), on the CPU."""
        target = target.double()
        missed = (target - output.double()).pow(2)
        self.tokens += len(target)
        self._missed += float(missed.sum())
        self._total = self._total + target.sum(0)
        self._squares += float(target.pow(2).sum())
        if self._mean is not None:
            self._per_token += float((missed.sum(1) / (target - self._mean).pow(2).sum(1)).sum())

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained: Σ ‖y − ŷ‖² / Σ ‖y − ȳ‖². In [0, ∞), lower = better; NaN if all targets are equal."""
        variance = self._squares - float(self._total.pow(2).sum()) / self.tokens
        return self._missed / variance if variance > 0 else float("nan")

    @property
    def explained_per_token(self) -> float:
        """Mean over tokens of 1 − ‖y − ŷ‖² / ‖y − ȳ‖²: each token counts the same. At most 1, higher = better."""
        return 1 - self._per_token / self.tokens


class LatentSums:
    """Frequency and mean of each of S latents, over blocks of tokens. No block is kept.

    Args:
        latents (`int`): S.
    """

    def __init__(self, latents: int):
        self.tokens = 0
        self._on = torch.zeros(latents, dtype=torch.long)
        self._total = torch.zeros(latents, dtype=torch.float64)

    @torch.no_grad()
    def add(self, latents: torch.Tensor) -> None:
        """Count a block: latents (n, S)."""
        self.tokens += len(latents)
        self._on += (latents > 0).sum(0).cpu()
        self._total += latents.sum(0, dtype=torch.float64).cpu()

    @property
    def l0(self) -> float:
        """Mean number of latents that are on, in [0, S]."""
        return float(self._on.sum().double() / self.tokens)

    @property
    def dead_fraction(self) -> float:
        """Share of latents that are never on, in [0, 1]."""
        return float((self._on == 0).double().mean())

    @property
    def density(self) -> torch.Tensor:
        """Share of tokens on which each latent is on (S,), in [0, 1]."""
        return self._on.double() / self.tokens

    @property
    def mean(self) -> torch.Tensor:
        """Mean of each latent over all tokens (S,)."""
        return self._total / self.tokens
