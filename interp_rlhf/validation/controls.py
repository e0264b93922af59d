"""Controls of a check: probes without knowledge of the concept. A card's probe must beat them.

In: a card's readout, features and labels of the fit's examples. Out: one readout that scores all controls. It must not know the
held-out examples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..concepts.artifact import strength_of
from ..concepts.linear import fit_paths, spreads

if TYPE_CHECKING:
    from ..concepts.latents import Latents
    from ..concepts.readout import Readout

PERMUTATIONS = 100
RANDOM_DIRECTIONS = 200


class Controls:
    """Probes without knowledge of the concept, in one readout: probes fitted on permuted labels, and random directions.

    Random directions are drawn in the standardized space in which probes are fitted. In the raw space, the few dimensions with
    massive activations would decide alone. Each direction gets the better sign on the fit's examples: the same chance to be right
    by luck that the probe had. Under `attention` all controls use the probe's query.

    Args:
        features (`np.ndarray` of shape (N, D)): pooled activations of the fit's examples, on which the probe was fitted.
        permuted (`tuple[Latents, np.ndarray]`, *optional*): needed for a card of latents, see `permuted_choices`.
        center (`np.ndarray` of shape (D,), *optional*): under `attention`, the mean activation, which the sink
            stands for.
    """

    name = "controls"

    def __init__(
        self,
        readout: Readout,
        features: np.ndarray,
        labels: np.ndarray,
        seed: int,
        permuted: tuple[Latents, np.ndarray] | None = None,
        center: np.ndarray | None = None,
    ):
        self.hook_point = readout.hook_point
        self.pooling = readout.pooling
        self.logits = None
        if center is not None and readout.query is not None:
            self.logits = readout.query, readout.query_bias, torch.tensor(center, dtype=torch.float32)
        rng = np.random.default_rng(seed)
        self.latents: Latents | None = None
        if permuted is not None:
            self.latents, weights = permuted
        else:
            assert readout.header is not None
            shuffled = [rng.permutation(labels) for _ in range(PERMUTATIONS)]
            strengths = (strength_of(readout.header) or 1.0,)  # a difference of means has none
            weights = np.concatenate(
                [path.weights for path in fit_paths(features, shuffled, readout.header.method, strengths)]
            )
        directions = rng.standard_normal((RANDOM_DIRECTIONS, features.shape[1])) / spreads(features)
        gaps = directions @ (features[labels == 1].mean(0) - features[labels == 0].mean(0))
        directions *= np.where(gaps >= 0, 1.0, -1.0)[:, None]
        self.permuted, self.directions = _columns(weights), _columns(directions)

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        logits = []
        if self.logits is not None:
            query, bias, center = self.logits
            logits.append((activation @ query.to(activation) + bias).unsqueeze(-1))
            activation = activation - center.to(activation)
        values = activation if self.latents is None else self.latents(activation)
        return torch.cat(
            [values @ self.permuted.to(values), activation @ self.directions.to(activation), *logits], dim=-1
        )


def _columns(weights: np.ndarray) -> torch.Tensor:
    """Weights (N, D) as columns of norm 1. Only the order of scores matters, and one scale keeps float32 exact enough."""
    norms = np.linalg.norm(weights, axis=1, keepdims=True)
    return torch.tensor((weights / np.where(norms > 0, norms, 1)).T, dtype=torch.float32)
