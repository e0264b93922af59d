"""Metrics of PPO: of a rollout and of a loss, over all ranks. They have the names of TRL 1.12 where it had them.

In: a rollout's tensors (B, T), or those of a micro-batch. Out: metric name to number. Nothing here trains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from . import advantages as adv

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass
class Estimates:
    """Rewards, values and advantages of a rollout, on this rank.

    Attributes:
        components (`dict[str, torch.Tensor]`): rewards (B, T) by their source, `kl` and `missing_eos` among them.
        log_probs (`torch.Tensor` of shape (B, T)): of the policy that sampled.
        reference (`torch.Tensor` of shape (B, T), *optional*): of the reference.
        values (`torch.Tensor` of shape (B, T + 1)), advantages, returns (`torch.Tensor` of shape (B, T)): before whitening.
        counted (`torch.Tensor` of shape (B, T)): 1 on tokens of completions that a reward function judged.
        ended (`torch.BoolTensor` of shape (B,)): see `advantages.gae`.
    """

    components: Mapping[str, torch.Tensor]
    log_probs: torch.Tensor
    reference: torch.Tensor | None
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    counted: torch.Tensor
    ended: torch.Tensor


def of_rollout(estimates: Estimates, gamma: float, has_critic: bool, reduce: adv.Reduce) -> dict[str, float]:
    """Metrics of a rollout.

    Per completion that was judged `objective/…`; per token returns, values and advantages; what the critic explains, and each
    component's share of the return's variance. `kl` is per token, by the estimate that TRL logs for GRPO (k3).
    """
    mask, values = estimates.counted, estimates.values[:, :-1]
    nothing = torch.zeros_like(values)
    kl = estimates.components.get("kl", nothing)
    scores = sum((part for name, part in estimates.components.items() if name != "kl"), nothing)
    per_completion = {
        "objective/scores": scores.sum(1),
        "objective/non_score_reward": kl.sum(1),
        "objective/rlhf_reward": (scores + kl).sum(1),
        "objective/entropy": -(estimates.log_probs * mask).sum(1),
        "completions/bootstrapped_ratio": (~estimates.ended).float(),
    }
    tensors = {"returns": estimates.returns, "values": values, "advantages": estimates.advantages}
    logged: dict[str, float] = {}
    if estimates.reference is not None:
        change = estimates.reference - estimates.log_probs
        per_completion["objective/kl"] = -(change * mask).sum(1)
        logged["kl"] = float(adv.moments(change.exp() - change - 1, mask, reduce)[0])
    judged = mask.any(1)
    sums = reduce(torch.stack([*((v * judged).sum() for v in per_completion.values()), judged.sum().to(values.dtype)]))
    logged |= dict(zip(per_completion, (sums[:-1] / sums[-1]).tolist(), strict=True))
    for name, tensor in tensors.items():
        mean, variance = adv.moments(tensor, mask, reduce)
        logged |= {f"{name}/mean": float(mean), f"{name}/std": float(variance.sqrt())}
    if has_critic:
        logged["val/explained_variance"] = float(adv.explained_variance(estimates.returns, values, mask, reduce))
    for name, share in adv.shares_of_variance(estimates.components, mask, gamma, reduce).items():
        logged[f"returns/share/{name}"] = float(share)
    return logged


@torch.no_grad()
def of_step(
    log_probs: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
    clip: tuple[float, float],
    value_losses: tuple[torch.Tensor, torch.Tensor] | None,
    reduce: adv.Reduce,
) -> dict[str, float]:
    """Means over a micro-batch's tokens: how far the policy has moved since it sampled, and what was clipped.

    Args:
        log_probs (`torch.Tensor` of shape (B, T)): of the policy now.
        inputs (`dict`): the micro-batch.
        clip (`tuple[float, float]`): how far the ratio may fall, and rise.
        value_losses (`tuple`, *optional*): value losses (B, T), and where they were clipped.
    """
    mask = inputs["value_mask"].float()
    change = log_probs - inputs["old_per_token_logps"]
    policy, cut = adv.policy_losses(change.exp(), inputs["advantages"], *clip)
    tensors = {
        "policy/approxkl_avg": 0.5 * change**2,
        "policy/clipfrac_avg": cut.float(),
        "loss/policy_avg": policy,
        "val/ratio": change.exp(),
    }
    if value_losses is not None:
        tensors |= {"loss/value_avg": value_losses[0].detach(), "val/clipfrac_avg": value_losses[1].float()}
    sums = reduce(torch.stack([*((tensor * mask).sum() for tensor in tensors.values()), mask.sum()]))
    return dict(zip(tensors, (sums[:-1] / sums[-1].clamp(min=1)).tolist(), strict=True))
