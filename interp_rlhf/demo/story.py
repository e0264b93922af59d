"""The demo: a concept becomes a probe, the probe a reward in GRPO, beside a sham arm, a holdout monitor and VADER.

In: a few settings. Out: a folder with data, cards, two run logs, `summary.json` and the report. Every step is the package's
public path; nothing here knows a shortcut.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset

from ..activations.batch import tokenize_examples
from ..activations.counted import end_of_turn_ids
from ..activations.read import read
from ..attachment import attach
from ..concepts.artifact import library_versions, write_atomically
from ..concepts.card import load_card, with_evidence
from ..concepts.examples import load_examples, write_jsonl
from ..concepts.fitting import fit_probe, sweep_points
from ..concepts.publish import plot_sweep, publish
from ..concepts.readout import Readout
from ..drift.config import DriftConfig
from ..embedded import MODEL_ID, default_model
from ..report import write_report
from ..training.rewards import ConceptReward
from ..validation import measures
from ..validation.check import check_card
from ..validation.gate import require_passed
from ..validation.statistics import mean_interval
from .generate import ROLLOUT_TEMPERATURE, contrast, generate
from .prompts import CONCEPT, prompts

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..attachment import Attachment
    from ..concepts.examples import Examples
    from ..runlog.log import RunLog

ARMS = {"probe": None, "sham": "shuffle"}


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo.

    Attributes:
        steps (`int`): optimizer steps of each arm.
        seed (`int`): of everything.
        fit, check, monitor, evaluate (`int`): prompts per set; contrast data have two answers each.
        answer_tokens (`int`): length of contrast answers.
        completion_tokens (`int`): length of rollouts and of the compared answers.
        rollouts, generations (`int`): completions per step, and per prompt.
        sweep_every (`int`): the layer sweep takes every n-th layer.
    """

    steps: int = 12
    seed: int = 0
    fit: int = 48
    check: int = 64
    monitor: int = 24
    evaluate: int = 48
    answer_tokens: int = 32
    completion_tokens: int = 24
    rollouts: int = 16
    generations: int = 8
    sweep_every: int = 4
    learning_rate: float = 1e-3
    beta: float = 0.02
    lora_rank: int = 16


def quick(settings: Settings) -> Settings:
    """The same story in about four minutes; its figures are too small to mean much."""
    return Settings(
        **{**asdict(settings), "steps": 2, "check": 56, "monitor": 16, "evaluate": 16, "rollouts": 8, "generations": 4}
    )


def run(out: str | Path, settings: Settings, model: str | None = None, is_quick: bool = False) -> dict[str, Any]:
    """Runs the demo; returns what `summary.json` holds.

    Raises:
        `ValueError`: the folder holds a finished demo already, or the probe does not pass its gate.
        `RuntimeError`: the model is not to be had.
    """
    started = time.monotonic()
    vader = measures.vader()
    folder = Path(out)
    if (folder / "summary.json").exists():
        raise ValueError(f"`{folder}` holds a finished demo – expected a new folder. Pass `--out`, or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    _say(1, f"the model ({model or MODEL_ID})")
    path = str(model or default_model())
    base, tokenizer = _load(path)
    _say(2, "contrast data: the model answers with the clause kept and broken")
    data = _contrast_data(base, tokenizer, folder / "data", settings)
    _say(3, "the probe, its evidence, and a holdout monitor")
    cards, evidence = _cards(base, tokenizer, data, folder / "cards", settings, vader, model or MODEL_ID)
    _say(4, "answers to held-out prompts before training")
    judge = _Judge(base, tokenizer, [Readout.from_card(str(cards[role])) for role in ("reward", "monitor")], vader)
    held_out = prompts("eval", settings.evaluate)
    before = judge(_answers(base, tokenizer, held_out, settings, "before"))
    arms, logs = {}, []
    for number, arm in enumerate(ARMS):
        _say(
            5 + number, f"GRPO, {settings.steps} steps, arm `{arm}`" + (" (scores shuffled)" if arm == "sham" else "")
        )
        policy, attachment = _train(arm, path, tokenizer, cards, folder / arm, settings, vader)
        after = judge(_answers(policy, tokenizer, held_out, settings, f"after, {arm}"))
        arms[arm] = _compare(before, after, attachment, settings.seed)
        logs.append(attachment.run_log)
        _log_samples(attachment.run_log, before, after, settings.steps)
        del policy, attachment
        gc.collect()
    _say(7, "the report")
    summary = {
        "schema": 1,
        "command": "interp-rlhf " + " ".join(sys.argv[1:]),
        "model": model or MODEL_ID,
        "quick": is_quick,
        "settings": asdict(settings),
        "versions": library_versions(),
        "probe": evidence,
        "arms": {arm: {key: value for key, value in found.items() if key != "gains"} for arm, found in arms.items()},
        "probe_minus_sham": _difference(arms["probe"]["gains"], arms["sham"]["gains"], settings.seed),
        "seconds": round(time.monotonic() - started, 1),
    }
    _tables(logs[0], summary)
    write_atomically(folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    write_report([log.path for log in logs], folder / "report.html", title="interp_rlhf demo: warmth as a reward")
    return summary


def _say(number: int, what: str) -> None:
    print(f"\n[{number}/7] {what}", flush=True)


def _load(path: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _contrast_data(model: Any, tokenizer: Any, folder: Path, settings: Settings) -> dict[str, Examples]:
    folder.mkdir(exist_ok=True)
    sizes = {"fit": settings.fit, "check": settings.check, "monitor": settings.monitor}
    found = {}
    for number, (name, size) in enumerate(sizes.items()):
        rows = contrast(
            model,
            tokenizer,
            prompts(name, size),
            tokens=settings.answer_tokens,
            seed=settings.seed + 10 * number,
            label=name,
        )
        write_jsonl(rows, folder / f"{name}.jsonl")
        found[name] = load_examples(folder / f"{name}.jsonl")
    return found


def _cards(
    model: Any,
    tokenizer: Any,
    data: dict[str, Examples],
    folder: Path,
    settings: Settings,
    vader: Callable[[str], float],
    model_id: str,
) -> tuple[dict[str, Path], dict[str, Any]]:
    points = sweep_points(model, settings.sweep_every)
    fit = fit_probe(model, tokenizer, data["fit"], points, model_id=model_id, seed=settings.seed, progress=True)
    chosen = fit.artifact.header.hook_point
    # Another block than the reward's, other data, another pooling.
    other = points[(points.index(chosen) + len(points) // 2) % len(points)]
    holdout = fit_probe(
        model, tokenizer, data["monitor"], [other], model_id=model_id, seed=settings.seed, progress=True
    )
    for made in ("reward.v1.yaml", "monitor.v1.yaml", "warmth.v1.safetensors", "warmth-holdout.v1.safetensors"):
        (folder / made).unlink(missing_ok=True)  # left by a demo that did not end
    cards = {
        "reward": publish(fit, folder, name="warmth", concept=CONCEPT, holdouts=["monitor.v1.yaml"]),
        "monitor": publish(holdout, folder, name="warmth-holdout", concept=CONCEPT, role="monitor"),
    }
    plot_sweep(fit.curve, folder / "sweep.svg", "warmth: cross-validated on the fit's answers")
    evidence = {}
    for role, examples in (("reward", data["fit"]), ("monitor", data["monitor"])):
        found = check_card(
            load_card(cards[role]), model, tokenizer, examples, data["check"],
            measures={"vader": vader}, seed=settings.seed, command="interp-rlhf demo", progress=True,
        )  # fmt: skip
        write_atomically(cards[role], with_evidence(cards[role].read_text(), found).encode())
        evidence[role] = {"hook_point": load_card(cards[role]).card.readout.hook_point, **found.held_out.model_dump()}
    require_passed(load_card(cards["reward"]).card, cards["reward"])
    _print_evidence(evidence["reward"])
    return cards, {**evidence["reward"], "holdout_monitor": evidence["monitor"]}


def _print_evidence(found: dict[str, Any]) -> None:
    probe, tfidf, vader, adds = found["probe"], found["tfidf"], found["measures"]["vader"], found["adds"]
    auroc, loss = adds["auroc"], adds["log_loss"]
    print(
        f"what the probe adds to all baselines together: AUROC {auroc['value']:+.3f} [{auroc['low']:+.3f}, "
        f"{auroc['high']:+.3f}] to {adds['auroc_without']:.3f}, {loss['value']:+.3f} [{loss['low']:+.3f}, "
        f"{loss['high']:+.3f}] nats saved of {adds['log_loss_without']:.3f}"
    )
    print(
        f"probe at {found['hook_point']}: AUROC {probe['auroc']:.3f} [{probe['low']:.3f}, {probe['high']:.3f}] on "
        f"{found['examples']} other answers; 95th percentile of permuted labels {found['permutation']['p95']:.3f}, of "
        f"random directions {found['random_direction']['p95']:.3f}; TF-IDF {tfidf['auroc']:.3f}, embedding "
        f"{found['embedding']['auroc']:.3f}, VADER {vader['auroc']:.3f}"
    )


def _train(
    arm: str,
    path: str,
    tokenizer: Any,
    cards: dict[str, Path],
    folder: Path,
    settings: Settings,
    vader: Callable[[str], float],
) -> tuple[Any, Attachment]:
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    (folder / "interp.jsonl").unlink(missing_ok=True)  # left by a demo that did not end
    args = GRPOConfig(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.rollouts,
        num_generations=settings.generations,
        max_completion_length=settings.completion_tokens,
        temperature=ROLLOUT_TEMPERATURE,
        top_k=0,
        beta=settings.beta,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=settings.seed,
        use_cpu=True,
        bf16=False,
    )
    reward = ConceptReward.from_card(cards["reward"], sham=ARMS[arm], seed=settings.seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    trainer = GRPOTrainer(
        model=_load(path)[0],
        reward_funcs=[reward],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts("train")]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules=targets, task_type="CAUSAL_LM"
        ),
    )
    attachment = attach(
        trainer,
        monitors=[cards["monitor"]],
        measures={"vader": vader},
        drift=DriftConfig(every=max(1, settings.steps // 3)),
        arm=arm,
        samples_every=max(1, settings.steps // 3),
    )
    trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model).eval(), attachment


def _answers(model: Any, tokenizer: Any, asked: list[Any], settings: Settings, label: str) -> list[dict[str, Any]]:
    return generate(
        model,
        tokenizer,
        asked,
        tokens=settings.completion_tokens,
        seed=settings.seed + 999,
        label=label,
        batch_size=24,
    )


class _Judge:
    """Scores answers on the frozen base model and by VADER: the same for both arms, before and after."""

    def __init__(self, model: Any, tokenizer: Any, readouts: list[Readout], vader: Callable[[str], float]):
        self.model, self.tokenizer, self.readouts, self.vader = model, tokenizer, readouts, vader

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        batch = tokenize_examples(rows, self.tokenizer, end_of_turn_ids=end_of_turn_ids(self.model, self.tokenizer))
        scores = read(self.model, batch, self.readouts, reader="reference", progress="scoring answers")
        values = {readout.name: readout.score(scores[readout.name]) for readout in self.readouts}
        names = ("probe_score", "monitor_score")
        judged = []
        for i, row in enumerate(rows):
            found: dict[str, float | None] = {
                key: values[readout.name][i] for key, readout in zip(names, self.readouts, strict=True)
            }
            found["vader"] = self.vader(row["completion"])
            found["tokens"] = float(len(row["completion_ids"]))
            judged.append({**row, "scores": found})
        return judged


def _compare(
    before: list[dict[str, Any]], after: list[dict[str, Any]], attachment: Attachment, seed: int
) -> dict[str, Any]:
    """Paired gains per held-out prompt; prompts whose answer was empty on either side are left out and counted."""
    found: dict[str, Any] = {"gains": {}}
    for key in ("probe_score", "monitor_score", "vader", "tokens"):
        pairs = [(b["scores"][key], a["scores"][key]) for b, a in zip(before, after, strict=True)]
        gains = {i: a - b for i, (b, a) in enumerate(pairs) if a is not None and b is not None}
        mean, low, high = mean_interval(np.array(list(gains.values())), seed)
        found["gains"][key] = gains
        found[f"{key}_gain"] = {
            "mean": round(mean, 4), "low": round(low, 4), "high": round(high, 4), "prompts": len(gains),
            "before": round(float(np.mean([b for b, a in pairs if a is not None and b is not None])), 4),
            "after": round(float(np.mean([a for b, a in pairs if a is not None and b is not None])), 4),
        }  # fmt: skip
    history = [row for row in attachment.trainer.state.log_history if "kl" in row]
    last = history[-1]
    found["last_step"] = {
        "kl": last["kl"],
        "entropy": last["entropy"],
        "clipped_ratio": last["completions/clipped_ratio"],
        "reward": last["reward"],
    }
    found["first_step"] = {"entropy": history[0]["entropy"], "reward": history[0]["reward"]}
    assert attachment.rollout is not None
    found["extra_forward_passes_for_the_reward"] = attachment.rollout.own_forwards
    return found


def _difference(probe: dict[str, Any], sham: dict[str, Any], seed: int) -> dict[str, Any]:
    found = {}
    for key in probe:
        rows = sorted(set(probe[key]) & set(sham[key]))
        mean, low, high = mean_interval(np.array([probe[key][i] - sham[key][i] for i in rows]), seed)
        found[f"{key}_gain"] = {
            "mean": round(mean, 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "prompts": len(rows),
        }
    return found


def _log_samples(log: RunLog, before: list[dict[str, Any]], after: list[dict[str, Any]], step: int) -> None:
    for when, rows, at in (("before", before, 0), ("after", after, step)):
        shown = [
            {"prompt": row["prompt"][-1]["content"], "completion": row["completion"], "scores": row["scores"]}
            for row in rows[:12]
        ]
        log.append("samples", at, when=when, rows=shown)


def _tables(log: RunLog, summary: dict[str, Any]) -> None:
    probe = summary["probe"]
    gates = [[name, probe[name]["mean"], None, probe[name]["p95"]] for name in ("permutation", "random_direction")]
    adds = probe["adds"]["auroc"]
    estimates = {
        "the probe adds to all baselines together (difference)": {"auroc": adds["value"], **adds},
        **{key: probe[key] for key in ("probe", "tfidf", "embedding", "length", "punctuation")},
        **{f"likelihood, {how}": found for how, found in probe["likelihood"].items()},
        **{f"prompt, {what}": probe["prompt"][what] for what in ("tfidf", "probe")},
        **probe["measures"],
    }
    log.append(
        "table",
        title="Evidence for the probe",
        columns=["what", "AUROC", "95 % low", "95 % high (controls: 95th percentile)"],
        rows=[[name, e["auroc"], e["low"], e["high"]] for name, e in estimates.items()] + gates,
        note=f"{probe['examples']} answers to prompts that share neither topic nor template with the fit, read at "
        f"{probe['hook_point']}. The probe must lie above both controls; text baselines and VADER do not gate.",
    )
    rows = []
    for key in ("probe_score", "monitor_score", "vader", "tokens"):
        for arm, found in [*summary["arms"].items(), ("probe − sham", summary["probe_minus_sham"])]:
            gain = found[f"{key}_gain"]
            rows.append([key, arm, gain.get("before"), gain.get("after"), gain["mean"], gain["low"], gain["high"]])
    log.append(
        "table",
        title="Held-out prompts, before and after",
        columns=["measure", "arm", "before", "after", "gain", "95 % low", "95 % high"],
        rows=rows,
        note="Paired by prompt; intervals from a bootstrap over prompts, one training seed. Scores are read on the frozen "
        "base model. VADER is independent of the reward; the monitor was fitted on other data at another block.",
    )
