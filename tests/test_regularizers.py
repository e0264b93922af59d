"""Regularizers and interventions against computations by hand, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import make_card, make_readout, with_lora
from torch.nn.functional import logsigmoid
from training import (
    KINDS,
    OFFLINE,
    activations_by_hand,
    distance,
    log_probs_by_hand,
    logged,
    make_trainer,
    perturb,
    rows_by_hand,
    rows_of,
    snapshot,
    weights_of,
)

from interp_rlhf import (
    ConceptAblation,
    ConceptAnchor,
    ConceptPenalty,
    DriftConfig,
    DriftPenalty,
    ExplainAway,
    FeatureConstraint,
    Latents,
    PreventativeSteering,
    Schedule,
    Subspace,
    attach,
)
from interp_rlhf.concepts.card import Transform
from interp_rlhf.training.make import make_intervention, make_regularizer
from interp_rlhf.training.terms.pairs import MARGIN_LOSSES

LAYER = "model.layers.1"
BETA = 0.3
# TRL's defaults, which the formulas below need.
TAU, SMOOTHING = 0.05, 0.1


def by_hand(trainer, load, tokenizer, readout):
    """Per completion, chosen first: log-prob of policy and reference, length, mean score on the reference."""
    policy, reference = snapshot(trainer, load), load()
    found = {"policy": [], "reference": [], "length": [], "score": []}
    whole = rows_by_hand(trainer, trainer.train_dataset)
    shorter = rows_by_hand(trainer, trainer.train_dataset, {tokenizer.eos_token_id})
    for (ids, mask), (_, counted) in zip(whole, shorter, strict=True):
        found["policy"].append(log_probs_by_hand(policy, ids, mask))
        found["reference"].append(log_probs_by_hand(reference, ids, mask))
        found["length"].append(float(mask.sum()))
        tokens = readout(activations_by_hand(reference, ids, readout.hook_point))[counted, 0]
        found["score"].append(float(tokens.mean() * readout.scale + readout.offset))
    return {key: torch.tensor(values, dtype=torch.float64).view(2, -1) for key, values in found.items()}


def loss_by_hand(z, loss_type):
    """DPO's losses as functions of z = β · (chosen − rejected score)."""
    if loss_type in ("sigmoid", "sigmoid_norm"):
        return -logsigmoid(z)
    if loss_type == "hinge":
        return torch.relu(1 - z)
    if loss_type == "ipo":
        return (z / BETA - 1 / (2 * BETA)) ** 2
    if loss_type == "robust":
        return (-(1 - SMOOTHING) * logsigmoid(z) + SMOOTHING * logsigmoid(-z)) / (1 - 2 * SMOOTHING)
    if loss_type == "exo_pair":
        return torch.sigmoid(z) * (logsigmoid(z) - math.log1p(-SMOOTHING)) + torch.sigmoid(-z) * (
            logsigmoid(-z) - math.log(SMOOTHING)
        )
    share = torch.sigmoid(z / TAU)  # discopop
    return -logsigmoid(z) * (1 - share) + torch.exp(-z) * share


@pytest.mark.parametrize("weight", [0.7, -0.4])
@pytest.mark.parametrize("precompute", [False, True], ids=["pass", "precomputed"])
@pytest.mark.parametrize("loss_type", [*MARGIN_LOSSES, "ipo", "sigmoid_norm"])
def test_explaining_away_is_its_formula(loss_type, precompute, weight, load, tokenizer, tmp_path):
    if precompute and (weight < 0 or loss_type not in ("sigmoid", "ipo")):
        pytest.skip("one sign and two losses say it")
    smoothing = {"label_smoothing": SMOOTHING} if loss_type in ("robust", "exo_pair") else {}
    model = load() if precompute else perturb(load())
    trainer = make_trainer(
        "DPO", model, tokenizer, tmp_path, per_device_train_batch_size=8, max_steps=1, learning_rate=0.0, beta=BETA,
        loss_type=[loss_type], precompute_ref_log_probs=precompute, **smoothing,
    )  # fmt: skip
    readout = make_readout(trainer.model, "concept", scale=0.6, offset=-0.2)
    attach(trainer, regularizers=[ExplainAway(readout=readout, weight=weight)])
    hand = by_hand(trainer, load, tokenizer, readout)
    trainer.train()
    scores = hand["policy"] - hand["reference"]
    if loss_type in ("ipo", "sigmoid_norm"):
        scores = scores / hand["length"]
    margin, explained = scores[0] - scores[1], hand["score"][0] - hand["score"][1]
    expected = loss_by_hand(BETA * margin + weight * explained, loss_type).mean()
    assert logged(trainer, "loss")[0] == pytest.approx(float(expected), rel=1e-4)
    assert abs(float(expected - loss_by_hand(BETA * margin, loss_type).mean())) > 1e-3
    # TRL's rewards contain the shift; ours do not.
    plain = BETA * (hand["policy"] - hand["reference"])
    assert logged(trainer, "interp/explain_concept/rewards/chosen")[0] == pytest.approx(
        float(plain[0].mean()), abs=2e-4
    )
    assert logged(trainer, "interp/explain_concept/rewards/margins")[0] == pytest.approx(
        float((plain[0] - plain[1]).mean()), abs=2e-4
    )
    shift = weight * hand["score"] * (hand["length"] if loss_type in ("ipo", "sigmoid_norm") else 1)
    assert logged(trainer, "rewards/chosen")[0] == pytest.approx(float((plain + shift)[0].mean()), abs=1e-3)
    assert logged(trainer, "interp/explain_concept/score/margins")[0] == pytest.approx(
        float(explained.mean()), abs=1e-4
    )


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm"])
@pytest.mark.parametrize("features", ["latents", "wide_latents", "probe"])
def test_feature_constraint_is_its_formula_on_a_pair_of_different_lengths(
    loss_type, features, load, tokenizer, tmp_path
):
    words = "warm kind hope care and or but so"
    rows = [
        {
            "prompt": [{"role": "user", "content": "what is it"}],
            "chosen": [{"role": "assistant", "content": words}],
            "rejected": [{"role": "assistant", "content": "cold rude"}],
        }
    ]
    trainer = make_trainer(
        "DPO", perturb(load()), tokenizer, tmp_path, rows=rows, per_device_train_batch_size=1, max_steps=1, learning_rate=0.0,
        beta=BETA, loss_type=[loss_type],
    )  # fmt: skip
    random = torch.Generator().manual_seed(5)
    count = {"latents": 16, "wide_latents": 64, "probe": 1}[features]
    readout = Latents(
        "latents", LAYER, torch.randn(count, 32, generator=random), torch.randn(count, generator=random) * 0.1
    )
    if features == "probe":
        readout = make_readout(trainer.model, include_end_of_turn=True)
    k, alpha = 3, 0.8
    attach(trainer, regularizers=[FeatureConstraint(readout=readout, k=k, weight=alpha, name="fpo")])
    policy, reference = snapshot(trainer, load), load()
    distances, scores = [], []
    for ids, mask in rows_by_hand(trainer, trainer.train_dataset):
        now, start = (readout(activations_by_hand(m, ids, LAYER))[mask].double().mean(0) for m in (policy, reference))
        chosen = set(now.topk(min(k, count)).indices.tolist()) | set(start.topk(min(k, count)).indices.tolist())
        distances.append(sum(float(now[i] - start[i]) ** 2 for i in chosen) / min(k, count))
        length = float(mask.sum()) if loss_type == "sigmoid_norm" else 1.0
        scores.append((log_probs_by_hand(policy, ids, mask) - log_probs_by_hand(reference, ids, mask)) / length)
    delta = alpha * BETA * (distances[1] - distances[0])
    z = torch.tensor(BETA * (scores[0] - scores[1]), dtype=torch.float64)
    assert abs(delta) > 1e-4
    trainer.train()
    assert logged(trainer, "interp/fpo/delta")[0] == pytest.approx(delta, rel=1e-3)
    assert logged(trainer, "loss")[0] == pytest.approx(float(-logsigmoid(z - delta)), rel=1e-5)


@pytest.mark.parametrize("features", ["probe", "relu", "topk"])
def test_feature_constraint_sends_no_gradient_through_the_chosen_distance(features, load, tokenizer, tmp_path):
    """δ = α (β D(y_l) − sg[β D(y_w)]): without the stop the update is another one, so there is a gradient through D."""
    found = []
    random = torch.Generator().manual_seed(5)
    latents = Latents(
        "latents", LAYER, torch.randn(64, 32, generator=random), torch.zeros(64), k=16 if features == "topk" else None
    )
    for stop in (True, False):
        trainer = make_trainer("DPO", perturb(load()), tokenizer, tmp_path / str(stop), max_steps=1, optim="sgd")
        readout = make_readout(trainer.model) if features == "probe" else latents
        term = FeatureConstraint(readout=readout, weight=5.0, stop_gradient=stop)
        attach(trainer, regularizers=[term])
        trainer.train()
        found.append((weights_of(trainer), logged(trainer, "loss")))
    assert found[0][1] == found[1][1]
    assert distance(found[0][0], found[1][0]) > 1e-5


def test_drift_penalty_is_its_formula(load, tokenizer, tmp_path):
    trainer = make_trainer(
        "SFT", perturb(load()), tokenizer, tmp_path, per_device_train_batch_size=8, max_steps=1, learning_rate=0.0
    )
    subspace = Subspace.from_readouts([make_readout(trainer.model, seed=seed) for seed in (1, 2)])
    attach(
        trainer,
        regularizers=[
            DriftPenalty(hook_point=LAYER, weight=1.0, name="whole"),
            DriftPenalty(subspace=subspace, weight=1.0, name="part"),
        ],
        reference=load(),
    )
    policy, reference = snapshot(trainer, load), load()
    whole, part = [], []
    for ids, mask in rows_by_hand(trainer, trainer.train_dataset):
        now, start = (activations_by_hand(m, ids, LAYER)[mask] for m in (policy, reference))
        norm = start.pow(2).sum(-1)
        whole.append(float(((now - start).pow(2).sum(-1) / norm).mean()))
        projected = (now - start) @ subspace.basis.T @ subspace.basis
        part.append(float((projected.pow(2).sum(-1) / norm).mean()))
    trainer.train()
    assert trainer.interp_terms.own_forwards == 1
    assert logged(trainer, "interp/whole/relative_square")[0] == pytest.approx(sum(whole) / len(whole), rel=1e-3)
    assert logged(trainer, "interp/part/relative_square")[0] == pytest.approx(sum(part) / len(part), rel=1e-3)


def test_anchors_hold_the_concept_and_pooled_ones_its_pooled_score(load, tokenizer, tmp_path):
    drift = {}
    for name, weight, pooled in (("plain", 1e-12, False), ("token", 3.0, False), ("pooled", 3.0, True)):
        trainer = make_trainer("DPO", load(), tokenizer, tmp_path / name, max_steps=12, beta=0.1)
        readout = make_readout(trainer.model)
        attach(trainer, regularizers=[ConceptAnchor(readout=readout, weight=weight, pooled=pooled, name="anchor")])
        trainer.train()
        drift[name] = sum(abs(value) for value in logged(trainer, "interp/anchor/drift")[-4:])
    assert drift["token"] < drift["plain"] / 2
    assert drift["pooled"] < drift["plain"] / 2


def test_a_random_direction_has_the_same_norm_and_its_own_seed(load):
    readout = make_readout(load())
    terms = [ConceptAnchor(readout=readout, weight=1.0, random_direction=seed) for seed in (10, 10, 11)]
    assert torch.equal(terms[0].readout.weight, terms[1].readout.weight)
    assert not torch.equal(terms[0].readout.weight, terms[2].readout.weight)
    for term in terms:
        assert float(term.readout.weight.norm()) == pytest.approx(float(readout.weight.norm()), rel=1e-5)
        assert abs(float(torch.cosine_similarity(term.readout.weight, readout.weight, dim=0))) < 0.6


def test_feature_constraint_weighs_micro_batches_as_the_trainer_does(load, tokenizer, tmp_path):
    """Five pairs in micro-batches of four and one: the loss is TRL's own, with δ in its sigmoid."""

    def trainer_of(name, **changes):
        return make_trainer(
            "DPO", perturb(load()), tokenizer, tmp_path / name, rows=rows_of("DPO", 5), max_steps=1, learning_rate=0.0,
            beta=BETA, **changes,
        )  # fmt: skip

    found = []
    for batch in ([0, 1, 2, 3], [4]):
        rows = [rows_of("DPO", 5)[i] for i in batch]
        alone = make_trainer(
            "DPO", perturb(load()), tokenizer, tmp_path / str(len(batch)), rows=rows, per_device_train_batch_size=len(batch),
            max_steps=1, learning_rate=0.0, beta=BETA,
        )  # fmt: skip
        attach(alone, regularizers=[FeatureConstraint(readout=make_readout(alone.model), weight=30.0)])
        alone.train()
        found.append(logged(alone, "loss")[0])
    trainer = trainer_of("both", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(trainer.train_dataset)
    attach(trainer, regularizers=[FeatureConstraint(readout=make_readout(trainer.model), weight=30.0)])
    trainer.train()
    assert abs(found[0] - found[1]) > 1e-3
    assert logged(trainer, "loss")[0] == pytest.approx(sum(found) / 2, rel=1e-5)


def test_a_clip_on_a_card_does_not_stop_the_gradient(load, tokenizer, tmp_path):
    plain = make_trainer("DPO", load(), tokenizer, tmp_path / "plain", max_steps=1)
    plain.train()
    for index, make in enumerate((
        lambda r: ConceptPenalty(readout=r, weight=1.0, allow_differentiable_probe=True),
        lambda r: ConceptAnchor(readout=r, weight=1.0, pooled=True),
    )):  # fmt: skip
        model = perturb(load()) if index else load()
        trainer = make_trainer("DPO", model, tokenizer, tmp_path / str(index), max_steps=1)
        readout = make_readout(trainer.model, offset=50.0, transform=Transform(mean=0.0, std=1.0, clip=[-3.0, 3.0]))
        term = make(readout)
        attach(trainer, regularizers=[term], monitors=[make_readout(trainer.model, "holdout", layer=2, seed=7)])
        trainer.train()
        value = logged(trainer, f"interp/{term.name}/{'squared_gap' if index else 'score'}")[0]
        assert value > (0 if index else 40)
        if not index:
            assert distance(weights_of(trainer), weights_of(plain)) > 1e-4


def test_the_control_is_as_strong_as_the_concept(load):
    readout = make_readout(load(), scale=4.0)
    control = ConceptAnchor(readout=readout, weight=1.0, pooled=True, random_direction=3).readout
    assert control.scale * control.weight.norm() == pytest.approx(4.0 * float(readout.weight.norm()), rel=1e-5)


def test_ablation_is_exact_in_bfloat16_training_too(load, tokenizer, tmp_path):
    trainer = make_trainer("SFT", perturb(load()), tokenizer, tmp_path, max_steps=1, learning_rate=0.0, bf16=True)
    readout = make_readout(trainer.model)
    inside = readout.__class__("inside", readout.hook_point, readout.weight)
    attach(trainer, interventions=[ConceptAblation(subspace=Subspace.from_readouts([readout]))], monitors=[inside])
    trainer.train()
    assert abs(logged(trainer, "interp/inside/mean_score")[0]) < 1e-4


def test_claims_about_another_model_are_refused_in_subspaces_too(load, tokenizer, tmp_path):
    from tiny import make_model

    card = make_card(tmp_path, make_model("llama", tokenizer, seed=7), tokenizer)
    for asked in (
        {"interventions": [{"kind": "concept_ablation", "cards": [str(card)]}]},
        {"regularizers": [{"kind": "drift_penalty", "cards": [str(card)], "weight": 1.0}]},
    ):
        trainer = make_trainer("DPO", load(), tokenizer, tmp_path / "out")
        with pytest.raises(ValueError, match="was made on `tiny` and the model that would be read is not that one"):
            attach(trainer, **asked)
    narrow = Subspace(LAYER, torch.eye(16)[:1])
    for asked in (
        {"interventions": [ConceptAblation(subspace=narrow)]},
        {"regularizers": [DriftPenalty(subspace=narrow, weight=1.0)]},
    ):
        with pytest.raises(ValueError, match="has width 16 – the model's is 32"):
            attach(make_trainer("SFT", load(), tokenizer, tmp_path / "out"), **asked)


def test_a_monitor_behind_an_intervention_has_no_drift(load, tokenizer, tmp_path):
    trainer = make_trainer("DPO", load(), tokenizer, tmp_path, max_steps=1, learning_rate=0.0)
    below, above = make_readout(trainer.model, "below", layer=0), make_readout(trainer.model, "above", layer=2)
    attach(
        trainer, monitors=[below, above],
        interventions=[PreventativeSteering(readout=make_readout(trainer.model), alpha=3.0)],
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "interp/below/drift")[0] == pytest.approx(0, abs=1e-5)
    assert not logged(trainer, "interp/above/drift")


def test_what_attach_began_is_undone_where_a_later_part_refuses(load, tokenizer, tmp_path):
    trainer = make_trainer("GRPO", load(), tokenizer, tmp_path, beta=0.1)
    callbacks = list(trainer.callback_handler.callbacks)
    from tiny import make_model

    other = make_card(tmp_path, make_model("llama", tokenizer, seed=7), tokenizer, role="monitor", evidence=False)
    with pytest.raises(ValueError, match="was made on `tiny`"):
        attach(trainer, **anchored(trainer), monitors=[other])
    assert trainer.callback_handler.callbacks == callbacks
    for model in (trainer.model, trainer.ref_model):
        assert not [module for module in model.modules() if module._forward_hooks]


def test_detach_leaves_no_callback(load, tokenizer, tmp_path):
    trainer = make_trainer("DPO", load(), tokenizer, tmp_path)
    callbacks = list(trainer.callback_handler.callbacks)
    for _ in range(2):
        attach(trainer, **anchored(trainer), drift=DriftConfig(every=1)).detach()
        assert trainer.callback_handler.callbacks == callbacks


def test_a_trained_policy_is_not_taken_for_its_reference(load, tokenizer, tmp_path):
    trainer = make_trainer("DPO", load(), tokenizer, tmp_path, precompute_ref_log_probs=True, max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match="has made 1 steps – expected a fresh one"):
        attach(trainer, **anchored(trainer))


def test_a_differentiable_penalty_needs_a_flag_and_a_holdout(load, tokenizer, tmp_path):
    trainer = make_trainer("DPO", load(), tokenizer, tmp_path, max_steps=8)
    readout, holdout = make_readout(trainer.model), make_readout(trainer.model, "holdout", layer=2, seed=7)
    with pytest.raises(ValueError, match="`allow_differentiable_probe=False` – expected True"):
        ConceptPenalty(readout=readout, weight=1.0)
    penalty = ConceptPenalty(readout=readout, weight=1.0, allow_differentiable_probe=True)
    with pytest.raises(ValueError, match="holdout monitor"):
        attach(trainer, regularizers=[penalty])
    for same in (readout, make_readout(trainer.model, "a_copy")):
        with pytest.raises(ValueError, match="holdout monitor"):
            attach(trainer, regularizers=[penalty], monitors=[same])
    attach(trainer, regularizers=[penalty], monitors=[holdout])
    trainer.train()
    found = logged(trainer, "interp/penalty_concept/penalty")
    assert found[-1] < found[0] / 2
    assert logged(trainer, "interp/holdout/mean_score")


@pytest.mark.parametrize("kind", OFFLINE)
def test_ablation_leaves_nothing_in_the_subspace_forward_and_backward(kind, load, tokenizer, tmp_path):
    model = perturb(load())
    plain = make_trainer(kind, perturb(load()), tokenizer, tmp_path / "plain", max_steps=1, learning_rate=0.0)
    plain.train()
    trainer = make_trainer(
        kind, model, tokenizer, tmp_path, max_steps=1, learning_rate=0.0, eval_rows=rows_of(kind, 4)
    )
    seen = []

    def keep(module, args, output):
        if torch.is_grad_enabled():
            output.retain_grad()
            seen.append(output)

    trainer.model.model.layers[1].register_forward_hook(keep)  # before ours: it sees what the layer made
    readouts = [make_readout(trainer.model, f"r{seed}", seed=seed) for seed in (1, 2)]
    inside = [r.__class__(r.name, r.hook_point, r.weight) for r in readouts]  # no bias: ⟨h, r⟩ alone
    subspace = Subspace.from_readouts(readouts)
    attach(trainer, interventions=[ConceptAblation(subspace=subspace)], monitors=inside)
    trainer.train()
    trainer.evaluate()
    for readout in inside:
        assert abs(logged(trainer, f"interp/{readout.name}/mean_score")[0]) < 1e-4
        assert abs(logged(trainer, f"eval_interp/{readout.name}/mean_score")[0]) > 1e-2
    assert seen
    gradient = next(h.grad for h in seen if h.grad is not None and h.grad.abs().max() > 0)
    assert float(subspace.coordinates(gradient).abs().max()) < 1e-6 * max(1.0, float(gradient.abs().max()))
    assert logged(trainer, "loss")[0] != logged(plain, "loss")[0]
    if kind == "DPO":  # the reference is what it was: TRL's reward is β (log π − log π_0)
        reference = [logged(t, "logps/chosen")[0] - logged(t, "rewards/chosen")[0] / t.beta for t in (plain, trainer)]
        assert reference[0] == pytest.approx(reference[1], abs=2e-3)


@pytest.mark.parametrize("kind", OFFLINE)
def test_interventions_and_their_controls_train_and_leave_inference_alone(kind, load, tokenizer, tmp_path):
    found = {}
    for name, made in {
        "plain": lambda r: [],
        "steered": lambda r: [PreventativeSteering(readout=r, alpha=2.0)],
        "random": lambda r: [PreventativeSteering(readout=r, alpha=2.0, random_direction=10)],
        "ablated": lambda r: [ConceptAblation(subspace=Subspace.from_readouts([r]), random_direction=10)],
    }.items():
        trainer = make_trainer(kind, load(), tokenizer, tmp_path / name, lora={}, eval_rows=rows_of(kind, 4))
        readout = make_readout(trainer.model)
        attachment = attach(trainer, interventions=made(readout))
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        found[name] = (before, weights_of(trainer))
        trainer.model.eval()
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            during = trainer.model(input_ids=ids).logits
            attachment.detach()
            assert torch.equal(during, trainer.model(input_ids=ids).logits)
    for name in ("steered", "random", "ablated"):
        assert found[name][0] == found["plain"][0], "evaluation sees no intervention"
        assert distance(found[name][1], found["plain"][1]) > 1e-5
    assert distance(found["steered"][1], found["random"][1]) > 1e-5


@pytest.mark.parametrize("lora", [None, {}], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_interventions_are_the_same_under_checkpointing(kind, lora, load, tokenizer, tmp_path):
    found = {}
    for name, changes in {
        "off": {"gradient_checkpointing": False},
        "non-reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    }.items():
        trainer = make_trainer(kind, load(), tokenizer, tmp_path / name, lora=lora, max_steps=2, **changes)
        readout = make_readout(trainer.model)
        ablation = ConceptAblation(subspace=Subspace.from_readouts([make_readout(trainer.model, layer=0, seed=3)]))
        attach(trainer, interventions=[ablation, PreventativeSteering(readout=readout, alpha=2.0)])
        trainer.train()
        found[name] = weights_of(trainer)
    for name in ("non-reentrant", "reentrant"):
        assert distance(found[name], found["off"]) < 1e-6, name


def test_subspaces_span_what_they_were_made_from(load, tokenizer):
    model = load()
    readouts = [make_readout(model, f"r{seed}", seed=seed) for seed in range(3)]
    subspace = Subspace.from_readouts([*readouts, readouts[0]])
    assert subspace.basis.shape == (3, 32)
    assert torch.allclose(subspace.basis @ subspace.basis.T, torch.eye(3), atol=1e-5)
    for readout in readouts:
        assert float(subspace.ablate(readout.weight[None]).norm()) < 1e-5
    control = subspace.random(3)
    assert torch.allclose(control.basis @ subspace.basis.T, torch.zeros(3, 3), atol=1e-5)
    assert torch.equal(control.basis, subspace.random(3).basis)
    components = Subspace.from_pca(
        model, tokenizer, ["warm kind good day", "cold rude bad night sorry"], LAYER, rank=2
    )
    assert torch.allclose(components.basis @ components.basis.T, torch.eye(2), atol=1e-5)
    latents = Latents("l", LAYER, torch.randn(4, 32), torch.zeros(4))
    assert Subspace.from_readouts([latents.choose([1, 2])]).basis.shape == (2, 32)
    with pytest.raises(ValueError, match="one hook point"):
        Subspace.from_readouts([readouts[0], make_readout(model, layer=2)])
    with pytest.raises(ValueError, match="`rank` is 99"):
        Subspace.from_pca(model, tokenizer, ["warm kind"], LAYER, rank=99)


def test_latents_are_relu_or_jump_relu_of_the_centred_activation():
    random = torch.Generator().manual_seed(0)
    encoder, bias, center = (torch.randn(*shape, generator=random) for shape in ((6, 4), (6,), (4,)))
    activation = torch.randn(2, 3, 4, generator=random)
    before = (activation - center) @ encoder.T + bias
    assert torch.allclose(Latents("l", "x", encoder, bias, center)(activation), before.relu(), atol=1e-5)
    threshold = torch.full((6,), 0.5)
    jump = Latents("l", "x", encoder, bias, center, threshold)
    assert torch.allclose(jump(activation), torch.where(before > 0.5, before, 0.0), atol=1e-5)
    assert torch.allclose(jump.choose([4, 1])(activation), jump(activation)[..., [4, 1]], atol=1e-6)
    with pytest.raises(ValueError, match="0 to 5"):
        jump.choose([6])
    with pytest.raises(ValueError, match="`bias`"):
        Latents("l", "x", encoder, bias[:3])


def test_recipes_say_terms_as_mappings(load, tokenizer, tmp_path):
    card = make_card(tmp_path, load(), tokenizer, weight=0.25)
    anchor = make_regularizer(str(card))
    assert isinstance(anchor, ConceptAnchor)
    assert anchor.weight == 0.25
    warmed = make_regularizer(
        {"kind": "concept_anchor", "card": str(card), "weight": 1, "schedule": {"kind": "warmup", "steps": 10}}
    )
    assert warmed.schedule == Schedule(kind="warmup", steps=10)
    assert make_regularizer({"kind": "drift_penalty", "cards": [str(card)], "weight": 1}).subspace.basis.shape == (
        1,
        32,
    )
    assert make_regularizer({"kind": "explain_away", "card": str(card), "weight": -1}).weight == -1
    assert make_intervention({"kind": "concept_ablation", "cards": [str(card)]}).subspace.basis.shape == (1, 32)
    assert make_intervention({"kind": "preventative_steering", "card": str(card), "alpha": 1.5}).alpha == 1.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "concept_anker", "weight": 1}, "Did you mean `concept_anchor`"),
        ({"kind": "concept_anchor", "weigth": 1}, "Did you mean `weight`"),
        ({"kind": "concept_anchor", "weight": 1}, "no `readout`"),
        ("concept_anchor", "is a kind of regularizer"),
        (7, "7 is no regularizer"),
        ({"kind": "drift_penalty", "weight": 1}, "expected just one"),
        ({"kind": "drift_penalty", "hook_point": LAYER, "weight": -1}, "0 or more"),
        ({"kind": "drift_penalty", "hook_point": LAYER, "weight": float("nan")}, "finite"),
        ({"kind": "drift_penalty", "hook_point": LAYER, "weight": 1, "schedule": {"kind": "cosine"}}, "constant"),
    ],
)
def test_a_term_that_is_said_wrongly_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        make_regularizer(given)
    with pytest.raises(ValueError, match="concept_ablation"):
        make_intervention({"kind": "ablate"})


def anchored(trainer, **changes):
    return {"regularizers": [ConceptAnchor(readout=make_readout(trainer.model, **changes), weight=1.0)]}


def inside_a_layer(trainer):
    return {"regularizers": [DriftPenalty(hook_point="model.layers.1.mlp", weight=1.0)]}


def explained(trainer):
    return {"regularizers": [ExplainAway(readout=make_readout(trainer.model), weight=1.0)]}


def constrained(trainer):
    return {"regularizers": [FeatureConstraint(readout=make_readout(trainer.model))]}


def ablated(trainer):
    return {"interventions": [ConceptAblation(subspace=Subspace.from_readouts([make_readout(trainer.model)]))]}


def ablated_inside(trainer):
    subspace = Subspace("model.layers.1.mlp", torch.eye(32)[:1])
    return {"interventions": [ConceptAblation(subspace=subspace)]}


def whole(trainer):
    return {"regularizers": [DriftPenalty(hook_point=LAYER, weight=1.0)]}


def twice(trainer):
    return {"regularizers": [*whole(trainer)["regularizers"], *whole(trainer)["regularizers"]]}


def nowhere(trainer):
    return {"regularizers": [DriftPenalty(hook_point="model.layers.9", weight=1.0)]}


def both(trainer):
    return anchored(trainer, layer=2) | ablated(trainer)


def named_alike(trainer):
    return {"monitors": [make_readout(trainer.model, "one"), make_readout(trainer.model, "one", seed=4)]}


def endless(trainer):
    return {"interventions": [PreventativeSteering(readout=make_readout(trainer.model), alpha=float("inf"))]}


REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}


@pytest.mark.parametrize(
    ("kind", "asked", "changes", "message"),
    [
        ("DPO", inside_a_layer, REENTRANT, "use_reentrant=False"),
        ("GRPO", inside_a_layer, {**REENTRANT, "beta": 0.1}, "subspace"),
        ("DPO", ablated_inside, {"gradient_checkpointing": True}, "run again in the backward pass"),
        ("GRPO", anchored, {"beta": 0.0}, "Set `beta`"),
        ("RLOO", anchored, {"beta": 0.0}, "Set `beta`"),
        ("GRPO", ablated, {}, "importance ratio"),
        ("RLOO", ablated, {}, "importance ratio"),
        ("GRPO", whole, {}, "Subspace.from_readouts"),
        ("KTO", explained, {}, "expected a trainer of DPO"),
        ("SFT", constrained, {}, "expected a trainer of DPO"),
        *[
            ("DPO", explained, {"loss_type": [loss]}, f"`loss_type` is `{loss}`")
            for loss in ("nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "sft")
        ],
        ("DPO", explained, {"loss_type": ["sigmoid", "ipo"]}, "two amounts"),
        ("DPO", explained, {"ld_alpha": 0.5}, "`ld_alpha` is 0.5"),
        ("DPO", explained, {"f_divergence_type": "forward_kl"}, "reverse_kl"),
        ("DPO", constrained, {"loss_type": ["hinge"]}, "`loss_type` is `hinge`"),
        ("DPO", constrained, {"use_weighting": True}, "`use_weighting` is True"),
        ("DPO", anchored, {"sync_ref_model": True}, "`sync_ref_model` is True"),
        ("DPO", whole, {"precompute_ref_log_probs": True}, "expected a `subspace`"),
        ("DPO", twice, {}, "Two regularizers"),
        ("KTO", named_alike, {}, "monitors are named `one`"),
        ("DPO", both, {}, "at or above the `ConceptAblation`"),
        ("SFT", endless, {}, "expected finite numbers"),
        ("SFT", nowhere, {}, "model.layers.9"),
    ],
)  # fmt: skip
def test_what_would_be_wrong_is_refused_before_the_first_step(
    kind, asked, changes, message, load, tokenizer, tmp_path
):
    trainer = make_trainer(kind, load(), tokenizer, tmp_path, **changes)
    stock, callbacks = type(trainer), len(trainer.callback_handler.callbacks)
    with pytest.raises(ValueError, match=message):
        attach(trainer, **asked(trainer))
    assert type(trainer) is stock
    assert len(trainer.callback_handler.callbacks) == callbacks
    assert not [module for module in trainer.model.modules() if module._forward_hooks]


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_above_the_hook_point_alone_are_refused(kind, load, tokenizer, tmp_path):
    trainer = make_trainer(kind, load(), tokenizer, tmp_path, lora={"layers_to_transform": [2]})
    with pytest.raises(ValueError, match="no trainable parameter is at or below it"):
        attach(trainer, **anchored(trainer, layer=1))
    attach(trainer, **anchored(trainer, layer=2))


def test_trainable_parameters_are_found_below_and_not_above(load):
    from interp_rlhf.training.refusals import trains_below

    model = with_lora(load(), layers_to_transform=[1])
    for point, below in {
        "model.embed_tokens": False, "model.layers.0": False, "model.layers.1": True, "model.layers.2": True,
        "model.layers.1.self_attn": True, "model.norm": True,
    }.items():  # fmt: skip
        assert trains_below(model, point) is below, point
    bare = load()
    assert trains_below(bare, "model.embed_tokens")
    bare.model.embed_tokens.requires_grad_(False)
    assert not trains_below(bare, "model.embed_tokens")


def test_sequence_parallelism_is_refused(load, tokenizer, tmp_path):
    from accelerate.parallelism_config import ParallelismConfig

    trainer = make_trainer("DPO", load(), tokenizer, tmp_path)
    config = ParallelismConfig()
    config.sp_size, config.cp_size = 2, 1
    trainer.accelerator.state.parallelism_config = config
    try:
        with pytest.raises(ValueError, match="sequence parallelism"):
            attach(trainer, **anchored(trainer))
    finally:
        trainer.accelerator.state.parallelism_config = None


def test_monitors_belong_to_a_trainer_that_can_show_them(load, tokenizer, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = load()
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(model=model, args=args, processing_class=tokenizer)
    with pytest.raises(ValueError, match="GRPOTrainer"):
        attach(trainer, monitors=[make_readout(model)])
    with pytest.raises(ValueError, match="DPOTrainer"):
        attach(trainer, regularizers=[DriftPenalty(hook_point=LAYER, weight=1.0)])
    measured = make_trainer("DPO", load(), tokenizer, tmp_path / "dpo")
    with pytest.raises(ValueError, match="rollouts"):
        attach(measured, measures={"length": len})
