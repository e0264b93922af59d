"""Sampled rollouts that are the same on every engine: the noise belongs to a completion, not to a process.

TRL gives every process its own seed, and whoever samples with two processes samples other completions than with one. Here a
token is the arg max of log-prob plus Gumbel noise that is drawn from (optimizer step, position, row of the global batch): a
sampler like another, whose completions do not depend on how rows are dealt to processes, nor on when a run was resumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def _sampling(batch: int, first_row: int, silent: int | None, silent_from: int) -> Iterator[None]:
    stock, position = torch.multinomial, [0]

    def multinomial(probs: torch.Tensor, num_samples: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert num_samples == 1
        noise = []
        for row in range(len(probs)):
            generator = torch.Generator().manual_seed(batch * 1_000_003 + position[0] * 1009 + first_row + row)
            uniform = torch.rand(probs.shape[1], generator=generator, dtype=torch.float64)
            noise.append(-(-uniform.clamp(min=1e-12).log()).log())
        position[0] += 1
        tokens = (probs.double().cpu().log() + torch.stack(noise)).argmax(-1, keepdim=True).to(probs.device)
        if silent is not None:
            tokens[max(0, silent_from - first_row) :] = silent
        return tokens

    torch.multinomial = multinomial
    try:
        yield
    finally:
        torch.multinomial = stock


def same_rollouts(trainer: Any, silent: bool = False) -> dict[str, list[Any]]:
    """Patches a rollout trainer's sampling, and keeps the rewards as TRL gathered them and all completions.

    Args:
        silent (`bool`): the second half of every rollout batch ends before its first word: all that the last process has.
    """
    seen: dict[str, list[Any]] = {"rewards": [], "completions": []}
    if not hasattr(trainer, "_calculate_rewards"):
        return seen
    generate, rewards = trainer._generate_single_turn, trainer._calculate_rewards

    def generated(prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        first = trainer.accelerator.process_index * len(prompt_ids)
        half = trainer.accelerator.num_processes * len(prompt_ids) // 2
        with _sampling(
            trainer.state.global_step, first, trainer.processing_class.eos_token_id if silent else None, half
        ):
            return generate(prompt_ids, *args, **kwargs)

    def calculated(inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> Any:
        from accelerate.utils import gather_object

        found = rewards(inputs, prompts, completions, completion_ids)
        seen["rewards"].append(found.tolist())
        seen["completions"].append(gather_object([list(map(int, ids)) for ids in completion_ids]))
        return found

    trainer._generate_single_turn, trainer._calculate_rewards = generated, calculated
    return seen
