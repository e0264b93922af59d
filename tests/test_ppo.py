"""PPO on real trainers, with every completion that can be told apart, and on every engine."""

from __future__ import annotations

import json
import math
import subprocess

import pytest
import torch
from datasets import Dataset
from engines import compare
from ppo_runs import (
    COMPLETIONS,
    END,
    ROOT,
    Noted,
    by_length,
    head_of,
    randomize_head,
    roll,
    rollouts_of,
    row_ids,
    says,
    trainer_of,
)
from safetensors.torch import load_file
from tiny import make_readout
from training import activations_by_hand, distance, logged, rows_of, weights_of

from interp_rlhf import attach
from interp_rlhf.activations import decoder_layers
from interp_rlhf.runlog.log import read_run_log
from interp_rlhf.training.ppo import advantages as adv
from interp_rlhf.training.ppo.critic import VALUE_HEAD
from interp_rlhf.training.ppo.estimates import truncated_rows


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
