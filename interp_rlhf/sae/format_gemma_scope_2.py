"""The format of Gemma Scope 2: `params.safetensors`, in most folders with `config.json`.

In: a `RawFile`. Out: `Contents`. It must not know where files come from. Source: sae-lens 6.54.12, `pretrained_sae_loaders.py`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .format_gemma_scope import gemma_scope_tensors
from .formats import register_sae_format
from .raw_file import Contents

if TYPE_CHECKING:
    from .raw_file import RawFile

# Folder name: the activations that are encoded and predicted. Some folders have no `config.json` that says so.
_FOLDERS = {
    "resid_post": ("output", None),
    "attn_out": ("self_attn.o_proj.input", None),
    "mlp_out": ("post_feedforward_layernorm.output", None),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}


@register_sae_format(
    "gemma_scope_2", title="gemma-scope-2", weights="params.safetensors", config="config.json", config_required=False
)
def read_gemma_scope_2(raw: RawFile) -> Contents:
    """Contents of a `params.safetensors`. Problems are noted in `raw.problems`."""
    if raw.config:
        raw.choice("architecture", ("jump_relu",))
    tensors = gemma_scope_tensors(raw)
    reads, predicts = raw.config.get("hf_hook_point_in"), raw.config.get("hf_hook_point_out")
    place = re.search(rf"(?:^|/)({'|'.join(_FOLDERS)})(?:_all)?/layer_(\d+)", raw.origin)
    if reads is None and place is not None:
        block = f"model.layers.{place[2]}"
        reads, predicts = (site and f"{block}.{site}" for site in _FOLDERS[place[1]])
    return Contents(
        architecture="jumprelu", tensors={} if raw.problems else tensors, reads=reads, predicts=predicts,
        transcoder=predicts is not None or "skip" in tensors, model_id=str(raw.config.get("model_name") or ""),
    )  # fmt: skip
