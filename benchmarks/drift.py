"""What the drift callback costs a real `trl.DPOTrainer` run: one full default evaluation every 50 steps.

The default evaluation reads 24 texts in one whole forward and computes every metric at four layers, the verdict and its line in
the run log, without adaptation. The step is that of `dpo.py` (LoRA, four pairs). A run of 50 steps would take an hour here, so
an evaluation and a step are timed in turn, and the ratio is 1 + evaluation / (50 steps). The model is the embedded
SmolLM2-135M-Instruct, or what `--model` says. The default texts mean nothing to a random model, which reads made-up ones.

  with_callback_vs_plain              CPU time of 50 steps and an evaluation over that of 50 steps
  with_callback_vs_plain_peak_memory  highest resident memory of a process with the start's evaluation, two steps and another
                                      evaluation, over that of two steps
  streaming_cka_error                 largest distance from the batch formula over 20 pairs of matrices
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import synthetic
import torch
from dpo import VOCABULARY, add_memory, make_trainer, peak_memory, print_peak
from steps import timed_step
from timing import Row, Sample, alternate, finish, measure, parser, prepare
from trl import DPOTrainer

from interp_rlhf import DriftCallback
from interp_rlhf.drift.metrics import StreamingCKA

KINDS = ("callback", "plain")
EVERY = 50


def watch(trainer: DPOTrainer, every: int, real: bool, seed: int) -> DriftCallback:
    """The callback with its defaults, but for the texts that a random model reads."""
    texts = None if real else synthetic.make_texts([20] * 24, VOCABULARY, seed)
    return DriftCallback(trainer, texts, every=every)


def cka_error(seed: int) -> float:
    """Largest distance of the streaming CKA from the formula on whole kernels."""
    worst = 0.0
    for index in range(20):
        generator = torch.Generator().manual_seed(seed + index)
        x = torch.randn(300, 32, generator=generator, dtype=torch.float64) + 5
        y = x @ torch.randn(32, 32, generator=generator, dtype=torch.float64) + torch.randn(
            300, 32, generator=generator, dtype=torch.float64
        )
        cka = StreamingCKA()
        for part in range(0, 300, 37):
            cka.update(x[part : part + 37], y[part : part + 37])
        kernels = [(v - v.mean(0)) @ (v - v.mean(0)).T for v in (x, y)]
        kernels = [k.fill_diagonal_(0) for k in kernels]
        n = 300

        def hsic(a: torch.Tensor, b: torch.Tensor, n: int = n) -> torch.Tensor:
            return (a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a.sum(0) @ b.sum(0))

        whole = hsic(*kernels) / (hsic(kernels[0], kernels[0]) * hsic(kernels[1], kernels[1])).sqrt()
        worst = max(worst, abs(cka.value() - float(whole)))
    return worst


def time_rows(trainer: DPOTrainer, callback: DriftCallback, pairs: int) -> list[Row]:
    """An evaluation and a step in turn, as the ratio of 50 steps with an evaluation to 50 steps."""
    callback.evaluate(0, trainer.control, "before")

    def evaluate() -> None:
        callback.evaluate(EVERY, trainer.control, "train")

    def timed(run: Callable[[], Any]) -> Sample:
        return measure(run) if run is evaluate else timed_step(run, epoch=True)

    samples = alternate(evaluate, lambda: trainer, pairs, "evaluation and step", timed)
    note = f"one evaluation takes {sum(a.cpu / b.cpu for a, b in samples) / len(samples):.2f} of a step's CPU time"
    return [
        Row("with_callback_vs_plain", [1 + a.cpu / (EVERY * b.cpu) for a, b in samples], "≤ 1.02", note),
        Row("with_callback_vs_plain_wall", [1 + a.wall / (EVERY * b.wall) for a, b in samples]),
    ]


def memory_row(subject: synthetic.Subject, pairs: int, seed: int) -> Row:
    peaks = [
        {kind: peak_memory(__file__, subject.folder, kind, seed, subject.real) for kind in KINDS} for _ in range(pairs)
    ]
    values = [one["callback"] / one["plain"] for one in peaks]
    return Row("with_callback_vs_plain_peak_memory", values, "≤ 1.01", f"plain {peaks[0]['plain'] / 2**30:.2f} GiB")


def main() -> None:
    made = parser(__doc__, pairs=7)
    synthetic.add_model(made, default="embedded")
    add_memory(made, KINDS)
    arguments = made.parse_args()
    prepare(arguments)
    seed, memory_pairs = arguments.seed, 1 if arguments.quick else arguments.memory_pairs
    with synthetic.subject(arguments, VOCABULARY) as (subject, work):
        real = subject.real and not arguments.made_up_texts
        trainer = make_trainer(subject.folder, f"{work}/run", "plain", True, real, seed)
        if arguments.peak_of:
            if arguments.peak_of == "callback":
                trainer.add_callback(watch(trainer, 2, real, seed))
            print_peak(trainer)
            return
        callback = watch(trainer, EVERY, real, seed)
        rows = [*time_rows(trainer, callback, arguments.pairs), memory_row(subject, memory_pairs, seed)]
    rows.append(Row("streaming_cka_error", [cka_error(seed)], "≤ 1e-6"))
    settings = {
        "model": subject.name, "every": EVERY, "texts": len(callback.battery), "tokens": callback.battery.tokens,
        "hook_points": len(callback.battery.hook_points), "memory_pairs": memory_pairs,
    }  # fmt: skip
    finish("drift", rows, arguments, settings)


if __name__ == "__main__":
    main()
