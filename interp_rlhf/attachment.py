"""The one-line door: puts rewards, regularizers, interventions, monitors, measures and drift onto a trainer that is built.

In: a trainer of TRL (or, for drift alone, of transformers). Out: the same trainer, listened to, and an `Attachment`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback

from .activations.hook_points import has_adapters
from .activations.ranks import of_all_ranks
from .activations.read import reference_pass
from .concepts.card import load_card
from .concepts.readout import Readout, same_artifact
from .drift.callback import DriftCallback
from .drift.config import DriftConfig, whole_number
from .drift.own_text import values_of
from .messages import as_list, completion_text, prompt_text
from .runlog.recorder import record
from .training.checkpoints import (
    ResumeCallback,
    prompts_of,
    require_aligned_saves,
    save_multiple,
)
from .training.interventions import make_intervention
from .training.loss_terms import LossTerms, reference_source, trainer_kind
from .training.mixin import LossMixin, with_mixin
from .training.reference import kl_option, reference_of, warn_of_other_start
from .training.refusals import refuse_noise, refuse_pieces, refuse_terms, refuse_turns
from .training.regularizers import ConceptPenalty, ExplainAway, make_regularizer
from .training.rewards import ConceptReward
from .training.rollout import Rollout

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from .concepts.card import LoadedCard
    from .runlog.log import RunLog
    from .training.interventions import TrainingIntervention
    from .training.regularizers import Regularizer
    from .training.rollout import Reader

logger = logging.getLogger(__name__)

SAMPLE_ROWS = 4
WITHIN_GROUP = 0.02
MOVED_BATCHES = 3
Measure = Callable[[str], float]


class Attachment:
    """What `attach` put onto a trainer.

    Attributes:
        trainer (`Trainer`): the trainer, now of a subclass of its class.
        rollout (`Rollout`, *optional*): reads its rollout batches; `own_forwards` counts the readings that needed a
            forward pass of our own. None where nothing is read on rollouts.
        terms (`LossTerms`, *optional*): what joins its loss; `own_forwards` counts as above. None where nothing does.
        run_log (`RunLog`): where events go.
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
        """Take hooks, callbacks and mixin off again. Rewards stay in `reward_funcs` and raise when they are called."""
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
    regularizers: Sequence[Regularizer | Mapping[str, Any] | str | Path] = (),
    interventions: Sequence[TrainingIntervention | Mapping[str, Any]] = (),
    monitors: Sequence[str | Path | Readout] = (),
    measures: Mapping[str, Measure] | None = None,
    drift: DriftConfig | Mapping[str, Any] | None = None,
    reference: torch.nn.Module | None = None,
    run_log: str | Path | None = None,
    arm: str = "",
    samples_every: int = 10,
) -> Attachment:
    """Put concepts into the training of a built trainer: rewards, regularizers, interventions, and what only watches.

    Every `ConceptReward` among the trainer's `reward_funcs` is bound to it. Call it once, before `trainer.train()`.
    `trainer.train(resume_from_checkpoint=True)` then takes the last checkpoint that is complete.

    Args:
        trainer (`DPOTrainer`, `KTOTrainer`, `SFTTrainer`, `GRPOTrainer` or `RLOOTrainer`): for `drift` alone, any trainer of TRL
            or transformers.
        regularizers (`Sequence`): terms that join the loss: objects, mappings as in a recipe, or cards, each of which is then a
            `ConceptAnchor` with the card's weight. See `interp_rlhf.training.regularizers`.
        interventions (`Sequence`): changes of the policy's training forward (SFT, DPO, KTO): objects, or mappings as in a recipe.
        monitors (`Sequence`): cards (or readouts) that are scored and logged as `interp/<card>/mean_score`; they never touch
            reward or loss. On GRPO and RLOO they read every rollout (with `interp/<card>/std`), and the holdouts that the
            cards of rewards name are added. On DPO, KTO and SFT they read the policy in its own training pass, and its
            drift where the trainer runs its reference anyway.
        measures (`dict[str, Callable]`, *optional*): independent measures of a completion's text, logged as
            `interp/measure/<name>/mean`: a text to a float. On rollouts.
        drift (`DriftConfig`, or a mapping of its fields, *optional*): adds a `DriftCallback` with the same monitors.
        reference (`nn.Module`, *optional*): the frozen reference, where the trainer has none (GRPO at β = 0, SFT, without
            PEFT). Without it, the policy as it is now is copied: what training begins with.
        run_log (`str` or `Path`, *optional*): `interp.jsonl` in the trainer's output folder by default.
        arm (`str`): name of this run where several are compared.
        samples_every (`int`, defaults to 10): rollout batches between two that leave sample completions in the run log.

    Raises:
        `ValueError`: attached already, a trainer that has no place for what is asked, a readout that was made on another model,
            or a setting under which scores or gradients would be wrong; the message says which and what to do.
    """
    if getattr(trainer, "interp_attached", False):
        raise ValueError("The trainer is attached already – expected one call of `attach`. Pass everything to it.")
    if measures is not None and not isinstance(measures, Mapping):
        raise ValueError(
            f"`measures` is {measures!r} – expected a mapping of names to functions of a text: `{{'length': len}}`."
        )
    samples_every = whole_number("samples_every", samples_every)
    if samples_every < 1:
        raise ValueError(f"`samples_every` is {samples_every} – expected a number of rollout batches, at least 1.")
    drift = _drift_config(drift)
    kind = trainer_kind(trainer)
    rollouts = kind in ("GRPO", "RLOO")
    terms_wanted = [make_regularizer(given, trainer.model) for given in as_list(regularizers)]
    changes = [make_intervention(given) for given in as_list(interventions)]
    monitors = as_list(monitors)
    rewards = [f for f in getattr(trainer, "reward_funcs", []) if isinstance(f, ConceptReward)]
    cards = _with_holdouts([load_card(m) for m in monitors if not isinstance(m, Readout)], rewards)
    watched: dict[Readout, Reader] = {m: "reference" for m in monitors if isinstance(m, Readout)}
    watched |= {Readout.from_card(c): "policy" if c.card.reader == "policy" else "reference" for c in cards}
    reads_rollouts = bool(rewards or measures or (watched and kind in (None, "GRPO", "RLOO")))
    if reads_rollouts:
        _refuse(trainer, rewards, watched)
    refuse_terms(trainer, kind, terms_wanted, list(watched), changes)
    if rollouts:
        prompts = prompts_of(trainer)
        require_aligned_saves(trainer.args, trainer.args.save_steps, prompts)
        if drift is not None and drift.on_verdict == "stop" and drift.every % save_multiple(trainer.args, prompts):
            raise ValueError(
                f"`on_verdict` is `stop` and `every` of the drift configuration is {drift.every} – expected a multiple of "
                f"{save_multiple(trainer.args, prompts)}: each evaluation without an alarm saves a checkpoint, and only there "
                "can a run with these generation settings be resumed."
            )
    # Everything that can refuse comes before the trainer is touched, and what was done is undone where something does, so that a
    # corrected call finds it as it was.
    known = list(trainer.callback_handler.callbacks)
    with ExitStack() as undo:
        undo.callback(_forget_callbacks, trainer, known)
        log = record(trainer, run_log, [*(r.card for r in rewards if r.card), *cards], arm)
        callback = _drift_callback(trainer, drift, rewards, terms_wanted, list(watched), reference, log)
        terms = _terms(trainer, terms_wanted, [] if rollouts else list(watched), changes, reference)
        if terms is not None:
            undo.callback(terms.remove)
        rollout = _rollout(trainer, rewards, watched, reference) if reads_rollouts else None
        undo.pop_all()
    stock = None
    if (rollout is not None or terms is not None or kind is not None) and not isinstance(trainer, LossMixin):
        stock = type(trainer)
        trainer.__class__ = with_mixin(stock, rollouts)
    parts = {}
    if rollout is not None:
        watch = _Watch(trainer, rollout, rewards, watched, dict(measures or {}), log, samples_every)
        trainer.interp_rollout, trainer.interp_watchers = rollout, [watch]
        trainer.interp_abstaining = [index for index, f in enumerate(trainer.reward_funcs) if f in rewards]
        parts["rollouts"] = watch
        if callback is not None:
            callback.batches = watch.moved
            callback.rechecks.append(rollout.recheck)
        trainer.add_callback(_FirstPassCheck(rollout))
        for reward in rewards:
            reward.bind(rollout)
        _apply_weights(trainer, rewards)
    if callback is not None:
        if terms is not None:
            callback.rechecks.append(terms.recheck)
        trainer.add_callback(callback)  # before the one that keeps counters, since it uses some up
    if kind is not None:
        trainer.interp_terms, trainer.interp_attached = terms, True
        trainer.add_callback(ResumeCallback(parts, aligned=rollouts, prompts=prompts_of(trainer)))
    added = [own for own in trainer.callback_handler.callbacks if own not in known]
    return Attachment(trainer, rollout, terms, log, stock, added)


def _drift_config(given: Any) -> DriftConfig | None:
    if given is None or isinstance(given, DriftConfig):
        return given
    known = sorted(field.name for field in fields(DriftConfig))
    if not isinstance(given, Mapping) or not set(given) <= set(known):
        raise ValueError(
            f"`drift` is {given!r} – expected a `DriftConfig`, or a mapping of its fields: "
            f"{', '.join(f'`{name}`' for name in known)}."
        )
    return DriftConfig(**given)


def _forget_callbacks(trainer: Any, known: Sequence[TrainerCallback]) -> None:
    for callback in [own for own in trainer.callback_handler.callbacks if own not in known]:
        trainer.remove_callback(callback)


def _drift_callback(
    trainer: Any,
    drift: DriftConfig | None,
    rewards: Sequence[ConceptReward],
    regularizers: Sequence[Regularizer],
    monitors: Sequence[Readout],
    reference: Any,
    log: RunLog,
) -> DriftCallback | None:
    """The callback that watches the monitors, and what is trained beside them."""
    if drift is None:
        return None
    trained = _pressure(rewards, regularizers)
    readouts = {readout.name: readout for readout in (*trained, *monitors)}
    pressure = {readout.name: sign for readout, sign in trained.items()}
    claims = [readout for term in regularizers for readout in term.cards_readouts]
    holdouts = {}
    for reward in rewards:
        for card in _with_holdouts([], [reward]):
            own = Readout.from_card(card)
            if shared := [readout.name for readout in claims if same_artifact(own, readout)]:
                raise ValueError(
                    f"The holdout `{card.path}` has the artifact of `{shared[0]}`, which is in a regularizer – expected another "
                    "one: what is trained cannot be its own witness."
                )
            holdouts[card.card.name] = 1 if reward.role == "reward" else -1
    for monitor in monitors:
        signs = [sign for readout, sign in trained.items() if same_artifact(monitor, readout)]
        if signs:  # the same claim under another name is pushed along
            pressure[monitor.name] = signs[0]
            holdouts.pop(monitor.name, None)
    return DriftCallback(
        trainer, monitors=list(readouts.values()), pressure=pressure, holdouts=holdouts, config=drift, run_log=log.path,
        reference=reference if reference is not None else getattr(trainer, "ref_model", None),
    )  # fmt: skip


def _terms(
    trainer: Any,
    regularizers: Sequence[Regularizer],
    monitors: Sequence[Readout],
    interventions: Sequence[TrainingIntervention],
    reference: Any,
) -> LossTerms | None:
    if not regularizers and not monitors and not interventions:
        return None
    needed = any(r.references for r in regularizers if r.weight != 0)
    source = reference_source(trainer)
    if source == "pass" and reference is not None and reference is not trainer.ref_model:
        raise ValueError(
            f"`reference` was given to `attach` on a `{type(trainer).__name__}` – expected none: terms compare with the "
            "reference that "
            "its own loss runs, and no other model is run. Give it to the trainer (`ref_model`), or leave it out."
        )
    if source == "cache" and reference is None and trainer.ref_model is None and not has_adapters(trainer.model):
        needed_here = False  # before training the policy is its own reference
    else:
        needed_here = needed
    reference = reference_of(trainer, reference, needed_here)
    claims = [readout for regularizer in regularizers for readout in regularizer.cards_readouts]
    claims += [readout for intervention in interventions for readout in intervention.readouts]
    for readout in [*claims, *monitors]:
        if reference is not None:
            readout.check_model(reference)
        elif has_adapters(trainer.model):
            readout.check_model(trainer.model, exact=False, trained=trainer.state.global_step > 0)
        else:  # the policy is what the reference was, until training begins
            readout.check_model(trainer.model, exact=source == "cache", trained=trainer.state.global_step > 0)
    if needed and source == "pass":
        warn_of_other_start(trainer, reference)
    if source == "own" and needed and reference is None and _changes_already(trainer.model):
        logger.warning(
            "The model has an adapter that changes it already, and the reference is the base model without it: terms pull "
            "towards the base, not towards what this training began with. To hold the latter, merge the adapter first."
        )
    terms = LossTerms(trainer, regularizers, monitors, interventions, reference)
    try:
        refuse_noise(trainer, terms.regularizers, terms.causes)
        if terms.kind in ("DPO", "KTO") and (terms.regularizers or monitors):
            refuse_turns(trainer, terms.marks)
        if terms.kind == "SFT" and (terms.regularizers or monitors):
            refuse_pieces(trainer, terms.marks)
        terms.precompute()
    except BaseException:
        terms.remove()
        raise
    return terms


def _changes_already(model: torch.nn.Module) -> bool:
    """Whether a LoRA adapter is not the identity that it begins as."""
    return any(bool(value.detach().any()) for name, value in model.named_parameters() if ".lora_B." in name)


def _pressure(rewards: Sequence[ConceptReward], regularizers: Sequence[Regularizer]) -> dict[Readout, int]:
    """Readouts that training pushes, and where to: +1 up, −1 down."""
    found = {reward.readout: 1 if reward.role == "reward" else -1 for reward in rewards}
    for term in regularizers:
        if isinstance(term, ConceptPenalty):
            found[term.readout] = 1 if term.encourage else -1
        elif isinstance(term, ExplainAway):
            found[term.readout] = -1 if term.weight > 0 else 1
    return found


def _with_holdouts(cards: list[LoadedCard], rewards: Sequence[ConceptReward]) -> list[LoadedCard]:
    """Monitors, and the holdouts that the rewards' cards name, each once.

    Raises:
        `ValueError`: a holdout that shares its artifact with a reward: it would move along and prove nothing.
    """
    trained = {
        reward.card.card.readout.artifact.sha256: reward.card.path for reward in rewards if reward.card is not None
    }
    named = []
    for reward in rewards:
        for name in reward.card.card.holdouts if reward.card is not None else ():
            assert reward.card is not None
            holdout = load_card(reward.card.path.parent / name)
            if (shared := trained.get(holdout.card.readout.artifact.sha256)) is not None:
                raise ValueError(
                    f"The holdout `{holdout.path}` has the artifact of the reward `{shared}` – expected another one, fitted "
                    "on other data or at another layer: what is trained cannot be its own witness."
                )
            named.append(holdout)
    return list({card.sha256: card for card in [*cards, *named]}.values())


def _refuse(trainer: Any, rewards: Sequence[ConceptReward], monitors: Iterable[Readout]) -> None:
    """Everything under which a score would belong to other tokens, or to another model, than it says."""
    from trl import GRPOTrainer, RLOOTrainer

    if not isinstance(trainer, GRPOTrainer | RLOOTrainer):
        raise ValueError(
            f"The trainer is a `{type(trainer).__name__}` – expected a `GRPOTrainer` or `RLOOTrainer`: rewards and measures "
            "are read on rollouts, monitors on those or in the loss of DPO, KTO and SFT. For other trainers use "
            "`attach(trainer, drift=DriftConfig(…))` or `trainer.add_callback(DriftCallback(trainer, monitors=[…]))`."
        )
    read_here = [*(r.__name__ for r in rewards), *(m.name for m in monitors)]
    if not read_here:
        return
    names = ", ".join(f"`{name}`" for name in read_here)
    settings = {
        "tools": "tool results are in the completion, and reward functions are not told which tokens they are",
        "environment_factories": "observations are in the completion, and reward functions are not told where",
        "rollout_func": "its completions may hold tokens that the model did not write",
        "_is_vlm": "images would be missing from the reading",
    }
    for name, reason in settings.items():
        if getattr(trainer, name, None):
            raise ValueError(
                f"The trainer uses `{name.lstrip('_')}` – expected none where {names} are read: {reason}. Score these "
                "runs afterwards with `read`."
            )
    if getattr(trainer.args, "sync_ref_model", False):
        raise ValueError(
            f"`sync_ref_model` is True – expected False where {names} are read: the reference would move during the run, "
            "and the probe with it."
        )
    dense = [reward.__name__ for reward in rewards if reward.per_token is not None]
    if dense and not getattr(trainer, "takes_token_rewards", False):
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in dense)} rewards single tokens (`dense` or `shaping`), and the trainer is a "
            f"`{type(trainer).__name__}` – expected a `PPOTrainer`: the others take one number per completion. Use it, or leave "
            "`dense` and `shaping` out."
        )
    if rewards and trainer.beta == 0:
        logger.warning(
            "%s is 0: nothing holds the policy near its reference while it is paid for %s. Expect text that pleases the "
            "probe and nobody else; set `%s` (0.02 in the demo) or watch an independent measure closely.",
            kl_option(trainer),
            ", ".join(f"`{reward.__name__}`" for reward in rewards),
            kl_option(trainer),
        )


def _rollout(
    trainer: Any, rewards: Sequence[ConceptReward], watched: Mapping[Readout, Reader], reference: Any
) -> Rollout:
    readouts: dict[Reader, list[Readout]] = {"reference": [], "policy": []}
    for reward in rewards:
        for reader in reward.readers:
            readouts[reader].append(reward.readout)
    for monitor, reader in watched.items():
        readouts[reader].append(monitor)
    reference = reference_of(trainer, reference, needed=bool(readouts["reference"]))
    for readout in readouts["policy"]:
        readout.check_model(trainer.model, exact=False, trained=trainer.state.global_step > 0)
    if readouts["reference"]:
        begun = reference is None and "ref" in trainer.accelerator.unwrap_model(trainer.model).peft_config
        if begun:
            logger.warning(
                "The reference is the base model with the adapter `ref`, a copy of what training began with. Cards are fitted "
                "and checked on a model without adapters: their evidence is about another reading than this one."
            )
        with reference_pass(trainer.model, reference) as model:
            for readout in readouts["reference"]:
                readout.check_model(model, exact=not begun)
    return Rollout(trainer, readouts, reference)


def _apply_weights(trainer: Any, rewards: Sequence[ConceptReward]) -> None:
    """A card's weight counts where the user has set none."""
    if trainer.args.reward_weights is not None:
        return
    for index, function in enumerate(trainer.reward_funcs):
        if function in rewards:
            trainer.reward_weights[index] = function.weight


class _FirstPassCheck(TrainerCallback):
    """Stops a run before its first optimizer step where a hook point never fired."""

    def __init__(self, rollout: Rollout):
        self._rollout: Rollout | None = rollout

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._rollout is not None:
            self._rollout.policy_tap.require_fired()
            self._rollout = None


class _Watch:
    """Scores monitors and measures on a batch after its rewards, logs them, and leaves samples in the run log."""

    def __init__(
        self,
        trainer: Any,
        rollout: Rollout,
        rewards: Sequence[ConceptReward],
        monitors: Mapping[Readout, Reader],
        measures: Mapping[str, Measure],
        log: RunLog,
        samples_every: int,
    ):
        self._trainer, self._rollout, self._rewards = trainer, rollout, rewards
        self._monitors, self._measures = monitors, measures
        self._log, self._samples_every = log, samples_every
        self._batches = 0
        self._warned = False
        self._seen: dict[str, list[dict[str, Any]]] = {}
        self._usual: dict[str, float] = {}

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], rewards: torch.Tensor, trained: torch.Tensor
    ) -> None:
        found: dict[str, list[float | None]] = {}
        for readout, reader in self._monitors.items():
            found[readout.name] = self._rollout.values(readout, reader)
            self._metric(f"interp/{readout.name}/mean_score", found[readout.name], np.mean)
            self._metric(f"interp/{readout.name}/std", found[readout.name], np.std)
            self._remember(readout.name, found[readout.name], prompts, completions)
        texts = [completion_text(completion) for completion in completions]
        for name, measure in self._measures.items():
            found[name] = [None if v != v else v for v in values_of(name, measure, texts)]
            self._metric(f"interp/measure/{name}/mean", found[name], np.mean)
            self._metric(f"interp/measure/{name}/std", found[name], np.std)
        self._about_reward(trained, found)
        if not self._trainer.model.training:
            return  # evaluation: metrics, no samples of training
        if hasattr(self._trainer, "sample_scores"):  # it writes samples itself, token by token
            self._trainer.sample_scores = found
        elif self._batches % self._samples_every == 0 and self._log.writable:
            own = rewards[: len(prompts)]  # rank 0 writes, and its rows come first
            for index, name in enumerate(self._trainer.reward_func_names):
                found[f"reward: {name}"] = own[:, index].tolist()
            rows = [
                {
                    "prompt": prompt_text(prompts[i]),
                    "completion": texts[i],
                    "scores": {name: values[i] for name, values in found.items()},
                }
                for i in range(min(SAMPLE_ROWS, len(prompts)))
            ]
            self._log.append("samples", self._trainer.state.global_step, when="train", rows=rows)
        self._batches += 1

    def _remember(
        self, name: str, scores: Sequence[float | None], prompts: Sequence[Any], completions: Sequence[Any]
    ) -> None:
        known = [(value, i) for i, value in enumerate(scores) if value is not None]
        everywhere, _ = of_all_ranks([value for value, _ in known])
        if not everywhere or not self._trainer.model.training:
            return
        mean = float(np.mean(everywhere))
        usual = self._usual.setdefault(name, mean)

        def farthest(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
            return sorted(found, key=lambda sample: -abs(sample["score"] - usual))[:2]

        own = farthest(
            {"prompt": prompt_text(prompts[i]), "completion": completion_text(completions[i]), "score": value}
            for value, i in known
        )
        samples = farthest(of_all_ranks(own)[0])
        seen = self._seen.setdefault(name, [])
        seen.append({"step": self._trainer.state.global_step, "mean_score": mean, "samples": samples})
        seen.sort(key=lambda batch: -abs(batch["mean_score"] - usual))
        del seen[MOVED_BATCHES:]

    def moved(self) -> dict[str, list[dict[str, Any]]]:
        """Per monitor the batches since the last call whose scores were farthest from those of the run's first batch."""
        found, self._seen = self._seen, {}
        return found

    def _about_reward(self, rewards: torch.Tensor, found: Mapping[str, Sequence[float | None]]) -> None:
        """What the total reward goes with: length, measures, and the prompt alone."""
        trainer = self._trainer
        ids = self._rollout.completion_ids
        assert ids is not None
        weights = trainer.reward_weights.to(rewards.device)
        total = (
            (rewards * weights).nansum(1).double()
        )  # of all ranks, as TRL adds them up, which leaves out what none judged
        total = total.masked_fill(torch.isnan(rewards).all(1) | total.isinf(), torch.nan).cpu().numpy()
        others = {"length": [float(len(own)) for own in ids]} | {name: found[name] for name in self._measures}
        mode = "train" if trainer.model.training else "eval"
        for name, values in others.items():
            if (value := correlation(total, np.array(of_all_ranks(list(values))[0], dtype=float))) is not None:
                trainer._metrics[mode][f"interp/reward/{name}_correlation"].append(value)
        size = trainer.num_generations if mode == "train" else trainer.num_generations_eval
        groups = total.reshape(-1, size) if size > 1 and len(total) % size == 0 else np.empty((0, 1))
        groups = groups[np.isfinite(groups).sum(1) > 1]  # of one row alone there is no variance
        if len(groups) and np.nanmax(groups) > np.nanmin(groups):
            within = groups - np.nanmean(groups, axis=1, keepdims=True)  # groups count by the rows that were judged
            share = float(np.nanmean(within**2) / np.nanvar(groups))
            trainer._metrics[mode]["interp/reward/within_group_share"].append(share)
            if share < WITHIN_GROUP and len(groups) > 1 and not self._warned:
                self._warned = True
                logger.warning(
                    "%.1f %% of the reward's variance is within groups of completions of one prompt – expected more than %.0f "
                    "%%: the reward is nearly a function of the prompt, which no policy can change.", 100 * share, 100 *
                    WITHIN_GROUP,
                )  # fmt: skip

    def state(self) -> dict[str, Any]:
        return {"batches": self._batches, "usual": self._usual, "seen": self._seen}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._batches = int(state["batches"])
        self._usual, self._seen = dict(state["usual"]), dict(state["seen"])

    def _metric(self, key: str, values: Sequence[float | None], reduce: Callable[[Any], Any]) -> None:
        """Into TRL's own averages: over ranks here, over the steps of a logging interval there."""
        kept = [value for value in of_all_ranks(list(values))[0] if value is not None]
        if kept:
            mode = "train" if self._trainer.model.training else "eval"
            self._trainer._metrics[mode][key].append(float(reduce(kept)))


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's correlation; None where either does not vary or there are fewer than three pairs."""
    kept = np.isfinite(a) & np.isfinite(b)
    a, b = a[kept], b[kept]
    if len(a) < 3 or any(np.ptp(values) <= 1e-12 * np.abs(values).max() for values in (a, b)):
        return None
    return float(np.corrcoef(a, b)[0, 1])
