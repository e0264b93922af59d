"""Every readout and term as the package runs it, on random activations: its operations, its bytes and its time.

In: a shape and a seed. Out: what a piece costs when it runs, on next to nothing or at full size. It must not know tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from costs import FORMULAS, Shape
from elementary import runner
from timing import Sample, alternate, measure
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from interp_rlhf import ConceptAnchor, DriftPenalty, FeatureConstraint, Latents, Subspace
from interp_rlhf.activations.tap import run_readouts
from interp_rlhf.concepts.readout import Readout
from interp_rlhf.training.terms.batch import TermBatch
from interp_rlhf.training.terms.pairs import Pairs
from interp_rlhf.training.terms.term import LossTerm

POINT = "model.layers.1"
# Next to nothing: the time of a piece on this shape is its fixed cost.
TINY = Shape(2, 2, 2, 8, 64, 2, 2, 2)
SECONDS = 0.05  # a shorter run is repeated


# Tells a measurement where a piece is: `begin`, `carried` or `held`.
Mark = Callable[[str], None]
# Runs a piece once on new activations.
Piece = Callable[[Mark], None]


def no_mark(name: str) -> None:
    """The mark for runs whose memory is not measured."""


class Data:
    """Random activations of the policy and of the start, and what a batch of a trainer has."""

    def __init__(self, s: Shape, draw: Callable[..., torch.Tensor]):
        values = [draw(s.rows, s.length, s.width) for _ in range(3)]
        self.policy, self.start, self.gradient = [value.bfloat16() for value in values] if s.narrow else values
        self.policy.requires_grad_()
        mask = torch.zeros(s.rows, s.length, dtype=torch.bool)
        mask[:, -(s.counted // s.rows) :] = True
        self.inputs = {"input_ids": torch.zeros(s.rows, s.length, dtype=torch.long), "completion_mask": mask}
        before = draw(s.rows)
        self.pairs = Pairs(draw(s.rows), before, torch.ones(s.rows), 0.1, [("sigmoid", 1.0)], before)


def reading(data: Data, readout: Any) -> Piece:
    def run(mark: Mark) -> None:
        scores: dict[str, torch.Tensor] = {}
        mark("begin")
        run_readouts([readout], data.start, scores)
        mark("carried")
        mark("held")

    return run


def term_in_the_loss(data: Data, term: LossTerm) -> Piece:
    def run(mark: Mark) -> None:
        data.policy.grad = None
        scores: dict[str, torch.Tensor] = {}
        # A forward makes this activation and frees it again.
        reference = data.start if mark is no_mark else data.start.clone()
        mark("begin")
        run_readouts(term.reference_readouts, reference, scores)
        del reference
        mark("carried")
        references = {readout: scores[readout.name] for readout in term.reference_readouts}
        batch = TermBatch(data.inputs, set(), {POINT: data.policy}, references, data.pairs)
        del references
        values = term.compute(batch, term.weight).values
        del batch
        mark("held")
        scores.clear()
        values.sum().backward()

    return run


def ablation(data: Data, span: Subspace) -> Piece:
    def run(mark: Mark) -> None:
        data.policy.grad = None
        mark("begin")
        mark("carried")
        changed = span.ablate(data.policy)
        mark("held")
        changed.backward(data.gradient)

    return run


def pieces(s: Shape, seed: int) -> dict[str, Piece]:
    """Every piece by the package's own code, on random activations and readouts."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    data = Data(s, normal)
    encoder, bias = normal(s.latents, s.width) / s.width**0.5, torch.zeros(s.latents)
    linear, weight = Readout("linear", POINT, normal(s.width) / s.width**0.5), normal(s.chosen)
    span = Subspace.spanned_by(POINT, normal(s.rank, s.width))
    chosen = range(0, s.latents, s.latents // s.chosen)

    def some_latents(**kind: Any) -> Piece:
        latents = Latents("latents", POINT, encoder, bias, **kind).choose(chosen)
        return reading(data, Readout("latents", POINT, weight, latents=latents))

    def term(made: LossTerm) -> Piece:
        return term_in_the_loss(data, made)

    return {
        "linear readout": reading(data, linear),
        "latents by column, ReLU": some_latents(),
        "latents by column, JumpReLU": some_latents(threshold=bias.abs()),
        "latents of a TopK SAE": some_latents(k=s.on),
        "`ConceptAnchor`": term(ConceptAnchor(readout=linear, weight=0.1)),
        "`DriftPenalty`, subspace": term(DriftPenalty(subspace=span, weight=0.1)),
        "`DriftPenalty`, hook point": term(DriftPenalty(hook_point=POINT, weight=0.1)),
        "`FeatureConstraint`": term(FeatureConstraint(readout=Latents("latents", POINT, encoder, bias))),
        "`ConceptAblation`": ablation(data, span),
    }


def counted_flops(run: Callable[[], Any]) -> int:
    """Operations of matrix products, as torch counts them, with two that it does not know: a product with a vector, and the
    CPU's attention."""

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
        freed (`int`): bytes that are there at `begin` and that the piece frees before `carried` unless something keeps them.
    """

    def mark(name: str) -> None:
        with record_function(f"mark {name}"):
            pass

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run(mark)
    level, base, peak, loss = 0, 0, 0, False
    levels: dict[str, int] = {}
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "mark begin":
            base = peak = level
        elif event.name().startswith("mark "):
            base -= freed if not loss else 0
            peak -= freed if not loss else 0
            loss = True
            levels[event.name().removeprefix("mark ")] = level - base
        elif event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return {**levels, "peak": peak - base}


def time_against_formula(name: str, s: Shape, pairs: int, seed: int) -> list[float]:
    """Measured over predicted CPU time of a piece.

    The prediction is the time of its elementary operations plus its fixed cost. The fixed cost is the time of the piece on next
    to nothing less that of the elementary operations there. It is measured right after the elementary operations, because the
    piece's Python finds the caches as these leave them.
    """
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
