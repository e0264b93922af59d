"""The demo: a concept becomes a probe, and the probe becomes a reward in GRPO. A sham arm, a holdout monitor and VADER watch.

In: sizes, and a folder. Out: data, cards, two run logs, `summary.json` and the report in that folder. Every step is a public
function of the package; it must not take a shortcut.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from .. import (
    CausalSettings,
    ConceptReward,
    DriftConfig,
    Readout,
    attach,
    causal_check,
    check_card,
    fit_probe,
    load_card,
    load_examples,
    write_report,
)
from ..concepts.artifact import library_versions, write_atomically
from ..concepts.card import with_evidence
from ..concepts.causal_card import write_causal
from ..concepts.examples import write_jsonl
from ..concepts.fitting import sweep_points
from ..concepts.publish import publish
from ..concepts.sweep_plot import plot_sweep
from ..embedded import MODEL_ID, load_or_embedded
from ..validation import measures
from ..validation.gate import require_passed
from .gains import AnswerScores, compared, difference_of_gains
from .generate import ROLLOUT_TEMPERATURE, contrast, generate
from .prompts import CONCEPT, prompts
from .tables import log_samples, log_tables, print_evidence

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..attachment import Attachment
    from ..concepts.causal_findings import CausalFindings
    from ..concepts.examples import Examples

ARMS = {"probe": None, "sham": "shuffle"}


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo.

    Attributes:
        steps (`int`): optimizer steps of each arm.
        seed (`int`): seed of everything.
        fit, check, monitor, evaluate (`int`): prompts of each set. Contrast data have two answers to each prompt.
        answer_tokens (`int`): length of contrast answers.
        causal (`int`), causal_tokens (`int`): prompts of the causal check, and the length of their answers.
        completion_tokens (`int`): length of rollouts and of the compared answers.
        rollouts, generations (`int`): completions per step, and per prompt.
        sweep_every (`int`): the layer sweep takes every n-th layer.
        learning_rate, beta (`float`): as in `GRPOConfig`.
        lora_rank (`int`): rank of the adapter that is trained.
    """

    steps: int = 12
    seed: int = 0
    fit: int = 48
    check: int = 64
    monitor: int = 24
    evaluate: int = 48
    answer_tokens: int = 32
    causal: int = 24
    causal_tokens: int = 12
    completion_tokens: int = 24
    rollouts: int = 16
    generations: int = 8
    sweep_every: int = 4
    learning_rate: float = 1e-3
    beta: float = 0.02
    lora_rank: int = 16


def quick_settings(settings: DemoSettings) -> DemoSettings:
    """The same story in about four minutes. Its figures are too small to mean much."""
    return replace(
        settings, steps=2, check=56, monitor=16, causal=16, causal_tokens=6, evaluate=16, rollouts=8, generations=4
    )


def run_demo(
    out: str | Path, settings: DemoSettings, model: str | None = None, is_quick: bool = False
) -> dict[str, Any]:
    """Run the demo.

    Args:
        out (`str` or `Path`): folder for everything.
        settings (`DemoSettings`): sizes.
        model (`str`, *optional*): folder or Hub id of a chat model; the embedded one by default.
        is_quick (`bool`): whether these are the quick settings; the summary says so.

    Returns:
        `dict`: the content of `summary.json`.

    Raises:
        `ValueError`: the folder holds a finished demo already, or the probe does not pass its gate.
        `RuntimeError`: the embedded model is not available.
    """
    started = time.monotonic()
    vader = measures.vader()
    folder = Path(out)
    if (folder / "summary.json").exists():
        raise ValueError(f"`{folder}` holds a finished demo – expected a new folder. Pass `--out`, or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    _say(1, f"the model ({model or MODEL_ID})")
    demo = _Demo(folder, settings, model, vader)
    _say(2, "contrast data: the model answers with the clause kept and broken")
    data = demo.contrast_data()
    _say(3, "the probe, its evidence, and a holdout monitor")
    cards, evidence = demo.cards(data)
    arms, logs = demo.arms(cards)
    _say(7, "the report")
    summary = {
        "schema": 1,
        "command": "interp-rlhf " + " ".join(sys.argv[1:]),
        "model": model or MODEL_ID,
        "quick": is_quick,
        "settings": asdict(settings),
        "versions": library_versions(),
        "probe": evidence,
        "arms": {arm: {key: value for key, value in result.items() if key != "gains"} for arm, result in arms.items()},
        "probe_minus_sham": difference_of_gains(arms["probe"]["gains"], arms["sham"]["gains"], settings.seed),
        "seconds": round(time.monotonic() - started, 1),
    }
    log_tables(logs[0], summary)
    write_atomically(folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    write_report([log.path for log in logs], folder / "report.html", title="interp_rlhf demo: warmth as a reward")
    return summary


def _say(number: int, what: str) -> None:
    print(f"\n[{number}/7] {what}", flush=True)


class _Demo:
    """The base model, and where the demo writes.

    Args:
        folder (`Path`): everything goes there.
        settings (`DemoSettings`): sizes.
        name (`str`, *optional*): folder or Hub id of the model; the embedded one by default.
        vader (`Callable`): the independent measure.
    """

    def __init__(self, folder: Path, settings: DemoSettings, name: str | None, vader: Callable[[str], float]):
        self.folder, self.settings, self.name, self.vader = folder, settings, name, vader
        self.model, self.tokenizer, self.model_id = load_or_embedded(name)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def contrast_data(self) -> dict[str, Examples]:
        """Labelled answers of the model for the fit, its check, and the monitor's fit."""
        folder, settings = self.folder / "data", self.settings
        folder.mkdir(exist_ok=True)
        sizes = {"fit": settings.fit, "check": settings.check, "monitor": settings.monitor}
        data = {}
        for number, (name, size) in enumerate(sizes.items()):
            rows = contrast(
                self.model, self.tokenizer, prompts(name, size), tokens=settings.answer_tokens,
                seed=settings.seed + 10 * number, label=name,
            )  # fmt: skip
            write_jsonl(rows, folder / f"{name}.jsonl")
            data[name] = load_examples(folder / f"{name}.jsonl")
        return data

    def cards(self, data: dict[str, Examples]) -> tuple[dict[str, Path], dict[str, Any]]:
        """Fit and check the reward's probe and the monitor's; returns their cards and the evidence."""
        cards = self._fitted(data)
        evidence = {}
        for role, examples in (("reward", data["fit"]), ("monitor", data["monitor"])):
            checked = check_card(
                load_card(cards[role]), self.model, self.tokenizer, examples, data["check"], measures={"vader": self.vader},
                seed=self.settings.seed, command="interp-rlhf demo", progress=True,
            )  # fmt: skip
            write_atomically(cards[role], with_evidence(cards[role].read_text(), checked).encode())
            hook_point = load_card(cards[role]).card.readout.hook_point
            evidence[role] = {"hook_point": hook_point, **checked.held_out.model_dump()}
        require_passed(load_card(cards["reward"]).card, cards["reward"])
        print_evidence(evidence["reward"])
        found = self._causal(cards["reward"], data["fit"])
        evidence["reward"]["causal"] = None if found is None else found.model_dump()
        return cards, {**evidence["reward"], "holdout_monitor": evidence["monitor"]}

    def _causal(self, path: Path, examples: Examples) -> CausalFindings | None:
        """The causal check of the reward's card on prompts of the training, written into it; None if that fails."""
        settings = self.settings
        try:
            found = causal_check(
                Readout.from_card(str(path)), self.model, self.tokenizer, prompts("train", settings.causal), "vader",
                examples=examples, command="interp-rlhf demo", progress=True,
                settings=CausalSettings(doses=(-4, -2, 2, 4), max_new_tokens=settings.causal_tokens, batch_rows=128,
                    seed=settings.seed),
            )  # fmt: skip
        except ValueError as error:  # another model may answer no prompt with the concept: the story goes on without
            print(f"the causal check was not made: {error}")
            return None
        found = write_causal(load_card(path), found)
        reasons = f" ({'; '.join(found.reasons)})" if found.reasons else ""
        print(f"is the probe's direction causal for VADER of the answers? {found.verdict}{reasons}")
        return found

    def _fitted(self, data: dict[str, Examples]) -> dict[str, Path]:
        folder, seed = self.folder / "cards", self.settings.seed
        points = sweep_points(self.model, self.settings.sweep_every)
        fit = fit_probe(
            self.model, self.tokenizer, data["fit"], points, model_id=self.model_id, seed=seed, progress=True
        )
        chosen = fit.artifact.header.hook_point
        # Another block than the reward's, other data, another pooling.
        other = points[(points.index(chosen) + len(points) // 2) % len(points)]
        holdout = fit_probe(
            self.model, self.tokenizer, data["monitor"], [other], model_id=self.model_id, seed=seed, progress=True
        )
        for name in ("reward.v1.yaml", "monitor.v1.yaml", "warmth.v1.safetensors", "warmth-holdout.v1.safetensors"):
            (folder / name).unlink(missing_ok=True)  # left by a demo that did not end
        cards = {
            "reward": publish(fit, folder, name="warmth", concept=CONCEPT, holdouts=["monitor.v1.yaml"]),
            "monitor": publish(holdout, folder, name="warmth-holdout", concept=CONCEPT, role="monitor"),
        }
        plot_sweep(fit.curve, folder / "sweep.svg", "warmth: cross-validated on the fit's answers")
        return cards

    def arms(self, cards: dict[str, Path]) -> tuple[dict[str, Any], list[Any]]:
        """Train both arms and compare their answers with those of the base model; returns the results and the run logs."""
        settings = self.settings
        _say(4, "answers to held-out prompts before training")
        readouts = [Readout.from_card(str(cards[role])) for role in ("reward", "monitor")]
        judge = AnswerScores(self.model, self.tokenizer, readouts, self.vader)
        before = judge(self._held_out_answers(self.model, "before"))
        results, logs = {}, []
        for number, arm in enumerate(ARMS):
            shuffled = " (scores shuffled)" if arm == "sham" else ""
            _say(5 + number, f"GRPO, {settings.steps} steps, arm `{arm}`{shuffled}")
            policy, attachment = self._trained(arm, cards)
            after = judge(self._held_out_answers(policy, f"after, {arm}"))
            results[arm] = compared(before, after, attachment, settings.seed)
            logs.append(attachment.run_log)
            log_samples(attachment.run_log, before, after, settings.steps)
            del policy, attachment
            gc.collect()
        return results, logs

    def _trained(self, arm: str, cards: dict[str, Path]) -> tuple[Any, Attachment]:
        """Train a LoRA adapter by GRPO with the probe as its reward. The arm `sham` shuffles the scores."""
        from peft import LoraConfig
        from trl import GRPOTrainer

        folder, settings = self.folder / arm, self.settings
        (folder / "interp.jsonl").unlink(missing_ok=True)  # left by a demo that did not end
        reward = ConceptReward.from_card(cards["reward"], sham=ARMS[arm], seed=settings.seed)
        rank, targets = settings.lora_rank, ["q_proj", "k_proj", "v_proj", "o_proj"]
        trainer = GRPOTrainer(
            model=load_or_embedded(self.name)[0],
            reward_funcs=[reward],
            args=_grpo_config(folder, settings),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts("train")]),
            processing_class=self.tokenizer,
            peft_config=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM"),
        )
        attachment = attach(
            trainer,
            monitors=[cards["monitor"]],
            measures={"vader": self.vader},
            drift=DriftConfig(every=max(1, settings.steps // 3)),
            arm=arm,
            samples_every=max(1, settings.steps // 3),
        )
        trainer.train()
        return trainer.accelerator.unwrap_model(trainer.model).eval(), attachment

    def _held_out_answers(self, model: Any, label: str) -> list[dict[str, Any]]:
        settings = self.settings
        return generate(
            model, self.tokenizer, prompts("eval", settings.evaluate), tokens=settings.completion_tokens,
            seed=settings.seed + 999, label=label, batch_size=24,
        )  # fmt: skip


def _grpo_config(folder: Path, settings: DemoSettings) -> Any:
    from trl import GRPOConfig

    return GRPOConfig(
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
