"""What an evaluation sees of a model: plain records of tensors and texts.

In: tensors and texts. Out: records, and their tensors for a file. It must not know models, trainers or logs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

PARTS = ("direction", "mean", "std")
WAYS = ("frozen", "restandardized", "refitted")


@dataclass(frozen=True)
class Snapshot:
    """What one model makes of the battery's N counted tokens.

    A model without a language-model head (a reward model, a classifier) predicts nothing; `log_probs` and `predictions` are then
    empty.

    Attributes:
        activations (`dict[str, torch.FloatTensor]`): hook point to (N, D).
        log_probs (`torch.FloatTensor` of shape (N,)): of each token given what precedes it.
        predictions (`torch.FloatTensor` of shape (K, V)): next-token log-probs at the kept tokens.
    """

    activations: dict[str, torch.Tensor]
    log_probs: torch.Tensor
    predictions: torch.Tensor

    @property
    def finite(self) -> bool:
        """True if no activation and no log-prob is NaN or infinite."""
        tensors = (self.log_probs, *self.activations.values())
        return all(bool(torch.isfinite(values).all()) for values in tensors)


@dataclass(frozen=True)
class LabelledScores:
    """One readout on the labelled set, on one model.

    Attributes:
        scores (`dict[str, np.ndarray]`): way of reading to one score (E,) per example. `frozen`: the readout as it is.
            `restandardized`: the readout on activations whose mean and variance per dimension are set back to those of the start.
            `refitted`: probes fitted on this model (`fit_anew`), each read on the folds that it was not fitted on.
        direction (`torch.FloatTensor` of shape (D,)): weight of a probe fitted on all examples of this model.
        mean, std (`torch.DoubleTensor` of shape (D,)): mean and standard deviation of the counted tokens' activations.
    """

    scores: dict[str, np.ndarray]
    direction: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The same as tensors for a file, under keys that begin with the readout's name."""
        scores = {f"{name}/{way}": torch.from_numpy(values) for way, values in self.scores.items()}
        return scores | {f"{name}/{key}": getattr(self, key) for key in PARTS}

    @classmethod
    def from_tensors(cls, name: str, tensors: Mapping[str, torch.Tensor]) -> LabelledScores:
        """The inverse of `tensors`."""
        scores = {way: tensors[f"{name}/{way}"].numpy() for way in WAYS}
        return cls(scores, *(tensors[f"{name}/{key}"] for key in PARTS))


@dataclass(frozen=True)
class Sampled:
    """One evaluation's completions, one row per prompt, and their readings.

    Attributes:
        texts (`list[str]`), pieces (`list[list[str]]`): completions, whole and token by token (tokens that count).
        policy, text (`dict[str, np.ndarray]`): readout to scores (R,), read on the policy and on the frozen reference. The
            reference never changes, so `text` changes with the text alone. NaN for an empty completion. `text` is empty without a
            reference.
        token_scores (`dict[str, list[list[float]]]`): readout to scores per token on the policy.
        measures (`dict[str, np.ndarray]`): measure to values (R,).
        clipped, empty (`float`): share of completions that reached the length limit; share without text.
        repetition (`float`): mean share of a completion's 4-grams of tokens that occurred earlier in it.
        reference_perplexity (`float`): perplexity of the completions under the reference; NaN without a reference.
        fvu (`float`): FVU of a sparse autoencoder on the policy's own tokens; NaN without one.
    """

    texts: list[str]
    pieces: list[list[str]]
    policy: dict[str, np.ndarray]
    text: dict[str, np.ndarray]
    token_scores: dict[str, list[list[float]]]
    measures: dict[str, np.ndarray]
    clipped: float
    empty: float
    repetition: float
    reference_perplexity: float
    fvu: float = math.nan

    def tensors(self) -> dict[str, torch.Tensor]:
        """The numbers as tensors for a file. Later evaluations are compared with them. The texts stay in the run log."""
        parts = {"policy": self.policy, "text": self.text, "measures": self.measures}
        named = {f"own/{key}/{name}": torch.from_numpy(v) for key, part in parts.items() for name, v in part.items()}
        return named | {
            "own/shares": torch.tensor(
                [self.clipped, self.empty, self.repetition, self.reference_perplexity, self.fvu], dtype=torch.float64
            )
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Sampled:
        """The inverse of `tensors`, without texts."""
        parts: dict[str, dict[str, np.ndarray]] = {"policy": {}, "text": {}, "measures": {}}
        for key, value in tensors.items():
            if key.startswith("own/") and key != "own/shares":
                _, part, name = key.split("/", 2)
                parts[part][name] = value.numpy()
        shares = tensors["own/shares"].tolist()
        return cls([], [], parts["policy"], parts["text"], {}, parts["measures"], *shares)
