"""The format of Gemma Scope: `params.npz`.

In: a `RawFile`. Out: `Contents`. The names of repository and folders, not the file, say which activation is encoded. This module
must not know where files come from. Source: sae-lens 6.54.12, `pretrained_sae_loaders.py`; arXiv 2408.05147.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .formats import register_sae_format
from .raw_file import Contents

if TYPE_CHECKING:
    import torch

    from .raw_file import RawFile, Shape

_SITES = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z", "transcoders": "ln2.hook_normalized"}
_ALIASES = {"w_enc": "W_enc", "wenc": "W_enc", "w_dec": "W_dec", "wdec": "W_dec", "benc": "b_enc", "bdec": "b_dec"}


@register_sae_format("gemma_scope", title="gemma-scope", weights="params.npz")
def read_gemma_scope(raw: RawFile) -> Contents:
    """Contents of a `params.npz`. Problems are noted in `raw.problems`."""
    scaling = raw.tensors.get("scaling_factor")
    if scaling is not None and bool((scaling == 1).all()):
        del raw.tensors["scaling_factor"]
    tensors = gemma_scope_tensors(raw)
    repository = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)", raw.origin)
    layer = re.search(r"layer_(\d+)", raw.origin)
    if re.search(r"(^|/)embedding(/|$)", raw.origin):
        raw.problems.append(
            "the autoencoder reads the embedding, whose scale differs – expected the autoencoder of a layer"
        )
    transcoder = repository is not None and repository[3] == "transcoders"
    reads = f"blocks.{layer[1]}.{_SITES[repository[3]]}" if layer and repository else None
    return Contents(
        architecture="jumprelu", tensors={} if raw.problems else tensors, reads=reads, transcoder=transcoder,
        predicts=f"blocks.{layer[1]}.hook_mlp_out" if transcoder and layer else None,
        model_id=f"google/gemma-2-{repository[1]}{'-it' * (repository[2] == 'it')}" if repository else "",
    )  # fmt: skip


def gemma_scope_tensors(raw: RawFile) -> dict[str, torch.Tensor]:
    """Tensors of Gemma Scope and Gemma Scope 2 by our names; empty if there are problems."""
    raw.tensors = {_ALIASES.get(name.lower(), name): tensor for name, tensor in raw.tensors.items()}
    encoder, decoder = raw.tensors.get("W_enc"), raw.tensors.get("W_dec")
    width, size = tuple(encoder.shape) if encoder is not None and encoder.dim() == 2 else (None, None)
    out = decoder.shape[1] if decoder is not None and decoder.dim() == 2 else None
    shapes: dict[str, Shape] = {
        "W_enc": (width, size), "b_enc": (size,), "threshold": (size,), "W_dec": (size, out), "b_dec": (out,),
    }  # fmt: skip
    if "affine_skip_connection" in raw.tensors:
        shapes["affine_skip_connection"] = (width, out)
    file = raw.take(shapes)
    if raw.problems:
        return {}
    tensors = {
        "encoder": file["W_enc"].T, "encoder_bias": file["b_enc"], "decoder": file["W_dec"], "decoder_bias": file["b_dec"],
        "threshold": file["threshold"],
    }  # fmt: skip
    if "affine_skip_connection" in file:
        tensors["skip"] = file["affine_skip_connection"].T
    return tensors
