"""The formats of Gemma Scope (`params.npz`) and Gemma Scope 2 (`params.safetensors`, mostly with `config.json`).

In: a `RawFile`. Out: `Contents`. Where it reads is in the names of repository and folders rather than in the file. It must not
know where files come from. Source: sae-lens 6.54.12, `pretrained_sae_loaders.py`; arXiv 2408.05147.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .formats import Contents

if TYPE_CHECKING:
    import torch

    from .formats import RawFile, Shape

_SITES = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z", "transcoders": "ln2.hook_normalized"}
# Gemma Scope 2: folder to what it reads and predicts, for the folders without `config.json`.
_SITES_2 = {
    "resid_post": ("output", None),
    "attn_out": ("self_attn.o_proj.input", None),
    "mlp_out": ("post_feedforward_layernorm.output", None),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}
_ALIASES = {"w_enc": "W_enc", "wenc": "W_enc", "w_dec": "W_dec", "wdec": "W_dec", "benc": "b_enc", "bdec": "b_dec"}


def read_gemma_scope(raw: RawFile) -> Contents:
    """What a `params.npz` says; what is wrong with it is noted in `raw.problems`."""
    scaling = raw.tensors.get("scaling_factor")
    if scaling is not None and bool((scaling == 1).all()):
        del raw.tensors["scaling_factor"]
    tensors = _tensors(raw)
    repository = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)", raw.origin)
    layer = re.search(r"layer_(\d+)", raw.origin)
    if re.search(r"(^|/)embedding(/|$)", raw.origin):
        raw.problems.append("it is of the embedding, whose scale differs – expected one of a layer")
    transcoder = repository is not None and repository[3] == "transcoders"
    reads = f"blocks.{layer[1]}.{_SITES[repository[3]]}" if layer and repository else None
    return Contents(
        architecture="jumprelu", tensors={} if raw.problems else tensors, reads=reads, transcoder=transcoder,
        predicts=f"blocks.{layer[1]}.hook_mlp_out" if transcoder and layer else None,
        model_id=f"google/gemma-2-{repository[1]}{'-it' * (repository[2] == 'it')}" if repository else "",
    )  # fmt: skip


def read_gemma_scope_2(raw: RawFile) -> Contents:
    """What a `params.safetensors` says; what is wrong with it is noted in `raw.problems`."""
    if raw.config:
        raw.choice("architecture", ("jump_relu",))
    tensors = _tensors(raw)
    reads, predicts = raw.config.get("hf_hook_point_in"), raw.config.get("hf_hook_point_out")
    found = re.search(rf"(?:^|/)({'|'.join(_SITES_2)})(?:_all)?/layer_(\d+)", raw.origin)
    if reads is None and found is not None:
        block = f"model.layers.{found[2]}"
        reads, predicts = (site and f"{block}.{site}" for site in _SITES_2[found[1]])
    return Contents(
        architecture="jumprelu", tensors={} if raw.problems else tensors, reads=reads, predicts=predicts,
        transcoder=predicts is not None or "skip" in tensors, model_id=str(raw.config.get("model_name") or ""),
    )  # fmt: skip


def _tensors(raw: RawFile) -> dict[str, torch.Tensor]:
    raw.tensors = {_ALIASES.get(name.lower(), name): tensor for name, tensor in raw.tensors.items()}
    encoder, decoder = raw.tensors.get("W_enc"), raw.tensors.get("W_dec")
    width, size = tuple(encoder.shape) if encoder is not None and encoder.dim() == 2 else (None, None)
    out = decoder.shape[1] if decoder is not None and decoder.dim() == 2 else None
    shapes: dict[str, Shape] = {
        "W_enc": (width, size), "b_enc": (size,), "threshold": (size,), "W_dec": (size, out), "b_dec": (out,),
    }  # fmt: skip
    if "affine_skip_connection" in raw.tensors:
        shapes["affine_skip_connection"] = (width, out)
    found = raw.take(shapes)
    if raw.problems:
        return {}
    tensors = {
        "encoder": found["W_enc"].T, "encoder_bias": found["b_enc"], "decoder": found["W_dec"], "decoder_bias": found["b_dec"],
        "threshold": found["threshold"],
    }  # fmt: skip
    if "affine_skip_connection" in found:
        tensors["skip"] = found["affine_skip_connection"].T
    return tensors
