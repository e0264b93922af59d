"""From text to activations: token batches, hook points, the tap inside a trainer's passes, and `read()`.

A readout is anything with a `name`, a `hook_point` and a call from an activation (B, T, D) to scores (B, T, K).
Nothing here knows what a probe is, and nothing here imports TRL.
"""

from .batch import ConceptScores, TokenBatch, end_of_turn_ids, tokenize_examples
from .hook_points import (
    backbone,
    decoder_layers,
    embedding_point,
    has_adapters,
    hidden_size,
    resolve,
    runs_after,
    unwrap,
)
from .identity import identity, structure
from .intervene import Intervention
from .outliers import norm_outliers
from .ranks import from_rank_zero, is_rank_zero, of_all_ranks, raise_on_all_ranks
from .read import read, read_activations, read_inputs, read_means, read_predictions, reference_pass
from .tap import Pass, Tap, TokenReadout, adapters_on

__all__ = [
    "ConceptScores",
    "Intervention",
    "Pass",
    "Tap",
    "TokenBatch",
    "TokenReadout",
    "adapters_on",
    "backbone",
    "decoder_layers",
    "embedding_point",
    "end_of_turn_ids",
    "from_rank_zero",
    "has_adapters",
    "hidden_size",
    "identity",
    "is_rank_zero",
    "norm_outliers",
    "of_all_ranks",
    "raise_on_all_ranks",
    "read",
    "read_activations",
    "read_inputs",
    "read_means",
    "read_predictions",
    "reference_pass",
    "resolve",
    "runs_after",
    "structure",
    "tokenize_examples",
    "unwrap",
]
