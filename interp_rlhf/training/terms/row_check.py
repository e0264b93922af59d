"""Reads one row of a batch again, and checks that the trainer's passes give terms the same scores as `read()`.

In: a batch, and its scores from the trainer's passes. Out: nothing, or an error. It must not know the use of the scores.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ...activations.batch import TokenBatch
from ...activations.counted import counted, input_ids
from ...activations.read import read
from ...activations.recheck import EVERY, Recheck

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch import nn

    from ...activations.chat_marks import ChatMarks
    from ...activations.noise import Causes
    from ...concepts.readout import Readout
    from .batch import TermBatch
    from .readouts import Keyed
    from .reference_scores import ReferenceScores


class RowCheck:
    """Reads one row again at the first optimizer step, and then every 50 steps.

    Args:
        trainer (`Trainer`): a built trainer of TRL.
        scores (`ReferenceScores`): source of the reference's scores; its readouts are set already.
        policy_readouts (`Sequence[Keyed]`): readouts on the policy.
        unproved (`Sequence[Readout]`): readouts whose canaries were not yet checked on the reference.
        causes (`Causes`): known reasons why the policy's pass differs from a reading.
        marks (`ChatMarks`): the tokens that the chat template writes around turns.
    """

    def __init__(
        self,
        trainer: Any,
        scores: ReferenceScores,
        policy_readouts: Sequence[Keyed],
        unproved: Sequence[Readout],
        causes: Causes,
        marks: ChatMarks,
    ):
        self._trainer, self._scores = trainer, scores
        self._causes, self._marks = causes, marks
        self._policy = Recheck(policy_readouts, False, "policy")
        self._reference = Recheck(scores.keyed, True, "reference")
        self._unproved = list(unproved)
        self._checked = -1

    def before_pass(self, inputs: Mapping[str, Any], apart: Collection[Readout]) -> None:
        """Read a row before the trainer computes its loss on a batch.

        Args:
            inputs (`dict`): the batch.
            apart (`Collection[Readout]`): monitors that `read()` reads anyway.
        """

    def compare(
        self,
        batch: TermBatch,
        activations: Mapping[str, torch.Tensor],
        references: Mapping[str, torch.Tensor],
        apart: Collection[str],
    ) -> None:
        """Compare the row's scores from the trainer's passes with the earlier reading.

        Args:
            batch (`TermBatch`): the batch.
            activations (`dict[str, torch.Tensor]`): hook point to the policy's activation.
            references (`dict[str, torch.Tensor]`): key to the reference's scores.
            apart (`Collection[str]`): keys that do not come from the trainer's pass.

        Raises:
            `ValueError`: the scores differ.
        """

    def still(self) -> None:
        """Check that the reference still gives its first scores. All ranks call it together."""
        self._scores.still(self._reference)

    def _due(self, step: int) -> bool:
        if not self._trainer.model.training or (self._checked >= 0 and step < self._checked + EVERY):
            return False
        self._checked = step
        return True

    def _require_canaries(self, model: nn.Module) -> None:
        """Check the claims about a reference that could not run at `attach`."""
        for readout in self._unproved:
            readout.check_canaries(model)
        self._unproved = []


class RolloutRowCheck(RowCheck):
    """Check for rollouts. The reference's scores are compared when the rollout is made."""

    def of_rollout(self, output: Mapping[str, Any], scores: Mapping[str, torch.Tensor]) -> None:
        """Compare one row of a rollout batch.

        Args:
            output (`dict`): the rollout batch.
            scores (`dict[str, torch.Tensor]`): the reference's scores of the batch.

        Raises:
            `ValueError`: the scores differ.
        """
        if not self._due(self._trainer.state.global_step):
            return
        ids = input_ids(output)
        real = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1).bool()
        # TRL reads a masked completion without its tokens, so such a row cannot be checked.
        tokens = output["completion_mask"].sum(1)
        place = int(torch.where(tokens > 0, real.sum(1), real.shape[1] + 1).argmin())
        line = ids[place][real[place]].cpu()[None]
        row = TokenBatch(line, torch.ones_like(line), torch.ones_like(line))
        every = real.to(next(iter(scores.values())).device)
        taken: dict[str, torch.Tensor] | None
        taken = {key: values[place][every[place]][1:] for key, values in scores.items()}
        spread = {key: values[every].double().std(0, correction=0) for key, values in scores.items()}
        if self._causes.padding and bool((~output["prompt_mask"].bool()).any()):
            taken = None  # the same padding affects the policy's pass
        with self._scores.model() as model, self._trainer.accelerator.autocast():
            self._require_canaries(model)
            self._reference(model, row, taken, spread, self._trainer.args)


@dataclass
class _Row:
    """A row that was read before the trainer's pass: its place among the sequences, and its counted tokens."""

    place: int | None
    tokens: int
    policy: dict[str, torch.Tensor] | None = None
    reference: dict[str, torch.Tensor] | None = None
    batch: TokenBatch | None = field(default=None, repr=False)


class LossRowCheck(RowCheck):
    """Check for batches of a data set. A row is read on policy and reference before the trainer's passes, and compared after."""

    _row: _Row | None = None

    def before_pass(self, inputs: Mapping[str, Any], apart: Collection[Readout]) -> None:
        self._row = None
        if not self._due(self._trainer.state.global_step):
            return
        row = self._row = self._longest(inputs)
        assert row.batch is not None
        noisy = self._trainer.model.training and (self._causes.noise or self._causes.adapters)
        skipped = {f"policy:{monitor.name}" for monitor in apart}
        readouts = [readout for readout in self._policy.readouts if readout.name not in skipped]
        with self._trainer.accelerator.autocast():
            if readouts and not noisy:
                scores = read(self._trainer.model_wrapped, row.batch, readouts, reader="policy")
                row.policy = {name: one.scores[one.mask] for name, one in scores.items()}
            row.reference = self._scores.row_again(row.batch, self._reference, self._require_canaries)

    def _longest(self, inputs: Mapping[str, Any]) -> _Row:
        """The sequence with the most counted tokens."""
        lines, counts = counted(inputs, self._marks, True).texts(input_ids(inputs), template=True)
        place = max(range(len(lines)), key=lambda i: sum(counts[i]), default=None)
        line, count = ([], []) if place is None else (lines[place], counts[place])
        if sum(count) < 2:  # a rank without such a row runs too
            line, count = [0, 0, 0], [False] * 3
        return _Row(place, sum(count), batch=TokenBatch.from_ids([[]], [line], counts=[count]))

    def compare(
        self,
        batch: TermBatch,
        activations: Mapping[str, torch.Tensor],
        references: Mapping[str, torch.Tensor],
        apart: Collection[str],
    ) -> None:
        if self._row is None:
            return
        row, self._row = self._row, None
        tokens = batch.tokens(True)
        mine = tokens.sequence == row.place
        taken: dict[str, torch.Tensor] = {}
        spread: dict[str, torch.Tensor] = {}
        if row.policy is not None:
            for readout in self._policy.readouts:
                if readout.name in row.policy and readout.hook_point in activations and row.tokens > 1:
                    # The terms reuse this selection, so it is computed with its graph.
                    scores = readout(batch.policy(readout.hook_point, tokens).detach())
                    taken[readout.name], spread[readout.name] = scores[mine], scores.double().std(0, correction=0)
            self._policy.require(self._trainer.model, taken, row.policy, spread, self._trainer.args)
        if row.reference is not None:
            taken, spread = {}, {}
            for key, values in references.items():
                if key in row.reference and key not in apart and row.tokens > 1:
                    every = values.to(tokens.mask.device)[tokens.mask]
                    taken[key], spread[key] = every[mine], every.double().std(0, correction=0)
            model = self._scores.reference if self._scores.reference is not None else self._trainer.model
            self._reference.require(model, taken, row.reference, spread, self._trainer.args)
