"""Hook points: module paths in the unwrapped causal LM, `model.layers.15`, meaning that module's output.

In: a model in whatever wrapping (PEFT, DDP, DeepSpeed, FSDP, `torch.compile`). Out: the module itself.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn

READABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def unwrap(model: nn.Module) -> Any:
    """The causal LM itself: without accelerate's wrappers, without `torch.compile` and without PEFT's outer modules.

    Adapter layers that PEFT injected stay where they are: hook points are the same with and without them.
    """
    from accelerate.utils import extract_model_from_parallel

    bare: Any = extract_model_from_parallel(model, keep_fp32_wrapper=True, keep_torch_compile=False)
    return bare.get_base_model() if hasattr(bare, "get_base_model") else bare  # the former: a `PeftModel`


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT wraps the model, so that its own weights are frozen."""
    from accelerate.utils import extract_model_from_parallel

    return hasattr(extract_model_from_parallel(model, keep_torch_compile=False), "peft_config")


def backbone(model: nn.Module) -> nn.Module:
    """The decoder without its LM head (`LlamaModel` in a `LlamaForCausalLM`): every forward of a trainer calls it."""
    base = unwrap(model)
    core: nn.Module = getattr(base, "base_model", base)
    return core


def resolve(model: nn.Module, hook_point: str) -> nn.Module:
    """Module at a hook point.

    Args:
        model (`nn.Module`): a causal LM, wrapped or not.
        hook_point (`str`): path in the unwrapped causal LM, `model.layers.15` or `transformer.h.3`.

    Raises:
        `ValueError`: no module of that path; the message names the nearest ones.
    """
    base = unwrap(model)
    modules: dict[str, nn.Module] = dict(base.named_modules())
    if hook_point in modules and hook_point != "":
        return modules[hook_point]
    layers = decoder_layers(base)
    near = difflib.get_close_matches(hook_point, [name for name in modules if name], n=3, cutoff=0.6)
    hint = f"Nearest: {', '.join(f'`{name}`' for name in near)}. " if near else ""
    raise ValueError(
        f"`hook_point` is `{hook_point}` – expected a module path in `{type(base).__name__}`. {hint}"
        f"Its decoder layers are `{layers[0]}` … `{layers[-1]}`."
    )


def decoder_layers(model: nn.Module) -> list[str]:
    """Paths of the decoder layers in the order in which they run.

    Source: the rule of EleutherAI/sparsify, the only `ModuleList` whose length is the config's number of layers; of
    several, the outermost.

    Raises:
        `ValueError`: the model has no such list.
    """
    base = unwrap(model)
    config = base.config.get_text_config()
    count = config.num_hidden_layers
    lists = [
        name for name, module in base.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise ValueError(
            f"`{type(base).__name__}` has no `ModuleList` of {count} modules – expected its decoder layers. Name the "
            "hook point yourself."
        )
    path = min(lists, key=lambda name: name.count("."))
    return [f"{path}.{index}" for index in range(count)]


def runs_after(model: nn.Module, hook_point: str, other: str) -> bool:
    """Whether the output at `hook_point` is there no sooner than that at `other`, so that a change at `other` is seen at it.

    By the order in which modules are registered, which is that in which a decoder runs them; a module is done after its parts.
    """
    names = [name for name, _ in unwrap(model).named_modules()]

    def done(point: str) -> tuple[int, int]:
        inside = [i for i, name in enumerate(names) if name == point or name.startswith(f"{point}.")]
        return max(inside), -point.count(".")

    return done(hook_point) >= done(other)


def embedding_point(model: nn.Module) -> str:
    """Hook point of the token embedding's output: what a probe reads before any attention."""
    base = unwrap(model)
    embedding = base.get_input_embeddings()
    return next(name for name, module in base.named_modules() if module is embedding)


def hidden_size(model: nn.Module) -> int:
    """Width D of the residual stream."""
    return int(unwrap(model).config.get_text_config().hidden_size)


def output_tensor(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The activation in a module's output, which some architectures return in a tuple.

    Raises:
        `ValueError`: it is not in a precision that can be read, as inside of quantized modules.
    """
    activation = output[0] if isinstance(output, tuple) else output
    if activation.dtype not in READABLE:
        raise ValueError(
            f"A hook point's activation is of type `{activation.dtype}` – expected "
            f"{', '.join(f'`{dtype}`' for dtype in READABLE)}: quantized numbers are no activations without their scales. Read "
            "at a decoder layer, whose output an 8-bit or 4-bit model has in its compute type."
        )
    return activation
