"""Sparse autoencoders: their arithmetic by hand, by column and in blocks, and latents as rewards, terms, monitors and drift."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rewards import Noted, Recorder, expected_scores, trainer_of
from tiny import labelled_rows
from training import make_trainer

from interp_rlhf import ConceptReward, DriftConfig, attach
from interp_rlhf.activations import Counted, norm_outliers, read_activations, tokenize_examples
from interp_rlhf.concepts import latents as latents_module
from interp_rlhf.concepts.artifact import load_artifact
from interp_rlhf.concepts.card import load_card, with_evidence
from interp_rlhf.concepts.examples import make_examples
from interp_rlhf.concepts.fitting import fit_probe, latent_tokens
from interp_rlhf.concepts.latents import Latents
from interp_rlhf.concepts.publish import publish
from interp_rlhf.concepts.readout import Readout, same_artifact
from interp_rlhf.concepts.subspace import Subspace
from interp_rlhf.drift.latent_drift import changed_latents
from interp_rlhf.runlog.log import read_run_log
from interp_rlhf.sae.autoencoder import SaeSpec, SparseAutoencoder, random_dictionary
from interp_rlhf.sae.files import save_sae
from interp_rlhf.training.interventions import PreventativeSteering
from interp_rlhf.training.make import make_regularizer
from interp_rlhf.training.terms.control import random_like
from interp_rlhf.training.terms.features import FeatureConstraint, _means_of
from interp_rlhf.training.terms.penalty import ConceptPenalty
from interp_rlhf.validation.check import check_card
from interp_rlhf.validation.dictionaries import sae_findings
from interp_rlhf.validation.gate import gate

POINT = "model.layers.1"
EXACT = ("gated", "jumprelu", "standard")
ALL = (*EXACT, "groupmax", "topk")


def random_sae(architecture="topk", seed=0, size=40, width=12, k=8, normalization="none", skip=False):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    more = {
        "jumprelu": {"threshold": normal(size)},
        "gated": {"gate_scale": normal(size).exp(), "gate_bias": normal(size)},
    }
    sparse = architecture in ("topk", "groupmax")
    point = "model.layers.1.mlp" if skip else None
    return SparseAutoencoder(
        SaeSpec(architecture, POINT, k if sparse else None, normalization, restore=not skip, output_point=point, model_id="tiny"),
        encoder=normal(size, width), encoder_bias=normal(size), decoder=normal(size, width), decoder_bias=normal(width),
        center=normal(width), skip=normal(width, width) if skip else None, **more.get(architecture, {}),
    )  # fmt: skip


def hand_sae(architecture, **more):
    """Two dimensions, three latents: rows (1, 0), (0, 1), (1, 1), biases 0, 1, −1, centre (1, 0)."""
    return SparseAutoencoder(
        SaeSpec(architecture, POINT, more.pop("k", None)),
        encoder=torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), encoder_bias=torch.tensor([0.0, 1.0, -1.0]),
        decoder=torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]), decoder_bias=torch.tensor([10.0, 20.0]),
        center=torch.tensor([1.0, 0.0]), **more,
    )  # fmt: skip


# h = (3, 1): h − centre = (2, 1); pre-activations (2, 1 + 1, 2 + 1 − 1) = (2, 2, 2). h = (0, 3): (−1, 3); (−1, 4, 1).
HAND = torch.tensor([[3.0, 1.0], [0.0, 3.0]])


@pytest.mark.parametrize(
    ("architecture", "more", "expected"),
    [
        ("standard", {}, [[2.0, 2.0, 2.0], [0.0, 4.0, 1.0]]),
        # At its threshold a latent is off; a negative threshold is one of 0, since the ReLU comes first.
        ("jumprelu", {"threshold": torch.tensor([2.0, 1.0, -5.0])}, [[0.0, 2.0, 2.0], [0.0, 4.0, 1.0]]),
        # Gates are the pre-activations. Magnitudes: e^r (E h) + b with E h = (2, 1, 3) and (−1, 3, 2), r such that e^r = 2, 1, 1,
        # b = (0, −2, 0): (4, −1 → 0, 3) and (gate off, 1, 2).
        ("gated", {"gate_scale": torch.tensor([2.0, 1.0, 1.0]), "gate_bias": torch.tensor([0.0, -2.0, 0.0])},
         [[4.0, 0.0, 3.0], [0.0, 1.0, 2.0]]),
        # The largest of (−1, 4, 1); among the three equal ones any.
        ("topk", {"k": 1}, [None, [0.0, 4.0, 0.0]]),
        # Three groups of one: the ReLU alone.
        ("groupmax", {"k": 3}, [[2.0, 2.0, 2.0], [0.0, 4.0, 1.0]]),
    ],
)  # fmt: skip
def test_latents_and_reconstruction_are_what_the_hand_computes(architecture, more, expected):
    sae = hand_sae(architecture, **more)
    found = sae.encode(HAND)
    for row, wanted in zip(found.tolist(), expected, strict=True):
        assert row == wanted or (wanted is None and sorted(row) == [0.0, 0.0, 2.0])
    # Decoding (0, 4, 1): 4 (0, 3) + 1 (1, 1) + (10, 20) = (11, 33).
    assert sae.decode(torch.tensor([0.0, 4.0, 1.0])).tolist() == [11.0, 33.0]
    torch.testing.assert_close(sae(HAND), sae.decode(found))


def test_fvu_and_l0_are_what_the_hand_computes():
    sae = hand_sae("standard")
    # Latents (2, 2, 2) → (4 + 0 + 2, 6 + 2) + (10, 20) = (16, 28); (0, 4, 1) → (11, 33). Errors (13, 27) and (11, 30):
    # 169 + 729 + 121 + 900 = 1919. The mean is (1.5, 2): (1.5² + 1) 2 = 6.5.
    assert sae.fvu(HAND) == pytest.approx(1919 / 6.5)
    assert sae.l0(HAND) == 2.5


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("normalization", ["none", "layer_norm", "constant_norm_rescale"])
def test_the_forward_is_the_decoded_encoding_and_columns_are_its_columns(architecture, normalization):
    sae = random_sae(architecture, normalization=normalization)
    activation = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    latents = sae.encode(activation)
    torch.testing.assert_close(sae(activation), sae.decode(latents, activation), atol=1e-4, rtol=1e-5)
    chosen = [3, 1, 39, 20]
    columns = sae.latents(chosen)(activation)
    torch.testing.assert_close(columns, latents[..., chosen], atol=1e-5, rtol=1e-5)
    # Also what flows back: only the latents that are on, by their own rows.
    gradients = [
        torch.autograd.grad(v.pow(2).sum(), activation)[0] for v in (columns, sae.encode(activation)[..., chosen])
    ]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    if architecture in EXACT:
        assert len(sae.latents(chosen).encoder) == 4


@pytest.mark.parametrize("architecture", ["topk", "groupmax"])
def test_blocks_of_tokens_change_nothing(architecture, monkeypatch):
    sae = random_sae(architecture)
    activation = torch.randn(2, 17, 12)
    whole = sae.encode(activation), sae(activation), sae.latents([5, 2])(activation)
    monkeypatch.setattr(latents_module, "BLOCK_NUMBERS", 1)
    monkeypatch.setattr(latents_module, "BLOCK_TOKENS", 3)
    parts = sae.encode(activation), sae(activation), sae.latents([5, 2])(activation)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("architecture", ALL)
def test_nothing_is_read_of_no_tokens(architecture):
    sae = random_sae(architecture)
    empty = torch.zeros(0, 12)
    assert (sae.encode(empty).shape, sae(empty).shape) == ((0, 40), (0, 12))
    assert sae.latents([1, 2])(empty).shape == (0, 2)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 40))
def test_topk_keeps_k_and_chooses_consistently(seed, k):
    sae = random_sae("topk", seed=seed, k=k)
    activation = torch.randn(7, 12, generator=torch.Generator().manual_seed(seed))
    latents = sae.encode(activation)
    assert ((latents > 0).sum(1) <= k).all()
    assert (latents >= 0).all()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist()
    torch.testing.assert_close(sae.latents(order)(activation), latents[:, order])
    # Of a choice a second choice can be made.
    torch.testing.assert_close(sae.latents(order).choose([2, 0])(activation), latents[:, [order[2], order[0]]])


def test_a_transcoder_adds_its_skip_path_to_the_forward_and_not_to_the_decoding():
    sae = random_sae("topk", skip=True)
    activation = torch.randn(6, 12)
    expected = sae.decode(sae.encode(activation)) + activation @ sae.skip.T
    torch.testing.assert_close(sae(activation), expected, atol=1e-4, rtol=1e-5)


def test_everything_wrong_with_an_autoencoder_is_in_one_error():
    with pytest.raises(ValueError, match=r"2 problem\(s\):\n  - no `threshold`\n  - `skip"):
        SparseAutoencoder(
            SaeSpec("jumprelu", POINT), encoder=torch.ones(3, 2), encoder_bias=torch.ones(3), decoder=torch.ones(3, 2),
            decoder_bias=torch.ones(2), skip_it=torch.ones(1),
        )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"`center` has shape \(5,\) – expected \(2,\)\n  - `decoder_bias` is not finite"
    ):
        SparseAutoencoder(
            SaeSpec("standard", POINT), encoder=torch.ones(3, 2), encoder_bias=torch.ones(3), decoder=torch.ones(3, 2),
            decoder_bias=torch.tensor([math.nan, 1.0]), center=torch.ones(5),
        )  # fmt: skip
    with pytest.raises(ValueError, match="`decode` was given no `like`"):
        random_sae(normalization="layer_norm").decode(torch.zeros(40))
    with pytest.raises(ValueError, match=r"Latents \[40\] – expected indices from 0 to 39"):
        random_sae().latents([0, 40])
    with pytest.raises(ValueError, match=r"has shape \(0, 12\) – expected \(S, D\) with at least one latent"):
        Latents("none", POINT, torch.zeros(0, 12), torch.zeros(0))


def test_a_random_dictionary_has_the_shape_and_nothing_else():
    sae = random_sae("jumprelu")
    control = random_dictionary(sae, seed=3, k=5)
    assert (control.size, control.width, control.spec.k) == (40, 12, 5)
    assert torch.equal(control.encoder, control.decoder)
    assert torch.equal(control.center, sae.center)
    assert not torch.equal(control.encoder, random_dictionary(sae, seed=4, k=5).encoder)
    assert torch.equal(control.encoder, random_dictionary(sae, seed=3, k=5).encoder)


# Cards of latents: an autoencoder of the tiny model whose latent 7 is warm against cold.


@pytest.mark.parametrize("architecture", ALL)
def test_many_tokens_are_encoded_as_few_are(architecture):
    """1,100 tokens × 320 latents: more than one block, and more than are masked at once."""
    sae = random_sae(architecture, size=320)
    activation = torch.randn(1100, 12, generator=torch.Generator().manual_seed(4))
    found = sae.encode(activation)
    torch.testing.assert_close(found, torch.cat([sae.encode(part) for part in activation.split(50)]))
    assert 0 < float((found > 0).float().mean()) < 1
    if sae.spec.k is not None:
        values, indices = sae.latents().top(activation)
        torch.testing.assert_close(torch.zeros_like(found).scatter_(1, indices, values), found)


def planted_sae(model, tokenizer, architecture="standard", seed=0):
    """Random latents, but for number 7: the difference of means of warm and cold answers."""
    train = make_examples(labelled_rows(24, seed=1))
    fit = fit_probe(model, tokenizer, train, [POINT], model_id="tiny", method="difference_of_means")
    direction = fit.artifact.weight / fit.artifact.weight.norm()
    draw = torch.Generator().manual_seed(seed)
    encoder = torch.randn(64, 32, generator=draw) / math.sqrt(32)
    bias = torch.full((64,), -0.5)
    encoder[7], bias[7] = 4 * direction, 4 * fit.artifact.bias / float(fit.artifact.weight.norm())
    return SparseAutoencoder(
        SaeSpec(architecture, POINT, 16 if architecture == "topk" else None, model_id="tiny"),
        encoder=encoder, encoder_bias=bias, decoder=torch.linalg.pinv(encoder).T.contiguous(), decoder_bias=torch.zeros(32),
    )  # fmt: skip


def latent_card(
    folder, model, tokenizer, sae, latents=(7,), role="reward", evidence=True, name="warm_latent", **fields
):
    train, test = make_examples(labelled_rows(24, seed=1)), make_examples(labelled_rows(40, seed=2))
    fit = fit_probe(model, tokenizer, train, [POINT], model_id="tiny", kind="sae_latents", sae=sae, latents=latents)
    path = publish(fit, folder, name=name, concept="Speaks warmly.", role=role, **fields)
    if evidence:
        found = check_card(load_card(path), model, tokenizer, train, test, sae=sae)
        path.write_text(with_evidence(path.read_text(), found))
    return path


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_a_card_of_latents_passes_with_what_only_latents_must_show(architecture, load, tokenizer, tmp_path):
    model = load()
    sae = planted_sae(model, tokenizer, architecture)
    path = latent_card(tmp_path, model, tokenizer, sae)
    card = load_card(path)
    found = card.card.evidence.held_out
    assert card.card.readout.kind == "sae_latents"
    assert found.sae.latents == 64
    assert 0 < found.sae.l0 <= 64
    assert found.sae.explained_variance < 1
    assert found.random_dictionary.repeats == 5
    assert gate(card.card) == [], found
    # The artifact stands alone, and reads what the autoencoder reads.
    readout = Readout.from_card(card)
    batch = torch.randn(2, 6, 32)
    torch.testing.assert_close(
        readout(batch), (sae.encode(batch)[..., [7]] @ readout.weight + readout.bias)[..., None], atol=1e-4, rtol=1e-5
    )
    assert ConceptReward.from_card(path).readout.name == "warm_latent"


def test_latents_that_random_ones_equal_fail_their_gate(load, tokenizer, tmp_path):
    model = load()
    sae = planted_sae(model, tokenizer)
    path = latent_card(tmp_path, model, tokenizer, sae, latents=(3, 4))
    reasons = gate(load_card(path).card)
    assert any("random dictionaries" in reason for reason in reasons), reasons


def test_the_random_control_finds_a_concept_that_any_direction_shows(load, tokenizer, tmp_path):
    """Warm and cold answers are far apart in these activations: random latents tell them apart too, if chosen by the labels."""
    model = load()
    found = load_card(latent_card(tmp_path, model, tokenizer, planted_sae(model, tokenizer))).card.evidence.held_out
    assert found.random_dictionary.mean > found.random_direction.mean
    assert found.random_dictionary.mean > 0.7, found


def test_a_gate_asks_latents_for_their_control_and_for_explained_variance(load, tokenizer, tmp_path):
    model = load()
    card = load_card(latent_card(tmp_path, model, tokenizer, planted_sae(model, tokenizer))).card
    held_out = card.evidence.held_out

    def with_held_out(**changes):
        changed = card.evidence.model_copy(update={"held_out": held_out.model_copy(update=changes)})
        return card.model_copy(update={"evidence": changed})

    assert gate(with_held_out(random_dictionary=None)) == ["its evidence lacks the random-dictionary control"]
    poor = held_out.sae.model_copy(update={"explained_variance": -0.1})
    assert "explains no variance" in gate(with_held_out(sae=poor))[0]


def test_evidence_of_latents_needs_their_own_autoencoder(load, tokenizer, tmp_path):
    model = load()
    sae = planted_sae(model, tokenizer)
    card = load_card(latent_card(tmp_path, model, tokenizer, sae, evidence=False))
    train, test = make_examples(labelled_rows(24, seed=1)), make_examples(labelled_rows(40, seed=2))
    with pytest.raises(ValueError, match=r"got no `sae` – expected that autoencoder.*--sae"):
        check_card(card, model, tokenizer, train, test)
    with pytest.raises(ValueError, match="64 other latents"):
        check_card(card, model, tokenizer, train, test, sae=random_sae(size=64, width=32))


def test_latents_that_are_never_on_are_refused(load, tokenizer):
    model = load()
    sae = planted_sae(model, tokenizer)
    sae.encoder_bias[3] = -1e6
    sae = SparseAutoencoder(sae.spec, **dict(sae.named_buffers()))
    train = make_examples(labelled_rows(24, seed=1))
    with pytest.raises(ValueError, match="None of the 1 latents is on anywhere in the 48 examples"):
        fit_probe(model, tokenizer, train, [POINT], model_id="tiny", kind="sae_latents", sae=sae, latents=[3])
    with pytest.raises(ValueError, match="`kind` is 'sae_latents', without `sae`"):
        fit_probe(model, tokenizer, train, [POINT], model_id="tiny", kind="sae_latents")
    with pytest.raises(ValueError, match="have width 12 – the model's is 32"):
        fit_probe(model, tokenizer, train, [POINT], model_id="tiny", kind="sae_latents", sae=random_sae(), latents=[3])


def test_readouts_of_latents_are_one_claim_where_they_share_a_latent(load, tokenizer, tmp_path):
    model = load()
    sae = planted_sae(model, tokenizer, "topk")

    def readout(latents, name):
        return Readout.from_card(
            str(latent_card(tmp_path / name, model, tokenizer, sae, latents, evidence=False, name=name))
        )

    one, two = readout((7, 3), "one"), readout((7,), "two")
    other = replace(two, name="other", latents=sae.latents([5]))
    assert same_artifact(one, two)
    assert not same_artifact(one, other)
    assert not same_artifact(one, Readout("probe", POINT, torch.ones(2)))
    assert one.digest() != two.digest()
    # As directions, they are what they write.
    assert Subspace.from_readouts([one]).basis.shape == (2, 32)
    torch.testing.assert_close(one.directions, sae.decoder[[7, 3]])
    step = PreventativeSteering(readout=two, alpha=2.0).change(torch.zeros(1, 32))
    unit = sae.decoder[7] * torch.sign(two.weight[0])
    torch.testing.assert_close(step[0], 2 * unit / unit.norm())
    control = random_like(one, seed=1)
    torch.testing.assert_close(control.latents.chosen.norm(dim=1), one.latents.chosen.norm(dim=1))
    assert not same_artifact(control, one)


def test_an_artifact_of_latents_is_read_back_as_it_was_and_refused_when_cut(load, tokenizer, tmp_path):
    model = load()
    path = latent_card(
        tmp_path, model, tokenizer, planted_sae(model, tokenizer, "topk"), latents=(7, 3), evidence=False
    )
    artifact = path.with_name("warm_latent.v1.safetensors")
    found = load_artifact(artifact)
    assert found.header.sae["latents"] == [7, 3]
    assert found.latents.columns.tolist() == [7, 3]
    data = artifact.read_bytes()
    artifact.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        Readout.from_card(str(path))


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_a_reward_on_latents_is_what_a_reading_gives(architecture, load, tokenizer, tmp_path):
    model = load()
    path = latent_card(tmp_path / "card", model, tokenizer, planted_sae(model, tokenizer, architecture))
    recorder, reward = Recorder(), Noted.from_card(path)
    trainer = trainer_of(tmp_path, model, tokenizer, [recorder, reward])
    attached = attach(trainer)
    trainer.train()
    assert attached.rollout.own_forwards == 0
    expected = expected_scores(load(), tokenizer, reward.readout, recorder.calls, trainer)
    assert len(expected) == len(reward.returned) == 2
    for found, wanted in zip(reward.returned, expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-4)


def test_penalties_have_gradients_to_the_policy_and_none_to_the_autoencoder(load, tokenizer, tmp_path):
    model = load()
    sae = planted_sae(model, tokenizer, "topk")
    card = latent_card(tmp_path / "card", model, tokenizer, sae, latents=(7, 3))
    readout = Readout.from_card(str(card))
    terms = [
        FeatureConstraint(readout=sae.latents(name="all"), k=4),
        FeatureConstraint(readout=readout, k=2, name="two"),
        ConceptPenalty(readout=readout, weight=1.0, allow_differentiable_probe=True),
        {"kind": "drift_penalty", "cards": [str(card)], "weight": 1.0},
    ]
    before = sae.digest()
    trainer = make_trainer("DPO", model, tokenizer, tmp_path / "run")
    trainer.model.model.layers[0].mlp.down_proj.weight.data.mul_(1.5)  # so that terms are not at their minimum
    monitor = Readout("other", POINT, torch.ones(32))
    attach(trainer, regularizers=terms, monitors=[monitor], interventions=[])
    assert not any(module is sae for module in trainer.model.modules())
    trainer.train()
    logs = trainer.state.log_history
    for key in ("features_all/distance_chosen", "two/distance_chosen", "penalty_warm_latent/penalty"):
        assert any(f"interp/{key}" in row for row in logs), [sorted(row) for row in logs]
    assert sae.digest() == before
    assert not any(tensor.requires_grad for tensor in sae.buffers())


@pytest.mark.parametrize("architecture", ALL)
def test_mean_latents_of_a_term_hold_no_latents_of_all_tokens(architecture, monkeypatch):
    """Values and gradients are those of the plain formula; what is kept for the backward pass is less than (N, S)."""
    monkeypatch.setattr(latents_module, "BLOCK_NUMBERS", 1)
    monkeypatch.setattr(latents_module, "BLOCK_TOKENS", 16)
    readout = random_sae(architecture, size=160, k=8).latents()
    activation = torch.randn(100, 12, generator=torch.Generator().manual_seed(3)).requires_grad_()
    every = torch.ones(3, 40, dtype=torch.bool)
    tokens = Counted(every, torch.arange(100) // 40, 3, ~every, ~every, ~every)
    wanted = tokens.means(readout(activation))
    (wanted_gradient,) = torch.autograd.grad(wanted.pow(2).sum(), activation)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        found = _means_of(readout, activation, tokens)
    (gradient,) = torch.autograd.grad(found.pow(2).sum(), activation)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradient, wanted_gradient)
    assert wanted_gradient.abs().sum() > 0
    assert sum(kept) < 100 * 160 / 2, kept


@pytest.mark.parametrize("architecture", ALL)
def test_a_reconstruction_with_a_gradient_holds_no_latents_of_all_tokens(architecture, monkeypatch):
    monkeypatch.setattr(latents_module, "BLOCK_NUMBERS", 1)
    monkeypatch.setattr(latents_module, "BLOCK_TOKENS", 16)
    sae = random_sae(architecture, size=400, k=8)
    activation = torch.randn(100, 12, generator=torch.Generator().manual_seed(3)).requires_grad_()
    wanted = sae.decode(sae.encode(activation))
    (wanted_gradient,) = torch.autograd.grad(wanted.pow(2).sum(), activation)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.__setitem__(tensor.untyped_storage().data_ptr(), tensor.numel()) or tensor,
        lambda tensor: tensor,
    ):
        found = sae(activation)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found.pow(2).sum(), activation)[0], wanted_gradient, rtol=1e-3, atol=1e-3
    )
    own = {tensor.untyped_storage().data_ptr() for tensor in sae.buffers()}
    assert sum(size for place, size in kept.items() if place not in own) < 100 * 400 / 2


@pytest.mark.parametrize("normalization", ["constant_norm_rescale", "layer_norm"])
def test_a_random_dictionary_sees_what_a_normalized_autoencoder_sees(normalization):
    """Activations with a large mean, which the centre takes off only in the autoencoder's own units."""
    draw = torch.Generator().manual_seed(1)
    activation = 30 + 10 * torch.randn(400, 12, generator=draw)
    sae = random_sae(size=64, k=8, normalization=normalization)
    sae.center.copy_(latents_module.normalize(activation, normalization)[0].mean(0))
    control = random_dictionary(sae, seed=0)
    assert control.spec.normalization == normalization
    assert float((control.encode(activation) > 0).any(0).float().mean()) > 0.9


def test_a_transcoder_is_judged_by_the_output_that_it_predicts(load, tokenizer):
    model = load()
    draw = torch.Generator().manual_seed(2)
    spec = SaeSpec("topk", POINT, 8, output_point="model.layers.2.mlp", restore=False, model_id="tiny")
    encoder, decoder = (torch.randn(64, 32, generator=draw) for _ in range(2))
    sae = SparseAutoencoder(
        spec, encoder=encoder, encoder_bias=torch.zeros(64), decoder=decoder, decoder_bias=torch.zeros(32)
    )
    batch = tokenize_examples(make_examples(labelled_rows(6, seed=1)).rows, tokenizer)
    read = read_activations(model, batch, [POINT, "model.layers.2.mlp"])
    kept = ~norm_outliers(read[POINT])
    wanted = 1 - sae.fvu(read[POINT][kept], read["model.layers.2.mlp"][kept])
    assert abs(wanted - (1 - sae.fvu(read[POINT][kept]))) > 0.01
    assert sae_findings(model, batch, sae).explained_variance == pytest.approx(wanted, abs=1e-3)
    # It writes elsewhere: what is ablated or steered at its input are its encoder's rows.
    torch.testing.assert_close(sae.latents([3]).written, encoder[[3]])


def test_drift_of_a_transcoders_latents_is_refused(load, tokenizer, tmp_path):
    trainer = make_trainer("DPO", load(), tokenizer, tmp_path)
    spec = SaeSpec("topk", POINT, 8, output_point="model.layers.2.mlp", restore=False)
    rows = torch.ones(16, 32)
    sae = SparseAutoencoder(
        spec, encoder=rows, encoder_bias=torch.zeros(16), decoder=rows, decoder_bias=torch.zeros(32)
    )
    with pytest.raises(
        ValueError, match=r"is a transcoder from `model\.layers\.1` to `model\.layers\.2\.mlp` – expected"
    ):
        attach(trainer, drift=DriftConfig(sae=sae))


def test_a_recipe_names_an_autoencoder_as_load_sae_does(load, tokenizer, tmp_path):
    """Its file's hook name is resolved on the policy, and can be overridden."""
    model = load()
    given = {"kind": "feature_constraint", "sae": str(tmp_path / "sae")}
    sae = random_sae(size=16, width=32)
    save_sae(sae, tmp_path / "sae")
    assert make_regularizer(given, model).readout.hook_point == POINT
    assert make_regularizer({**given, "hook_point": "model.layers.0"}, model).readout.hook_point == "model.layers.0"
    with pytest.raises(ValueError, match=r"model\.layers\.9"):
        make_regularizer({**given, "hook_point": "model.layers.9"}, model)


def test_an_autoencoder_of_another_width_is_refused_before_the_first_step(load, tokenizer, tmp_path):
    trainer = make_trainer("DPO", load(), tokenizer, tmp_path)
    with pytest.raises(ValueError, match=r"Latents `sae` at `model\.layers\.1` have width 12 – the model's is 32"):
        attach(trainer, regularizers=[FeatureConstraint(readout=random_sae().latents())])


def test_drift_names_the_latents_that_changed_and_the_variance_that_is_left(load, tokenizer, tmp_path):
    model = load()
    sae = planted_sae(model, tokenizer)
    trainer = make_trainer("SFT", model, tokenizer, tmp_path, max_steps=4, learning_rate=5e-2)
    prompts = [row["prompt"] for row in labelled_rows(8, seed=5)[::2]]
    attach(trainer, drift=DriftConfig(every=2, sae=sae, prompts=prompts, max_new_tokens=8))
    trainer.train()
    events = [event for event in read_run_log(tmp_path / "interp.jsonl") if event["event"] == "drift"]
    first, last = events[0]["sae"], events[-1]["sae"]
    assert first["changed"] == []
    assert first["fvu"] == first["fvu_before"] == last["fvu_before"]
    assert last["fvu"] != last["fvu_before"]
    gaps = [abs(row["after"] - row["before"]) for row in last["changed"]]
    assert len(gaps) == 10
    assert gaps == sorted(gaps, reverse=True)
    assert {"fvu", "fvu_before"} <= events[-1]["own_text"].keys()
    logged = {key for row in trainer.state.log_history for key in row}
    assert {"interp/drift/sae/fvu", "interp/drift/sae/l0", "interp/own_text/fvu"} <= logged


def test_changed_latents_are_means_over_tokens():
    sae = hand_sae("standard")
    # Before: latents (2, 2, 2) and (0, 4, 1), means (1, 3, 1.5). After, twice (0, 3): (0, 4, 1).
    found = changed_latents(sae, HAND, HAND[[1, 1]])
    rows = {row.latent: (row.before, row.after, row.on_before, row.on_after) for row in found.changed}
    assert rows == {0: (1.0, 0.0, 0.5, 0.0), 1: (3.0, 4.0, 1.0, 1.0), 2: (1.5, 1.0, 1.0, 1.0)}
    assert (found.l0_before, found.l0) == (2.5, 2.0)


def test_mean_latents_are_over_counted_tokens(load, tokenizer):
    from interp_rlhf.activations import read_activations, tokenize_examples

    model = load()
    sae = planted_sae(model, tokenizer)
    rows = labelled_rows(3, seed=4)
    batch = tokenize_examples(rows, tokenizer)
    found = latent_tokens(model, batch, sae.latents([7, 1])).pooled("mean")
    for i, row in enumerate(rows):
        one = tokenize_examples([row], tokenizer)
        expected = sae.encode(read_activations(model, one, [POINT])[POINT])[:, [7, 1]].mean(0)
        assert found[i] == pytest.approx(expected.tolist(), abs=1e-5)
