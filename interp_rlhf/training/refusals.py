"""Refusals: everything under which a term would be wrong or without effect, before the first step.

In: a built trainer and what shall join its loss. Out: nothing, or an error that says what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers.modeling_layers import GradientCheckpointingLayer

from ..activations.counted import turns_in
from ..activations.hook_points import (
    INPUT,
    embedding_point,
    has_adapters,
    layers_or_none,
    resolve,
    runs_after,
    unwrap,
)
from ..concepts.latents import Latents
from ..concepts.readout import same_artifact
from .interventions import TRAINERS, ConceptAblation
from .reference import kl_option
from .regularizers import (
    LENGTH_NORMALIZED_LOSSES,
    MARGIN_LOSSES,
    ConceptPenalty,
    DriftPenalty,
    ExplainAway,
    FeatureConstraint,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..activations.counted import ChatMarks
    from ..activations.noise import Causes
    from ..concepts.readout import Readout
    from .interventions import TrainingIntervention
    from .regularizers import (
        Regularizer,
    )


def refuse_terms(
    trainer: Any,
    kind: str | None,
    regularizers: Sequence[Regularizer],
    monitors: Sequence[Readout],
    interventions: Sequence[TrainingIntervention],
) -> None:
    """Raises:
    `ValueError`: a term that would be wrong, or without effect, in this trainer.
    """
    if not regularizers and not interventions and (kind in ("GRPO", "RLOO") or not monitors):
        return
    if kind is None:
        raise ValueError(
            f"The trainer is a `{type(trainer).__name__}` – expected TRL's `DPOTrainer`, `KTOTrainer`, `SFTTrainer`, "
            "`GRPOTrainer` or `RLOOTrainer`: terms join their losses. For drift alone, `attach(trainer, drift=…)` takes any."
        )
    _refuse_engine(trainer, kind)
    names = [*(regularizer.name for regularizer in regularizers), *(monitor.name for monitor in monitors)]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(
            f"Two regularizers or monitors are named {', '.join(f'`{name}`' for name in doubled)} – expected names that differ, "
            "since metrics are logged under them. Pass `name=`, or rename a card."
        )
    for regularizer in regularizers:
        _refuse_regularizer(trainer, kind, regularizer, monitors)
    for intervention in interventions:
        _refuse_intervention(trainer, kind, intervention)
        for regularizer in regularizers:
            _refuse_both(trainer, regularizer, intervention)


def refuse_pieces(trainer: Any, marks: ChatMarks) -> None:
    """Raises:
    `ValueError`: conversations that are packed in pieces: a piece without marks does not say whose words it holds.
    """
    strategy = getattr(trainer.args, "packing_strategy", None)
    if not getattr(trainer.args, "packing", False) or strategy not in ("bfd_split", "wrapped"):
        return
    own = {token for token in (*marks.header, *marks.asked) if token in marks.special or token == marks.opener}
    for ids in _column(trainer.train_dataset, "input_ids"):
        if own.intersection(ids) or turns_in(ids, marks) > 1:
            raise ValueError(
                f"`packing_strategy` is `{strategy}` on conversations – expected `bfd`: a piece of a conversation does not say "
                "whose words it holds, and a question's would be scored as an answer's. Set `packing_strategy='bfd'`, or score "
                "plain texts."
            )


def _column(data: Any, name: str) -> Iterable[Any]:
    """A column of a data set; of a stream none, since what is read of it is gone."""
    return data[name] if isinstance(data, Dataset) and name in data.column_names else ()


def refuse_turns(trainer: Any, marks: ChatMarks) -> None:
    """Raises:
    `ValueError`: completions of a preference data set that hold several turns of the assistant: they are not one answer.
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
            "turn in each: "
            "what others say in between is no answer, and several answers have several scores. Put what comes before the last "
            "turn into the prompt."
        )


def refuse_noise(trainer: Any, regularizers: Sequence[Regularizer], causes: Causes) -> None:
    """Raises:
    `ValueError`: a term that compares the policy with a reference, where the training mode makes them differ at random.

    Noise in adapters alone is let through: without a trained adapter it changes nothing, and the reference has none.
    """
    with_ref = "ref" in getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", {})
    noise = [*causes.noise, *(causes.adapters if with_ref else ())]
    comparing = [
        r for r in regularizers if r.references and (r.policy_point is not None or has_adapters(trainer.model))
    ]
    if noise and comparing:
        raise ValueError(
            f"The training mode draws {'; '.join(noise)} – expected none with {', '.join(f'`{r.name}`' for r in comparing)}: "
            "a model "
            "that has not moved would be told that it has, and be trained to undo the noise. Set `neftune_noise_alpha=None`, "
            "load the "
            "model with its dropout and jitter at 0 (`model_init_kwargs={'attention_dropout': 0.0, …}`), or leave the term out."
        )


def _refuse_engine(trainer: Any, kind: str) -> None:
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    for name in ("sp", "cp"):
        if parallel is not None and getattr(parallel, f"{name}_enabled", False):
            what = {"sp": "sequence", "cp": "context"}[name]
            raise ValueError(
                f"`parallelism_config` turns {what} parallelism on – expected none: each rank then holds a piece of every "
                f"sequence, and a mean over its tokens is none. Set `{name}_size=1`."
            )
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"One process drives {trainer.args.n_gpu} GPUs (`DataParallel`) – expected one process per GPU: each replica sees a "
            "piece of the batch. Start the script with `accelerate launch`."
        )
    reasons = {"sync_ref_model": "the reference would move during the run, and what is held near it with it"}
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


def _refuse_regularizer(trainer: Any, kind: str, regularizer: Regularizer, monitors: Sequence[Readout]) -> None:
    name, which = f"`{regularizer.name}`", type(regularizer).__name__
    if kind not in regularizer.trainers:
        raise ValueError(
            f"`{which}` in a `{type(trainer).__name__}` – expected a trainer of {', '.join(regularizer.trainers)}: "
            "it changes the margin of a preference pair."
        )
    if kind in ("GRPO", "RLOO") and regularizer.references:
        if trainer.beta == 0:
            coefficient = kl_option(trainer)
            raise ValueError(
                f"`{coefficient}` is 0 – expected more than 0 with {name}: at 0 the trainer runs no reference that it could "
                f"be held near. Set `{coefficient}` (0.02, say), or pass `drift=` to watch without holding."
            )
        if isinstance(regularizer, DriftPenalty) and regularizer.subspace is None:
            raise ValueError(
                f"{name} compares the whole stream – expected a `subspace` in a `{type(trainer).__name__}`: its "
                "reference pass comes before batches are shuffled, and only scores travel with them. Pass "
                "`subspace=Subspace.from_readouts([…])` or `from_pca`."
            )
    whole = isinstance(regularizer, DriftPenalty) and regularizer.subspace is None
    if kind in ("DPO", "KTO") and trainer.precompute_ref_logps and whole:
        raise ValueError(
            f"`precompute_ref_log_probs` is True and {name} compares the whole stream – expected a `subspace`: scores are "
            "computed once and kept, whole activations would not fit."
        )
    if (
        kind in ("DPO", "KTO")
        and trainer.precompute_ref_logps
        and regularizer.references
        and trainer.is_fsdp_enabled
        and trainer.ref_model is None
    ):
        raise ValueError(
            f"`precompute_ref_log_probs` is True under FSDP with {name} – expected False, or a `ref_model` given to the trainer: "
            "FSDP puts the policy together when training begins, and the reference's scores are needed before."
        )
    if isinstance(regularizer, ConceptPenalty) and all(
        same_artifact(monitor, regularizer.readout) for monitor in monitors
    ):
        raise ValueError(
            f"{name} trains against its own probe and there is no holdout monitor – expected one with another artifact in "
            "`monitors`: the probe's own score says nothing once its gradient is used."
        )
    if isinstance(regularizer, ExplainAway | FeatureConstraint):
        _refuse_losses(trainer, regularizer)
    if isinstance(regularizer, DriftPenalty) and regularizer.subspace is not None:
        regularizer.subspace.check_model(trainer.model)
    if isinstance(regularizer, FeatureConstraint) and isinstance(regularizer.readout, Latents):
        regularizer.readout.check_model(trainer.model)
    if regularizer.policy_point is not None:
        _refuse_hook_point(trainer, name, regularizer.policy_point)


def _refuse_both(trainer: Any, regularizer: Regularizer, intervention: TrainingIntervention) -> None:
    point = regularizer.policy_point
    if point is not None and runs_after(trainer.model, point, intervention.hook_point):
        raise ValueError(
            f"`{regularizer.name}` reads the policy at `{point}`, at or above the `{type(intervention).__name__}` at "
            f"`{intervention.hook_point}` – expected one of the two, or a term below the intervention: the term would compare a "
            "changed policy with an unchanged reference, and train the model to undo the intervention, or nothing at all."
        )


def _refuse_losses(trainer: Any, regularizer: ExplainAway | FeatureConstraint) -> None:
    name = f"`{regularizer.name}`"
    exact: Sequence[str] = [*MARGIN_LOSSES, *LENGTH_NORMALIZED_LOSSES]
    if isinstance(regularizer, FeatureConstraint):
        exact = ("sigmoid", "sigmoid_norm")
    wrong = [loss for loss in trainer.loss_types if loss not in exact]
    if wrong:
        raise ValueError(
            f"`loss_type` is {', '.join(f'`{loss}`' for loss in wrong)} – expected one of "
            f"{', '.join(f'`{loss}`' for loss in sorted(exact))} with "
            f"{name}: elsewhere the loss does not depend on β · (chosen − rejected score) alone, and the term would "
            "be another one."
        )
    if (
        isinstance(regularizer, ExplainAway)
        and len({loss in LENGTH_NORMALIZED_LOSSES for loss in trainer.loss_types}) > 1
    ):
        raise ValueError(
            f"`loss_type` mixes {', '.join(f'`{loss}`' for loss in trainer.loss_types)} – expected all or none of "
            "them to divide by the "
            f"length with {name}: one reference cannot be shifted by two amounts."
        )
    settings = {"f_divergence_type": "reverse_kl", "ld_alpha": None, "use_liger_kernel": False}
    if isinstance(regularizer, FeatureConstraint):
        settings["use_weighting"] = False
    for setting, needed in settings.items():
        given = getattr(trainer, setting, getattr(trainer.args, setting, needed))
        if given != needed:
            raise ValueError(
                f"`{setting}` is {given!r} – expected {needed!r} with {name}: its formula is for that one."
            )


def _refuse_intervention(trainer: Any, kind: str, intervention: TrainingIntervention) -> None:
    which = type(intervention).__name__
    if isinstance(intervention, ConceptAblation):
        intervention.subspace.check_model(trainer.model)
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if getattr(plugin, "activation_checkpointing", False):
        raise ValueError(
            f"FSDP's `activation_checkpointing` is on and there is a `{which}` – expected it off: layers are run again in the "
            "backward pass, where the intervention is closed. Use the trainer's `gradient_checkpointing=True`."
        )
    if kind not in TRAINERS:
        raise ValueError(
            f"`{which}` in a `{type(trainer).__name__}` – expected a trainer of {', '.join(TRAINERS)}: rollouts are "
            "generated by the "
            "model as it is, so that the importance ratio of the changed one would be wrong from step 0. Use it in "
            "SFT, DPO or KTO."
        )
    module = resolve(trainer.model, intervention.hook_point)
    if (
        trainer.args.gradient_checkpointing
        and not isinstance(module, GradientCheckpointingLayer)
        and _inside(trainer, intervention.hook_point)
    ):
        raise ValueError(
            f"`gradient_checkpointing` is on and `{which}` is at `{intervention.hook_point}`, inside a decoder "
            "layer – expected a whole "
            "layer: the layer is run again in the backward pass, where the intervention is closed. Use "
            f"`{_layer_of(trainer, intervention.hook_point)}`, or turn checkpointing off."
        )


def _refuse_hook_point(trainer: Any, name: str, hook_point: str) -> None:
    resolve(trainer.model, hook_point)
    kwargs = getattr(trainer.args, "gradient_checkpointing_kwargs", None) or {}
    if trainer.args.gradient_checkpointing and kwargs.get("use_reentrant") and _inside(trainer, hook_point):
        raise ValueError(
            f"{name} reads at `{hook_point}`, inside a decoder layer, and `gradient_checkpointing_kwargs` has "
            "`use_reentrant=True` – "
            f"expected a whole layer such as `{_layer_of(trainer, hook_point)}`, or `use_reentrant=False`: the "
            "first run of a layer "
            "makes no graph there, and the term's gradient would be lost without a word."
        )
    if not trains_below(trainer.model, hook_point):
        raise ValueError(
            f"{name} is at `{hook_point}` and no trainable parameter is at or below it – expected at least one: its "
            "loss would be shown "
            "and its gradient be 0. Put adapters on lower layers, or read further up."
        )


def _layer_of(trainer: Any, hook_point: str) -> str | None:
    layers = layers_or_none(trainer.model)
    return next((layer for layer in layers if hook_point == layer or hook_point.startswith(f"{layer}.")), None)


def _inside(trainer: Any, hook_point: str) -> bool:
    return _layer_of(trainer, hook_point) not in (None, hook_point)


def trains_below(model: Any, hook_point: str) -> bool:
    """Whether a trainable parameter takes part in the activation at a hook point."""
    base = unwrap(model)
    layers = layers_or_none(base)
    if not layers:  # by the order in which modules are registered, which is that in which a decoder runs them
        return any(
            parameter.requires_grad and runs_after(base, hook_point, name.rpartition(".")[0])
            for name, parameter in base.named_parameters()
        )
    prefix = layers[0].rsplit(".", 1)[0] + "."
    embedding = embedding_point(base)
    if hook_point in [f"{layer}{INPUT}" for layer in layers]:  # what the layer before gives out
        before = layers.index(hook_point.removesuffix(INPUT)) - 1
        hook_point = layers[before] if before >= 0 else embedding
    own = _index(hook_point, prefix)
    if own is None:  # the embedding is below all layers, a final norm above them
        own = -1 if hook_point == embedding else len(layers)
    names = [name for name, _ in base.named_parameters()]
    inside = [i for i, name in enumerate(names) if name.startswith(f"{hook_point}.")]
    last = max(inside, default=len(names))
    for i, (name, parameter) in enumerate(base.named_parameters()):
        if not parameter.requires_grad:
            continue
        index = _index(name, prefix)
        if index is None:
            if name.startswith(f"{embedding}.") or (own == len(layers) and i <= last):
                return True
        elif index < own or (index == own and i <= last):
            return True
    return False


def _index(name: str, prefix: str) -> int | None:
    return int(name[len(prefix) :].split(".")[0]) if name.startswith(prefix) else None
