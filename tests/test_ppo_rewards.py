"""PPO: rewards at single tokens, and what they mix with."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from ppo_runs import (
    COMPLETIONS,
    END,
    Noted,
    by_length,
    randomize_head,
    roll,
    rollouts_of,
    row_ids,
    says,
    trainer_of,
)
from tiny import make_card, make_readout
from training import rows_of

from interp_rlhf import ConceptReward, Readout, attach
from interp_rlhf.activations import TokenBatch, read


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
