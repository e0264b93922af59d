"""What the drift callback costs a real `trl.DPOTrainer` run: one full default evaluation every 50 steps.

The default evaluation: 24 texts, one whole forward, every metric at four layers, the verdict and its line in the run log; no
adaptation. The step is that of `dpo.py` (LoRA, four pairs). A run of 50 steps would take an hour here, so an evaluation and a
step are timed in turn, and the ratio is 1 + evaluation / (50 steps).

  with_callback_vs_plain              CPU time of 50 steps and an evaluation over that of 50 steps
  with_callback_vs_plain_peak_memory  highest resident memory of a process with the start's evaluation, two steps and another
                                      evaluation, over that of two steps
  streaming_cka_error                 largest distance from the batch formula over 20 pairs of matrices
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import synthetic
import torch
from dpo import VOCABULARY, high_water_mark, make_trainer
from steps import timed_step
from timing import Row, alternate, finish, measure, parser, prepare
from transformers.utils import logging as transformers_logging

from interp_rlhf import DriftCallback
from interp_rlhf.drift.metrics import StreamingCKA

EVERY = 50


def peak_memory(folder: Path, watched: bool, seed: int, real: bool) -> float:
    """Highest resident memory in bytes of a fresh process that makes two steps."""
    command = [sys.executable, __file__, "--seed", str(seed), "--peak-of", "callback" if watched else "plain"]
    command += ["--model", str(folder), *([] if real else ["--random"])]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    output = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    return float(json.loads(output.splitlines()[-1]))


def cka_error(seed: int) -> float:
    """Streaming against the formula on whole kernels."""
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


def main() -> None:
    arguments_of = parser(__doc__, pairs=7)
    arguments_of.add_argument("--model", type=Path, help="folder of a real causal LM with a chat template")
    arguments_of.add_argument(
        "--peak-of", choices=("callback", "plain"), help="make two steps and print the peak in bytes"
    )
    arguments_of.add_argument("--random", action="store_true", help="with --peak-of: the model is the random one")
    arguments_of.add_argument(
        "--memory-pairs", type=int, default=3, help="processes of each kind (default: %(default)s)"
    )
    arguments = arguments_of.parse_args()
    prepare(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    seed, real = arguments.seed, arguments.model is not None and not arguments.random
    with tempfile.TemporaryDirectory() as name:
        folder = (
            arguments.model.expanduser() if arguments.model else synthetic.save(Path(name) / "model", VOCABULARY, seed)
        )
        trainer = make_trainer(folder, f"{name}/run", "plain", True, real, seed)
        if arguments.peak_of:
            trainer.args.max_steps = 2
            if arguments.peak_of == "callback":
                trainer.add_callback(DriftCallback(trainer, every=2))
            trainer.train()
            print(json.dumps(high_water_mark()))
            return
        callback = DriftCallback(trainer, every=EVERY)
        callback._evaluate(0, trainer.control, "before")

        def evaluate() -> None:
            callback._evaluate(EVERY, trainer.control, "train")

        samples = alternate(
            evaluate, lambda: trainer, arguments.pairs, "evaluation and step",
            timed=lambda run: measure(run) if run is evaluate else timed_step(run, epoch=True),
        )  # fmt: skip
        note = f"one evaluation takes {sum(a.cpu / b.cpu for a, b in samples) / len(samples):.2f} of a step's CPU time"
        rows = [
            Row("with_callback_vs_plain", [1 + a.cpu / (EVERY * b.cpu) for a, b in samples], "≤ 1.02", note),
            Row("with_callback_vs_plain_wall", [1 + a.wall / (EVERY * b.wall) for a, b in samples]),
        ]
        peaks = {
            watched: [peak_memory(folder, watched, seed, real) for _ in range(arguments.memory_pairs)]
            for watched in (True, False)
        }
        values = [a / b for a, b in zip(peaks[True], peaks[False], strict=True)]
        rows.append(
            Row("with_callback_vs_plain_peak_memory", values, "≤ 1.01", f"plain {peaks[False][0] / 2**30:.2f} GiB")
        )
    rows.append(Row("streaming_cka_error", [cka_error(seed)], "≤ 1e-6"))
    settings = {
        "model": str(arguments.model) if real else f"Llama, {synthetic.BLOCKS} blocks, width {synthetic.WIDTH}, random",
        "every": EVERY, "texts": len(callback.battery), "tokens": callback.battery.tokens,
        "hook_points": len(callback.battery.hook_points), "memory_pairs": arguments.memory_pairs,
    }  # fmt: skip
    finish("drift", rows, arguments, settings)


if __name__ == "__main__":
    main()
