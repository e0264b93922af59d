"""Killed at random moments and resumed: the same weights to the last bit, and the same log."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import make_readout
from training import distance, make_trainer, rows_of, weights_of

from interp_rlhf import ConceptAnchor, attach
from interp_rlhf.runlog.log import RunLog, read_run_log
from interp_rlhf.training.checkpoints import last_complete_checkpoint, save_multiple

HERE = Path(__file__).resolve().parent
STEPS = 12
# Timings, and two counters that TRL starts again from 0 when it resumes.
RESTARTED = (
    "runtime",
    "per_second",
    "seconds",
    "num_tokens",
    "train_loss",
    "step_time",
    "total_flos",
    "time",
    "duration",
)

RUN = """
import sys
sys.path.insert(0, {here!r})
import conftest
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
from tiny import make_readout
from training import make_trainer
from interp_rlhf import ConceptAnchor, DriftConfig, DriftPenalty, Schedule, Subspace, attach

kind, folder, output = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
changes = {{"num_iterations": 2, "save_steps": 2}} if kind == "GRPO" else {{"save_steps": 1}}
trainer = make_trainer(
    kind, model, tokenizer, output, max_steps={steps}, save_strategy="steps", lora={{"lora_dropout": 0.1}},
    per_device_train_batch_size=2, **changes,
)
readout = make_readout(model)
terms = [
    ConceptAnchor(readout=readout, weight=0.5, schedule=Schedule(kind="decay")),
    DriftPenalty(subspace=Subspace.from_readouts([readout]), weight=0.5, name="held"),
]
attach(
    trainer, regularizers=terms, monitors=[make_readout(model, "watched", seed=4)],
    drift=DriftConfig(every=4, texts=["warm day"]), samples_every=3,
)
print("ready", flush=True)
trainer.train(resume_from_checkpoint=True)
print("finished", flush=True)
"""


def start(script, kind, folder, output):
    command = [sys.executable, str(script), kind, str(folder), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


def kill_when(process, reached) -> bool:
    """Kills a run as soon as `reached()`; False where it ended before."""
    while process.poll() is None:
        if reached():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.0005)
    return False


def end_of(output):
    """Weights and log of a finished run, without what TRL restarts."""
    folder = output / f"checkpoint-{STEPS}"
    state = json.loads((folder / "trainer_state.json").read_text())
    history = [
        {key: value for key, value in log.items() if not any(word in key for word in RESTARTED)}
        for log in state["log_history"]
    ]
    return load_file(folder / "adapter_model.safetensors"), [log for log in history if len(log) > 2]


def events_of(output):
    """The run log as a reader sees it."""
    found = []
    for event in read_run_log(output / "interp.jsonl"):
        if event["event"] in ("run", "end"):
            continue
        event = {key: value for key, value in event.items() if key not in ("time", "overhead_seconds")}
        if "metrics" in event:
            event["metrics"] = {k: v for k, v in event["metrics"].items() if not any(word in k for word in RESTARTED)}
        if event.get("metrics") != {"epoch": event.get("metrics", {}).get("epoch")}:
            found.append(event)
    return found


@pytest.mark.parametrize("kind", ["DPO", "GRPO"])
def test_killed_at_random_moments_and_inside_a_save_then_resumed(kind, model_folder, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN.format(here=str(HERE), steps=STEPS))
    folder = model_folder()
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(script, kind, folder, whole).communicate()[0].split()[-1] == "finished"
    rng = random.Random(kind)
    inside = broken / "checkpoint-4"  # a save under way: the folder is there, its state is not

    def saving():
        return inside.exists() and not (inside / "trainer_state.json").exists()

    process = start(script, kind, folder, broken)
    assert kill_when(process, saving), "the first kill is inside a save"
    assert not (inside / "trainer_state.json").exists()
    kills = 1
    for _ in range(3):
        if last_complete_checkpoint(broken) == str(broken / f"checkpoint-{STEPS}"):
            break
        process = start(script, kind, folder, broken)
        assert "ready\n" in iter(process.stdout.readline, "")  # after what DeepSpeed says when it is imported
        moment = time.monotonic() + rng.uniform(0.05, 1.0)
        if not kill_when(process, lambda moment=moment: time.monotonic() > moment):
            break
        kills += 1
    # A run that was killed on its way out is finished: transformers would make one step more of it.
    if last_complete_checkpoint(broken) != str(broken / f"checkpoint-{STEPS}"):
        assert start(script, kind, folder, broken).communicate()[0].split()[-1] == "finished"
    assert kills >= 2
    weights, history = end_of(whole)
    resumed_weights, resumed_history = end_of(broken)
    assert weights.keys() == resumed_weights.keys()
    for name, value in weights.items():
        assert value.equal(resumed_weights[name]), name
    assert history == resumed_history
    assert events_of(whole) == events_of(broken)


def finished_run(tmp_path, load, tokenizer, **changes):
    trainer = make_trainer(
        "DPO", load(), tokenizer, tmp_path, max_steps=3, save_strategy="steps", save_steps=1, **changes
    )
    attach(trainer, regularizers=[ConceptAnchor(readout=make_readout(trainer.model), weight=0.1)])
    trainer.train()
    return trainer


def test_the_last_complete_checkpoint_is_taken(load, tokenizer, tmp_path):
    finished_run(tmp_path, load, tokenizer)
    damages = {
        "no state": lambda f: (f / "trainer_state.json").unlink(),
        "torn state": lambda f: (f / "trainer_state.json").write_text((f / "trainer_state.json").read_text()[:50]),
        "torn weights": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        "no weights": lambda f: (f / "model.safetensors").unlink(),
        "no schedule": lambda f: (f / "scheduler.pt").unlink(),
    }
    for name, damage in damages.items():
        copied = tmp_path / name.replace(" ", "_")
        for step in (1, 2, 3):
            shutil.copytree(tmp_path / f"checkpoint-{step}", copied / f"checkpoint-{step}")
        damage(copied / "checkpoint-3")
        assert last_complete_checkpoint(copied) == str(copied / "checkpoint-2"), name
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_a_run_that_began_without_us_can_be_gone_on_with(load, tokenizer, tmp_path):
    """Its checkpoints know nothing of our counters."""
    make_trainer("DPO", load(), tokenizer, tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    trainer = finished_run_again(tmp_path, load, tokenizer)
    assert trainer.state.global_step == 4


def finished_run_again(tmp_path, load, tokenizer):
    trainer = make_trainer("DPO", load(), tokenizer, tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
    attach(trainer, regularizers=[ConceptAnchor(readout=make_readout(trainer.model), weight=0.1)])
    trainer.train(resume_from_checkpoint=True)
    return trainer


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_saves_inside_a_generated_batch_are_refused_with_the_number_to_use(kind, load, tokenizer, tmp_path):
    changes = {
        "num_iterations": 2,
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    }

    def attached(**more):
        trainer = make_trainer(kind, load(), tokenizer, tmp_path, lora={}, max_steps=8, **{**changes, **more})
        return trainer, lambda: attach(
            trainer, regularizers=[ConceptAnchor(readout=make_readout(trainer.model), weight=0.1)]
        )

    trainer, call = attached(save_strategy="steps", save_steps=6)
    assert save_multiple(trainer.args) == 4
    with pytest.raises(ValueError, match=r"`save_steps` is 6 – expected a multiple of 4 .*save_steps=8"):
        call()
    attached(save_strategy="epoch")[1]()  # an epoch ends with a generated batch that is used up
    attached(save_strategy="steps", save_steps=8)[1]()
    trainer, call = attached(
        save_strategy="steps", save_steps=0.25
    )  # a share of the run: 2 steps, known when it begins
    call()
    with pytest.raises(ValueError, match="`save_steps` is 2 – expected a multiple of 4"):
        trainer.train()


def test_where_an_epoch_ends_short_of_micro_batches_its_end_is_the_place_to_save(load, tokenizer, tmp_path):
    """Three micro-batches an epoch, two a step: steps of 2 and of 1. After step 3 the second generated batch is in use."""
    changes = {
        "per_device_train_batch_size": 2, "steps_per_generation": 3, "gradient_accumulation_steps": 2, "beta": 0.0,
        "optim": "sgd",
        "learning_rate": 0.05, "save_strategy": "steps", "save_steps": 2, "max_steps": 6,
    }  # fmt: skip

    def run(out, resume=None, **more):
        trainer = make_trainer("GRPO", load(), tokenizer, out, rows=rows_of("GRPO", 3), **{**changes, **more})
        attach(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return weights_of(trainer)

    with pytest.raises(
        ValueError, match=r"`save_steps` is 3 – expected a multiple of 2 .*with 3 prompts in an epoch.*save_steps=4"
    ):
        run(tmp_path / "refused", save_steps=3)
    whole = run(tmp_path / "whole")
    for step in (2, 4):
        assert distance(whole, run(tmp_path / f"from{step}", str(tmp_path / "whole" / f"checkpoint-{step}"))) == 0.0


def test_a_run_is_not_resumed_inside_a_generated_batch(load, tokenizer, tmp_path, caplog):
    """transformers saves at the last step whatever `save_steps` is."""

    def trainer_of(steps):
        trainer = make_trainer(
            "GRPO",
            load(),
            tokenizer,
            tmp_path,
            lora={},
            num_iterations=2,
            save_strategy="steps",
            save_steps=2,
            max_steps=steps,
        )
        attach(trainer, regularizers=[ConceptAnchor(readout=make_readout(trainer.model), weight=0.1)])
        return trainer

    trainer_of(3).train()
    assert "`max_steps` is 3, inside of a generated batch" in caplog.text
    with pytest.raises(
        ValueError,
        match=r"from step 3 – expected a step after which no generated batch is half used.*at step 2 or before",
    ):
        trainer_of(6).train(resume_from_checkpoint=True)
    again = trainer_of(6)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 6


def test_checkpoints_of_weights_alone_can_be_gone_on_from(load, tokenizer, tmp_path):
    finished_run(tmp_path, load, tokenizer, save_only_model=True)
    trainer = make_trainer("DPO", load(), tokenizer, tmp_path, max_steps=4, save_only_model=True)
    attach(trainer, regularizers=[ConceptAnchor(readout=make_readout(trainer.model), weight=0.1)])
    trainer.train(resume_from_checkpoint=True)
    assert [log["step"] for log in trainer.state.log_history if "loss" in log] == [1, 2, 3, 4]
    assert trainer.state.global_step == 4


def test_a_resumed_run_undoes_what_came_after_its_checkpoint(tmp_path):
    log = RunLog(tmp_path / "interp.jsonl")
    log.append("run", 0, arm="a")
    log.append("samples", 0, when="before", rows=[])
    for step in (1, 2, 3):
        log.append("metric", step, metrics={"loss": step})
        log.append("samples", step, when="train", rows=[])
    log.append("run", 0, arm="b")
    log.append("metric", 3, metrics={"loss": 30})
    log.append("run", 2, arm="a")
    log.append("metric", 3, metrics={"loss": 33})
    found = [(e["event"], e.get("step"), e.get("metrics", {}).get("loss")) for e in read_run_log(log.path)]
    assert found == [
        ("run", 0, None), ("samples", 0, None), ("metric", 1, 1), ("samples", 1, None), ("metric", 2, 2), ("run", 0, None),
        ("metric", 3, 30), ("run", 2, None), ("metric", 3, 33),
    ]  # fmt: skip


def test_counters_survive_though_transformers_rebuilds_callbacks(load, tokenizer, tmp_path):
    def built(steps):
        trainer = make_trainer(
            "GRPO", load(), tokenizer, tmp_path, lora={}, max_steps=steps, save_strategy="steps", save_steps=1,
            restore_callback_states_from_checkpoint=True,
        )  # fmt: skip
        attach(trainer, monitors=[make_readout(trainer.model)], samples_every=2)
        return trainer

    built(3).train()
    trainer = built(5)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.interp_watchers[0].state()["batches"] == 5
    samples = [event["step"] for event in read_run_log(tmp_path / "interp.jsonl") if event["event"] == "samples"]
    assert samples == [0, 2, 4]


@pytest.mark.parametrize("step", [4, 6])
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_resumed_in_its_second_epoch_a_rollout_run_draws_the_prompts_of_that_epoch(
    kind, step, load, tokenizer, tmp_path
):
    """At its beginning and in its middle: TRL's sampler alone would begin with the first epoch's order again."""

    def finished(resumed=None):
        asked = []

        def reward(prompts, completion_ids, **kwargs):
            asked.append([prompt[0]["content"] for prompt in prompts])
            return [float(len(ids)) + 0.1 * (ids[0] % 7) for ids in completion_ids]

        trainer = make_trainer(
            kind, load(), tokenizer, tmp_path, lora={}, max_steps=8, save_strategy="steps", save_steps=2, reward_funcs=[reward]
        )  # fmt: skip
        attach(trainer, monitors=[make_readout(trainer.model)])
        trainer.train(resume_from_checkpoint=resumed)
        return asked, {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}

    asked, weights = finished()
    assert asked[:4] != asked[4:]
    assert sorted(chain(*asked[:4])) == sorted(chain(*asked[4:]))
    again, resumed = finished(str(tmp_path / f"checkpoint-{step}"))
    assert again == asked[step:]
    assert all(resumed[name].equal(weight) for name, weight in weights.items())
