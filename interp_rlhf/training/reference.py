"""Who is the reference: the frozen model that rewards are read on and that terms compare with.

In: a built trainer, and what the user gave. Out: a model, or None where the reference is the policy with its adapters off. It is
known by what it holds, never by a path: at `attach` the policy is what training begins with, so a reference that is missing is a
copy of it. It must not know what is read.
"""

from __future__ import annotations

import logging
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from ..activations.hook_points import backbone, device_of, has_adapters, unwrap
from ..activations.noise import LENGTH, rope_from_the_start, runs_here
from ..activations.read import measuring, require_reference_below
from ..activations.sharding import in_one_piece, is_sharded
from ..activations.tap import reading

logger = logging.getLogger(__name__)


def kl_option(trainer: Any) -> str:
    """What the trainer's configuration calls the price of the KL: PPO's is `kl_coef`."""
    return "kl_coef" if hasattr(trainer.args, "kl_coef") else "beta"


def reference_of(trainer: Any, given: Any, needed: bool) -> Any:
    """The frozen reference of a trainer; None with PEFT, where it is the policy without adapters, and where none is needed.

    Args:
        trainer (`Trainer`): built.
        given (`nn.Module`, *optional*): what the user passed.
        needed (`bool`): whether anything is read on it.

    Raises:
        `ValueError`: it moves with the policy, or there is none and the policy can no longer be copied.
    """
    own = getattr(trainer, "ref_model", None)
    reference = given if given is not None else own
    if reference is not None:
        if (
            given is not None
            and is_sharded(given)
            and trainer.is_deepspeed_enabled
            and not hasattr(given, "optimizer")
        ):
            reference = _on_engine(trainer, given)  # ZeRO-3 took its parameters apart when it was loaded
        _require_apart(trainer, reference)
        return reference
    if not needed:
        return None
    if has_adapters(trainer.model):
        require_reference_below(trainer.model)
        return None
    return _copied(trainer)


def warn_of_other_start(trainer: Any, reference: Any) -> None:
    """Say where a trainer's own reference is not what its training begins with: TRL loads it from the path that the policy
    has."""
    if reference is None or not (runs_here(reference) and runs_here(trainer.model)) or trainer.state.global_step > 0:
        return
    differing = _first_difference(unwrap(reference), unwrap(trainer.model))
    if differing is not None:
        logger.warning(
            "The trainer's reference is not what training begins with (`%s` differs): terms pull towards the reference. A "
            "policy that "
            "was merged or changed in memory has another one at its path: save it and train from there, or pass `ref_model`.",
            differing,
        )


def _copied(trainer: Any) -> Any:
    """A frozen copy of the policy as it is now, before training."""
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
        return _loaded(trainer, base, ask)
    logger.info("There is no reference model: the policy as it is now is copied.")
    copy = frozen_copy(base)
    if why := _unlike(copy, base):
        raise ValueError(
            f"The `{name}` has no reference model, and a copy of its policy, built from its configuration, is another model: "
            f"{why} – expected a policy that is what its configuration says. Pass `reference=` to `attach`: what training begins "
            "with, frozen."
        )
    return _on_engine(trainer, copy)


def frozen_copy(base: Any) -> Any:
    """A copy of a causal LM that runs on weights of its own, frozen and in evaluation mode; weights that it shares are shared.

    `copy.deepcopy` is a trap: TRL patches `forward` on the instance, and the copy's would run on the original's weights.

    Raises:
        `ValueError`: a model with other weights than its configuration says.
    """
    from transformers.initialization import no_init_weights

    with torch.random.fork_rng(), torch.device("cpu"), no_init_weights():
        copy = type(base)._from_config(deepcopy(base.config), dtype=base.dtype)
    cloned: dict[int, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, value in base.state_dict(keep_vars=True).items():
        if id(value) not in cloned:
            own = value.detach().clone()
            cloned[id(value)] = nn.Parameter(own, requires_grad=False) if isinstance(value, nn.Parameter) else own
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
    for name, buffer in base.named_buffers():  # of what is computed when the model is built, not saved
        parent, _, own = name.rpartition(".")
        if own in copy.get_submodule(parent)._buffers:
            copy.get_submodule(parent)._buffers[own] = buffer.detach().clone()
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
    """How a copy differs from the model that it was made of, in words; None where a pass of both gives the same."""
    if (differing := _first_difference(base, copy)) is not None:
        return f"`{differing}` differs"
    vocabulary = int(base.config.get_text_config().vocab_size)
    ids = torch.randint(0, vocabulary, (1, LENGTH), generator=torch.Generator().manual_seed(0)).to(device_of(base))
    found = []
    for model in (base, copy):
        core = backbone(model)
        with reading(), measuring(core), rope_from_the_start(model):
            output = core(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
        found.append(output.double())
    gap = float((found[1] - found[0]).pow(2).mean().sqrt() / found[0].pow(2).mean().sqrt().clamp(min=1e-12))
    if gap <= (1e-4 if base.dtype in (torch.float32, torch.float64) else 1e-2):
        return None
    return (
        f"its weights are the same and its activations are off by {gap:.1%}: a hook or a number that was set in memory"
    )


def _loaded(trainer: Any, base: Any, ask: str) -> Any:
    """The reference from the path that the policy came from, where an engine has the policy in pieces; compared with it."""
    path = getattr(base.config, "_name_or_path", "")
    if not path:
        raise ValueError(
            f"The `{type(trainer).__name__}` has no reference model, and its model is in pieces and was built in memory, so "
            f"there is nothing to load – expected a reference. {ask}"
        )
    logger.info("There is no reference model: loading the one that is read from `%s`.", path)
    given = dict(getattr(trainer.args, "model_init_kwargs", None) or {})  # the revision, say
    model = type(base).from_pretrained(path, **{**given, "dtype": trainer.model.dtype})
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
    """Name of the first parameter in which two models differ; None where they are the same. By all ranks together."""
    others = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        if name not in others:
            return str(name)
        if parameter.is_meta or others[name].is_meta:  # this rank was given no weights yet
            continue
        with in_one_piece([parameter, others[name]]) as (mine, theirs):
            if mine.shape != theirs.shape or not torch.equal(mine.to(theirs).detach(), theirs.detach()):
                return str(name)
    return None


def _on_engine(trainer: Any, model: nn.Module) -> Any:
    """A frozen model where its trainer's engine can run it, as TRL does with its own reference."""
    from trl.models import prepare_deepspeed, prepare_fsdp

    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(model, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(model, trainer.accelerator)
    return model.to(trainer.accelerator.device)


def _require_apart(trainer: Any, reference: Any) -> None:
    """Raises `ValueError` for a reference that shares weights with what is trained."""
    trained = {p.data_ptr() for p in trainer.model.parameters() if p.requires_grad and not p.is_meta and p.numel()}
    shared = [n for n, p in reference.named_parameters() if not p.is_meta and p.numel() and p.data_ptr() in trained]
    if shared:
        raise ValueError(
            f"`reference` shares `{shared[0]}` and {len(shared) - 1} other parameters with the model that is trained – "
            "expected weights of its own: it would move along. Load it a second time, or leave `reference` out."
        )
    if reference is not getattr(trainer, "ref_model", None):  # the user's own may be as it was loaded
        reference.eval().requires_grad_(False)
