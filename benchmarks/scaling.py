"""What each readout and each term costs by formula, and the formulas against what is counted and measured.

The formulas are those of `costs.py`. They are compared on random Llama-shaped models of three sizes with

  operations  `torch.utils.flop_counter`, exactly;
  memory      every allocation of torch's CPU allocator, from its profiler;
  time        the elementary operations alone at the same shapes, alternating with the piece itself: measured over predicted;
  steps       whole steps of TRL's `DPOTrainer` in full fine-tuning with three terms, over steps without any;
  bytes sent  two gloo processes under DDP, by counting what collectives are given.

Prints the tables of `docs/scaling.md`; `--out` writes their figures. What is said there of 8B and 70B is `at_scale`, from the
same formulas and public shapes: derived, not measured.

  export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000
  python benchmarks/scaling.py --out benchmarks/scaling.json
"""

from __future__ import annotations

import argparse
import json
import math
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
from costs import FORMULAS, PUBLIC, Model, Op, Shape, at_scale, collectives, comparison, linear
from steps import StepClock, timed_step
from timing import Row, Sample, alternate, machine, measure, parser, prepare
from torch.nn.functional import linear as linear_map
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import reward
from interp_rlhf import (
    ConceptAnchor,
    ConceptReward,
    DriftPenalty,
    FeatureConstraint,
    Latents,
    Subspace,
    attach,
)
from interp_rlhf.activations import TokenBatch, read
from interp_rlhf.activations.tap import run_readouts
from interp_rlhf.concepts.readout import Readout
from interp_rlhf.drift.battery import Battery
from interp_rlhf.training.terms.batch import TermBatch
from interp_rlhf.training.terms.pairs import Pairs
from interp_rlhf.training.terms.term import LossTerm

POINT = "model.layers.1"
# Width, blocks and intermediate width of the three models; latents are 16 per dimension.
SIZES = ((128, 4, 352), (256, 6, 704), (512, 8, 1376))
# An activation is then larger than the cache of a core, as it is in training.
VOCABULARY, ROWS, LENGTH, COUNTED = 4096, 8, 1024, 2048
EVALUATED = 384  # tokens of a drift evaluation: fewer than dimensions in the largest model
# Next to nothing: what a piece takes on it is its fixed cost.
TINY = Shape(2, 2, 2, 8, 64, 2, 2, 2)
TERMS = ("`ConceptAnchor`", "`FeatureConstraint`", "`DriftPenalty`, subspace")  # of the whole step
SECONDS = 0.05  # a shorter run is repeated


# ------------------------------------------------------------------------------------------------------- pieces, as they run


def no_mark(name: str) -> None:
    """Where nobody measures memory."""


# Runs a piece once on new activations; `mark` says where it is.
Piece = Callable[[Callable[[str], None]], None]


def pieces(s: Shape, seed: int) -> dict[str, Piece]:
    """Every piece by the package's own code, on random activations and readouts."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    policy, start, gradient = (normal(s.rows, s.length, s.width) for _ in range(3))
    if s.narrow:
        policy, start, gradient = (values.bfloat16() for values in (policy, start, gradient))
    policy.requires_grad_()
    mask = torch.zeros(s.rows, s.length, dtype=torch.bool)
    mask[:, -(s.counted // s.rows) :] = True
    inputs = {"input_ids": torch.zeros(s.rows, s.length, dtype=torch.long), "completion_mask": mask}
    encoder, bias = normal(s.latents, s.width) / s.width**0.5, torch.zeros(s.latents)
    direction, weight = normal(s.width) / s.width**0.5, normal(s.chosen)
    span = Subspace.spanned_by(POINT, normal(s.rank, s.width))
    chosen = range(0, s.latents, s.latents // s.chosen)
    before = normal(s.rows)
    pair = Pairs(normal(s.rows), before, torch.ones(s.rows), 0.1, [("sigmoid", 1.0)], before)

    def reading(readout: Any) -> Piece:
        def run(mark: Callable[[str], None]) -> None:
            scores: dict[str, torch.Tensor] = {}
            mark("begin")
            run_readouts([readout], start, scores)
            mark("carried")
            mark("held")

        return run

    def of(**kind: Any) -> Piece:
        latents = Latents("latents", POINT, encoder, bias, **kind).choose(chosen)
        return reading(Readout("latents", POINT, weight, latents=latents))

    def term(made: LossTerm) -> Piece:
        def run(mark: Callable[[str], None]) -> None:
            policy.grad = None
            scores: dict[str, torch.Tensor] = {}
            # As a forward makes it, and forgets it.
            reference = start if mark is no_mark else start.clone()
            mark("begin")
            run_readouts(made.reference_readouts, reference, scores)
            del reference
            mark("carried")
            batch = TermBatch(
                inputs, set(), {POINT: policy}, {r: scores[r.name] for r in made.reference_readouts}, pair
            )
            values = made.compute(batch, made.weight).values
            del batch
            mark("held")
            scores.clear()
            values.sum().backward()

        return run

    def ablating(mark: Callable[[str], None]) -> None:
        policy.grad = None
        mark("begin")
        mark("carried")
        changed = span.ablate(policy)
        mark("held")
        changed.backward(gradient)

    return {
        "linear readout": reading(Readout("linear", POINT, direction)),
        "latents by column, ReLU": of(),
        "latents by column, JumpReLU": of(threshold=bias.abs()),
        "latents of a TopK SAE": of(k=s.on),
        "`ConceptAnchor`": term(ConceptAnchor(readout=Readout("linear", POINT, direction), weight=0.1)),
        "`DriftPenalty`, subspace": term(DriftPenalty(subspace=span, weight=0.1)),
        "`DriftPenalty`, hook point": term(DriftPenalty(hook_point=POINT, weight=0.1)),
        "`FeatureConstraint`": term(FeatureConstraint(readout=Latents("latents", POINT, encoder, bias))),
        "`ConceptAblation`": ablating,
    }


# ------------------------------------------------------------------------------------------------------- counting, measuring


def counted_flops(run: Callable[[], Any]) -> int:
    """Operations of matrix products, as torch counts them; so are a product with a vector and the CPU's attention, which it
    does not know."""

    def product(a: Any, b: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(a)

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return 2 * sdpa_flop_count(query, key, value)

    aten = torch.ops.aten
    known = {
        aten.mv: product,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    counter = FlopCounterMode(display=False, custom_mapping=known)
    with counter:
        run()
    return int(counter.get_total_flops())


def memory(run: Piece, freed: int = 0) -> dict[str, int]:
    """Bytes above what there is at `begin`: at `carried`, at `held`, and at most.

    Args:
        freed (`int`): of what is there at `begin`, so many bytes are let go before `carried` where nobody keeps them.
    """

    def mark(name: str) -> None:
        with record_function(f"mark {name}"):
            pass

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run(mark)
    level, base, peak, loss = 0, 0, 0, False
    found: dict[str, int] = {}
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "mark begin":
            base = peak = level
        elif event.name().startswith("mark "):
            base -= freed if not loss else 0
            peak -= freed if not loss else 0
            loss = True
            found[event.name().removeprefix("mark ")] = level - base
        elif event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return {**found, "peak": peak - base}


def elementary(op: Op) -> Callable[[], Any]:
    """The operation alone, on tensors of its own."""
    z = op.sizes
    double = torch.float64 if op.kind.endswith("64") else torch.float32
    if op.kind in ("product", "product64"):
        left, right = torch.randn(z[:2], dtype=double), torch.randn(z[2], z[1], dtype=double).T
        return (lambda: left.mv(right[:, 0])) if z[2] == 1 else (lambda: left @ right)
    if op.kind == "affine":
        inputs, rows, bias = torch.randn(z[:2]), torch.randn(z[2], z[1]), torch.randn(z[2])
        return lambda: linear_map(inputs, rows, bias)
    if op.kind == "mark":
        indices = torch.randn(z[:2]).topk(z[2]).indices
        return lambda: torch.zeros(z[:2], dtype=torch.bool).scatter_(1, indices, True)
    if op.kind == "threshold":
        values, limits = torch.randn(z), torch.zeros(z[1])
        return lambda: values.mul_(values > limits)
    if op.kind in ("point", "point64"):
        values = torch.randn(z, dtype=double)
        return lambda: values * 2
    if op.kind == "pair":
        values, others = torch.randn(z), torch.randn(z)
        return lambda: values - others
    if op.kind == "count":
        of = torch.arange(z[0]) // 128
        return lambda: torch.bincount(of)
    if op.kind in ("gather", "scatter"):
        rows, length, counted, width = z
        values, found = torch.randn(rows, length, width), torch.randn(counted, width)
        mask = (torch.arange(rows * length) >= rows * length - counted).view(rows, length)
        if op.kind == "gather":
            return lambda: values[mask]
        return lambda: torch.zeros(rows, length, width).index_put_((mask,), found, accumulate=True)
    if op.kind in ("reduce", "spread"):
        rows, counted, width = z
        of = torch.arange(counted) * rows // counted
        if op.kind == "spread":
            source = torch.randn(rows, width)
            return lambda: source.index_select(0, of)
        values = torch.randn(counted, width)
        return lambda: torch.zeros(rows, width).index_add(0, of, values)
    if op.kind == "outer":
        column, row = torch.randn(z[0], 1), torch.randn(z[1])
        return lambda: column * row
    if op.kind == "sum":
        values = torch.randn(z)
        return lambda: values.sum(-1)
    if op.kind == "topk":
        values = torch.randn(z[:2])
        return lambda: values.topk(z[2], dim=-1, sorted=False)
    if op.kind == "svd64":
        values = torch.randn(z, dtype=double)
        return lambda: torch.linalg.svdvals(values)
    assert op.kind == "qr64", op.kind
    values = torch.randn(z, dtype=double)
    return lambda: torch.linalg.qr(values, mode="r")


def runner(ops: list[Op]) -> Callable[[], None]:
    """Runs elementary operations one after the other; a result lives until the next one is there."""
    runs = [elementary(op) for op in ops for _ in range(round(op.times))]

    def run() -> None:
        result = None
        for operation in runs:
            result = operation()
        del result

    return run


def time_against_formula(name: str, s: Shape, pairs: int, seed: int) -> list[float]:
    """Measured over predicted CPU time of a piece. Predicted: its elementary operations, and what it costs whatever the sizes,
    which is the piece on next to nothing less the elementary operations of that. It runs after the former, and so finds the
    caches as they leave them, as the piece's own Python does."""
    piece, small = pieces(s, seed)[name], pieces(TINY, seed)[name]
    operations, fewest = runner(FORMULAS[name](s).ops), runner(FORMULAS[name](TINY).ops)

    def run() -> None:
        piece(no_mark)

    def parts() -> None:
        operations()
        small(no_mark)

    repeats = max(1, round(SECONDS / min(measure(run).cpu for _ in range(3))))

    def timed(function: Callable[[], Any]) -> Sample:
        def several(one: Callable[[], Any]) -> Sample:
            return measure(lambda: [one() for _ in range(repeats)])

        if function is run:
            return several(run)
        a, b = several(parts), several(fewest)
        return Sample(a.cpu - b.cpu, a.wall - b.wall)

    return [a.cpu / b.cpu for a, b in alternate(run, parts, pairs, f"{name}, {s.width}", timed)]


def memory_of(name: str, s: Shape, seed: int) -> dict[str, int]:
    """Bytes of a piece, after a first run that is not counted."""
    piece = pieces(s, seed)[name]
    piece(no_mark)
    is_term = bool(FORMULAS[name](s).carried) and name.startswith("`")
    return memory(piece, (2 if s.narrow else 4) * s.tokens * s.width if is_term else 0)


def training_memory(trainer: Any) -> int:
    """Highest number of bytes in a step above what there was at its beginning."""

    def run(mark: Callable[[str], None]) -> None:
        clock = StepClock(lambda: mark("begin"))
        clock.on_train_end = lambda *_, **__: None  # type: ignore[method-assign]
        trainer.add_callback(clock)
        trainer.train()
        trainer.remove_callback(clock)

    return memory(run)["peak"]


# ---------------------------------------------------------------------------------------------------------------- the tables


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


def measured_collectives(seed: int) -> dict[str, Any]:
    """Bytes and calls per step and rank, with terms and with a reward and a monitor, beside plain trainers."""
    with tempfile.TemporaryDirectory() as name:
        folder = synthetic.save(Path(name) / "model", dpo.VOCABULARY, seed, blocks=2, width=64, intermediate=160)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        command += ["--seed", str(seed), "--count-collectives", str(folder)]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    found: dict[str, Any] = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    return {**found, "formula": collectives(metrics=9)}


def main() -> None:
    arguments = parser(__doc__, pairs=7)
    arguments.add_argument("--out", type=Path, help="write the figures here")
    arguments.add_argument("--count-collectives", type=Path, help=argparse.SUPPRESS)  # in a process of two
    arguments = arguments.parse_args()
    prepare(arguments)
    if arguments.count_collectives is not None:
        count_collectives(arguments.count_collectives, arguments.seed)
        return
    found: dict[str, Any] = {
        "settings": {
            "rows": ROWS, "length": LENGTH, "counted": COUNTED, "latents_per_dimension": 16, "evaluated": EVALUATED,
            "pairs": arguments.pairs, "seed": arguments.seed, **machine(),
        },
        "sizes": {},
        "collectives": measured_collectives(arguments.seed),
        "derived": {name: at_scale(name) for name in PUBLIC},
    }  # fmt: skip
    for width, blocks, intermediate in SIZES:
        sizes = Model(width, blocks, intermediate, width, VOCABULARY)
        s = Shape(ROWS, LENGTH, COUNTED, width, 16 * width)
        found["sizes"][str(width)] = {
            "blocks": blocks, "parameters": sizes.parameters,
            "pieces": measured_pieces(s, arguments.pairs, arguments.seed),
            "read": measured_read(s, sizes, arguments.pairs, arguments.seed),
            "evaluation": measured_evaluation(sizes, arguments.pairs, arguments.seed),
            "step": measured_step(replace(sizes, vocabulary=dpo.VOCABULARY), arguments.pairs, arguments.seed),
        }  # fmt: skip
    for table in tables(found):
        print(f"\n{table}")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def agreement(found: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Measured over formula by name and width: times, and operations and memory."""
    times: dict[str, float] = {}
    others: dict[str, float] = {}
    for width, size in found["sizes"].items():
        parts = {**size["pieces"], "`read()`": size["read"], "drift comparison": size["evaluation"]}
        for name, figures in parts.items():
            times[f"{name}, {width}"] = figures["time"][0]
            for key, pair in figures.items():
                if key not in ("time", "share") and pair[0]:
                    others[f"{name}, {width}, {key}"] = pair[1] / pair[0]
        step = size["step"]
        times[f"step, {width}"] = step["time"][1] / step["time"][0]
        for key in ("plain_flops", "flops", "memory"):
            others[f"step, {width}, {key}"] = step[key][1] / step[key][0]
    return times, others


def tables(found: dict[str, Any]) -> list[str]:
    """The tables of the document, from the figures."""
    return [pieces_table(found), others_table(found), steps_table(found), derived_table(found)]


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def over(pair: list[float]) -> str:
    """Measured over formula."""
    formula, measured = pair
    return f"{measured / formula:.2f}" if formula else "–"


def interval(values: list[float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*values)


def bytes_(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError


def pieces_table(found: dict[str, Any]) -> str:
    rows = []
    for name in FORMULAS:
        for width, size in found["sizes"].items():
            piece = size["pieces"][name]
            memories = [over(piece[key]) for key in ("carried", "held", "peak", "peak_bf16")]
            rows.append([name, width, over(piece["flops"]), *memories, interval(piece["time"])])
    return table(["piece", "D", "operations", "carried", "held", "peak", "peak, bf16", "time [95 %]"], rows)


def others_table(found: dict[str, Any]) -> str:
    rows = []
    for width, size in found["sizes"].items():
        early, drift = size["read"], size["evaluation"]
        half = f"`read()` of {early['share']:.0%} of the blocks"
        rows.append([half, width, over(early["flops"]), "–", "–", interval(early["time"])])
        rows.append(["drift: forward", width, over(drift["forward_flops"]), "–", "–", "–"])
        figures = [over(drift[key]) for key in ("flops", "carried", "peak")]
        rows.append(["drift: comparison", width, *figures, interval(drift["time"])])
    return table(["piece", "D", "operations", "carried", "peak", "time [95 %]"], rows)


def steps_table(found: dict[str, Any]) -> str:
    rows = []
    for width, size in found["sizes"].items():
        step = size["step"]
        pairs = [f"{step[key][0]:.3f} / {step[key][1]:.3f}" for key in ("flops", "memory")]
        predicted, *measured = step["time"]
        time = "{:.3f} / {:.3f} [{:.3f}, {:.3f}]".format(predicted, *measured)
        rows.append([width, f"{step['parameters'] / 1e6:.1f} M", *pairs, time])
    return table(["D", "parameters", "operations", "peak memory", "time [95 %]"], rows)


def derived_table(found: dict[str, Any]) -> str:
    rows = []
    for name, sizes in found["derived"].items():
        for piece, cost in sizes["pieces"].items():
            rows.append(
                [
                    name,
                    piece,
                    f"{cost['flops_share']:.2g}",
                    *(bytes_(cost[key]) for key in ("carried", "held", "peak")),
                ]
            )
    return table(["model", "piece", "share of operations", "carried", "held", "peak"], rows)


if __name__ == "__main__":
    main()
