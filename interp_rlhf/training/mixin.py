"""The mixin: it follows the steps of a TRL trainer, and adds terms to its loss.

In: a trainer's class. Out: a subclass that overrides `get_batch_samples`, `compute_loss` and `train`, and for rollout trainers
the three steps of `trl.RolloutSteps`, as pass-throughs. Without terms, results are returned untouched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..activations.ranks import from_rank_zero
from .checkpoints import last_complete_checkpoint
from .trl import RolloutSteps

if TYPE_CHECKING:
    from .rollout import Rollout
    from .terms.loss import LossTerms, RolloutTerms


class LossMixin:
    """Put before a trainer in the bases of its class; `attach` does it.

    Attributes:
        interp_terms (`LossTerms`, *optional*): what is added to the loss.
    """

    interp_terms: LossTerms | None = None

    def train(self, resume_from_checkpoint: Any = None, *more: Any, **kwargs: Any) -> Any:
        """As the trainer's own, but `resume_from_checkpoint=True` means the last complete checkpoint.

        If there is none, for example because the run was killed before its first save, it starts at step 0 with a warning.
        """
        if resume_from_checkpoint is True:
            args: Any = self.args  # type: ignore[attr-defined]
            resume_from_checkpoint = from_rank_zero(
                lambda: last_complete_checkpoint(args.output_dir, args.save_only_model)
            )
        return super().train(resume_from_checkpoint, *more, **kwargs)  # type: ignore[misc]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, num_items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        if self.interp_terms is not None:
            self.interp_terms.window(batches)
        return batches, num_items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        terms = self.interp_terms
        if terms is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        with terms.passes(inputs) as changed:
            result = super().compute_loss(model, changed, return_outputs, num_items_in_batch)  # type: ignore[misc]
        added = terms.added(inputs, changed, num_items_in_batch)
        if added is None:
            return result
        if return_outputs:
            return result[0] + added.to(result[0].device), result[1]
        return result + added.to(result.device)


class RolloutMixin(LossMixin, RolloutSteps):
    """The mixin for `GRPOTrainer` and `RLOOTrainer`, whose rollouts are read too.

    Attributes:
        interp_rollout (`Rollout`, *optional*): reads the batches.
        interp_abstaining (`list[int]`): which reward functions are concept rewards.
        interp_watchers (`list`): called after the rewards with (prompts, completions, rewards as TRL gathered them, rewards as it
            trains on them).
        interp_writes_samples (`bool`): the trainer writes samples to the run log itself, token by token (PPO).
        interp_sample_scores (`dict`, *optional*): for such a trainer: what the watchers measured on the present rollout.
    """

    interp_terms: RolloutTerms | None = None
    interp_rollout: Rollout | None = None
    interp_watchers: list[Any]
    interp_abstaining: list[int] = []  # noqa: RUF012
    interp_writes_samples = False
    interp_sample_scores: dict[str, Any] | None = None
    _interp_prompt_ids: list[list[int]]

    def interp_tokenize_prompts(self, prompts: list[Any]) -> Any:
        if self.interp_rollout is not None:
            self.interp_rollout.start()
        result = super().interp_tokenize_prompts(prompts)
        self._interp_prompt_ids = result[0]
        return result

    def interp_calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> Any:
        if self.interp_rollout is None:
            return super().interp_calculate_rewards(inputs, prompts, completions, completion_ids)
        self.interp_rollout.open(self._interp_prompt_ids, completion_ids)
        rewards = super().interp_calculate_rewards(inputs, prompts, completions, completion_ids)
        filled = self._with_neutral_abstentions(rewards)
        for watch in self.interp_watchers:
            watch(prompts, completions, rewards, filled)
        self.interp_rollout.close()
        return filled

    def _with_neutral_abstentions(self, rewards: Any) -> Any:
        """Rewards (N, F) in which a `ConceptReward` that returned `None` for a completion counts as its group's mean.

        TRL 1.16 counts a missing reward as 0 when it adds functions up. That is a penalty if the mean is positive. A completion
        that no function judged stays left out. With `normalize_then_sum`, TRL is neutral by itself.
        """
        trainer: Any = self
        may_abstain = trainer.interp_abstaining
        if getattr(trainer, "multi_objective_aggregation", "") == "normalize_then_sum" or rewards.shape[1] < 2:
            return rewards
        size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        if size < 2 or len(rewards) % size:
            return rewards
        silent = torch.isnan(rewards) & ~torch.isnan(rewards).all(1, keepdim=True)
        means = rewards.view(-1, size, rewards.shape[1]).nanmean(1).repeat_interleave(size, dim=0)
        filled = rewards.clone()
        for index in may_abstain:
            filled[:, index] = torch.where(silent[:, index], means[:, index], rewards[:, index])
        return filled

    def interp_generate_and_score(self, inputs: Any) -> dict[str, Any]:
        terms = self.interp_terms
        if terms is None or not terms.reads_rollouts:
            return super().interp_generate_and_score(inputs)
        with terms.rollout():
            output = super().interp_generate_and_score(inputs)
        return terms.add_reference(output)


def with_mixin(trainer_class: type, rollouts: bool) -> type:
    """Subclass of a trainer's class with the mixin: `InterpGRPOTrainer` for `GRPOTrainer`."""
    mixin = RolloutMixin if rollouts else LossMixin
    return type(f"Interp{trainer_class.__name__}", (mixin, trainer_class), {"__module__": __name__})
