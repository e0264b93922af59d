"""Drift metrics: pure functions on what two models make of the same tokens.

In: `before` and `after`, (N, D) activations of the same N tokens, or (N, V) log-probs. Out: one number, or a few. Each docstring
says sign, range, what the metric is blind to and where it comes from. They must not know models, texts or trainers.
"""

from __future__ import annotations

import torch


def cosine(before: torch.Tensor, after: torch.Tensor) -> float:
    """Mean cosine of a token's activation with its own earlier one.

    In [−1, 1]; 1 = same direction, lower = more drift. Blind to a change of norm.
    """
    return float(torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=1).mean())


def relative_norm(before: torch.Tensor, after: torch.Tensor) -> float:
    """Mean ratio of norms, after over before.

    In [0, ∞); 1 = unchanged. Blind to a change of direction.
    """
    return float((after.double().norm(dim=1) / before.double().norm(dim=1).clamp(min=1e-12)).mean())


class StreamingCKA:
    """Linear centred kernel alignment with the unbiased estimator, over batches: memory in D², whatever N is.

    In [0, 1] but for the estimator's noise, which may take it a little below 0; 1 = same geometry, lower = more drift. Invariant
    to rotation, to one common scale and to a shift, so it is blind to just what breaks a linear probe: read it beside the
    cosine, the cosine of the concept's direction and the frozen AUROC. The biased estimator is near 1 for any two matrices
    where N is not much larger than D; this one is near 0 for independent ones.

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
            # The estimator does not see a shift, rounding does.
            self._centers = [values.mean(0) for values in pair]
        pair = [values - center for values, center in zip(pair, self._centers, strict=True)]
        self.count += len(pair[0])
        for i, j in ((0, 0), (0, 1), (1, 1)):
            x, y = pair[i], pair[j]
            xx, yy = x.square().sum(1), y.square().sum(1)  # (n,), the kernels' diagonals
            found = {
                "cross": x.T @ y, "x": x.sum(0), "y": y.sum(0), "x_yy": x.T @ yy, "y_xx": y.T @ xx, "x_xx": x.T @ xx,
                "y_yy": y.T @ yy, "xx_yy": xx @ yy, "xx": xx.sum(), "yy": yy.sum(),
            }  # fmt: skip
            known = self._moments.setdefault((i, j), {})
            for name, value in found.items():
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


def linear_cka(before: torch.Tensor, after: torch.Tensor) -> float:
    """`StreamingCKA` of two whole matrices; with fewer tokens than dimensions by their kernels, in N² memory."""
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


def procrustes_residual(before: torch.Tensor, after: torch.Tensor) -> float:
    """What the best rotation and scale leave unexplained of the later activations: 1 − (‖AᵀB‖_* / (‖A‖ ‖B‖))², both centred.

    In [0, 1]; 0 = the same point cloud but for rotation, reflection, scale and shift, higher = more drift. Beside a low cosine a
    low residual says that the space was turned, not changed. Blind to those four.

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

    Source: Björck & Golub 1973; the sine where the cosine is near 1, for its rounding.
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


def shift_rank(before: torch.Tensor, after: torch.Tensor, share: float = 0.9) -> int:
    """Principal components that hold `share` of the variance of the tokens' shifts; 0 where all shifts are alike.

    At least 0 and at most min(N − 1, D). Few components mean a change in few directions: a model that learned to hide from
    monitors moved in 11 where honest fine-tuning needed 39 (Neural Chameleons, arXiv 2512.11949). Blind to size.
    """
    shift = after.double() - before.double()
    shift = shift - shift.mean(0)
    variance = torch.linalg.svdvals(shift).square()
    total = variance.sum()
    if total <= 1e-20 * before.double().square().sum():
        return 0
    return int((variance.cumsum(0) < share * total).sum()) + 1


def mean_shift(before: torch.Tensor, after: torch.Tensor) -> float:
    """Norm of the mean shift over the mean norm before: ‖mean(h_θ − h_0)‖ / mean ‖h_0‖.

    In [0, ∞); 0 = no common shift. On the first tokens of unrelated text it shows narrow fine-tuning, which leaves a constant
    trace there (arXiv 2510.13900). Blind to shifts that cancel.
    """
    shift = (after.double() - before.double()).mean(0).norm()
    return float(shift / before.double().norm(dim=1).mean().clamp(min=1e-12))


def output_kl(before: torch.Tensor, after: torch.Tensor) -> float:
    """Mean KL(before ‖ after) per token of two next-token distributions, as log-probs (N, V), in nats.

    In [0, ∞); 0 = the same predictions. Blind to everything inside that does not reach the output.
    """
    before, after = before.float(), after.float()
    return float((before.exp() * (before - after)).sum(1).double().mean().clamp(min=0))
