"""From what reward functions returned to advantages: one rollout of one rank.

In: the rollout batch as TRL made it, what the reward functions returned, and values. Out: rewards at their tokens, advantages
and returns, before whitening. The arithmetic is in `advantages`; here is which numbers go into it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ...activations.ranks import sum_of_all_ranks
from .. import trl
from . import advantages as adv
from .metrics import Estimates

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .token_rewards import Returned


@dataclass
class ScoredRollout:
    """What reward functions returned for the completions of this rank, from their call to the end of the rollout.

    Attributes:
        prompts, completions (`Sequence`): as TRL passes them to reward functions.
        completion_ids (`Sequence[Sequence[int]]`): token ids, the end-of-turn token included.
        returned (`dict[str, Returned]`): by the name of the reward function.
    """

    prompts: Sequence[Any]
    completions: Sequence[Any]
    completion_ids: Sequence[Sequence[int]]
    returned: dict[str, Returned]

    def paying(self, weights: Sequence[float]) -> list[Returned]:
        """Results of the reward functions with non-zero weight. If all weights are 0, all results count."""
        results = list(self.returned.values())
        return [result for weight, result in zip(weights, results, strict=True) if weight] or results


@dataclass
class Carried:
    """What a resumed run must know.

    Attributes:
        running (`RunningStd`): of the completions' total rewards.
        rollouts (`int`): rollouts so far.
    """

    running: adv.RunningStd = field(default_factory=adv.RunningStd)
    rollouts: int = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"running": self.running.state(), "rollouts": self.rollouts}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.running.load_state(state["running"])
        self.rollouts = int(state["rollouts"])


def truncated_rows(trainer: Any, completion_ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """True for completions that do not end in an end-of-sequence token, (B,)."""
    ends = {*trainer.eos_token_ids, trl.tokenizer_of(trainer).pad_token_id}
    return torch.tensor([ids[-1] not in ends for ids in completion_ids], device=trainer.accelerator.device)


class Estimator:
    """Computes the advantages of a trainer's rollouts.

    Args:
        trainer (`PPOTrainer`): its arguments, reward weights and ranks are used.
        carried (`Carried`): the running deviation is updated here.
    """

    def __init__(self, trainer: Any, carried: Carried):
        self._trainer, self._carried = trainer, carried

    def sum_over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, which call this together."""
        return sum_of_all_ranks(sums, self._trainer.accelerator)

    def estimate(
        self, output: dict[str, Any], reference: torch.Tensor | None, scored: ScoredRollout, values: torch.Tensor
    ) -> Estimates:
        """Rewards at their tokens, advantages and returns of a rollout, before whitening.

        Args:
            output (`dict`): TRL's rollout batch.
            reference (`torch.Tensor` of shape (B, T), *optional*): log-probs of the reference.
            scored (`ScoredRollout`): what the reward functions returned.
            values (`torch.Tensor` of shape (B, T + 1)): V(s_0) … V(s_T); zeros without a critic.
        """
        args, mask = self._trainer.args, output["completion_mask"]
        weights = self._trainer.reward_weights.tolist()
        truncated = truncated_rows(self._trainer, scored.completion_ids)
        ended = self._ended(truncated, scored.paying(weights))
        parts = {
            name: weight * result.rewards(mask, ended, args.gamma)
            for weight, (name, result) in zip(weights, scored.returned.items(), strict=True)
        }
        applies = [any(row) for row in zip(*(result.applies for result in scored.paying(weights)), strict=True)]
        scorable = torch.tensor(applies, device=mask.device) & mask.any(1)  # TRL may mask truncated completions
        parts = self._normalized(parts, scorable)
        if args.missing_eos_penalty is not None:
            parts["missing_eos"] = adv.on_last_token(truncated * -args.missing_eos_penalty, mask)
        old = output["old_per_token_logps"].float()
        if reference is not None:
            reference = reference.float()
            parts["kl"] = adv.kl_reward(old, reference, mask, args.kl_coef)
        counted = mask * scorable[:, None]  # a completion that no function judged teaches nothing
        if args.whiten_rewards:
            _, variance = adv.moments(torch.stack(list(parts.values())).sum(0), counted, self.sum_over_ranks)
            parts = {name: part * torch.rsqrt(variance + 1e-8) for name, part in parts.items()}
        rewards = torch.stack(list(parts.values())).sum(0)
        advantages = adv.gae(rewards, values, mask, ended, args.gamma, args.lam)
        returns = advantages + values[:, :-1]
        if args.group_baseline:
            advantages = (advantages - self._group_baseline(rewards, scorable)[:, None]) * mask
        return Estimates(parts, old, reference, values, advantages, returns, counted, ended)

    def _ended(self, truncated: torch.Tensor, paying: Sequence[Returned]) -> torch.Tensor:
        """True for completions that are over at their last token, (B,). For the others, V stands for what would follow."""
        trainer = self._trainer
        args = trainer.args
        if not args.bootstrap_truncated or not trainer.has_critic or args.missing_eos_penalty is not None:
            return torch.ones_like(truncated)
        judged = [any(row) for row in zip(*(result.judged for result in paying), strict=True)]
        return ~truncated | torch.tensor(judged, device=truncated.device)

    def _normalized(self, parts: dict[str, torch.Tensor], scorable: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rewards divided by the running deviation of completions' totals, and clipped, if the configuration asks for it."""
        trainer, running = self._trainer, self._carried.running
        args = trainer.args
        if args.normalize_rewards:
            if trainer.model.training:
                totals = torch.stack(list(parts.values())).sum((0, 2))  # (B,)
                running.update(trainer.accelerator.gather(totals)[trainer.accelerator.gather(scorable)])
            parts = {name: part / running.std for name, part in parts.items()}
        if args.reward_clip is not None:
            parts = {name: part.clamp(-args.reward_clip, args.reward_clip) for name, part in parts.items()}
        return parts

    def _group_baseline(self, rewards: torch.Tensor, scorable: torch.Tensor) -> torch.Tensor:
        """Mean return of the judged completions of each prompt, for the rows of this rank, (B,)."""
        trainer = self._trainer
        here = adv.returns_to_go(rewards, trainer.args.gamma)[:, 0].masked_fill(~scorable, torch.nan)
        returns = trainer.accelerator.gather(here.contiguous())
        size = int(trainer.num_generations if trainer.model.training else trainer.num_generations_eval)
        first = trainer.accelerator.process_index * len(rewards)
        return adv.group_means(returns, size)[first : first + len(rewards)]
