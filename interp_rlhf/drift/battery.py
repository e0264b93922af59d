"""The battery: fixed texts, what a model makes of them in one forward, and the comparison of two such snapshots.

In: texts and a model. Out: a `Snapshot`, and from two of them the metrics of `metrics`. It must not know trainers or logs.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..activations.collect import read_activations, read_predictions
from ..activations.hook_points import predicts
from ..activations.outliers import norm_outliers
from ..concepts.artifact import load_tensors, write_atomically
from . import metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ..activations.batch import TokenBatch

logger = logging.getLogger(__name__)

MAX_TOKENS = 2048
# Whole next-token distributions are wide: so many are kept, spread evenly over the texts.
PREDICTIONS = 64
# The first tokens of a text, after the very first: what 2510.13900 reads.
FIRST = 5

_POINT_METRICS: dict[str, Callable[[torch.Tensor, torch.Tensor], float]] = {
    "cosine": metrics.cosine,
    "relative_norm": metrics.relative_norm,
    "cka": metrics.linear_cka,
    "procrustes": metrics.procrustes_residual,
    "shift_rank": metrics.shift_rank,
}


@dataclass(frozen=True)
class Snapshot:
    """What one model makes of the battery's N counted tokens.

    Attributes:
        activations (`dict[str, torch.FloatTensor]`): hook point to (N, D).
        log_probs (`torch.FloatTensor` of shape (N,)): of each token given what precedes it.
        predictions (`torch.FloatTensor` of shape (K, V)): next-token log-probs at the kept tokens.

    A model without a language-model head, a reward model or a classifier, predicts nothing: the latter two are empty.
    """

    activations: dict[str, torch.Tensor]
    log_probs: torch.Tensor
    predictions: torch.Tensor

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-prob of the battery's tokens; NaN where nothing is predicted."""
        return perplexity(self.log_probs)

    @property
    def finite(self) -> bool:
        """Whether every number is one."""
        tensors = (self.log_probs, *self.activations.values())
        return all(bool(torch.isfinite(values).all()) for values in tensors)


def perplexity(log_probs: torch.Tensor) -> float:
    """exp of the mean negative log-prob (N,); infinite where that is too large for a float."""
    return float((-log_probs.double().mean()).exp())


class Battery:
    """Fixed texts, tokenized once.

    Args:
        batch (`TokenBatch`): at most 2,048 tokens of it are used; what is over is left out with a warning. The first token of
            each row is left out of every metric: it carries massive activations, not the text.
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
        """SHA-256 of the tokens, the hook points and the kept predictions: what a snapshot belongs to."""
        digest = hashlib.sha256(repr((self.hook_points, self.kept.tolist())).encode())
        digest.update(self.batch.input_ids.numpy().tobytes())
        digest.update(self.batch.completion_mask.numpy().tobytes())
        return digest.hexdigest()

    def read(self, model: Any) -> Snapshot:
        """One forward of the model as its adapters stand."""
        if not predicts(model):
            found = read_activations(model, self.batch, self.hook_points)
            return Snapshot(found, torch.empty(0), torch.empty(0, 0))
        return Snapshot(*read_predictions(model, self.batch, self.hook_points, self.kept))

    def compare(self, before: Snapshot, after: Snapshot) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        """Metrics per hook point, and those of the output, none where nothing is predicted.

        Tokens whose norm stands out in either snapshot are left out at that hook point, and counted (`norm_outliers`).
        """
        points = {}
        for point in self.hook_points:
            pair = before.activations[point], after.activations[point]
            outliers = norm_outliers(*pair)
            a, b = (values[~outliers] for values in pair)
            points[point] = {name: metric(a, b) for name, metric in _POINT_METRICS.items()}
            first = self.first & ~outliers
            points[point]["first_tokens"] = metrics.mean_shift(pair[0][first], pair[1][first])
            points[point]["norm_outliers"] = int(outliers.sum())
        if not len(before.predictions):
            return points, {}
        output = {
            "kl": metrics.output_kl(before.predictions, after.predictions),
            "perplexity": after.perplexity,
            "perplexity_ratio": after.perplexity / before.perplexity,
        }
        return points, output

    def save(
        self, snapshot: Snapshot, path: Path, extra: dict[str, torch.Tensor] | None = None, note: str = ""
    ) -> None:
        """The snapshot as a safetensors file that knows its battery; `extra` tensors and a `note` travel with it."""
        from safetensors.torch import save

        tensors = {f"activations/{point}": values for point, values in snapshot.activations.items()}
        tensors |= {"log_probs": snapshot.log_probs, "predictions": snapshot.predictions}
        tensors |= {f"extra/{name}": values for name, values in (extra or {}).items()}
        metadata = {"fingerprint": self.fingerprint, "note": note}
        write_atomically(
            path,
            save({k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}, metadata=metadata),
        )

    def load(self, path: Path, note: str = "") -> tuple[Snapshot, dict[str, torch.Tensor]] | None:
        """A saved snapshot and what travelled with it; None where there is none, or where it is of another battery or note."""
        from safetensors import safe_open

        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            if file.metadata() != {"fingerprint": self.fingerprint, "note": note}:
                return None
        found = load_tensors(path)
        activations = {point: found[f"activations/{point}"] for point in self.hook_points}
        extra = {name.removeprefix("extra/"): v for name, v in found.items() if name.startswith("extra/")}
        return Snapshot(activations, found["log_probs"], found["predictions"]), extra


def spread(layers: Sequence[str]) -> list[str]:
    """Four layers over the depth, the last one among them."""
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
            "Drift is measured on the first %d of %d texts: %d tokens at most.", kept, len(batch), MAX_TOKENS
        )
    if not batch.completion_mask[:kept].any():
        raise ValueError("No token of `texts` counts – expected texts of at least two tokens.")
    return batch.part(slice(0, kept))
