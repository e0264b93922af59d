"""Translates hook names of other libraries to hook points: paths of the modules that output the activations.

In: a name from a file (TransformerLens' `blocks.15.hook_resid_post`, Hugging Face's `model.layers.15.output`, sparsify's
`layers.15.mlp`) and the layout of a decoder. Out: `model.layers.15`. If no module outputs the named activation, it
raises an error. It must not know file formats.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..activations.hook_points import decoder_layers, embedding_point, unwrap
from ..activations.stream_point import stream_point

_BLOCK = re.compile(r"(?:[\w.]*?\.)?(?:layers|h|blocks)\.(\d+)((?:\.\w+)*)")
_LLAMA = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
_SANDWICH = frozenset({"pre_feedforward_layernorm", "post_feedforward_layernorm"})
_GPT2 = frozenset({"attn", "mlp", "ln_1", "ln_2"})
_ATTENTIONS = ("self_attn", "attn", "attention", "linear_attn")
_MLPS = ("mlp", "block_sparse_moe", "feed_forward")
# TransformerLens' names for the parts of a block. `stream` is the residual stream before the block.
_PARTS = {
    "hook_resid_pre": "stream", "hook_in": "stream", "hook_resid_post": "block", "hook_out": "block",
    "hook_attn_out": "attention_out", "attn.hook_out": "attention", "attn.hook_in": "attention_in",
    "hook_mlp_out": "mlp_out", "mlp.hook_out": "mlp", "mlp.hook_in": "mlp_in",
}  # fmt: skip
# Possible modules of each part. TransformerLens reads what a part adds to the stream: if a norm follows the part, that is the
# output of the norm.
_PLAIN = {
    "attention": _ATTENTIONS, "attention_in": ("input_layernorm", "ln_1"), "attention_out": _ATTENTIONS,
    "mlp": _MLPS, "mlp_in": ("post_attention_layernorm", "ln_2"), "mlp_out": _MLPS,
}  # fmt: skip
_CHOICES = {
    "post_feedforward_layernorm": _PLAIN | {  # Gemma 2 and later; OLMo 2, which has no norm before the MLP
        "attention_out": ("post_attention_layernorm",), "mlp_in": ("pre_feedforward_layernorm",),
        "mlp_out": ("post_feedforward_layernorm",),
    },
    "post_mlp_layernorm": _PLAIN | {  # GLM-4
        "attention_out": ("post_self_attn_layernorm",), "mlp_out": ("post_mlp_layernorm",),
    },
}  # fmt: skip
# Why no module outputs this activation, and an alternative.
_NOWHERE = {
    "attn.hook_z": (
        "the heads before the output projection, which no module gives out",
        "Take an autoencoder of `hook_attn_out` or `hook_resid_post`.",
    ),
    "hook_resid_mid": (
        "the residual stream between attention and MLP, which is added up inside the block",
        "Take an autoencoder of `hook_resid_post`.",
    ),
    "hook_mlp_in": (
        "in TransformerLens the residual stream before the norm, which no module gives out; sae-lens also writes it for the "
        "MLP's input after the norm (Gemma Scope 2)",
        "If it reads the MLP's input, pass that norm as `hook_point`: `{mlp_in}`.",
    ),
    "hook_normalized": (
        "the norm's output before its weight is applied, which no module gives out",
        "If the norm's weight was applied in training, pass the norm as `hook_point`; otherwise take an autoencoder of "
        "`hook_resid_post`.",
    ),
}


@dataclass(frozen=True)
class Layout:
    """Where a decoder keeps the parts that hook names refer to.

    Attributes:
        blocks (`str`): path of the list of its layers, such as `model.layers`.
        children (`frozenset[str]`): names of a layer's parts.
        embedding (`str`): path of the token embedding.
        stream (`str`, *optional*): hook point of the first layer's input.
        count (`int`, *optional*): number of layers; None without a model.
        modules (`frozenset[str]`, *optional*): all module paths; None without a model.
        base (`str`): path of the decoder without its LM head, to which sparsify's names are relative.
    """

    blocks: str
    children: frozenset[str]
    embedding: str
    stream: str | None
    count: int | None = None
    modules: frozenset[str] | None = None
    base: str = "model"

    @classmethod
    def of_model(cls, model: Any) -> Layout:
        """Layout of a model, wrapped or not."""
        base = unwrap(model)
        modules = frozenset(name for name, _ in base.named_modules() if name)
        layers = decoder_layers(base)
        blocks, embedding = layers[0].rpartition(".")[0], embedding_point(base)
        children = frozenset(name[len(layers[0]) + 1 :] for name in modules if name.startswith(f"{layers[0]}."))
        root = blocks.rpartition(".")[0]
        return cls(
            blocks,
            children,
            embedding,
            stream_point(base),
            len(layers),
            modules,
            getattr(base, "base_model_prefix", root),
        )

    @classmethod
    def of_name(cls, model_id: str = "") -> Layout:
        """Layout that a model's name suggests: GPT-2's, Gemma's with norms around each part, or Llama's."""
        name = model_id.lower()
        if re.search(r"gpt-?2", name):
            return cls("transformer.h", _GPT2, "transformer.wte", "transformer.drop", base="transformer")
        around = _SANDWICH if re.search(r"gemma-?[234](?![\db])", name) else frozenset()
        return cls("model.layers", _LLAMA | around, "model.embed_tokens", "model.embed_tokens")

    def block(self, index: int) -> str:
        if self.count is not None and index >= self.count:
            raise ValueError(f"A hook name is of layer {index} – the model has layers 0 to {self.count - 1}.")
        return f"{self.blocks}.{index}"

    def part(self, index: int, part: str) -> str | None:
        """Path of the module that outputs a part; None if no module does."""
        if part == "block":
            return self.block(index)
        if part == "stream":
            return self.stream if index == 0 else self.block(index - 1)
        choices = next((_CHOICES[norm] for norm in _CHOICES if norm in self.children), _PLAIN)
        paths = {name: f"{self.block(index)}.{name}" for name in choices[part]}
        return next((path for name, path in paths.items() if self._has(name, path)), None)

    def _has(self, child: str, path: str) -> bool:
        return child in self.children if self.modules is None else path in self.modules


def module_path(name: str, layout: Layout) -> str:
    """Hook point for a name of TransformerLens, sparsify or Hugging Face, with or without `.input` or `.output`.

    Raises:
        `ValueError`: no module outputs this activation, or the model has fewer layers.
    """
    if "hook_" in name:
        return _from_transformer_lens(name, layout)
    plain = name.removesuffix(".output")
    return _input_of(plain.removesuffix(".input"), layout) if plain.endswith(".input") else _module_path(plain, layout)


def _from_transformer_lens(name: str, layout: Layout) -> str:
    if name in ("hook_embed", "embed.hook_out"):
        return layout.embedding
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    index, rest = (int(found[1]), found[2]) if found else (0, name)
    if found and rest in _PARTS:
        path = layout.part(index, _PARTS[rest])
        if path is None:
            raise ValueError(_refusal(name, "the output of no module of this architecture", ""))
        return path
    why, instead = _NOWHERE.get(rest, _NOWHERE.get(rest.rpartition(".")[2], ("not the output of a known module", "")))
    norm = layout.part(index, "mlp_in") or "the norm before the MLP"
    raise ValueError(_refusal(name, why, instead.format(mlp_in=norm)))


def _module_path(name: str, layout: Layout) -> str:
    """Module path in this model for a path relative to its base, or for a path in another wrapper of the same model."""
    for candidate in (name, f"{layout.base}.{name}"):
        if layout.modules is not None and candidate in layout.modules:
            return candidate
    found = _BLOCK.fullmatch(name)
    if found is not None and (layout.modules is not None or name.startswith("layers.")):
        return layout.block(int(found[1])) + found[2]
    if layout.modules is None and re.match(r"h\.\d|wte$|embed_tokens$", name):
        return f"{'model' if name == 'embed_tokens' else 'transformer'}.{name}"
    return name


def _input_of(name: str, layout: Layout) -> str:
    path = _module_path(name, layout)
    block = _BLOCK.fullmatch(path)
    if block is not None:
        parts = {"": "stream"} | dict.fromkeys(_MLPS, "mlp_in") | dict.fromkeys(_ATTENTIONS, "attention_in")
        part = parts.get(block[2].removeprefix("."))
        before = layout.part(int(block[1]), part) if part else None
        if before is not None:
            return before
    raise ValueError(_refusal(f"{name}.input", f"what `{path}` reads, which no module gives out", ""))


def _refusal(name: str, why: str, instead: str) -> str:
    do = instead or "Take an autoencoder of a layer's output (`hook_resid_post`), or pass `hook_point`."
    return f"`{name}` is {why} – expected a name for some module's output. {do}"
