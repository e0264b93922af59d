"""Token rewards: what reward functions return for a whole completion or for each of its tokens.

In: TRL reward functions. Out: wrapped functions. TRL gets one number per completion, as it expects, and the token rewards are
kept. A reward that is not finite stops the run here, because TRL would take NaN for "not applicable".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from trl.trainer.utils import is_async_callable

from .advantages import on_last_token, shaping

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass
class Returned:
    """What one reward function returned for this rank's completions.

    Attributes:
        shaping (`bool`): lists are potentials Φ(s_0) … Φ(s_L), not rewards.
        tokens (`list`): per completion its token rewards (L,) or potentials (L + 1,); None if it was judged as a whole.
        totals (`list[float | None]`): per completion its reward as a whole; None if the function does not apply, or
            rewarded tokens.
    """

    shaping: bool = False
    tokens: list[list[float] | None] = field(default_factory=list)
    totals: list[float | None] = field(default_factory=list)

    def rewards(self, mask: torch.Tensor, ended: torch.Tensor, gamma: float) -> torch.Tensor:
        """Rewards per token, (B, T), of a mask (B, T); `ended` (B,) as in `advantages.shaping`."""
        totals = torch.tensor([0.0 if value is None else value for value in self.totals], device=mask.device)
        width = mask.shape[1] + (1 if self.shaping else 0)
        per_token = torch.zeros(len(mask), width, device=mask.device)
        for row, values in enumerate(self.tokens):
            if values is not None:
                per_token[row, : len(values)] = torch.tensor(values, device=mask.device)
        if self.shaping:
            said = torch.tensor([values is not None for values in self.tokens], device=mask.device)
            per_token = shaping(per_token, mask, ended, gamma) * said[:, None]
        return (per_token + on_last_token(totals, mask)) * mask

    @property
    def judged(self) -> list[bool]:
        """True for completions that were judged as a whole."""
        return [value is not None for value in self.totals]

    @property
    def applies(self) -> list[bool]:
        """True for completions that the function judged in any way."""
        return [a is not None or b is not None for a, b in zip(self.tokens, self.totals, strict=True)]


def listened(
    function: Any, name: str, completion_ids: Sequence[Sequence[int]], returned: Returned
) -> Callable[..., Any] | nn.Module:
    """A reward function that stores its token rewards in `returned` and returns their sum.

    A function that sets the attribute `shaping = True` returns potentials: L + 1 numbers for L tokens, the first for the prompt.
    A reward model (`nn.Module`) stays as it is: TRL runs it, and it judges whole completions.

    Raises:
        `ValueError`, when it is called: a number that is not finite, or not one reward per token.
    """
    if isinstance(function, nn.Module):
        return function
    returned.shaping = bool(getattr(function, "shaping", False))

    def taken(values: Any) -> list[float | None]:
        return [_store(value, name, row, len(completion_ids[row]), returned) for row, value in enumerate(values)]

    def checked(values: Any) -> Any:
        if len(values) != len(completion_ids):
            return values  # TRL's own error says it
        return taken(values)

    if is_async_callable(function):

        async def later(*args: Any, **kwargs: Any) -> Any:
            return checked(await function(*args, **kwargs))

        return later

    def now(*args: Any, **kwargs: Any) -> Any:
        return checked(function(*args, **kwargs))

    return now


def _store(value: Any, name: str, row: int, length: int, returned: Returned) -> float | None:
    """Store one completion's reward; returns the number that TRL gets."""
    numbers = value.tolist() if isinstance(value, torch.Tensor) or type(value).__module__ == "numpy" else value
    if numbers is None:
        returned.tokens.append(None)
        returned.totals.append(None)
        return None
    if not isinstance(numbers, list | tuple):
        returned.tokens.append(None)
        returned.totals.append(_finite(numbers, name, row))
        return returned.totals[-1]
    wanted = length + 1 if returned.shaping else length
    if len(numbers) != wanted:
        what = "potentials" if returned.shaping else "token rewards"
        each = "one for the prompt and one per completion token" if returned.shaping else "one per completion token"
        raise ValueError(
            f"Reward function `{name}` returned {len(numbers)} {what} for completion {row} – expected {wanted}: {each}, in the "
            "order of `completion_ids`, the end-of-turn token included. Return one float instead to reward it as a whole."
        )
    rewards = [_finite(number, name, row) for number in numbers]
    returned.tokens.append(rewards)
    returned.totals.append(None)
    return rewards[-1] - rewards[0] if returned.shaping else math.fsum(rewards)


def _finite(number: Any, name: str, row: int) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(
            f"Reward function `{name}` returned {value} for completion {row} – expected a finite number. Return `None` where it "
            "does not apply; a broken reward is not a zero."
        )
    return value
