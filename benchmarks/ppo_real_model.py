"""Speed and memory of PPO on a real model, against TRL 1.12's `PPOTrainer`, all weights trained.

Each side runs in a separate process, in alternation: rollouts of 8 completions of exactly 32 tokens to the same prompts, four
passes over each, a reference, the same cheap reward. TRL 1.12 has a value model, so `_model` (`critic="model"`) compares like
with like. The other (`critic="head"`) is what a user gets by default.

  samples_per_second_vs_trl_1_12[_model]   by CPU time of all rollouts but the first
  peak_memory_vs_trl_1_12[_model]          highest resident memory of the process
  samples_per_second_head_vs_model         our value head against our value model
  peak_memory_head_vs_model                the same by memory

    python benchmarks/ppo_real_model.py --trl-1-12 trl112/bin/python --json

Without `--trl-1-12` only our two sides run. `ppo_trl_1_12.py` says how to make the environment of the other side. Nothing of
this package is imported there. The model is the embedded SmolLM2-135M-Instruct, or what `--model` says.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

COMPLETIONS, LENGTH, EPOCHS, ROLLOUTS = 8, 32, 4, 4
OURS = {"head": "", "model": "_model"}
SHARED = {
    "per_device_train_batch_size": COMPLETIONS, "num_ppo_epochs": EPOCHS, "learning_rate": 1e-6, "kl_coef": 0.02,
    "temperature": 1.0, "seed": 0,
}  # fmt: skip


def texts(model: str) -> list[str]:
    """Prompts in the model's chat format."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = [f"What do you think of the number {i}?" for i in range(COMPLETIONS * ROLLOUTS)]
    turns = [[{"role": "user", "content": text}] for text in asked]
    return [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]


def clock(every: int) -> Any:
    """A callback that notes CPU seconds at the end of every rollout."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % every == 0:
                self.times.append(time.process_time())

    return Clock()


def ours(model: str, critic: str, output: str) -> tuple[Any, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer

    from interp_rlhf import PPOConfig, PPOTrainer

    args = PPOConfig(
        output, max_completion_length=LENGTH, max_steps=EPOCHS * ROLLOUTS, critic=critic, bootstrap_truncated=False,
        generation_kwargs={"min_new_tokens": LENGTH}, model_init_kwargs={"dtype": "float32"}, use_cpu=True, bf16=False,
        report_to="none", gradient_checkpointing=False, logging_steps=1, save_strategy="no", disable_tqdm=True, **SHARED,
    )  # fmt: skip

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [sum(token % 16 == 2 for token in ids) / LENGTH for ids in completion_ids]

    trainer = PPOTrainer(
        model, [reward], args, Dataset.from_list([{"prompt": text} for text in texts(model)]),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
    )  # fmt: skip
    return trainer, clock(EPOCHS)


def theirs(model: str, output: str) -> tuple[Any, Any]:
    from ppo_trl_1_12 import make_trainer

    settings = {"total_episodes": COMPLETIONS * ROLLOUTS, "response_length": LENGTH, **SHARED}
    return make_trainer(model, texts(model), output, **settings), clock(1)


def run(side: str, model: str) -> None:
    """Runs one side and prints samples per CPU second and bytes as JSON."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as output:
        trainer, times = theirs(model, output) if side == "trl_1_12" else ours(model, side, output)
        trainer.add_callback(times)
        trainer.train()
    assert len(times.times) == ROLLOUTS, times.times
    speed = COMPLETIONS * (ROLLOUTS - 1) / (times.times[-1] - times.times[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"samples_per_second": speed, "peak": peak}))


def of_process(python: str, side: str, model: str) -> dict[str, float]:
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CI": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(
        [python, __file__, "--side", side, "--model", model], capture_output=True, text=True, env={**os.environ, **quiet}
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"`{side}` failed:\n{done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def measured(sides: dict[str, str], model: str, pairs: int) -> dict[str, list[dict[str, float]]]:
    """Speed and memory of every side, run after run in alternation."""
    from tqdm.auto import tqdm

    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for pair in tqdm(range(pairs), desc="runs of each side", leave=False):
        for side in sorted(sides, reverse=bool(pair % 2)):
            runs[side].append(of_process(sides[side], side, model))
    return runs


def rows_of_pair(
    runs: dict[str, list[dict[str, float]]], side: str, other: str, name: str, *targets: str
) -> list[Any]:
    """Speed and memory of one side over those of another."""
    from timing import Row

    pairs = list(zip(runs[side], runs[other], strict=True))
    speed = [a["samples_per_second"] / b["samples_per_second"] for a, b in pairs]
    memory = [a["peak"] / b["peak"] for a, b in pairs]
    about = f"{pairs[0][0]['peak'] / 1e9:.1f} against {pairs[0][1]['peak'] / 1e9:.1f} GB"
    fast, small = targets or ("", "")
    return [Row(f"samples_per_second_{name}", speed, fast), Row(f"peak_memory_{name}", memory, small, about)]


def main() -> None:
    import synthetic
    from ppo_task import NO_TRL_1_12
    from timing import Row, finish, parser, prepare

    made = parser(__doc__, pairs=3)
    synthetic.add_model(made, default="embedded")
    made.add_argument("--trl-1-12", type=Path, metavar="PYTHON", help="interpreter of an environment with TRL 1.12")
    arguments = made.parse_args()
    prepare(arguments)
    sides = dict.fromkeys(OURS, sys.executable)
    if arguments.trl_1_12:
        sides["trl_1_12"] = str(arguments.trl_1_12)
    with synthetic.subject(arguments, 512) as (subject, _):
        runs = measured(sides, str(subject.folder), arguments.pairs)
    rows = []
    for side, suffix in OURS.items():
        if arguments.trl_1_12:
            rows += rows_of_pair(runs, side, "trl_1_12", f"vs_trl_1_12{suffix}", "≥ 1.2", "≤ 1")
        else:
            rows += [
                Row(f"{what}_vs_trl_1_12{suffix}", [], note=NO_TRL_1_12)
                for what in ("samples_per_second", "peak_memory")
            ]
    rows += rows_of_pair(runs, "head", "model", "head_vs_model")
    settings = {
        "model": subject.name, "completions": COMPLETIONS, "tokens": LENGTH, "epochs": EPOCHS, "rollouts": ROLLOUTS,
        "peaks": runs,
    }  # fmt: skip
    finish("ppo_real_model", rows, arguments, settings)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        run(sys.argv[2], sys.argv[4])
    else:
        main()
