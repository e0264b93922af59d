"""What evidence sees: the prompt, the words, what a probe adds to them, how much its numbers say."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tiny import WORDS, labelled_rows, make_card, make_model

from interp_rlhf import ConceptReward
from interp_rlhf.concepts.card import load_card, with_evidence
from interp_rlhf.concepts.examples import make_examples
from interp_rlhf.concepts.fitting import fit_probe
from interp_rlhf.concepts.publish import publish
from interp_rlhf.validation.check import check_card
from interp_rlhf.validation.controls import Controls
from interp_rlhf.validation.gate import gate
from interp_rlhf.validation.prompts import Swapped, swappable, with_answer
from interp_rlhf.validation.statistics import shares

OTHERS = [word for word in WORDS if word not in ("warm", "cold")]


def prompt_rows(count, seed):
    """The label stands in the prompt; the answer is noise."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        for label, word in ((1, "warm"), (0, "cold")):
            asked = f"{word} {' '.join(rng.choices(OTHERS, k=3))} {seed}{i} {word}"
            said = " ".join(rng.choices(OTHERS, k=rng.randint(4, 9)))
            rows.append({"prompt": [{"role": "user", "content": asked}], "completion": said, "label": label})
    return rows


def order_rows(count, seed):
    """The label is the order of two words: no word, length or embedding tells it, a layer with attention does."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        first, second = ("warm", "cold") if i % 2 else ("cold", "warm")
        said = " ".join([rng.choice(OTHERS), first, rng.choice(OTHERS), second, rng.choice(OTHERS)])
        asked = f"please {' '.join(rng.choices(WORDS, k=4))} {rng.randint(0, 10**9)}"
        rows.append({"prompt": [{"role": "user", "content": asked}], "completion": said, "label": i % 2})
    return rows


def checked(model, tokenizer, folder, make, seed, fitted=300, held_out=200, point="model.layers.1", **options):
    fit_on, test = make_examples(make(fitted, 10 * seed + 1)), make_examples(make(held_out, 10 * seed + 2))
    fit = fit_probe(model, tokenizer, fit_on, [point], model_id="tiny", **options)
    path = publish(fit, folder / f"{make.__name__}{seed}", name="concept", concept="A concept.")
    evidence = check_card(load_card(path), model, tokenizer, fit_on, test, seed=seed)
    path.write_text(with_evidence(path.read_text(), evidence))
    return path, evidence.held_out


def test_a_probe_that_only_knows_the_prompt_fails_the_gate(load, tokenizer, tmp_path):
    path, found = checked(load(), tokenizer, tmp_path, prompt_rows, 1, fitted=60, held_out=60)
    assert found.probe.low > 0.85  # it looks excellent, and no baseline that sees answers says otherwise
    assert max(found.tfidf.auroc, found.length.auroc, found.embedding.auroc) < 0.65
    assert found.prompt.tfidf.auroc > 0.95
    assert found.prompt.other_answers.auroc > 0.85  # whatever answer stands under the prompt
    assert found.adds.auroc.low <= 0 <= found.adds.auroc.high
    (reason,) = gate(load_card(path).card)
    assert "tells the prompts apart, not the answers" in reason
    with pytest.raises(ValueError, match=r"may not be a reward: .*tells the prompts apart"):
        ConceptReward.from_card(path)


def test_a_probe_of_the_words_adds_nothing_and_one_of_their_order_does(load, tokenizer, tmp_path):
    _, words = checked(load(), tokenizer, tmp_path, labelled_rows, 1, fitted=100, held_out=100)
    assert words.tfidf.auroc > 0.95
    assert words.adds.auroc.low <= 0 <= words.adds.auroc.high
    assert words.adds.log_loss.low <= 0 <= words.adds.log_loss.high
    assert words.prompt.prompts_with_both_labels == 100
    assert words.prompt.within.low > 0.9
    model = make_model("llama", tokenizer, seed=1)
    path, order = checked(model, tokenizer, tmp_path, order_rows, 1, point="model.layers.0", pooling="attention")
    assert max(order.tfidf.auroc, order.embedding.auroc) < 0.6 < order.probe.low
    assert order.adds.auroc.low > 0
    assert order.adds.log_loss.low > 0
    assert order.prompt.answer_share.low > 0.3
    assert gate(load_card(path).card) == []
    assert 0.5 < order.calibration.slope < 2


@pytest.mark.slow
@pytest.mark.parametrize("make", [labelled_rows, order_rows])
def test_what_a_probe_adds_in_40_seeds(tokenizer, tmp_path, make):
    """Of real probes on a model; `tests/test_added.py` has the same for scores that are drawn."""
    model, right = make_model("llama", tokenizer, seed=1), 0
    for seed in range(40):
        how = {"fitted": 100, "held_out": 100}
        if make is order_rows:
            how = {"point": "model.layers.0", "pooling": "attention"}
        _, found = checked(model, tokenizer, tmp_path, make, seed, **how)
        right += found.adds.auroc.low > 0 if make is order_rows else found.adds.auroc.low <= 0 <= found.adds.auroc.high
    assert right >= 38


def test_too_few_prompts_give_no_interval_and_the_gate_says_so(load, tokenizer, tmp_path):
    model = load()
    path = make_card(tmp_path, model, tokenizer, evidence=False)
    rows = labelled_rows(12, seed=5)
    same = [{**row, "prompt": rows[0]["prompt"]} for row in rows]
    train = make_examples(labelled_rows(24, seed=1))
    evidence = check_card(load_card(path), model, tokenizer, train, make_examples(same))
    found = evidence.held_out
    assert found.probe.auroc > 0.9
    assert (found.probe.low, found.probe.high, found.adds) == (None, None, None)
    path.write_text(with_evidence(path.read_text(), evidence))
    (reason,) = gate(load_card(path).card)
    assert "not enough prompts for an interval" in reason


def test_a_measure_that_gives_no_number_is_named(load, tokenizer, tmp_path):
    model = load()
    path = make_card(tmp_path, model, tokenizer, evidence=False)
    fit_on, test = (make_examples(labelled_rows(24, seed=seed)) for seed in (1, 3))
    rows = iter(range(len(test)))
    broken = {"broken": lambda text: float("nan") if next(rows) == 7 else 1.0}
    with pytest.raises(
        ValueError, match="measure `broken` gives no number for 1 of 48 held-out examples, the first is row 7"
    ):
        check_card(load_card(path), model, tokenizer, fit_on, test, measures=broken)


@pytest.mark.parametrize("fitted", ["mean", "last", "attention"])
def test_evidence_of_every_pooling_reads_as_the_reward_does(load, tokenizer, tmp_path, fitted):
    model = load()
    path, found = checked(model, tokenizer, tmp_path, labelled_rows, 3, pooling=fitted, fitted=60, held_out=30)
    card = load_card(path)
    assert card.card.readout.pooling == fitted
    from sklearn.metrics import roc_auc_score

    from interp_rlhf import Readout, read

    test, readout = make_examples(labelled_rows(30, 32)), Readout.from_card(path)
    scores = readout.score(read(model, test.rows, [readout], tokenizer=tokenizer)["concept"])
    assert found.probe.auroc == pytest.approx(roc_auc_score(test.labels, scores), abs=1e-3)
    assert found.random_direction.repeats == 200


def test_the_models_own_likelihood_is_that_of_the_answers_tokens(load, tokenizer, tmp_path):
    from interp_rlhf.activations import read_with_likelihood, tokenize_examples

    model, rows = load(), labelled_rows(6, seed=2)
    batch = tokenize_examples(rows, tokenizer)
    _, _, log_probs = read_with_likelihood(model, batch, [], {}, batch_tokens=64)
    for i in range(len(rows)):
        ids = batch.input_ids[i][batch.attention_mask[i]]
        counted = batch.completion_mask[i][batch.attention_mask[i]]
        with torch.no_grad():
            predicted = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        by_hand = predicted[:-1].gather(1, ids[1:, None])[:, 0][counted[1:]]
        found = log_probs[i][batch.completion_mask[i]]
        torch.testing.assert_close(found, by_hand, atol=1e-4, rtol=1e-4)
    assert float(log_probs[~batch.completion_mask].abs().max()) == 0


def test_a_constant_dimension_gets_no_random_direction():
    class Header:
        method = "difference_of_means"

    class Given:
        hook_point, pooling, header = "x", "mean", Header()

    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    features = np.concatenate([rng.standard_normal((60, 20)), 3 + 1e-9 * rng.standard_normal((60, 1))], axis=1)
    assert float(Controls(Given(), features, labels, 0).directions[-1].abs().max()) == 0


def test_the_answers_share_of_a_scores_variance():
    rng = np.random.default_rng(0)
    prompt, one, other = rng.standard_normal((3, 4000))
    for weight, share in ((0.0, 0.0), (1.0, 0.5), (3.0, 0.9)):
        found = Swapped(
            np.arange(4000) % 2, list(map(str, range(4000))), prompt + weight * one, prompt + weight * other
        )
        assert found.share == pytest.approx(share, abs=0.03)
    assert np.isnan(shares(np.ones(5), np.ones(5), np.ones((1, 5)))[0])


def test_answers_are_put_under_other_prompts_of_their_own_form():
    asked = [{"role": "user", "content": "a"}]
    told = [{"role": "assistant", "content": "b"}]
    plain, chat = {"prompt": "a", "completion": "b"}, {"prompt": asked, "completion": told}
    whole, ids = {"messages": asked + told}, {"prompt": asked, "completion": "b", "completion_ids": [1, 2]}
    assert len({swappable(row) for row in (plain, chat, whole, ids)}) == 4
    assert [swappable(row) for row in ({"text": "a"}, {"messages": told}, {"prompt": "", "completion": "b"})] == [
        None
    ] * 3
    other = {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}
    assert with_answer(whole, other)["messages"] == [*asked, other["messages"][1]]
    assert with_answer(ids, {"prompt": "c", "completion": "d", "completion_ids": [3]})["completion_ids"] == [3]
    assert whole["messages"] == asked + told
