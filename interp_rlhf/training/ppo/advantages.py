"""From rewards and values to advantages: pure functions on one rollout.

In: rewards and values per token. Out: advantages, returns, and the figures that are logged of them. Nothing here knows a
trainer, a model or a reward function. If a number is over all ranks, the sum over ranks is an argument.

Throughout, a completion has tokens y_0 … y_{L−1}; s_t is what the model has read before it writes y_t, so that s_0 is the prompt
and s_L the prompt with the whole completion. Masks are 1 on y_0 … y_{L−1} and 0 on the padding to their right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

Reduce = Callable[[torch.Tensor], torch.Tensor]


def alone(sums: torch.Tensor) -> torch.Tensor:
    """The sum over ranks if there is only one."""
    return sums


def is_last(mask: torch.Tensor) -> torch.Tensor:
    """True on each row's last counted token, (B, T); False in rows without one."""
    following = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return mask.bool() & ~following.bool()


def on_last_token(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Scores of whole completions (B,) as rewards per token (B, T): on the last token, 0 elsewhere."""
    return is_last(mask) * scores[:, None]


def kl_reward(
    log_probs: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor, coefficient: float
) -> torch.Tensor:
    """−coefficient · (log π(y_t | s_t) − log π_ref(y_t | s_t)), (B, T): the k1 estimate of the KL, as a reward.

    Args:
        log_probs, reference (`torch.Tensor` of shape (B, T)): of the sampled tokens, in nats.

    Source: Stiennon et al., arXiv 2009.01325; k1 after Schulman, "Approximating KL divergence".
    """
    return -coefficient * (log_probs - reference) * mask


def shaping(potentials: torch.Tensor, mask: torch.Tensor, ended: torch.Tensor, gamma: float) -> torch.Tensor:
    """Potential-based shaping γ Φ(s_{t+1}) − Φ(s_t), (B, T), with Φ = 0 at the terminal state.

    It changes no optimal policy, and no advantage where the value function is V − Φ. That holds for the rewards as they are:
    whitening, clipping or normalizing *rewards* scales or cuts F_t and breaks it, and so does clipping the value loss. Whitening
    *advantages* does not: they are the same to begin with.

    Args:
        potentials (`torch.Tensor` of shape (B, T + 1)): Φ(s_0) … Φ(s_T); values beyond s_L are not used.
        ended (`torch.BoolTensor` of shape (B,)): the completion is over at s_L. If it was truncated and V(s_L) is
            bootstrapped, Φ(s_L) stays: V(s_L) − Φ(s_L) then stands for the rest.
        gamma (`float`): discount per token.

    Source: Ng, Harada and Russell 1999.
    """
    following = potentials[:, 1:].masked_fill(is_last(mask) & ended[:, None], 0)
    return (gamma * following - potentials[:, :-1]).masked_fill(~mask.bool(), 0)


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, ended: torch.Tensor, gamma: float, lam: float
) -> torch.Tensor:
    """Generalized advantage estimates (B, T), 0 on padding.

    δ_t = r_t + γ V(s_{t+1}) − V(s_t) and A_t = δ_t + γλ A_{t+1}, with A_L = 0. V(s_L) is 0 if the completion is over; it stays
    as it is if the completion was truncated. The value function learns the return A_t + V(s_t).

    Args:
        rewards (`torch.Tensor` of shape (B, T)): r_t, given for y_t.
        values (`torch.Tensor` of shape (B, T + 1)): V(s_0) … V(s_T); values beyond s_L are not used.
        mask (`torch.Tensor` of shape (B, T)), ended (`torch.BoolTensor` of shape (B,)): see above.

    Source: Schulman et al., arXiv 1506.02438, eq. 16.
    """
    counted, last = mask.bool(), is_last(mask)
    following = values[:, 1:].masked_fill(last & ended[:, None], 0)
    deltas = (rewards + gamma * following - values[:, :-1]).masked_fill(~counted, 0)
    return returns_to_go(deltas, gamma * lam)  # the deltas of padding are 0


def returns_to_go(rewards: torch.Tensor, gamma: float) -> torch.Tensor:
    """Σ_k γ^k r_{t+k}, (B, T), of rewards that are 0 on padding: what was paid from y_t on."""
    returns = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in range(rewards.shape[1] - 1, -1, -1):
        running = rewards[:, t] + gamma * running
        returns[:, t] = running
    return returns


def moments(values: torch.Tensor, mask: torch.Tensor, reduce: Reduce = alone) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased variance of counted values on all ranks, in two passes: a mean first, then squares about it."""
    weights = mask.to(values.dtype)
    total, count = reduce(torch.stack([(values * weights).sum(), weights.sum()]))
    mean = total / count.clamp(min=1)
    (squares,) = reduce((((values - mean) ** 2) * weights).sum()[None])
    return mean, squares / (count - 1).clamp(min=1)


def whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True, reduce: Reduce = alone) -> torch.Tensor:
    """Counted values over their standard deviation on all ranks, (B, T), minus their mean if `shift_mean`; 0 on padding."""
    mean, variance = moments(values, mask, reduce)
    shifted = values - mean if shift_mean else values
    return (shifted * torch.rsqrt(variance + 1e-8)).masked_fill(~mask.bool(), 0)


def explained_variance(
    returns: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, reduce: Reduce = alone
) -> torch.Tensor:
    """1 − Var(returns − values) / Var(returns) over counted tokens on all ranks: 1 is a perfect critic, 0 an
    uninformative one, below 0 a misleading one. NaN if returns do not vary."""
    _, left = moments(returns - values, mask, reduce)
    _, whole = moments(returns, mask, reduce)
    return torch.where(whole > 1e-12, 1 - left / whole.clamp(min=1e-12), torch.nan)


def shares_of_variance(
    components: Mapping[str, torch.Tensor], mask: torch.Tensor, gamma: float, reduce: Reduce = alone
) -> dict[str, torch.Tensor]:
    """Each component's share of the return's variance: Cov(G_c, G) / Var(G).

    G_c is what a component paid from each token on, G the sum of all. Shares add up to 1. A negative share moves against the
    sum. NaN if G does not vary.

    Args:
        components (`dict[str, torch.Tensor]`): rewards (B, T) by their source, 0 on padding.
    """
    returns = {name: returns_to_go(rewards, gamma) for name, rewards in components.items()}
    weights = mask.to(next(iter(returns.values())).dtype)
    stacked = torch.stack(list(returns.values()))  # (C, B, T)
    sums = reduce(torch.cat([(stacked * weights).sum((1, 2)), weights.sum()[None]]))
    centred = (stacked - (sums[:-1] / sums[-1].clamp(min=1))[:, None, None]) * weights
    products = reduce((centred * centred.sum(0)).sum((1, 2)))  # (C,): Cov(G_c, G), up to the count
    whole = products.sum()
    shares = torch.where(whole > 1e-12, products / whole.clamp(min=1e-12), torch.nan)
    return dict(zip(returns, shares.unbind(), strict=True))


def group_means(values: torch.Tensor, size: int) -> torch.Tensor:
    """Mean of each group of `size` neighbours, repeated for each of them, (N,): over values that are not NaN, 0 if all are."""
    return values.view(-1, size).nanmean(1).nan_to_num(0.0).repeat_interleave(size)


def value_losses(
    values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, cliprange: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped value loss per token, ½ max((V − R)², (clip(V, V_old ± c) − R)²), (B, T), and where the clipped one was larger.

    Source: OpenAI baselines' `ppo2`; TRL 1.12.
    """
    plain = (values - returns) ** 2
    if cliprange is None:
        return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
    clipped = (old + (values - old).clamp(-cliprange, cliprange) - returns) ** 2
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


def policy_losses(
    ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped policy loss per token, −min(ρ A, clip(ρ, 1 − low, 1 + high) A), (B, T), and where it was clipped.

    For metrics. Training uses TRL's own loss, which has the same formula. Source: Schulman et al., arXiv 1707.06347, eq. 7.
    """
    plain, clipped = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    return -torch.minimum(plain, clipped), clipped < plain


@dataclass
class RunningStd:
    """Running standard deviation of completions' totals, over all rollouts so far.

    Attributes:
        count, mean, squares (`float`): of all values; `squares` is the sum of squares about the mean.
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = field(default=0.0)

    def update(self, values: torch.Tensor, reduce: Reduce = alone) -> None:
        """Add values (N,) of this rank; all ranks call it together. Source: Chan et al. 1983, the parallel form of Welford's."""
        ones = torch.ones_like(values)
        mean, variance = moments(values, ones, reduce)
        count = float(reduce(ones.sum()[None])[0])
        total = self.count + count
        delta = float(mean) - self.mean
        self.squares += float(variance) * max(count - 1, 1) + delta**2 * self.count * count / max(total, 1)
        self.mean += delta * count / max(total, 1)
        self.count = total

    @property
    def std(self) -> float:
        """The standard deviation; 1 before there are two values, and if they do not differ."""
        variance = self.squares / (self.count - 1) if self.count > 1 else 1.0
        return variance**0.5 if variance > 1e-12 else 1.0

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.count, self.mean, self.squares = (float(state[key]) for key in ("count", "mean", "squares"))
