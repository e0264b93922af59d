"""The mixin: where a rollout trainer of TRL is listened to.

It overrides two private methods of `GRPOTrainer` and `RLOOTrainer`, both as pass-throughs; a test pins their signatures.
Their own results are returned untouched.
"""

from __future__ import annotations

from typing import Any

from .rollout import Rollout


class RolloutMixin:
    """Put before `GRPOTrainer` or `RLOOTrainer` in the bases of a trainer's class; `attach` does it.

    Attributes:
        interp_rollout (`Rollout`): reads the batches.
        interp_watchers (`list`): called with (prompts, completions, rewards as TRL gathered them) after the rewards.
    """

    interp_rollout: Rollout
    interp_watchers: list[Any]
    _interp_prompt_ids: list[list[int]]

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        self.interp_rollout.start()
        result = super()._tokenize_prompts(prompts)  # type: ignore[misc]
        self._interp_prompt_ids = result[0]
        return result

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        self.interp_rollout.open(self._interp_prompt_ids, completion_ids_list)
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # type: ignore[misc]
        for watch in self.interp_watchers:
            watch(prompts, completions, rewards)
        self.interp_rollout.close()
        return rewards


def with_mixin(trainer_class: type) -> type:
    """Subclass of a trainer's class that is listened to: `InterpGRPOTrainer` for `GRPOTrainer`."""
    return type(f"Interp{trainer_class.__name__}", (RolloutMixin, trainer_class), {"__module__": __name__})
