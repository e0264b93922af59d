"""Which model is this? A digest that an artifact carries and that is cheap to check, also under ZeRO-3: a quick first look.

It tells families and checkpoints apart. It does not see small steps, merged adapters or positions: `canaries` do. In: a causal
LM and a hook point. Out: `sha256:…` over the architecture and the norm weights up to the hook point.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch

from .hook_points import resolve, unwrap
from .sharding import in_one_piece, weights_present

if TYPE_CHECKING:
    from torch import nn

# What shapes an activation. Names of files, token ids, dropout and library versions are left out on purpose: they
# differ between copies of one model.
STRUCTURE = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "hidden_act",
    "rms_norm_eps",
    "layer_norm_epsilon",
    "sliding_window",
    "num_experts",
    "num_experts_per_tok",
)


def structure(model: nn.Module) -> dict[str, object]:
    """Architecture of a model, as an artifact's header records it."""
    config = unwrap(model).config.get_text_config()
    return {key: _as_written(value) for key in STRUCTURE if (value := getattr(config, key, None)) is not None}


def identity(model: nn.Module, hook_point: str) -> str:
    """Digest of the architecture and of all norm weights up to the hook point, adapters off.

    Weights enter as bfloat16, so that a copy loaded in float32 and one loaded in bfloat16 agree (one in float16 may not). Models
    with equal norm weights share it: a model and its quantized copy, one with a merged LoRA, one that was trained by steps too
    small to leave bfloat16's rounding, and all models whose norms have no weights. It tells models apart, it proves nothing.
    Where an engine has sharded the weights, all ranks call it together.

    Raises:
        `ValueError`: no such hook point.
    """
    target = resolve(model, hook_point)
    digest = hashlib.sha256(json.dumps(structure(model), sort_keys=True).encode())
    inside = {id(module) for module in target.modules()}
    reached = False
    norms: list[nn.Module] = []
    for name, module in unwrap(model).named_modules():
        if id(module) in inside:
            reached = True
        elif reached:
            break
        if "norm" in type(module).__name__.lower() and "modules_to_save" not in name.split("."):
            norms.append(module)
    with (
        weights_present(norms),
        in_one_piece([p for module in norms for p in module.parameters(recurse=False)]) as whole,
    ):
        for parameter in whole:
            values = parameter.detach().to(device="cpu", dtype=torch.bfloat16)
            digest.update(values.contiguous().view(torch.int16).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _as_written(value: object) -> object:
    # GGUF files hold 1e-5 as the nearest float32.
    return float(f"{value:.4g}") if isinstance(value, float) else value
