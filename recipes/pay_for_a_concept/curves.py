"""Warmth over samples: PPO paid per token, PPO paid on the last token, and GRPO, each by its recipe, several seeds.

    python recipes/pay_for_a_concept/curves.py --out recipes/pay_for_a_concept/curves.json

SmolLM2-135M-Instruct with LoRA, 12 rollouts of 8 completions in each arm. PPO uses each rollout twice, GRPO once. A rollout of
GRPO is eight answers to one prompt; a rollout of PPO is one answer to each of eight. About five minutes a run on one CPU core.
`--work` keeps finished runs. The same command continues a stopped series. It also draws an SVG with the name of the JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from interp_rlhf.runlog.log import read_run_log

ROOT = Path(__file__).resolve().parents[2]
ARMS = {  # name: script, configuration
    "PPO, dense": ("ppo", "recipes/pay_for_a_concept/ppo/config_dense.yaml"),
    "PPO, terminal": ("ppo", "recipes/pay_for_a_concept/ppo/config_terminal.yaml"),
    "GRPO": ("grpo", "recipes/pay_for_a_concept/grpo/config_warmth.yaml"),
}
SAMPLES = 8  # completions of a rollout
MEASURES = {
    "warmth": "rewards/warmth/mean",  # of the completion: paid per token it is the sum of the shares, which is the mean
    "holdout": "interp/warmth-holdout/mean_score",
    "vader": "interp/measure/vader/mean",
    "kl": "kl",
    "explained_variance": "val/explained_variance",
    "length": "completions/mean_length",
}


def run(arm: str, seed: int, folder: Path) -> None:
    """One run by its recipe, unless it is there."""
    log = folder / "interp.jsonl"
    if log.exists() and any(event["event"] == "end" for event in read_run_log(log)):
        return
    script, config = ARMS[arm]
    launch = [
        str(Path(sys.executable).parent / "accelerate"),
        "launch",
        "--config_file",
        "recipes/accelerate_configs/cpu.yaml",
    ]
    changes = ["--output_dir", str(folder), "--seed", str(seed), "--save_strategy", "no"]
    done = subprocess.run(
        [*launch, f"recipes/{script}.py", "--config", config, *changes], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{arm}, seed {seed}, ended with {done.returncode}:\n{done.stderr[-3000:]}")


def curve(folder: Path) -> dict[str, list[float]]:
    """Each measure per rollout. PPO logs two passes over a rollout; the line with the rollout's metrics counts."""
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    for event in read_run_log(folder / "interp.jsonl"):
        if event["event"] != "metric" or "reward" not in event["metrics"]:
            continue
        for name, key in MEASURES.items():
            value = event["metrics"].get(
                key, event["metrics"].get("rewards/warmth/mean") if name == "warmth" else None
            )
            if value is not None:
                found[name].append(round(float(value), 4))
    return {name: values for name, values in found.items() if values}


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Thin lines are seeds, thick ones their means."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "interp_rlhf"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for panel, (name, title) in zip(
        axes, [("warmth", "warmth (paid)"), ("holdout", "holdout monitor"), ("vader", "VADER")], strict=True
    ):
        for colour, arm in zip(("#0072B2", "#D55E00", "#009E73"), ARMS, strict=True):
            own = [one["curve"][name] for one in runs if one["arm"] == arm]
            for line in own:
                panel.plot(
                    [SAMPLES * (i + 1) for i in range(len(line))], line, color=colour, alpha=0.35, linewidth=0.8
                )
            mean = [statistics.mean(values) for values in zip(*own, strict=True)]
            panel.plot([SAMPLES * (i + 1) for i in range(len(mean))], mean, color=colour, linewidth=2, label=arm)
        panel.set_title(title)
        panel.set_xlabel("completions")
    axes[0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def last(line: list[float]) -> float:
    """Mean of the last three rollouts."""
    return statistics.mean(line[-3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/pay_for_a_concept/curves"), help="folder of the runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the drawing goes next to it")
    given = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for seed in given.seeds:
        for arm in ARMS:
            folder = (given.work / f"{arm.lower().replace(', ', '-')}-{seed}").resolve()
            print(f"{arm}, seed {seed}", flush=True)
            run(arm, seed, folder)
            runs.append({"arm": arm, "seed": seed, "curve": curve(folder)})
    names = ("interp-rlhf", "torch", "transformers", "trl", "peft")
    result = {
        "command": "python recipes/pay_for_a_concept/curves.py --out recipes/pay_for_a_concept/curves.json",
        "model": "SmolLM2-135M-Instruct", "card": "reward/warmth/reward.v2.yaml", "completions_per_rollout": SAMPLES,
        "versions": {name: importlib.metadata.version(name) for name in names}, "runs": runs,
    }  # fmt: skip
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(runs, given.out.with_suffix(".svg"))
    print("| arm | warmth, first → last three rollouts | holdout | VADER | KL at the end |\n|---|---|---|---|---|")
    for arm in ARMS:
        own = [one["curve"] for one in runs if one["arm"] == arm]
        cells = []
        for name in ("warmth", "holdout", "vader"):
            pairs = [(statistics.mean(line[name][:3]), last(line[name])) for line in own]
            cells.append("; ".join(f"{a:+.2f} → {b:+.2f}" for a, b in pairs))
        kl = "; ".join(f"{last(line['kl']):.2f}" for line in own)
        print(f"| {arm} | {' | '.join(cells)} | {kl} |")


if __name__ == "__main__":
    main()
