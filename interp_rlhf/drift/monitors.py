"""Monitors on one fixed labelled set: did a probe go stale, or did the concept disappear?

In: a model, labelled examples, readouts. Out: per readout the scores of every example read in three ways (frozen,
re-standardized, refitted), and AUROCs with intervals. It must not know trainers or log files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..activations.collect import read_activations
from ..concepts.linear import folds
from ..runlog.events import MonitorEntry
from ..validation.statistics import (
    MIN_PER_LABEL,
    MIN_PROMPTS,
    auroc_difference,
    auroc_interval,
    enough_prompts,
)
from .metrics import direction_cosine
from .observed import WAYS, LabelledScores
from .scores import scores_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..activations.batch import TokenBatch
    from ..concepts.examples import Examples
    from ..concepts.readout import Readout

# Share of false alarms at the start. It sets the threshold at which later false alarms are counted, by length of text.
FALSE_ALARMS = 0.05
MIN_EXAMPLES = 20


class LabelledSet:
    """Labelled examples, tokenized once, on which readouts are read at every evaluation.

    Args:
        examples (`Examples`): at least 20. Their prompts must differ from those that the monitor was fitted on, or the result
            is no evidence.
        batch (`TokenBatch`): the same examples, tokenized. End-of-turn tokens do not count in it, even if a readout's card counts
            them.
        seed (`int`, defaults to 0): seed of folds and bootstraps.

    Raises:
        `ValueError`: too few examples or prompts, or an example without a token that counts.
    """

    def __init__(self, examples: Examples, batch: TokenBatch, seed: int = 0):
        counts = np.bincount(examples.labels, minlength=2)
        if counts.min() < MIN_EXAMPLES // 2 or not batch.completion_mask.any(1).all():
            raise ValueError(
                f"`labelled` has {counts.tolist()} examples of labels 0 and 1, "
                f"{int((~batch.completion_mask.any(1)).sum())} of them without a token that counts – expected at least "
                f"{MIN_EXAMPLES // 2} of each label, all with text. Fewer say nothing about a monitor: add examples."
            )
        if not enough_prompts(examples.labels, examples.groups):
            raise ValueError(
                f"`labelled` has {len(set(examples.groups))} different prompts – expected at least {MIN_PROMPTS}, each label "
                f"under {MIN_PER_LABEL} of them. Intervals resample prompts, and probes are refitted on some prompts and read on "
                "others: add prompts."
            )
        self.examples, self.batch, self.seed = examples, batch, seed
        self.lengths = batch.completion_mask.sum(1).numpy()  # (E,)
        self._folds = folds(examples.labels, examples.groups, seed)

    def read(
        self, model: Any, readouts: Sequence[Readout], start: Mapping[str, LabelledScores] | None = None
    ) -> dict[str, LabelledScores]:
        """The scores of every readout (see `readings`), by one forward that stops at the deepest hook point."""
        return self.readings(self.activations(model, readouts), readouts, start)

    def activations(self, model: Any, readouts: Sequence[Readout]) -> dict[str, torch.Tensor]:
        """Hook point to activations (N, D) of the counted tokens. All ranks must call it if the model is sharded."""
        points = list(dict.fromkeys(readout.hook_point for readout in readouts))
        return read_activations(model, self.batch, points) if points else {}

    def readings(
        self,
        activations: Mapping[str, torch.Tensor],
        readouts: Sequence[Readout],
        start: Mapping[str, LabelledScores] | None = None,
    ) -> dict[str, LabelledScores]:
        """The scores of every readout on these activations.

        Args:
            start (`dict[str, LabelledScores]`, *optional*): the first reading. Its means and variances are what re-standardizing
                restores.
        """
        refits = {point: self._refit(values) for point, values in activations.items()}
        readings = {}
        for readout in readouts:
            values = activations[readout.hook_point]  # (N, D)
            mean, std = values.double().mean(0), values.double().std(0, correction=0)
            old = start[readout.name] if start is not None else None
            restored = values
            if old is not None:
                scale = old.std / std.clamp(min=1e-12)
                restored = ((values.double() - mean) * scale + old.mean).float()
            ways = {
                "frozen": scores_of(readout, self.batch, values), "restandardized": scores_of(readout, self.batch, restored),
                "refitted": refits[readout.hook_point][0],
            }  # fmt: skip
            readings[readout.name] = LabelledScores(ways, *refits[readout.hook_point][1:], mean, std)
        return readings

    def _refit(self, values: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
        """Scores (E,) by probes that did not see the example's prompt, and the weight (D,) of a probe fitted on all examples."""
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

    def summary(self, reading: LabelledScores, start: LabelledScores, **said: Any) -> MonitorEntry:
        """What a reading says, compared with the first one.

        The restandardized AUROC is compared with the frozen one of the start: there, both are the same.

        Args:
            **said: further fields of the entry.
        """
        labels, groups = self.examples.labels, self.examples.groups
        frozen, first = reading.scores["frozen"], start.scores["frozen"]
        aurocs: dict[str, Any] = {}
        for way in WAYS:
            now, then = reading.scores[way], start.scores[way if way != "restandardized" else "frozen"]
            value, *bounds = auroc_interval(labels, now, groups, self.seed)
            change = list(auroc_difference(labels, now, then, groups, self.seed))
            aurocs |= {f"{way}_auroc": value, f"{way}_interval": bounds, f"{way}_change": change}
        negative = labels == 0
        threshold = np.quantile(first[negative], 1 - FALSE_ALARMS)
        bins = np.array_split(np.argsort(self.lengths[negative], kind="stable"), 3)  # short to long
        alarms = frozen[negative] > threshold
        return MonitorEntry(
            mean_score=float(frozen.mean()),
            shift=float((frozen - first).mean() / max(first.std(), 1e-12)),
            direction_cosine=direction_cosine(start.direction, reading.direction),
            examples=len(labels),
            false_alarms=[float(alarms[rows].mean()) for rows in bins],
            **aurocs,
            **said,
        )


def fit_anew(means: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
    """Weight (D,) and bias of a logistic regression on the leading principal components, each at unit variance.

    The fit of a card standardizes each dimension. A rotation of the residual stream changes nothing of the model, but it
    spreads the few massive dimensions over all others and spoils such a fit. On principal components the fit is the same in
    every rotation. Only a quarter as many components as examples are kept, so that noise is not fitted.
    """
    from sklearn.linear_model import LogisticRegression

    center = means.mean(0)
    _, sizes, components = np.linalg.svd(means - center, full_matrices=False)
    kept = max(1, min(len(means) // 4, int((sizes > 1e-6 * sizes[0]).sum())))
    basis = components[:kept] * (np.sqrt(len(means)) / sizes[:kept])[:, None]  # (k, D)
    model = LogisticRegression(C=0.1, max_iter=1000, class_weight="balanced").fit((means - center) @ basis.T, labels)
    weight = model.coef_[0] @ basis
    return weight, float(model.intercept_[0] - weight @ center)
