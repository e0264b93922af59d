"""`attach`: adds rewards, regularizers, interventions, monitors, measures and drift to a built trainer, in one call.

In: a trainer of TRL (or, for drift alone, of transformers). Out: the same trainer with our hooks, and an `Attachment`. It must
not know how scores are read, nor the formulas of terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from .concepts.card import load_card
from .concepts.causal_table import causal_table
from .concepts.readout import Readout, same_artifact
from .drift.callback import DriftCallback
from .drift.config import DriftConfig, whole_number
from .messages import as_list
from .runlog.events import TableEvent
from .runlog.recorder import record
from .training.checkpoints import (
    ResumeCallback,
    prompts_of,
    require_aligned_saves,
    save_multiple,
)
from .training.make import make_intervention, make_regularizer
from .training.mixin import LossMixin, with_mixin
from .training.reference import (
    check_claims,
    check_rollout_claims,
    reference_of,
    reference_of_loss,
    reference_source,
    trainer_kind,
    unproved_claims,
)
from .training.refusals import refuse_noise, refuse_pieces, refuse_rollouts, refuse_terms, refuse_turns
from .training.rewards import ConceptReward
from .training.rollout import Rollout
from .training.terms.loss import LossTerms, RolloutTerms
from .training.terms.reference_scores import SCORES
from .training.trl import ROLLOUT_KINDS, callbacks_of, without_callbacks
from .training.watch import FirstPassCheck, RolloutWatch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from transformers import TrainerCallback

    from .concepts.card import LoadedCard
    from .runlog.log import RunLog
    from .training.interventions import TrainingIntervention
    from .training.rollout import Reader
    from .training.terms.term import Term

Measure = Callable[[str], float]


class Attachment:
    """The parts that `attach` added to a trainer.

    Attributes:
        trainer (`Trainer`): the trainer, now of a subclass of its class.
        rollout (`Rollout`, *optional*): reads its rollout batches; `own_forwards` counts the readings that needed a
            forward pass of our own. None if nothing is read on rollouts.
        terms (`LossTerms`, *optional*): terms, monitors and interventions in its loss; `own_forwards` counts as above. None if
            there are none.
        run_log (`RunLog`): the run log that takes the events.
    """

    def __init__(
        self,
        trainer: Any,
        rollout: Rollout | None,
        terms: LossTerms | None,
        run_log: RunLog,
        stock: type | None,
        callbacks: Sequence[TrainerCallback],
    ):
        self.trainer = trainer
        self._callbacks = list(callbacks)
        self.rollout = rollout
        self.terms = terms
        self.run_log = run_log
        self._stock = stock

    def detach(self) -> None:
        """Remove hooks, callbacks and mixin. Rewards stay in `reward_funcs` and raise when they are called."""
        for part in (self.rollout, self.terms):
            if part is not None:
                part.remove()
        self.trainer.interp_terms = self.trainer.interp_rollout = None
        self.trainer.interp_attached = False
        for function in getattr(self.trainer, "reward_funcs", []):
            if isinstance(function, ConceptReward):
                function.bind(None)
        for callback in self._callbacks:
            self.trainer.remove_callback(callback)
        self._callbacks = []
        if self._stock is not None:
            self.trainer.__class__ = self._stock
        self.rollout = self.terms = self._stock = None


def attach(
    trainer: Any,
    *,
    regularizers: Sequence[Term | Mapping[str, Any] | str | Path] = (),
    interventions: Sequence[TrainingIntervention | Mapping[str, Any]] = (),
    monitors: Sequence[str | Path | Readout] = (),
    measures: Mapping[str, Measure] | None = None,
    drift: DriftConfig | Mapping[str, Any] | None = None,
    reference: torch.nn.Module | None = None,
    run_log: str | Path | None = None,
    arm: str = "",
    samples_every: int = 10,
) -> Attachment:
    """Add concepts to a built trainer: rewards, regularizers, interventions, monitors, measures and drift.

    Every `ConceptReward` among the trainer's `reward_funcs` is bound to it. Call it once, before `trainer.train()`.
    `trainer.train(resume_from_checkpoint=True)` then takes the last checkpoint that is complete. If it raises, the trainer's
    class, callbacks and loss are as they were.

    Args:
        trainer (`DPOTrainer`, `KTOTrainer`, `SFTTrainer`, `GRPOTrainer` or `RLOOTrainer`): for `drift` alone, any trainer of TRL
            or transformers.
        regularizers (`Sequence`): terms that join the loss: objects, mappings as in a recipe, or cards, each of which is then a
            `ConceptAnchor` with the card's weight. See `interp_rlhf.training.terms`.
        interventions (`Sequence`): changes of the policy's training forward (SFT, DPO, KTO): objects, or mappings as in a recipe.
        monitors (`Sequence`): cards (or readouts) that are scored and logged as `interp/<card>/mean_score`; they never touch
            reward or loss. On GRPO and RLOO they read every rollout (with `interp/<card>/std`), and the holdouts that the
            cards of rewards name are added. On DPO, KTO and SFT they read the policy in its own training pass, and its
            drift if the trainer runs its reference anyway.
        measures (`dict[str, Callable]`, *optional*): independent measures of a completion's text, logged as
            `interp/measure/<name>/mean`: a text to a float. On rollouts.
        drift (`DriftConfig`, or a mapping of its fields, *optional*): adds a `DriftCallback` with the same monitors.
        reference (`nn.Module`, *optional*): the frozen reference, if the trainer has none (GRPO at β = 0, SFT, without
            PEFT). Without it, the present policy is copied, with which training begins.
        run_log (`str` or `Path`, *optional*): `interp.jsonl` in the trainer's output folder by default.
        arm (`str`): name of this run in a comparison of several runs.
        samples_every (`int`, defaults to 10): rollout batches between two samples of completions in the run log.

    Returns:
        `Attachment`: the added parts, with `detach()`.

    Raises:
        `ValueError`: the trainer is attached already or cannot take an argument, a readout was made on another model, or a
            setting would make scores or gradients wrong. The message names the problem and says what to do.

    Example:
        >>> from interp_rlhf import attach
        >>> attachment = attach(dpo_trainer, regularizers=["warmth.yaml"], monitors=["witness.yaml"])
        >>> [term.name for term in attachment.terms.terms]
        ['anchor_warmth']
    """
    plan = Plan.of(
        trainer, regularizers=regularizers, interventions=interventions, monitors=monitors, measures=measures, drift=drift,
        reference=reference, run_log=run_log, arm=arm, samples_every=samples_every,
    )  # fmt: skip
    return plan.apply()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The resolved arguments of `attach`. The trainer is not changed yet.

    Attributes:
        trainer (`Trainer`), kind (`str`, *optional*): the trainer; see `reference.trainer_kind`.
        terms, interventions, rewards (`list`): terms and interventions in the loss, and concept rewards.
        watched (`dict[Readout, str]`): monitors, each with the model that it is read on in rollouts.
        cards (`list[LoadedCard]`): cards of the monitors.
        drift (`DriftConfig`, *optional*): configuration of the drift callback.
        pushed (`dict[Readout, int]`): readouts that training pushes: +1 up, −1 down.
        holdouts (`dict[str, int]`): names of the rewards' holdouts, with the expected sign.
        measures, reference, run_log, arm, samples_every: as in `attach`.
    """

    trainer: Any
    kind: str | None
    terms: list[Term]
    interventions: list[TrainingIntervention]
    rewards: list[ConceptReward]
    watched: dict[Readout, Reader]
    cards: list[LoadedCard]
    drift: DriftConfig | None
    pushed: dict[Readout, int]
    holdouts: dict[str, int]
    measures: dict[str, Measure]
    reference: Any
    run_log: str | Path | None
    arm: str
    samples_every: int

    @classmethod
    def of(cls, trainer: Any, **asked: Any) -> Plan:
        """Resolve the arguments of `attach`.

        Raises:
            `ValueError`: see `attach`.
        """
        if getattr(trainer, "interp_attached", False):
            raise ValueError("The trainer is attached already – expected one call of `attach`. Pass everything to it.")
        _refuse_settings(asked["measures"], samples_every := whole_number("samples_every", asked["samples_every"]))
        rewards = [f for f in getattr(trainer, "reward_funcs", []) if isinstance(f, ConceptReward)]
        monitors = as_list(asked["monitors"])
        cards = _with_holdouts([load_card(m) for m in monitors if not isinstance(m, Readout)], rewards)
        watched: dict[Readout, Reader] = {m: "reference" for m in monitors if isinstance(m, Readout)}
        watched |= {Readout.from_card(c): "policy" if c.card.reader == "policy" else "reference" for c in cards}
        terms = [make_regularizer(one, trainer.model) for one in as_list(asked["regularizers"])]
        plan = cls(
            trainer=trainer, kind=trainer_kind(trainer), terms=terms,
            interventions=[make_intervention(one) for one in as_list(asked["interventions"])], rewards=rewards,
            watched=watched, cards=cards, drift=_drift_config(asked["drift"]), pushed=_pushed(rewards, terms),
            holdouts=_holdouts(rewards, terms) if asked["drift"] is not None else {}, measures=dict(asked["measures"] or {}),
            reference=asked["reference"], run_log=asked["run_log"], arm=asked["arm"], samples_every=samples_every,
        )  # fmt: skip
        plan.refuse()
        return plan

    @property
    def has_rollouts(self) -> bool:
        """True if the trainer generates what it trains on."""
        return self.kind in ROLLOUT_KINDS

    @property
    def reads_rollouts(self) -> bool:
        """True if something is read on rollouts."""
        return bool(self.rewards or self.measures or (self.watched and (self.kind is None or self.has_rollouts)))

    def refuse(self) -> None:
        """Raises `ValueError` if this trainer cannot take a part of the plan."""
        trainer, drift = self.trainer, self.drift
        if self.reads_rollouts:
            refuse_rollouts(trainer, self.kind, self.rewards, self.watched)
        refuse_terms(trainer, self.kind, self.terms, list(self.watched), self.interventions)
        if not self.has_rollouts:
            return
        prompts = prompts_of(trainer)
        require_aligned_saves(trainer.args, trainer.args.save_steps, prompts)
        if drift is not None and drift.on_verdict == "stop" and drift.every % save_multiple(trainer.args, prompts):
            raise ValueError(
                f"`on_verdict` is `stop` and `every` of the drift configuration is {drift.every} – expected a multiple of "
                f"{save_multiple(trainer.args, prompts)}: each evaluation without an alarm saves a checkpoint, and only there "
                "can a run with these generation settings be resumed."
            )

    def apply(self) -> Attachment:
        """Apply the plan to the trainer. If a step raises, the earlier steps are rolled back.

        Raises:
            `ValueError`: the reference, a readout's model or the data does not fit.
        """
        trainer = self.trainer
        known = callbacks_of(trainer)
        with ExitStack() as undo:
            undo.callback(without_callbacks, trainer, known)
            cards = [*(r.card for r in self.rewards if r.card), *self.cards]
            tables = [
                TableEvent(**causal_table(c.card.name, c.card.causal)) for c in cards if c.card.causal is not None
            ]
            log = record(trainer, self.run_log, cards, self.arm, tables)
            drift = self._drift_callback(log)
            terms = self._loss_terms(undo)
            rollout = self._rollout() if self.reads_rollouts else None
            undo.pop_all()
        stock = None
        if (rollout is not None or terms is not None or self.kind is not None) and not isinstance(trainer, LossMixin):
            stock = type(trainer)
            trainer.__class__ = with_mixin(stock, self.has_rollouts)
        parts = self._listen(rollout, drift, log) if rollout is not None else {}
        if drift is not None:
            if terms is not None:
                drift.rechecks.append(terms.recheck)
            trainer.add_callback(drift)  # before `ResumeCallback`, which saves counters that drift uses up
        if self.kind is not None:
            trainer.interp_terms, trainer.interp_attached = terms, True
            trainer.add_callback(ResumeCallback(parts, aligned=self.has_rollouts, prompts=prompts_of(trainer)))
        added = [callback for callback in callbacks_of(trainer) if callback not in known]
        return Attachment(trainer, rollout, terms, log, stock, added)

    def _listen(self, rollout: Rollout, drift: DriftCallback | None, log: RunLog) -> dict[str, RolloutWatch]:
        """Bind the rewards to the rollouts and watch the rollouts. Returns the parts that a checkpoint must keep."""
        trainer, rewards = self.trainer, self.rewards
        watch = RolloutWatch(trainer, rollout, self.watched, self.measures, log, self.samples_every)
        trainer.interp_rollout, trainer.interp_watchers = rollout, [watch]
        trainer.interp_abstaining = [index for index, f in enumerate(trainer.reward_funcs) if f in rewards]
        if drift is not None:
            drift.batches = watch.moved
            drift.rechecks.append(rollout.recheck)
        trainer.add_callback(FirstPassCheck(rollout))
        for reward in rewards:
            reward.bind(rollout)
        if trainer.args.reward_weights is None:  # a card's weight counts if the user has set none
            for index, function in enumerate(trainer.reward_funcs):
                if function in rewards:
                    trainer.reward_weights[index] = function.weight
        return {"rollouts": watch}

    def _drift_callback(self, log: RunLog) -> DriftCallback | None:
        """The callback that watches the monitors and the pushed readouts."""
        if self.drift is None:
            return None
        readouts = {readout.name: readout for readout in (*self.pushed, *self.watched)}
        pressure = {readout.name: sign for readout, sign in self.pushed.items()}
        holdouts = dict(self.holdouts)
        for monitor in self.watched:
            signs = [sign for readout, sign in self.pushed.items() if same_artifact(monitor, readout)]
            if signs:  # training pushes this claim too: it is the same artifact under another name
                pressure[monitor.name] = signs[0]
                holdouts.pop(monitor.name, None)
        reference = self.reference if self.reference is not None else getattr(self.trainer, "ref_model", None)
        return DriftCallback(
            self.trainer, monitors=list(readouts.values()), pressure=pressure, holdouts=holdouts, config=self.drift,
            run_log=log.path, reference=reference,
        )  # fmt: skip

    def _loss_terms(self, undo: ExitStack) -> LossTerms | None:
        """Terms, monitors and interventions in the loss. Their hooks are on the model; `undo` removes them."""
        trainer, kind = self.trainer, self.kind
        monitors = [] if self.has_rollouts else list(self.watched)
        if not self.terms and not monitors and not self.interventions:
            return None
        active = [term for term in self.terms if term.weight != 0]
        users = [term.name for term in active if term.reference_readouts]
        reference = reference_of_loss(trainer, kind, self.reference, users)
        claims = [readout for part in (*self.terms, *self.interventions) for readout in part.claims]
        check_claims(trainer, kind, reference, [*claims, *monitors])
        unproved = unproved_claims(trainer, reference, [readout for term in active for readout in term.claims])
        scores = SCORES[reference_source(trainer, kind)](trainer, reference)
        make = RolloutTerms if self.has_rollouts else LossTerms
        terms = make(trainer, self.terms, monitors, self.interventions, scores, unproved, paired=kind == "DPO")
        undo.callback(terms.remove)
        refuse_noise(trainer, terms.terms, terms.causes)
        if kind in ("DPO", "KTO") and (terms.terms or monitors):
            refuse_turns(trainer, terms.marks)
        if kind == "SFT" and (terms.terms or monitors):
            refuse_pieces(trainer, terms.marks)
        terms.precompute()
        return terms

    def _rollout(self) -> Rollout:
        """The reader of the rollouts."""
        trainer = self.trainer
        readouts: dict[Reader, list[Readout]] = {"reference": [], "policy": []}
        for reward in self.rewards:
            for reader in reward.readers:
                readouts[reader].append(reward.readout)
        for monitor, reader in self.watched.items():
            readouts[reader].append(monitor)
        reference = reference_of(trainer, self.reference, needed=bool(readouts["reference"]))
        for readout in readouts["policy"]:
            readout.check_model(trainer.model, exact=False, trained=trainer.state.global_step > 0)
        if readouts["reference"]:
            check_rollout_claims(trainer, reference, readouts["reference"])
        return Rollout(trainer, readouts, reference)


def _refuse_settings(measures: Any, samples_every: int) -> None:
    if measures is not None and not isinstance(measures, Mapping):
        raise ValueError(
            f"`measures` is {measures!r} – expected a mapping of names to functions of a text: `{{'length': len}}`."
        )
    if samples_every < 1:
        raise ValueError(f"`samples_every` is {samples_every} – expected a number of rollout batches, at least 1.")


def _drift_config(drift: Any) -> DriftConfig | None:
    if drift is None or isinstance(drift, DriftConfig):
        return drift
    known = sorted(field.name for field in fields(DriftConfig))
    if not isinstance(drift, Mapping) or not set(drift) <= set(known):
        raise ValueError(
            f"`drift` is {drift!r} – expected a `DriftConfig`, or a mapping of its fields: "
            f"{', '.join(f'`{name}`' for name in known)}."
        )
    return DriftConfig(**drift)


def _pushed(rewards: Sequence[ConceptReward], terms: Sequence[Term]) -> dict[Readout, int]:
    """Readouts that training pushes: +1 up, −1 down."""
    pushed = {reward.readout: 1 if reward.role == "reward" else -1 for reward in rewards}
    for term in terms:
        pushed |= term.pushes()
    return pushed


def _holdouts(rewards: Sequence[ConceptReward], terms: Sequence[Term]) -> dict[str, int]:
    """Names of the rewards' holdouts, with the direction in which each follows an honest reward.

    Raises:
        `ValueError`: a holdout has the artifact of a term.
    """
    claims = [readout for term in terms for readout in term.claims]
    holdouts: dict[str, int] = {}
    for reward in rewards:
        for card in _with_holdouts([], [reward]):
            holdout = Readout.from_card(card)
            if shared := [readout.name for readout in claims if same_artifact(holdout, readout)]:
                raise ValueError(
                    f"The holdout `{card.path}` has the artifact of `{shared[0]}`, which is in a regularizer – expected another "
                    "one: a readout that training touches cannot be its own witness."
                )
            holdouts[card.card.name] = 1 if reward.role == "reward" else -1
    return holdouts


def _with_holdouts(cards: list[LoadedCard], rewards: Sequence[ConceptReward]) -> list[LoadedCard]:
    """Monitors, and the holdouts that the rewards' cards name, each once.

    Raises:
        `ValueError`: a holdout shares its artifact with a reward. It would move with the reward and prove nothing.
    """
    paid = {
        reward.card.card.readout.artifact.sha256: reward.card.path for reward in rewards if reward.card is not None
    }
    named = []
    for reward in rewards:
        for name in reward.card.card.holdouts if reward.card is not None else ():
            assert reward.card is not None
            holdout = load_card(reward.card.path.parent / name)
            if (shared := paid.get(holdout.card.readout.artifact.sha256)) is not None:
                raise ValueError(
                    f"The holdout `{holdout.path}` has the artifact of the reward `{shared}` – expected another one, fitted "
                    "on other data or at another layer: a readout that training pushes cannot be its own witness."
                )
            named.append(holdout)
    return list({card.sha256: card for card in [*cards, *named]}.values())
