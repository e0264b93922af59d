"""What the tests of PPO share: a real trainer on a tiny model, completions that can be told apart, and a rollout of them."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from training import lora_config, rows_of

from interp_rlhf import ConceptReward, PPOConfig, PPOTrainer
from interp_rlhf.training.ppo.critic import VALUE_HEAD

ROOT = Path(__file__).resolve().parent.parent
END = 0  # the tiny tokenizer's end-of-turn token


def by_length(completion_ids, **kwargs):
    return [float(len(ids) % 3) + 0.1 * (ids[0] % 7) for ids in completion_ids]


def config(folder, **changes):
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1,
        "max_completion_length": 6, "num_ppo_epochs": 2, "use_cpu": True, "bf16": False, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "seed": 3, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return PPOConfig(**{**settings, **changes})


def trainer_of(folder, model, tokenizer, rewards=None, lora=False, rows=None, **changes):
    return PPOTrainer(
        model, rewards or [by_length], config(folder, **changes), Dataset.from_list(rows or rows_of("GRPO")),
        processing_class=tokenizer, peft_config=lora_config() if lora else None,
    )  # fmt: skip


def says(trainer, completions):
    """Makes the trainer's policy write these completions, independent of its weights: row i of every rollout gets the i-th."""

    def generate(prompt_ids, *args, **kwargs):
        return [list(completions[i % len(completions)]) for i in range(len(prompt_ids))], None

    trainer._generate_single_turn = generate


def roll(trainer, rows=4):
    """One rollout of a trainer that has not trained yet."""
    trainer.model.train()
    return trainer._generate_and_score_completions([trainer.train_dataset[i] for i in range(rows)])


def rollouts_of(trainer):
    """Every rollout as it leaves `_generate_and_score_completions`, and the ids in it."""
    found, make = [], trainer._generate_and_score_completions

    def noted(inputs):
        output = make(inputs)
        found.append({key: value.clone() for key, value in output.items()})
        return output

    trainer._generate_and_score_completions = noted
    return found


def randomize_head(trainer, seed=0, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if VALUE_HEAD in name and "trunk" not in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def head_of(trainer):
    found = {
        name.split(".")[-1]: p
        for name, p in trainer.model.named_parameters()
        if VALUE_HEAD in name and "trunk" not in name and p.requires_grad
    }
    return found["weight"].detach(), found["bias"].detach()


def row_ids(output, row):
    """Prompt and completion ids of one row, without padding."""
    return (
        output["prompt_ids"][row][output["prompt_mask"][row].bool()],
        output["completion_ids"][row][output["completion_mask"][row].bool()],
    )


COMPLETIONS = [
    [7, 8, 9, END],
    [10, 11, 12, 13, 14, 15],
    [16, END],
    [17, 18, 19],
]  # the second and the fourth are cut off


class Noted(ConceptReward):
    def __call__(self, completion_ids, **kwargs):
        self.returned = super().__call__(completion_ids, **kwargs)
        return self.returned
