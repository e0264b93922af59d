"""Monitors in the loss: scored on the policy's own training pass, without gradient.

In: a training batch. Out: metrics. If the trainer's pass differs from a reading, `read()` reads the monitors instead. Monitors
behind an intervention are the exception: only the trainer's pass shows its effect. It must not know terms.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ...activations.batch import TokenBatch
from ...activations.counted import counted, input_ids
from ...activations.ranks import of_all_ranks
from ...activations.read import read

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...activations.chat_marks import ChatMarks
    from ...activations.noise import Causes
    from ...concepts.readout import Readout
    from .batch import TermBatch
    from .reference_scores import ReferenceScores

# Scores of each sequence, by side (`policy`, `reference`) and monitor.
SideScores = dict[str, dict["Readout", list[float | None]]]


class LossMonitors:
    """Monitors of a trainer that computes its loss on a data set.

    Args:
        trainer (`Trainer`): a built trainer of TRL.
        monitors (`Sequence[Readout]`): all monitors.
        readable (`Sequence[Readout]`): monitors that `read()` can read too, since they are not behind an intervention.
        scores (`ReferenceScores`): source of the reference's scores.
        marks (`ChatMarks`): the tokens that the chat template writes around turns.
        causes (`Causes`): known reasons why the policy's pass differs from a reading.
        paired (`bool`): True if rows are pairs, all chosen completions first.

    Attributes:
        own_forwards (`int`): number of our own forwards.
    """

    def __init__(
        self,
        trainer: Any,
        monitors: Sequence[Readout],
        readable: Sequence[Readout],
        scores: ReferenceScores,
        marks: ChatMarks,
        causes: Causes,
        paired: bool,
    ):
        self._trainer, self._scores, self._marks, self._causes = trainer, scores, marks, causes
        self.monitors, self._readable, self._paired = list(monitors), list(readable), paired
        self.own_forwards = 0
        self._apart: SideScores = {}

    def before_pass(self, inputs: Mapping[str, Any]) -> None:
        """Read a batch's monitors with `read()` if the trainer's pass over it differs from a reading."""
        self._apart = {}
        if self._readable and self._must_read(inputs):
            self._apart = self._read(inputs)

    def apart(self, side: str) -> list[Readout]:
        """Monitors that `read()` read for this batch, on one side."""
        return list(self._apart.get(side, {}))

    def metrics(self, batch: TermBatch) -> dict[str, torch.Tensor]:
        """Metrics of a batch, each with one score per counted sequence."""
        metrics: dict[str, torch.Tensor] = {}
        for monitor in self.monitors:
            metrics |= self._of_one(monitor, batch)
        return metrics

    def _must_read(self, inputs: Mapping[str, Any]) -> bool:
        """True if the trainer's pass over this batch differs from a reading, on any rank."""
        known, marks = self._causes, self._marks
        noisy = self._trainer.model.training and bool(known.noise or known.adapters)
        ids = input_ids(inputs)
        differs = noisy or (known.reach is not None and ids.shape[1] >= known.reach)
        if not differs and (marks.prefix or marks.dropped):
            tokens = counted(inputs, marks)
            differs = bool(tokens.template.any()) or bool(marks.dropped)
        if not noisy and (marks.prefix or marks.dropped or known.reach is not None):
            differs = any(of_all_ranks([differs])[0])
        return differs

    def _read(self, inputs: Mapping[str, Any]) -> SideScores:
        by_side: SideScores = {"policy": {}}
        watched = [monitor for monitor in self._scores.watched(self._readable) if monitor in self._scores.keys]
        for flag in sorted({monitor.include_end_of_turn for monitor in self._readable}):
            tokens = counted(inputs, self._marks, flag)
            lines, counts = tokens.texts(input_ids(inputs), dropped=self._marks.dropped)
            batch = TokenBatch.from_ids([[]] * len(lines), lines, counts=counts)
            for side, readouts in (("policy", self._readable), ("reference", watched)):
                mine = [monitor for monitor in readouts if monitor.include_end_of_turn == flag]
                if not mine:
                    continue
                self.own_forwards += 1
                model = self._scores.model() if side == "reference" else nullcontext(self._trainer.model_wrapped)
                with self._trainer.accelerator.autocast(), model as run:
                    scores = read(run, batch, mine, reader=side)
                by_side.setdefault(side, {}).update({one: one.score(scores[one.name]) for one in mine})
        return by_side

    def _of_one(self, monitor: Readout, batch: TermBatch) -> dict[str, torch.Tensor]:
        tokens = batch.tokens(monitor.include_end_of_turn)
        counts = tokens.any
        start: torch.Tensor | None = None
        if monitor in self._apart.get("policy", {}):
            scores = _as_tensor(self._apart["policy"][monitor], counts)
            if "reference" in self._apart:
                start = _as_tensor(self._apart["reference"][monitor], counts)
        else:
            rows, mask = tokens.rows(monitor(batch.policy(monitor.hook_point, tokens).detach()))
            scores = monitor.pooled(rows, mask)  # (M,)
            if batch.has_reference(monitor):
                before, _ = tokens.rows(batch.reference(monitor, tokens))
                start = monitor.pooled(before, mask)
        name = f"interp/{monitor.name}"
        metrics = {f"{name}/mean_score": scores[counts]}
        if self._paired:
            half = len(scores) // 2
            metrics[f"{name}/mean_score_chosen"] = scores[:half][counts[:half]]
            metrics[f"{name}/mean_score_rejected"] = scores[half:][counts[half:]]
        if start is not None:
            metrics[f"{name}/drift"] = (scores - start)[counts]
        return metrics


def _as_tensor(values: Sequence[float | None], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor([math.nan if value is None else value for value in values], device=like.device)
