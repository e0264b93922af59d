"""Pooling: from one score per token to one score per completion.

In: scores (B, T, K) and a mask (B, T); for `attention`, whose weights a query learned, K scores and the query's logit. Out:
pooled scores (B, K), NaN in rows without a counted token. Padding, masked tokens between counted ones, and the length of the
batch do not reach the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

Pooling = Literal["mean", "ema_max", "last", "max", "attention"]
POOLINGS: tuple[str, ...] = get_args(Pooling)
ATTENTION = "attention"
# What a probe can be fitted for; what is fitted for `mean` or `last` can be read under the others but `attention`.
FITTED = ("mean", "last", ATTENTION)

# An exponential moving average with the weight of a 16-token window: Constitutional Classifiers++ (arXiv 2601.04603)
# averages 16 logits in training and takes an EMA at inference.
EMA_SPAN = 16


def pool(scores: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Pooled scores.

    Args:
        scores (`torch.FloatTensor` of shape (B, T, K)): per-token scores; of `attention` (B, T, K + 1), the query's logit last.
        mask (`torch.BoolTensor` of shape (B, T)): True on tokens that count.
        pooling (`str`): `mean`: the default of a positive reward, where one spike must not pay for everything and
            length must not help. `ema_max`: the default of penalties and monitors, since filler cannot dilute it: the
            maximum over positions of an exponential moving average. `last`: the last counted token. `max`: the highest
            token. `attention`: the mean weighed by the softmax of the logits over the counted tokens and a sink (see
            `concepts.attention`); the hardest of these to evade in RL-Obfuscation (Gupta & Jenner, arXiv 2506.14261).

    Returns:
        `torch.FloatTensor` of shape (B, K): NaN in rows without a counted token.

    Raises:
        `ValueError`: an unknown pooling.
    """
    if pooling not in _FUNCTIONS:
        raise ValueError(f"`pooling` is {pooling!r} – expected one of {', '.join(sorted(_FUNCTIONS))}.")
    if scores.shape[1] == 0:
        return scores.new_full((scores.shape[0], scores.shape[2] - (pooling == ATTENTION)), torch.nan)
    pooled = _FUNCTIONS[pooling](scores, mask)
    return pooled.masked_fill(~mask.any(1, keepdim=True), torch.nan)


def ema(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Exponential moving average over the counted tokens, bias-corrected, shape (B, T, K).

    e_t = Σ_k α(1 − α)^k s_{t−k} / (1 − (1 − α)^{t+1}) with α = 2 / (16 + 1); masked tokens leave it as it is.
    """
    alpha = 2 / (EMA_SPAN + 1)
    level = torch.zeros_like(scores[:, 0])  # (B, K)
    weight = torch.zeros_like(level[:, :1])  # (B, 1), the sum of the weights so far
    levels = []
    for t in range(scores.shape[1]):
        counts = mask[:, t : t + 1]
        level = torch.where(counts, (1 - alpha) * level + alpha * scores[:, t], level)
        weight = torch.where(counts, (1 - alpha) * weight + alpha, weight)
        levels.append(level / weight.clamp(min=alpha))
    return torch.stack(levels, dim=1)


def _mean(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    # Filled, not multiplied by 0: what stands at a token that does not count must not reach the sum, NaN included.
    return scores.masked_fill(~mask.unsqueeze(-1), 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def attention_weights(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Weights (B, T) of the tokens under `attention`: 0 where a token does not count, of sum below 1; the rest is the sink's,
    whose logit and score are 0."""
    logits = scores[..., -1].masked_fill(~mask, -torch.inf)
    return torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1).softmax(1)[:, :-1]


def _attention(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    values = scores[..., :-1].masked_fill(~mask.unsqueeze(-1), 0)
    return (attention_weights(scores, mask).unsqueeze(-1) * values).sum(1)


def _max(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(1)


def _last(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(1).clamp(min=0)  # (B,)
    return scores[torch.arange(len(scores), device=mask.device), last]


def _ema_max(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    # The average counts from the 16th token on, or at the last token of a shorter completion: before that, one token
    # at the start would stand for the whole.
    seen = mask.cumsum(1)
    enough = mask & (seen >= seen[:, -1:].clamp(max=EMA_SPAN))
    return _max(ema(scores, mask), enough)


_FUNCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mean": _mean,
    "ema_max": _ema_max,
    "last": _last,
    "max": _max,
    ATTENTION: _attention,
}
