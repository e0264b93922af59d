"""Monitors on one fixed labelled set: has a probe gone stale, or is the concept gone?

In: a model, labelled examples, readouts. Out: per readout the scores of every example read three ways (frozen, re-standardized,
refitted), and from those AUROCs with intervals. It must not know trainers or logs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..activations.batch import ConceptScores
from ..activations.collect import read_activations
from ..concepts.linear import folds
from ..validation.statistics import (
    MIN_PER_LABEL,
    MIN_PROMPTS,
    auroc_difference,
    auroc_interval,
    enough_prompts,
)
from .metrics import direction_cosine

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..activations.batch import TokenBatch
    from ..concepts.examples import Examples
    from ..concepts.readout import Readout

PARTS = ("direction", "mean", "std")
READINGS = ("frozen", "restandardized", "refitted")
# Share of false alarms that a monitor's threshold is set to at the start, to be followed by length of text.
FALSE_ALARMS = 0.05
MIN_EXAMPLES = 20


@dataclass(frozen=True)
class Reading:
    """One readout on the labelled set, on one model.

    Attributes:
        scores (`dict[str, np.ndarray]`): way of reading to one score (E,) per example: `frozen` as the readout is;
            `restandardized` with its weight on activations whose mean and variance per dimension are set to what they were at the
            start; `refitted` by probes fitted anew on this model (`fit_anew`), each on the other folds.
        direction (`torch.FloatTensor` of shape (D,)): weight of a probe fitted anew on all examples.
        mean, std (`torch.DoubleTensor` of shape (D,)): of the activations of counted tokens.
    """

    scores: dict[str, np.ndarray]
    direction: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """For a file."""
        found = {f"{name}/{way}": torch.from_numpy(values) for way, values in self.scores.items()}
        return found | {f"{name}/{key}": getattr(self, key) for key in PARTS}

    @classmethod
    def from_tensors(cls, name: str, tensors: Mapping[str, torch.Tensor]) -> Reading:
        """What `tensors` gave."""
        scores = {way: tensors[f"{name}/{way}"].numpy() for way in READINGS}
        return cls(scores, *(tensors[f"{name}/{key}"] for key in PARTS))


class LabelledSet:
    """Labelled examples, tokenized once, on which readouts are read again and again.

    Args:
        examples (`Examples`): at least 20, with prompts of their own: what a monitor's fit saw is no evidence here.
        batch (`TokenBatch`): the same, tokenized. End-of-turn tokens do not count in it, whatever a readout's card says.
        seed (`int`, defaults to 0): of folds and bootstraps.
    """

    def __init__(self, examples: Examples, batch: TokenBatch, seed: int = 0):
        counts = np.bincount(examples.labels, minlength=2)
        if counts.min() < MIN_EXAMPLES // 2 or not batch.completion_mask.any(1).all():
            raise ValueError(
                f"`labelled` has {counts.tolist()} examples of labels 0 and 1, "
                f"{int((~batch.completion_mask.any(1)).sum())} of them without a token that counts – expected at least "
                f"{MIN_EXAMPLES // 2} of each label, all with text: fewer tell nothing of a monitor."
            )
        if not enough_prompts(examples.labels, examples.groups):
            raise ValueError(
                f"`labelled` has {len(set(examples.groups))} different prompts – expected at least {MIN_PROMPTS}, each label "
                f"under {MIN_PER_LABEL} of them: intervals resample prompts, and probes are fitted anew on some and read on "
                "others."
            )
        self.examples, self.batch, self.seed = examples, batch, seed
        self.lengths = batch.completion_mask.sum(1).numpy()  # (E,)
        self._folds = folds(examples.labels, examples.groups, seed)

    def read(
        self, model: Any, readouts: Sequence[Readout], start: Mapping[str, Reading] | None = None
    ) -> dict[str, Reading]:
        """Every readout, by one forward that stops at the deepest hook point; see `readings`."""
        return self.readings(self.activations(model, readouts), readouts, start)

    def activations(self, model: Any, readouts: Sequence[Readout]) -> dict[str, torch.Tensor]:
        """Hook point to activations (N, D) of the counted tokens; where the model is sharded, by all ranks together."""
        points = list(dict.fromkeys(readout.hook_point for readout in readouts))
        return read_activations(model, self.batch, points) if points else {}

    def readings(
        self,
        activations: Mapping[str, torch.Tensor],
        readouts: Sequence[Readout],
        start: Mapping[str, Reading] | None = None,
    ) -> dict[str, Reading]:
        """What every readout makes of these activations.

        Args:
            start (`dict[str, Reading]`, *optional*): the first reading, which says what re-standardizing goes back to.
        """
        refits = {point: self._refit(values) for point, values in activations.items()}
        found = {}
        for readout in readouts:
            values = activations[readout.hook_point]  # (N, D)
            mean, std = values.double().mean(0), values.double().std(0, correction=0)
            old = start[readout.name] if start is not None else None
            anew = values
            if old is not None:
                scale = old.std / std.clamp(min=1e-12)
                anew = ((values.double() - mean) * scale + old.mean).float()
            ways = {
                "frozen": scores_of(readout, self.batch, values), "restandardized": scores_of(readout, self.batch, anew),
                "refitted": refits[readout.hook_point][0],
            }  # fmt: skip
            found[readout.name] = Reading(ways, *refits[readout.hook_point][1:], mean, std)
        return found

    def _refit(self, values: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
        """Scores of each example by probes that did not see its prompt, and the weight of a probe that saw all."""
        rows = self.batch.completion_mask.nonzero()[:, 0]
        means = torch.zeros(len(self.batch), values.shape[1], dtype=torch.float64)
        means.index_add_(0, rows, values.double())
        array = (means / torch.from_numpy(self.lengths)[:, None]).numpy()
        labels = self.examples.labels
        scores = np.zeros(len(labels))
        for train, test in self._folds:
            weight, bias = fit_anew(array[train], labels[train])
            scores[test] = array[test] @ weight + bias
        return scores, torch.from_numpy(fit_anew(array, labels)[0]).float()

    def summary(self, reading: Reading, start: Reading) -> dict[str, Any]:
        """What a reading says beside the first one.

        Returns:
            `dict`: `mean_score`; `shift` of the frozen score in standard deviations of the start; per way of reading
            `<way>_auroc`, its `<way>_interval` [low, high] and its `<way>_change` since the start, [value, low, high];
            `direction_cosine` of the refitted direction with that of the start; `false_alarms` by length of text (three bins,
            short to long) at the threshold that gave 5 % at the start.
        """
        labels, groups = self.examples.labels, self.examples.groups
        frozen, first = reading.scores["frozen"], start.scores["frozen"]
        found: dict[str, Any] = {
            "mean_score": float(frozen.mean()),
            "shift": float((frozen - first).mean() / max(first.std(), 1e-12)),
            "direction_cosine": direction_cosine(start.direction, reading.direction),
            "examples": len(labels),
        }
        for way in READINGS:
            now, then = reading.scores[way], start.scores[way if way != "restandardized" else "frozen"]
            found[f"{way}_auroc"], *found[f"{way}_interval"] = auroc_interval(labels, now, groups, self.seed)
            found[f"{way}_change"] = list(auroc_difference(labels, now, then, groups, self.seed))
        negative = labels == 0
        threshold = np.quantile(first[negative], 1 - FALSE_ALARMS)
        bins = np.array_split(np.argsort(self.lengths[negative], kind="stable"), 3)
        alarms = frozen[negative] > threshold
        found["false_alarms"] = [float(alarms[rows].mean()) for rows in bins]
        return found


def fit_anew(means: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
    """Weight (D,) and bias of a logistic regression on the leading principal components, each at unit variance.

    Not the probe that is fitted for a card: that one standardizes each dimension, and a rotation of the stream, which changes
    nothing of the model, spreads the few massive dimensions over all others and spoils it. On principal components the fit is the
    same in every rotation. A quarter as many components as examples are kept, so that noise is not fitted.
    """
    from sklearn.linear_model import LogisticRegression

    center = means.mean(0)
    _, sizes, components = np.linalg.svd(means - center, full_matrices=False)
    kept = max(1, min(len(means) // 4, int((sizes > 1e-6 * sizes[0]).sum())))
    basis = components[:kept] * (np.sqrt(len(means)) / sizes[:kept])[:, None]  # (k, D)
    model = LogisticRegression(C=0.1, max_iter=1000, class_weight="balanced").fit((means - center) @ basis.T, labels)
    weight = model.coef_[0] @ basis
    return weight, float(model.intercept_[0] - weight @ center)


def scores_of(readout: Readout, batch: TokenBatch, activations: torch.Tensor) -> np.ndarray:
    """Pooled scores (B,) of a batch whose counted tokens have the activations (N, D); NaN where a row has none."""
    scores = torch.zeros(*batch.completion_mask.shape, readout.columns)
    scores[batch.completion_mask] = readout(activations)
    found = readout.score(ConceptScores(scores, batch.completion_mask, batch.input_ids, readout.name))
    return np.array([np.nan if value is None else value for value in found], dtype=np.float64)
