"""Models whose parameters an engine keeps in pieces (DeepSpeed ZeRO-3, FSDP2): what can be run on them, and by whom.

In: a model in any wrapping. Out: whether it is one of those, its small parameters in one piece, and what its forward needs
to be run whole. Everything here but `is_sharded` is for all ranks together. It must not know readouts.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


def is_sharded(model: nn.Module) -> bool:
    """True if a forward needs other ranks: parameters are in ZeRO-3's partitions, or `DTensor`s (FSDP2, tensor parallelism)."""
    return any(_in_zero3(p) or _is_dtensor(p) for p in model.parameters())


def is_offloaded(model: nn.Module) -> bool:
    """True if accelerate keeps weights elsewhere and brings them in for each pass, so that they cannot be read."""
    return any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules())


def device_of(model: nn.Module) -> torch.device:
    """The device that a model takes its inputs on, also where accelerate keeps its weights elsewhere (CPU and disk offload)."""
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        if getattr(hook, "offload", False) and getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return next(model.parameters()).device


@contextmanager
def in_one_piece(parameters: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The values of some parameters, whole on every rank; for few and small ones. All ranks together."""
    partitioned = [p for p in parameters if _in_zero3(p) and not _is_available(p)]
    with _gathered(partitioned):
        yield [p.full_tensor() if _is_dtensor(p) else p for p in parameters]  # type: ignore[attr-defined]


def has_hook(module: nn.Module, word: str) -> bool:
    """True if a forward hook on the module has `word` in its name: torch has no public list of hooks."""
    return any(word in getattr(hook, "__name__", "") for hook in module._forward_hooks.values())


def switch_adapters(layers: Iterable[Any], enabled: bool) -> None:
    """Sets PEFT's own flag on its layers, for one pass of ours: `enable_adapters` would also change `requires_grad`."""
    for layer in layers:
        layer._disable_adapters = not enabled


@contextmanager
def weights_present(modules: Sequence[nn.Module]) -> Iterator[None]:
    """While open, weights of these modules are there also where accelerate keeps them on the CPU or on disk."""
    from accelerate.utils import align_module_device

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(align_module_device(module))
        yield


@contextmanager
def readable(model: nn.Module, without_head_of: Any = None) -> Iterator[None]:
    """While open, a sharded model can be run whole by us, and its trainer notices nothing afterwards.

    DeepSpeed remembers which modules a forward runs and fetches their weights ahead; TRL's fused head (1.16), which takes a
    weight without running its module, fails where that memory is of forwards of another kind. So it starts anew, before and
    after.

    Args:
        without_head_of (`PreTrainedModel`, *optional*): the causal LM inside `model`. Its LM head is left out, for passes of
            which nobody reads the predictions.

    Raises:
        `ValueError`: parameters are partitioned by ZeRO-3 and the model is not the engine that can put them together.
    """
    offload = _offload(model)
    _forget_trace(offload)
    with nullcontext() if without_head_of is None else _without_head(without_head_of):
        try:
            yield
        finally:
            _forget_trace(offload)


@contextmanager
def _without_head(base: Any) -> Iterator[None]:
    head = base.get_output_embeddings()
    place = next((name for name, module in base.named_modules() if head is not None and module is head), None)
    if place is None:
        yield
        return
    parent, name = base.get_submodule(place.rpartition(".")[0]), place.rpartition(".")[2]
    parent._modules[name] = _NoHead()
    try:
        yield
    finally:
        parent._modules[name] = head


class _NoHead(nn.Module):
    """In the place of a head that nobody reads: one number per token."""

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        return activation[..., :1]


def _offload(model: nn.Module) -> Any:
    """The part of a DeepSpeed engine that fetches weights; None where ZeRO-3 is not at work."""
    if not any(_in_zero3(p) for p in model.parameters()):
        return None
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        raise ValueError(
            f"The model is a `{type(model).__name__}` whose parameters are partitioned by ZeRO-3 – expected the engine that "
            "wraps it: `trainer.model_wrapped`, once training has begun, or what `trl.models.prepare_deepspeed` makes of a "
            "frozen model."
        )
    return getattr(optimizer, "parameter_offload", optimizer)


def _forget_trace(offload: Any) -> None:
    coordinator = offload.get_param_coordinator() if offload is not None else None
    if coordinator is not None and not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


def _gathered(parameters: Sequence[torch.Tensor]) -> Any:
    if not parameters:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))


def _in_zero3(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_tensor")


def _is_available(parameter: Any) -> bool:
    return bool(parameter.ds_status.name == "AVAILABLE")


def _is_dtensor(parameter: torch.Tensor) -> bool:
    # Where nobody has imported it, no parameter is one.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(parameter, module.DTensor)
