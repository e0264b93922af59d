"""PPO: advantages and losses by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp_rlhf.training.ppo import advantages as adv


def test_advantages_and_returns_of_three_completions_by_hand():
    """γ = 0.5, λ = 0.5, hence γλ = 0.25.

    Row 0, three tokens, over: r = (1, 0, 2), V = (0.5, 1, 1).
      δ_2 = 2 − 1 = 1; δ_1 = 0 + 0.5·1 − 1 = −0.5; δ_0 = 1 + 0.5·1 − 0.5 = 1.
      A_2 = 1; A_1 = −0.5 + 0.25·1 = −0.25; A_0 = 1 + 0.25·(−0.25) = 0.9375.
    Row 1, one token, over: r = 3, V = 1: A_0 = 3 − 1 = 2. The 9s beyond it are padding.
    Row 2, two tokens, cut off, V(s_2) = 4 stands for the rest: r = (0, 1), V = (2, 0).
      δ_1 = 1 + 0.5·4 − 0 = 3; δ_0 = 0 + 0.5·0 − 2 = −2; A_1 = 3; A_0 = −2 + 0.25·3 = −1.25.
    Returns are A + V.
    """
    rewards = torch.tensor([[1.0, 0, 2], [3, 0, 0], [0, 1, 0]])
    values = torch.tensor([[0.5, 1, 1, 9], [1, 9, 9, 9], [2, 0, 4, 9]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    ended = torch.tensor([True, True, False])
    found = adv.gae(rewards, values, mask, ended, gamma=0.5, lam=0.5)
    expected = torch.tensor([[0.9375, -0.25, 1], [2, 0, 0], [-1.25, 3, 0]])
    torch.testing.assert_close(found, expected)
    # The same, cut off and not bootstrapped: δ_1 = 1 − 0, A_0 = −2 + 0.25.
    over = adv.gae(rewards, values, mask, torch.ones(3, dtype=torch.bool), gamma=0.5, lam=0.5)
    torch.testing.assert_close(over[2], torch.tensor([-1.75, 1, 0]))


def test_without_values_and_discounting_the_advantage_is_what_is_paid_from_there_on():
    """γ = λ = 1 and V = 0: A_t = Σ_{k ≥ t} r_k."""
    rewards = torch.tensor([[1.0, 2, 4], [8, 0, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    found = adv.gae(rewards, torch.zeros(2, 4), mask, torch.ones(2, dtype=torch.bool), 1.0, 1.0)
    torch.testing.assert_close(found, torch.tensor([[7.0, 6, 4], [8, 0, 0]]))
    torch.testing.assert_close(adv.returns_to_go(rewards, 1.0), found)
    torch.testing.assert_close(adv.returns_to_go(rewards, 0.5), torch.tensor([[3.0, 4, 4], [8, 0, 0]]))


def test_a_score_lands_on_the_last_token_and_nowhere_where_there_is_none():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    found = adv.on_last_token(torch.tensor([5.0, 6, 7]), mask)
    torch.testing.assert_close(found, torch.tensor([[0.0, 5, 0], [0, 0, 6], [0, 0, 0]]))


def test_the_kl_in_the_reward_is_k1_per_token():
    """−0.1 · (log π − log π_ref): (−1) − (−3) = 2 → −0.2; (−2) − (−1) = −1 → +0.1; padding → 0."""
    found = adv.kl_reward(
        torch.tensor([[-1.0, -2, -5]]), torch.tensor([[-3.0, -1, -9]]), torch.tensor([[1, 1, 0]]), 0.1
    )
    torch.testing.assert_close(found, torch.tensor([[-0.2, 0.1, 0]]))


def test_clipped_value_losses_by_hand():
    """½ max((V − R)², (clip(V, V_old ± 0.2) − R)²) with V_old = 1.

    V = 1.1, R = 2: inside, ½·0.81. V = 2, R = 2: the clipped one is 1.2, ½·0.64, though V is right: it moved too far at once.
    V = 0.5, R = 2: away from R, plain ½·2.25 is larger than clipped ½·1.44.
    """
    values, old, returns = torch.tensor([1.1, 2.0, 0.5]), torch.ones(3), torch.full((3,), 2.0)
    losses, clipped = adv.value_losses(values, old, returns, 0.2)
    torch.testing.assert_close(losses, torch.tensor([0.405, 0.32, 1.125]))
    assert clipped.tolist() == [False, True, False]
    losses, clipped = adv.value_losses(values, old, returns, None)
    torch.testing.assert_close(losses, torch.tensor([0.405, 0.0, 1.125]))
    assert not clipped.any()


def test_clipped_policy_losses_by_hand():
    """−min(ρA, clip(ρ, 0.8, 1.2)A): ρ = 1.5, A = 2: −2.4, clipped. ρ = 1.5, A = −2: 3, not. ρ = 0.5, A = −2: 1.6, clipped.
    ρ = 0.5, A = 2: −1, not."""
    ratio, advantages = torch.tensor([1.5, 1.5, 0.5, 0.5]), torch.tensor([2.0, -2, -2, 2])
    losses, clipped = adv.policy_losses(ratio, advantages, 0.2, 0.2)
    torch.testing.assert_close(losses, torch.tensor([-2.4, 3.0, 1.6, -1.0]))
    assert clipped.tolist() == [True, False, True, False]


def test_whitening_counts_only_what_counts():
    """(1, 2, 3) has mean 2 and unbiased deviation 1; the 9 is padding."""
    values, mask = torch.tensor([[1.0, 2], [3, 9]]), torch.tensor([[1, 1], [1, 0]])
    torch.testing.assert_close(adv.whiten(values, mask), torch.tensor([[-1.0, 0], [1, 0]]))
    torch.testing.assert_close(adv.whiten(values, mask, shift_mean=False), torch.tensor([[1.0, 2], [3, 0]]))


def test_whitening_two_ranks_is_whitening_them_together():
    whole = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * length + [0] * (5 - length) for length in (5, 2, 1, 4)])
    together = adv.whiten(whole, mask)
    # What the other rank sends, in the order in which it is asked: sum and count, then squares about the common mean.
    mean, _ = adv.moments(whole, mask)
    other, theirs = whole[2:], mask[2:].float()
    sent = [torch.stack([(other * theirs).sum(), theirs.sum()]), (((other - mean) ** 2) * theirs).sum()[None]]
    alone = adv.whiten(whole[:2], mask[:2], reduce=lambda sums: sums + sent.pop(0))
    torch.testing.assert_close(alone, together[:2])


def test_explained_variance_is_1_for_a_perfect_critic_and_0_for_a_constant_one():
    returns, mask = torch.tensor([[1.0, 2], [4, 9]]), torch.tensor([[1, 1], [1, 0]])
    assert float(adv.explained_variance(returns, returns - 3, mask)) == pytest.approx(1)
    assert float(adv.explained_variance(returns, torch.full_like(returns, 7), mask)) == pytest.approx(0, abs=1e-6)
    assert float(adv.explained_variance(returns, -returns, mask)) == pytest.approx(-3)  # 1 − Var(2R) / Var(R)
    assert math.isnan(float(adv.explained_variance(torch.ones(2, 2), returns, mask)))


def test_shares_of_the_returns_variance_by_hand():
    """One token each: a = (1, −1), b = (3, −3): G = (4, −4), Var 16; Cov(a, G) = 4, Cov(b, G) = 12: shares ¼ and ¾."""
    parts = {"a": torch.tensor([[1.0], [-1]]), "b": torch.tensor([[3.0], [-3]])}
    found = adv.shares_of_variance(parts, torch.ones(2, 1), 1.0)
    assert {name: float(share) for name, share in found.items()} == pytest.approx({"a": 0.25, "b": 0.75})


def test_the_running_deviation_is_that_of_everything_so_far():
    values = torch.randn(20, generator=torch.Generator().manual_seed(1)) * 3 + 5
    running = adv.RunningStd()
    assert running.std == 1.0
    for part in values.split([1, 7, 12]):
        running.update(part)
    assert running.std == pytest.approx(float(values.std()), rel=1e-5)
    resumed = adv.RunningStd()
    resumed.load_state(json.loads(json.dumps(running.state())))
    assert resumed == running
    constant = adv.RunningStd()
    constant.update(torch.full((4,), 2.0))
    assert constant.std == 1.0


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 10_000))
def test_shaping_leaves_every_advantage_as_it_is(gamma, lam, seed):
    """δ' = r + F + γ(V − Φ)' − (V − Φ) with F = γΦ' − Φ is r + γV' − V = δ, at every step.

    At the end of a completion V and Φ are both 0; where it was cut off both stay.
    """
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[1] * length + [0] * (6 - length) for length in (6, 1, 3, 4)])
    ended = torch.rand(4, generator=generator) < 0.5
    rewards = torch.randn(4, 6, generator=generator, dtype=torch.float64) * mask
    values, potentials = (torch.randn(4, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    plain = adv.gae(rewards, values, mask, ended, gamma, lam)
    shaped = rewards + adv.shaping(potentials, mask, ended, gamma)
    found = adv.gae(shaped, values - potentials, mask, ended, gamma, lam)
    torch.testing.assert_close(found, plain, atol=1e-6, rtol=0)


def test_shaping_by_hand():
    """γ = 0.5, Φ = (1, 2, 4): F = (0.5·2 − 1, 0.5·0 − 2) where it ends, (0, 0.5·4 − 2) where it was cut off."""
    potentials, mask = torch.tensor([[1.0, 2, 4]] * 2), torch.ones(2, 2)
    found = adv.shaping(potentials, mask, torch.tensor([True, False]), 0.5)
    torch.testing.assert_close(found, torch.tensor([[0.0, -2], [0, 0]]))
