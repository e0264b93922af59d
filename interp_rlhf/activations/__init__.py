"""From text to activations: token batches, hook points, the tap inside a trainer's passes, and `read()`.

A readout is anything with a `name`, a `hook_point` and a call from an activation (B, T, D) to scores (B, T, K).
Nothing here knows what a probe is, and nothing here imports TRL.
"""

from .batch import ConceptScores, TokenBatch, tokenize_examples
from .canaries import Agreement, Canaries, agreement, make_canaries
from .chat_marks import ChatMarks
from .collect import (
    read_activations,
    read_means,
    read_pooled,
    read_predictions,
    read_with_likelihood,
    token_weights,
)
from .counted import Counted, counted, end_of_turn_ids, input_ids
from .hook_points import (
    adapters_on,
    backbone,
    decoder_layers,
    embedding_point,
    has_adapters,
    hidden_size,
    layers_or_none,
    predicts,
    resolve,
    runs_after,
    unwrap,
)
from .identity import identity, structure
from .intervene import Intervention
from .noise import Causes, causes, require_positions, rope_reach, runs_here
from .outliers import norm_outliers
from .ranks import from_rank_zero, is_rank_zero, of_all_ranks, raise_on_all_ranks
from .read import read, read_inputs
from .recheck import Recheck
from .reference_pass import adapters_off_in, reference_pass
from .stream_point import stream_point
from .tap import Pass, Tap, TokenReadout

__all__ = [
    "Agreement",
    "Canaries",
    "Causes",
    "ChatMarks",
    "ConceptScores",
    "Counted",
    "Intervention",
    "Pass",
    "Tap",
    "TokenBatch",
    "TokenReadout",
    "adapters_off_in",
    "adapters_on",
    "agreement",
    "backbone",
    "causes",
    "counted",
    "decoder_layers",
    "embedding_point",
    "end_of_turn_ids",
    "from_rank_zero",
    "has_adapters",
    "hidden_size",
    "identity",
    "input_ids",
    "is_rank_zero",
    "layers_or_none",
    "make_canaries",
    "norm_outliers",
    "of_all_ranks",
    "predicts",
    "raise_on_all_ranks",
    "read",
    "read_activations",
    "read_inputs",
    "read_means",
    "read_pooled",
    "read_predictions",
    "read_with_likelihood",
    "reference_pass",
    "require_positions",
    "Recheck",
    "runs_here",
    "resolve",
    "rope_reach",
    "runs_after",
    "stream_point",
    "structure",
    "token_weights",
    "tokenize_examples",
    "unwrap",
]
