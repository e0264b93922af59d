"""The drift callback on TRL's and on plain transformers trainers."""

from __future__ import annotations

import logging

import pytest
from datasets import Dataset
from tiny import labelled_rows, make_card, make_readout, sentences

from interp_rlhf import DriftCallback, DriftConfig, attach, load_examples
from interp_rlhf.concepts.examples import write_jsonl
from interp_rlhf.runlog.log import read_run_log


def plain_trainer(tmp_path, model, tokenizer, **changes):
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    rows = Dataset.from_list([dict(tokenizer(text)) for text in sentences(32)])
    settings = {
        "output_dir": str(tmp_path / "out"), "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 2,
        "learning_rate": 1e-2, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return Trainer(
        model, TrainingArguments(**{**settings, **changes}), train_dataset=rows, processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )  # fmt: skip


def sft_trainer(tmp_path, model, tokenizer, **changes):
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"prompt": r["prompt"], "completion": [{"role": "assistant", "content": r["completion"]}]}
                              for r in labelled_rows(16)])  # fmt: skip
    settings = {
        "output_dir": str(tmp_path / "out"), "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 2,
        "learning_rate": 1e-2, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True,
    }  # fmt: skip
    return SFTTrainer(model, args=SFTConfig(**{**settings, **changes}), train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize("make", [plain_trainer, sft_trainer])
def test_drift_reaches_log_history_and_run_log_at_its_own_steps(make, tmp_path, load, tokenizer):
    write_jsonl(labelled_rows(10), tmp_path / "labelled.jsonl")
    model = load()
    card = make_card(tmp_path, model, tokenizer, role="monitor", evidence=False)
    trainer = make(tmp_path, model, tokenizer)
    trainer.add_callback(
        DriftCallback(trainer, texts=sentences(8), monitors=[card], labelled=tmp_path / "labelled.jsonl", every=3)
    )
    trainer.train()
    rows = {row["step"]: row for row in trainer.state.log_history if "interp/drift/overhead_seconds" in row}
    assert sorted(rows) == [0, 3, 4]  # start, every third, end
    key = "interp/drift/model.layers.1/"
    assert rows[0][key + "cosine"] == pytest.approx(1.0)
    assert rows[0][key + "relative_norm"] == pytest.approx(1.0)
    assert rows[4][key + "cosine"] < rows[0][key + "cosine"] - 1e-4
    assert 0 < rows[4]["interp/warmth/drift_frozen_auroc"] <= 1
    losses = [row["step"] for row in trainer.state.log_history if "loss" in row]
    assert losses == [2, 4]  # the trainer's own logging is where it was
    events = read_run_log(tmp_path / "out" / "interp.jsonl")
    assert [e["step"] for e in events if e["event"] == "drift"] == [0, 3, 4]
    assert events[-1]["event"] == "end"  # the last measurement comes before trackers close
    drift = next(e for e in events if e["event"] == "drift" and e["step"] == 4)
    assert drift["hook_points"]["model.layers.1"]["cosine"] == rows[4][key + "cosine"]
    assert drift["monitors"]["warmth"]["frozen_auroc"] == rows[4]["interp/warmth/drift_frozen_auroc"]
    assert {e["step"] for e in events if e["event"] == "metric"} >= {2, 4}


def test_the_policy_is_measured_not_the_reference(tmp_path, load, tokenizer):
    """With LoRA and a learning rate of 0 nothing moves; with one, it does."""
    from peft import LoraConfig, get_peft_model

    ends = []
    for rate in (0.0, 0.1):
        model = get_peft_model(load(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        trainer = plain_trainer(tmp_path / str(rate), model, tokenizer, learning_rate=rate)
        trainer.add_callback(DriftCallback(trainer, every=10))
        trainer.train()
        rows = [row for row in trainer.state.log_history if "interp/drift/model.layers.2/cka" in row]
        ends.append(rows[-1]["interp/drift/model.layers.2/cosine"])
    assert ends[0] == pytest.approx(1.0, abs=1e-6)
    assert ends[1] < 0.9999


def test_a_resumed_run_measures_from_the_same_start(tmp_path, load, tokenizer):
    texts = sentences(6)
    whole = plain_trainer(tmp_path / "whole", load(), tokenizer, max_steps=4, save_strategy="steps", save_steps=2)
    whole.add_callback(DriftCallback(whole, texts, every=2))
    whole.train()
    expected = [r for r in whole.state.log_history if "interp/drift/model.layers.1/cosine" in r][-1]
    again = plain_trainer(tmp_path / "whole", load(), tokenizer, max_steps=4, save_strategy="steps", save_steps=2)
    again.add_callback(DriftCallback(again, texts, every=2))
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-2"))
    found = [r for r in again.state.log_history if "interp/drift/model.layers.1/cosine" in r][-1]
    assert found["interp/drift/model.layers.1/cosine"] == expected["interp/drift/model.layers.1/cosine"]


def test_first_tokens_are_left_out_and_long_batteries_are_cut(tmp_path, load, tokenizer, caplog):
    trainer = plain_trainer(tmp_path, load(), tokenizer)
    callback = DriftCallback(trainer, ["warm day", "cold night rain"])
    lengths = [len(tokenizer(text)["input_ids"]) for text in ("warm day", "cold night rain")]
    assert callback.battery.batch.completion_mask.sum(1).tolist() == [n - 1 for n in lengths]
    with caplog.at_level(logging.WARNING):
        callback = DriftCallback(trainer, [" ".join(["day"] * 100)] * 50)
    assert int(callback.battery.batch.attention_mask.sum()) <= 2048
    assert "Drift is measured on the first" in caplog.text
    with pytest.raises(ValueError, match="`every` is 0"):
        DriftCallback(trainer, every=0)
    with pytest.raises(ValueError, match=r"`model.layer.1` – expected"):
        DriftCallback(trainer, hook_points=["model.layer.1"])


def test_attach_adds_drift_to_any_trainer_and_rollout_terms_to_none_but_rollouts(tmp_path, load, tokenizer):
    trainer = sft_trainer(tmp_path, load(), tokenizer)
    attach(trainer, drift=DriftConfig(every=2, texts=sentences(4)))
    trainer.train()
    assert any("interp/drift/model.layers.0/cka" in row for row in trainer.state.log_history)
    with pytest.raises(ValueError, match=r"is a `SFTTrainer` – expected a `GRPOTrainer` or `RLOOTrainer`"):
        attach(sft_trainer(tmp_path, load(), tokenizer), measures={"length": len})


def test_labelled_examples_may_be_given_loaded(tmp_path, load, tokenizer):
    write_jsonl(labelled_rows(12), tmp_path / "labelled.jsonl")
    trainer = plain_trainer(tmp_path, load(), tokenizer, max_steps=1)
    monitor = make_readout(load(), name="watched")
    trainer.add_callback(
        DriftCallback(trainer, monitors=[monitor], labelled=load_examples(tmp_path / "labelled.jsonl"))
    )
    trainer.train()
    assert any("interp/watched/drift_frozen_auroc" in row for row in trainer.state.log_history)
