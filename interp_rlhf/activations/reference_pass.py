"""The reference that a PEFT policy holds below its adapters: how to run it, and whether it is what training begins with.

In: a policy, and a reference model where there is one. Out: a context in which the reference runs, or an error. It must not know
readouts.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from .hook_points import without_engine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

# Initializations of LoRA that change the base model's own weights.
CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Parts of a parameter's name by which PEFT marks what belongs to an adapter, in addition to each tuner's own prefix.
_OF_ADAPTERS = ("modules_to_save.", "trainable_tokens_", "original_module.")


@contextmanager
def adapters_off_in(model: nn.Module) -> Iterator[nn.Module]:
    """The model below its adapters of any kind; the model itself if it has no adapters."""
    peft_model = without_engine(model)
    with peft_model.disable_adapter() if hasattr(peft_model, "disable_adapter") else nullcontext():
        yield model


@contextmanager
def reference_pass(model: nn.Module, reference: nn.Module | None = None) -> Iterator[nn.Module]:
    """The frozen reference: `reference` where one is given, else the model with its adapters off.

    An adapter named `ref` is taken instead of no adapter, as TRL does.

    Raises:
        `ValueError`: a model without adapters and no reference.
    """
    if reference is not None:
        yield reference
        return
    peft_model = without_engine(model)
    if not hasattr(peft_model, "disable_adapter"):
        raise ValueError(
            f"`{type(peft_model).__name__}` has no adapters to switch off and no reference model was given – expected "
            "one of the two. Train with PEFT, or pass the reference model."
        )
    if "ref" not in peft_model.peft_config:
        with peft_model.disable_adapter():
            yield model
        return
    active, together = peft_model.active_adapter, list(peft_model.base_model.active_adapters)
    peft_model.set_adapter("ref")
    try:
        yield model
    finally:
        peft_model.set_adapter(active)
        if together != [active]:  # several at once, which only the tuner knows of
            peft_model.base_model.set_adapter(together)


def require_reference_below(model: nn.Module) -> None:
    """Raises `ValueError` where a PEFT policy without its adapters, or with TRL's copy of them, is not what training begins with.

    Something below the adapters is trained, their initialization changed the base, or TRL copied one of several.
    """
    peft_model = without_engine(model)
    together = list(getattr(peft_model.base_model, "active_adapters", []))
    if "ref" in peft_model.peft_config and len(together) > 1:
        raise ValueError(
            f"The policy has the active adapters {', '.join(f'`{name}`' for name in together)} – expected one: TRL copies one of "
            "them as the reference (`ref`), which is not what training begins with. Merge the others into the base first "
            "(`merge_and_unload`), or pass `reference=` to `attach`."
        )
    moving = trained_below_adapters(model)
    changed = [
        name for name, config in peft_model.peft_config.items()
        if str(getattr(config, "init_lora_weights", "")).startswith(CHANGING)
    ]  # fmt: skip
    if changed:
        how = peft_model.peft_config[changed[0]].init_lora_weights
        raise ValueError(
            f"The adapter `{changed[0]}` was initialized by `{how}`, which takes a part of the base model's weights into the "
            "adapter – "
            "expected the default: with adapters off the base is another model than the one that was loaded. Set "
            "`init_lora_weights=True`, or pass `reference=` to `attach`."
        )
    if moving:
        raise ValueError(
            f"`{moving[0]}` and {len(moving) - 1} other parameters of the base model are trained along with the adapter – "
            "expected a "
            "frozen base: with adapters off it is the reference, and it would move. Set `bias='none'` in the adapter's "
            "configuration and freeze the base, or pass `reference=` to `attach`."
        )


def trained_below_adapters(model: nn.Module) -> list[str]:
    """Trainable parameters of a PEFT model that no adapter owns, so that they act with adapters off too."""
    peft_model = without_engine(model)
    prefix = getattr(getattr(peft_model, "base_model", None), "prefix", "") or ""
    marks = (*_OF_ADAPTERS, *([prefix] if prefix else []))
    return [
        name for name, parameter in peft_model.named_parameters() if parameter.requires_grad and not any(m in name for m in marks)
    ]  # fmt: skip
