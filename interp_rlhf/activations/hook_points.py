"""Hook points: module paths in the unwrapped causal LM, `model.layers.15`, meaning that module's output;
`model.layers.0.input` is what a module is given, where no other module gives it out.

In: a model in any wrapping (PEFT, DDP, DeepSpeed, FSDP, `torch.compile`). Out: the module itself, or its activation in a
hook.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

READABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INPUT = ".input"
# What PEFT calls the module that an adapter's layer wraps.
WRAPPED = ("base_layer", "original_module")


def unwrap(model: nn.Module) -> Any:
    """The causal LM itself: without accelerate's wrappers, without `torch.compile` and without PEFT's outer modules.

    Adapter layers that PEFT injected stay where they are: hook points are the same with and without them.
    """
    from accelerate.utils import extract_model_from_parallel

    bare: Any = extract_model_from_parallel(model, keep_fp32_wrapper=True, keep_torch_compile=False)
    return bare.get_base_model() if hasattr(bare, "get_base_model") else bare  # the former: a `PeftModel`


def without_engine(model: nn.Module) -> Any:
    """The model out of an engine's and the compiler's wrapping; PEFT's stays."""
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_torch_compile=False)


def has_adapters(model: nn.Module) -> bool:
    """True if PEFT wraps the model: its own weights are frozen, and adapters can be switched off.

    Adapters that transformers loaded itself (`model.add_adapter`, `from_pretrained(ADAPTER)`) are part of the model: TRL knows no
    reference below them either.
    """
    return hasattr(without_engine(model), "disable_adapter")


def is_tuner_layer(module: nn.Module) -> bool:
    """True if PEFT wrapped this module around one of the model's modules. Such a layer has a property `disable_adapters`."""
    return isinstance(getattr(type(module), "disable_adapters", None), property)  # a `PreTrainedModel` has a method


def adapter_parts(base: nn.Module) -> set[str]:
    """Names of the modules of a causal LM that belong to adapters: inside of PEFT's layers, but for what these wrap."""
    parts: set[str] = set()
    for name, _module in base.named_modules():
        parent, _, child = name.rpartition(".")
        if parent in parts or (child not in WRAPPED and is_tuner_layer(base.get_submodule(parent))):
            parts.add(name)
    return parts


def adapters_on(model: nn.Module) -> bool:
    """True if an adapter changes the model's activations now."""
    layer = first_adapter_layer(model)
    return layer is not None and not layer.disable_adapters and bool(layer.active_adapters)


def first_adapter_layer(model: nn.Module) -> Any:
    """A layer that PEFT injected, which knows whether adapters are on; None without PEFT."""
    for module in unwrap(model).modules():
        if is_tuner_layer(module):
            return module
    return None


def adapters_off(layer: Any) -> bool:
    """True if the layer's state is that of a reference pass: no adapter is active, or only the one named `ref`."""
    if layer is None:
        return False
    return bool(layer.disable_adapters) or list(layer.active_adapters) == ["ref"]


def backbone(model: nn.Module) -> nn.Module:
    """The decoder without its LM head (`LlamaModel` in a `LlamaForCausalLM`): every forward of a trainer calls it."""
    base = unwrap(model)
    core: nn.Module = getattr(base, "base_model", base)
    return core


def resolve(model: nn.Module, hook_point: str) -> nn.Module:
    """Module at a hook point.

    `<module>.input` is put into the module where nobody asked for it before: without parameters or effect, it gives out what the
    module is given.

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
    if hook_point.endswith(INPUT) and (owner := hook_point.removesuffix(INPUT)) in modules:
        return _Input.of(modules[owner])
    near = difflib.get_close_matches(hook_point, [name for name in modules if name], n=3, cutoff=0.6)
    hint = f" Nearest: {', '.join(f'`{name}`' for name in near)}." if near else ""
    layers = layers_or_none(base)
    known = f" Its decoder layers are `{layers[0]}` … `{layers[-1]}`." if layers else ""
    raise ValueError(
        f"`hook_point` is `{hook_point}` – expected a module path in `{type(base).__name__}`.{hint}{known}"
    )


def on_activation(
    model: nn.Module, hook_point: str, see: Callable[[torch.Tensor], torch.Tensor | None]
) -> torch.utils.hooks.RemovableHandle:
    """Hook that shows the activation (B, T, D) at a hook point to `see` in every pass; what `see` returns takes its place.

    Raises:
        `ValueError`: no such hook point; in a pass, an activation of another shape or of a type that cannot be read.
    """

    return resolve(model, hook_point).register_forward_hook(output_hook(see, lambda o: _checked(o, hook_point)))


def decoder_layers(model: nn.Module) -> list[str]:
    """Paths of the decoder layers in the order in which they run.

    Source: the rule of EleutherAI/sparsify, the only `ModuleList` whose length is the config's number of layers; of several, the
    outermost. Deviation: it is looked for in the text decoder where the model names one, not in a vision tower next to it.

    Raises:
        `ValueError`: the model has no such list, or is an encoder-decoder.
    """
    base = unwrap(model)
    config = base.config.get_text_config()
    if getattr(base.config, "is_encoder_decoder", False):
        raise ValueError(
            f"`{type(base).__name__}` is an encoder-decoder – expected a decoder-only model: what is read here is one stream "
            "over prompt and completion."
        )
    count = config.num_hidden_layers
    inside = _decoder_path(base)
    lists = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and name.startswith(inside)
    ]
    if not lists:
        raise ValueError(
            f"`{type(base).__name__}` has no `ModuleList` of {count} modules – expected its decoder layers. Name the hook points "
            "yourself (`hook_points`, `--hook-point`)."
        )
    path = min(lists, key=lambda name: name.count("."))
    return [f"{path}.{index}" for index in range(count)]


def layers_or_none(model: nn.Module) -> list[str]:
    """Paths of the decoder layers; none where they cannot be told, but for an encoder-decoder, which is refused."""
    try:
        return decoder_layers(model)
    except ValueError:
        if getattr(unwrap(model).config, "is_encoder_decoder", False):
            raise
        return []


def _decoder_path(base: Any) -> str:
    """Where in the model its text decoder is; empty where it does not say, or is one."""
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    return next((name for name, module in base.named_modules() if module is decoder and name), "")


def runs_after(model: nn.Module, hook_point: str, other: str) -> bool:
    """True if `hook_point` runs at or after `other`, so that a change at `other` reaches it.

    A decoder runs its modules in the order of registration. A module is done after its parts.
    """
    names = [name for name, _ in unwrap(model).named_modules()]

    def done(point: str) -> tuple[int, int]:
        if point.endswith(INPUT) and isinstance(
            resolve(model, point), _Input
        ):  # all that comes before the module is done
            return names.index(point.removesuffix(INPUT)) - 1, -point.count(".") + 1
        inside = [i for i, name in enumerate(names) if name == point or name.startswith(f"{point}.")]
        return max(inside), -point.count(".")

    return done(hook_point) >= done(other)


def embedding_point(model: nn.Module) -> str:
    """Hook point of the token embedding's output, before any attention."""
    base = unwrap(model)
    embedding = base.get_input_embeddings()
    return next(name for name, module in base.named_modules() if module is embedding)


def hidden_size(model: nn.Module) -> int:
    """Width D of the residual stream."""
    return int(unwrap(model).config.get_text_config().hidden_size)


def predicts(model: nn.Module) -> bool:
    """True if the model has a language-model head and predicts next tokens. Reward models and classifiers have no such head."""
    base = unwrap(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    return isinstance(head, nn.Module)


def output_tensor(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The activation in a module's output, which some architectures return in a tuple.

    Raises:
        `ValueError`: there is none, or it is not in a precision that can be read, as inside of quantized modules.
    """
    activation = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(activation, torch.Tensor):
        raise ValueError(
            f"A hook point gives out a `{type(activation).__name__}` – expected a tensor, or a tuple that begins with one. "
            "Read at a decoder layer."
        )
    if activation.dtype not in READABLE:
        raise ValueError(
            f"A hook point's activation is of type `{activation.dtype}` – expected "
            f"{', '.join(f'`{dtype}`' for dtype in READABLE)}: quantized numbers are no activations without their scales. Read "
            "at a decoder layer, whose output an 8-bit or 4-bit model has in its compute type."
        )
    return activation


def output_hook(
    see: Callable[[torch.Tensor], torch.Tensor | None], activation_of: Callable[[Any], torch.Tensor] = output_tensor
) -> Callable[[nn.Module, Any, Any], Any]:
    """Forward hook that shows the activation in a module's output to `see`; what `see` returns takes its place."""

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        changed = see(activation_of(output))
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return after


class _Input(nn.Module):
    """Gives out what the module that it is a part of is given."""

    @classmethod
    def of(cls, owner: nn.Module) -> _Input:
        made = cls()
        owner.add_module(INPUT.removeprefix("."), made)
        owner.register_forward_pre_hook(made.before, with_kwargs=True)
        return made

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        return activation

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook before the owner: what it is given goes through this module, and may be changed there."""
        if args:
            return (self(args[0]), *args[1:]), kwargs
        if "hidden_states" not in kwargs:
            given = ", ".join(f"`{key}`" for key, value in kwargs.items() if value is not None) or "nothing"
            raise ValueError(
                f"A hook point that ends in `{INPUT}` names a `{type(module).__name__}`, which is given {given} – expected a "
                "module that is given activations. Name a decoder layer, such as `model.layers.0.input`."
            )
        return args, {**kwargs, "hidden_states": self(kwargs["hidden_states"])}


def _checked(output: Any, hook_point: str) -> torch.Tensor:
    activation = output_tensor(output)
    if activation.dim() != 3:
        raise ValueError(
            f"The activation at `{hook_point}` has shape {tuple(activation.shape)} – expected (sequences, tokens, width): "
            "this model "
            "carries its stream in another shape there. Name a hook point that gives out one vector per token, the final norm "
            "say."
        )
    return activation
