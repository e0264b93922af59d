"""Drift metrics: pure functions of what two models make of the same tokens, and the table in which they are registered.

In: `before` and `after`, (N, D) activations of the same N tokens, or `Predictions`. Out: one number. Each docstring says sign,
range, what the metric is blind to and where it comes from. It must not know models, texts or trainers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from ..registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

Kind = Literal["point", "first_tokens", "output"]
Direction = Literal["higher", "lower", "either"]


class Predictions(NamedTuple):
    """What a model predicts on the fixed texts.

    Attributes:
        log_probs (`torch.FloatTensor` of shape (N,)): of each token given what precedes it.
        next_token (`torch.FloatTensor` of shape (K, V)): next-token log-probs at the kept tokens.
    """

    log_probs: torch.Tensor
    next_token: torch.Tensor


@dataclass(frozen=True)
class DriftMetric:
    """A metric, and how to read its numbers.

    Attributes:
        function (`Callable`): `before` and `after` to a number.
        kind (`str`): what it is given. `point`: activations (N, D) of all counted tokens at a hook point. `first_tokens`:
            activations of the first tokens of each text there. `output`: `Predictions`.
        low, high (`float`): range of its values; infinite if it has no bound.
        unchanged (`float`, *optional*): its value where nothing changed.
        more_drift (`str`): `higher`, `lower` or `either`: which values mean more drift.
        source (`str`): file and name of the function. Two imports of one module register the same metric.
    """

    function: Callable[[Any, Any], float] = field(compare=False)
    kind: Kind
    low: float
    high: float
    unchanged: float | None
    more_drift: Direction
    source: str

    def __str__(self) -> str:
        bounds = f"{'[' if math.isfinite(self.low) else '('}{_bound(self.low)}, {_bound(self.high)}"
        parts = [f"in {bounds}{']' if math.isfinite(self.high) else ')'}"]
        parts += [] if self.unchanged is None else [f"{self.unchanged:g} = unchanged"]
        parts += [] if self.more_drift == "either" else [f"{self.more_drift} = more drift"]
        return "; ".join(parts)


# In the order in which they are logged.
DRIFT_METRICS: Registry[DriftMetric] = Registry("a drift metric")


def register_drift_metric(
    name: str,
    kind: Kind = "point",
    *,
    low: float = -math.inf,
    high: float = math.inf,
    unchanged: float | None = None,
    more_drift: Direction = "either",
) -> Callable[[Callable[[Any, Any], float]], Callable[[Any, Any], float]]:
    """Decorator that registers a drift metric. Every evaluation then computes it, logs it and shows it in the report.

    The function takes `before` and `after` and returns a number. Tokens whose norm is an outlier are left out of what it gets.

    Args:
        name (`str`): a lower-case identifier. It is the key in the log: `interp/drift/<hook point>/<name>`, or
            `interp/drift/<name>` for `output`.
        kind (`str`, defaults to `"point"`): `point`: activations (N, D) of the counted tokens at a hook point. `first_tokens`:
            only those of the first tokens of each text. `output`: `Predictions` with log-probs (N,) and (K, V).
        low, high (`float`): range of the values.
        unchanged (`float`, *optional*): the value where nothing changed.
        more_drift (`str`, defaults to `"either"`): `higher`, `lower` or `either`: which values mean more drift.

    Returns:
        `Callable`: the decorator. It returns the function unchanged.

    Raises:
        `ValueError`: the name is not an identifier or another metric has it, or `kind` or `more_drift` is unknown.

    Example:
        >>> import torch
        >>> from interp_rlhf import register_drift_metric
        >>> from interp_rlhf.drift.metrics import DRIFT_METRICS
        >>> @register_drift_metric("largest_change", low=0, unchanged=0, more_drift="higher")
        ... def largest_change(before, after):
        ...     return float((after - before).abs().max())
        >>> largest_change(torch.zeros(3, 2), torch.eye(3)[:, :2])
        1.0
        >>> print(DRIFT_METRICS["largest_change"])
        in [0, ∞); 0 = unchanged; higher = more drift
    """
    for option, value, known in (
        ("kind", kind, ("first_tokens", "output", "point")),
        ("more_drift", more_drift, ("either", "higher", "lower")),
    ):
        if value not in known:
            raise ValueError(f"`{option}` is {value!r} – expected one of {', '.join(f'`{one}`' for one in known)}.")

    def enter(function: Callable[[Any, Any], float]) -> Callable[[Any, Any], float]:
        code = getattr(function, "__code__", None)
        file = getattr(code, "co_filename", type(function).__module__)
        source = f"{file}:{getattr(function, '__qualname__', type(function).__qualname__)}"
        DRIFT_METRICS.register(name)(DriftMetric(function, kind, low, high, unchanged, more_drift, source))
        return function

    return enter


def _bound(value: float) -> str:
    return f"{value:g}" if math.isfinite(value) else "∞" if value > 0 else "−∞"


@register_drift_metric("cosine", low=-1, high=1, unchanged=1, more_drift="lower")
def cosine(before: torch.Tensor, after: torch.Tensor) -> float:
    """Mean cosine of a token's activation with its own earlier one.

    In [−1, 1]; 1 = same direction, lower = more drift. Blind to a change of norm.
    """
    return float(torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=1).mean())


@register_drift_metric("relative_norm", low=0, unchanged=1)
def relative_norm(before: torch.Tensor, after: torch.Tensor) -> float:
    """Mean ratio of norms, after over before.

    In [0, ∞); 1 = unchanged. Blind to a change of direction.
    """
    return float((after.double().norm(dim=1) / before.double().norm(dim=1).clamp(min=1e-12)).mean())


class StreamingCKA:
    """Linear centred kernel alignment with the unbiased estimator, over batches: memory in D², for any N.

    In [0, 1]; noise of the estimator may take it a little below 0. 1 = same geometry, lower = more drift. A rotation, one common
    scale and a shift do not change it, so it is blind to just what breaks a linear probe. Read it together with the cosine, the
    cosine of the concept's direction and the frozen AUROC. The biased estimator is near 1 for any two matrices if N is not much
    larger than D. This one is near 0 for independent matrices.

    Source: Kornblith et al. 2019 (arXiv 1905.00414) for CKA, Song et al. 2012 (JMLR 13, equation 5) for the estimator
    HSIC_u = [tr(K̃ L̃) + (1ᵀK̃1)(1ᵀL̃1) / ((n − 1)(n − 2)) − 2/(n − 2) 1ᵀK̃L̃1] / (n (n − 3)), K̃ and L̃ with zero diagonals; here
    with K = XXᵀ and L = YYᵀ written out in feature space.
    """

    def __init__(self) -> None:
        self.count = 0
        self._centers: list[torch.Tensor] = []
        self._moments: dict[tuple[int, int], dict[str, torch.Tensor]] = {}

    def update(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add a batch of tokens, each (n, D)."""
        pair = [before.double(), after.double()]
        if not self._centers:
            # A shift does not change the estimator, but large values lose digits to rounding.
            self._centers = [values.mean(0) for values in pair]
        pair = [values - center for values, center in zip(pair, self._centers, strict=True)]
        self.count += len(pair[0])
        for i, j in ((0, 0), (0, 1), (1, 1)):
            x, y = pair[i], pair[j]
            xx, yy = x.square().sum(1), y.square().sum(1)  # (n,), the kernels' diagonals
            terms = {
                "cross": x.T @ y, "x": x.sum(0), "y": y.sum(0), "x_yy": x.T @ yy, "y_xx": y.T @ xx, "x_xx": x.T @ xx,
                "y_yy": y.T @ yy, "xx_yy": xx @ yy, "xx": xx.sum(), "yy": yy.sum(),
            }  # fmt: skip
            known = self._moments.setdefault((i, j), {})
            for name, value in terms.items():
                known[name] = known[name] + value if name in known else value

    def value(self) -> float:
        """CKA of all tokens so far; NaN below four tokens or where one side does not vary."""
        if self.count < 4:
            return float("nan")
        own = self._hsic(0, 0) * self._hsic(1, 1)
        return self._hsic(0, 1) / own**0.5 if own > 0 else float("nan")

    def _hsic(self, i: int, j: int) -> float:
        m, n = self._moments[i, j], self.count
        trace = m["cross"].square().sum() - m["xx_yy"]
        k = m["x"].square().sum() - m["xx"]  # 1ᵀK̃1
        l = m["y"].square().sum() - m["yy"]  # noqa: E741
        product = m["x"] @ m["cross"] @ m["y"] - m["x"] @ m["x_yy"] - m["y"] @ m["y_xx"] + m["xx_yy"]  # 1ᵀK̃L̃1
        return float((trace + k * l / ((n - 1) * (n - 2)) - 2 / (n - 2) * product) / (n * (n - 3)))


@register_drift_metric("cka", high=1, unchanged=1, more_drift="lower")
def linear_cka(before: torch.Tensor, after: torch.Tensor) -> float:
    """`StreamingCKA` of two whole matrices. With fewer tokens than dimensions it uses their kernels, in N² memory.

    In [0, 1] but for noise; 1 = same geometry, lower = more drift. Blind to rotation, one common scale and a shift.
    """
    if len(before) >= before.shape[1]:
        cka = StreamingCKA()
        cka.update(before, after)
        return cka.value()
    n = len(before)
    if n < 4:
        return float("nan")
    kernels = []
    for values in (before.double(), after.double()):
        centered = values - values.mean(0)
        kernels.append((centered @ centered.T).fill_diagonal_(0))

    def hsic(k: torch.Tensor, l: torch.Tensor) -> torch.Tensor:  # noqa: E741
        sums = k.sum() * l.sum() / ((n - 1) * (n - 2))
        return ((k * l).sum() + sums - 2 / (n - 2) * (k.sum(0) @ l.sum(0))) / (n * (n - 3))

    own = hsic(kernels[0], kernels[0]) * hsic(kernels[1], kernels[1])
    return float(hsic(*kernels) / own.sqrt()) if own > 0 else float("nan")


@register_drift_metric("procrustes", low=0, high=1, unchanged=0, more_drift="higher")
def procrustes_residual(before: torch.Tensor, after: torch.Tensor) -> float:
    """Share of the later activations that the best rotation and scale do not explain: 1 − (‖AᵀB‖_* / (‖A‖ ‖B‖))², both centred.

    In [0, 1]; 0 = the same point cloud up to rotation, reflection, scale and shift, higher = more drift. Together with a low
    cosine, a low residual says that the space was rotated and did not change otherwise. Blind to those four.

    Source: Schönemann 1966; as a distance between representations Ding et al. 2021 (arXiv 2108.01661).
    """
    a, b = (values.double() - values.double().mean(0) for values in (before, after))
    scale = torch.linalg.matrix_norm(a) * torch.linalg.matrix_norm(b)
    if scale == 0:
        return float("nan")
    if len(a) < a.shape[1]:  # the singular values of AᵀB are those of the N × N product of the triangular factors
        a, b = (torch.linalg.qr(values.T, mode="r").R.T for values in (a, b))
    nuclear = torch.linalg.matrix_norm(a.T @ b, ord="nuc")
    return float((1 - (nuclear / scale).square()).clamp(0, 1))


def principal_angles(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Principal angles (R,) between the spans of the rows of two (R, D) matrices, in radians, ascending.

    Each in [0, π/2]; 0 = a shared direction. Blind to everything inside the subspaces.

    Source: Björck & Golub 1973. The sine is used where the cosine is near 1, because of rounding.
    """
    a, b = (torch.linalg.qr(rows.double().T).Q for rows in (before, after))
    cosines = torch.linalg.svdvals(a.T @ b).clamp(0, 1)
    sines = torch.linalg.svdvals(b - a @ (a.T @ b)).clamp(0, 1).flip(0)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


def direction_cosine(before: torch.Tensor, after: torch.Tensor) -> float:
    """Cosine of two directions (D,).

    In [−1, 1]; 1 = the concept is read along the same direction.
    """
    return float(torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=0))


@register_drift_metric("shift_rank", low=0, unchanged=0, more_drift="higher")
def shift_rank(before: torch.Tensor, after: torch.Tensor, share: float = 0.9) -> int:
    """Number of principal components that hold `share` of the variance of the tokens' shifts; 0 if all shifts are alike.

    At least 0 and at most min(N − 1, D). Few components mean a change in few directions. A model that learned to hide from
    monitors moved in 11 components, where honest fine-tuning needed 39 (Neural Chameleons, arXiv 2512.11949). Blind to size.
    """
    shift = after.double() - before.double()
    shift = shift - shift.mean(0)
    variance = torch.linalg.svdvals(shift).square()
    total = variance.sum()
    if total <= 1e-20 * before.double().square().sum():
        return 0
    return int((variance.cumsum(0) < share * total).sum()) + 1


@register_drift_metric("first_tokens", "first_tokens", low=0, unchanged=0, more_drift="higher")
def mean_shift(before: torch.Tensor, after: torch.Tensor) -> float:
    """Norm of the mean shift over the mean norm before: ‖mean(h_θ − h_0)‖ / mean ‖h_0‖.

    In [0, ∞); 0 = no common shift. Narrow fine-tuning leaves a constant trace on the
    first tokens of unrelated text, and this shows it (arXiv 2510.13900). Blind to shifts that cancel.
    """
    shift = (after.double() - before.double()).mean(0).norm()
    return float(shift / before.double().norm(dim=1).mean().clamp(min=1e-12))


def output_kl(before: torch.Tensor, after: torch.Tensor) -> float:
    """Mean KL(before ‖ after) per token of two next-token distributions, as log-probs (N, V), in nats.

    In [0, ∞); 0 = the same predictions. Blind to everything inside that does not reach the output.
    """
    before, after = before.float(), after.float()
    return float((before.exp() * (before - after)).sum(1).double().mean().clamp(min=0))


def perplexity(log_probs: torch.Tensor) -> float:
    """exp of the mean negative log-prob (N,).

    In [1, ∞); NaN without tokens, infinite where a float cannot hold it.
    """
    return float((-log_probs.double().mean()).exp())


@register_drift_metric("kl", "output", low=0, unchanged=0, more_drift="higher")
def kl_of_predictions(before: Predictions, after: Predictions) -> float:
    """`output_kl` of the next-token distributions."""
    return output_kl(before.next_token, after.next_token)


@register_drift_metric("perplexity", "output", low=1)
def perplexity_after(before: Predictions, after: Predictions) -> float:
    """Perplexity of the fixed texts under the later model."""
    return perplexity(after.log_probs)


@register_drift_metric("perplexity_ratio", "output", low=0, unchanged=1)
def perplexity_ratio(before: Predictions, after: Predictions) -> float:
    """Perplexity under the later model over that under the earlier one.

    In [0, ∞); 1 = unchanged, higher = the texts surprise the later model more.
    """
    return perplexity(after.log_probs) / perplexity(before.log_probs)
