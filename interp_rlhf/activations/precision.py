"""How precise a model's numbers are, as it runs now.

In: a causal LM. Out: `float32`, `16 bits`, `8 bits` or `4 bits`, and what in the model is that coarse. It must not know readouts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .hook_points import READABLE, adapter_parts, unwrap
from .sharding import device_of, is_sharded

if TYPE_CHECKING:
    from torch import nn

# From fine to coarse.
PRECISIONS = ("float32", "16 bits", "8 bits", "4 bits")
# In the names of files that define quantized modules.
_QUANTIZED = (
    "aqlm",
    "awq",
    "bitnet",
    "eetq",
    "fbgemm",
    "finegrained_fp8",
    "gptq",
    "hqq",
    "mxfp4",
    "quant",
    "spqr",
    "vptq",
)


def coarseness(model: nn.Module, adapters: bool = True) -> tuple[str, str]:
    """Precision of a model, one of `PRECISIONS`, and what in it is coarser than float32. A separate head is not looked at.

    Args:
        adapters (`bool`, defaults to `True`): look at adapters too, not only at the base that canaries are about.
    """
    base = unwrap(model)
    quantization = getattr(base.config, "quantization_config", None)
    bits = {8: "8 bits", 4: "4 bits"}
    left_out = set() if adapters else adapter_parts(base)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    modules = [module for name, module in base.named_modules() if name not in left_out and module is not head]
    for module in modules:
        kind = type(module).__name__.lower()
        for size, name in bits.items():
            if f"{size}bit" in kind:
                return name, f"`{type(module).__name__}` modules"
        if "quantized" in type(module).__module__:
            return "8 bits", f"`{type(module).__module__}` modules"
    if (
        quantization is not None
        and not getattr(quantization, "dequantize", False)
        and any(map(_is_quantized, modules))
    ):
        return "4 bits" if "4" in str(quantization) else "8 bits", "its `quantization_config`"
    types = {parameter.dtype for module in modules for parameter in module.parameters(recurse=False)}
    if whole := sorted(str(kind) for kind in types if kind not in READABLE):
        return "8 bits", f"weights of type {', '.join(whole)}"
    if half := sorted(str(kind) for kind in types if kind in (torch.bfloat16, torch.float16)):
        return "16 bits", f"weights of type {', '.join(half)}"
    device = device_of(base).type
    if torch.is_autocast_enabled(device):
        return "16 bits", "automatic mixed precision"
    if device == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        return "16 bits", "TF32 products"
    return "float32", ""


def _is_quantized(module: nn.Module) -> bool:
    """True if a module really holds quantized numbers. A dequantized model may still carry the configuration."""
    own = list(module.parameters(recurse=False))
    if any(p.dtype not in READABLE or type(p.data).__module__.startswith(("torchao", "optimum")) for p in own):
        return True
    whole = (torch.int8, torch.uint8, torch.int16, torch.int32)
    if any(buffer.dim() > 1 and buffer.dtype in whole for buffer in module.buffers(recurse=False)):
        return True
    return any(word in type(module).__module__.lower() for word in _QUANTIZED)


def precision_of(model: nn.Module) -> str:
    """One of `PRECISIONS`, for what a model, run as things stand now, gives."""
    return coarseness(model)[0]


def numbers_of(model: nn.Module) -> str:
    """`16 bits` where every number of the first large weights is one of bfloat16 or float16, as in most checkpoints."""
    base = unwrap(model)
    if is_sharded(model):
        return "16 bits"  # not looked at: what is fitted is whole
    looked = 0
    for parameter in base.parameters():
        if parameter.dim() < 2 or parameter.is_meta:
            continue
        values = parameter.detach().flatten()[:4096].float()
        if all((values.to(kind).float() != values).any() for kind in (torch.bfloat16, torch.float16)):
            return "float32"
        looked += 1
        if looked == 16:
            break
    return "16 bits" if looked else "float32"  # what is offloaded is not known
