"""What PPO learns from the same samples, and what a step of it costs.

A toy task on a tiny model with random weights (`ppo_task.py`): write words of a lexicon. Arms share prompts, seeds, rollouts of
32 completions and four optimizer steps each; an arm's score is the mean reward of its last three rollouts. `_model`: with a
separate value model (`critic="model"`) instead of a value head.

  dense_samples[_model]       samples after which the arm that is paid per token has the final score of the arm that is paid the
                              same total on the last token, over that arm's samples; per seed
  step_vs_grpo[_model]        a rollout with two passes over it, over the same of `GRPOTrainer` with `num_iterations=2`, both with
                              a reference; 16 completions of exactly 32 tokens, Llama of 8 blocks and width 512, all weights
  score_vs_trl_1_12[_model]   final score over that of TRL 1.12's own PPO, per seed
  samples_per_second_vs_trl_1_12[_model]   by CPU time of training
  factor_<change>             final score with one thing changed, over that with a value head; `--factors`

The two rows about TRL 1.12 need `--trl-1-12 PYTHON`, the interpreter of an environment with it (see `ppo_trl_1_12.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ppo_task as task
import synthetic
from datasets import Dataset
from steps import timed_step
from timing import Row, alternate, finish, parser, prepare
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from interp_rlhf import PPOConfig, PPOTrainer

HERE = Path(__file__).resolve().parent
# One thing at a time, all else as in the first arm: what could explain that TRL 1.12 learns faster.
FACTORS: dict[str, dict[str, Any]] = {
    "separate_value_model": {"critic": "model"},
    "no_gradient_clipping": {"max_grad_norm": 0.0},
    "detached_trunk": {"detach_trunk": True},
    "value_learning_rate_x10": {"value_learning_rate": 3e-2},
    "vf_coef_1": {"vf_coef": 1.0},
    "no_value_clipping": {"cliprange_value": None},
    "four_mini_batches": {"num_mini_batches": 4},
    "micro_batch_mean": {"loss_type": "bnpo"},
    "no_critic": {"critic": "none"},
}


def whole(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """The reward of each completion, on its last token."""
    return [sum(task.token_scores(ids)) for ids in completion_ids]


def per_token(completion_ids: list[list[int]], **kwargs: Any) -> list[list[float]]:
    """The same total, each token its own part."""
    return [task.token_scores(ids) for ids in completion_ids]


def arm(folder: Path, seed: int, rollouts: int, dense: bool = False, **changes: Any) -> dict[str, Any]:
    """One run: mean reward of every rollout, and CPU seconds of training."""
    shared = task.settings()
    batches = changes.get("num_mini_batches", 1)
    with tempfile.TemporaryDirectory() as output:
        settings = {
            "output_dir": output, "per_device_train_batch_size": shared["batch"] // batches, "num_ppo_epochs": shared["epochs"],
            "max_steps": rollouts * shared["epochs"] * batches, "max_completion_length": task.LENGTH,
            **{k: v for k, v in shared.items() if k not in ("batch", "epochs")}, "lr_scheduler_type": "constant",
            "bootstrap_truncated": False, "use_cpu": True, "bf16": False, "report_to": "none", "seed": seed,
            "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        }  # fmt: skip
        trainer = PPOTrainer(
            str(folder), [per_token if dense else whole], PPOConfig(**{**settings, **changes}),
            Dataset.from_list([{"prompt": text} for text in task.prompts(seed)]),
            processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        before = time.process_time()
        trainer.train()
        spent = time.process_time() - before
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    explained = [log["val/explained_variance"] for log in trainer.state.log_history if "val/explained_variance" in log]
    return {"rewards": rewards, "cpu": spent, "explained_variance": explained[-1] if explained else None}


def theirs(python: Path, folder: Path, seed: int, rollouts: int) -> dict[str, Any]:
    """The same of TRL 1.12, in its own environment."""
    command = [str(python), str(HERE / "ppo_trl_1_12.py"), str(folder), str(seed), str(rollouts)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        raise SystemExit(f"TRL 1.12 failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def samples_to_reach(rewards: list[float], score: float) -> float:
    """Share of the rollouts after which the mean of the last three first reaches a score; 1.0 also if it never does."""
    reached = [i for i in range(3, len(rewards) + 1) if task.last_mean(rewards[:i]) >= score]
    return reached[0] / len(rewards) if reached else 1.0


def runs_of(arguments: argparse.Namespace, work: Path) -> dict[str, list[dict[str, Any]]]:
    """Every arm on every seed, and TRL 1.12 where its interpreter was given."""
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    folders = {seed: task.save_model(work / f"model-{seed}", seed) for seed in seeds}
    arms: dict[str, dict[str, Any]] = {
        "head": {}, "head, dense": {"dense": True}, "model": {"critic": "model"},
        "model, dense": {"critic": "model", "dense": True},
    }  # fmt: skip
    if arguments.factors:
        arms |= {f"factor: {name}": changes for name, changes in FACTORS.items()}
    runs = {
        name: [arm(folders[seed], seed, arguments.rollouts, **changes) for seed in seeds]
        for name, changes in tqdm(arms.items(), desc="arms", leave=False)
    }
    if arguments.trl_1_12:
        runs["TRL 1.12"] = [theirs(arguments.trl_1_12, folders[seed], seed, arguments.rollouts) for seed in seeds]
    return runs


def score_ratios(ours: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[float]:
    """Final score over final score, seed by seed."""
    return [task.last_mean(a["rewards"]) / task.last_mean(b["rewards"]) for a, b in zip(ours, others, strict=True)]


def learning_rows(runs: dict[str, list[dict[str, Any]]]) -> list[Row]:
    rows = []
    for critic, suffix in (("head", ""), ("model", "_model")):
        pairs = zip(runs[critic], runs[f"{critic}, dense"], strict=True)
        values = [samples_to_reach(b["rewards"], task.last_mean(a["rewards"])) for a, b in pairs]
        rows.append(Row(f"dense_samples{suffix}", values, "≤ 0.6"))
    for critic, suffix in (("head", ""), ("model", "_model")):
        score, speed = f"score_vs_trl_1_12{suffix}", f"samples_per_second_vs_trl_1_12{suffix}"
        if "TRL 1.12" in runs:
            pairs = zip(runs[critic], runs["TRL 1.12"], strict=True)
            rows.append(Row(score, score_ratios(runs[critic], runs["TRL 1.12"]), "≥ 1"))
            rows.append(Row(speed, [b["cpu"] / a["cpu"] for a, b in pairs]))
        else:
            rows += [Row(name, [], note=task.NO_TRL_1_12) for name in (score, speed)]
    factors = [name for name in runs if name.startswith("factor: ")]
    return [*rows, *(Row(name.replace(": ", "_"), score_ratios(runs[name], runs["head"])) for name in factors)]


def table_of(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Scores and rewards of every arm, as they are stored; prints the scores."""
    table = {
        name: {
            "scores": [round(task.last_mean(run["rewards"]), 4) for run in seeds],
            "rewards": [[round(reward, 4) for reward in run["rewards"]] for run in seeds],
            "explained_variance": [run.get("explained_variance") for run in seeds],
        }
        for name, seeds in runs.items()
    }
    for name, figures in table.items():
        scores = figures["scores"]
        print(f"{name:<32} {sum(scores) / len(scores):.3f}   {scores}")
    return table


def step_rows(arguments: argparse.Namespace, work: Path) -> list[Row]:
    """A rollout with two passes over it: ours and GRPO's, alternating. Learning rate 0, so that all do the same work."""
    vocabulary, completions, tokens = 16_384, 16, 32
    folder = synthetic.save(work / "llama", vocabulary, arguments.seed, **(synthetic.TINY if arguments.quick else {}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = synthetic.make_texts([16 + i for i in range(24)], vocabulary, arguments.seed)
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in texts])
    shared = {
        "per_device_train_batch_size": completions, "max_completion_length": tokens, "learning_rate": 0.0, "max_steps": 2,
        "generation_kwargs": {"min_new_tokens": tokens}, "logging_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False, "seed": arguments.seed,
        "num_generations": 2,
    }  # fmt: skip

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [float(ids[0] % 2) for ids in completion_ids]

    def ours(**changes: Any) -> Callable[[], Any]:
        args = PPOConfig(str(work / f"ppo{len(changes)}"), **shared, num_ppo_epochs=2, kl_coef=0.05, **changes)
        trainer = PPOTrainer(str(folder), [reward], args, data, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        return lambda: trainer

    args = GRPOConfig(str(work / "grpo"), **shared, num_iterations=2, beta=0.05)
    stock = GRPOTrainer(str(folder), [reward], args, data, processing_class=tokenizer)
    stock.remove_callback(PrinterCallback)
    rows = []
    for name, make, target in (
        ("step_vs_grpo", ours(), "≤ 1.10"), ("step_vs_grpo_model", ours(critic="model"), ""),
    ):  # fmt: skip
        samples = alternate(make, lambda: stock, arguments.pairs, name, timed=timed_step)
        rows.append(Row(name, [a.cpu / b.cpu for a, b in samples], target))
        rows.append(Row(f"{name}_wall", [a.wall / b.wall for a, b in samples]))
    return rows


def main() -> None:
    arguments_of = parser(__doc__, pairs=7)
    arguments_of.add_argument("--seeds", type=int, default=6, help="runs of each arm (default: %(default)s)")
    arguments_of.add_argument("--rollouts", type=int, default=24, help="of 32 completions (default: %(default)s)")
    arguments_of.add_argument(
        "--trl-1-12", type=Path, metavar="PYTHON", help="interpreter of an environment with TRL 1.12"
    )
    arguments_of.add_argument("--factors", action="store_true", help="change one thing at a time")
    arguments = arguments_of.parse_args()
    prepare(arguments)
    if arguments.quick:
        arguments.seeds, arguments.rollouts = 1, 3
    with tempfile.TemporaryDirectory() as name:
        runs = runs_of(arguments, Path(name))
        rows, table = learning_rows(runs), table_of(runs)
        rows += step_rows(arguments, Path(name))
    step_model = synthetic.described(16_384, **(synthetic.TINY if arguments.quick else {}))
    settings = {
        "model": f"{task.described()}; for `step_vs_grpo` {step_model}",
        **task.settings(), "seeds": arguments.seeds, "rollouts": arguments.rollouts, "arms": table,
    }  # fmt: skip
    finish("ppo", rows, arguments, settings)


if __name__ == "__main__":
    main()
