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
from .hook_points import READABLE, adapter_parts, device_of, unwrap
from .read import read
from .sharding import is_sharded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

TEXTS = (
    "A letter from the harbour came late, but nobody on the island had been waiting for it.",
    "Add the numbers in the second column, then divide the sum by four.",
    "I was sorry to hear about your brother, and I hope that he is better soon!",
    "def area(width, height): return width * height  # in square metres",
)
LENGTH = 20
COLUMNS = 8
# Largest error that is taken for the same model: the root mean square of the difference, in standard deviations of the
# canaries' own scores. Measured on SmolLM2-135M-Instruct, block 20, with the shipped warmth probe: 0 in float32, also in
# another batch; 1.2e-3 after one step of AdamW at 1e-6; 0.017 in bfloat16; 0.028 with weights rounded to 8 bits and 0.46 to 4
# bits.
ALLOWED = {"float32": 1e-3, "16 bits": 0.08, "8 bits": 0.15, "4 bits": 0.5}
# In the names of files that define quantized modules.
_QUANTIZED = (
    "aqlm",
    "awq",
    "bitnet",
    "eetq",
    "fbgemm",
    "finegrained_fp8",
    "gptq",
    "hqq",
    "mxfp4",
    "quant",
    "spqr",
    "vptq",
)
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
        """Whether it is the same model, as far as its precision can tell."""
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
    """At most `COLUMNS` directions that stand for many (N, D): sums with signs drawn once and for all, so that all take part."""
    unit = directions.detach().float().cpu()
    unit = unit / unit.norm(dim=1, keepdim=True).clamp(min=1e-12)
    if len(unit) <= COLUMNS:
        return unit
    signs = torch.randint(0, 2, (COLUMNS, len(unit)), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    return signs @ unit / len(unit) ** 0.5


def make_canaries(model: nn.Module, tokenizer: Any, hook_point: str, directions: torch.Tensor) -> Canaries:
    """Canaries of directions (K, D) at a hook point, read on a model as its adapters stand.

    Raises:
        `ValueError`: activations that are not finite.
    """
    lines = [list(tokenizer(text=text)["input_ids"])[:LENGTH] for text in TEXTS]
    ids = tuple(tuple(int(token) for token in line) for line in lines if len(line) > 1)
    found = _read(model, ids, hook_point, few(directions))
    if not torch.isfinite(found).all():
        raise ValueError("The model's activations on plain sentences hold NaN or infinity – expected finite numbers.")
    scores = tuple(tuple(row) for row in found[:, :-1].tolist())
    return Canaries(ids, scores, float(found[:, -1].mean()), _numbers(model), _coarse(model, adapters=False)[0])


def agreement(model: nn.Module, canaries: Canaries, hook_point: str, directions: torch.Tensor) -> Agreement:
    """How a model agrees with canaries that were made with the same directions; where it is sharded, by all ranks together.

    Raises:
        `ValueError`: its vocabulary lacks their tokens.
    """
    found = _read(model, canaries.ids, hook_point, few(directions)).double()
    then = torch.tensor(canaries.scores, dtype=torch.float64)
    spread = then.std(0, correction=0).clamp(min=1e-12)
    now, before = (found[:, :-1] - then.mean(0)) / spread, (then - then.mean(0)) / spread
    error = float((now - before).pow(2).mean().sqrt())
    correlation = float(torch.corrcoef(torch.stack([now.flatten(), before.flatten()]))[0, 1])
    precision, why = _coarse(model, adapters=False)
    if list(ALLOWED).index(canaries.made_in) > list(ALLOWED).index(precision):
        precision, why = canaries.made_in, f"its canaries were made in {canaries.made_in}"
    if precision == "float32" and canaries.numbers == "float32" and _numbers(model) == "16 bits":
        precision, why = "16 bits", "its weights were rounded to 16 bits"
    ratio = float(found[:, -1].mean()) / max(canaries.mean_norm, 1e-12)
    if not torch.isfinite(found).all():
        return Agreement(float("inf"), 0.0, ratio, precision, why)
    return Agreement(error, correlation, ratio, precision, why)


def _read(model: nn.Module, ids: Sequence[Sequence[int]], hook_point: str, directions: torch.Tensor) -> torch.Tensor:
    """Projections and norms (N, K + 1) of all tokens but the first of each sequence."""
    batch = TokenBatch.from_ids([[]] * len(ids), ids)
    scores = read(model, batch, [Projections(hook_point, directions)], reader="canaries")["canaries"]
    return scores.scores[scores.mask]


def _coarse(model: nn.Module, adapters: bool = True) -> tuple[str, str]:
    """Precision of a model, a key of `ALLOWED`, and what in it is coarser than float32; a head of its own is not looked at.

    Args:
        adapters (`bool`, defaults to `True`): look at adapters too, not only at the base that canaries are about.
    """
    base = unwrap(model)
    given = getattr(base.config, "quantization_config", None)
    bits = {8: "8 bits", 4: "4 bits"}
    left_out = set() if adapters else adapter_parts(base)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    modules = [module for name, module in base.named_modules() if name not in left_out and module is not head]
    for module in modules:
        kind = type(module).__name__.lower()
        for size, name in bits.items():
            if f"{size}bit" in kind:
                return name, f"`{type(module).__name__}` modules"
        if "quantized" in type(module).__module__:
            return "8 bits", f"`{type(module).__module__}` modules"
    if given is not None and not getattr(given, "dequantize", False) and any(map(_is_quantized, modules)):
        return "4 bits" if "4" in str(given) else "8 bits", "its `quantization_config`"
    types = {parameter.dtype for module in modules for parameter in module.parameters(recurse=False)}
    if whole := sorted(str(kind) for kind in types if kind not in READABLE):
        return "8 bits", f"weights of type {', '.join(whole)}"
    if half := sorted(str(kind) for kind in types if kind in (torch.bfloat16, torch.float16)):
        return "16 bits", f"weights of type {', '.join(half)}"
    device = device_of(base).type
    if torch.is_autocast_enabled(device):
        return "16 bits", "automatic mixed precision"
    if device == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        return "16 bits", "TF32 products"
    return "float32", ""


def _is_quantized(module: nn.Module) -> bool:
    """Whether a module holds quantized numbers, as a configuration says: one may be left over from what was dequantized."""
    own = list(module.parameters(recurse=False))
    if any(p.dtype not in READABLE or type(p.data).__module__.startswith(("torchao", "optimum")) for p in own):
        return True
    whole = (torch.int8, torch.uint8, torch.int16, torch.int32)
    if any(buffer.dim() > 1 and buffer.dtype in whole for buffer in module.buffers(recurse=False)):
        return True
    return any(word in type(module).__module__.lower() for word in _QUANTIZED)


def precision_of(model: nn.Module) -> str:
    """Key of `ALLOWED` for what a model, run as things stand now, gives."""
    return _coarse(model)[0]


def _numbers(model: nn.Module) -> str:
    """`16 bits` where every number of the first large weights is one of bfloat16 or float16, as in most checkpoints."""
    base = unwrap(model)
    if is_sharded(model):
        return "16 bits"  # not looked at: what is fitted is whole
    looked = 0
    for parameter in base.parameters():
        if parameter.dim() < 2 or parameter.is_meta:
            continue
        values = parameter.detach().flatten()[:4096].float()
        if all((values.to(kind).float() != values).any() for kind in (torch.bfloat16, torch.float16)):
            return "float32"
        looked += 1
        if looked == 16:
            break
    return "16 bits" if looked else "float32"  # what is offloaded is not known
