"""PPO: advantages and losses by hand, on real trainers, with every completion that can be told apart."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from engines import compare
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import make_card, make_readout
from training import activations_by_hand, distance, logged, lora_config, rows_of, weights_of

from interp_rlhf import ConceptReward, PPOConfig, PPOTrainer, Readout, attach
from interp_rlhf.activations import TokenBatch, decoder_layers, read
from interp_rlhf.runlog.log import read_run_log
from interp_rlhf.training.ppo import advantages as adv
from interp_rlhf.training.ppo.critic import VALUE_HEAD
from interp_rlhf.training.ppo.estimates import truncated_rows

ROOT = Path(__file__).resolve().parent.parent
END = 0  # the tiny tokenizer's end-of-turn token


def by_length(completion_ids, **kwargs):
    return [float(len(ids) % 3) + 0.1 * (ids[0] % 7) for ids in completion_ids]


def config(folder, **changes):
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1,
        "max_completion_length": 6, "num_ppo_epochs": 2, "use_cpu": True, "bf16": False, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "seed": 3, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return PPOConfig(**{**settings, **changes})


def trainer_of(folder, model, tokenizer, rewards=None, lora=False, rows=None, **changes):
    return PPOTrainer(
        model, rewards or [by_length], config(folder, **changes), Dataset.from_list(rows or rows_of("GRPO")),
        processing_class=tokenizer, peft_config=lora_config() if lora else None,
    )  # fmt: skip


def says(trainer, completions):
    """Makes the trainer's policy write these completions, whatever its weights: row i of every rollout gets the i-th."""

    def generate(prompt_ids, *args, **kwargs):
        return [list(completions[i % len(completions)]) for i in range(len(prompt_ids))], None

    trainer._generate_single_turn = generate


def roll(trainer, rows=4):
    """One rollout of a trainer that has not trained yet."""
    trainer.model.train()
    return trainer._generate_and_score_completions([trainer.train_dataset[i] for i in range(rows)])


def rollouts_of(trainer):
    """Every rollout as it leaves `_generate_and_score_completions`, and the ids in it."""
    found, make = [], trainer._generate_and_score_completions

    def noted(inputs):
        output = make(inputs)
        found.append({key: value.clone() for key, value in output.items()})
        return output

    trainer._generate_and_score_completions = noted
    return found


def randomize_head(trainer, seed=0, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if VALUE_HEAD in name and "trunk" not in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def head_of(trainer):
    found = {
        name.split(".")[-1]: p
        for name, p in trainer.model.named_parameters()
        if VALUE_HEAD in name and "trunk" not in name and p.requires_grad
    }
    return found["weight"].detach(), found["bias"].detach()


def row_ids(output, row):
    """Prompt and completion ids of one row, without padding."""
    return (
        output["prompt_ids"][row][output["prompt_mask"][row].bool()],
        output["completion_ids"][row][output["completion_mask"][row].bool()],
    )


# By hand


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


# On the trainer

COMPLETIONS = [
    [7, 8, 9, END],
    [10, 11, 12, 13, 14, 15],
    [16, END],
    [17, 18, 19],
]  # the second and the fourth are cut off


def expected_rollout(trainer, output, reference, gamma, lam):
    """Per row values, rewards and advantages by hand: one row at a time, without padding, from plain forwards."""
    weight, bias = head_of(trainer)
    base = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    found = []
    for row in range(len(output["completion_ids"])):
        prompt, completion = row_ids(output, row)
        ids = torch.cat([prompt, completion])
        h = activations_by_hand(base, ids, decoder_layers(base)[-1])
        values = (h / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()) @ weight + bias
        values = values[len(prompt) - 1 :]  # V(s_0) at the last prompt token, V(s_L) at the last completion token

        def log_probs(model, ids=ids, completion=completion):
            with torch.no_grad():
                logits = model(input_ids=ids[None], use_cache=False).logits[0, -len(completion) - 1 : -1]
            return logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]

        rewards = -0.1 * (log_probs(base) - log_probs(reference))
        over = completion[-1] == END
        rewards[-1] += by_length([completion.tolist()])[0] - (0 if over else 0.5)
        advantages, running = torch.zeros(len(completion)), 0.0
        for t in reversed(range(len(completion))):
            following = values[t + 1] if t + 1 < len(completion) else 0.0
            running = float(rewards[t] + gamma * following - values[t]) + gamma * lam * running
            advantages[t] = running
        found.append((values[:-1], rewards, advantages))
    return found


@pytest.mark.parametrize("lora", [False, True])
def test_values_rewards_and_advantages_of_a_rollout_by_hand(lora, load, model_folder, tokenizer, tmp_path):
    from training import perturb, randomize_adapters

    trainer = trainer_of(
        tmp_path, str(model_folder()), tokenizer, lora=lora, kl_coef=0.1, gamma=0.9, lam=0.8, missing_eos_penalty=0.5,
        whiten_advantages=False, max_steps=1,
    )  # fmt: skip
    if lora:
        randomize_adapters(trainer)
    else:
        perturb(trainer.model)
    randomize_head(trainer)
    says(trainer, COMPLETIONS)
    output = roll(trainer)
    assert output["prompt_mask"].min() == 0  # so there is left padding
    for row, (values, rewards, advantages) in enumerate(expected_rollout(trainer, output, load(), 0.9, 0.8)):
        count = len(rewards)
        torch.testing.assert_close(output["values"][row, :count], values, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(output["advantages"][row, :count], advantages, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(output["returns"][row, :count], advantages + values, atol=1e-4, rtol=1e-4)
        assert not output["advantages"][row, count:].any()


@pytest.mark.parametrize(("mini_batches", "tokens"), [(1, 15), (2, 11.5)])
def test_the_loss_is_the_clipped_policy_loss_and_the_clipped_value_loss(
    mini_batches, tokens, model_folder, tokenizer, tmp_path
):
    """Σ over the micro-batch's tokens of −min(ρA, clip(ρ)A) + 0.3 · ½ max(…), over the rollout's tokens ÷ mini-batches.

    One mini-batch: all 15. Two: four completions more of two tokens each, (15 + 8) / 2 = 11.5.
    """
    trainer = trainer_of(
        tmp_path, str(model_folder()), tokenizer, kl_coef=0.0, vf_coef=0.3, max_steps=1, num_mini_batches=mini_batches
    )
    randomize_head(trainer)
    says(trainer, [*COMPLETIONS, *[[16, END]] * 4])
    trainer.current_gradient_accumulation_steps = 1
    rollout = roll(trainer, 4 * mini_batches)
    inputs = {key: value[:4] if value.dim() else value for key, value in rollout.items()}  # its first mini-batch
    torch.manual_seed(0)
    moved = {**inputs}  # as if the policy and the critic had moved since
    moved["old_per_token_logps"] = inputs["old_per_token_logps"] + 0.4 * torch.randn_like(
        inputs["old_per_token_logps"]
    )
    moved["values"] = inputs["values"] + 0.4 * torch.randn_like(inputs["values"])
    total = 0.0
    for row in range(4):
        for t in range(len(row_ids(inputs, row)[1])):
            ratio = math.exp(float(inputs["old_per_token_logps"][row, t] - moved["old_per_token_logps"][row, t]))
            a = float(inputs["advantages"][row, t])
            total += -min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
            value, old, target = (float(x[row, t]) for x in (inputs["values"], moved["values"], inputs["returns"]))
            cut = old + min(max(value - old, -0.2), 0.2)
            total += 0.3 * 0.5 * max((value - target) ** 2, (cut - target) ** 2)
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, moved)
    assert loss.item() == pytest.approx(total / tokens, rel=1e-4)
    assert trainer._metrics["train"]["val/clipfrac_avg"][0] > 0
    assert trainer._metrics["train"]["policy/clipfrac_avg"] == pytest.approx(
        trainer._metrics["train"]["clip_ratio/region_mean"]
    )


@pytest.mark.parametrize("lora", [False, True])
def test_the_first_micro_batchs_values_are_the_stored_ones(lora, model_folder, tokenizer, tmp_path):
    """Nothing has moved between the rollout and its first micro-batch: the two passes read the same."""
    trainer = trainer_of(tmp_path, str(model_folder()), tokenizer, lora=lora, max_steps=4)
    randomize_head(trainer)
    seen, compute = [], adv.value_losses

    def noted(values, old, returns, cliprange):
        seen.append((values.detach().clone(), old.clone(), returns))
        return compute(values, old, returns, cliprange)

    adv.value_losses = noted
    try:
        trainer.train()
    finally:
        adv.value_losses = compute
    assert len(seen) == 4  # two rollouts, twice each
    for first in (seen[0], seen[2]):
        torch.testing.assert_close(first[0], first[1], atol=1e-5, rtol=1e-5)
        assert first[0].std() > 0.01
    assert (seen[1][0] - seen[1][1]).abs().max() > 1e-3  # by the second pass it has learned


GROUPS = {"num_generations": 2, "steps_per_generation": None, "num_mini_batches": 2, "per_device_train_batch_size": 4}


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_without_a_critic_and_with_a_group_baseline_it_is_grpo(loss_type, model_folder, tokenizer, tmp_path):
    """γ = λ = 1, V = 0 and a reward R on the last token give A_t = R at every token; less the group's mean that is GRPO's
    advantage with `scale_rewards="none"`, spread over the tokens as GRPO does. The policy loss is TRL's own: the same update.

    RLOO's differs: its baseline leaves the completion itself out, which is G / (G − 1) times as much, its ratio is of whole
    sequences, and its KL, summed over the sequence, is charged to tokens that came before it.
    """
    from trl import GRPOConfig, GRPOTrainer

    shared = {"loss_type": loss_type, "num_generations": 2, "max_steps": 8, "gradient_accumulation_steps": 2}
    ours = trainer_of(
        tmp_path / "ppo", str(model_folder()), tokenizer, critic="none", group_baseline=True, whiten_advantages=False, lam=1.0,
        kl_coef=0.0, num_mini_batches=2, **shared,
    )  # fmt: skip
    ours_rollouts = rollouts_of(ours)
    ours.train()
    stock = {
        field: getattr(ours.args, field)
        for field in (
            "per_device_train_batch_size",
            "learning_rate",
            "logging_steps",
            "max_completion_length",
            "use_cpu",
            "bf16",
        )
    }
    args = GRPOConfig(
        str(tmp_path / "grpo"), **stock, **shared, steps_per_generation=4, num_iterations=2, scale_rewards="none",
        report_to="none", save_strategy="no", disable_tqdm=True, seed=3, lr_scheduler_type="constant",
    )  # fmt: skip
    theirs = GRPOTrainer(
        str(model_folder()), [by_length], args, Dataset.from_list(rows_of("GRPO")), processing_class=tokenizer
    )
    rollouts = rollouts_of(theirs)
    before = weights_of(theirs)
    theirs.train()
    assert len(rollouts) == len(ours_rollouts) == 2
    for one, other in zip(rollouts, ours_rollouts, strict=True):
        assert torch.equal(one["completion_ids"], other["completion_ids"])
        spread = one["advantages"][:, None] * one["completion_mask"]
        torch.testing.assert_close(other["advantages"], spread, atol=1e-5, rtol=0)
    after = weights_of(theirs)
    assert distance(before, after) > 1e-2
    assert distance(weights_of(ours), after) < 1e-5
    for key in ("grad_norm", "entropy", "reward"):
        assert logged(ours, key) == pytest.approx(logged(theirs, key), abs=1e-5)


def test_the_group_baseline_is_the_mean_of_those_that_were_judged(model_folder, tokenizer, tmp_path):
    """Rewards (4, none | 1, 3): baselines 4 and 2, advantages (0, none | −1, 1)."""

    def some(completion_ids, **kwargs):
        return [4.0, None, 1.0, 3.0]

    trainer = trainer_of(
        tmp_path, str(model_folder()), tokenizer, [some], critic="none", group_baseline=True, num_generations=2, lam=1.0,
        kl_coef=0.0, whiten_advantages=False,
    )  # fmt: skip
    says(trainer, COMPLETIONS)
    assert roll(trainer)["advantages"][:, 0].tolist() == pytest.approx([0, 0, -1, 1])
    assert adv.group_means(torch.tensor([math.nan, math.nan, 1.0, 2.0]), 2).tolist() == [0, 0, 1.5, 1.5]


def test_accumulation_leaves_the_update_as_it_is(model_folder, tokenizer, tmp_path):
    found = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        trainer = trainer_of(
            tmp_path / str(size), str(model_folder()), tokenizer, per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        randomize_head(trainer)
        says(trainer, COMPLETIONS)
        trainer.train()
        found.append(weights_of(trainer))
    assert distance(found[0], found[1]) < 1e-5
    assert distance(found[0], found[2]) < 1e-5


def test_a_detached_trunk_gets_nothing_from_the_value_loss(model_folder, tokenizer, tmp_path):
    def update(**changes):
        trainer = trainer_of(
            tmp_path,
            str(model_folder()),
            tokenizer,
            max_steps=1,
            max_grad_norm=0.0,
            optim="sgd",
            learning_rate=0.1,
            **changes,
        )
        randomize_head(trainer)
        says(trainer, COMPLETIONS)
        trainer.train()
        weights = weights_of(trainer)
        return {n: w for n, w in weights.items() if VALUE_HEAD not in n}, {
            n: w for n, w in weights.items() if VALUE_HEAD in n
        }

    trunk, head = update(vf_coef=5.0, detach_trunk=True)
    without, still = update(vf_coef=0.0)
    coupled, _ = update(vf_coef=5.0)
    assert distance(trunk, without) < 1e-6
    assert distance(coupled, without) > 1e-3
    assert distance(head, still) > 1e-3


# Rewards per token


def test_token_rewards_fall_on_their_tokens_and_mix_with_scores_of_the_whole(model_folder, tokenizer, tmp_path):
    def counted(completion_ids, **kwargs):  # the token's own id, so that every place is told apart
        return [[0.01 * token for token in ids] for ids in completion_ids]

    def sometimes(completion_ids, **kwargs):
        return [None if len(ids) < 3 else 1.0 for ids in completion_ids]

    trainer = trainer_of(
        tmp_path, str(model_folder()), tokenizer, [counted, sometimes], kl_coef=0.0, lam=1.0, reward_weights=[2.0, 10.0],
        whiten_advantages=False,
    )  # fmt: skip
    says(trainer, COMPLETIONS)
    found = rollouts_of(trainer)
    trainer.train()
    for row, ids in enumerate(COMPLETIONS):
        order = [row_ids(found[0], i)[1].tolist() for i in range(4)].index(ids)
        paid = [2.0 * 0.01 * token for token in ids]
        paid[-1] += 10.0 if len(ids) >= 3 else 0.0
        to_go = [sum(paid[t:]) for t in range(len(ids))]  # V = 0 at first, γ = λ = 1
        # Rows 1 and 3 were cut off, and judged as a whole: they end there.
        assert found[0]["advantages"][order, : len(ids)].tolist() == pytest.approx(to_go, abs=1e-5), row
    logs = trainer.state.log_history[0]
    assert logs["rewards/counted/mean"] == pytest.approx(sum(0.01 * sum(ids) for ids in COMPLETIONS) / 4, abs=1e-5)
    assert logs["returns/share/counted"] + logs["returns/share/sometimes"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "bootstraps"),
    [
        ({}, True),
        ({"bootstrap_truncated": False}, False),
        ({"missing_eos_penalty": 1.0}, False),
        ({"critic": "none"}, False),
    ],
)
def test_a_completion_that_was_cut_off_and_paid_per_token_goes_on_in_expectation(
    changes, bootstraps, model_folder, tokenizer, tmp_path
):
    """r = 0, γ = 1, λ = 0: A_{L−1} = V(s_L) − V(s_{L−1}) where V stands for the rest, −V(s_{L−1}) − penalty where it is over."""

    def nothing(completion_ids, **kwargs):
        return [[0.0] * len(ids) for ids in completion_ids]

    trainer = trainer_of(
        tmp_path, str(model_folder()), tokenizer, [nothing], kl_coef=0.0, lam=0.0, whiten_advantages=False, **changes
    )
    if "critic" not in changes:
        randomize_head(trainer)
    says(trainer, COMPLETIONS)
    output = roll(trainer)
    penalty = changes.get("missing_eos_penalty", 0.0)
    for row, ids in enumerate(COMPLETIONS):
        last = len(ids) - 1
        over = ids[-1] == END
        alone = output["advantages"][row, last] + output["values"][row, last]  # V(s_L) where it is used
        if bootstraps and not over:
            assert abs(float(alone)) > 1e-3
        else:
            assert float(alone) == pytest.approx(0.0 if over else -penalty, abs=1e-5)
    assert trainer._metrics["train"]["completions/bootstrapped_ratio"] == [0.5 if bootstraps else 0.0]


def test_a_reward_function_of_weight_0_is_only_logged(model_folder, tokenizer, tmp_path):
    """It judges whole completions, and all of them: V still stands for the rest of those cut off, and nobody judged the third."""

    def tokens(completion_ids, **kwargs):
        return [[0.1 * token for token in ids] if len(ids) != 2 else None for ids in completion_ids]

    def advantages(functions, weights):
        trainer = trainer_of(tmp_path, str(model_folder()), tokenizer, functions, reward_weights=weights)
        randomize_head(trainer)
        says(trainer, COMPLETIONS)
        return roll(trainer)["advantages"], trainer._metrics["train"]

    alone, _ = advantages([tokens], [1.0])
    found, logs = advantages([tokens, by_length], [1.0, 0.0])
    assert torch.equal(found, alone)
    assert logs["completions/bootstrapped_ratio"] == pytest.approx([2 / 3])  # of the three that were judged
    assert "rewards/by_length/mean" in logs


def test_reward_functions_whose_names_are_taken_are_told_apart(model_folder, tokenizer, tmp_path):
    def named(name, value):
        def function(completion_ids, **kwargs):
            return [value] * len(completion_ids)

        function.__name__ = name
        return function

    names = ["kl", "missing_eos", "r", "r", "r_2"]
    trainer = trainer_of(
        tmp_path, str(model_folder()), tokenizer, [named(name, 10.0**i) for i, name in enumerate(names)], lam=1.0,
        missing_eos_penalty=0.5, whiten_advantages=False,
    )  # fmt: skip
    says(trainer, COMPLETIONS)
    output = roll(trainer)
    # V = 0 and the policy is its own reference: what is paid from the first token on is the sum, less the penalty if cut off.
    assert output["advantages"][:, 0].tolist() == pytest.approx([11111, 11110.5, 11111, 11110.5])
    shares = [key.split("/")[-1] for key in trainer._metrics["train"] if key.startswith("returns/share/")]
    assert sorted(shares) == sorted(["kl", "missing_eos", "kl_0", "missing_eos_1", "r_2_2", "r_3", "r_2"])


class Noted(ConceptReward):
    def __call__(self, completion_ids, **kwargs):
        self.returned = super().__call__(completion_ids, **kwargs)
        return self.returned


def scores_alone(reference, readout, prompt, completion):
    """The readout's calibrated score at every token of one row, (P + L,), by `read()` on that row alone."""
    found = read(reference, TokenBatch.from_ids([prompt.tolist()], [completion.tolist()]), [readout])[readout.name]
    return readout.scale * found.scores[0, :, 0] + readout.offset


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["score", "share", "ema", "potential", "penalty"])
def test_a_dense_concept_reward_pays_each_token_for_itself(kind, lora, load, model_folder, tokenizer, tmp_path):
    if lora and kind != "score":
        pytest.skip("the reading is the same")
    base = make_readout(load())
    readout = Readout(base.name, base.hook_point, base.weight, base.bias, scale=2.0, offset=0.5)
    options = {"potential": {"shaping": True}, "penalty": {"dense": True, "role": "penalty"}}.get(
        kind, {"dense": kind}
    )
    reward = Noted(readout, **options)
    trainer = trainer_of(tmp_path, str(model_folder()), tokenizer, [reward], lora=lora, kl_coef=0.05, gamma=0.9)
    attachment = attach(trainer)
    says(trainer, COMPLETIONS)
    output = roll(trainer)
    assert output["prompt_mask"].min() == 0
    assert attachment.rollout.own_forwards == 0  # read in the reference's own pass
    reference = load()
    for row, ids in enumerate(COMPLETIONS):
        prompt, completion = row_ids(output, row)
        assert completion.tolist() == ids
        scores = scores_alone(reference, readout, prompt, completion)
        own = scores[len(prompt) :].tolist()
        count = len([token for token in ids if token != END])
        if kind == "potential":
            expected = [float(scores[len(prompt) - 1]), *own[:count]]
        elif kind == "ema":
            # e_t = Σ_k α(1−α)^k s_{t−k} / (1 − (1−α)^{t+1}), α = 2/17; paid are its steps, so that they add up to where it ends.
            alpha = 2 / 17
            levels = [
                sum(alpha * (1 - alpha) ** k * own[t - k] for k in range(t + 1)) / (1 - (1 - alpha) ** (t + 1))
                for t in range(count)
            ]
            expected = [b - a for a, b in zip([0.0, *levels], levels, strict=False)]
        else:
            factor = {"share": 1 / count, "penalty": -1.0}.get(kind, 1.0)
            expected = [factor * value for value in own[:count]]
        found = reward.returned[row]
        assert found[: len(expected)] == pytest.approx(expected, abs=1e-4)
        assert found[len(expected) :] == [0.0] * (len(ids) + (kind == "potential") - len(expected))  # end-of-turn


def test_the_mean_pooled_reward_is_the_sum_of_its_shares(load, model_folder, tokenizer, tmp_path):
    readout = make_readout(load())
    dense, whole = Noted(readout, dense="share"), Noted(make_readout(load(), "whole"))
    trainer = trainer_of(tmp_path, str(model_folder()), tokenizer, [dense, whole])
    attach(trainer)
    says(trainer, COMPLETIONS)
    trainer.train()
    assert [sum(own) for own in dense.returned] == pytest.approx(whole.returned, abs=1e-4)
    first = trainer.state.log_history[0]
    assert first["rewards/concept/mean"] == pytest.approx(first["rewards/whole/mean"], abs=1e-4)


def test_shaping_on_the_trainer_pays_differences_and_ends_at_0(load, model_folder, tokenizer, tmp_path):
    """λ = 0 and V = 0: A_t = F_t = γΦ(s_{t+1}) − Φ(s_t), Φ(s_L) = 0 where the completion ended, real where it was cut off."""
    reward = Noted(make_readout(load()), shaping=True)
    trainer = trainer_of(
        tmp_path, str(model_folder()), tokenizer, [reward], kl_coef=0.0, gamma=0.9, lam=0.0, whiten_advantages=False
    )
    attach(trainer, reference=load())
    says(trainer, COMPLETIONS)
    output = roll(trainer)
    for row, ids in enumerate(COMPLETIONS):
        potentials = list(reward.returned[row])
        if ids[-1] == END:
            potentials[-1] = 0.0
        expected = [0.9 * potentials[t + 1] - potentials[t] for t in range(len(ids))]
        assert output["advantages"][row, : len(ids)].tolist() == pytest.approx(expected, abs=1e-4)


def test_the_sham_of_a_dense_reward_deals_the_same_numbers_to_other_tokens(load, model_folder, tokenizer, tmp_path):
    real, sham = (
        Noted(make_readout(load()), dense=True),
        Noted(make_readout(load(), "sham"), dense=True, sham="shuffle"),
    )
    trainer = trainer_of(tmp_path, str(model_folder()), tokenizer, [real, sham])
    attach(trainer)
    says(trainer, COMPLETIONS)
    trainer.train()
    flat = [[value for own in reward.returned for value in own] for reward in (real, sham)]
    assert flat[0] != flat[1]
    assert sorted(flat[0]) == pytest.approx(sorted(flat[1]))


def test_a_card_gives_a_dense_reward_and_grpo_refuses_it(load, tokenizer, tmp_path):
    from training import make_trainer

    model = load()
    card = make_card(tmp_path, model, tokenizer)
    reward = ConceptReward.from_card(card, dense="share")
    assert reward.per_token == "share"
    trainer = make_trainer("GRPO", model, tokenizer, tmp_path / "out", lora={})
    trainer.reward_funcs.append(reward)
    with pytest.raises(ValueError, match=r"`warmth` rewards single tokens .* `GRPOTrainer` – expected a `PPOTrainer`"):
        attach(trainer)
    with pytest.raises(
        ValueError, match="`dense` is 'tokens' – expected True, False or one of `score`, `share`, `ema`"
    ):
        ConceptReward.from_card(card, dense="tokens")
    with pytest.raises(ValueError, match="`dense` is `ema` and `shaping` True – expected one"):
        ConceptReward.from_card(card, dense="ema", shaping=True)


def test_rewards_are_normalized_by_the_running_deviation_cut_and_whitened(model_folder, tokenizer, tmp_path):
    """Totals 1, 2, 3, 4 deviate by √(5/3): normalized and cut to 2.5 they are 0.775, 1.549, 2.324, 2.5."""

    def numbered(completion_ids, **kwargs):
        return [1.0, 2.0, 3.0, 4.0]

    def advantages(**changes):
        trainer = trainer_of(
            tmp_path,
            str(model_folder()),
            tokenizer,
            [numbered],
            kl_coef=0.0,
            lam=1.0,
            whiten_advantages=False,
            **changes,
        )
        says(trainer, COMPLETIONS)
        return roll(trainer)["advantages"][:, 0]

    deviation = (5 / 3) ** 0.5
    assert advantages(normalize_rewards=True, reward_clip=2.5).tolist() == pytest.approx(
        [1 / deviation, 2 / deviation, 3 / deviation, 2.5], abs=1e-4
    )
    # Whitening is over tokens: of the 15, four are 1, 2, 3, 4, and the others 0: unbiased variance (30 − 100/15) / 14 = 5/3.
    assert advantages(whiten_rewards=True).tolist() == pytest.approx([k / deviation for k in (1, 2, 3, 4)], abs=1e-4)


def numbered(completion_ids, **kwargs):
    return [1.0, None, 3.0, 4.0]


@pytest.mark.parametrize(
    ("changes", "judged"),
    [
        ({}, [1.0, 3.0, 4.0]),
        ({"mask_truncated_completions": True}, [1.0, 3.0]),
    ],  # the second and the fourth are cut off
)
def test_what_nobody_judged_or_is_masked_is_in_no_average(changes, judged, model_folder, tokenizer, tmp_path):
    trainer = trainer_of(
        tmp_path, str(model_folder()), tokenizer, [numbered], normalize_rewards=True, kl_coef=0.0, **changes
    )
    says(trainer, COMPLETIONS)
    roll(trainer)
    running = trainer._carried.running
    assert (running.count, running.mean) == (len(judged), pytest.approx(sum(judged) / len(judged)))
    mean = sum(judged) / len(judged) / running.std
    assert trainer._metrics["train"]["objective/scores"] == pytest.approx([mean])


def test_evaluation_leaves_the_running_deviation_alone(model_folder, tokenizer, tmp_path):
    trainer = trainer_of(
        tmp_path, str(model_folder()), tokenizer, normalize_rewards=True, per_device_eval_batch_size=4
    )
    trainer.train()
    before = trainer._carried.running.state()
    assert before["count"] == 4
    trainer.evaluate(Dataset.from_list(rows_of("GRPO", 4, seed=9)))
    assert trainer._carried.running.state() == before


# Saving and resuming


@pytest.mark.parametrize(("lora", "critic"), [(False, "head"), (True, "head"), (False, "model"), (True, "model")])
def test_a_resumed_run_repeats_the_whole_one_and_the_export_is_bare(
    lora, critic, load, model_folder, tokenizer, tmp_path
):
    from transformers import AutoModelForCausalLM

    def run(folder, resume=None):
        trainer = trainer_of(
            folder, str(model_folder()), tokenizer, lora=lora, critic=critic, max_steps=8, save_strategy="steps", save_steps=4,
            num_mini_batches=2, per_device_train_batch_size=2, normalize_rewards=True, value_learning_rate=5e-2,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-4"))
    assert distance(weights_of(whole), weights_of(resumed)) == 0.0
    shown = ("loss", "reward", "val/explained_variance", "loss/value_avg")
    for key in shown:
        assert logged(whole, key)[-2:] == pytest.approx(logged(resumed, key)[-2:], nan_ok=True)
    assert resumed._carried == whole._carried
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    assert any(VALUE_HEAD in key for key in load_file(tmp_path / "whole" / "checkpoint-8" / name))
    whole.save_model(str(tmp_path / "bare"))
    assert not any(VALUE_HEAD in key for key in load_file(tmp_path / "bare" / name))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = whole.model(input_ids=ids, use_cache=False).logits
        if lora:
            from peft import PeftModel

            loaded = PeftModel.from_pretrained(load(), tmp_path / "bare")
        else:
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "bare", dtype=torch.float32)
        torch.testing.assert_close(loaded(input_ids=ids, use_cache=False).logits, expected)
    assert any(
        VALUE_HEAD in name for name in dict(whole.model.named_parameters())
    )  # and it is still there to go on with


@pytest.mark.parametrize("critic", ["head", "model"])
def test_the_value_function_has_its_own_learning_rate(critic, model_folder, tokenizer, tmp_path):
    def built(**changes):
        trainer = trainer_of(
            tmp_path, str(model_folder()), tokenizer, critic=critic, weight_decay=0.1, max_steps=1, **changes
        )
        trainer.train()
        named = {id(p): name for name, p in trainer.model.named_parameters()}
        groups = trainer.optimizer.param_groups
        return trainer, {named[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}

    trainer, found = built(value_learning_rate=0.5)
    _, plain = built()
    assert {name: rate for name, (rate, _) in found.items()} == {
        name: 0.5 if VALUE_HEAD in name else 1e-2 for name in plain
    }
    assert {name: decay for name, (_, decay) in found.items()} == {name: decay for name, (_, decay) in plain.items()}
    assert {decay for name, (_, decay) in found.items() if VALUE_HEAD in name} == {0.0, 0.1}
    weight, _ = head_of(trainer)
    assert weight.abs().max() == pytest.approx(0.5, rel=1e-3)  # Adam's first step is the learning rate


def test_an_optimizer_that_was_given_trains_the_value_head_too(load, tokenizer, tmp_path):
    def built(scheduled=False, **changes):
        model = load()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0) if scheduled else None
        return PPOTrainer(
            model, [by_length], config(tmp_path, **changes), Dataset.from_list(rows_of("GRPO")), processing_class=tokenizer,
            optimizers=(optimizer, scheduler),
        )  # fmt: skip

    trainer = built(value_learning_rate=0.5)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-2, 0.5]
    before = weights_of(trainer)
    trainer.train()
    after = weights_of(trainer)
    for own in (True, False):
        names = [name for name in before if (VALUE_HEAD in name) == own]
        assert distance({name: before[name] for name in names}, after) > 1e-4
    assert built().optimizer.param_groups[1]["lr"] == 1e-2
    with pytest.raises(ValueError, match=r"an optimizer and a scheduler – expected no scheduler"):
        built(scheduled=True)
    assert len(built(scheduled=True, critic="none").optimizer.param_groups) == 1


# What generates


@pytest.mark.parametrize(
    "changes", [{"generation_kwargs": {"use_cache": False}}, {"use_transformers_continuous_batching": True}]
)
def test_steps_of_generation_without_a_cache_are_no_scoring_passes(changes, model_folder, tokenizer, tmp_path):
    trainer = trainer_of(tmp_path, str(model_folder()), tokenizer, **changes)
    randomize_head(trainer)
    trainer.train()
    assert logged(trainer, "values/std")[0] > 0.01


@pytest.mark.parametrize("lora", [False, True])
def test_vllm_is_sent_the_policy_without_its_value_head(lora, load, model_folder, tokenizer, tmp_path, monkeypatch):
    """vLLM knows the names of the bare model, and refuses others."""
    from trl.generation.vllm_generation import VLLMGeneration

    class WithoutAnEngine(VLLMGeneration):
        def _init_vllm(self):
            pass

    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", WithoutAnEngine)
    trainer = trainer_of(
        tmp_path, str(model_folder()), tokenizer, lora=lora, use_vllm=True, vllm_mode="colocate", critic="model"
    )
    sent = {name for name, _ in trainer.vllm_generation._iter_named_params()}
    assert sent == {name for name, _ in load().named_parameters()}


def test_stop_tokens_of_the_generation_config_end_a_completion(load, tokenizer, tmp_path):
    model = load()
    stops = list(range(0, model.config.vocab_size, 3))
    model.generation_config.eos_token_id = stops
    trainer = trainer_of(tmp_path, model, tokenizer)
    output = roll(trainer)
    found = [row_ids(output, row)[1].tolist() for row in range(4)]
    assert any(len(ids) < 6 for ids in found)
    for ids in found:
        assert not set(ids[:-1]) & set(stops)
        assert ids[-1] in stops or len(ids) == 6
    assert truncated_rows(trainer, found).tolist() == [ids[-1] not in stops for ids in found]


def test_the_processing_class_is_of_the_models_revision(model_folder, tokenizer, tmp_path, monkeypatch):
    from transformers import AutoProcessor

    asked, load_it = [], AutoProcessor.from_pretrained

    def noted(path, revision=None, **kwargs):
        asked.append(revision)
        return load_it(path, **kwargs)

    folder = str(model_folder())
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", noted)
    trainer = trainer_of(tmp_path, folder, None, model_init_kwargs={"revision": "v2"})
    assert asked == ["v2"]
    assert trainer._tokenizer.padding_side == "left"


def test_a_run_trains_evaluates_and_reports(load, model_folder, tokenizer, tmp_path):
    from interp_rlhf.report import write_report

    trainer = trainer_of(
        tmp_path, str(model_folder()), tokenizer, [Noted(make_readout(load()), dense=True)], rows=rows_of("GRPO", 16),
        max_steps=6, samples_every=2, per_device_eval_batch_size=4, value_learning_rate=0.1,
    )  # fmt: skip
    attach(trainer, monitors=[make_readout(load(), "watched", seed=4)])
    trainer.train()
    found = trainer.evaluate(Dataset.from_list(rows_of("GRPO", 4, seed=9)))
    assert math.isfinite(found["eval_reward"])
    logs = trainer.state.log_history[0]
    for key in (
        "objective/kl", "objective/scores", "objective/rlhf_reward", "policy/approxkl_avg", "policy/clipfrac_avg",
        "loss/value_avg", "loss/policy_avg", "val/clipfrac_avg", "val/explained_variance", "returns/mean", "returns/std",
        "values/mean", "kl", "entropy", "completions/mean_length", "returns/share/concept", "interp/watched/mean_score",
    ):  # fmt: skip
        assert key in logs, key
    assert "frac_reward_zero_std" not in logs
    events = read_run_log(tmp_path / "interp.jsonl")
    samples = [event for event in events if event["event"] == "samples"]
    assert [event["step"] for event in samples] == [0, 4]  # rollouts 0 and 2, of two optimizer steps each
    row = samples[0]["rows"][0]
    assert set(row["tokens"]["scores"]) == {"reward", "value", "advantage"}
    assert {len(values) for values in row["tokens"]["scores"].values()} == {len(row["tokens"]["pieces"])}
    assert sum(row["tokens"]["scores"]["reward"]) == pytest.approx(
        row["scores"]["reward: concept"], abs=1e-4
    )  # KL is 0 yet
    assert "watched" in row["scores"]
    assert [event["title"] for event in events if event["event"] == "table"] == ["Tokens of one completion"] * 2
    write_report([tmp_path], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Tokens of one completion" in page
    assert "Tokens are coloured by <strong>reward</strong>" in page


def test_the_sample_table_shows_what_was_paid(load, model_folder, tokenizer, tmp_path):
    """Of potentials the differences, weighted: they are not the potentials' sum. None where a function said nothing."""

    def sometimes(completion_ids, **kwargs):
        return [None if len(ids) < 3 else 1.0 for ids in completion_ids]

    trainer = trainer_of(
        tmp_path, str(model_folder()), tokenizer, [Noted(make_readout(load()), shaping=True), sometimes], kl_coef=0.0,
        reward_weights=[2.0, 3.0], gamma=0.9,
    )  # fmt: skip
    attach(trainer, reference=load())
    says(trainer, COMPLETIONS)
    trainer.train()
    (event,) = [event for event in read_run_log(tmp_path / "interp.jsonl") if event["event"] == "samples"]
    assert len(event["rows"]) == 4
    for row in event["rows"]:
        said = row["scores"]["reward: sometimes"]
        assert said == (None if len(row["tokens"]["pieces"]) < 3 else 3.0)
        paid = sum(row["tokens"]["scores"]["reward"])
        assert row["scores"]["reward: concept"] + (said or 0.0) == pytest.approx(paid, abs=1e-4)


def test_explained_variance_rises_where_the_reward_can_be_foreseen(model_folder, tokenizer, tmp_path):
    """The reward is of the prompt alone: a critic that learns explains it, and only it moves (the policy's rate is 0)."""

    def by_prompt(prompts, **kwargs):
        return [float(len(prompt[0]["content"]) % 5) for prompt in prompts]

    trainer = trainer_of(
        tmp_path, str(model_folder()), tokenizer, [by_prompt], kl_coef=0.0, per_device_train_batch_size=8, max_steps=80,
        learning_rate=0.0, value_learning_rate=3e-3, cliprange_value=None, vf_coef=1.0, lam=1.0, critic="model", logging_steps=2,
    )  # fmt: skip
    before = weights_of(trainer)
    trainer.train()
    explained = logged(trainer, "val/explained_variance")
    assert explained[0] == pytest.approx(0, abs=1e-5)
    assert explained[-1] > 0.7
    after = weights_of(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before if VALUE_HEAD not in name)


ENGINES = {
    "ddp": ("MULTI_CPU", "DistributedDataParallel"),
    "zero2": ("DEEPSPEED", "DeepSpeedEngine"),
    "zero3": ("DEEPSPEED", "DeepSpeedEngine"),
    "fsdp2": ("FSDP", "FSDP"),
}
# TRL averages these over processes, each process's mean counting alike: the same only where ranks hold as many tokens.
OF_RANKS = ("clip_ratio/low_min", "clip_ratio/high_max", "loss", "grad_norm")


KINDS = ("full", "lora", "full_model", "lora_model")  # with a value model of its own in the last two


def launched(engine, model, out):
    """Results and weights of `engines/ppo.py` on an engine, which is started once for all kinds."""
    out.mkdir()
    command = compare.command(engine, ROOT / "tests" / "engines" / "ppo.py", str(model), str(out), *KINDS)
    done = subprocess.run(command, capture_output=True, text=True, env=compare.environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        kind: (json.loads((out / kind / "result.json").read_text()), load_file(out / kind / "weights.safetensors"))
        for kind in KINDS
    }


@pytest.fixture(scope="module")
def on_engines(model_folder, tmp_path_factory):
    """Results and weights by engine and kind."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("engines")
    return {engine: launched(engine, model_folder(), folder / engine) for engine in ("single", *ENGINES)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_engine_makes_the_step_of_one_process(kind, on_engines, model_folder):
    alone, expected = on_engines["single"][kind]
    assert (alone["processes"], alone["model"][-16:]) == (
        1,
        "ModelForCausalLM" if "lora" in kind else "LlamaForCausalLM",
    )
    start = load_file(model_folder() / "model.safetensors")
    if "full" in kind:
        assert max(float((expected[n] - w).abs().max()) for n, w in start.items() if n in expected) > 1e-3
    for engine, (kind_of_engine, model_class) in ENGINES.items():
        found, weights = on_engines[engine][kind]
        assert (found["engine"], found["processes"]) == (kind_of_engine, 2)
        assert found["model"].startswith(model_class)
        weights = {name.removeprefix("module."): weight for name, weight in weights.items()}
        trained = [name for name in expected if "full" in kind or "lora_" in name or "modules_to_save" in name]
        assert any(VALUE_HEAD in name for name in trained)
        worst = max(float((weights[name] - expected[name]).abs().max()) for name in trained)
        assert worst < 1e-4, engine
        assert found["exported"] == alone["exported"]
        assert not any(VALUE_HEAD in name for name in found["exported"])
        for one, other in zip(alone["history"], found["history"], strict=True):
            for key in one:
                if key.split("/")[0] in (
                    "returns",
                    "values",
                    "advantages",
                    "val",
                    "policy",
                    "objective",
                    "loss",
                    "kl",
                    "rewards",
                ):
                    assert other[key] == pytest.approx(one[key], abs=1e-4, nan_ok=True) or key in OF_RANKS, (
                        engine,
                        key,
                    )


# What is refused


def wrong_count(completion_ids, **kwargs):
    return [[0.0] * (len(ids) - 1) for ids in completion_ids]


def not_a_number(completion_ids, **kwargs):
    return [float("nan")] * len(completion_ids)


def infinite_token(completion_ids, **kwargs):
    return [[float("inf")] * len(ids) for ids in completion_ids]


class BadPotential:
    __name__ = "potential"
    shaping = True

    def __call__(self, completion_ids, **kwargs):
        return [[0.0] * len(ids) for ids in completion_ids]


def too_few(completion_ids, **kwargs):
    return [0.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            wrong_count,
            r"`wrong_count` returned 3 token rewards for completion 0 – expected 4: one per completion token",
        ),
        (not_a_number, r"`not_a_number` returned nan for completion 0 – expected a finite number. Return `None`"),
        (infinite_token, r"`infinite_token` returned inf for completion 0"),
        (BadPotential(), r"`potential` returned 4 potentials for completion 0 – expected 5: one for the prompt"),
        (too_few, r"returned 1 rewards, but 4 were expected"),
    ],
)
def test_a_broken_reward_stops_the_run(function, message, model_folder, tokenizer, tmp_path):
    trainer = trainer_of(tmp_path, str(model_folder()), tokenizer, [function])
    says(trainer, COMPLETIONS)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_completion_that_nobody_judged_teaches_nothing(model_folder, tokenizer, tmp_path):
    def only_long(completion_ids, **kwargs):
        return [None if len(ids) < 3 else 1.0 for ids in completion_ids]

    trainer = trainer_of(tmp_path, str(model_folder()), tokenizer, [only_long])
    randomize_head(trainer)
    says(trainer, COMPLETIONS)
    output = roll(trainer)
    assert not output["advantages"][2].any()
    assert not output["value_mask"][2].any()
    assert output["value_mask"].sum() == 13


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": None}, "`gamma` is None – expected a number from 0 to 1"),
        ({"num_ppo_epochs": None}, "`num_ppo_epochs` is None – expected a whole number"),
        ({"kl_coef": None, "cliprange": None}, "`cliprange` is None .*`kl_coef` is None"),
        ({"sample_rows": -1}, "`sample_rows` is -1 – expected a whole number of at least 0"),
        (
            {"critic": "none", "vf_coef": 0.5},
            "`vf_coef` is 0.5 and `critic` `none` – expected 0.1: there is no value function",
        ),
        ({"critic": "none", "value_learning_rate": 0.5}, "`value_learning_rate` is 0.5 and `critic` `none`"),
        (
            {"critic": "model", "detach_trunk": True},
            "`detach_trunk` is True and `critic` `model` – expected False: .* no trunk",
        ),
        ({"sync_ref_model": True}, "`sync_ref_model` is True and `critic` `head` – expected False"),
        (
            {"missing_eos_penalty": 1.0, "mask_truncated_completions": True},
            "`missing_eos_penalty` is 1.0 and `mask_truncated_completions` True – expected one",
        ),
        (
            {"generation_kwargs": {"eos_token_id": 9}},
            "`eos_token_id` – expected none: .*`model.generation_config.eos_token_id`",
        ),
        (
            {"critic": "none", "group_baseline": True, "num_generations": 2},
            "`group_baseline` is True and `lam` 0.95 – expected `lam: 1`",
        ),
        ({"gamma": 1.5}, "`gamma` is 1.5 – expected a number from 0 to 1"),
        ({"lam": -0.1, "vf_coef": -1.0}, "`lam` is -0.1 .*`vf_coef` is -1.0"),
        ({"missing_eos_penalty": -1.0}, "`missing_eos_penalty` is -1.0 – expected a number above 0"),
        ({"num_ppo_epochs": 0}, "`num_ppo_epochs` is 0"),
        ({"num_generations": 0}, "`num_generations` is 0 – expected a whole number of at least 1"),
        ({"critic": "tail"}, "`critic` is 'tail' – expected one of `head`, `model`, `none`"),
        ({"group_baseline": True}, "`group_baseline` is True .*expected `critic: none` and at least 2"),
        ({"beta": 0.1}, "`beta` is 0.1 and `kl_coef` 0.05 – expected `kl_coef` alone: the KL is in the reward"),
        ({"num_iterations": 3}, "`num_iterations` is 3 and `num_ppo_epochs` 2 – expected `num_ppo_epochs` alone"),
        ({"epsilon": 0.3}, "`epsilon` is 0.3 and `cliprange` 0.2"),
        ({"scale_rewards": "batch"}, "`scale_rewards` is 'batch' – expected .* in PPO: there are no groups"),
        ({"loss_type": "cispo"}, "`loss_type` is 'cispo'"),
        ({"importance_sampling_level": "sequence"}, "advantages are per token"),
        ({"per_device_train_batch_size": 1}, "is 1 – expected a rollout of at least 2 completions"),
        (
            {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
            "`steps_per_generation` is 3 and `gradient_acc",
        ),
        ({"steps_per_generation": 4, "num_mini_batches": 2}, "`num_mini_batches` is 2 and the rollout is 4 times"),
        ({"num_generations": 3}, r"must be divisible by num_generations \(3\)"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_what_grpo_forbids_or_does_twice_is_settled_in_the_configuration(tmp_path):
    found = config(
        tmp_path, num_ppo_epochs=3, num_mini_batches=2, gradient_accumulation_steps=2, kl_coef=0.07, cliprange=0.1
    )
    assert (found.num_generations, found.num_generations_eval) == (1, 1)
    assert (found.num_iterations, found.steps_per_generation, found.generation_batch_size) == (3, 4, 16)
    assert (found.beta, found.epsilon, found.scale_rewards) == (0.07, 0.1, "none")
    assert config(tmp_path, steps_per_generation=3).num_mini_batches == 3
    assert config(tmp_path, generation_batch_size=8).num_mini_batches == 2
    assert config(tmp_path, num_generations=2).num_generations == 2
    assert config(tmp_path, per_device_train_batch_size=3).generation_batch_size == 3


def test_data_adapters_and_saves_that_cannot_work_are_refused(load, model_folder, tokenizer, tmp_path):
    from peft import PromptTuningConfig
    from tiny import with_lora
    from trl import GRPOConfig

    folder = str(model_folder())
    with pytest.raises(
        ValueError, match=r"`train_dataset` has 3 prompts – expected at least 4, .* would train 0 steps"
    ):
        trainer_of(tmp_path, folder, tokenizer, rows=rows_of("GRPO", 3))
    with pytest.raises(ValueError, match=r"`save_steps` is 3 – expected a multiple of 2 .*save_steps=4"):
        trainer_of(tmp_path, folder, tokenizer, save_strategy="steps", save_steps=3)
    with pytest.raises(ValueError, match="`model` is a `PeftModel` – expected the base model and a `peft_config`"):
        trainer_of(tmp_path, with_lora(load()), tokenizer)
    data = Dataset.from_list(rows_of("GRPO"))
    with pytest.raises(ValueError, match="`args` is a `GRPOConfig` – expected a `PPOConfig`"):
        PPOTrainer(folder, [by_length], GRPOConfig(str(tmp_path), use_cpu=True, bf16=False), data)
    with pytest.raises(ValueError, match="`tools` is set – expected none in PPO"):
        PPOTrainer(folder, [by_length], config(tmp_path), data, processing_class=tokenizer, tools=[by_length])
    with pytest.raises(TypeError, match="got `reward_model`"):
        PPOTrainer(folder, [by_length], config(tmp_path), data, processing_class=tokenizer, reward_model="x")
    prompt_learning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="of prompt learning – expected adapters"):
        PPOTrainer(
            folder, [by_length], config(tmp_path), data, processing_class=tokenizer, peft_config=prompt_learning
        )
    model = load()
    trainer_of(tmp_path, model, tokenizer)
    with pytest.raises(ValueError, match="has a `value_head` already"):
        trainer_of(tmp_path, model, tokenizer)


def test_a_run_that_made_no_step_is_an_error(model_folder, tokenizer, tmp_path):
    """The length of an iterable data set is not known beforehand."""
    from datasets import IterableDataset

    rows = rows_of("GRPO", 3)
    trainer = PPOTrainer(
        str(model_folder()), [by_length], config(tmp_path), IterableDataset.from_generator(lambda: iter(rows)),
        processing_class=tokenizer,
    )  # fmt: skip
    with pytest.raises(ValueError, match="made 0 steps: `train_dataset` gave no whole rollout of 4 completions"):
        trainer.train()


@pytest.mark.parametrize("lora", [False, True])
def test_terms_read_the_reference_that_the_trainer_runs_and_no_other(lora, load, model_folder, tokenizer, tmp_path):
    from training import make_trainer

    from interp_rlhf import DriftPenalty, Subspace

    term = DriftPenalty(subspace=Subspace.from_readouts([make_readout(load())]), weight=1.0)
    ppo = trainer_of(tmp_path / "ppo", str(model_folder()), tokenizer, lora=lora)
    grpo = make_trainer("GRPO", load(), tokenizer, tmp_path / "grpo", lora={} if lora else None, beta=0.05)
    for trainer, name in ((ppo, "kl_coef"), (grpo, "beta")):
        with pytest.raises(ValueError, match=rf"`reference` is given with .* expected none: .*`{name}` above 0"):
            attach(trainer, regularizers=[term], reference=load())
        attach(trainer, regularizers=[term], reference=trainer.ref_model)
    ppo.train()
    assert logged(ppo, f"interp/{term.name}/loss")
    without = trainer_of(tmp_path / "0", str(model_folder()), tokenizer, kl_coef=0.0)
    with pytest.raises(ValueError, match=r"`kl_coef` is 0 – .*Set `kl_coef`"):
        attach(without, regularizers=[term])


def test_a_run_inside_a_rollout_is_not_resumed(model_folder, tokenizer, tmp_path):
    trainer = trainer_of(tmp_path, str(model_folder()), tokenizer, max_steps=3, save_strategy="steps", save_steps=2)
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    state["global_step"] = 3
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
    again = trainer_of(tmp_path, str(model_folder()), tokenizer, max_steps=8, save_strategy="steps", save_steps=2)
    with pytest.raises(
        ValueError, match="to go on from step 3 – expected a step after which no generated batch is half used"
    ):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_every_family_has_a_critic(family, load, model_folder, tokenizer, tmp_path):
    trainer = trainer_of(tmp_path, str(model_folder(family)), tokenizer, max_steps=2)
    randomize_head(trainer)
    trainer.train()
    assert logged(trainer, "values/std")[0] > 0.01
