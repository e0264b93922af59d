"""Scores of whole rows from the activations of their counted tokens.

In: a readout, a batch, activations. Out: one score per row. It must not know models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..activations.batch import ConceptScores

if TYPE_CHECKING:
    from ..activations.batch import TokenBatch
    from ..concepts.readout import Readout


def scores_of(readout: Readout, batch: TokenBatch, activations: torch.Tensor) -> np.ndarray:
    """Pooled scores (B,) of a batch whose counted tokens have the activations (N, D); NaN for a row without counted tokens."""
    scores = torch.zeros(*batch.completion_mask.shape, readout.columns)
    scores[batch.completion_mask] = readout(activations)
    pooled = readout.score(ConceptScores(scores, batch.completion_mask, batch.input_ids, readout.name))
    return np.array([np.nan if value is None else value for value in pooled], dtype=np.float64)
