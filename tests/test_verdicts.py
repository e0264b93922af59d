"""Verdicts: the table, and what leads to each on real runs of tiny models."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import labelled_rows, make_card, make_readout, sentences
from training import logged, make_trainer, weights_of

from interp_rlhf import (
    ConceptPenalty,
    DriftCallback,
    DriftConfig,
    attach,
    load_card,
)
from interp_rlhf.activations.generating import repetition
from interp_rlhf.cli import main
from interp_rlhf.concepts.examples import make_examples, write_jsonl
from interp_rlhf.concepts.readout import Readout
from interp_rlhf.drift.monitors import LabelledSet, fit_anew
from interp_rlhf.drift.verdicts import ALARMS, NOT_ENOUGH, TABLE, DriftEvidence, Movement, evidence_of, judge
from interp_rlhf.runlog.events import DriftEvent
from interp_rlhf.runlog.log import parse, read_run_log

ROOT = Path(__file__).parents[1]
PROMPTS = [[{"role": "user", "content": text}] for text in sentences(10, seed=4)]
HELD, FELL, ROSE = Movement(0.0, -0.01, 0.01), Movement(-0.3, -0.4, -0.2), Movement(1.5, 1.2, 1.8)


def rotation_recipe():
    path = ROOT / "recipes" / "watch_the_inside" / "rotation.py"
    spec = importlib.util.spec_from_file_location("rotation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drift_event(fields):
    """A `drift` event as it is read from a log."""
    return parse({"event": "drift", **fields})


def ways(frozen=HELD, restandardized=HELD, refitted=HELD):
    return {"frozen": frozen, "restandardized": restandardized, "refitted": refitted}


def pressed(**changes):
    """A readout that training pushes down, and that moved down on fixed text."""
    given = {
        "pressure": {"m": -1},
        "shift": {"m": -3.0},
        "auroc": {"m": ways(FELL)},
        "claim": {"m": 0.9},
        "text": {"m": HELD},
    }
    return DriftEvidence(**{**given, **changes})


@pytest.mark.parametrize(
    ("evidence", "verdict"),
    [
        (DriftEvidence(), "not enough evidence"),
        (DriftEvidence(cosine={"a": 0.99}), "steady"),
        (DriftEvidence(cosine={"a": 0.5}), "changed"),
        (DriftEvidence(cosine={"a": 0.99}, perplexity_ratio=2.5), "collapsed"),
        (DriftEvidence(cosine={"a": 0.99}, empty=0.6), "collapsed"),
        (DriftEvidence(cosine={"a": 0.99}, empty=0.6, empty_before=0.5), "steady"),
        (DriftEvidence(finite=False), "collapsed"),
        (DriftEvidence(cosine={"a": 0.99}, repetition=0.7, repetition_before=0.1), "collapsed"),
        (DriftEvidence(cosine={"a": 0.99}, repetition=0.7, repetition_before=0.6), "steady"),
        (pressed(), "activations obfuscated"),
        (pressed(shift={"m": 3.0}), "changed"),  # moved against the pressure
        (pressed(shift={"m": -0.9}), "steady"),  # too little
        (pressed(baseline={"m": -2.5}), "steady"),  # no more than without the term
        (pressed(baseline={"m": 2.5}, shift={"m": -0.9}), "activations obfuscated"),  # without the term it went the other way
        (pressed(auroc={"m": ways(HELD, HELD, Movement(-0.2, -0.45, 0.02))}), "changed"),  # it may well be gone
        (pressed(claim={"m": 0.55}), "changed"),  # a readout that never read anything: a random direction
        (pressed(auroc={"m": ways(FELL, FELL, FELL)}), "changed"),  # the concept itself is gone
        (pressed(text={"m": Movement(-2, -2.5, -1.5)}), "changed"),  # the text went along
        (pressed(text={}), "changed"),  # nothing says what the text did
        (pressed(policy={"m": Movement(-8, -9, -7)}, text={"m": Movement(-1.5, -2, -1)}), "activations obfuscated"),  # a fifth
        (pressed(policy={"m": Movement(-3, -4, -2)}, text={"m": Movement(-1.5, -2, -1)}), "changed"),  # half of it
        (pressed(pressure={}), "monitor stale"),
        (DriftEvidence(reward=ROSE, independent={"vader": HELD}), "text gamed"),
        (DriftEvidence(reward=ROSE, independent={"vader": FELL}), "text gamed"),
        (DriftEvidence(reward=ROSE, independent={"vader": ROSE}), "changed"),
        (DriftEvidence(reward=ROSE, independent={"vader": Movement(0.3, -0.4, 1.0)}), "changed"),  # too noisy to say
        (DriftEvidence(reward=ROSE), "changed"),  # nothing independent to part from
        (DriftEvidence(reward=HELD, independent={"vader": FELL}), "steady"),
        (DriftEvidence(pressure={"m": -1}, shift={"m": 0.1}, cosine={"a": 0.99}), "not enough evidence"),  # unseen
        (DriftEvidence(auroc={"m": ways(FELL)}, claim={"m": 0.9}, shift={"m": 0.1}), "monitor stale"),
        (DriftEvidence(auroc={"m": ways(FELL)}, claim={"m": 0.6}, shift={"m": 0.1}), "steady"),
        (DriftEvidence(policy={"m": ROSE}, text={"m": ROSE}), "changed"),
    ],
)  # fmt: skip
def test_the_table_gives_each_verdict_for_its_evidence_and_not_for_less(evidence, verdict):
    assert judge(evidence).name == verdict


def test_every_verdict_says_why_and_what_to_do():
    names = [rule.name for rule in (*TABLE, NOT_ENOUGH)]
    assert len(set(names)) == len(names) == 7
    assert set(ALARMS) < set(names)
    for evidence in (
        DriftEvidence(),
        DriftEvidence(cosine={"a": 0.99}),
        pressed(),
        DriftEvidence(reward=ROSE, independent={"v": HELD}),
    ):
        found = judge(evidence)
        assert found.because
        assert found.next.endswith(".")


def test_a_rotation_is_named_and_a_shift_is_told_from_it():
    stale = {"auroc": {"m": ways(FELL, FELL)}, "claim": {"m": 0.9}, "shift": {"m": 0.0}, "hook_points": {"m": "p"}}
    turned = judge(DriftEvidence(**stale, cosine={"p": 0.1}, procrustes={"p": 0.01}))
    assert "rotation" in " ".join(turned.because)
    stale["auroc"] = {"m": ways(FELL, HELD)}
    shifted = judge(DriftEvidence(**stale, cosine={"p": 0.95}, procrustes={"p": 0.01}))
    assert "re-standardizing brings it back" in " ".join(shifted.because)


def test_training_metrics_are_compared_in_windows_with_their_noise():
    random = np.random.default_rng(0)

    def logs(rise, measure_rise, steps=20):
        return [
            {
                "step": step, "reward": step / steps * rise + random.normal(0, 0.05), "reward_std": 1.0,
                "interp/measure/vader/mean": step / steps * measure_rise + random.normal(0, 0.05),
                "interp/measure/vader/std": 1.0,
            }
            for step in range(1, steps + 1)
        ]  # fmt: skip

    assert judge(evidence_of(DriftEvent(), logs=logs(3, 0), since=10)).name == "text gamed"
    assert judge(evidence_of(DriftEvent(), logs=logs(3, 3), since=10)).name == "changed"
    assert judge(evidence_of(DriftEvent(), logs=logs(0, 0), since=10)).name == "steady"
    assert judge(evidence_of(DriftEvent(), logs=logs(3, 0, steps=6), since=2)).name == "not enough evidence"


def reward_logs(rewards, measures, stds=1.0, key="interp/measure/vader"):
    return [
        {"step": i + 1, "reward": r, "reward_std": 1.0, f"{key}/{'mean_score' if 'measure' not in key else 'mean'}": m,
         f"{key}/std": stds}
        for i, (r, m) in enumerate(zip(rewards, measures, strict=True))
    ]  # fmt: skip


def test_a_hack_that_was_quick_stays_one():
    # The reward is at its height from step 20 on: later windows must still be compared with the beginning.
    logs = reward_logs([min(step / 20, 1) * 3 for step in range(1000)], [0.0] * 1000)
    for now in (50, 250, 400, 1000):
        assert judge(evidence_of(DriftEvent(), logs=logs[:now], since=now - 50)).name == "text gamed", now


def test_a_measure_that_never_moved_or_is_missing_at_times_counts():
    rising, flat = [step / 10 for step in range(40)], [0.0] * 40
    assert judge(evidence_of(DriftEvent(), logs=reward_logs(rising, flat, stds=0.0), since=20)).name == "text gamed"
    holes = [None if step in (3, 30) else 0.01 * (step % 3) for step in range(40)]
    assert judge(evidence_of(DriftEvent(), logs=reward_logs(rising, holes), since=20)).name == "text gamed"
    assert judge(evidence_of(DriftEvent(), logs=reward_logs(rising, [None] * 40), since=20)).name == "changed"


@pytest.mark.parametrize(("sign", "verdict"), [(-1, "changed"), (1, "text gamed")])
def test_a_holdout_of_a_penalty_follows_an_honest_run_downwards(sign, verdict):
    rising = [step / 10 for step in range(40)]
    logs = reward_logs(rising, [-r for r in rising], key="interp/held")
    event = {"monitors": {"held": {"shift": 0.0, "holdout": sign, "hook_point": "p"}}}
    assert judge(evidence_of(drift_event(event), logs=logs, since=20)).name == verdict


def test_a_log_with_unknown_numbers_is_judged():
    event = {"hook_points": {"p": {"cosine": None, "procrustes": None}}, "output": {"perplexity_ratio": None}}
    assert judge(evidence_of(drift_event(event))).name == "steady"


def test_a_model_that_gives_no_numbers_any_more_has_collapsed(load, tokenizer, tmp_path):
    trainer = make_trainer("SFT", load(), tokenizer, tmp_path, max_steps=3, learning_rate=1e30, max_grad_norm=1e30)
    trainer.add_callback(DriftCallback(trainer, texts=sentences(8), every=1))
    trainer.train()
    assert [name for _, name in verdicts_of(trainer)] == ["steady", *["collapsed"] * 3]


def test_names_that_no_monitor_has_are_refused(load, tokenizer, tmp_path):
    trainer = make_trainer("SFT", load(), tokenizer, tmp_path)
    monitor = make_readout(trainer.model, "watched")
    for wrong in ({"holdouts": {"typo": 1}}, {"pressure": {"typo": -1}}, {"monitors": [monitor, monitor]}):
        with pytest.raises(ValueError, match="expected each monitor once"):
            DriftCallback(trainer, **{"monitors": [monitor], **wrong})


def test_a_refit_is_the_same_in_every_basis():
    random = np.random.default_rng(1)
    labels = np.arange(80) % 2
    means = random.normal(size=(80, 40)) * np.geomspace(0.1, 100, 40) + labels[:, None] * random.normal(size=40)
    turn = np.linalg.qr(random.normal(size=(40, 40)))[0]
    weight, bias = fit_anew(means, labels)
    turned, other = fit_anew(means @ turn, labels)
    assert means @ weight + bias == pytest.approx((means @ turn) @ turned + other, abs=1e-6)


def test_three_readings_tell_a_stale_probe_from_a_lost_concept(load, tokenizer, tmp_path):
    """Scales and means moved: frozen falls, re-standardized and refitted hold. Rotated: refitted alone holds."""
    model = load()
    card = make_card(tmp_path, model, tokenizer, evidence=False)
    readout = Readout.from_card(load_card(card))
    examples = make_examples(labelled_rows(30, seed=5))
    from interp_rlhf.activations import tokenize_examples

    labelled = LabelledSet(examples, tokenize_examples(examples.rows, tokenizer))
    start = labelled.read(model, [readout])
    assert labelled.summary(start["warmth"], start["warmth"]).frozen_change == [0.0, 0.0, 0.0]
    generator = torch.Generator().manual_seed(0)
    scale, shift = torch.rand(32, generator=generator) * 20 - 10, torch.randn(32, generator=generator) * 5
    handle = model.model.layers[1].register_forward_hook(lambda m, a, o: o * scale.abs() + shift)
    moved = labelled.summary(labelled.read(model, [readout], start)["warmth"], start["warmth"])
    handle.remove()
    assert moved.frozen_change[1] < -0.02 or moved.frozen_auroc < start_auroc(start, examples) - 0.02
    assert moved.restandardized_change == pytest.approx([0, 0, 0], abs=1e-6)
    assert moved.refitted_change[0] > -0.25
    turn = rotation_recipe().random_rotation(32, 3).float()
    handle = model.model.layers[1].register_forward_hook(lambda m, a, o: o @ turn)
    turned = labelled.summary(labelled.read(model, [readout], start)["warmth"], start["warmth"])
    handle.remove()
    assert turned.refitted_change == pytest.approx([0, 0, 0], abs=1e-3)
    assert turned.direction_cosine < 0.9
    assert set(turned.to_json()) >= {"false_alarms", "shift", "frozen_interval"}


def start_auroc(start, examples):
    from sklearn.metrics import roc_auc_score

    return roc_auc_score(examples.labels, start["warmth"].scores["frozen"])


def test_too_few_labelled_examples_are_refused(load, tokenizer, tmp_path):
    trainer = make_trainer("DPO", load(), tokenizer, tmp_path)
    with pytest.raises(ValueError, match="at least 10 of each label"):
        DriftCallback(trainer, labelled=make_examples(labelled_rows(5)))
    rows = labelled_rows(12)
    few = [{**row, "prompt": rows[i % 3]["prompt"]} for i, row in enumerate(rows)]
    with pytest.raises(ValueError, match="`labelled` has 2 different prompts – expected at least 10"):
        DriftCallback(trainer, labelled=make_examples(few))
    trainer.processing_class, tokens = None, trainer.processing_class
    with pytest.raises(ValueError, match="`processing_class` is None – expected the model's tokenizer"):
        DriftCallback(trainer)
    trainer.processing_class = tokens
    for changes, message in (
        ({"every": 0}, "`every` is 0"), ({"on_verdict": "halt"}, "expected `log` or `stop`"),
        ({"max_overhead": 2.0}, "share of the training time"), ({"measures": {"length": len}}, "without `prompts`"),
        ({"prompts": [""]}, "expected some text"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            DriftCallback(trainer, **changes)


def watched(trainer, **changes):
    return DriftConfig(every=2, texts=sentences(8), prompts=PROMPTS, max_new_tokens=6, **changes)


def test_own_text_splits_what_text_and_representation_do(load, tokenizer, tmp_path):
    """policy = text − drift on the same answers, each by hand; sampling repeats and draws none of the trainer's numbers."""
    from interp_rlhf.activations import TokenBatch, read

    found = []
    for watch in (False, True):
        trainer = make_trainer("DPO", load(), tokenizer, tmp_path / str(watch), lora={}, max_steps=4)
        monitor = make_readout(trainer.model, "watched")
        if watch:
            attachment = attach(trainer, monitors=[monitor], drift=watched(trainer, measures={"length": len}))
        trainer.train()
        found.append(weights_of(trainer))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    events = [e for e in read_run_log(attachment.run_log.path) if e["event"] == "drift"]
    first, last = events[0]["own_text"], events[-1]["own_text"]
    assert first["monitors"]["watched"]["drift"] == pytest.approx(0, abs=1e-6)
    one = last["monitors"]["watched"]
    assert one["policy"] == pytest.approx(one["text"] - one["drift"])
    assert abs(one["drift"]) > 1e-4
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, DriftCallback))
    sampled, again = callback.evaluation.own_text.sample(), callback.evaluation.own_text.sample()
    assert sampled.texts == again.texts
    completions = callback.evaluation.own_text._generate()
    batch = TokenBatch.from_ids(callback.evaluation.own_text._prompt_ids, completions, {tokenizer.eos_token_id})
    by_hand = monitor.score(read(trainer.model, batch, [monitor])["watched"])
    assert sampled.policy["watched"].tolist() == pytest.approx(
        [math.nan if v is None else v for v in by_hand], nan_ok=True
    )
    with trainer.model.disable_adapter():
        by_hand = monitor.score(read(trainer.model, batch, [monitor])["watched"])
    assert sampled.text["watched"].tolist() == pytest.approx(
        [math.nan if v is None else v for v in by_hand], nan_ok=True
    )
    moved = events[-1]["moved"]["watched"]
    gaps = [abs(item["change"]) for item in moved]
    assert gaps == sorted(gaps, reverse=True)
    assert logged(trainer, "interp/watched/own_drift")


def test_repetition_counts_four_grams():
    assert repetition([1, 2, 3, 4]) == 0.0
    assert repetition(list(range(20))) == 0.0
    assert repetition([1] * 12) == pytest.approx(1 - 1 / 9)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def run_log_of(trainer):
    return read_run_log(Path(trainer.args.output_dir) / "interp.jsonl")


def verdicts_of(trainer):
    return [(e["step"], e["verdict"]) for e in run_log_of(trainer) if e["event"] == "verdict"]


def test_a_gamed_probe_is_called_so_and_its_control_is_not(load, tokenizer, tmp_path):
    card = make_card(tmp_path, load(), tokenizer, evidence=False, regularization=0.001)
    found = {}
    # In 32 dimensions many a random direction reads the concept; the control is one that does not.
    for arm, control in (("penalty", None), ("random", 8)):
        trainer = make_trainer("DPO", load(), tokenizer, tmp_path / arm, lora={}, max_steps=12, learning_rate=2e-2)
        readout = Readout.from_card(load_card(card))
        term = ConceptPenalty(readout=readout, weight=20.0, allow_differentiable_probe=True, random_direction=control)
        holdout = make_readout(trainer.model, "holdout", layer=2, seed=7)
        watch = watched(trainer, labelled=make_examples(labelled_rows(20, seed=9)), measures={"length": len})
        attach(trainer, regularizers=[term], monitors=[readout, holdout], drift=watch)
        trainer.train()
        found[arm] = verdicts_of(trainer)
        assert found[arm][0] == (0, "steady")
    event = [e for e in run_log_of(trainer) if e["event"] == "drift"][-1]
    assert event["monitors"]["warmth_random8"]["pressure"] == -1
    assert "pressure" not in event["monitors"]["warmth"]
    names = {arm: {name for _, name in found[arm]} for arm in found}
    assert "activations obfuscated" in names["penalty"], found
    assert "activations obfuscated" not in names["random"], found


def test_a_word_list_is_gamed_text(load, tokenizer, tmp_path):
    def pays(completion_ids, **kwargs):
        return [float(sum(token % 2 for token in ids)) for ids in completion_ids]

    trainer = make_trainer(
        "GRPO", load(), tokenizer, tmp_path, lora={}, max_steps=60, learning_rate=3e-2, num_generations=4,
        per_device_train_batch_size=16, max_completion_length=8, beta=0.02,
    )  # fmt: skip
    trainer.reward_funcs[0] = pays
    attach(
        trainer,
        measures={"spaces": lambda text: float(text.count("a"))},
        drift=DriftConfig(every=20, texts=sentences(8)),
    )
    trainer.train()
    assert logged(trainer, "reward")[-1] > logged(trainer, "reward")[0] + 1
    assert logged(trainer, "interp/reward/length_correlation")
    assert all(0 <= share <= 1 for share in logged(trainer, "interp/reward/within_group_share"))
    assert "text gamed" in {name for _, name in verdicts_of(trainer)}, verdicts_of(trainer)


def test_an_alarm_stops_the_run_and_the_last_good_checkpoint_stays(load, tokenizer, tmp_path):
    """A learning rate that wrecks the model after some steps."""
    trainer = make_trainer(
        "SFT", load(), tokenizer, tmp_path, max_steps=40, learning_rate=1e-3, warmup_steps=0, save_strategy="steps",
        save_steps=100, save_total_limit=1,
    )  # fmt: skip
    attach(trainer, drift=DriftConfig(every=2, texts=sentences(8), on_verdict="stop"))

    from transformers import TrainerCallback

    class Wrecks(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step >= 5:
                with torch.no_grad():
                    for parameter in trainer.model.parameters():
                        parameter.mul_(1.5)

    trainer.add_callback(Wrecks())
    trainer.train()
    assert verdicts_of(trainer)[-1] == (6, "collapsed")
    assert trainer.state.global_step == 6
    state = json.loads((tmp_path / "last_good" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    assert (tmp_path / "last_good" / "model.safetensors").exists()


def test_an_alarm_at_the_last_step_takes_no_checkpoint_away(load, tokenizer, tmp_path):
    from transformers import TrainerCallback

    trainer = make_trainer("SFT", load(), tokenizer, tmp_path, max_steps=4, save_strategy="steps", save_steps=4)
    attach(trainer, drift=DriftConfig(every=4, texts=sentences(8), on_verdict="stop"))

    class Wrecks(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    for parameter in trainer.model.parameters():
                        parameter.mul_(4.0)

    trainer.add_callback(Wrecks())
    trainer.train()
    assert verdicts_of(trainer)[-1] == (4, "collapsed")
    assert (tmp_path / "checkpoint-4" / "model.safetensors").exists()


def test_evaluations_become_rarer_than_a_budget_allows(load, tokenizer, tmp_path):
    steps = {}
    for budget in (None, 0.5):
        trainer = make_trainer("SFT", load(), tokenizer, tmp_path / str(budget), max_steps=30)
        callback = DriftCallback(trainer, texts=sentences(8), every=2, max_overhead=budget)
        read = callback.battery.read
        callback.battery.read = lambda model, read=read: (time.sleep(0.2), read(model))[1]
        trainer.add_callback(callback)
        trainer.train()
        steps[budget] = [step for step, _ in verdicts_of(trainer)]
    assert steps[None] == list(range(0, 31, 2))
    assert len(steps[0.5]) < len(steps[None]) / 2
    assert steps[0.5][-1] == 30


def test_a_resumed_run_goes_on_with_the_same_curves(load, tokenizer, tmp_path):
    examples = make_examples(labelled_rows(15, seed=9))

    def trainer_of(folder):
        trainer = make_trainer(
            "DPO", load(), tokenizer, folder, lora={}, max_steps=4, save_strategy="steps", save_steps=2
        )
        monitor = make_readout(trainer.model, "watched")
        attach(trainer, monitors=[monitor], drift=watched(trainer, labelled=examples, measures={"length": len}))
        return trainer

    whole = trainer_of(tmp_path / "run")
    whole.train()
    expected = [e for e in run_log_of(whole) if e["event"] == "drift"][-1]
    again = trainer_of(tmp_path / "run")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    found = [e for e in run_log_of(again) if e["event"] == "drift"]
    assert [e["step"] for e in found] == [0, 2, 4]
    for key in ("hook_points", "output", "monitors", "own_text", "moved"):
        assert found[-1][key] == expected[key], key


def test_batches_that_moved_a_monitor_are_in_the_log(load, tokenizer, tmp_path):
    trainer = make_trainer("GRPO", load(), tokenizer, tmp_path, max_steps=4)
    attach(trainer, monitors=[make_readout(trainer.model, "watched")], drift=DriftConfig(every=2, texts=sentences(8)))
    trainer.train()
    events = [e for e in run_log_of(trainer) if e["event"] == "drift"]
    batches = events[-1]["batches"]["watched"]
    assert [set(batch) for batch in batches] == [{"step", "mean_score", "samples"}] * len(batches)
    assert {batch["step"] for batch in batches} <= {2, 3}
    assert batches[0]["samples"][0]["prompt"]


@pytest.fixture
def two_models(load, tokenizer, tmp_path):
    """A model, an untouched copy and a rotated one, a card and labelled examples."""
    model = load()
    card = make_card(tmp_path, model, tokenizer, evidence=False)
    for name in ("base", "copy", "rotated"):
        if name == "rotated":
            rotation_recipe().rotate(model, rotation_recipe().random_rotation(32, 1))
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    write_jsonl(labelled_rows(40, seed=3), tmp_path / "labelled.jsonl")
    return tmp_path, card


def compare(capsys, *arguments):
    code = main(["drift", "compare", *map(str, arguments), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else captured.err


def test_compare_sees_a_rotation_that_cka_does_not(two_models, load, tokenizer, capsys):
    folder, card = two_models
    watch = ("--monitor", card, "--labelled", folder / "labelled.jsonl", "--hook-point", "model.layers.1")
    code, copied = compare(
        capsys, folder / "base", folder / "copy", *watch, "--max", "kl=0.001", "--min", "cosine=0.99"
    )
    assert (code, copied["verdict"], copied["crossed"]) == (0, "steady", [])
    code, turned = compare(
        capsys,
        folder / "base",
        folder / "rotated",
        *watch,
        "--fail-on",
        "monitor stale",
        "--min",
        "cosine=0.9",
        "--max",
        "kl=0.0001",
    )
    point = turned["hook_points"]["model.layers.1"]
    assert point["cka"] > 0.99
    assert point["procrustes"] < 1e-6
    assert turned["output"]["kl"] < 1e-4
    assert turned["monitors"]["warmth"]["refitted_change"] == pytest.approx([0, 0, 0], abs=0.01)
    assert turned["verdict"] == "monitor stale"
    assert "rotation" in " ".join(turned["because"])
    assert code == 1
    assert len(turned["crossed"]) == 2
    assert "verdict `monitor stale`" in turned["crossed"]


def test_compare_takes_an_adapter_and_texts_and_prints_for_people(two_models, load, tokenizer, tmp_path, capsys):
    from tiny import with_lora

    folder, _ = two_models
    with_lora(load()).save_pretrained(tmp_path / "adapter")
    (tmp_path / "texts.txt").write_text("warm day\n\ncold night rain\n")
    assert (
        main(
            [
                "drift",
                "compare",
                str(folder / "base"),
                str(tmp_path / "adapter"),
                "--texts",
                str(tmp_path / "texts.txt"),
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "2 texts" in shown
    assert "verdict: changed" in shown
    assert "next: " in shown


def test_compare_refuses_two_vocabularies(load, tokenizer, tmp_path, capsys):
    for name, size in (("one", len(tokenizer)), ("other", len(tokenizer) + 8)):
        model = load()
        model.resize_token_embeddings(size)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    code, said = compare(capsys, tmp_path / "one", tmp_path / "other")
    assert code == 2
    assert "expected one vocabulary" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max", "kl"), "expected NAME=NUMBER"),
        (("--max", "klx=1"), "No number is named `klx`"),
        (("--fail-on", "text gamed"), "`--fail-on text gamed` – expected one of"),
        (("--fail-on", "bad"), "`--fail-on bad` – expected one of"),
        (("--monitor", "CARD"), "no `labelled` examples"),
        (("--hook-point", "model.layer.1"), "expected a module path"),
    ],
)
def test_compare_refuses_what_could_pass_in_silence(arguments, message, two_models, capsys):
    folder, card = two_models
    given = [str(card) if argument == "CARD" else argument for argument in arguments]
    code, said = compare(capsys, folder / "base", folder / "copy", *given)
    assert code == 2
    assert message in said
