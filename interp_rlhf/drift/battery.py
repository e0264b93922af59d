"""The battery: fixed texts, a snapshot of a model on them, and the comparison of two snapshots.

In: texts and a model. Out: a `Snapshot` from one forward, and from two of them the registered metrics. It must not know trainers,
logs or files.
"""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, Any

import torch

from ..activations.collect import read_activations, read_predictions
from ..activations.hook_points import predicts
from ..activations.outliers import norm_outliers
from .metrics import DRIFT_METRICS, Predictions
from .observed import Snapshot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..activations.batch import TokenBatch

logger = logging.getLogger(__name__)

MAX_TOKENS = 2048
# Whole next-token distributions are wide, so only this many are kept, spread evenly over the texts.
PREDICTIONS = 64
# First tokens of a text, after the very first. arXiv 2510.13900 reads as many.
FIRST = 5


class Battery:
    """Fixed texts, tokenized once.

    Args:
        batch (`TokenBatch`): at most 2,048 tokens of it are used; later rows are left out with a warning. The first token of
            each row is left out of every metric: its massive activations say nothing of the text.
        hook_points (`Sequence[str]`): where activations are compared.
    """

    def __init__(self, batch: TokenBatch, hook_points: Sequence[str]):
        self.batch = _fixed(batch)
        self.hook_points = list(hook_points)
        counted = self.batch.completion_mask
        places = self.batch.attention_mask.cumsum(1)[counted]  # (N,), 1 is the first token
        self.first = places <= FIRST + 1
        self.tokens = int(counted.sum())
        self.kept = torch.linspace(0, self.tokens - 1, min(PREDICTIONS, self.tokens)).round().long().unique()

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens, the hook points and the kept predictions. Snapshots are comparable if it is the same."""
        digest = hashlib.sha256(repr((self.hook_points, self.kept.tolist())).encode())
        digest.update(self.batch.input_ids.numpy().tobytes())
        digest.update(self.batch.completion_mask.numpy().tobytes())
        return digest.hexdigest()

    def read(self, model: Any) -> Snapshot:
        """A snapshot of the model, by one forward with its adapters as they are."""
        if not predicts(model):
            activations = read_activations(model, self.batch, self.hook_points)
            return Snapshot(activations, torch.empty(0), torch.empty(0, 0))
        return Snapshot(*read_predictions(model, self.batch, self.hook_points, self.kept))

    def compare(
        self, before: Snapshot, after: Snapshot
    ) -> tuple[dict[str, dict[str, float | None]], dict[str, float | None]]:
        """The registered metrics of two snapshots (`metrics.DRIFT_METRICS`).

        Returns:
            `tuple[dict, dict]`: hook point to metric to value, and metric of the output to value (empty for models that predict
            nothing). Tokens whose norm is an outlier in either snapshot are left out at that hook point; `norm_outliers` is
            their number.
        """
        points: dict[str, dict[str, float | None]] = {}
        for point in self.hook_points:
            pair = before.activations[point], after.activations[point]
            outliers = norm_outliers(*pair)
            kept = {"point": ~outliers, "first_tokens": self.first & ~outliers}
            points[point] = {
                name: metric.function(*(values[kept[metric.kind]] for values in pair))
                for name, metric in DRIFT_METRICS.items()
                if metric.kind in kept
            }
            points[point]["norm_outliers"] = int(outliers.sum())
        if not len(before.predictions):
            return points, {}
        sides = [Predictions(side.log_probs, side.predictions) for side in (before, after)]
        output: dict[str, float | None] = {
            name: metric.function(*sides) for name, metric in DRIFT_METRICS.items() if metric.kind == "output"
        }
        return points, output


def spread(layers: Sequence[str]) -> list[str]:
    """Four layers over the depth. The last layer is one of them."""
    count = len(layers)
    return list(dict.fromkeys(layers[max(0, round(count * part / 4) - 1)] for part in (1, 2, 3, 4)))


def _fixed(batch: TokenBatch) -> TokenBatch:
    lengths = batch.attention_mask.sum(1)
    kept = int((lengths.cumsum(0) <= MAX_TOKENS).sum())
    if kept == 0:
        raise ValueError(
            f"The first of `texts` has {int(lengths[0])} tokens – expected texts of at most {MAX_TOKENS}."
        )
    if kept < len(batch):
        logger.warning(
            "Drift is measured on the first %d of %d texts: the limit is %d tokens.", kept, len(batch), MAX_TOKENS
        )
    if not batch.completion_mask[:kept].any():
        raise ValueError("No token of `texts` counts – expected texts of at least two tokens.")
    return batch.part(slice(0, kept))
