"""PPO: what a run refuses before it starts, and what stops it."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from ppo_runs import (
    COMPLETIONS,
    by_length,
    config,
    randomize_head,
    roll,
    says,
    trainer_of,
)
from tiny import make_readout
from training import logged, rows_of

from interp_rlhf import PPOTrainer, attach


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
