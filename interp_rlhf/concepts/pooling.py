"""Poolings: from one score per token to one score per completion.

In: scores (B, T, K) and a mask (B, T). The pooling `attention`, whose weights a query learned, also takes the query's logit.
Out: pooled scores (B, K), NaN in rows without a counted token. Neither padding, nor masked tokens between counted ones, nor the
length of the batch changes the result. It must not know models or readouts.

Cards and the command line read the names of poolings from here. So this module imports torch only where it computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

POOLINGS: Registry[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = Registry("a pooling")
ATTENTION = "attention"
# Poolings that a probe can be fitted for. A probe that was fitted for `mean` or `last` can be read under every other one except
# `attention`.
FITTED = ("mean", "last", ATTENTION)

# An exponential moving average with the weight of a 16-token window: Constitutional Classifiers++ (arXiv 2601.04603)
# averages 16 logits in training and takes an EMA at inference.
EMA_SPAN = 16


def register_pooling(
    name: str,
) -> Callable[
    [Callable[[torch.Tensor, torch.Tensor], torch.Tensor]], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
]:
    """Decorator that registers a pooling. Cards, `--pooling` and recipes then know it by its name.

    The decorated function takes scores (B, T, K) and a mask (B, T), True on tokens that count, and returns pooled scores (B, K).
    It must not let a score reach the result where the mask is False, NaN included. It must follow the scale of the scores:
    pooling `a · scores + b` with a > 0 gives `a · pooled + b`. Rows without a counted token may return anything: `pool` makes
    them NaN.

    `fit_probe` calibrates a fit for every pooling that is registered when it runs. An older artifact has to be fitted again.

    Args:
        name (`str`): a lower-case identifier, as cards write it.

    Returns:
        `Callable`: the decorator. It returns the decorated function unchanged.

    Raises:
        `ValueError`: the name is not an identifier, or another pooling has it.

    Example:
        >>> import torch
        >>> from interp_rlhf import register_pooling
        >>> @register_pooling("my_median")
        ... def my_median(scores, mask):
        ...     return scores.masked_fill(~mask.unsqueeze(-1), torch.nan).nanmedian(dim=1).values
        >>> from interp_rlhf.concepts.pooling import pool
        >>> scores = torch.tensor([1.0, 2.0, 9.0, 50.0]).reshape(1, 4, 1)
        >>> mask = torch.tensor([[True, True, True, False]])
        >>> pool(scores, mask, "my_median").item()
        2.0
    """
    return POOLINGS.register(name)


def require_pooling(name: str) -> str:
    """The name of a registered pooling.

    Raises:
        `ValueError`: no pooling has this name.
    """
    if name not in POOLINGS:
        raise ValueError(
            f"expected one of {', '.join(sorted(POOLINGS))}. `register_pooling` adds a pooling of your own: import the module "
            "that calls it first, or name that module in the recipe's list of modules to import"
        )
    return name


def pool(scores: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Pooled scores.

    Args:
        scores (`torch.FloatTensor` of shape (B, T, K)): per-token scores. Under `attention` the shape is (B, T, K + 1), with the
            query's logit last.
        mask (`torch.BoolTensor` of shape (B, T)): True on tokens that count.
        pooling (`str`): a registered pooling. `mean`: the default of a positive reward, where one spike must not pay for
            everything and length must not help. `ema_max`: the default of penalties and monitors, since filler cannot dilute
            it: the maximum over positions of an exponential moving average. `last`: the last counted token. `max`: the highest
            token. `attention`: the mean, weighed by the softmax of the logits over the counted tokens and a sink (see
            `concepts.attention`). It is the hardest of these to evade in RL-Obfuscation (Gupta & Jenner, arXiv 2506.14261).

    Returns:
        `torch.FloatTensor` of shape (B, K): NaN in rows without a counted token.

    Raises:
        `ValueError`: an unknown pooling.
    """
    try:
        require_pooling(pooling)
    except ValueError as error:
        raise ValueError(f"`pooling` is {pooling!r} – {error}.") from None
    if scores.shape[1] == 0:
        return scores.new_full((scores.shape[0], scores.shape[2] - (pooling == ATTENTION)), float("nan"))
    pooled = POOLINGS[pooling](scores, mask)
    return pooled.masked_fill(~mask.any(1, keepdim=True), float("nan"))


@register_pooling("mean")
def _mean(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    # Filled, not multiplied by 0: a score at a token that does not count must not reach the sum, NaN included.
    return scores.masked_fill(~mask.unsqueeze(-1), 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


@register_pooling("ema_max")
def _ema_max(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    # The average counts from the 16th token on, or at the last token of a shorter completion. Before that, one token at the
    # start would stand for the whole.
    seen = mask.cumsum(1)
    enough = mask & (seen >= seen[:, -1:].clamp(max=EMA_SPAN))
    return _max(ema(scores, mask), enough)


@register_pooling("last")
def _last(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    import torch

    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(1).clamp(min=0)  # (B,)
    return scores[torch.arange(len(scores), device=mask.device), last]


@register_pooling("max")
def _max(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(~mask.unsqueeze(-1), float("-inf")).amax(1)


@register_pooling(ATTENTION)
def _attention(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    values = scores[..., :-1].masked_fill(~mask.unsqueeze(-1), 0)
    return (attention_weights(scores, mask).unsqueeze(-1) * values).sum(1)


def ema(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Exponential moving average over the counted tokens, bias-corrected, shape (B, T, K).

    e_t = Σ_k α(1 − α)^k s_{t−k} / (1 − (1 − α)^{t+1}) with α = 2 / (16 + 1). Masked tokens leave it unchanged.
    """
    import torch

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


def attention_weights(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Weights (B, T) of the tokens under `attention`: 0 where a token does not count. Their sum is below 1: the sink, whose logit
    and score are 0, has the rest."""
    import torch

    logits = scores[..., -1].masked_fill(~mask, -torch.inf)
    return torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1).softmax(1)[:, :-1]
