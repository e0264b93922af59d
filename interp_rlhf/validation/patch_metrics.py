"""What patching measures on a run: the margin of one answer over another, a readout's score, or a function of the logits.

In: a model with hooks on it, and a prompt. Out: one number per copy of the prompt, with its gradient where one is asked for. It
must not know pairs or sites.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..activations.hook_points import backbone, on_activation, unwrap
from ..activations.sharding import device_of
from ..concepts.pooling import pool

if TYPE_CHECKING:
    from torch import nn

    from ..concepts.readout import Readout
    from .contrast_pairs import PromptRows

LogitFunction = Callable[[torch.Tensor], torch.Tensor]


class PatchMetric(Protocol):
    """A number of a run.

    Attributes:
        name (`str`): what it is, in words.
        answers (`bool`): whether it needs the answers of a pair.
    """

    @property
    def name(self) -> str: ...

    @property
    def answers(self) -> bool: ...

    def __call__(self, model: nn.Module, rows: PromptRows, copies: int) -> torch.Tensor:
        """The number (copies,) of `copies` runs of one prompt in one forward; a copy's rows stand next to each other."""


@dataclass(frozen=True)
class Margin:
    """Log-probability of the followed answer less that of the violated one, in nats."""

    name: str = "log p(followed) − log p(violated)"
    answers: bool = True

    def __call__(self, model: nn.Module, rows: PromptRows, copies: int) -> torch.Tensor:
        first = rows.prompt - 1  # the position that predicts the first token of an answer
        logits = _logits(model, rows, copies, rows.input_ids.shape[1] - first)
        if len(rows.input_ids) == 1:  # one token each: the normalization is the same for both, and drops out
            (followed,), (violated,) = rows.answers
            return logits[:, 0, followed] - logits[:, 0, violated]
        sums = []
        for row, answer in enumerate(rows.answers):
            log_probs = logits[row :: len(rows.answers), : len(answer)].log_softmax(-1)
            targets = torch.tensor(answer, device=logits.device).expand(len(log_probs), -1)
            sums.append(log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1).sum(-1))
        return sums[0] - sums[1]


@dataclass(frozen=True)
class ReadoutScore:
    """Log-odds of a readout over the prompt's tokens but the first, without the card's transform, whose clipping has no slope."""

    readout: Readout
    answers: bool = False

    @property
    def name(self) -> str:
        return f"score of `{self.readout.name}` at {self.readout.hook_point}"

    def __call__(self, model: nn.Module, rows: PromptRows, copies: int) -> torch.Tensor:
        pooled: list[torch.Tensor] = []

        def see(activation: torch.Tensor) -> None:
            mask = torch.ones(activation.shape[:2], dtype=torch.bool, device=activation.device)
            mask[:, 0] = False
            with torch.autocast(activation.device.type, enabled=False):
                scores = pool(self.readout(activation.float()), mask, self.readout.pooling)[:, 0]
            pooled.append(self.readout.scale * scores + self.readout.offset)

        handle = on_activation(model, self.readout.hook_point, see)
        try:
            backbone(model)(**_inputs(model, rows, copies), use_cache=False)
        finally:
            handle.remove()
        return pooled[0]


@dataclass(frozen=True)
class OfLogits:
    """A function of the user's, from logits (B, T, V) of B runs of one prompt to B numbers."""

    function: LogitFunction
    answers: bool = False

    @property
    def name(self) -> str:
        return str(getattr(self.function, "__name__", "a function of the logits"))

    def __call__(self, model: nn.Module, rows: PromptRows, copies: int) -> torch.Tensor:
        logits = _logits(model, rows, copies, rows.input_ids.shape[1])
        values = self.function(logits)
        if not isinstance(values, torch.Tensor) or values.shape != (copies,):
            shape = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
            raise ValueError(
                f"`metric` returned {shape} for logits of shape {tuple(logits.shape)} – expected a tensor of shape "
                f"({copies},), one number per run."
            )
        return values


def as_metric(metric: Readout | LogitFunction | None, model: nn.Module) -> PatchMetric:
    """The metric that a user names: the margin for None, a readout's score, or a function of the logits.

    Raises:
        `ValueError`: something else, or a readout of another model.
    """
    if metric is None:
        return Margin()
    if hasattr(metric, "hook_point"):
        readout: Any = metric
        readout.check_model(model, exact=False, trained=True)
        return ReadoutScore(readout)
    if callable(metric):
        return OfLogits(metric)
    raise ValueError(
        f"`metric` is a `{type(metric).__name__}` – expected None (the margin of the answers), a `Readout`, or a function of the "
        "logits (B, T, V) that returns (B,)."
    )


def _inputs(model: nn.Module, rows: PromptRows, copies: int) -> dict[str, torch.Tensor]:
    device = device_of(model)
    return {
        "input_ids": rows.input_ids.repeat(copies, 1).to(device),
        "attention_mask": rows.attention_mask.repeat(copies, 1).to(device),
    }


def _logits(model: nn.Module, rows: PromptRows, copies: int, last: int) -> torch.Tensor:
    """Logits (copies · R, last, V) of the last positions, float32."""
    base: Any = unwrap(model)
    trimmed = {"logits_to_keep": last} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    logits = base(**_inputs(model, rows, copies), use_cache=False, **trimmed).logits
    return torch.as_tensor(logits[:, -last:]).float()
