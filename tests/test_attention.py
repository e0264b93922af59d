"""Attention pooling: it finds what stands in one token, does not mind filler, and is one score on every road."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_evidence import order_rows
from test_verdicts import run_log_of
from tiny import labelled_rows, make_model, make_readout
from training import logged, make_trainer

from interp_rlhf import (
    ConceptAnchor,
    ConceptPenalty,
    DriftConfig,
    Readout,
    attach,
    read,
)
from interp_rlhf.activations import (
    ConceptScores,
    decoder_layers,
    read_activations,
    tokenize_examples,
)
from interp_rlhf.concepts.artifact import load_artifact
from interp_rlhf.concepts.attention import Query, Tokens, fit_attention
from interp_rlhf.concepts.card import load_card
from interp_rlhf.concepts.examples import make_examples
from interp_rlhf.concepts.fitting import fit_probe
from interp_rlhf.concepts.linear import LinearProbe, folds
from interp_rlhf.concepts.pooling import attention_weights, pool
from interp_rlhf.concepts.publish import publish
from interp_rlhf.drift.scores import scores_of
from interp_rlhf.training.dense import per_token
from interp_rlhf.training.terms.control import random_like

LENGTH, WIDTH = 200, 64


def planted(seed, count=300, strength=8.0):
    """Tokens of noise, in each positive example one of them moved along a direction; as (N, T, D), with labels."""
    rng = np.random.default_rng(seed)
    tokens = rng.standard_normal((count, LENGTH, WIDTH)).astype(np.float32)
    direction = np.random.default_rng(99).standard_normal(WIDTH)
    labels = np.arange(count) % 2
    for row in np.flatnonzero(labels):
        tokens[row, rng.integers(LENGTH)] += strength * direction / np.linalg.norm(direction)
    return tokens, labels


def tokens_of(array):
    return Tokens.of(array.reshape(-1, array.shape[-1]), np.full(len(array), array.shape[1]))


@pytest.mark.parametrize("seed", [1, 2])
def test_a_concept_in_one_token_of_200_is_found_and_filler_does_not_move_its_score(seed):
    train, labels = planted(seed)
    test, truth = planted(seed + 50)
    splits = folds(labels, list(map(str, range(len(labels)))), 0)
    found = fit_attention(tokens_of(train), labels, splits, "logistic_regression")
    weight, _ = LinearProbe(regularization=found.chosen.strength).fit(found.features, labels)
    scores = tokens_of(test).attended(found.query) @ weight
    mean_weight, _ = LinearProbe().fit(tokens_of(train).pooled("mean"), labels)
    assert roc_auc_score(truth, tokens_of(test).pooled("mean") @ mean_weight) <= 0.7
    assert roc_auc_score(truth, scores) >= 0.95
    assert roc_auc_score(labels, found.chosen.scores) >= 0.95
    rng = np.random.default_rng(seed)
    fresh = rng.standard_normal((len(test), 500, WIDTH)).astype(np.float32)
    one = np.broadcast_to(rng.standard_normal(WIDTH).astype(np.float32), fresh.shape)
    for filler in (fresh, one, np.zeros_like(fresh)):
        padded = tokens_of(np.concatenate([test, filler], axis=1)).attended(found.query) @ weight
        assert np.abs(padded - scores).mean() <= 0.05 * scores.std()


@pytest.fixture
def fitted(tokenizer, tmp_path):
    """A model, and a card that was fitted for attention on it."""
    model = make_model("llama", tokenizer, seed=1)
    examples = make_examples(order_rows(300, 1))
    fit = fit_probe(model, tokenizer, examples, decoder_layers(model)[0], model_id="tiny", pooling="attention")
    return model, publish(fit, tmp_path, name="order", concept="Warm before cold.", role="monitor"), fit


def test_the_score_is_what_was_fitted_by_hand(fitted, tokenizer):
    model, path, fit = fitted
    readout, artifact = Readout.from_card(load_card(path)), fit.artifact
    assert load_card(path).card.readout.pooling == "attention"
    assert artifact.header.sharpness is not None
    rows = order_rows(120, 2)
    batch = tokenize_examples(rows, tokenizer)
    scores = np.array(readout.score(read(model, batch, [readout])["order"]))
    assert roc_auc_score([row["label"] for row in rows], scores) > 0.9
    values = read_activations(model, batch, [readout.hook_point])[readout.hook_point].double().numpy()
    counts, start = batch.completion_mask.sum(1).tolist(), 0
    for score, count in zip(scores, counts, strict=True):
        own = values[start : start + count]
        start += count
        logits = own @ artifact.query.double().numpy() + artifact.query_bias
        weights = np.exp(logits) / (1 + np.exp(logits).sum())
        by_hand = weights @ (own @ artifact.weight.double().numpy() + artifact.bias)
        assert score == pytest.approx(readout.scale * by_hand + readout.offset, abs=1e-3)
    # The same, from activations that somebody else has read.
    flat = torch.from_numpy(values).float()
    np.testing.assert_allclose(scores_of(readout, batch, flat), scores, atol=1e-3)


def test_the_artifact_keeps_its_query_and_says_what_it_was_fitted_for(fitted, load, tmp_path):
    _, path, fit = fitted
    again = load_artifact(load_card(path).artifact_path)
    assert torch.equal(again.query, fit.artifact.query)
    assert (again.query_bias, again.header.pooling) == (pytest.approx(fit.artifact.query_bias), "attention")
    assert list(again.header.calibration) == ["attention"]
    with pytest.raises(ValueError, match="calibrated for `attention`"):
        Readout.from_artifact(again, "order", "mean")
    with pytest.raises(ValueError, match="pooling `attention` without a query"):
        Readout("by_hand", "model.layers.1", torch.ones(4), pooling="attention")
    other = make_readout(load(), pooling="attention", seed=1)
    assert other.digest() != make_readout(load(), pooling="attention", seed=2).digest()
    # Its canaries are read along the query too: a card of another query is another claim.
    assert len(Readout.from_card(load_card(path)).read_directions) == 2


def test_gradients_are_finite_also_where_no_token_counts():
    scores = torch.randn(3, 5, 2, requires_grad=True)
    mask = torch.tensor([[True] * 5, [False] * 5, [False, True, False, False, False]])
    pooled = pool(scores, mask, "attention")
    assert torch.isnan(pooled[:, 0]).tolist() == [False, True, False]
    pooled[mask.any(1)].sum().backward()
    assert torch.isfinite(scores.grad).all()
    assert float(scores.grad[~mask].abs().max()) == 0
    weights = attention_weights(scores, mask).sum(1)
    assert bool((weights < 1).all())
    assert float(weights[1].detach()) == 0


def test_token_rewards_of_a_share_sum_to_the_score(load):
    readout = make_readout(load(), pooling="attention", scale=2.0, offset=0.7)
    mask = torch.tensor([[False, True, True, False, True], [False, True, False, False, False]])
    scores = ConceptScores(torch.randn(2, 5, 2), mask, torch.zeros(2, 5), "concept")
    shares = per_token(readout, scores, torch.ones(2, 5, dtype=torch.bool), [4, 4], "share")
    assert [sum(own) for own in shares] == pytest.approx(readout.score(scores), abs=1e-5)


def test_terms_and_monitors_read_it_and_a_control_draws_a_query_of_its_own(load, tokenizer, tmp_path):
    trainer = make_trainer("DPO", load(), tokenizer, tmp_path, lora={}, max_steps=3, learning_rate=1e-2)
    readout = make_readout(trainer.model, "watched", pooling="attention")
    control = random_like(readout, seed=3)
    assert float(control.query.norm()) == pytest.approx(float(readout.query.norm()), rel=1e-5)
    assert not torch.equal(control.query, readout.query)
    attach(
        trainer,
        regularizers=[
            ConceptAnchor(readout=readout, pooled=True, weight=0.5),
            ConceptPenalty(readout=readout, weight=0.1, allow_differentiable_probe=True),
        ],
        monitors=[readout, make_readout(trainer.model, "holdout", layer=2, seed=7)],
        drift=DriftConfig(every=1, labelled=make_examples(labelled_rows(20, seed=9))),
    )
    trainer.train()
    for key in ("interp/anchor_watched/squared_gap", "interp/watched/mean_score", "interp/watched/drift"):
        assert np.isfinite(logged(trainer, key)).all(), key
    assert logged(trainer, "interp/anchor_watched/squared_gap")[0] == pytest.approx(0, abs=1e-6)
    assert logged(trainer, "interp/anchor_watched/squared_gap")[-1] > 0
    events = [event for event in run_log_of(trainer) if event["event"] == "drift"]
    assert np.isfinite(events[-1]["monitors"]["watched"]["frozen_auroc"])


def test_what_is_attended_to_is_a_mean_of_tokens_and_sink():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((7, 3)).astype(np.float32)
    tokens = Tokens.of(values, np.array([4, 3]))
    vector, center = rng.standard_normal(3), rng.standard_normal(3)
    found = tokens.attended(Query(vector, 0.3, center, 1.0))
    for row, own in enumerate((values[:4], values[4:])):
        weights = np.exp(own @ vector - 0.3)
        weights /= 1 + weights.sum()
        np.testing.assert_allclose(found[row], weights @ (own - center), atol=1e-5)
    np.testing.assert_allclose(tokens.rows(np.array([1])).pooled("mean"), values[4:].mean(0)[None], atol=1e-6)
    np.testing.assert_allclose(tokens.pooled("last"), values[[3, 6]], atol=1e-6)
