"""The mixin: where a trainer of TRL is listened to, and where terms join its loss.

It overrides `get_batch_samples`, `compute_loss` and `train`, and of `GRPOTrainer` and `RLOOTrainer` three private methods, all of
them as pass-throughs; a test pins the private ones' signatures. Without terms, results are returned untouched.
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
        interp_terms (`LossTerms`, *optional*): what joins the loss.
    """

    interp_terms: LossTerms | None = None

    def train(self, resume_from_checkpoint: Any = None, *more: Any, **kwargs: Any) -> Any:
        """As the trainer's own, but `resume_from_checkpoint=True` means the last checkpoint that is complete.

        Where there is none, a run that was killed before its first one say, it begins at step 0, with a warning.
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
        with terms.passes(inputs) as own:
            found = super().compute_loss(model, own, return_outputs, num_items_in_batch)  # type: ignore[misc]
        added = terms.added(inputs, own, num_items_in_batch)
        if added is None:
            return found
        if return_outputs:
            return found[0] + added.to(found[0].device), found[1]
        return found + added.to(found.device)


class RolloutMixin(LossMixin, RolloutSteps):
    """The same before `GRPOTrainer` or `RLOOTrainer`, whose rollouts are read too.

    Attributes:
        interp_rollout (`Rollout`, *optional*): reads the batches.
        interp_abstaining (`list[int]`): which reward functions are concept rewards.
        interp_watchers (`list`): called after the rewards with (prompts, completions, rewards as TRL gathered them, rewards as it
            trains on them).
    """

    interp_terms: RolloutTerms | None = None
    interp_rollout: Rollout | None = None
    interp_watchers: list[Any]
    interp_abstaining: list[int] = []  # noqa: RUF012
    _interp_prompt_ids: list[list[int]]

    def tokenize_prompts(self, prompts: list[Any]) -> Any:
        if self.interp_rollout is not None:
            self.interp_rollout.start()
        result = super().tokenize_prompts(prompts)
        self._interp_prompt_ids = result[0]
        return result

    def calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> Any:
        if self.interp_rollout is None:
            return super().calculate_rewards(inputs, prompts, completions, completion_ids)
        self.interp_rollout.open(self._interp_prompt_ids, completion_ids)
        rewards = super().calculate_rewards(inputs, prompts, completions, completion_ids)
        filled = self._with_neutral_abstentions(rewards)
        for watch in self.interp_watchers:
            watch(prompts, completions, rewards, filled)
        self.interp_rollout.close()
        return filled

    def _with_neutral_abstentions(self, rewards: Any) -> Any:
        """Rewards (N, F) in which a `ConceptReward` that said nothing of a completion counts as its group's mean.

        TRL 1.16 adds functions up with 0 in the place of what was not said, which is a penalty wherever the mean is positive.
        Where a completion was judged by no function, it stays left out; with `normalize_then_sum` TRL is neutral by itself.
        """
        trainer: Any = self
        own = trainer.interp_abstaining
        if getattr(trainer, "multi_objective_aggregation", "") == "normalize_then_sum" or rewards.shape[1] < 2:
            return rewards
        size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        if size < 2 or len(rewards) % size:
            return rewards
        silent = torch.isnan(rewards) & ~torch.isnan(rewards).all(1, keepdim=True)
        means = rewards.view(-1, size, rewards.shape[1]).nanmean(1).repeat_interleave(size, dim=0)
        filled = rewards.clone()
        for index in own:
            filled[:, index] = torch.where(silent[:, index], means[:, index], rewards[:, index])
        return filled

    def generate_and_score(self, inputs: Any) -> dict[str, Any]:
        terms = self.interp_terms
        if terms is None or not terms.reads_rollouts:
            return super().generate_and_score(inputs)
        with terms.rollout():
            output = super().generate_and_score(inputs)
        return terms.add_reference(output)


def with_mixin(trainer_class: type, rollouts: bool) -> type:
    """Subclass of a trainer's class that is listened to: `InterpGRPOTrainer` for `GRPOTrainer`."""
    mixin = RolloutMixin if rollouts else LossMixin
    return type(f"Interp{trainer_class.__name__}", (mixin, trainer_class), {"__module__": __name__})
