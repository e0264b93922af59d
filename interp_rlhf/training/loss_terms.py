"""What happens around a trainer's `compute_loss`: gates are opened, passes are matched to the batch, terms are reduced.

In: regularizers, monitors and interventions of one trainer. Out: a scalar that is added to its loss, and metrics. Sums run over
sequences and the division by their number comes last, so that accumulation, ranks and padding leave a term unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..activations.batch import TokenBatch
from ..activations.counted import ChatMarks, counted, end_of_turn_ids, input_ids
from ..activations.hook_points import has_adapters, runs_after
from ..activations.intervene import Intervention
from ..activations.noise import causes, runs_here
from ..activations.ranks import from_rank_zero, of_all_ranks
from ..activations.read import read, read_inputs, reference_pass
from ..activations.recheck import EVERY, Recheck
from ..activations.tap import Tap
from .reference import kl_option
from .regularizers import ExplainAway, Pairs, Whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from ..activations.counted import Counted
    from ..activations.tap import Pass, TokenReadout
    from ..concepts.readout import Readout
    from .interventions import TrainingIntervention
    from .regularizers import Regularizer, Term

# What a batch holds beside the backbone's own arguments.
NOT_FOR_THE_MODEL = {"labels", "completion_mask", "label", "ref_chosen_logps", "ref_rejected_logps", "ref_logps"}
REFERENCE_KEY = "interp_reference/"
# In a rollout batch, per row: rows over rows with a token that counts, of all ranks.
SHARE_KEY = "interp_share/"

# Where the reference is read: in a pass that the trainer makes on rollouts or in its loss, in scores that were computed once at
# `attach`, or in a pass of our own.
Source = Literal["rollout", "pass", "cache", "own"]


def trainer_kind(trainer: Any) -> str | None:
    """`DPO`, `KTO`, `SFT`, `GRPO` or `RLOO`; None for another trainer."""
    from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer, SFTTrainer

    classes = {"DPO": DPOTrainer, "KTO": KTOTrainer, "SFT": SFTTrainer, "GRPO": GRPOTrainer, "RLOO": RLOOTrainer}
    return next((kind for kind, trainer_class in classes.items() if isinstance(trainer, trainer_class)), None)


def reference_source(trainer: Any) -> Source:
    """Where this trainer's reference is read."""
    kind = trainer_kind(trainer)
    if kind in ("GRPO", "RLOO"):
        return "rollout"
    if kind == "SFT":
        return "own"
    return "cache" if trainer.precompute_ref_logps else "pass"


@dataclass(frozen=True, eq=False)
class _Keyed:
    """A readout under a name of its own: two terms may read the same concept."""

    name: str
    readout: TokenReadout

    @property
    def hook_point(self) -> str:
        return self.readout.hook_point

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        return self.readout(activation)


class _Batch:
    """What regularizers see of a batch; see `regularizers.Batch`."""

    def __init__(
        self,
        inputs: Mapping[str, Any],
        marks: ChatMarks,
        activations: Mapping[str, torch.Tensor],
        references: Mapping[TokenReadout, torch.Tensor],
        pairs: Pairs | None,
    ):
        self.pairs = pairs
        self._inputs, self._marks = inputs, marks
        self._activations, self._references = activations, references
        self._tokens: dict[bool, Counted] = {}
        self._chosen: dict[tuple[str, int], torch.Tensor] = {}

    def tokens(self, include_end_of_turn: bool) -> Counted:
        if include_end_of_turn not in self._tokens:
            self._tokens[include_end_of_turn] = counted(self._inputs, self._marks, include_end_of_turn)
        return self._tokens[include_end_of_turn]

    def policy(self, hook_point: str, tokens: Counted) -> torch.Tensor:
        # Terms at one hook point share the selection, and so its gradient's memory.
        key = (hook_point, id(tokens))
        if key not in self._chosen:
            activation = self._activations[hook_point]
            self._chosen[key] = activation[tokens.mask.to(activation.device)].float().to(tokens.mask.device)
        return self._chosen[key]

    def reference(self, readout: TokenReadout, tokens: Counted) -> torch.Tensor:
        return self._references[readout].to(tokens.mask.device)[tokens.mask]


class LossTerms:
    """Regularizers, monitors and interventions of one trainer.

    Args:
        trainer (`Trainer`): a built trainer of TRL.
        regularizers (`Sequence[Regularizer]`): those of weight 0 are left out: the run is then that of plain TRL.
        monitors (`Sequence[Readout]`): scored on the policy's own training pass, without gradient; by `read()` where that pass is
            another reading (`causes`), but behind an intervention, which only that pass has.
        interventions (`Sequence[TrainingIntervention]`): change the policy's training forward.
        reference (`nn.Module`, *optional*): the frozen reference, where it is a model of its own.

    Raises:
        `ValueError`: another reference than the one that a rollout trainer runs.

    Attributes:
        own_forwards (`int`): forwards of our own that were needed.
        causes (`Causes`): what is known that makes the policy's pass another reading.
    """

    def __init__(
        self,
        trainer: Any,
        regularizers: Sequence[Regularizer],
        monitors: Sequence[Readout] = (),
        interventions: Sequence[TrainingIntervention] = (),
        reference: nn.Module | None = None,
    ):
        self.trainer = trainer
        self.kind = trainer_kind(trainer)
        self.source = reference_source(trainer)
        self.regularizers = [r for r in regularizers if r.weight != 0]
        self.monitors = list(monitors)
        self.interventions = list(interventions)
        self.own_forwards = 0
        self._reference = reference
        processing = trainer.processing_class
        tokenizer = getattr(processing, "tokenizer", processing)
        template = getattr(trainer, "chat_template", None)
        ends = end_of_turn_ids(trainer.model, tokenizer, template)
        self.marks = ChatMarks.of(tokenizer, template, getattr(trainer, "chat_template_kwargs", None), ends)
        self.causes = from_rank_zero(lambda: causes(trainer.model, trainer.args))
        wanted = [readout for regularizer in self.regularizers for readout in regularizer.references]
        if self.source == "pass":  # the reference runs anyway: a monitor's drift is free
            # Not behind an intervention, which only the policy's activations have seen.
            wanted += [m for m in self.monitors if not self._behind(m)]
        if self.source == "rollout" and wanted and reference is not None and reference is not trainer.ref_model:
            raise ValueError(
                f"`reference` is given with {', '.join(f'`{r.name}`' for r in self.regularizers if r.references)} in a "
                f"`{type(trainer).__name__}` – expected none: their reference is read in the pass that the trainer makes of its "
                f"own (`{kl_option(trainer)}` above 0), and no other model is run. Leave `reference` out of `attach`."
            )
        self._keys = {readout: f"{i}:{readout.name}" for i, readout in enumerate(dict.fromkeys(wanted))}
        keyed = [_Keyed(key, readout) for readout, key in self._keys.items()]
        # Interventions first: hooks run in the order in which they came, and what is read is what the loss sees.
        self._changes = [Intervention(trainer.model, i.hook_point, i.change) for i in self.interventions]
        points = [r.policy_point for r in self.regularizers if r.policy_point is not None]
        points += [monitor.hook_point for monitor in self.monitors]
        self._needs_log_probs = any(r.per_pair for r in self.regularizers)
        own = reference is not None and has_its_own_passes(self.source)
        self.policy_tap = Tap(
            trainer.model,
            [] if own or not has_its_own_passes(self.source) else keyed,
            keep=tuple(dict.fromkeys(points)),
            keep_log_probs=self._needs_log_probs,
        )
        self.reference_tap = (
            Tap(reference, keyed, is_reference=True) if own and keyed and reference is not None else None
        )
        self._taps = [tap for tap in (self.policy_tap, self.reference_tap) if tap is not None]
        self._hooks: list[Tap | Intervention] = [*self._taps, *self._changes]
        for tap in self._taps:
            tap.open = False
        self._keyed = keyed
        terms_at = dict.fromkeys(r.policy_point for r in self.regularizers if r.policy_point is not None)
        self._policy_recheck = Recheck(
            [_Keyed(f"policy:{m.name}", m) for m in self.monitors if not self._behind(m)]
            + [
                _Keyed(f"policy:{point}", Whole(point))
                for point in terms_at
                if not any(runs_after(trainer.model, point, i.hook_point) for i in self.interventions)
            ],
            False,
            "policy",
        )
        self._reference_recheck = Recheck(keyed, True, "reference")
        self._pending = self._unproved()
        self._again: dict[str, Any] = {}
        self._checked = -1
        self._read_monitors: dict[str, dict[Readout, list[float | None]]] = {}
        self._cache: dict[bytes, dict[str, torch.Tensor]] | None = None
        self._units: dict[bool, int] = {}
        self._early: dict[str, torch.Tensor] = {}
        self._plain: torch.Tensor | None = None

    def remove(self) -> None:
        """Take all hooks off."""
        for hooks in self._hooks:
            hooks.remove()

    def _behind(self, readout: Readout) -> bool:
        """Whether a readout sees what an intervention changes."""
        return any(runs_after(self.trainer.model, readout.hook_point, i.hook_point) for i in self.interventions)

    def _unproved(self) -> list[Readout]:
        """Claims about a reference that an engine had in pieces when `attach` looked; their canaries are read later."""
        model = self._reference if self._reference is not None else self.trainer.model
        adapted = has_adapters(self.trainer.model)
        begun = adapted and "ref" in self.trainer.accelerator.unwrap_model(self.trainer.model).peft_config
        if runs_here(model) or begun or (self._reference is None and not adapted):
            return []
        found = [readout for regularizer in self.regularizers for readout in regularizer.cards_readouts]
        return [readout for readout in dict.fromkeys(found) if readout.canaries is not None]

    @property
    def reads_rollouts(self) -> bool:
        """Whether something of it travels with rollout batches."""
        return self.source == "rollout" and bool(self.regularizers)

    def precompute(self) -> None:
        """Scores of every row of the trainer's data sets on the reference, once, for `precompute_ref_log_probs=True`."""
        from tqdm.auto import tqdm

        if self.source != "cache" or not self._keyed:
            return
        trainer = self.trainer
        if self._reference is None and not has_adapters(trainer.model) and trainer.state.global_step > 0:
            raise ValueError(
                f"`precompute_ref_log_probs` is True and the trainer has made {trainer.state.global_step} steps – expected a "
                "fresh one: there is no reference model any more, and the trained policy would be taken for it. Attach before "
                "training, or pass `reference=`."
            )
        held_out = (
            trainer.eval_dataset if isinstance(trainer.eval_dataset, Mapping) else {"eval": trainer.eval_dataset}
        )
        size = trainer.args.per_device_train_batch_size
        self._cache = {}
        with self._reference_model() as model, trainer.accelerator.autocast():
            for name, dataset in {"train": trainer.train_dataset, **held_out}.items():
                if dataset is None:
                    continue
                for start in tqdm(range(0, len(dataset), size), desc=f"Reference scores ({name})", leave=False):
                    rows = [dataset[i] for i in range(start, min(start + size, len(dataset)))]
                    batch = trainer.data_collator(rows)
                    ids = batch["input_ids"].to(trainer.accelerator.device)
                    mask = batch["attention_mask"].to(ids.device).bool()
                    if self.causes.reach is not None and ids.shape[1] >= self.causes.reach:
                        raise ValueError(
                            f"`precompute_ref_log_probs` is True and a row of `{name}` has {ids.shape[1]} tokens, where rotary "
                            f"positions look at the longest row of a batch from {self.causes.reach} on – expected shorter rows: "
                            "the reference would be read beside other rows than the policy. Set "
                            "`precompute_ref_log_probs=False`, or a smaller `max_length`."
                        )
                    scores = read_inputs(model, {"input_ids": ids, "attention_mask": mask.long()}, self._keyed)
                    for row in range(len(ids)):
                        found = {key: values[row][mask[row]].cpu() for key, values in scores.items()}
                        self._cache[_row_key(ids[row][mask[row]])] = found

    def window(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """The micro-batches of the coming optimizer step, on this rank: sequences are counted over all of them."""
        if self.source == "rollout" or not self.regularizers:
            return
        flags = sorted({regularizer.include_end_of_turn for regularizer in self.regularizers})
        units = [sum(int(counted(batch, self.marks, flag).any.sum()) for batch in batches) for flag in flags]
        accelerator = self.trainer.accelerator
        if accelerator.num_processes > 1:
            units = accelerator.reduce(torch.tensor(units, device=accelerator.device), "sum").tolist()
        self._units = dict(zip(flags, units, strict=True))

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """Records the reference's scores while a rollout batch is scored."""
        for tap in self._taps:
            tap.clear()
            tap.open = True
        self.policy_tap.keep_kind = "policy"  # no pass of a rollout has a gradient
        try:
            yield
        finally:
            for tap in self._taps:
                tap.open = False

    def add_reference(self, output: dict[str, Any]) -> dict[str, Any]:
        """The rollout batch with the reference's scores in it, so that they are shuffled and split along with it."""
        passes = [p for tap in self._taps for p in tap.take() if p.kind == "reference"]
        ids = input_ids(output)
        output = {**output, **self._shares(output)}
        if not self._keyed:
            return output
        if not passes or not torch.equal(torch.cat([_ids(p) for p in passes]), ids):
            raise RuntimeError(
                "The reference's passes over this rollout batch were not found – expected TRL to compute the "
                "reference's log-probs "
                f"on its {len(ids)} completions, as it does with `beta` above 0. Found {len(passes)} passes."
            )
        scores = {key: torch.cat([p.scores[key] for p in passes]) for key in self._keys.values()}
        self._check_rollout(output, scores)
        return {**output, **{REFERENCE_KEY + key: values for key, values in scores.items()}}

    def _shares(self, output: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Rows over rows that count, so that a mean over all rows of a rollout batch is one over those that have a token."""
        flags = sorted({regularizer.include_end_of_turn for regularizer in self.regularizers})
        rows = len(output["completion_ids"])
        device = output["completion_ids"].device
        counts = [rows, *(int(counted(output, self.marks, flag).any.sum()) for flag in flags)]
        accelerator = self.trainer.accelerator
        if accelerator.num_processes > 1:
            counts = accelerator.reduce(torch.tensor(counts, device=device), "sum").tolist()
        return {
            f"{SHARE_KEY}{int(flag)}": torch.full((rows,), counts[0] / max(own, 1), device=device)
            for flag, own in zip(flags, counts[1:], strict=True)
        }

    def _check_rollout(self, output: Mapping[str, Any], scores: Mapping[str, torch.Tensor]) -> None:
        """One row of the reference's scores, read again, at the first rollout and then every so many steps."""
        step = self.trainer.state.global_step
        if not self._due(step):
            return
        ids = input_ids(output)
        real = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1).bool()
        # A completion that TRL masks was read without its tokens: a row with one is none to check.
        own = output["completion_mask"].sum(1)
        place = int(torch.where(own > 0, real.sum(1), real.shape[1] + 1).argmin())
        line = ids[place][real[place]].cpu()[None]
        row = TokenBatch(line, torch.ones_like(line), torch.ones_like(line))
        every = real.to(next(iter(scores.values())).device)
        taken = {key: values[place][every[place]][1:] for key, values in scores.items()}
        spread = {key: values[every].double().std(0, correction=0) for key, values in scores.items()}
        if self.causes.padding and bool((~output["prompt_mask"].bool()).any()):
            taken = None  # type: ignore[assignment]  # the policy's pass feels the same padding
        with self._reference_model() as model, self.trainer.accelerator.autocast():
            self._require_canaries(model)
            self._reference_recheck(model, row, taken, spread, self.trainer.args)

    def _due(self, step: int) -> bool:
        """Whether a check is due at a step: at the first that is seen, and then every so many."""
        if not self.trainer.model.training or (self._checked >= 0 and step < self._checked + EVERY):
            return False
        self._checked = step
        return True

    def _require_canaries(self, model: nn.Module) -> None:
        """What could not be run when `attach` looked is looked at now."""
        for readout in self._pending:
            readout.check_canaries(model)
        self._pending = []

    def recheck(self) -> None:
        """Whether the reference still reads as it did; by all ranks together."""
        if self._keyed and self.source != "cache":
            with self._reference_model() as model, self.trainer.accelerator.autocast():
                self._reference_recheck.still(model)

    @contextmanager
    def passes(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Open while the trainer computes its loss on a batch; gives the batch that it shall do so on."""
        trainer = self.trainer
        training = trainer.model.training
        weights = self._weights()
        trainer_inputs = inputs
        precomputed = getattr(trainer, "precompute_ref_logps", None)
        self._early = {}
        self._look_again(inputs)
        for tap in self._taps:
            tap.clear()
            tap.open = True
        self.policy_tap.keep_kind = "policy" if training else "policy_no_grad"
        try:
            if self.source == "own" and any(weights[r] and r.references for r in self.regularizers):
                self._early = self._read_own(inputs)
            if any(weights[r] and r.per_pair for r in self.regularizers):
                trainer_inputs = self._with_reference_log_probs(inputs, weights)
                trainer.precompute_ref_logps = True
            for change in self._changes:
                change.open = training
            yield trainer_inputs
        finally:
            if precomputed is not None:
                trainer.precompute_ref_logps = precomputed
            for hooks in self._hooks:
                hooks.open = False

    def added(self, inputs: dict[str, Any], trainer_inputs: dict[str, Any], num_items: Any) -> torch.Tensor | None:
        """What is added to the loss that the trainer computed on a batch; logs metrics."""
        passes = [p for tap in self._taps for p in tap.take()]
        if any(change.fired == 0 for change in self._changes) and self.trainer.model.training:
            raise RuntimeError(
                f"The intervention at {', '.join(f'`{i.hook_point}`' for i in self.interventions)} changed nothing in the first "
                "training pass – expected its module to run in it. With `torch_compile`, attach before the first forward."
            )
        weights = self._weights()
        active = [r for r in self.regularizers if weights[r]]
        if not active and not self.monitors:
            return None
        batch = self._batch(inputs, trainer_inputs, passes, active)
        metrics: dict[str, torch.Tensor] = {}
        terms: dict[Regularizer, Term] = {}
        total: torch.Tensor | None = None
        with torch.autocast(batch.tokens(True).mask.device.type, enabled=False):
            for regularizer in active:
                if isinstance(regularizer, ExplainAway):
                    metrics |= self._unshifted(regularizer, batch)
                    continue
                term = terms[regularizer] = regularizer.compute(batch, weights[regularizer])
                counts = torch.ones_like(term.values, dtype=torch.bool)
                if not regularizer.per_pair:
                    counts = batch.tokens(regularizer.include_end_of_turn).any.to(term.values.device)
                found = {**term.metrics, "loss": term.values}
                metrics |= {f"interp/{regularizer.name}/{key}": values[counts] for key, values in found.items()}
                share = (term.values * counts).sum() * self._scale(regularizer, inputs, num_items, counts)
                total = share if total is None else total + share
            with torch.no_grad():
                for monitor in self.monitors:
                    metrics |= self._monitored(monitor, batch)
        means = self._log(metrics, {regularizer.name: weights[regularizer] for regularizer in active})
        for regularizer, term in terms.items():
            self._require_finite(regularizer, term, means.get(f"interp/{regularizer.name}/loss", 0.0))
        self._early, self._plain = {}, None
        return total

    def _weights(self) -> dict[Regularizer, float]:
        state = self.trainer.state
        return {r: r.weight * r.schedule.factor(state.global_step, state.max_steps) for r in self.regularizers}

    def _scale(
        self, regularizer: Regularizer, inputs: Mapping[str, Any], num_items: Any, counts: torch.Tensor
    ) -> float:
        """Factor of a micro-batch's sum, so that what all micro-batches and ranks add up to is the mean over the step's sequences
        that have a token which counts.

        What is per pair corrects the trainer's own loss, and weighs as that does: by the mean of the micro-batch.
        """
        trainer = self.trainer
        if not trainer.model.training or regularizer.per_pair:
            return 1 / max(int(counts.sum()), 1)
        steps, ranks = trainer.current_gradient_accumulation_steps, trainer.accelerator.num_processes
        flag = regularizer.include_end_of_turn
        if self.source == "rollout":
            everywhere = len(counts) * steps * ranks / float(inputs[f"{SHARE_KEY}{int(flag)}"][0])
        else:
            assert flag in self._units, "`get_batch_samples` comes before `compute_loss`"
            everywhere = self._units[flag]
        scaled = trainer.loss_is_scaled_for_ga
        if scaled is None:
            accepts = trainer.model_accepts_loss_kwargs and num_items is not None
            scaled = accepts or trainer.compute_loss_func is not None
        # Engines average gradients over ranks, and the trainer divides by the accumulation where the loss was not.
        return ranks * (1 if scaled else steps) / everywhere if everywhere else 0.0

    def _batch(
        self,
        inputs: dict[str, Any],
        trainer_inputs: dict[str, Any],
        passes: Sequence[Pass],
        active: Sequence[Regularizer],
    ) -> _Batch:
        ids = input_ids(inputs)
        here = [p for p in passes if p.input_ids is not None and torch.equal(p.input_ids.to(ids.device), ids)]
        policy = next((p for p in here if p.kind == self.policy_tap.keep_kind), None)
        points = {r.policy_point for r in active if r.policy_point} | {m.hook_point for m in self.monitors}
        if points and (policy is None or points - set(policy.activations)):
            missing = sorted(points - set(policy.activations if policy else ()))
            raise RuntimeError(
                f"Hook point{'s' if len(missing) > 1 else ''} {', '.join(f'`{point}`' for point in missing)} did not fire in the "
                f"policy's pass over this batch of {tuple(ids.shape)} tokens – expected a firing per pass. Either the model was "
                "compiled before the hooks were added (`torch_compile`: attach before the first forward, or turn it off), or a "
                "fused kernel replaces the module (turn it off, or read at a decoder layer)."
            )
        references = {} if self.source == "rollout" else self._early
        if self.source == "rollout":
            references = {
                key: inputs[REFERENCE_KEY + key] for key in self._keys.values() if REFERENCE_KEY + key in inputs
            }
        elif self.source == "pass":
            reference = next((p for p in here if p.kind == "reference"), None)
            references = reference.scores if reference is not None else self._early
        elif self.source == "cache" and self._keyed:
            references = self._cached(inputs)
        unread = [r for regularizer in active for r in regularizer.references if self._keys[r] not in references]
        if unread:
            raise RuntimeError(
                f"No reference scores of {', '.join(f'`{readout.name}`' for readout in unread)} for this batch of "
                f"{tuple(ids.shape)} tokens – expected a pass of the reference over just these tokens."
            )
        pairs = None
        if any(r.per_pair for r in active):
            pairs = self._pairs(inputs, trainer_inputs, policy)
        activations = policy.activations if policy is not None else {}
        found = {readout: references[key] for readout, key in self._keys.items() if key in references}
        made = _Batch(inputs, self.marks, activations, found, pairs)
        self._compare(made, activations, references)
        return made

    def _pairs(self, inputs: dict[str, Any], trainer_inputs: dict[str, Any], policy: Pass | None) -> Pairs:
        if policy is None or policy.log_probs is None:
            raise RuntimeError(
                "The policy's pass returned no `log_probs` – expected TRL's fused head, which DPO uses by default."
            )
        mask = inputs["completion_mask"]
        log_probs = policy.log_probs[:, -(mask.shape[1] - 1) :].sum(1)
        reference = torch.cat([trainer_inputs["ref_chosen_logps"], trainer_inputs["ref_rejected_logps"]])
        trainer = self.trainer
        kinds = list(zip(trainer.loss_types, trainer.loss_weights, strict=True))
        return Pairs(log_probs, reference, mask.sum(1), trainer.beta, kinds)

    def _with_reference_log_probs(
        self, inputs: dict[str, Any], weights: Mapping[Regularizer, float]
    ) -> dict[str, Any]:
        """The batch with the reference's log-probs in it, shifted by what is to be explained away."""
        trainer = self.trainer
        if trainer.precompute_ref_logps:
            log_probs = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        else:
            log_probs = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, inputs))
            ids = input_ids(inputs)
            for recorded in [p for tap in self._taps for p in tap.take()]:
                if recorded.kind == "reference" and torch.equal(_ids(recorded), ids):
                    self._early = recorded.scores
        self._plain = log_probs
        shifting = [r for r in self.regularizers if isinstance(r, ExplainAway) and weights[r]]
        references = self._cached(inputs) if self.source == "cache" else self._early
        for regularizer in shifting:
            found = {r: references[self._keys[r]] for r in regularizer.references}
            batch = _Batch(inputs, self.marks, {}, found, None)
            scores = regularizer.scores(batch)
            lengths = inputs["completion_mask"].sum(1)
            log_probs = log_probs - regularizer.shift(
                scores, lengths, trainer.beta, trainer.loss_types[0], weights[regularizer]
            )
        chosen, rejected = log_probs.chunk(2)
        return {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def _unshifted(self, regularizer: ExplainAway, batch: _Batch) -> dict[str, torch.Tensor]:
        """The concept's scores, and DPO's rewards as they are without any shift."""
        assert batch.pairs is not None
        assert self._plain is not None
        rewards = batch.pairs.beta * (batch.pairs.log_probs.detach() - self._plain)
        found: dict[str, torch.Tensor] = {}
        for what, values in {"score": regularizer.scores(batch), "rewards": rewards}.items():
            chosen, rejected = values.chunk(2)
            found |= {f"{what}/chosen": chosen, f"{what}/rejected": rejected, f"{what}/margins": chosen - rejected}
        found["rewards/accuracies"] = (found["rewards/margins"] > 0).float()
        return {f"interp/{regularizer.name}/{key}": values for key, values in found.items()}

    def _monitored(self, monitor: Readout, batch: _Batch) -> dict[str, torch.Tensor]:
        tokens = batch.tokens(monitor.include_end_of_turn)
        counts = tokens.any
        start: torch.Tensor | None = None
        if monitor in self._read_monitors.get("policy", {}):
            scores, start = (
                _tensor(self._read_monitors[side][monitor], counts) if side in self._read_monitors else None
                for side in ("policy", "reference")
            )
            assert scores is not None
        else:
            rows, mask = tokens.rows(monitor(batch.policy(monitor.hook_point, tokens).detach()))
            scores = monitor.pooled(rows, mask)  # (M,)
            if monitor in batch._references:
                before, _ = tokens.rows(batch.reference(monitor, tokens))
                start = monitor.pooled(before, mask)
        name = f"interp/{monitor.name}"
        found = {f"{name}/mean_score": scores[counts]}
        if self.kind == "DPO":
            half = len(scores) // 2
            found[f"{name}/mean_score_chosen"] = scores[:half][counts[:half]]
            found[f"{name}/mean_score_rejected"] = scores[half:][counts[half:]]
        if start is not None:
            found[f"{name}/drift"] = (scores - start)[counts]
        return found

    def _look_again(self, inputs: dict[str, Any]) -> None:
        """Before the trainer's passes: what has to be read by `read()`, since a pass of the trainer would be another reading, and
        a row that is compared with what is taken from these passes."""
        self._read_monitors, self._again = {}, {}
        if self.source == "rollout":  # see `_check_rollout`
            return
        if not self.monitors and not any(regularizer.references for regularizer in self.regularizers):
            return
        training = self.trainer.model.training
        own = [m for m in self.monitors if not self._behind(m)]
        if own and self._must_read(inputs):
            self._read_monitors = self._read_apart(inputs, own)
        if not self._due(self.trainer.state.global_step):
            return
        tokens = counted(inputs, self.marks, True)
        lines, counts = tokens.texts(input_ids(inputs), template=True)
        place = max(range(len(lines)), key=lambda i: sum(counts[i]), default=None)
        line, count = ([], []) if place is None else (lines[place], counts[place])
        if sum(count) < 2:  # a rank without such a row runs along
            line, count = [0, 0, 0], [False] * 3
        row = TokenBatch.from_ids([[]], [line], counts=[count])
        noisy = training and (self.causes.noise or self.causes.adapters)
        taken = [r for r in self._policy_recheck.readouts if r.name.removeprefix("policy:") not in
                 {m.name for m in self._read_monitors.get("policy", {})}]  # fmt: skip
        self._again = {"place": place, "row": row, "count": sum(count)}
        with self.trainer.accelerator.autocast():
            if taken and not noisy:
                found = read(self.trainer.model_wrapped, row, taken, reader="policy")
                self._again["policy"] = {name: scores.scores[scores.mask] for name, scores in found.items()}
            if self._keyed and self.source == "pass":
                with self._reference_model() as model:
                    self._require_canaries(model)
                    found = read(model, row, self._keyed, reader="reference")
                    self._again["reference"] = {name: scores.scores[scores.mask] for name, scores in found.items()}
                    self._reference_recheck(model, row)

    def _must_read(self, inputs: Mapping[str, Any]) -> bool:
        """Whether monitors have to be read apart from the trainer's pass over a batch; on one rank, so on all."""
        known = self.causes
        noisy = self.trainer.model.training and bool(known.noise or known.adapters)
        ids = input_ids(inputs)
        here = noisy or (known.reach is not None and ids.shape[1] >= known.reach)
        if not here and (self.marks.prefix or self.marks.dropped):
            tokens = counted(inputs, self.marks)
            here = bool(tokens.template.any()) or bool(self.marks.dropped)
        if not noisy and (self.marks.prefix or self.marks.dropped or known.reach is not None):
            here = any(of_all_ranks([here])[0])
        return here

    def _read_apart(
        self, inputs: Mapping[str, Any], monitors: Sequence[Readout]
    ) -> dict[str, dict[Readout, list[float | None]]]:
        """Monitors' scores per sequence by `read()`: of the policy, and of the reference where the trainer runs one."""
        found: dict[str, dict[Readout, list[float | None]]] = {"policy": {}}
        sides = [("policy", monitors)]
        if self.source == "pass":
            sides.append(("reference", [m for m in monitors if m in self._keys]))
        for flag in sorted({monitor.include_end_of_turn for monitor in monitors}):
            tokens = counted(inputs, self.marks, flag)
            lines, counts = tokens.texts(input_ids(inputs), dropped=self.marks.dropped)
            batch = TokenBatch.from_ids([[]] * len(lines), lines, counts=counts)
            for side, readouts in sides:
                mine = [m for m in readouts if m.include_end_of_turn == flag]
                if not mine:
                    continue
                self.own_forwards += 1
                with (
                    self.trainer.accelerator.autocast(),
                    self._reference_model()
                    if side == "reference"
                    else nullcontext(self.trainer.model_wrapped) as model,
                ):
                    scores = read(model, batch, mine, reader=side)
                found.setdefault(side, {}).update({m: m.score(scores[m.name]) for m in mine})
        return found

    def _compare(
        self, batch: _Batch, activations: Mapping[str, torch.Tensor], references: Mapping[str, torch.Tensor]
    ) -> None:
        """What was taken of a row beside what was read of it before the pass."""
        if not self._again:
            return
        again, self._again = self._again, {}
        tokens = batch.tokens(True)
        mine = tokens.sequence == again["place"]
        if "policy" in again:
            taken, spread = {}, {}
            for readout in self._policy_recheck.readouts:
                if readout.name in again["policy"] and readout.hook_point in activations and again["count"] > 1:
                    # The batch keeps this selection for its terms, so it is made with its graph.
                    scores = readout(batch.policy(readout.hook_point, tokens).detach())
                    taken[readout.name], spread[readout.name] = scores[mine], scores.double().std(0, correction=0)
            self._policy_recheck.require(self.trainer.model, taken, again["policy"], spread, self.trainer.args)
        if "reference" in again:
            taken, spread = {}, {}
            # Of what was read apart on both sides nothing is taken from the trainer's pass.
            terms = {readout for regularizer in self.regularizers for readout in regularizer.references}
            apart = {self._keys[m] for m in self._read_monitors.get("reference", {}) if m not in terms}
            for key, values in references.items():
                if key in again["reference"] and key not in apart and again["count"] > 1:
                    every = values.to(tokens.mask.device)[tokens.mask]
                    taken[key], spread[key] = every[mine], every.double().std(0, correction=0)
            model = self._reference if self._reference is not None else self.trainer.model
            self._reference_recheck.require(model, taken, again["reference"], spread, self.trainer.args)

    def _read_own(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        self.own_forwards += 1
        for_the_model = {key: value for key, value in inputs.items() if key not in NOT_FOR_THE_MODEL}
        with self._reference_model() as model, self.trainer.accelerator.autocast():
            return read_inputs(model, for_the_model, self._keyed)

    @contextmanager
    def _reference_model(self) -> Iterator[nn.Module]:
        wrapped = self._policy()
        if self._reference is None and not has_adapters(self.trainer.model):
            yield wrapped  # before training, in `precompute` alone: the policy is its own reference
            return
        with reference_pass(wrapped, self._reference) as model:
            yield model

    def _policy(self) -> nn.Module:
        """The policy as something that can be run: before training DeepSpeed has no engine, but for TRL's precomputation."""
        trainer = self.trainer
        if self.source != "cache" or self._reference is not None or not trainer.is_deepspeed_enabled:
            return trainer.model_wrapped
        if trainer._precompute_engine is None:  # TRL found its log-probs in a file
            from trl.models import prepare_deepspeed

            trainer._precompute_engine = prepare_deepspeed(trainer.model, trainer.accelerator)
        return trainer._precompute_engine

    def _cached(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        assert self._cache is not None, "`precompute` comes at `attach`"
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        found: dict[str, torch.Tensor] = {}
        for row in range(len(ids)):
            key = _row_key(ids[row][mask[row]])
            if key not in self._cache:
                raise RuntimeError(
                    "A row of this batch has no reference scores – expected every row to be among those of `train_dataset` and "
                    "`eval_dataset` at `attach`. Attach after the data is final, or set `precompute_ref_log_probs=False`."
                )
            for name, values in self._cache[key].items():
                if name not in found:
                    found[name] = torch.zeros(*ids.shape, values.shape[-1], device=ids.device)
                found[name][row][mask[row]] = values.to(ids.device)
        return found

    def _require_finite(self, regularizer: Regularizer, term: Term, mean: float) -> None:
        """Judged by the mean over all ranks, so that all of them raise where one has to."""
        if not math.isfinite(mean):
            here = bool(torch.isfinite(term.values).all())
            what = "not a number on another rank" if here else f"{term.values.detach().tolist()} on this batch"
            raise ValueError(
                f"Regularizer `{regularizer.name}` is {what} – expected finite numbers. The activations or the weight are too "
                "large; a run with such a loss is lost."
            )

    def _log(self, metrics: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> dict[str, float]:
        """Means over the sequences of all ranks, into TRL's own averages too: one collective."""
        means: dict[str, float] = {}
        mode = "train" if self.trainer.model.training else "eval"
        if metrics:
            sums = torch.stack([values.detach().float().sum() for values in metrics.values()])
            counts = torch.tensor([len(values) for values in metrics.values()], device=sums.device, dtype=sums.dtype)
            accelerator = self.trainer.accelerator
            both = torch.stack([sums, counts])
            if accelerator.num_processes > 1:
                both = accelerator.reduce(both, "sum")
            for name, (total, count) in zip(metrics, both.T.tolist(), strict=True):
                if count:
                    means[name] = total / count
                    self.trainer._metrics[mode][name].append(means[name])
        for name, weight in weights.items():
            self.trainer._metrics[mode][f"interp/{name}/weight"].append(weight)
        return means


def _tensor(values: Sequence[float | None], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor([math.nan if value is None else value for value in values], device=like.device)


def has_its_own_passes(source: Source) -> bool:
    """Whether the trainer itself runs the reference."""
    return source in ("pass", "rollout")


def _ids(recorded: Pass) -> torch.Tensor:
    if recorded.input_ids is None:
        raise RuntimeError(
            "A pass was fed embeddings – expected token ids: without them no score can be matched to its token."
        )
    return recorded.input_ids


def _row_key(ids: torch.Tensor) -> bytes:
    return bytes(ids.cpu().to(torch.int64).numpy().tobytes())
