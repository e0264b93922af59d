"""Tokens whose activation stands out: attention sinks and other massive activations.

In: activations of tokens. Out: which of them to leave out.
"""

from __future__ import annotations

import torch

# A token whose norm is so many times the median is an attention sink or another massive activation
# (Sun et al. 2024, arXiv 2402.17762): it would decide every metric that is not per token.
OUTLIER = 6.0


def norm_outliers(*activations: torch.Tensor, factor: float = OUTLIER) -> torch.Tensor:
    """Tokens (N,) whose norm is above `factor` times the median norm in any of the given activations (N, D)."""
    outliers = torch.zeros(len(activations[0]), dtype=torch.bool)
    for values in activations:
        norms = values.double().norm(dim=1).cpu()
        outliers |= norms > factor * norms.median()
    return outliers
