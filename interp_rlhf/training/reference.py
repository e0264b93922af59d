"""Finds and prepares the frozen reference: the model that rewards are read on and that terms compare with.

In: a built trainer, and the user's `reference`. Out: a model, or None if the reference is the policy with its adapters off. The
reference is identified by its weights, never by a path. At `attach` the policy is the model that training begins with, so a copy
of it can serve as a missing reference. It must not know the readouts.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer, SFTTrainer
from trl.models import prepare_deepspeed, prepare_fsdp

from ..activations.hook_points import backbone, has_adapters, unwrap
from ..activations.noise import TOKENS, rope_from_the_start, runs_here
from ..activations.own_passes import measuring, reading
from ..activations.reference_pass import reference_pass, require_reference_below
from ..activations.sharding import device_of, in_one_piece, is_sharded
from .trl import ROLLOUT_KINDS, unfilled_copy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..concepts.readout import Readout

logger = logging.getLogger(__name__)

# Where the reference's scores come from: a pass that the trainer makes on rollouts or in its loss, scores that are computed once
# at `attach`, or a pass of our own. `terms.reference_scores` has a class for each.
ReferenceSource = Literal["rollout", "pass", "precomputed", "own"]


def trainer_kind(trainer: Any) -> str | None:
    """`DPO`, `KTO`, `SFT`, `GRPO` or `RLOO`; None for another trainer."""
    classes = {"DPO": DPOTrainer, "KTO": KTOTrainer, "SFT": SFTTrainer, "GRPO": GRPOTrainer, "RLOO": RLOOTrainer}
    return next((kind for kind, trainer_class in classes.items() if isinstance(trainer, trainer_class)), None)


def reference_source(trainer: Any, kind: str | None) -> ReferenceSource:
    """Where the reference's scores of a trainer's batches come from."""
    if kind in ROLLOUT_KINDS:
        return "rollout"
    if kind == "SFT":
        return "own"
    return "precomputed" if trainer.precompute_ref_logps else "pass"


def kl_option(trainer: Any) -> str:
    """Name of the trainer's option that weighs the KL: `kl_coef` for PPO, else `beta`."""
    return "kl_coef" if hasattr(trainer.args, "kl_coef") else "beta"


def has_ref_adapter(trainer: Any) -> bool:
    """True if TRL made the adapter `ref`, a copy of the initial adapter. The reference then runs with it."""
    return "ref" in getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", {})


def reference_of_loss(trainer: Any, kind: str | None, asked: Any, users: Sequence[str]) -> Any:
    """The frozen reference that terms in a trainer's loss compare with.

    Args:
        trainer (`Trainer`): built.
        kind (`str`, *optional*): see `trainer_kind`.
        asked (`nn.Module`, *optional*): the user's `reference`.
        users (`Sequence[str]`): names of the terms that need a reference.

    Returns:
        The model; None if it is the policy without adapters, or if none is needed.

    Raises:
        `ValueError`: the user passed another model than the trainer runs, or there is no reference and none can be made.
    """
    source = reference_source(trainer, kind)
    if asked is not None and asked is not getattr(trainer, "ref_model", None):
        _refuse_other_reference(trainer, source, users)
    needed = bool(users)
    if source == "precomputed" and asked is None and trainer.ref_model is None and not has_adapters(trainer.model):
        needed = False  # before training the policy is its own reference
    reference = reference_of(trainer, asked, needed)
    if users and source == "pass":
        _warn_of_other_start(trainer, reference)
    if users and source == "own" and reference is None and _adapter_changes(trainer.model):
        logger.warning(
            "The model has an adapter that changes it already, and the reference is the base model without it: terms pull "
            "towards the base, not towards what this training began with. To hold the latter, merge the adapter first."
        )
    return reference


def _refuse_other_reference(trainer: Any, source: ReferenceSource, users: Sequence[str]) -> None:
    name = type(trainer).__name__
    if source == "pass":
        raise ValueError(
            f"`reference` was given to `attach` on a `{name}` – expected none: in this trainer, terms compare with the "
            "reference that its own loss runs. Give it to the trainer (`ref_model`), or leave it out."
        )
    if source == "rollout" and users:
        raise ValueError(
            f"`reference` is given with {', '.join(f'`{user}`' for user in users)} in a `{name}` – expected none: they are read "
            f"on the reference that the trainer itself runs (`{kl_option(trainer)}` above 0). Leave `reference` out of `attach`."
        )


def check_claims(trainer: Any, kind: str | None, reference: Any, claims: Sequence[Readout]) -> None:
    """Check that a loss's reference is the model that readouts were fitted on.

    Args:
        trainer (`Trainer`), kind (`str`, *optional*), reference (`nn.Module`, *optional*): see `reference_of_loss`.
        claims (`Sequence[Readout]`): the readouts.

    Raises:
        `ValueError`: the reference is another model.
    """
    trained = trainer.state.global_step > 0
    for readout in claims:
        if reference is not None:
            readout.check_model(reference)
        elif has_adapters(trainer.model):
            readout.check_model(trainer.model, exact=False, trained=trained)
        else:  # before training, the policy and its reference are the same model
            exact = reference_source(trainer, kind) == "precomputed"
            readout.check_model(trainer.model, exact=exact, trained=trained)


def unproved_claims(trainer: Any, reference: Any, claims: Sequence[Readout]) -> list[Readout]:
    """Readouts whose canaries must be read later, because an engine has sharded the reference and it cannot run now."""
    model = reference if reference is not None else trainer.model
    adapted = has_adapters(trainer.model)
    if runs_here(model) or has_ref_adapter(trainer) or (reference is None and not adapted):
        return []
    return [readout for readout in dict.fromkeys(claims) if readout.canaries is not None]


def check_rollout_claims(trainer: Any, reference: Any, readouts: Sequence[Readout]) -> None:
    """Check that the reference of rollouts is the model that readouts were fitted on.

    Args:
        trainer (`Trainer`): built.
        reference (`nn.Module`, *optional*): see `reference_of`.
        readouts (`Sequence[Readout]`): readouts that are read on the reference.

    Raises:
        `ValueError`: the reference is another model.
    """
    copied = reference is None and has_ref_adapter(trainer)
    if copied:
        logger.warning(
            "The reference is the base model with the adapter `ref`, a copy of what training began with. Cards are fitted and "
            "checked on a model without adapters: their evidence is about another model than this one."
        )
    with reference_pass(trainer.model, reference) as model:
        for readout in readouts:
            readout.check_model(model, exact=not copied)


def reference_of(trainer: Any, asked: Any, needed: bool) -> Any:
    """The frozen reference of a trainer. None if none is needed, and with PEFT: it is then the policy without adapters.

    Args:
        trainer (`Trainer`): built.
        asked (`nn.Module`, *optional*): the user's `reference`.
        needed (`bool`): True if something is read on the reference.

    Raises:
        `ValueError`: the reference would move with the policy, or it is missing and the policy can no longer be copied.
    """
    reference = asked if asked is not None else getattr(trainer, "ref_model", None)
    if reference is not None:
        in_pieces = asked is not None and is_sharded(asked) and not hasattr(asked, "optimizer")
        if in_pieces and trainer.is_deepspeed_enabled:
            reference = _on_engine(trainer, asked)  # ZeRO-3 sharded its parameters when it was loaded
        _require_apart(trainer, reference)
        return reference
    if not needed:
        return None
    if has_adapters(trainer.model):
        require_reference_below(trainer.model)
        return None
    return _copied(trainer)


def _adapter_changes(model: nn.Module) -> bool:
    """True if a LoRA adapter already changes the model. A new adapter changes nothing."""
    return any(bool(value.detach().any()) for name, value in model.named_parameters() if ".lora_B." in name)


def _warn_of_other_start(trainer: Any, reference: Any) -> None:
    """Warn if a trainer's own reference differs from the initial policy. TRL loads the reference from the policy's path."""
    if reference is None or not (runs_here(reference) and runs_here(trainer.model)) or trainer.state.global_step > 0:
        return
    differing = _first_difference(unwrap(reference), unwrap(trainer.model))
    if differing is not None:
        logger.warning(
            "The trainer's reference is not what training begins with (`%s` differs): terms pull towards the reference. TRL "
            "loads it from the policy's path. A policy that was merged or changed in memory differs from that: save it and "
            "train from there, or pass `ref_model`.",
            differing,
        )


def _copied(trainer: Any) -> Any:
    """A frozen copy of the present policy, before training."""
    base = unwrap(trainer.model)
    name = type(trainer).__name__
    ask = (
        f"Pass `reference=` to `attach`, train with PEFT, or, for a reward, set `{kl_option(trainer)}` above 0 or use "
        "`reader: policy`."
    )
    if hasattr(base, "peft_config"):
        raise ValueError(
            f"The `{name}` has no reference model, and its model has adapters that transformers loaded itself "
            f"({', '.join(f'`{key}`' for key in base.peft_config)}) – expected a `PeftModel`, whose adapters can be switched "
            f"off. Wrap it: `PeftModel.from_pretrained(base, ADAPTER, is_trainable=True)`. Or pass `reference=` to `attach`."
        )
    if trainer.state.global_step > 0:
        raise ValueError(
            f"The `{name}` has no reference model and has made {trainer.state.global_step} steps already – expected a fresh "
            f"one: what training began with is gone. Attach before training. {ask}"
        )
    if not runs_here(base):
        return _loaded_reference(trainer, base, ask)
    logger.info("There is no reference model: the policy as it is now is copied.")
    copy = frozen_copy(base)
    if why := _unlike(copy, base):
        raise ValueError(
            f"The `{name}` has no reference model, and a copy of its policy, built from its configuration, is another model: "
            f"{why} – expected a policy that its configuration describes. Pass `reference=` to `attach`: what training begins "
            "with, frozen."
        )
    return _on_engine(trainer, copy)


def frozen_copy(base: Any) -> Any:
    """A copy of a causal LM with separate weights, frozen and in evaluation mode; weights that the original ties are tied.

    `copy.deepcopy` does not work here: TRL patches `forward` on the instance, so the copy would run on the original's weights.

    Raises:
        `ValueError`: the model's weights do not match its configuration.
    """
    copy = unfilled_copy(base)
    cloned: dict[int, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, value in base.state_dict(keep_vars=True).items():
        if id(value) not in cloned:
            clone = value.detach().clone()
            cloned[id(value)] = nn.Parameter(clone, requires_grad=False) if isinstance(value, nn.Parameter) else clone
        state[name] = cloned[id(value)]
    shapes = {name: tuple(value.shape) for name, value in copy.state_dict().items()}
    odd = sorted(n for n in shapes.keys() ^ state.keys()) or [n for n in state if tuple(state[n].shape) != shapes[n]]
    if odd:
        raise ValueError(
            f"The policy's weights are not those that its configuration says: `{odd[0]}` and {len(odd) - 1} others are missing, "
            f"too many or of another shape – expected a `{type(base).__name__}` as its `config` describes it, so that its "
            "reference can be a copy. Pass `reference=` to `attach`, or correct the configuration, save the model and load it "
            "again."
        )
    copy.load_state_dict(state, assign=True)
    buffers = dict(copy.named_buffers(remove_duplicate=False))
    for name, buffer in base.named_buffers():  # also buffers that are computed at construction and not saved
        parent, _, last = name.rpartition(".")
        if name in buffers:
            setattr(copy.get_submodule(parent), last, buffer.detach().clone())
    copy.generation_config = getattr(base, "generation_config", None)
    stream = {
        p.dtype for name, p in copy.named_parameters() if p is not copy.get_input_embeddings().weight and p.dim() > 1
    }
    if len(stream) == 1 and copy.get_input_embeddings().weight.dtype not in stream:
        # A head in float32 that is tied to the embedding (`cast_lm_head_to_fp32`): TRL casts the embedding's output back.
        (kind,) = stream
        copy.get_input_embeddings().register_forward_hook(lambda module, args, output: output.to(kind))
    return copy.eval().requires_grad_(False)


@torch.no_grad()
def _unlike(copy: Any, base: Any) -> str | None:
    """The difference between a copy and its original, in words; None if both give the same output."""
    if (differing := _first_difference(base, copy)) is not None:
        return f"`{differing}` differs"
    vocabulary = int(base.config.get_text_config().vocab_size)
    ids = torch.randint(0, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0)).to(device_of(base))
    outputs = []
    for model in (base, copy):
        core = backbone(model)
        with reading(), measuring(core), rope_from_the_start(model):
            output = core(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
        outputs.append(output.double())
    gap = float((outputs[1] - outputs[0]).pow(2).mean().sqrt() / outputs[0].pow(2).mean().sqrt().clamp(min=1e-12))
    if gap <= (1e-4 if base.dtype in (torch.float32, torch.float64) else 1e-2):
        return None
    return (
        f"its weights are the same and its activations are off by {gap:.1%}: a hook or a number that was set in memory"
    )


def _loaded_reference(trainer: Any, base: Any, ask: str) -> Any:
    """The reference, loaded from the policy's path and compared with the policy. An engine has sharded the policy."""
    path = base.config.name_or_path
    if not path:
        raise ValueError(
            f"The `{type(trainer).__name__}` has no reference model, and its model is in pieces and was built in memory, so "
            f"there is nothing to load – expected a reference. {ask}"
        )
    logger.info("There is no reference model: loading the one that is read from `%s`.", path)
    keywords = dict(getattr(trainer.args, "model_init_kwargs", None) or {})  # such as the revision
    model = type(base).from_pretrained(path, **{**keywords, "dtype": trainer.model.dtype})
    if model.get_input_embeddings().num_embeddings != base.get_input_embeddings().num_embeddings:
        raise ValueError(
            f"The model at `{path}` has {model.get_input_embeddings().num_embeddings} token embeddings – the policy has "
            f"{base.get_input_embeddings().num_embeddings}: tokens were added after it was loaded. Save the policy as it is and "
            f"train from there. {ask}"
        )
    if (differing := _first_difference(model, base)) is not None:
        raise ValueError(
            f"The model at `{path}` is not what the policy is now: `{differing}` differs – expected what training begins "
            f"with, not what the policy was made of. Save the policy and train from there. {ask}"
        )
    return _on_engine(trainer, model.eval().requires_grad_(False))


def _first_difference(one: Any, other: Any) -> str | None:
    """Name of the first parameter that differs between two models; None if none does. All ranks call it together."""
    others = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        if name not in others:
            return str(name)
        if parameter.is_meta or others[name].is_meta:  # this rank has no weights yet
            continue
        with in_one_piece([parameter, others[name]]) as (mine, theirs):
            if mine.shape != theirs.shape or not torch.equal(mine.to(theirs).detach(), theirs.detach()):
                return str(name)
    return None


def _on_engine(trainer: Any, model: nn.Module) -> Any:
    """A frozen model, prepared for its trainer's engine as TRL prepares its own reference."""
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(model, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(model, trainer.accelerator)
    return model.to(trainer.accelerator.device)


def _require_apart(trainer: Any, reference: Any) -> None:
    """Refuse a reference that shares trainable weights with the policy.

    Raises:
        `ValueError`: the two models share a parameter.
    """
    trained = {p.data_ptr() for p in trainer.model.parameters() if p.requires_grad and not p.is_meta and p.numel()}
    shared = [n for n, p in reference.named_parameters() if not p.is_meta and p.numel() and p.data_ptr() in trained]
    if shared:
        raise ValueError(
            f"`reference` shares `{shared[0]}` and {len(shared) - 1} other parameters with the model that is trained – "
            "expected separate weights: the reference would move too. Load it a second time, or leave `reference` out."
        )
    if reference is not getattr(trainer, "ref_model", None):  # a user's reference may still be in training mode
        reference.eval().requires_grad_(False)
