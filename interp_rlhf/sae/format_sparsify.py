"""The format of EleutherAI's sparsify: a folder named after its hook point, with `cfg.json` and `sae.safetensors`.

In: a `RawFile`. Out: `Contents`. It must not know where files come from. Source: eai-sparsify 1.3.3, `sparse_coder.py`.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, cast

from .formats import register_sae_format
from .raw_file import Contents

if TYPE_CHECKING:
    from pathlib import Path

    from .autoencoder import Architecture
    from .raw_file import RawFile, Shape

# Modules outside the decoder layers that can name a folder.
_OUTSIDE = ("embed_tokens", "wte", "norm", "ln_f")


@register_sae_format("sparsify", weights="sae.safetensors", config="cfg.json")
def read_sparsify(raw: RawFile) -> Contents:
    """Contents of a file of sparsify. Problems are noted in `raw.problems`."""
    width = raw.number("d_in")
    size = raw.number("num_latents") if raw.config.get("num_latents") else None
    if size is None and not raw.config.get("num_latents"):  # 0 stands for the expansion factor
        factor = raw.number("expansion_factor", 32)
        size = width * factor if width and factor else None
    k = raw.number("k", 32)
    architecture = raw.choice("activation", ("groupmax", "topk"), "topk")
    transcoder, skip = raw.flag("transcode", False), raw.flag("skip_connection", False)
    if raw.config.get("signed"):
        raw.problems.append(
            "`signed` is true – latents of an early version that may be negative, which are not supported"
        )
    if k and size and (k > size or (architecture == "groupmax" and size % k)):
        raw.problems.append(f"`k` is {k} – expected 1 to {size}, and a divisor of it for `groupmax`")
    shapes: dict[str, Shape] = {
        "encoder.weight": (size, width), "encoder.bias": (size,), "W_dec": (size, width), "b_dec": (width,),
    }  # fmt: skip
    file = raw.take(shapes | ({"W_skip": (width, width)} if skip else {}))
    names = {"encoder": "encoder.weight", "encoder_bias": "encoder.bias", "decoder": "W_dec", "decoder_bias": "b_dec"}
    names |= ({} if transcoder else {"center": "b_dec"}) | ({"skip": "W_skip"} if skip else {})
    point = _hook_point(raw.folder)
    return Contents(
        architecture=cast("Architecture", architecture), k=k, transcoder=transcoder, model_id=_model(raw.folder),
        tensors={} if raw.problems else {ours: file[theirs] for ours, theirs in names.items()},
        reads=f"{point}.input" if transcoder and point else point, predicts=point if transcoder else None,
    )  # fmt: skip


def _hook_point(folder: Path) -> str | None:
    """The folder's name: a module path relative to the model without its LM head. It may contain folders such as `seed0`."""
    name = folder.parent.name if re.fullmatch(r"seed\d+", folder.name) else folder.name
    return name if name in _OUTSIDE or re.search(r"(^|\.)\d+(\.|$)", name) else None


def _model(folder: Path) -> str:
    """The model's id. It is in the `config.json` of the training, one or two folders up."""
    for parent in (folder.parent, folder.parent.parent):
        try:
            config = json.loads((parent / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and isinstance(config.get("model"), str):
            return config["model"]
    return ""
