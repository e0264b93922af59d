"""What is measured of a whole reading, a whole drift evaluation, a whole step and two processes.

In: the sizes of a model. Out: figures by formula and as measured. It must not know tables.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dpo
import synthetic
import torch
from costs import FORMULAS, Model, Shape, collectives, comparison, linear
from elementary import runner
from scaling_pieces import TINY, counted_flops, memory, memory_of, no_mark, pieces, time_against_formula
from steps import StepClock, timed_step
from timing import Row, alternate, measure

import reward
from interp_rlhf import ConceptReward, attach
from interp_rlhf.activations import TokenBatch, read
from interp_rlhf.drift.battery import Battery

EVALUATED = 384  # tokens of a drift evaluation: fewer than dimensions in the largest model
TERMS = ("`ConceptAnchor`", "`FeatureConstraint`", "`DriftPenalty`, subspace")  # of the whole step


def training_memory(trainer: Any) -> int:
    """Highest number of bytes in a step above what there was at its beginning."""

    def run(mark: Callable[[str], None]) -> None:
        clock = StepClock(lambda: mark("begin"))
        clock.on_train_end = lambda *_, **__: None  # type: ignore[method-assign]
        trainer.add_callback(clock)
        trainer.train()
        trainer.remove_callback(clock)

    return memory(run)["peak"]


def summary(values: list[float], seed: int) -> list[float]:
    """Median and 95 % bootstrap interval."""
    row = Row("", values)
    return [row.median, *row.interval(seed)]


def measured_pieces(s: Shape, pairs: int, seed: int) -> dict[str, Any]:
    """Every piece against its formula."""
    found = {}
    for name, formula in FORMULAS.items():
        cost, piece = formula(s), pieces(s, seed)[name]
        wide, narrow = (memory_of(name, replace(s, narrow=narrow), seed) for narrow in (False, True))
        low = formula(replace(s, narrow=True))
        found[name] = {
            "flops": [cost.flops, counted_flops(lambda piece=piece: piece(no_mark))],
            **{key: [getattr(cost, key), wide[key]] for key in ("carried", "held", "peak")},
            **{f"{key}_bf16": [getattr(low, key), narrow[key]] for key in ("carried", "held", "peak")},
            "time": summary(time_against_formula(name, s, pairs, seed), seed),
        }
    return found


def measured_read(shape: Shape, sizes: Model, pairs: int, seed: int) -> dict[str, Any]:
    """`read()` of the middle block against the whole backbone."""
    model = synthetic.make_model(sizes.vocabulary, seed, sizes.blocks, sizes.width, sizes.intermediate)
    rows = torch.randint(
        2, sizes.vocabulary, (shape.rows, shape.length), generator=torch.Generator().manual_seed(seed)
    )
    batch = TokenBatch.from_ids([[]] * shape.rows, rows.tolist())
    middle = sizes.blocks // 2 - 1
    readout = synthetic.make_readout(sizes.width, middle, seed)

    def early() -> None:
        read(model, batch, [readout])

    @torch.no_grad()
    def backbone() -> None:
        model.model(rows, use_cache=False)

    formula = sizes.forward(shape.tokens, shape.length, middle + 1, head=False) + linear(shape).flops
    share = (middle + 1) / sizes.blocks
    return {
        "flops": [formula, counted_flops(early)],
        "time": summary([a.cpu / b.cpu / share for a, b in alternate(early, backbone, pairs, "read")], seed),
        "share": share,
    }


def measured_evaluation(sizes: Model, pairs: int, seed: int) -> dict[str, Any]:
    """The comparison of two snapshots at two hook points, and the forward that makes one."""
    length, count = 65, EVALUATED // 64
    rows = torch.randint(2, sizes.vocabulary, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    points = ["model.layers.1", f"model.layers.{sizes.blocks - 1}"]
    battery = Battery(TokenBatch.from_ids([[]] * count, rows), points)
    before, after = (
        battery.read(synthetic.make_model(sizes.vocabulary, seed + i, sizes.blocks, sizes.width, sizes.intermediate))
        for i in range(2)
    )
    model = synthetic.make_model(sizes.vocabulary, seed, sizes.blocks, sizes.width, sizes.intermediate)
    cost = comparison(battery.tokens, sizes.width, len(points), sizes.vocabulary)
    run = runner(cost.ops)

    def compare(mark: Callable[[str], None] = no_mark) -> None:
        mark("begin")
        battery.compare(before, after)
        mark("carried")

    held = sum(
        value.numel() * value.element_size()
        for side in (before, after)
        for value in (*side.activations.values(), side.log_probs, side.predictions)
    )
    samples = alternate(compare, run, pairs, "evaluation")
    return {
        "flops": [cost.flops, counted_flops(compare)],
        "forward_flops": [sizes.forward(count * length, length), counted_flops(lambda: battery.read(model))],
        "carried": [cost.carried, held],
        "peak": [cost.peak, held + memory(compare)["peak"]],
        "time": summary([a.cpu / b.cpu for a, b in samples], seed),
    }


def measured_step(sizes: Model, pairs: int, seed: int) -> dict[str, Any]:
    """A whole DPO step with three terms over one without any."""
    with tempfile.TemporaryDirectory() as name:
        folder = synthetic.save(
            Path(name) / "model", dpo.VOCABULARY, seed, blocks=sizes.blocks, width=sizes.width, intermediate=sizes.intermediate
        )  # fmt: skip
        plain, terms = (dpo.make_trainer(folder, f"{name}/{v}", v, False, False, seed) for v in ("plain", "terms"))
        batch = plain.data_collator([plain.train_dataset[i] for i in range(len(plain.train_dataset))])
        counted = int(batch["completion_mask"].sum())
        s = Shape(*batch["input_ids"].shape, counted, sizes.width, dpo.LATENTS)
        costs = [FORMULAS[term](s) for term in TERMS]
        flops = [counted_flops(trainer.train) for trainer in (plain, terms)]
        memories = [training_memory(trainer) for trainer in (plain, terms)]
        samples = alternate(lambda: terms, lambda: plain, pairs, "step", lambda make: timed_step(make, epoch=True))
        small = [pieces(TINY, seed)[term] for term in TERMS]
        run = runner([op for cost in costs for op in cost.ops])

        def elementary_parts() -> None:
            run()
            for piece in small:
                piece(no_mark)

        parts = [measure(elementary_parts).cpu for _ in range(pairs + 1)][1:]
        # Policy and its gradient, and the reference; the head runs over completions alone, and once more for its gradient.
        head = 10 * sizes.width * sizes.vocabulary * s.counted
        plain_formula = 4 * sizes.forward(s.tokens, s.length, head=False) + head
        ratio = 1 + Row("", parts).median / Row("", [b.cpu for _, b in samples]).median
        return {
            "tokens": [s.rows, s.length, s.counted],
            "parameters": sizes.parameters,
            "plain_flops": [plain_formula, flops[0]],
            "flops": [1 + sum(cost.flops for cost in costs) / flops[0], flops[1] / flops[0]],
            # The highest point of the step is at the head, where what is carried is there and nothing is held yet.
            "memory": [1 + sum(cost.carried for cost in costs) / memories[0], memories[1] / memories[0]],
            "time": [ratio, *summary([a.cpu / b.cpu for a, b in samples], seed)],
        }


def count_collectives(folder: Path, seed: int) -> None:
    """In one of two processes: prints, per kind of trainer, the bytes per step that this rank gives to collectives."""
    import torch.distributed as dist

    given: Counter[str] = Counter()

    def counting(name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            own = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)][-1]
            given["calls"] += 1
            given["bytes"] += own.numel() * own.element_size()
            return stock(*args, **kwargs)

        return run

    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast"):
        counted = counting(name, getattr(dist, name))
        setattr(dist, name, counted)  # as accelerate and this package call it
        setattr(dist.distributed_c10d, name, counted)  # as collectives of objects do

    def per_step(trainer: Any) -> list[float]:
        found = []
        for steps in (1, 3):
            trainer.args.max_steps = steps
            given.clear()
            trainer.train()
            found.append((given["bytes"], given["calls"]))
        return [(b - a) / 2 for a, b in zip(*found, strict=True)]

    made: dict[str, Any] = {}
    for variant in ("plain", "terms"):
        made[f"DPO, {variant}"] = dpo.make_trainer(folder, f"{folder}/{variant}", variant, False, False, seed)
    readout = synthetic.make_readout(64, 1, seed)
    for variant, function in (("plain", reward.constant_reward), ("reward", ConceptReward(readout))):
        made[f"GRPO, {variant}"] = reward.make_trainer(folder, f"{folder}/g-{variant}", function, 0.02, False, seed)
    attach(made["GRPO, reward"], monitors=[replace(readout, name="watched")])
    found = {name: per_step(trainer) for name, trainer in made.items()}
    if dist.get_rank() == 0:
        kind = type(made["DPO, plain"].model_wrapped).__name__
        print(json.dumps({"engine": kind, "processes": dist.get_world_size(), **found}))


def measured_collectives(script: Path, seed: int) -> dict[str, Any]:
    """Bytes and calls per step and rank: with terms, with a reward and a monitor, and of plain trainers.

    Args:
        script (`Path`): run by both processes with `--count-collectives FOLDER`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = synthetic.save(Path(name) / "model", dpo.VOCABULARY, seed, blocks=2, width=64, intermediate=160)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
        command += ["--seed", str(seed), "--count-collectives", str(folder)]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    found: dict[str, Any] = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    return {**found, "formula": collectives(metrics=9)}
