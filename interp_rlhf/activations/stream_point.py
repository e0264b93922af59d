"""Where the residual stream begins: the hook point before a model's first layer.

In: a causal LM. Out: the hook point. It must not know readouts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .hook_points import INPUT, backbone, decoder_layers, on_activation, unwrap
from .noise import runs_here
from .own_passes import measuring, reading
from .sharding import device_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


class _FirstLayerReached(Exception):
    """The first layer has been given its input; nothing above it is needed."""


def stream_point(model: nn.Module) -> str:
    """Hook point of the residual stream before the first layer: that layer's input.

    The module that gives it out where there is one (the embedding in Llama, the dropout after it in GPT-2), found by running the
    model on three tokens; else the first layer's input: some models scale or normalize the embedding outside of any module.
    """
    base, first = unwrap(model), decoder_layers(model)[0]
    if not runs_here(base):
        return f"{first}{INPUT}"
    blocks = first.rpartition(".")[0]
    names = [name for name, _ in base.named_modules() if name and not f"{name}.".startswith(f"{blocks}.")]
    before = [name for name in names if not blocks.startswith(f"{name}.") and name != blocks]
    outputs: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: outputs.__setitem__(name, output)

    def stop(activation: torch.Tensor) -> None:
        outputs[""] = activation
        raise _FirstLayerReached

    modules = dict(base.named_modules())
    handles = [modules[name].register_forward_hook(keep(name)) for name in before]
    handles.append(on_activation(base, f"{first}{INPUT}", stop))
    ids = torch.arange(3, 6, device=device_of(base))[None]
    try:
        with reading(), measuring(backbone(base)), torch.no_grad():
            backbone(base)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except _FirstLayerReached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    same = [name for name, output in outputs.items() if name and _equal(output, outputs[""])]
    return same[-1] if same else f"{first}{INPUT}"


def _equal(output: Any, activation: torch.Tensor) -> bool:
    return (
        isinstance(output, torch.Tensor) and output.shape == activation.shape and bool(torch.equal(output, activation))
    )
