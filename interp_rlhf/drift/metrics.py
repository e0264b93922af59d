"""Drift metrics: pure functions on two matrices of activations of the same tokens.

In: `before` and `after`, (N, D) float32. Out: one number. Each docstring says sign, range and what the metric cannot see.
"""

from __future__ import annotations

import torch


def cosine(before: torch.Tensor, after: torch.Tensor) -> float:
    """Mean cosine of a token's activation with its own earlier one.

    In [−1, 1]; 1 = same direction, lower = more drift. Blind to a change of norm.
    """
    return float(torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=1).mean())


def relative_norm(before: torch.Tensor, after: torch.Tensor) -> float:
    """Mean ratio of norms, after over before.

    In [0, ∞); 1 = unchanged. Blind to a change of direction.
    """
    return float((after.double().norm(dim=1) / before.double().norm(dim=1).clamp(min=1e-12)).mean())


def linear_cka(before: torch.Tensor, after: torch.Tensor) -> float:
    """Linear centred kernel alignment, ‖A'ᵀB'‖² / (‖A'ᵀA'‖ ‖B'ᵀB'‖) on centred activations.

    In [0, 1]; 1 = same geometry, lower = more drift. Invariant to rotation and to one common scale, so it is blind to
    just what breaks a linear probe: read it beside the cosine and the frozen AUROC. Biased upwards where N is not much
    larger than D.

    Source: Kornblith et al. 2019 (arXiv 1905.00414), equation 5 in feature space: memory in D², not N².
    """
    a = before.double() - before.double().mean(0)
    b = after.double() - after.double().mean(0)
    cross = torch.linalg.matrix_norm(a.T @ b).square()
    scale = torch.linalg.matrix_norm(a.T @ a) * torch.linalg.matrix_norm(b.T @ b)
    return float(cross / scale.clamp(min=1e-30))
