"""PPO: saving, resuming, and optimizers."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from ppo_runs import (
    by_length,
    config,
    head_of,
    trainer_of,
)
from safetensors.torch import load_file
from training import distance, logged, rows_of, weights_of

from interp_rlhf import PPOTrainer
from interp_rlhf.training.ppo.critic import VALUE_HEAD


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
