"""Where decoder layers write: hook points of their outputs, of attention, of the MLP and of attention heads.

In: a causal LM of any family. Out: hook points by component, one per block. It must not know what is read or changed there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .hook_points import INPUT, decoder_layers, unwrap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

RESIDUAL, ATTENTION_OUT, MLP_OUT, HEADS = "residual", "attention", "mlp", "heads"
COMPONENTS = (RESIDUAL, ATTENTION_OUT, MLP_OUT, HEADS)

# Names of modules in a decoder layer. A module that is named otherwise is found by a part of its name.
_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
_MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "fc2")  # OPT has no module around `fc2`
_ATTENTION_PARTS, _MLP_PARTS = ("attn", "attention", "mixer"), ("mlp", "feed_forward", "feedforward", "ffn", "moe")
_PROJECTION_NAMES = ("o_proj", "c_proj", "out_proj", "dense", "wo", "proj")


def component_points(model: nn.Module, component: str) -> list[str]:
    """Hook point of a component in every block, in the order in which they run.

    Args:
        model (`nn.Module`): a causal LM, wrapped or not.
        component (`str`): `residual` (output of the decoder layer), `attention` and `mlp` (outputs of these modules, before a
            norm that follows them), or `heads` (input of attention's output projection, in which the heads stand side by side).

    Raises:
        `ValueError`: an unknown component, or a decoder layer without such a module.
    """
    if component not in COMPONENTS:
        raise ValueError(
            f"A component is `{component}` – expected one of {', '.join(f'`{name}`' for name in COMPONENTS)}."
        )
    layers, base = decoder_layers(model), unwrap(model)
    if component == RESIDUAL:
        return layers
    if component == MLP_OUT:
        return [_child_named(base, layer, _MLP_NAMES, _MLP_PARTS, component) for layer in layers]
    attention = [_child_named(base, layer, _ATTENTION_NAMES, _ATTENTION_PARTS, component) for layer in layers]
    if component == ATTENTION_OUT:
        return attention
    what = "the output projection of attention"
    return [_child_named(base, module, _PROJECTION_NAMES, (), what) + INPUT for module in attention]


def head_count(model: nn.Module) -> int:
    """Number of query heads per block."""
    return int(unwrap(model).config.get_text_config().num_attention_heads)


def _child_named(base: nn.Module, path: str, names: Sequence[str], parts: Sequence[str], what: str) -> str:
    """Path of the child of a module that has one of the names, else of the one whose name has one of the parts."""
    children = [name for name, child in base.get_submodule(path).named_children() if _has_weights(child)]
    by_name = [name for name in names if name in children]
    by_part = [name for name in children if "norm" not in name and any(part in name for part in parts)]
    for name in by_name + by_part:
        return f"{path}.{name}"
    raise ValueError(
        f"`{path}` has the modules {', '.join(f'`{name}`' for name in children) or 'of no name'} – expected {what} among them. "
        "Leave this component out."
    )


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
