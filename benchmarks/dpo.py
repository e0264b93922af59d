"""What three terms in the loss cost a real `trl.DPOTrainer` step.

The terms are a probe's anchor, a feature constraint on 4,096 latents and a drift penalty in a subspace of eight dimensions,
all at the middle block. The plain step is that of TRL's trainer. Both train with LoRA (r = 16 on the query and value
projections) and with full fine-tuning, learning rate 0. The naive variant computes the same terms from separate forwards with
`output_hidden_states=True`. The model is an 8-block Llama of width 512 with random weights, or what `--model` says.

  three_terms_vs_plain              LoRA: CPU time of a step with the terms over a plain step
  three_terms_vs_plain_full         the same in full fine-tuning
  separate_forwards_vs_plain[_full] the naive variant over a plain step
  three_terms_vs_plain_peak_memory[_full], separate_forwards_vs_plain_peak_memory[_full]
                                    highest resident memory of a process that makes two such steps, over that of two plain steps
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import synthetic
import torch
from datasets import Dataset
from peft import LoraConfig
from steps import timed_step
from timing import Row, Sample, alternate, finish, parser, prepare, rows_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import DPOConfig, DPOTrainer

from interp_rlhf import (
    ConceptAnchor,
    DriftPenalty,
    FeatureConstraint,
    Latents,
    Subspace,
    attach,
)
from interp_rlhf.activations import reference_pass
from interp_rlhf.training.terms.batch import TermBatch
from interp_rlhf.training.terms.pairs import Pairs
from interp_rlhf.training.terms.term import LossTerm

VOCABULARY = 16_384
PAIRS_PER_STEP, LATENTS, RANK_OF_SUBSPACE, RANK = 4, 4096, 8, 16
BETA = 0.1
TEXT = "the harbour of a small town wakes slowly when winter fog hides every boat and gulls call over wet roofs until noon"
WORDS = TEXT.split(" ")
VARIANTS = ("plain", "terms", "naive")
# Whether with LoRA, the ending of the ratios' names, and what a note says.
TRAININGS = ((True, "", "LoRA"), (False, "_full", "full fine-tuning"))


def pairs_of(tokenizer: Any, real: bool, seed: int) -> Dataset:
    """Pairs of different lengths: prompts of 16 to 31 words, completions of 40 to 71."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        count = rng.randint(low, high)
        if real:
            return " ".join(rng.choices(WORDS, k=count))
        return synthetic.make_texts([count], VOCABULARY, rng.randrange(2**31))[0]

    def said(role: str, low: int, high: int) -> list[dict[str, str]]:
        return [{"role": role, "content": text(low, high)}]

    rows = [
        {"prompt": said("user", 16, 31), "chosen": said("assistant", 40, 71), "rejected": said("assistant", 40, 71)}
        for _ in range(PAIRS_PER_STEP)
    ]
    return Dataset.from_list(rows)


def terms_of(folder: Path, seed: int) -> list[LossTerm]:
    """The three terms; readouts are random, since speed does not depend on what they have learned."""
    config = AutoConfig.from_pretrained(folder)
    block, width = config.num_hidden_layers // 2, config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    point = f"model.layers.{block}"
    encoder = torch.randn(LATENTS, width, generator=generator) / width**0.5
    vectors = torch.randn(RANK_OF_SUBSPACE, width, generator=generator)
    return [
        ConceptAnchor(readout=synthetic.make_readout(width, block, seed), weight=0.1),
        FeatureConstraint(readout=Latents("latents", point, encoder, torch.zeros(LATENTS)), weight=0.5),
        DriftPenalty(subspace=Subspace.spanned_by(point, vectors), weight=0.1),
    ]


class NaiveTrainer(DPOTrainer):
    """The same three terms from separate forwards."""

    naive_terms: list[LossTerm]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        block = int(self.naive_terms[0].policy_point.rsplit(".", 1)[1])  # type: ignore[union-attr]
        arguments = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
        output = model(**arguments, output_hidden_states=True)
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        with torch.no_grad(), reference_pass(self.model, self.ref_model) as reference:
            start = reference(**arguments, output_hidden_states=True)
        point = self.naive_terms[0].policy_point
        assert point is not None
        references = {
            r: r(start.hidden_states[block + 1]) for term in self.naive_terms for r in term.reference_readouts
        }
        before = _summed(start.logits, labels)
        pairs = Pairs(
            _summed(output.logits, labels), before, inputs["completion_mask"].sum(1), self.beta, [("sigmoid", 1.0)], before,
        )  # fmt: skip
        batch = TermBatch(inputs, set(), {point: output.hidden_states[block + 1]}, references, pairs)
        return loss + sum(term.compute(batch, term.weight).values.mean() for term in self.naive_terms)


def _summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    kept = labels[:, 1:] != -100
    log_probs = logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return (log_probs * kept).sum(1)


def make_trainer(folder: Path, output: str, variant: str, lora: bool, real: bool, seed: int) -> DPOTrainer:
    """A DPO trainer whose every step is the same batch."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    arguments = DPOConfig(
        output_dir=output, per_device_train_batch_size=PAIRS_PER_STEP, learning_rate=0.0, max_steps=1, logging_steps=1,
        beta=BETA, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, seed=seed,
    )  # fmt: skip
    made = NaiveTrainer if variant == "naive" else DPOTrainer
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lora_config = LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None
    trainer = made(
        model=model, args=arguments, train_dataset=pairs_of(tokenizer, real, seed), processing_class=tokenizer,
        peft_config=lora_config,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    if variant == "terms":
        attach(trainer, regularizers=terms_of(folder, seed))
    if variant == "naive":
        trainer.naive_terms = terms_of(folder, seed)
    return trainer


def high_water_mark() -> int:
    """Highest resident memory of this process in bytes. `ru_maxrss` would begin with the parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def peak_memory(script: str, folder: Path, kind: str, seed: int, real: bool, *more: str) -> float:
    """Highest resident memory in bytes of a fresh process that makes two steps: `script --peak-of KIND`."""
    command = [sys.executable, script, "--seed", str(seed), "--peak-of", kind, "--model", str(folder), *more]
    # Large blocks go back to the system when they are freed, so that the peak is what was in use at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    command += [] if real else ["--made-up-texts"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(
            f"`{kind}` ended with {done.returncode} while its memory was measured:\n{done.stderr[-2000:]}"
        )
    return float(json.loads(done.stdout.splitlines()[-1]))


def add_memory(made: argparse.ArgumentParser, kinds: Sequence[str]) -> None:
    """Arguments about peak memory; the hidden ones are for the processes that `peak_memory` starts."""
    made.add_argument("--memory-pairs", type=int, default=3, help="processes of each kind (default: %(default)s)")
    made.add_argument("--peak-of", choices=kinds, help=argparse.SUPPRESS)
    made.add_argument("--made-up-texts", action="store_true", help=argparse.SUPPRESS)


def print_peak(trainer: DPOTrainer) -> None:
    """Makes two steps and prints the highest resident memory as the last line."""
    trainer.args.max_steps = 2
    trainer.train()
    print(json.dumps(high_water_mark()))


def timed_rows(make: Callable[[str], Callable[[], DPOTrainer]], suffix: str, kind: str, pairs: int) -> list[Row]:
    """CPU time of a step with the terms, by the package and naively, over a plain step."""

    def timed(made: Callable[[], DPOTrainer]) -> Sample:
        return timed_step(made, epoch=True)

    plain, rows = make("plain"), []
    for variant, key, target in (("terms", "three_terms", "≤ 1.05"), ("naive", "separate_forwards", "")):
        samples = alternate(make(variant), plain, pairs, f"{key}, {kind}", timed)
        rows += rows_of(f"{key}_vs_plain{suffix}", samples, target, kind)
    return rows


def memory_rows(peak: Callable[[str], float], suffix: str, kind: str, pairs: int) -> list[Row]:
    """Highest resident memory over that of plain steps."""
    peaks = [{variant: peak(variant) for variant in VARIANTS} for _ in range(pairs)]
    rows = []
    for variant, key, target in (("terms", "three_terms", "≤ 1.03"), ("naive", "separate_forwards", "")):
        values = [one[variant] / one["plain"] for one in peaks]
        note = f"{kind}; plain {peaks[0]['plain'] / 2**30:.2f} GiB"
        rows.append(Row(f"{key}_vs_plain_peak_memory{suffix}", values, target, note))
    return rows


def main() -> None:
    made = parser(__doc__, pairs=7)
    synthetic.add_model(made)
    add_memory(made, VARIANTS)
    made.add_argument("--lora", action="store_true", help=argparse.SUPPRESS)  # with `--peak-of`
    arguments = made.parse_args()
    prepare(arguments)
    seed, memory_pairs = arguments.seed, 1 if arguments.quick else arguments.memory_pairs
    with synthetic.subject(arguments, VOCABULARY) as (subject, work):
        real, counter = subject.real and not arguments.made_up_texts, itertools.count()

        def make(variant: str, lora: bool) -> Callable[[], DPOTrainer]:
            trainer = make_trainer(subject.folder, f"{work}/{next(counter)}", variant, lora, real, seed)
            return lambda: trainer

        def peak(variant: str, lora: bool) -> float:
            return peak_memory(__file__, subject.folder, variant, seed, real, *(["--lora"] if lora else []))

        if arguments.peak_of:
            print_peak(make(arguments.peak_of, arguments.lora)())
            return
        rows = []
        for lora, suffix, kind in TRAININGS[:1] if arguments.quick else TRAININGS:
            rows += timed_rows(functools.partial(make, lora=lora), suffix, kind, arguments.pairs)
            rows += memory_rows(functools.partial(peak, lora=lora), suffix, kind, memory_pairs)
    settings = {
        "model": subject.name, "pairs_per_step": PAIRS_PER_STEP, "latents": LATENTS, "subspace_rank": RANK_OF_SUBSPACE,
        "lora_rank": RANK, "beta": BETA, "learning_rate": 0.0, "memory_pairs": memory_pairs,
    }  # fmt: skip
    finish("dpo", rows, arguments, settings)


if __name__ == "__main__":
    main()
