"""Canaries: token sequences and what a readout gave on them, by which a model shows that it is the one that was read.

In: a model, a hook point and directions. Out: `Canaries` when something is made, and later an `Agreement` of a model with them. A
path, a name or a digest of some weights proves nothing: training at 1e-6 leaves norm weights where they were, adapters can change
the base, and positions are not in any weight. It must not know probes or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .batch import TokenBatch
from .precision import PRECISIONS, coarseness, numbers_of
from .read import read

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

SENTENCES = (
    "A letter from the harbour came late, but nobody on the island had been waiting for it.",
    "Add the numbers in the second column, then divide the sum by four.",
    "I was sorry to hear about your brother, and I hope that he is better soon!",
    "def area(width, height): return width * height  # in square metres",
)
CANARY_TOKENS = 20
DIRECTIONS = 8
# Largest error that is taken for the same model: the root mean square of the difference, in standard deviations of the
# canaries' own scores. Measured on SmolLM2-135M-Instruct, block 20, with the shipped warmth probe: 0 in float32, also in
# another batch; 1.2e-3 after one step of AdamW at 1e-6; 0.017 in bfloat16; 0.028 with weights rounded to 8 bits and 0.46 to 4
# bits.
ALLOWED = {"float32": 1e-3, "16 bits": 0.08, "8 bits": 0.15, "4 bits": 0.5}
# Below this correlation it is not the same model, however coarse its numbers.
RELATED = 0.9


@dataclass(frozen=True)
class Canaries:
    """What a readout gave on some token sequences.

    Attributes:
        ids (`tuple[tuple[int, ...], ...]`): the sequences.
        scores (`tuple[tuple[float, ...], ...]`): per token but the first of each sequence, one after the other, K scores.
        mean_norm (`float`): of the activations of these tokens.
        numbers (`str`): what the weights held: `float32`, or `16 bits` where all of them are numbers of that precision.
        made_in (`str`, defaults to `"float32"`): of the model that they were made on, a key of `ALLOWED`.
    """

    ids: tuple[tuple[int, ...], ...]
    scores: tuple[tuple[float, ...], ...]
    mean_norm: float
    numbers: str
    made_in: str = "float32"

    def entry(self) -> dict[str, Any]:
        """For a header in JSON."""
        return {
            "ids": [list(line) for line in self.ids], "scores": [[float(f"{v:.7g}") for v in row] for row in self.scores],
            "mean_norm": float(f"{self.mean_norm:.7g}"), "numbers": self.numbers,
            **({"made_in": self.made_in} if self.made_in != "float32" else {}),
        }  # fmt: skip

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Canaries | None:
        """What `entry` gave; None of an empty one."""
        if not entry:
            return None
        ids = tuple(tuple(int(token) for token in line) for line in entry["ids"])
        scores = tuple(tuple(float(value) for value in row) for row in entry["scores"])
        made_in = str(entry.get("made_in", "float32"))
        return cls(
            ids, scores, float(entry["mean_norm"]), str(entry["numbers"]), made_in if made_in in ALLOWED else "float32"
        )


@dataclass(frozen=True)
class Agreement:
    """How a model's scores on canaries compare with what they were.

    Attributes:
        error (`float`): root mean square of the difference, in standard deviations of the scores; 0 = the same.
        correlation (`float`): of the two.
        norm_ratio (`float`): mean norm of the activations now over that then.
        precision (`str`): a key of `ALLOWED`: what the coarser of the two models has.
        coarse (`str`): what in the model is coarser than float32; empty where nothing is.
    """

    error: float
    correlation: float
    norm_ratio: float
    precision: str
    coarse: str = ""

    @property
    def agrees(self) -> bool:
        """True if it is the same model, as far as its precision can tell."""
        return self.error <= ALLOWED[self.precision] and self.correlation >= RELATED

    def __str__(self) -> str:
        said = (
            f"scores on its canaries are off by {self.error:.3g} of their standard deviation (correlation "
            f"{self.correlation:.4f}, "
            f"activations {self.norm_ratio:.3f} times as long; allowed in {self.precision}: {ALLOWED[self.precision]:g})"
        )
        if self.agrees:
            return said
        if self.coarse and self.correlation >= RELATED:
            return f"{said}. It may be the same model, less precise ({self.coarse})"
        if self.correlation >= RELATED:
            return f"{said}. It is another model: a related one, trained further, merged, or rounded and saved again"
        return f"{said}. It is another model"


class Projections:
    """Readout of an activation along some directions (K, D): what canaries are read with."""

    def __init__(self, hook_point: str, directions: torch.Tensor):
        self.name = "canaries"
        self.hook_point = hook_point
        self._directions = directions.detach().float()

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        along = activation @ self._directions.to(activation.device).T
        return torch.cat([along, activation.norm(dim=-1, keepdim=True)], dim=-1)


def few(directions: torch.Tensor) -> torch.Tensor:
    """At most `DIRECTIONS` directions that stand for many (N, D): sums with fixed random signs, so that all take part."""
    unit = directions.detach().float().cpu()
    unit = unit / unit.norm(dim=1, keepdim=True).clamp(min=1e-12)
    if len(unit) <= DIRECTIONS:
        return unit
    signs = torch.randint(0, 2, (DIRECTIONS, len(unit)), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    return signs @ unit / len(unit) ** 0.5


def make_canaries(model: nn.Module, tokenizer: Any, hook_point: str, directions: torch.Tensor) -> Canaries:
    """Canaries of directions (K, D) at a hook point, read on a model as its adapters stand.

    Raises:
        `ValueError`: activations that are not finite.
    """
    lines = [list(tokenizer(text=text)["input_ids"])[:CANARY_TOKENS] for text in SENTENCES]
    ids = tuple(tuple(int(token) for token in line) for line in lines if len(line) > 1)
    projections = _projected(model, ids, hook_point, few(directions))
    if not torch.isfinite(projections).all():
        raise ValueError("The model's activations on plain sentences hold NaN or infinity – expected finite numbers.")
    scores = tuple(tuple(row) for row in projections[:, :-1].tolist())
    return Canaries(
        ids, scores, float(projections[:, -1].mean()), numbers_of(model), coarseness(model, adapters=False)[0]
    )


def agreement(model: nn.Module, canaries: Canaries, hook_point: str, directions: torch.Tensor) -> Agreement:
    """How a model agrees with canaries that were made with the same directions; where it is sharded, by all ranks together.

    Raises:
        `ValueError`: its vocabulary lacks their tokens.
    """
    projections = _projected(model, canaries.ids, hook_point, few(directions)).double()
    then = torch.tensor(canaries.scores, dtype=torch.float64)
    spread = then.std(0, correction=0).clamp(min=1e-12)
    now, before = (projections[:, :-1] - then.mean(0)) / spread, (then - then.mean(0)) / spread
    error = float((now - before).pow(2).mean().sqrt())
    correlation = float(torch.corrcoef(torch.stack([now.flatten(), before.flatten()]))[0, 1])
    precision, why = coarseness(model, adapters=False)
    if PRECISIONS.index(canaries.made_in) > PRECISIONS.index(precision):
        precision, why = canaries.made_in, f"its canaries were made in {canaries.made_in}"
    if precision == "float32" and canaries.numbers == "float32" and numbers_of(model) == "16 bits":
        precision, why = "16 bits", "its weights were rounded to 16 bits"
    ratio = float(projections[:, -1].mean()) / max(canaries.mean_norm, 1e-12)
    if not torch.isfinite(projections).all():
        return Agreement(float("inf"), 0.0, ratio, precision, why)
    return Agreement(error, correlation, ratio, precision, why)


def _projected(
    model: nn.Module, ids: Sequence[Sequence[int]], hook_point: str, directions: torch.Tensor
) -> torch.Tensor:
    """Projections and norms (N, K + 1) of all tokens but the first of each sequence."""
    batch = TokenBatch.from_ids([[]] * len(ids), ids)
    scores = read(model, batch, [Projections(hook_point, directions)], reader="canaries")["canaries"]
    return scores.scores[scores.mask]
