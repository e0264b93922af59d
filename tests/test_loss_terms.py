"""Terms in the losses of real TRL trainers: the right tokens of the right pass, whatever the batch, the adapter or the engine."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from tiny import make_readout
from training import (
    KINDS,
    OFFLINE,
    activations_by_hand,
    distance,
    log_probs_by_hand,
    logged,
    make_trainer,
    perturb,
    randomize_adapters,
    rows_by_hand,
    rows_of,
    snapshot,
    weights_of,
)

import interp_rlhf
from interp_rlhf import (
    ConceptAnchor,
    DriftPenalty,
    FeatureConstraint,
    Latents,
    Schedule,
    Subspace,
)
from interp_rlhf.activations import ChatMarks, counted

LAYER = "model.layers.1"


def terms_for(kind, model, weight=0.5, schedule=None):
    """An anchor and a subspace penalty, which work everywhere, and what DPO takes beside them."""
    more = {"schedule": schedule} if schedule else {}
    anchor = ConceptAnchor(readout=make_readout(model), weight=weight, **more)
    subspace = Subspace.from_readouts([make_readout(model, seed=1), make_readout(model, seed=2)])
    found = [anchor, DriftPenalty(subspace=subspace, weight=weight, name="held", **more)]
    if kind in OFFLINE:
        found.append(DriftPenalty(hook_point="model.layers.0", weight=weight, name="whole", **more))
    if kind == "DPO":
        found.append(FeatureConstraint(readout=latents(), k=4, weight=weight, **more))
    return found


def latents(width=32, count=64):
    random = torch.Generator().manual_seed(5)
    return Latents("latents", LAYER, torch.randn(count, width, generator=random) / 4, torch.zeros(count))


def build(kind, load, model_folder, tokenizer, folder, lora=False, moved=True, **changes):
    """A trainer whose policy already differs from its reference."""
    # TRL loads the reference from the folder that the model came from.
    model = load()
    if not lora and moved:
        perturb(model)
    trainer = make_trainer(kind, model, tokenizer, folder, lora={} if lora is True else lora or None, **changes)
    if lora and moved:
        randomize_adapters(trainer)
    trainer.start = load() if kind == "SFT" and moved and not lora else None
    return trainer


def attach(trainer, **asked):
    """`attach`, with what the policy was before it moved: a reference that is missing is what it is now."""
    if getattr(trainer, "start", None) is not None:
        asked.setdefault("reference", trainer.start)
    return interp_rlhf.attach(trainer, **asked)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", [*KINDS, "SFT dft"])
def test_four_rows_at_once_equal_two_times_two(kind, lora, load, model_folder, tokenizer, tmp_path):
    found = []
    kind, _, loss_type = kind.partition(" ")
    for size, steps in ((4, 1), (2, 2)):
        changes = {"loss_type": "apo_zero_unpaired"} if kind == "KTO" else {}  # its KL is an estimate per micro-batch
        if loss_type:
            changes["loss_type"] = loss_type
        trainer = build(
            kind, load, model_folder, tokenizer, tmp_path / str(size), lora=lora, per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, optim="sgd", max_steps=3, **changes,
        )  # fmt: skip
        start = weights_of(trainer)
        attach(trainer, regularizers=terms_for(kind, trainer.model, schedule=Schedule(kind="decay")))
        trainer.train()
        assert distance(start, weights_of(trainer)) > 1e-4
        assert logged(trainer, "interp/anchor_concept/squared_gap")[0] > 1e-4
        found.append(weights_of(trainer))
    assert distance(*found) < 2e-6


def test_sequences_weigh_alike_where_micro_batches_are_packed_unequally(load, model_folder, tokenizer, tmp_path):
    """Packed rows hold unequally many sequences: the mean is over the step's sequences, not over rows or micro-batches."""
    rows = rows_of("SFT", 12)
    terms, sequences = {}, {}
    for name, changes in {
        "packed": {
            "packing": True,
            "max_length": 80,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 12,
        },
        "padded": {"per_device_train_batch_size": 12},
    }.items():
        losses = {}
        for weight in (0.0, 3.0):
            once = {"rows": rows, "max_steps": 1, "learning_rate": 0.0, **changes}
            trainer = build("SFT", load, model_folder, tokenizer, tmp_path / f"{name}{weight}", **once)
            attach(trainer, regularizers=[ConceptAnchor(readout=make_readout(trainer.model), weight=weight)])
            trainer.train()
            losses[weight] = logged(trainer, "loss")[0]
        batches = (
            [counted(trainer.data_collator([row]), ChatMarks.of(tokenizer)) for row in trainer.train_dataset]
            if name == "packed"
            else []
        )
        sequences[name] = [batch.sequences for batch in batches]
        terms[name] = losses[3.0] - losses[0.0]
    assert len(sequences["packed"]) > 1
    assert len(set(sequences["packed"])) > 1
    assert sum(sequences["packed"]) == 12
    assert terms["packed"] == pytest.approx(terms["padded"], rel=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_does_not_change_gradients(kind, lora, load, model_folder, tokenizer, tmp_path):
    found = {}
    for name, changes in {
        "off": {"gradient_checkpointing": False},
        "on": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    }.items():
        trainer = build(
            kind, load, model_folder, tokenizer, tmp_path / name, lora=lora, optim="sgd", max_steps=1, **changes
        )
        attach(trainer, regularizers=terms_for(kind, trainer.model, weight=5.0))
        trainer.train()
        found[name] = weights_of(trainer)
    plain = build(kind, load, model_folder, tokenizer, tmp_path / "p", lora=lora, optim="sgd", max_steps=1)
    plain.train()
    assert distance(found["off"], weights_of(plain)) > 1e-4, "the terms must have moved the weights"
    assert distance(found["off"], found["on"]) < 1e-6
    assert distance(found["off"], found["reentrant"]) < 1e-6


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", OFFLINE)
def test_gaps_are_those_of_policy_and_reference_row_by_row(kind, lora, load, model_folder, tokenizer, tmp_path):
    """In training and in evaluation: neither KTO's KL batch nor the reference is ever taken for the policy."""
    rows = rows_of(kind)
    trainer = build(
        kind, load, model_folder, tokenizer, tmp_path, lora=lora, rows=rows, eval_rows=rows, per_device_train_batch_size=8,
        per_device_eval_batch_size=8, max_steps=1, learning_rate=0.0,
    )  # fmt: skip
    readout = make_readout(trainer.model)
    monitor = make_readout(trainer.model, "watched", layer=2, seed=4)
    attach(trainer, regularizers=[ConceptAnchor(readout=readout, weight=0.1)], monitors=[monitor])
    policy, reference = snapshot(trainer, load), load()
    gaps, watched, drifts = [], [], []
    for ids, mask in rows_by_hand(trainer, trainer.train_dataset, {tokenizer.eos_token_id}):
        scores = [readout(activations_by_hand(m, ids, readout.hook_point))[mask, 0] for m in (policy, reference)]
        gaps.append(float((scores[0] - scores[1]).pow(2).mean()))
        now, start = (
            monitor(activations_by_hand(m, ids, monitor.hook_point))[mask, 0].mean() for m in (policy, reference)
        )
        watched.append(float(now))
        drifts.append(float(now - start))
    trainer.train()
    trainer.evaluate()
    expected = sum(gaps) / len(gaps)
    assert expected > 1e-4
    for prefix in ("", "eval_"):
        assert logged(trainer, f"{prefix}interp/anchor_concept/squared_gap")[0] == pytest.approx(expected, rel=2e-4)
        assert logged(trainer, f"{prefix}interp/watched/mean_score")[0] == pytest.approx(
            sum(watched) / len(watched), abs=2e-4
        )
        if kind != "SFT":
            assert logged(trainer, f"{prefix}interp/watched/drift")[0] == pytest.approx(
                sum(drifts) / len(drifts), abs=2e-4
            )


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_rollout_gaps_are_those_of_each_completion(kind, lora, load, model_folder, tokenizer, tmp_path):
    """Batches are shuffled and split after the reference has read them: scores stay with their rows."""
    trainer = build(
        kind, load, model_folder, tokenizer, tmp_path, lora=lora, per_device_train_batch_size=2, gradient_accumulation_steps=4,
        num_generations=4, max_steps=2, learning_rate=0.0, temperature=1.3,
    )  # fmt: skip
    readout = make_readout(trainer.model)
    attach(trainer, regularizers=[ConceptAnchor(readout=readout, weight=0.1)])
    seen = []
    original = trainer.interp_terms.added

    def added(inputs, own, items):
        seen.append({key: value.clone() for key, value in inputs.items() if isinstance(value, torch.Tensor)})
        return original(inputs, own, items)

    trainer.interp_terms.added = added
    trainer.train()
    policy, reference = snapshot(trainer, load), load()
    gaps = []
    for inputs in seen:
        for row in range(len(inputs["prompt_ids"])):
            prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
            completion = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()]
            ids = torch.cat([prompt, completion])
            mask = (torch.arange(len(ids)) >= len(prompt)) & (ids != tokenizer.eos_token_id)
            now, start = (readout(activations_by_hand(m, ids, LAYER))[mask, 0] for m in (policy, reference))
            gaps.append(float((now - start).pow(2).mean()) if mask.any() else 0.0)
    found = logged(trainer, "interp/anchor_concept/squared_gap")
    assert len(gaps) == 16
    assert sum(found) / 2 == pytest.approx(sum(gaps) / 16, rel=5e-4)


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_scores_computed_once_equal_those_of_the_reference_pass(kind, lora, load, model_folder, tokenizer, tmp_path):
    found = {}
    for precompute in (False, True):
        trainer = build(
            kind, load, model_folder, tokenizer, tmp_path / str(precompute), lora=lora, moved=False, max_steps=3,
            precompute_ref_log_probs=precompute, eval_rows=rows_of(kind, 4, seed=9),
        )  # fmt: skip
        terms = [term for term in terms_for(kind, trainer.model) if term.name != "whole"]
        attach(trainer, regularizers=terms)
        trainer.train()
        trainer.evaluate()
        found[precompute] = (weights_of(trainer), logged(trainer, "eval_interp/anchor_concept/squared_gap"))
        assert trainer.interp_terms.own_forwards == 0
    assert distance(found[False][0], found[True][0]) < 1e-6
    assert found[False][1] == pytest.approx(found[True][1], rel=1e-4)
    assert found[True][1][0] > 1e-6


def test_a_row_that_was_not_there_when_scores_were_computed_is_refused(load, model_folder, tokenizer, tmp_path):
    trainer = build("DPO", load, model_folder, tokenizer, tmp_path, moved=False, precompute_ref_log_probs=True)
    attach(trainer, regularizers=[ConceptAnchor(readout=make_readout(trainer.model), weight=1.0)])
    trainer.interp_terms.scores.rows.clear()
    with pytest.raises(RuntimeError, match="no reference scores"):
        trainer.train()


@pytest.mark.parametrize("kind", OFFLINE)
def test_padding_does_not_move_a_term(kind, load, model_folder, tokenizer, tmp_path):
    found = []
    for multiple in (None, 64):
        trainer = build(
            kind, load, model_folder, tokenizer, tmp_path / str(multiple), per_device_train_batch_size=8, max_steps=1,
            learning_rate=0.0, pad_to_multiple_of=multiple,
        )  # fmt: skip
        attach(trainer, regularizers=terms_for(kind, trainer.model))
        trainer.train()
        keys = [key for key in trainer.state.log_history[0] if key.startswith("interp/") and "weight" not in key]
        found.append({key: trainer.state.log_history[0][key] for key in keys})
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        assert found[1][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_weight_of_zero_and_monitors_leave_the_run_bit_for_bit(kind, lora, load, model_folder, tokenizer, tmp_path):
    found = []
    for name in ("plain", "zero"):
        changes = {} if kind == "SFT" else {"disable_dropout": False}  # the adapters' own dropout draws random numbers
        dropout = {"lora_dropout": 0.1} if lora else False
        trainer = build(kind, load, model_folder, tokenizer, tmp_path / name, lora=dropout, **changes)
        if name == "zero":
            watched = [] if kind in ("GRPO", "RLOO") else [make_readout(trainer.model, "watched")]
            attach(trainer, regularizers=terms_for(kind, trainer.model, weight=0.0), monitors=watched)
        trainer.train()
        found.append((weights_of(trainer), logged(trainer, "loss"), logged(trainer, "grad_norm")))
    assert distance(found[0][0], found[1][0]) == 0.0
    assert found[0][1:] == found[1][1:]


@pytest.mark.parametrize("kind", KINDS)
def test_the_logged_loss_contains_the_terms(kind, load, model_folder, tokenizer, tmp_path):
    found = {}
    for name in ("plain", "with"):
        trainer = build(
            kind, load, model_folder, tokenizer, tmp_path / name, max_steps=1, gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
        )  # fmt: skip
        if name == "with":
            attach(trainer, regularizers=terms_for(kind, trainer.model))
        trainer.train()
        found[name] = trainer.state.log_history[0]
    parts = [value for key, value in found["with"].items() if key.endswith("/loss")]
    assert len(parts) == len(terms_for(kind, trainer.model))
    assert sum(parts) > 1e-3
    assert found["with"]["loss"] - found["plain"]["loss"] == pytest.approx(sum(parts), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", OFFLINE)
def test_a_readout_never_gets_a_gradient(kind, load, model_folder, tokenizer, tmp_path):
    trainer = build(kind, load, model_folder, tokenizer, tmp_path)
    terms = terms_for(kind, trainer.model)
    leaf = terms[0].readout.weight.requires_grad_()
    basis = terms[1].subspace.basis.requires_grad_()
    attach(trainer, regularizers=terms)
    trainer.train()
    assert leaf.grad is None
    assert basis.grad is None
    assert not [name for name, _ in trainer.model.named_parameters() if "concept" in name]


@pytest.mark.parametrize("kind", KINDS)
def test_both_doors_are_one(kind, load, model_folder, tokenizer, tmp_path):
    found = []
    for ours in (False, True):
        model = perturb(load())
        asked = {"regularizers": terms_for(kind, model)}
        trainer = make_trainer(kind, model, tokenizer, tmp_path / str(ours), ours=ours, attach=asked if ours else None)
        if not ours:
            attach(trainer, **asked)
        trainer.train()
        assert type(trainer).__name__ == f"Interp{kind}Trainer"
        found.append((weights_of(trainer), logged(trainer, "loss")))
    assert distance(found[0][0], found[1][0]) == 0.0
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padding_free"])
def test_packed_rows_are_read_sequence_by_sequence(packing, load, model_folder, tokenizer, tmp_path):
    """No attention mask, positions that start anew: terms are those of the same sequences one by one."""
    rows = rows_of("SFT", 8)
    changes = (
        {"packing": True, "max_length": 64, "per_device_train_batch_size": 2}
        if packing
        else {"padding_free": True, "max_length": None}
    )
    trainer = build(
        "SFT", load, model_folder, tokenizer, tmp_path, rows=rows, max_steps=1, learning_rate=0.0, **changes
    )
    seen = []
    attach(trainer, regularizers=[ConceptAnchor(readout=make_readout(trainer.model), weight=0.1)])
    original = trainer.interp_terms.added

    def added(inputs, own, items):
        seen.append({key: value.clone() for key, value in inputs.items() if isinstance(value, torch.Tensor)})
        return original(inputs, own, items)

    trainer.interp_terms.added = added
    readout = make_readout(trainer.model)
    policy, reference = snapshot(trainer, load), load()
    trainer.train()
    assert "attention_mask" not in seen[0]
    gaps = []
    for inputs in seen:
        for row in range(len(inputs["input_ids"])):
            starts = (inputs["position_ids"][row] == 0).nonzero()[:, 0].tolist()
            for begin, end in zip(starts, [*starts[1:], len(inputs["position_ids"][row])], strict=True):
                ids, labels = inputs["input_ids"][row][begin:end], inputs["labels"][row][begin:end]
                mask = (labels != -100) & (ids != tokenizer.eos_token_id)
                mask[0] = False
                if not (labels[1:] != -100).any():
                    continue
                now, start = (readout(activations_by_hand(m, ids, LAYER))[mask, 0] for m in (policy, reference))
                gaps.append(float((now - start).pow(2).mean()))
    assert len(gaps) > len(seen[0]["input_ids"])
    assert logged(trainer, "interp/anchor_concept/squared_gap")[0] == pytest.approx(sum(gaps) / len(gaps), rel=2e-4)


def test_a_hook_point_that_never_fires_stops_the_run(load, model_folder, tokenizer, tmp_path):
    """DPO's fused head reads `lm_head`'s weight and never calls it."""
    trainer = build("DPO", load, model_folder, tokenizer, tmp_path)
    attach(trainer, regularizers=[DriftPenalty(hook_point="lm_head", weight=1.0)])
    start = weights_of(trainer)
    with pytest.raises(RuntimeError, match="`lm_head` did not fire"):
        trainer.train()
    assert distance(start, weights_of(trainer)) == 0.0


def test_schedules_move_the_weight_with_the_step(load, model_folder, tokenizer, tmp_path):
    trainer = build("DPO", load, model_folder, tokenizer, tmp_path, max_steps=4)
    readout = make_readout(trainer.model)
    attach(
        trainer,
        regularizers=[
            ConceptAnchor(readout=readout, weight=2.0, schedule=Schedule(kind="decay", floor=0.5), name="decays"),
            ConceptAnchor(readout=readout, weight=2.0, schedule=Schedule(kind="warmup", steps=2), name="warms"),
        ],
    )
    trainer.train()
    assert logged(trainer, "interp/decays/weight") == pytest.approx([2.0, 1.75, 1.5, 1.25])
    assert logged(trainer, "interp/warms/weight") == pytest.approx([1.0, 2.0, 2.0])  # at 0 a term is not computed


def test_detach_gives_the_stock_trainer_back(load, model_folder, tokenizer, tmp_path):
    from trl import DPOTrainer

    found = []
    for attached in (False, True):
        trainer = build("DPO", load, model_folder, tokenizer, tmp_path / str(attached))
        if attached:
            attach(trainer, regularizers=terms_for("DPO", trainer.model)).detach()
            assert type(trainer) is DPOTrainer
        trainer.train()
        found.append(weights_of(trainer))
    assert distance(*found) == 0.0


def test_dpo_by_hand_helpers_agree_with_trl(load, model_folder, tokenizer, tmp_path):
    """What the hand computations of the other tests stand on."""
    trainer = build(
        "DPO", load, model_folder, tokenizer, tmp_path, per_device_train_batch_size=8, max_steps=1, learning_rate=0.0
    )
    policy = snapshot(trainer, load)
    chosen = [log_probs_by_hand(policy, *row) for row in rows_by_hand(trainer, trainer.train_dataset)[:8]]
    trainer.train()
    assert logged(trainer, "logps/chosen")[0] == pytest.approx(sum(chosen) / 8, rel=1e-5)
    assert isinstance(trainer.train_dataset, Dataset)


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_rollout_trainers_evaluate_with_their_terms(kind, load, model_folder, tokenizer, tmp_path):
    trainer = build(
        kind, load, model_folder, tokenizer, tmp_path, eval_rows=rows_of(kind, 4), per_device_eval_batch_size=4
    )
    attach(trainer, regularizers=terms_for(kind, trainer.model))
    before = trainer.evaluate()
    trainer.train()
    assert before["eval_interp/anchor_concept/squared_gap"] > 1e-4
    assert trainer.evaluate()["eval_interp/held/relative_square"] > 0
