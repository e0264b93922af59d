"""Evidence and the gate: a real concept passes, luck does not."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from tiny import labelled_rows, make_card, sentences

from interp_rlhf import ConceptReward
from interp_rlhf.concepts.card import load_card, with_evidence
from interp_rlhf.concepts.examples import make_examples
from interp_rlhf.concepts.fitting import fit_probe
from interp_rlhf.concepts.publish import publish
from interp_rlhf.validation import baselines
from interp_rlhf.validation.check import check_card
from interp_rlhf.validation.gate import gate
from interp_rlhf.validation.measures import MEASURES, register_measure
from interp_rlhf.validation.statistics import auroc_interval, mean_interval, weighted_aurocs


def test_a_concept_that_is_there_passes_its_gate(load, tokenizer, tmp_path):
    card = load_card(make_card(tmp_path, load(), tokenizer)).card
    assert gate(card) == []
    found = card.evidence.held_out
    assert found.probe.low > max(found.permutation.p95, found.random_direction.p95)
    assert found.probe.low <= found.probe.auroc <= found.probe.high
    assert (found.examples, found.positives) == (80, 40)
    assert found.tfidf.auroc > 0.9  # the label is in the words, and the evidence says so


def test_a_concept_that_is_not_there_fails_its_gate(load, tokenizer, tmp_path):
    model = load()
    rng = np.random.default_rng(0)

    def noise(seed):
        return make_examples([{"text": text, "label": int(rng.integers(2))} for text in sentences(60, seed)])

    fit = fit_probe(model, tokenizer, noise(1), ["model.layers.1"], model_id="tiny")
    assert fit.artifact.header.calibration == {}
    with pytest.raises(ValueError, match="does not separate the labels on prompts that it has not seen"):
        publish(fit, tmp_path, name="noise", concept="Nothing.")
    train, test = make_examples(labelled_rows(24, seed=1)), noise(2)  # there in the fit, and gone
    path = publish(
        fit_probe(model, tokenizer, train, ["model.layers.1"], model_id="tiny"),
        tmp_path,
        name="noise",
        concept="Nothing.",
    )
    evidence = check_card(load_card(path), model, tokenizer, train, test)
    path.write_text(with_evidence(path.read_text(), evidence))
    reasons = gate(load_card(path).card)
    assert any("permutation control" in reason for reason in reasons)
    with pytest.raises(ValueError, match="may not be a reward: on held-out examples its AUROC"):
        ConceptReward.from_card(path)


def test_a_card_without_or_with_foreign_evidence_cannot_be_a_reward(load, tokenizer, tmp_path):
    path = make_card(tmp_path, load(), tokenizer, evidence=False)
    with pytest.raises(ValueError, match=r"may not be a reward: it has no evidence.*interp-rlhf probe check"):
        ConceptReward.from_card(path)
    path = make_card(tmp_path, load(), tokenizer, name="other")
    path.write_text(path.read_text().replace("pooling: mean", "pooling: max"))
    with pytest.raises(ValueError, match="evidence was written for another readout"):
        ConceptReward.from_card(path)
    monitor = make_card(tmp_path, load(), tokenizer, name="watch", role="monitor", pooling="ema_max", evidence=False)
    with pytest.raises(ValueError, match=r"has the role `monitor` – expected `reward` or `penalty`"):
        ConceptReward.from_card(monitor)


def test_evidence_needs_the_very_fit_data_and_rows_it_has_not_seen(load, tokenizer, tmp_path):
    model = load()
    card = load_card(make_card(tmp_path, model, tokenizer, evidence=False))
    train, test = make_examples(labelled_rows(24, seed=1)), make_examples(labelled_rows(10, seed=9))
    with pytest.raises(ValueError, match="fit data have fingerprint"):
        check_card(card, model, tokenizer, test, train)
    seen = make_examples([*labelled_rows(10, seed=9), *labelled_rows(24, seed=1)[:3]])
    with pytest.raises(ValueError, match="3 rows and 2 prompts of the held-out examples are among the fit's"):
        check_card(card, model, tokenizer, train, seen)


def test_evidence_needs_other_prompts_not_only_other_answers(load, tokenizer, tmp_path):
    model = load()
    card = load_card(make_card(tmp_path, model, tokenizer, evidence=False))
    train = make_examples(labelled_rows(24, seed=1))
    again = [{**row, "completion": row["completion"] + " day"} for row in labelled_rows(24, seed=1)]
    with pytest.raises(ValueError, match="24 prompts of the held-out examples are among the fit's"):
        check_card(card, model, tokenizer, train, make_examples(again))


def test_evidence_on_the_models_own_completions_gates_too(load, tokenizer, tmp_path):
    model = load()
    card = load_card(make_card(tmp_path, model, tokenizer, evidence=False))
    train, test = make_examples(labelled_rows(24, seed=1)), make_examples(labelled_rows(40, seed=2))
    turned = make_examples([{**row, "label": 1 - row["label"]} for row in labelled_rows(40, seed=3)])
    measures = {"length": lambda text: float(len(text))}
    evidence = check_card(card, model, tokenizer, train, test, completions=turned, measures=measures)
    lengths = [len(text) for text in test.texts]
    assert evidence.held_out.measures["length"].auroc == pytest.approx(roc_auc_score(test.labels, lengths), abs=1e-4)
    card.path.write_text(with_evidence(card.path.read_text(), evidence))
    reasons = gate(load_card(card.path).card)
    assert reasons
    assert all("the model's own completions" in reason for reason in reasons)


def test_evidence_repeats(load, tokenizer, tmp_path):
    model = load()
    card = load_card(make_card(tmp_path, model, tokenizer, pooling="ema_max", evidence=False))
    train, test = make_examples(labelled_rows(24, seed=1)), make_examples(labelled_rows(20, seed=2))
    first, second = (check_card(card, model, tokenizer, train, test, seed=5) for _ in range(2))
    assert first == second


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth = 0.760  # Φ(1/√2): two unit normals, one standard deviation apart
    hits = 0
    for trial in range(60):
        labels = np.array([0, 1] * 60)
        scores = rng.normal(size=120) + labels
        _, low, high = auroc_interval(labels, scores, [str(i) for i in range(120)], seed=trial, resamples=200)
        hits += low <= truth <= high
    assert hits >= 52  # 95 % of 60 is 57; five standard deviations below would be 49


def test_many_weighted_aurocs_at_once_are_scikit_learns():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(2, size=60), rng.integers(8, size=60).astype(float)  # many ties
    weights = rng.integers(4, size=(20, 60)).astype(float)
    expected = [roc_auc_score(labels, scores, sample_weight=line) for line in weights]
    np.testing.assert_allclose(weighted_aurocs(labels, scores, weights), expected, atol=1e-12)
    assert np.isnan(weighted_aurocs(labels, scores, labels[None].astype(float))).all()  # no negatives drawn


def test_rows_of_one_prompt_are_drawn_together():
    values = np.repeat([1.0, 0.0] * 5, 9)
    mean, low, high = mean_interval(values, seed=0, groups=[str(i // 9) for i in range(90)])
    assert mean == 0.5
    # Ten independent draws: a standard error of 0.5/√10 = 0.16. Ninety: 0.05.
    assert (low, high) == pytest.approx((0.5 - 0.31, 0.5 + 0.31), abs=0.05)
    _, low, high = mean_interval(values, seed=0)
    assert (low, high) == pytest.approx((0.5 - 0.10, 0.5 + 0.10), abs=0.03)


def test_baselines_find_what_they_look_for():
    train, test = ["yes! yes!", "no.", "yes! ok!", "no. no."], ["fine! good!", "no. bad."]
    labels = np.array([1, 0, 1, 0])
    assert np.argmax(baselines.punctuation(train, labels, test)) == 0
    assert np.argmax(baselines.tfidf(train, labels, ["yes", "no"])) == 0
    shorter = baselines.length(["aaaa", "a", "aaaa", "a"], np.array([0, 1, 0, 1]), ["aa", "aaaaaa"])
    assert shorter[0] > shorter[1]


def test_a_registered_measure_is_found_by_its_name_and_is_not_replaced(monkeypatch):
    monkeypatch.setattr(MEASURES, "_entries", dict(MEASURES))

    @register_measure("sentence_length")
    def sentence_length():
        return lambda text: float(len(text))

    assert {"vader", "sentence_length"} <= set(MEASURES)
    assert MEASURES["sentence_length"]()("four") == 4.0
    with pytest.raises(KeyError, match=r"'sentence_lenght' is not a measure – .* Did you mean `sentence_length`"):
        MEASURES["sentence_lenght"]
    with pytest.raises(ValueError, match="`vader` is already registered as a measure"):
        register_measure("vader")(lambda: len)
