"""What makes a trainer's pass another reading than `read()`'s: noise of the training mode, padding, and RoPE that looks at the
batch.

In: a model as a trainer has it. Out: causes, in words; none where a pass may be taken for a reading. Where the model can be
run it is run: measured is what it does, not what its config says. It must not know readouts.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .hook_points import (
    adapter_parts,
    adapters_off,
    backbone,
    first_adapter_layer,
    is_tuner_layer,
    unwrap,
    without_engine,
)
from .own_passes import reading
from .sharding import device_of, has_hook, is_sharded, switch_adapters

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .batch import TokenBatch

logger = logging.getLogger(__name__)

# A pass that repeats in float32 does so to 1e-6 or so; in 16 bits, kernels for other shapes differ by a percent.
FELT, FELT_IN_16_BITS = 1e-3, 5e-2
PADS, TOKENS = 7, 12
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# Of layers that a causal LM does not run.
_OF_OTHER_HEADS = ("summary", "classifier")
_NOISY = ("drop", "jitter", "noise")
# Rates of what is drawn rarely, or moves little: one pass may not show it.
_RARE = ("layerdrop", "layer_drop", "drop_path", "drop_prob", "jitter")


@dataclass(frozen=True)
class Causes:
    """Why a trainer's passes over a model are no readings of it; all empty where they are.

    Attributes:
        noise (`tuple[str, ...]`): what the training mode draws at random in the model without adapters.
        adapters (`tuple[str, ...]`): what it draws in its adapters.
        padding (`tuple[str, ...]`): why tokens to the left of a row, which attention does not see, move it all the same.
        reach (`int`, *optional*): tokens below which a row does not feel how long the others are; None where it never does.
    """

    noise: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    padding: tuple[str, ...] = ()
    reach: int | None = None


def causes(model: nn.Module, args: Any = None) -> Causes:
    """Causes that are known before training begins.

    Args:
        model (`nn.Module`): a causal LM, wrapped or not.
        args (`TrainingArguments`, *optional*): the trainer's: what it switches on when training begins.
    """
    base = unwrap(model)
    noise: list[str] = []
    alpha = getattr(args, "neftune_noise_alpha", None) or _neftune(base)
    if alpha:
        noise.append(f"NEFTune noise on the embeddings (`neftune_noise_alpha` {alpha})")
    adapters = _of_adapters(model)
    inside = adapter_parts(base)
    for name, module in base.named_modules():
        if name in inside or name.rpartition(".")[2].startswith(_OF_OTHER_HEADS):
            continue
        if isinstance(module, DROPOUTS) and module.p > 0:
            noise.append(f"dropout {module.p} (`{name}`)")
    padding: list[str] = []
    if runs_here(base):
        drawn, moved, limit = _how_far_it_moves(base)
        known = [source for source in noise if not source.startswith("dropout")]
        rare = _rare(base, inside)
        if drawn > limit:
            what = (
                noise[len(known) :][:1]
                or rare[:1]
                or _rates_in_config(base)[:1]
                or ["something that is drawn at random"]
            )
            noise = known + [f"{what[0]}: in training mode activations move by {drawn:.1%}"]
        else:
            noise = known + rare[:1]
        if moved > limit:
            padding.append(f"left padding moves activations by {moved:.1%}")
    else:
        noise += _rates_in_config(base)
        if getattr(base.config.get_text_config(), "rope_parameters", None) is None:
            padding.append("positions are not rotary, and left padding shifts them")
    return Causes(tuple(dict.fromkeys(noise)), tuple(dict.fromkeys(adapters))[:1], tuple(padding), rope_reach(base))


def rope_reach(model: nn.Module) -> int | None:
    """Tokens below which rotary positions do not depend on the longest row of the batch; None where they never do.

    `longrope` takes other factors for a whole batch, `dynamic` another base, where one row is longer than what the model was
    trained on.
    """
    config = unwrap(model).config.get_text_config()
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, Mapping):
        return None
    parts = [part for part in rope.values() if isinstance(part, Mapping) and "rope_type" in part] or [rope]
    reaches = [
        int(part.get("original_max_position_embeddings") or config.max_position_embeddings)
        for part in parts
        if part.get("rope_type") == "longrope" or "dynamic" in str(part.get("rope_type"))
    ]
    return min(reaches, default=None)


@contextmanager
def rope_from_the_start(model: nn.Module) -> Iterator[Any]:
    """Gives a function that makes rotary positions forget the rows that they have seen; afterwards they are as they were."""
    modules = [m for m in unwrap(model).modules() if hasattr(m, "original_max_seq_len")]
    kept = [(m, _buffers_of(m), {k: v for k, v in vars(m).items() if "max_seq_len_cached" in k}) for m in modules]

    def forget() -> None:
        for module in modules:
            for name in [n for n in (*vars(module), *_buffers_of(module)) if n.endswith("original_inv_freq")]:
                prefix = name.removesuffix("original_inv_freq")
                current = getattr(module, f"{prefix}inv_freq")
                module.register_buffer(
                    f"{prefix}inv_freq", getattr(module, name).to(current.device).clone(), persistent=False
                )
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)

    try:
        yield forget
    finally:
        for module, buffers, numbers in kept:
            for name, buffer in buffers.items():
                setattr(module, name, buffer)
            vars(module).update(numbers)


def _buffers_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's buffers by name; one tensor may have two names."""
    return dict(module.named_buffers(recurse=False, remove_duplicate=False))


def runs_here(model: nn.Module) -> bool:
    """True if this process alone can run the model: no engine has sharded it, and no weight is on the meta device."""
    base = unwrap(model)
    return not is_sharded(base) and not any(p.is_meta for p in base.parameters())


def _rates_in_config(base: Any) -> list[str]:
    """What the config says of noise: functional dropout, jitter of a router."""
    return [
        f"`{key}` {rate}"
        for key, rate in vars(base.config.get_text_config()).items()
        if isinstance(rate, float) and rate > 0 and any(word in key for word in _NOISY) and not key.startswith(_OF_OTHER_HEADS)
    ]  # fmt: skip


def _rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _rare(base: Any, inside: set[str]) -> list[str]:
    """Rates that modules of the text decoder hold, where no module that could be switched off draws: layerdrop, paths, jitter.

    A config's layerdrop or drop path counts where no module holds one. Its jitter does not: a pass would show it.
    """
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    held = [
        (f"`{key}` {value} (`{name or type(module).__name__}`)", key, value)
        for name, module in (decoder if isinstance(decoder, nn.Module) else base).named_modules()
        if name not in inside
        for key, value in vars(module).items()
        if isinstance(value, int | float) and any(word in key.lower() for word in _RARE)
    ]
    sources = [said for said, _, value in held if _rate(value)]
    if not any(key for _, key, _ in held if "jitter" not in key):
        config = vars(base.config.get_text_config()).items()
        words = [word for word in _RARE if word != "jitter"]
        sources += [f"`{k}` {v}" for k, v in config if _rate(v) and any(w in k for w in words) and "encoder" not in k]
    return sources


def _of_adapters(model: nn.Module) -> list[str]:
    """Dropout in adapters: of modules, of rates that tuner layers hold, and of configurations whose layers show neither."""
    base = unwrap(model)
    modules, inside = dict(base.named_modules()), adapter_parts(base)
    sources, shown = [], False
    for name in sorted(inside):
        module = modules[name]
        if "dropout" in type(module).__name__.lower():
            shown = True
            if _rate(getattr(module, "p", 0)):
                sources.append(f"dropout {module.p} (`{name}`)")
    for name, module in modules.items():
        if not is_tuner_layer(module):
            continue
        for key in [key for key in (*vars(module), *dict(module.named_children())) if "dropout" in key]:
            shown = True
            rates = vars(module).get(key)
            for rate in rates.values() if isinstance(rates, Mapping) else [rates]:
                if _rate(rate):
                    sources.append(f"`{key}` {rate} (`{name}`)")
    if not shown:
        peft_model = without_engine(model)
        configs = getattr(peft_model, "peft_config", None) or getattr(base, "peft_config", None) or {}
        for adapter, config in configs.items():
            rates = {key: rate for key, rate in vars(config).items() if "dropout" in key and _rate(rate)}
            sources += [f"`{key}` {rate} (adapter `{adapter}`)" for key, rate in rates.items()]
    return sources


def _neftune(base: Any) -> float:
    embedding = base.get_input_embeddings()
    return float(getattr(embedding, "neftune_noise_alpha", 0.0) or 0.0) if has_hook(embedding, "neftune") else 0.0


@torch.no_grad()
def _how_far_it_moves(base: Any) -> tuple[float, float, float]:
    """How far activations move in training mode and behind left padding, relative to their size, and from where on it is felt."""
    core, device = backbone(base), device_of(base)
    vocabulary = int(base.config.get_text_config().vocab_size)
    ids = torch.randint(0, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    padded = torch.cat([ids[:, :1].expand(1, PADS), ids], dim=1)
    attended = torch.ones_like(padded)
    attended[:, :PADS] = 0
    flags = [(module, module.training) for module in base.modules()]

    def last(input_ids: torch.Tensor, mask: torch.Tensor, training: bool) -> torch.Tensor:
        for module, _ in flags:
            module.training = training
        states: torch.Tensor = core(input_ids=input_ids, attention_mask=mask, use_cache=False)[0]
        return states[0, -TOKENS + 1 :].double()

    devices = [device] if device.type == "cuda" else []
    layer = first_adapter_layer(base)
    was_off = adapters_off(layer)
    try:
        with reading(), torch.random.fork_rng(devices), warnings.catch_warnings(), rope_from_the_start(base):
            warnings.simplefilter("ignore")  # of checkpointing without a gradient
            if layer is not None and not was_off:  # the adapters' own noise is told by their modules
                switch_adapters(filter(is_tuner_layer, base.modules()), enabled=False)
            plain = last(ids, torch.ones_like(ids), False)
            drawn = last(ids, torch.ones_like(ids), True)
            moved = last(padded, attended, False)
    finally:
        for module, flag in flags:
            module.training = flag
        if layer is not None and not was_off:
            switch_adapters(filter(is_tuner_layer, base.modules()), enabled=True)
    scale = plain.pow(2).mean().sqrt().clamp(min=1e-12)
    limit = (
        FELT if plain.numel() and next(base.parameters()).dtype in (torch.float32, torch.float64) else FELT_IN_16_BITS
    )
    return (
        float((drawn - plain).pow(2).mean().sqrt() / scale),
        float((moved - plain).pow(2).mean().sqrt() / scale),
        limit,
    )


def require_positions(model: nn.Module, batch: TokenBatch) -> None:
    """Raises `ValueError` for rows that are longer than a model's learned positions; warns where positions are rotary."""
    config = unwrap(model).config.get_text_config()
    longest = int(batch.attention_mask.sum(1).max()) if batch.attention_mask.numel() else 0
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or longest <= limit or rope_reach(model) is not None:
        return
    if getattr(config, "rope_parameters", None) is None:
        raise ValueError(
            f"A row has {longest} tokens – expected at most {limit}, the model's learned positions. Cut it."
        )
    logger.warning(
        "A row has %d tokens and the model was trained on %d positions: what it makes of the rest says little. Cut it.",
        longest, limit,
    )  # fmt: skip
