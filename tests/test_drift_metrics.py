"""Drift metrics against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from interp_rlhf.activations import norm_outliers
from interp_rlhf.drift import metrics


def matrix(n=400, d=12, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d=12, seed=1):
    return torch.linalg.qr(matrix(d, d, seed)).Q


@pytest.mark.parametrize(("n", "d"), [(400, 12), (30, 64)])
def test_cka_sees_neither_rotation_nor_scale_nor_shift_nor_permuted_dimensions(n, d):
    x = matrix(n, d)
    for same in (x @ rotation(d), 3 * x, x + 5, x[:, torch.randperm(d, generator=torch.Generator().manual_seed(2))]):
        assert metrics.linear_cka(x, same) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(("n", "d"), [(2000, 12), (60, 512)])
def test_cka_of_independent_matrices_is_near_zero_where_the_biased_one_is_not(n, d):
    found = [metrics.linear_cka(matrix(n, d, seed), matrix(n, d, seed + 100)) for seed in range(10)]
    assert abs(sum(found) / 10) < 0.02
    if n < d:
        a, b = (matrix(n, d, seed) - matrix(n, d, seed).mean(0) for seed in (0, 100))
        biased = (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
        assert biased > 0.8


def test_cka_of_permuted_tokens_is_near_zero():
    x = matrix(2000)
    assert abs(metrics.linear_cka(x, x[torch.randperm(2000, generator=torch.Generator().manual_seed(3))])) < 0.02


def test_streaming_cka_is_the_batch_formula_and_its_memory_does_not_grow():
    x = matrix(1000, 24) + 7
    y = x @ rotation(24) * 2 + matrix(1000, 24, 5)
    cka = metrics.StreamingCKA()
    sizes = []
    for start in range(0, 1000, 50):
        cka.update(x[start : start + 50], y[start : start + 50])
        sizes.append(sum(t.numel() for moments in cka._moments.values() for t in moments.values()))
    k, l = (v @ v.T for v in (x - x.mean(0), y - y.mean(0)))  # noqa: E741
    k, l = k.fill_diagonal_(0), l.fill_diagonal_(0)  # noqa: E741
    one, n = torch.ones(1000, dtype=torch.float64), 1000

    def hsic(a, b):
        return (
            (a @ b).trace()
            + (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2))
            - 2 / (n - 2) * (one @ a @ b @ one)
        )

    assert cka.value() == pytest.approx(float(hsic(k, l) / (hsic(k, k) * hsic(l, l)) ** 0.5), abs=1e-6)
    assert metrics.linear_cka(x, y) == pytest.approx(cka.value(), abs=1e-9)
    assert len(set(sizes)) == 1


@pytest.mark.parametrize(("n", "d"), [(400, 12), (30, 64)])
def test_procrustes_residual_is_zero_for_a_known_rotation_and_near_one_for_noise(n, d):
    x = matrix(n, d)
    assert metrics.procrustes_residual(x, 2 * x @ rotation(d) + 3) == pytest.approx(0, abs=1e-9)
    # By hand: x and x + noise of the same size; the best rotation cannot do better than the identity does in expectation.
    y = x + matrix(n, d, 9)
    a, b = x - x.mean(0), y - y.mean(0)
    nuclear = torch.linalg.svdvals(a.T @ b).sum()
    assert metrics.procrustes_residual(x, y) == pytest.approx(
        1 - float(nuclear / (a.norm() * b.norm())) ** 2, abs=1e-9
    )
    if n > d:
        assert metrics.procrustes_residual(x, matrix(n, d, 50)) > 0.9


def test_principal_angles_of_known_subspaces():
    e = torch.eye(6, dtype=torch.float64)
    angle = 0.3
    turned = math.cos(angle) * e[1] + math.sin(angle) * e[4]
    assert metrics.principal_angles(e[:2], torch.stack([e[0], turned])).tolist() == pytest.approx([0, angle], abs=1e-9)
    assert metrics.principal_angles(e[:2], e[2:4]).tolist() == pytest.approx([math.pi / 2] * 2)
    assert metrics.principal_angles(e[:2], torch.stack([e[0] + e[1], e[0] - 3 * e[1]])).tolist() == pytest.approx(
        [0, 0], abs=1e-9
    )


def test_cosines_norms_and_shifts():
    x = matrix()
    assert metrics.cosine(x, 2 * x) == pytest.approx(1)
    assert metrics.cosine(x, -x) == pytest.approx(-1)
    assert metrics.relative_norm(x, 2 * x) == pytest.approx(2)
    assert metrics.direction_cosine(x[0], -3 * x[0]) == pytest.approx(-1)
    along = torch.zeros(12, dtype=torch.float64)
    along[3] = 2
    assert metrics.mean_shift(x, x + along) == pytest.approx(2 / float(x.norm(dim=1).mean()))
    assert metrics.mean_shift(x, x) == 0


def test_shift_rank_counts_the_directions_that_moved():
    x = matrix()
    assert metrics.shift_rank(x, x) == 0
    assert metrics.shift_rank(x, x + 1) == 0  # all alike: a mean shift has no variance
    moved = matrix(400, 3, 4) @ rotation()[:3]
    assert metrics.shift_rank(x, x + moved) == 3
    assert metrics.shift_rank(x, x + 1e-3 * matrix(400, 12, 6)) >= 10


def test_output_kl_is_the_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    by_hand = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert metrics.output_kl(p.log(), q.log()) == pytest.approx(by_hand, abs=1e-6)
    assert metrics.output_kl(p.log(), p.log()) == 0


def test_norm_outliers_are_found_on_either_side():
    x, y = matrix(), matrix(seed=1)
    x[5] *= 50
    y[7] *= 50
    assert norm_outliers(x, y).nonzero().flatten().tolist() == [5, 7]
