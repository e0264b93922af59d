"""The critic: a value of every state, read in the policy's own forward.

In: a causal LM, and passes of it that are asked for. Out: values (B, T) in float32, with their graph in a training pass. It
never runs the policy, and knows neither rewards nor losses. The head is part of the model: engines shard it, checkpoints hold
it, adapters save it.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...activations.hook_points import (
    adapters_off,
    backbone,
    decoder_layers,
    first_adapter_layer,
    hidden_size,
    output_tensor,
    resolve,
    unwrap,
)
from ...activations.own_passes import is_reading
from ...activations.sharding import in_one_piece

if TYPE_CHECKING:
    from collections.abc import Iterator

VALUE_HEAD = "value_head"


class ValueHead(nn.Module):
    """V(s) = ⟨h / rms(h), w⟩ + b, in float32 whatever the model's precision.

    A residual stream has no scale of its own (SmolLM2's last block: rms 44, largest entry 4,427), hence the division, which
    has no parameters. The head begins at 0, so that the first rollout's advantages are its rewards'. It is not an `nn.Linear`:
    PEFT's `all-linear` would take it for one to adapt.

    Args:
        width (`int`): D.
        dtype (`torch.dtype`): the policy's: ZeRO-3 wants one for all.
        trunk (`nn.Module`, *optional*): a backbone of its own, which makes it a model of its own.
    """

    def __init__(self, width: int, dtype: torch.dtype, trunk: nn.Module | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.trunk = trunk

    def forward(self, activation: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Values (B, T) of an activation (B, T, D); with a trunk, of what the trunk makes of the tokens."""
        if self.trunk is not None:
            activation = self.trunk(**inputs, use_cache=False).last_hidden_state
        with torch.autocast(activation.device.type, enabled=False):
            activation = activation.float()
            scaled = activation * torch.rsqrt(activation.pow(2).mean(-1, keepdim=True) + 1e-6)
            return scaled @ self.weight.float() + self.bias.float()


def add_value_head(model: Any, own_trunk: bool) -> None:
    """Register a `ValueHead` on a causal LM, before TRL wraps it.

    Args:
        model (`PreTrainedModel`): the causal LM itself.
        own_trunk (`bool`): give it a copy of the backbone as it is now.

    Raises:
        `ValueError`: the model has something of that name.
    """
    if hasattr(model, VALUE_HEAD):
        raise ValueError(
            f"The model has a `{VALUE_HEAD}` already – expected a plain causal LM. Load it again: a model belongs to one trainer."
        )
    parameter = next(model.parameters())
    trunk = None
    if own_trunk:
        source = backbone(model)
        with in_one_piece(list(source.parameters())):  # ZeRO-3 takes a model apart when it is loaded
            trunk = copy.deepcopy(source)
        trunk.requires_grad_(True)
    # What a trunk gives out may be narrower than its stream: OPT-350M projects it down.
    width = getattr(model.get_output_embeddings(), "in_features", None) if own_trunk else None
    head = ValueHead(width or hidden_size(model), model.dtype, trunk)
    setattr(model, VALUE_HEAD, head.to(parameter.device) if parameter.device.type != "meta" else head)


@dataclass
class ValuePass:
    """What one forward of the policy left.

    Attributes:
        values (`torch.FloatTensor` of shape (B, T)): V at every position, that of the token before y_t being V(s_t).
        input_ids (`torch.LongTensor` of shape (B, T)): the tokens.
        log_probs (`torch.Tensor` of shape (B, T − 1), *optional*): what TRL's fused head returned.
    """

    values: torch.Tensor
    input_ids: torch.Tensor | None
    log_probs: torch.Tensor | None = None


class Critic:
    """Runs a model's value head where its last decoder layer has run, in the passes that are asked for.

    Args:
        model (`nn.Module`): the trainer's model, with adapters, without an engine around it.
        detach_trunk (`bool`): no gradient from values into the policy.
        head (`bool`, defaults to `True`): without it, only log-probs are noted.
    """

    def __init__(self, model: nn.Module, detach_trunk: bool, head: bool = True):
        self._base = unwrap(model)
        self._detach, self._head = detach_trunk, head
        self._adapter_layer = first_adapter_layer(model)
        self._open = self._scoring = False
        self._current: ValuePass | None = None
        self._inputs: dict[str, Any] = {}
        self._passes: list[ValuePass] = []
        last = resolve(model, decoder_layers(model)[-1])
        self._handles = [
            model.register_forward_pre_hook(self._called, with_kwargs=True),
            backbone(model).register_forward_pre_hook(self._begin, with_kwargs=True),
            last.register_forward_hook(self._fire),
            model.register_forward_hook(self._returned),
        ]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Open for the policy's scoring passes, which TRL gives `labels`: not for generation's, and not for the reference's."""
        self._passes.clear()
        self._open = True
        try:
            yield
        finally:
            self._open = self._scoring = False
            self._current = None

    def take(self) -> list[ValuePass]:
        """Passes since `reading` began, oldest first."""
        passes, self._passes = self._passes, []
        return passes

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # `use_cache` does not tell: continuous batching generates without TRL's cache.
        self._scoring = kwargs.get("labels") is not None

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._current = None
        if not self._open or not self._scoring or is_reading() or adapters_off(self._adapter_layer):
            return
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        self._current = ValuePass(torch.empty(0), input_ids)
        self._inputs = {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}
        if not self._head:
            self._passes.append(self._current)

    def _fire(self, module: nn.Module, args: Any, output: Any) -> None:
        current = self._current
        if current is None or not self._head:
            return
        activation = output_tensor(output)
        head = getattr(self._base, VALUE_HEAD)
        inputs, self._inputs = self._inputs, {}
        current.values = head(activation.detach() if self._detach else activation, **inputs)
        self._passes.append(current)

    def _returned(self, module: nn.Module, args: Any, output: Any) -> None:
        current, self._current, self._scoring = self._current, None, False
        if current is None or getattr(output, "log_probs", None) is None:
            return
        if current.values.requires_grad:
            # DDP takes parameters for unused that do not reach the output, and would not wait for their gradient.
            output["log_probs"] = output.log_probs + 0 * current.values.sum()
        current.log_probs = output.log_probs.detach()
