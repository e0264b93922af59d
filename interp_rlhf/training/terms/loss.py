"""Runs terms around a trainer's `compute_loss`: opens the taps, matches passes to the batch, and reduces the terms.

In: terms, monitors and interventions of one trainer. Out: a scalar that is added to its loss, and metrics. It must not know the
formulas of terms, nor the source of the reference's scores.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ...activations.chat_marks import ChatMarks
from ...activations.counted import end_of_turn_ids, input_ids
from ...activations.hook_points import runs_after
from ...activations.intervene import Intervention
from ...activations.noise import causes
from ...activations.ranks import from_rank_zero, sum_of_all_ranks
from ...activations.tap import Tap
from ..trl import add_metric, tokenizer_of, using_given_reference
from .batch import TermBatch
from .counts import RolloutCounts, WindowCounts
from .monitors import LossMonitors
from .pairs import PairLoss, Pairs
from .readouts import Keyed, Whole
from .row_check import LossRowCheck, RolloutRowCheck

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ...activations.tap import Pass
    from ...concepts.readout import Readout
    from ..interventions import TrainingIntervention
    from .counts import SequenceCounts
    from .reference_scores import ReferenceScores, RolloutScores
    from .row_check import RowCheck
    from .term import Term, TermValues


class LossTerms:
    """Terms, monitors and interventions of one trainer that computes its loss on a data set.

    Args:
        trainer (`Trainer`): a built trainer of TRL.
        terms (`Sequence[Term]`): terms of weight 0 are left out: the run is then that of plain TRL.
        monitors (`Sequence[Readout]`): scored on the policy's own training pass; see `LossMonitors`.
        interventions (`Sequence[TrainingIntervention]`): change the policy's training forward.
        scores (`ReferenceScores`): source of the reference's scores.
        unproved (`Sequence[Readout]`): readouts whose canaries were not yet checked on the reference.
        paired (`bool`): True if rows are pairs, all chosen completions first.

    Attributes:
        terms (`list[Term]`): terms with a weight other than 0.
        scores (`ReferenceScores`): source of the reference's scores.
        causes (`Causes`): known reasons why the policy's pass differs from a reading.
        marks (`ChatMarks`): the tokens that the trainer's chat template writes around turns.
    """

    counts_class: ClassVar[type[SequenceCounts]] = WindowCounts
    check_class: ClassVar[type[RowCheck]] = LossRowCheck

    def __init__(
        self,
        trainer: Any,
        terms: Sequence[Term],
        monitors: Sequence[Readout],
        interventions: Sequence[TrainingIntervention],
        scores: ReferenceScores,
        unproved: Sequence[Readout] = (),
        paired: bool = False,
    ):
        self.trainer, self.scores = trainer, scores
        self.terms = [term for term in terms if term.weight != 0]
        self.interventions = list(interventions)
        self.marks = _marks_of(trainer)
        self.causes = from_rank_zero(lambda: causes(trainer.model, trainer.args))
        # A monitor behind an intervention can only be read in the policy's own pass.
        readable = [monitor for monitor in monitors if not self._behind(monitor.hook_point)]
        scores.choose([*(r for term in self.terms for r in term.reference_readouts), *scores.watched(readable)])
        self._monitors = LossMonitors(trainer, monitors, readable, scores, self.marks, self.causes, paired)
        points = dict.fromkeys(term.policy_point for term in self.terms if term.policy_point is not None)
        read_on_policy = [Keyed(f"policy:{monitor.name}", monitor) for monitor in readable]
        read_on_policy += [Keyed(f"policy:{point}", Whole(point)) for point in points if not self._behind(point)]
        flags = sorted({term.include_end_of_turn for term in self.terms})
        self._counts = self.counts_class(trainer, self.marks, flags)
        self._check = self.check_class(trainer, scores, read_on_policy, unproved, self.causes, self.marks)
        # Interventions first: hooks run in the order in which they were added, and terms read what the loss sees.
        self._changes = [Intervention(trainer.model, i.hook_point, i.change) for i in self.interventions]
        self._policy_tap = Tap(
            trainer.model,
            scores.on_policy_tap(),
            keep=tuple(dict.fromkeys([*points, *(monitor.hook_point for monitor in monitors)])),
            keep_log_probs=any(term.per_pair for term in self.terms),
        )
        self._taps = [tap for tap in (self._policy_tap, scores.tap()) if tap is not None]
        self._hooks: list[Tap | Intervention] = [*self._taps, *self._changes]
        for tap in self._taps:
            tap.open = False
        self._unshifted: torch.Tensor | None = None

    @property
    def own_forwards(self) -> int:
        """Number of our own forwards."""
        return self.scores.own_forwards + self._monitors.own_forwards

    def remove(self) -> None:
        """Take all hooks off."""
        for hooks in self._hooks:
            hooks.remove()

    def _behind(self, hook_point: str) -> bool:
        """True if an intervention changes the activation at a hook point."""
        return any(runs_after(self.trainer.model, hook_point, i.hook_point) for i in self.interventions)

    def precompute(self) -> None:
        """Before training, compute the reference's scores of the trainer's data sets if the trainer precomputes its reference."""
        self.scores.precompute(self.causes)

    def window(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Count the sequences in the micro-batches of the next optimizer step on this rank."""
        self._counts.window(batches)

    def recheck(self) -> None:
        """Check that the reference still reads as it did. All ranks call it together."""
        self._check.still()

    @contextmanager
    def passes(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Open the hooks while the trainer computes its loss on a batch. Gives the batch that the trainer should use."""
        trainer, training = self.trainer, self.trainer.model.training
        weights = self._weights()
        trainer_inputs = inputs
        self.scores.forget()
        self._look_again(inputs)
        for tap in self._taps:
            tap.clear()
            tap.open = True
        self._policy_tap.keep_kind = "policy" if training else "policy_no_grad"
        changed = ExitStack()
        try:
            self.scores.before_pass(inputs, any(weights[term] and term.reference_readouts for term in self.terms))
            if any(weights[term] and term.per_pair for term in self.terms):
                trainer_inputs = self._with_reference_log_probs(inputs, weights)
                changed.enter_context(using_given_reference(trainer))
            for change in self._changes:
                change.open = training
            yield trainer_inputs
        finally:
            changed.close()
            for hooks in self._hooks:
                hooks.open = False

    def added(self, inputs: dict[str, Any], trainer_inputs: dict[str, Any], num_items: Any) -> torch.Tensor | None:
        """The sum of the terms on a batch, added to the trainer's loss; None if no term adds a value. Also logs metrics.

        Args:
            inputs (`dict`): the batch.
            trainer_inputs (`dict`): the batch that `passes` gave.
            num_items: the trainer's argument to `compute_loss`.
        """
        passes = self._taken()
        if any(change.fired == 0 for change in self._changes) and self.trainer.model.training:
            raise RuntimeError(
                f"The intervention at {', '.join(f'`{i.hook_point}`' for i in self.interventions)} changed nothing in the first "
                "training pass – expected its module to run in it. With `torch_compile`, attach before the first forward."
            )
        weights = self._weights()
        active = [term for term in self.terms if weights[term]]
        if not active and not self._monitors.monitors:
            return None
        batch = self._batch(inputs, trainer_inputs, passes, active)
        metrics: dict[str, torch.Tensor] = {}
        values: dict[Term, torch.Tensor] = {}
        total: torch.Tensor | None = None
        with torch.autocast(batch.tokens(True).mask.device.type, enabled=False):
            for term in active:
                evaluated = term.evaluate(batch, weights[term])
                if evaluated.values is None:
                    metrics |= {f"interp/{term.name}/{key}": of_key for key, of_key in evaluated.metrics.items()}
                    continue
                values[term] = evaluated.values
                share = self._share(term, evaluated, batch, metrics, inputs, num_items)
                total = share if total is None else total + share
            with torch.no_grad():
                metrics |= self._monitors.metrics(batch)
        means = self._log(metrics, {term.name: weights[term] for term in active})
        for term, of_term in values.items():
            self._require_finite(term, of_term, means.get(f"interp/{term.name}/loss", 0.0))
        self.scores.forget()
        self._unshifted = None
        return total

    def _share(
        self,
        term: Term,
        evaluated: TermValues,
        batch: TermBatch,
        metrics: dict[str, torch.Tensor],
        inputs: Mapping[str, Any],
        num_items: Any,
    ) -> torch.Tensor:
        """A term's part of a micro-batch's loss. Its metrics go into `metrics`."""
        values = evaluated.values
        assert values is not None
        counts = torch.ones_like(values, dtype=torch.bool)
        if not term.per_pair:
            counts = batch.tokens(term.include_end_of_turn).any.to(values.device)
        logged = {**evaluated.metrics, "loss": values}
        metrics |= {f"interp/{term.name}/{key}": of_key[counts] for key, of_key in logged.items()}
        factor = self._counts.factor(inputs, num_items, term.include_end_of_turn, term.per_pair, counts)
        return (values * counts).sum() * factor

    def _weights(self) -> dict[Term, float]:
        state = self.trainer.state
        return {t: t.weight * t.schedule.factor(state.global_step, state.max_steps) for t in self.terms}

    def _taken(self) -> list[Pass]:
        return [one for tap in self._taps for one in tap.take()]

    def _look_again(self, inputs: dict[str, Any]) -> None:
        """Read the monitors for which the trainer's pass is no reading, and one row for the check of the passes."""
        if self._monitors.monitors or any(term.reference_readouts for term in self.terms):
            self._monitors.before_pass(inputs)
            self._check.before_pass(inputs, self._monitors.apart("policy"))

    def _batch(
        self,
        inputs: dict[str, Any],
        trainer_inputs: dict[str, Any],
        passes: Sequence[Pass],
        active: Sequence[Term],
    ) -> TermBatch:
        """The batch as terms see it, with the policy's activations and the reference's scores."""
        ids = input_ids(inputs)
        kind = self._policy_tap.keep_kind
        here = [one for one in passes if one.input_ids is not None and torch.equal(one.input_ids.to(ids.device), ids)]
        policy = next((one for one in here if one.kind == kind), None)
        points = {term.policy_point for term in active if term.policy_point}
        points |= {monitor.hook_point for monitor in self._monitors.monitors}
        _require_fired(points, policy, ids)
        references = self.scores.of(inputs, passes)
        unread = [r for term in active for r in term.reference_readouts if self.scores.keys[r] not in references]
        if unread:
            raise RuntimeError(
                f"No reference scores of {', '.join(f'`{readout.name}`' for readout in unread)} for this batch of "
                f"{tuple(ids.shape)} tokens – expected a pass of the reference over just these tokens."
            )
        pairs = None
        if any(term.per_pair for term in active):
            pairs = self._pairs(inputs, trainer_inputs, policy)
        activations = policy.activations if policy is not None else {}
        batch = TermBatch(inputs, self.marks, activations, self.scores.by_readout(references), pairs)
        # Monitors that were read separately on both sides do not use the trainer's pass.
        of_terms = {readout for term in self.terms for readout in term.reference_readouts}
        apart = {self.scores.keys[m] for m in self._monitors.apart("reference") if m not in of_terms}
        self._check.compare(batch, activations, references, apart)
        return batch

    def _pairs(self, inputs: dict[str, Any], trainer_inputs: dict[str, Any], policy: Pass | None) -> Pairs:
        if policy is None or policy.log_probs is None:
            raise RuntimeError(
                "The policy's pass returned no `log_probs` – expected TRL's fused head, which DPO uses by default."
            )
        assert self._unshifted is not None
        mask = inputs["completion_mask"]
        log_probs = policy.log_probs[:, -(mask.shape[1] - 1) :].sum(1)
        reference = torch.cat([trainer_inputs["ref_chosen_logps"], trainer_inputs["ref_rejected_logps"]])
        trainer = self.trainer
        kinds = list(zip(trainer.loss_types, trainer.loss_weights, strict=True))
        return Pairs(log_probs, reference, mask.sum(1), trainer.beta, kinds, self._unshifted)

    def _with_reference_log_probs(self, inputs: dict[str, Any], weights: Mapping[Term, float]) -> dict[str, Any]:
        """The batch with the reference's log-probs, shifted by the terms."""
        log_probs = self._unshifted = self.scores.log_probs(inputs, self._taken)
        references = self.scores.by_readout(self.scores.of(inputs, ()))
        batch = TermBatch(inputs, self.marks, {}, references, None)
        loss = PairLoss(self.trainer.beta, self.trainer.loss_types[0], inputs["completion_mask"].sum(1))
        for term in self.terms:
            if weights[term]:
                log_probs = term.shift_reference(log_probs, batch, loss, weights[term])
        chosen, rejected = log_probs.chunk(2)
        return {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def _require_finite(self, term: Term, values: torch.Tensor, mean: float) -> None:
        """The mean over all ranks decides, so that all of them raise together."""
        if not math.isfinite(mean):
            here = bool(torch.isfinite(values).all())
            what = "not a number on another rank" if here else f"{values.detach().tolist()} on this batch"
            raise ValueError(
                f"Regularizer `{term.name}` is {what} – expected finite numbers. The activations or the weight are too "
                "large; a run with such a loss is lost."
            )

    def _log(self, metrics: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> dict[str, float]:
        """Put means over the sequences of all ranks into TRL's own averages: one collective."""
        means: dict[str, float] = {}
        if metrics:
            sums = torch.stack([values.detach().float().sum() for values in metrics.values()])
            counts = torch.tensor([len(values) for values in metrics.values()], device=sums.device, dtype=sums.dtype)
            both = sum_of_all_ranks(torch.stack([sums, counts]), self.trainer.accelerator)
            for name, (total, count) in zip(metrics, both.T.tolist(), strict=True):
                if count:
                    means[name] = total / count
                    add_metric(self.trainer, name, means[name])
        for name, weight in weights.items():
            add_metric(self.trainer, f"interp/{name}/weight", weight)
        return means


class RolloutTerms(LossTerms):
    """Terms of one trainer that generates what it trains on: the reference's scores travel with its rollout batches."""

    scores: RolloutScores
    _check: RolloutRowCheck
    counts_class = RolloutCounts
    check_class = RolloutRowCheck

    @property
    def reads_rollouts(self) -> bool:
        """True if something has to travel with rollout batches."""
        return bool(self.terms)

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """Records the reference's scores while a rollout batch is scored."""
        for tap in self._taps:
            tap.clear()
            tap.open = True
        self._policy_tap.keep_kind = "policy"  # no pass of a rollout has a gradient
        try:
            yield
        finally:
            for tap in self._taps:
                tap.open = False

    def add_reference(self, output: dict[str, Any]) -> dict[str, Any]:
        """The rollout batch with the reference's scores in it: they are shuffled and split with its rows."""
        passes = self._taken()
        output = {**output, **self._counts.shares(output)}
        if not self.scores.keyed:
            return output
        scores = self.scores.of_rollout(output, passes)
        self._check.of_rollout(output, scores)
        return {**output, **self.scores.travelling(scores)}


def _marks_of(trainer: Any) -> ChatMarks:
    tokenizer = tokenizer_of(trainer)
    template = getattr(trainer, "chat_template", None)
    ends = end_of_turn_ids(trainer.model, tokenizer, template)
    return ChatMarks.of(tokenizer, template, getattr(trainer, "chat_template_kwargs", None), ends)


def _require_fired(points: set[str], policy: Pass | None, ids: torch.Tensor) -> None:
    missing = sorted(points - set(policy.activations if policy else ()))
    if missing:
        raise RuntimeError(
            f"Hook point{'s' if len(missing) > 1 else ''} {', '.join(f'`{point}`' for point in missing)} did not fire in the "
            f"policy's pass over this batch of {tuple(ids.shape)} tokens – expected a firing per pass. Either the model was "
            "compiled before the hooks were added (`torch_compile`: attach before the first forward, or turn it off), or a "
            "fused kernel replaces the module (turn it off, or read at a decoder layer)."
        )
