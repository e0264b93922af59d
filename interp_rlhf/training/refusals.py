"""Refusals: combinations under which a score, a term or a gradient would be wrong or have no effect.

In: a built trainer and the arguments of `attach`. Out: nothing, or an error that says what to do. The refusals of a single term
are in the term's own file (`Term.refuse`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers.modeling_layers import GradientCheckpointingLayer

from ..activations.answers import turns_in
from ..activations.hook_points import (
    INPUT,
    embedding_point,
    has_adapters,
    layers_or_none,
    resolve,
    runs_after,
    unwrap,
)
from ..concepts.readout import same_artifact
from .interventions import TRAINERS
from .reference import has_ref_adapter, kl_option
from .terms.term import TermContext
from .trl import ROLLOUT_KINDS, reads_images

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..activations.chat_marks import ChatMarks
    from ..activations.noise import Causes
    from ..concepts.readout import Readout
    from .interventions import TrainingIntervention
    from .rewards import ConceptReward
    from .terms.term import Term

logger = logging.getLogger(__name__)

# Options of a rollout trainer that make its completions unreadable, with the reason.
UNREADABLE = {
    "tools": "tool results are in the completion, and reward functions are not told which tokens they are",
    "environment_factories": "observations are in the completion, and reward functions are not told where",
    "rollout_func": "its completions may hold tokens that the model did not write",
    "is_vlm": "images would be missing from the reading",
}


def refuse_terms(
    trainer: Any,
    kind: str | None,
    terms: Sequence[Term],
    monitors: Sequence[Readout],
    interventions: Sequence[TrainingIntervention],
) -> None:
    """Refuse terms, monitors and interventions that would be wrong in a trainer's loss, or have no effect.

    Args:
        trainer (`Trainer`): built.
        kind (`str`, *optional*): see `reference.trainer_kind`.
        terms, monitors, interventions (`Sequence`): resolved arguments of `attach`.

    Raises:
        `ValueError`: the first problem.
    """
    if not terms and not interventions and (kind in ROLLOUT_KINDS or not monitors):
        return
    if kind is None:
        raise ValueError(
            f"The trainer is a `{type(trainer).__name__}` – expected TRL's `DPOTrainer`, `KTOTrainer`, `SFTTrainer`, "
            "`GRPOTrainer` or `RLOOTrainer`: terms join their losses. For drift alone, `attach(trainer, drift=…)` takes any."
        )
    _refuse_engine(trainer, kind)
    names = [*(term.name for term in terms), *(monitor.name for monitor in monitors)]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(
            f"Two regularizers or monitors are named {', '.join(f'`{name}`' for name in doubled)} – expected names that differ, "
            "since metrics are logged under them. Pass `name=`, or rename a card."
        )
    context = TermContext(trainer, kind, monitors)
    for term in terms:
        _refuse_term(context, term)
    for intervention in interventions:
        _refuse_intervention(trainer, kind, intervention)
        for term in terms:
            _refuse_both(trainer, term, intervention)


def refuse_rollouts(
    trainer: Any, kind: str | None, rewards: Sequence[ConceptReward], monitors: Iterable[Readout]
) -> None:
    """Refuse a trainer whose rollouts cannot be read: a score would belong to other tokens or to another model.

    Args:
        trainer (`Trainer`), kind (`str`, *optional*): see `reference.trainer_kind`.
        rewards (`Sequence[ConceptReward]`), monitors (`Iterable[Readout]`): readouts on the rollouts.

    Raises:
        `ValueError`: the trainer makes no rollouts, or a setting would make a score wrong.
    """
    if kind not in ROLLOUT_KINDS:
        raise ValueError(
            f"The trainer is a `{type(trainer).__name__}` – expected a `GRPOTrainer` or `RLOOTrainer`: rewards and measures "
            "are read on rollouts, monitors on those or in the loss of DPO, KTO and SFT. For other trainers use "
            "`attach(trainer, drift=DriftConfig(…))` or `trainer.add_callback(DriftCallback(trainer, monitors=[…]))`."
        )
    names = ", ".join(f"`{name}`" for name in (*(r.__name__ for r in rewards), *(m.name for m in monitors)))
    if not names:
        return
    used = {name: getattr(trainer, name, None) for name in UNREADABLE} | {"is_vlm": reads_images(trainer)}
    for name, reason in UNREADABLE.items():
        if used[name]:
            raise ValueError(
                f"The trainer uses `{name}` – expected none where {names} are read: {reason}. Score these runs afterwards "
                "with `read`."
            )
    if getattr(trainer.args, "sync_ref_model", False):
        raise ValueError(
            f"`sync_ref_model` is True – expected False where {names} are read: the reference would move during the run, "
            "and the probe with it."
        )
    _refuse_rewards(trainer, rewards)


def _refuse_rewards(trainer: Any, rewards: Sequence[ConceptReward]) -> None:
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


def refuse_pieces(trainer: Any, marks: ChatMarks) -> None:
    """Refuse conversations that packing cuts into pieces: a piece without marks does not say who speaks.

    Args:
        trainer (`SFTTrainer`): built.
        marks (`ChatMarks`): the tokens that its chat template writes around turns.

    Raises:
        `ValueError`: packing may cut a conversation.
    """
    strategy = getattr(trainer.args, "packing_strategy", None)
    if not getattr(trainer.args, "packing", False) or strategy not in ("bfd_split", "wrapped"):
        return
    written = {token for token in (*marks.header, *marks.asked) if token in marks.special or token == marks.opener}
    for ids in _column(trainer.train_dataset, "input_ids"):
        if written.intersection(ids) or turns_in(ids, marks) > 1:
            raise ValueError(
                f"`packing_strategy` is `{strategy}` on conversations – expected `bfd`: a piece of a conversation does not say "
                "whose words it holds, so a question would be scored as an answer. Set `packing_strategy='bfd'`, or score "
                "plain texts."
            )


def _column(data: Any, name: str) -> Iterable[Any]:
    """A column of a data set; empty for a stream, since reading a stream uses it up."""
    return data[name] if isinstance(data, Dataset) and name in data.column_names else ()


def refuse_turns(trainer: Any, marks: ChatMarks) -> None:
    """Refuse completions of a preference data set that hold several turns of the assistant: they are not one answer.

    Args:
        trainer (`DPOTrainer` or `KTOTrainer`): built.
        marks (`ChatMarks`): the tokens that its chat template writes around turns.

    Raises:
        `ValueError`: a completion holds several turns.
    """
    held_out = trainer.eval_dataset
    sets = [trainer.train_dataset, *(held_out.values() if isinstance(held_out, dict) else [held_out])]
    several, every, first = 0, 0, None
    for data in sets:
        for column in ("chosen_ids", "rejected_ids", "completion_ids"):
            for row, ids in enumerate(_column(data, column)):
                every += 1
                if turns_in(ids, marks) > 1:
                    several += 1
                    first = row if first is None else first
    if several:
        raise ValueError(
            f"{several} of {every} completions hold several turns of the assistant, the first in row {first} – expected one "
            "turn in each: the turns of others are no answer, and several answers have several scores. Put what comes before the "
            "last turn into the prompt."
        )


def refuse_noise(trainer: Any, terms: Sequence[Term], causes: Causes) -> None:
    """Refuse a term that compares the policy with a reference if the training mode makes them differ at random.

    Noise in adapters alone is allowed: it changes nothing without a trained adapter, and the reference has no adapter.

    Args:
        trainer (`Trainer`): built.
        terms (`Sequence[Term]`): terms with a weight other than 0.
        causes (`Causes`): known reasons why the policy's pass differs from a reading.

    Raises:
        `ValueError`: such a term is present.
    """
    noise = [*causes.noise, *(causes.adapters if has_ref_adapter(trainer) else ())]
    comparing = [
        term
        for term in terms
        if term.reference_readouts and (term.policy_point is not None or has_adapters(trainer.model))
    ]
    if noise and comparing:
        raise ValueError(
            f"The training mode draws {'; '.join(noise)} – expected none with {', '.join(f'`{t.name}`' for t in comparing)}: "
            "a model that has not moved would be told that it has, and be trained to undo the noise. Set "
            "`neftune_noise_alpha=None`, load the model with its dropout and jitter at 0 "
            "(`model_init_kwargs={'attention_dropout': 0.0, …}`), or leave the term out."
        )


def _refuse_engine(trainer: Any, kind: str) -> None:
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    for name in ("sp", "cp"):
        if parallel is not None and getattr(parallel, f"{name}_enabled", False):
            what = {"sp": "sequence", "cp": "context"}[name]
            raise ValueError(
                f"`parallelism_config` turns {what} parallelism on – expected none: each rank then holds a piece of every "
                f"sequence, so a mean over its tokens would be wrong. Set `{name}_size=1`."
            )
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"One process drives {trainer.args.n_gpu} GPUs (`DataParallel`) – expected one process per GPU: each replica sees a "
            "piece of the batch. Start the script with `accelerate launch`."
        )
    reasons = {"sync_ref_model": "the reference would move during the run, and with it what terms hold near it"}
    if kind != "SFT":
        reasons["padding_free"] = "both completions of a pair would lie in one row"
    for setting, reason in reasons.items():
        if getattr(trainer.args, setting, False):
            raise ValueError(f"`{setting}` is True – expected False here: {reason}.")
    if has_adapters(trainer.model):
        config = trainer.accelerator.unwrap_model(trainer.model).active_peft_config
        if config.is_prompt_learning:
            raise ValueError(
                f"The adapter is of type `{config.peft_type}` – expected one that changes weights, such as LoRA: "
                "virtual tokens shift every position."
            )


def _refuse_term(context: TermContext, term: Term) -> None:
    trainer, name = context.trainer, f"`{term.name}`"
    if context.kind not in term.trainers:
        pairs = ": it changes the margin of a preference pair" if term.per_pair else ""
        raise ValueError(
            f"`{type(term).__name__}` in a `{type(trainer).__name__}` – expected a trainer of {', '.join(term.trainers)}{pairs}. "
            "Leave it out."
        )
    if context.has_rollouts and term.reference_readouts and trainer.beta == 0:
        option = kl_option(trainer)
        raise ValueError(
            f"`{option}` is 0 – expected more than 0 with {name}: at 0 the trainer runs no reference to compare with. "
            f"Set `{option}` (such as 0.02), or pass `drift=` to watch without holding."
        )
    if (
        context.has_precomputed_reference
        and term.reference_readouts
        and trainer.is_fsdp_enabled
        and trainer.ref_model is None
    ):
        raise ValueError(
            f"`precompute_ref_log_probs` is True under FSDP with {name} – expected False, or a `ref_model` given to the trainer: "
            "FSDP puts the policy together when training begins, and the reference's scores are needed before."
        )
    if term.needs_holdout and any(
        all(same_artifact(monitor, readout) for monitor in context.monitors)
        for readout in term.pushes() or term.claims
    ):
        raise ValueError(
            f"{name} trains against its own probe and there is no holdout monitor – expected one with another artifact in "
            "`monitors`: the probe's own score says nothing once its gradient is used."
        )
    term.refuse(context)
    if term.policy_point is not None:
        _refuse_hook_point(trainer, name, term.policy_point)


def _refuse_both(trainer: Any, term: Term, intervention: TrainingIntervention) -> None:
    point = term.policy_point
    if point is not None and runs_after(trainer.model, point, intervention.hook_point):
        raise ValueError(
            f"`{term.name}` reads the policy at `{point}`, at or above the `{type(intervention).__name__}` at "
            f"`{intervention.hook_point}` – expected one of the two, or a term below the intervention: the term would compare a "
            "changed policy with an unchanged reference, and train the model to undo the intervention, or nothing at all."
        )


def _refuse_intervention(trainer: Any, kind: str, intervention: TrainingIntervention) -> None:
    which = type(intervention).__name__
    intervention.check_model(trainer.model)
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if getattr(plugin, "activation_checkpointing", False):
        raise ValueError(
            f"FSDP's `activation_checkpointing` is on and there is a `{which}` – expected it off: layers are run again in the "
            "backward pass, where the intervention is closed. Use the trainer's `gradient_checkpointing=True`."
        )
    if kind not in TRAINERS:
        raise ValueError(
            f"`{which}` in a `{type(trainer).__name__}` – expected a trainer of {', '.join(TRAINERS)}: the unchanged "
            "model generates the rollouts, so the importance ratio of the changed one would be wrong from step 0. Use it in SFT, "
            "DPO or KTO."
        )
    module = resolve(trainer.model, intervention.hook_point)
    if (
        trainer.args.gradient_checkpointing
        and not isinstance(module, GradientCheckpointingLayer)
        and _inside(trainer, intervention.hook_point)
    ):
        raise ValueError(
            f"`gradient_checkpointing` is on and `{which}` is at `{intervention.hook_point}`, inside a decoder layer – "
            "expected a whole layer: the layer is run again in the backward pass, where the intervention is closed. Use "
            f"`{_layer_of(trainer, intervention.hook_point)}`, or turn checkpointing off."
        )


def _refuse_hook_point(trainer: Any, name: str, hook_point: str) -> None:
    resolve(trainer.model, hook_point)
    kwargs = getattr(trainer.args, "gradient_checkpointing_kwargs", None) or {}
    if trainer.args.gradient_checkpointing and kwargs.get("use_reentrant") and _inside(trainer, hook_point):
        raise ValueError(
            f"{name} reads at `{hook_point}`, inside a decoder layer, and `gradient_checkpointing_kwargs` has "
            f"`use_reentrant=True` – expected a whole layer, such as `{_layer_of(trainer, hook_point)}`, or "
            "`use_reentrant=False`: the first run of a layer makes no graph there, and the term would have no gradient."
        )
    if not trains_below(trainer.model, hook_point):
        raise ValueError(
            f"{name} is at `{hook_point}` and no trainable parameter is at or below it – expected at least one: its "
            "loss would be shown and its gradient would be 0. Put adapters on lower layers, or read further up."
        )


def _layer_of(trainer: Any, hook_point: str) -> str | None:
    layers = layers_or_none(trainer.model)
    return next((layer for layer in layers if hook_point == layer or hook_point.startswith(f"{layer}.")), None)


def _inside(trainer: Any, hook_point: str) -> bool:
    return _layer_of(trainer, hook_point) not in (None, hook_point)


def trains_below(model: Any, hook_point: str) -> bool:
    """True if a trainable parameter takes part in the activation at a hook point."""
    base = unwrap(model)
    layers = layers_or_none(base)
    if not layers:  # modules are registered in the order in which a decoder runs them
        return any(
            parameter.requires_grad and runs_after(base, hook_point, name.rpartition(".")[0])
            for name, parameter in base.named_parameters()
        )
    prefix = layers[0].rsplit(".", 1)[0] + "."
    embedding = embedding_point(base)
    if hook_point in [f"{layer}{INPUT}" for layer in layers]:  # the output of the layer before
        before = layers.index(hook_point.removesuffix(INPUT)) - 1
        hook_point = layers[before] if before >= 0 else embedding
    layer = _index(hook_point, prefix)
    if layer is None:  # the embedding is below all layers, a final norm above them
        layer = -1 if hook_point == embedding else len(layers)
    names = [name for name, _ in base.named_parameters()]
    inside = [i for i, name in enumerate(names) if name.startswith(f"{hook_point}.")]
    last = max(inside, default=len(names))
    for i, (name, parameter) in enumerate(base.named_parameters()):
        if not parameter.requires_grad:
            continue
        index = _index(name, prefix)
        if index is None:
            if name.startswith(f"{embedding}.") or (layer == len(layers) and i <= last):
                return True
        elif index < layer or (index == layer and i <= last):
            return True
    return False


def _index(name: str, prefix: str) -> int | None:
    return int(name[len(prefix) :].split(".")[0]) if name.startswith(prefix) else None
