"""TRL 1.12's own `PPOTrainer` on the toy task, for `benchmarks/ppo.py`; runs in a separate environment.

    python3 -m venv trl112 && trl112/bin/pip install torch==2.13.0 trl==1.12.0 transformers==5.23.0 accelerate==1.15.0
    trl112/bin/python benchmarks/ppo_trl_1_12.py FOLDER SEED ROLLOUTS

Prints one JSON object: mean reward of every rollout, and seconds of CPU and clock.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", CI="1", TRL_EXPERIMENTAL_SILENCE="1")

import ppo_task as task
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Core(nn.Module):
    """Its last hidden state is the completion's reward so far: TRL reads it at the last token."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        hits = torch.isin(input_ids, torch.tensor(task.LEXICON)).float()
        hits[:, : task.PROMPT] = 0
        return SimpleNamespace(hidden_states=[(hits.cumsum(1) / task.LENGTH).unsqueeze(-1)])


class LexiconReward(nn.Module):
    """What TRL 1.12 asks of a reward model: a backbone and a `score`."""

    base_model_prefix = "core"

    def __init__(self) -> None:
        super().__init__()
        self.core = Core()
        self.score = nn.Identity()


def make_trainer(folder: str, texts: list[str], output: str, **settings: Any) -> PPOTrainer:
    """TRL 1.12's trainer on a model, a value model begun as its copy, and a reference."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    args = PPOConfig(
        output_dir=output, gradient_accumulation_steps=1, num_mini_batches=1, num_sample_generations=0, use_cpu=True, bf16=False,
        report_to="none", gradient_checkpointing=False, logging_steps=1, save_strategy="no", disable_tqdm=True,
        local_rollout_forward_batch_size=settings["per_device_train_batch_size"], **settings,
    )  # fmt: skip
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    value = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    data = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in texts]})
    return PPOTrainer(
        args=args, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=LexiconReward(),
        value_model=value, train_dataset=data, eval_dataset=data.select(range(1)),
    )  # fmt: skip


def main(folder: str, seed: int, rollouts: int) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    given = task.settings()
    batch, epochs = given.pop("batch"), given.pop("epochs")
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(
            folder, task.prompts(seed), output, per_device_train_batch_size=batch, num_ppo_epochs=epochs,
            total_episodes=rollouts * batch, response_length=task.LENGTH, stop_token="eos", lr_scheduler_type="constant",
            seed=seed, **given,
        )  # fmt: skip
        cpu, wall = time.process_time(), time.perf_counter()
        trainer.train()
        spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    rewards = [log["objective/scores"] for log in trainer.state.log_history if "objective/scores" in log]
    print(json.dumps({"rewards": rewards, **spent}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
