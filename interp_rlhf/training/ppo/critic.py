"""The critic: a value of every state, read in the policy's own forward.

In: a causal LM, and scoring passes of it. Out: values (B, T) in float32, with their graph in a training pass. It never runs the
policy, and knows neither rewards nor losses. The head is part of the model: engines shard it, checkpoints hold it, adapters
save it.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...activations.hook_points import backbone, decoder_layers, hidden_size, unwrap
from ...activations.sharding import in_one_piece
from ...activations.tap import Tap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...activations.tap import Pass, PassKind

VALUE_HEAD = "value_head"


class ValueHead(nn.Module):
    """V(s) = ⟨h / rms(h), w⟩ + b, in float32 also if the model is in 16 bits.

    The scale of a residual stream differs between models (SmolLM2's last block: rms 44, largest entry 4,427). The division
    removes it and has no parameters. The head starts at 0, so the first rollout's advantages come from its rewards alone. It is
    not an `nn.Linear`, because PEFT's `all-linear` would adapt it.

    Args:
        width (`int`): D.
        dtype (`torch.dtype`): the policy's; ZeRO-3 needs the same for all parameters.
        trunk (`nn.Module`, *optional*): a separate backbone. The critic is then a separate model.
    """

    def __init__(self, width: int, dtype: torch.dtype, trunk: nn.Module | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.trunk = trunk

    def forward(self, activation: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Values (B, T) of the policy's activation (B, T, D), or, with a trunk, of the trunk's last hidden state."""
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
        `ValueError`: the model has an attribute of that name already.
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
    # The output of a trunk may be narrower than its stream: OPT-350M projects it down.
    width = getattr(model.get_output_embeddings(), "in_features", None) if own_trunk else None
    head = ValueHead(width or hidden_size(model), model.dtype, trunk)
    setattr(model, VALUE_HEAD, head.to(parameter.device) if parameter.device.type != "meta" else head)


@dataclass
class ValuePass:
    """One scoring pass of the policy.

    Attributes:
        values (`torch.FloatTensor` of shape (B, T)): V at every position. V(s_t) is at the token before y_t.
        input_ids (`torch.LongTensor` of shape (B, T)): the tokens.
        log_probs (`torch.Tensor` of shape (B, T − 1), *optional*): what TRL's fused head returned, without gradient.
    """

    values: torch.Tensor
    input_ids: torch.Tensor | None
    log_probs: torch.Tensor | None = None


class Critic:
    """Runs a model's value head on the activation of its last decoder layer, at the end of each scoring pass.

    Args:
        model (`nn.Module`): the trainer's model, with adapters, without an engine around it.
        detach_trunk (`bool`): no gradient from values into the policy.
        head (`bool`, defaults to `True`): without it, only log-probs are kept.
    """

    def __init__(self, model: nn.Module, detach_trunk: bool, head: bool = True):
        self._base = unwrap(model)
        self._detach, self._head = detach_trunk, head
        self._point = decoder_layers(model)[-1]
        self._asked = False
        self._passes: list[ValuePass] = []
        self._tap = Tap(model, [], record=(), keep=[self._point] if head else [], keep_log_probs=True)
        self._tap.open = False
        self._handles = [
            model.register_forward_pre_hook(self._called, with_kwargs=True),
            model.register_forward_hook(self._returned),
        ]

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._tap.remove()
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def reading(self, kind: PassKind) -> Iterator[None]:
        """Open for the policy's scoring passes: those that TRL gives `labels`, not those of generation or of the reference.

        Args:
            kind (`str`): `policy` if the passes have a gradient, `policy_no_grad` otherwise.
        """
        self._passes.clear()
        self._tap.clear()
        self._tap.keep_kind = kind
        self._asked = True
        try:
            yield
        finally:
            self._asked = self._tap.open = False

    def take(self) -> list[ValuePass]:
        """Passes since `reading` began, oldest first."""
        passes, self._passes = self._passes, []
        return passes

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # `use_cache` does not tell: continuous batching generates without TRL's cache.
        self._tap.open = self._asked and kwargs.get("labels") is not None

    def _returned(self, module: nn.Module, args: Any, output: Any) -> None:
        self._tap.open = False
        for recorded in self._tap.take():
            values = torch.empty(0)
            if self._head:
                if (
                    self._point not in recorded.activations
                ):  # a compiled model has no hooks; the trainer says what to do
                    continue
                values = self._values(recorded)
            log_probs = recorded.log_probs
            if log_probs is not None:
                if values.requires_grad:
                    # DDP takes parameters for unused that do not reach the output, and would not wait for their gradient.
                    output["log_probs"] = log_probs + 0 * values.sum()
                log_probs = log_probs.detach()
            self._passes.append(ValuePass(values, recorded.input_ids, log_probs))

    def _values(self, recorded: Pass) -> torch.Tensor:
        activation = recorded.activations[self._point]
        inputs = {"input_ids": recorded.input_ids, "attention_mask": recorded.attention_mask}
        values: torch.Tensor = getattr(self._base, VALUE_HEAD)(
            activation.detach() if self._detach else activation, **inputs
        )
        return values
