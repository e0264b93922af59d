"""What each readout and each term costs, as formulas of the shapes alone.

In: the sizes of a model and of a batch. Out: operations of matrix products, bytes at three points of a step, and the elementary
operations that time goes to. It runs nothing; `scaling.py` holds the formulas against what is counted and measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from interp_rlhf.concepts.latents import BLOCK_NUMBERS, BLOCK_TOKENS, MASKED_NUMBERS, MASKED_ROWS

# Public shapes: width, blocks, intermediate width, key-value width, vocabulary.
PUBLIC = {"8B": (4096, 32, 14336, 1024, 128256), "70B": (8192, 80, 28672, 1024, 128256)}


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama: width D, blocks L, intermediate I, key-value width, vocabulary V."""

    width: int
    blocks: int
    intermediate: int
    kv_width: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """All of them, with untied embeddings."""
        return self.blocks * self.block + 2 * self.vocabulary * self.width + self.width

    @property
    def block(self) -> int:
        """Of one block: attention, MLP and two norms."""
        d = self.width
        return 2 * d * d + 2 * d * self.kv_width + 3 * d * self.intermediate + 2 * d

    def forward(self, tokens: int, length: int, blocks: int | None = None, head: bool = True) -> int:
        """Operations of a forward: 2 per token and parameter that multiplies, and 4 T D per token and block for attention."""
        d = self.width
        products = 2 * d * d + 2 * d * self.kv_width + 3 * d * self.intermediate
        per_token = (self.blocks if blocks is None else blocks) * (2 * products + 4 * length * d)
        return tokens * (per_token + (2 * d * self.vocabulary if head else 0))


@dataclass(frozen=True)
class Shape:
    """B rows of T tokens, N of them counted; width D; S latents, K of them chosen, k on at once; a subspace of R dimensions.

    `narrow`: the model's activations are of 2 bytes, not 4; readouts and terms compute in float32 all the same.
    """

    rows: int
    length: int
    counted: int
    width: int
    latents: int
    chosen: int = 8
    on: int = 32
    rank: int = 8
    narrow: bool = False

    @property
    def copy(self) -> int:
        """Bytes of an activation's copy in float32, while it is read."""
        return 4 * self.tokens * self.width if self.narrow else 0

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def block(self) -> int:
        """Tokens that are looked at together where all latents are needed."""
        return min(self.tokens, max(BLOCK_TOKENS, BLOCK_NUMBERS // self.latents))


class Op(NamedTuple):
    """`times` elementary operations of one kind and size."""

    kind: str
    sizes: tuple[int, ...]
    times: float = 1


PRODUCTS = ("product", "affine", "product64")


@dataclass(frozen=True)
class Cost:
    """What a piece costs per batch: bytes, in float32, and elementary operations.

    Attributes:
        carried (`int`): from the reference's pass to the loss; of a reward or monitor, to whoever asks.
        held (`int`): from the loss to its gradient, with what is carried.
        peak (`int`): at once, with both.
    """

    carried: int
    held: int
    peak: int
    ops: list[Op] = field(default_factory=list)

    @property
    def flops(self) -> int:
        """Multiplications and additions of matrix products."""
        return round(sum(2 * math.prod(op.sizes) * op.times for op in self.ops if op.kind in PRODUCTS))


def linear(s: Shape) -> Cost:
    n = s.tokens
    return Cost(4 * n, 4 * n, s.copy + 8 * n, [Op("product", (n, s.width, 1)), Op("point", (n,))])


def columns(s: Shape, jump: bool = False) -> Cost:
    n, k = s.tokens, s.chosen
    on = Op("threshold", (n, k)) if jump else Op("point", (n * k,))
    ops = [Op("affine", (n, s.width, k)), on, Op("product", (n, k, 1)), Op("point", (n,))]
    masked = 5 * min(n * k, max(MASKED_ROWS * k, MASKED_NUMBERS)) if jump else 0  # the mask, and its copy in float32
    return Cost(4 * n, 4 * n, s.copy + 4 * n * k + max(8 * n, masked), ops)


def topk(s: Shape) -> Cost:
    n, k, block = s.tokens, s.chosen, s.block
    blocks = n / block
    ops = [
        Op("affine", (n, s.width, k)), Op("affine", (block, s.width, s.latents), blocks), Op("product", (n, k, 1)),
        Op("topk", (block, s.latents, s.on), blocks), Op("mark", (block, s.latents, s.on), blocks), Op("point", (n * k,), 3),
    ]  # fmt: skip
    peak = s.copy + 9 * n * k + 5 * block * s.latents + 16 * block * s.on
    return Cost(4 * n, 4 * n, peak, ops)


def counting(s: Shape, width: int, means: int = 1) -> list[Op]:
    """What every term does besides its arithmetic: it finds each token's sequence, picks reference scores and takes means."""
    n = s.counted
    return [
        Op("gather", (s.rows, s.length, n, 1)), Op("gather", (s.rows, s.length, n, width)),
        Op("reduce", (s.rows, n, 1), means), Op("count", (n,), means),
    ]  # fmt: skip


def chosen_tokens(s: Shape) -> tuple[Op, Op]:
    """The choice of the counted tokens' activations, and its gradient."""
    return tuple(Op(kind, (s.rows, s.length, s.counted, s.width)) for kind in ("gather", "scatter"))  # type: ignore[return-value]


def anchor(s: Shape) -> Cost:
    n, all_, d = s.counted, s.tokens, s.width
    choice, back = chosen_tokens(s)
    ops = [
        *linear(s).ops, *counting(s, 1, 2), choice, Op("product", (n, d, 1)), Op("outer", (n, d)), back,
    ]  # fmt: skip
    # The gradient at the hook point has the model's precision.
    backward = max(6 * n * d, 2 * (all_ + n) * d) if s.narrow else 4 * (all_ + n) * d
    return Cost(4 * all_, 4 * all_ + 16 * n, max(s.copy + 8 * all_, 4 * all_ + 16 * n + backward), ops)


def subspace(s: Shape) -> Cost:
    n, all_, d, r = s.counted, s.tokens, s.width, s.rank
    choice, back = chosen_tokens(s)
    ops = [
        Op("product", (all_, d, r)), Op("point", (all_ * d,)), Op("sum", (all_, d)), *counting(s, r + 1),
        choice, Op("product", (n, d, r)), Op("point", (n * r,), 5), Op("product", (n, r, d)), back,
    ]  # fmt: skip
    carried = 4 * all_ * (r + 1)
    peak = max(carried + s.copy + 4 * all_ * d, 16 * n + 4 * (all_ + n) * d)
    return Cost(carried, carried + 4 * n * r + 16 * n, peak, ops)


def whole(s: Shape) -> Cost:
    n, all_, d = s.counted, s.tokens, s.width
    choice, back = chosen_tokens(s)
    ops = [
        *counting(s, d), choice, Op("pair", (n * d,), 2), Op("point", (n * d,), 4), Op("sum", (n, d), 2), back,
    ]  # fmt: skip
    carried = 4 * all_ * d
    return Cost(carried, carried + 4 * n * d + 16 * n, carried + 16 * n * (d + 1), ops)


def constraint(s: Shape) -> Cost:
    """Of more latents than dimensions: the activation is carried. Latents of more tokens than a block are made block by block,
    and again for the gradient."""
    n, all_, d, size = s.counted, s.tokens, s.width, s.latents
    choice, back = chosen_tokens(s)
    block = min(n, s.block)
    blocks = n / block
    made = 2 if block == n else 3
    ops = [
        *counting(s, d), choice, Op("affine", (block, d, size), made * blocks), Op("point", (block * size,), made * blocks),
        Op("reduce", (s.rows, block, size), made * blocks), Op("point", (s.rows * size,), 12),
        Op("topk", (s.rows, size, 32), 2), Op("spread", (s.rows, block, size), blocks), Op("pair", (block * size,), blocks),
        Op("product", (block, size, d), blocks), back,
    ]  # fmt: skip
    carried, back_again = 4 * all_ * d, 4 * (all_ + n) * d
    if block == n:
        held = carried + 4 * n * size + 8 * n + 5 * s.rows * size
        return Cost(carried, held, max(carried + 8 * n * (size + d), 12 * n * size, back_again), ops)
    held = carried + 4 * n * d + 8 * n + 5 * s.rows * size
    reading = carried + 8 * n * d + 4 * block * size + 12 * s.rows * size
    return Cost(carried, held, max(reading, 12 * block * size + 4 * (2 * n - block) * d, back_again), ops)


def ablation(s: Shape) -> Cost:
    n, d, r = s.tokens, s.width, s.rank
    ops = [
        Op("product", (n, d, r), 2), Op("product", (n, r, d), 2), Op("point", (n * d,)), Op("pair", (n * d,), 2),
    ]  # fmt: skip
    return Cost(0, (2 if s.narrow else 4) * n * d, 12 * n * d, ops)


def comparison(n: int, d: int, points: int, vocabulary: int, predictions: int = 64) -> Cost:
    """`Battery.compare` of two snapshots of N tokens at some hook points, in float64; carried are both snapshots."""
    small = min(n, d)
    ops = [Op("svd64", (small, small), points), Op("svd64", (n, d), points), Op("point64", (n * d,), 40 * points)]
    if n >= d:
        ops += [Op("product64", (d, n, d), 4 * points)]
    else:
        ops += [
            Op("product64", (n, d, n), 2 * points), Op("product64", (n, n, n), points), Op("qr64", (d, n), 2 * points),
            Op("point64", (n * n,), 12 * points),
        ]  # fmt: skip
    snapshots = 2 * 4 * (points * n * d + n + predictions * vocabulary)
    return Cost(snapshots, snapshots, snapshots + max(48 * n * d, 12 * predictions * vocabulary), ops)


# Names with backticks have a gradient.
FORMULAS: dict[str, Callable[[Shape], Cost]] = {
    "linear readout": linear,
    "latents by column, ReLU": columns,
    "latents by column, JumpReLU": lambda s: columns(s, jump=True),
    "latents of a TopK SAE": topk,
    "`ConceptAnchor`": anchor,
    "`DriftPenalty`, subspace": subspace,
    "`DriftPenalty`, hook point": whole,
    "`FeatureConstraint`": constraint,
    "`ConceptAblation`": ablation,
}


def collectives(metrics: int, micro_batches: int = 1) -> int:
    """Bytes that each rank sums with the others in an optimizer step with terms: the number of sequences once, and per
    micro-batch a sum and a count for each metric."""
    return 8 + 8 * metrics * micro_batches


def at_scale(name: str) -> dict[str, Any]:
    """By the formulas alone: 8 rows of 2,048 tokens per process, half of them counted, in bfloat16."""
    sizes = Model(*PUBLIC[name])
    s = Shape(8, 2048, 8192, sizes.width, 16 * sizes.width, on=64, narrow=True)
    forward = sizes.forward(s.tokens, s.length)
    found: dict[str, Any] = {"parameters": sizes.parameters, "latents": s.latents, "pieces": {}}
    for key, formula in FORMULAS.items():
        cost = formula(s)
        # A readout is compared with one scoring pass, a term with a DPO step: policy, its gradient (4 N) and reference.
        base = 4 if key.startswith("`") else 1
        found["pieces"][key] = {
            "flops_share": cost.flops / (base * forward),
            **{field: getattr(cost, field) for field in ("carried", "held", "peak")},
        }
    found["gathered_per_forward"] = 2 * sizes.parameters
    found["snapshots"] = comparison(2048, sizes.width, 4, sizes.vocabulary).carried
    return found
