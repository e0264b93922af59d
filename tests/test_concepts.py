"""Pooling, probes, artifacts, cards and examples: numbers by hand, and every kind of bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from tiny import labelled_rows, make_card, make_readout, with_lora

from interp_rlhf.activations import (
    ConceptScores,
    decoder_layers,
    read,
    read_means,
    tokenize_examples,
)
from interp_rlhf.concepts.artifact import load_artifact
from interp_rlhf.concepts.card import load_card, with_evidence
from interp_rlhf.concepts.examples import load_examples, make_examples, write_jsonl
from interp_rlhf.concepts.fitting import fit_probe, sweep_points
from interp_rlhf.concepts.linear import LinearProbe, separates
from interp_rlhf.concepts.pooling import FITTED, POOLINGS, ema, pool, register_pooling
from interp_rlhf.concepts.publish import publish
from interp_rlhf.concepts.readout import Readout
from interp_rlhf.validation.statistics import calibration


def scores_of(values):
    scores = torch.tensor(values, dtype=torch.float32)[None, :, None]
    return scores, torch.ones(scores.shape[:2], dtype=torch.bool)


def test_pooling_by_hand():
    scores, mask = scores_of([9.0, 1.0, 3.0, 2.0, 100.0])
    mask[0, 0] = mask[0, 4] = False  # counted: 1, 3, 2
    assert pool(scores, mask, "mean").item() == pytest.approx(2.0)
    assert pool(scores, mask, "max").item() == 3.0
    assert pool(scores, mask, "last").item() == 2.0
    # α = 2/17. Bias-corrected averages: e0 = 1; e1 = (15/17·1 + 3) / (15/17 + 1) = (15 + 51)/32 = 2.0625;
    # e2 = (225/289·1 + 15/17·3 + 2) / (225/289 + 15/17 + 1) = (225 + 765 + 578) / (225 + 255 + 289) = 1568/769.
    averages = ema(scores, mask)[0, :, 0]
    assert averages[[1, 2, 3]].tolist() == pytest.approx([1.0, 2.0625, 1568 / 769])
    # Three tokens are fewer than 16: the average counts at the last token only.
    assert pool(scores, mask, "ema_max").item() == pytest.approx(1568 / 769)


def test_ema_max_finds_a_passage_that_filler_dilutes_in_the_mean():
    passage, filler = [0.0] * 16 + [4.0] * 24, [0.0] * 400
    alone, padded = scores_of(passage), scores_of(passage + filler)
    assert pool(*padded, "ema_max").item() == pytest.approx(pool(*alone, "ema_max").item())
    assert pool(*padded, "mean").item() < 0.1 * pool(*alone, "mean").item()
    spike = scores_of([40.0] + [0.0] * 39)  # one token at the start does not stand for the whole
    assert pool(*spike, "ema_max").item() < 2.0 < pool(*spike, "max").item()


def with_logits(scores, logits, pooling):
    """Scores as `pool` wants them: under `attention` with a column of logits."""
    return (torch.cat([scores, logits / 10], dim=-1) if pooling == "attention" else scores,)


@given(
    values=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40),
    scale=st.floats(0.1, 5),
    shift=st.floats(-5, 5),
    left=st.integers(0, 5),
    right=st.integers(0, 5),
    pooling=st.sampled_from(sorted(POOLINGS)),
)
def test_pooling_is_equivariant_and_blind_to_padding(values, scale, shift, left, right, pooling):
    alone, counts = scores_of(values)
    expected = pool(*with_logits(alone, alone, pooling), counts, pooling).item()
    scores, mask = scores_of([77.0] * left + values + [-77.0] * right)
    mask[0, :left] = False
    mask[0, left + len(values) :] = False
    assert pool(*with_logits(scores, scores, pooling), mask, pooling).item() == pytest.approx(expected, abs=1e-3)
    if pooling == "attention":
        shift = 0.0  # the sink's score is 0, whatever is added to the others
    moved = with_logits(scale * scores + shift, scores, pooling)
    assert pool(*moved, mask, pooling).item() == pytest.approx(scale * expected + shift, abs=1e-2)


def test_a_row_without_counted_tokens_is_nan_and_scores_none(load):
    scores, mask = torch.ones(2, 3, 1), torch.tensor([[True, True, False], [False] * 3])
    for pooling in POOLINGS:
        assert torch.isnan(pool(*with_logits(scores, scores, pooling), mask, pooling)).tolist() == [[False], [True]]
    readout = make_readout(load())
    assert readout.score(ConceptScores(scores, mask, torch.zeros(2, 3), "concept"))[1] is None
    with pytest.raises(ValueError, match=f"`pooling` is 'unheard_of' – expected one of {', '.join(sorted(POOLINGS))}"):
        pool(scores, mask, "unheard_of")


def test_a_registered_pooling_is_calibrated_by_the_fit_and_known_to_cards(load, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(POOLINGS, "_entries", dict(POOLINGS))
    model, examples, point = load(), make_examples(labelled_rows(24)), ["model.layers.1"]
    before = fit_probe(model, tokenizer, examples, point, model_id="tiny")

    @register_pooling("halves")
    def halves(scores, mask):
        return (pool(scores, mask, "mean") + pool(scores, mask, "last")) / 2

    with pytest.raises(ValueError, match=r"`pooling` of `warmth` is `halves` – .* is calibrated for `.* fit it again"):
        publish(before, tmp_path / "before", name="warmth", concept="Speaks warmly.", pooling="halves")
    fit = fit_probe(model, tokenizer, examples, point, model_id="tiny")
    assert {**before.artifact.header.calibration, "halves": fit.artifact.header.calibration["halves"]} == (
        fit.artifact.header.calibration
    )
    path = publish(fit, tmp_path, name="warmth", concept="Speaks warmly.", pooling="halves")
    readout = Readout.from_card(str(path))
    scores, mask = scores_of([1.0, 2.0, 6.0])
    assert readout.pooled(scores, mask).item() == pytest.approx(readout.scale * 4.5 + readout.offset)  # (3 + 6) / 2
    with pytest.raises(ValueError, match="`halves` is already registered as a pooling"):
        register_pooling("halves")(lambda scores, mask: scores[:, 0])
    monkeypatch.undo()  # the module that registers it has not been imported
    with pytest.raises(
        ValueError, match=r"`readout\.pooling`: 'halves' – expected one of attention, .*`register_pooling`.* module"
    ):
        load_card(path)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_what_does_not_count_never_reaches_a_score_and_what_does_raises(pooling, load):
    mask = torch.tensor([[False, True, True, False]])
    clean = torch.tensor([0.0, 1.0, 3.0, 0.0])[None, :, None]
    dirty = torch.tensor([torch.nan, 1.0, 3.0, torch.inf])[None, :, None]
    dirty, clean = (*with_logits(dirty, dirty, pooling), *with_logits(clean, clean, pooling))
    assert pool(dirty, mask, pooling).item() == pool(clean, mask, pooling).item()
    readout = make_readout(load(), pooling=pooling, scale=1e38)
    huge = ConceptScores(clean * 1e3, mask, torch.zeros(1, 4), "concept")
    with pytest.raises(ValueError, match="pools finite token scores to"):
        readout.score(huge)


def test_line_separators_inside_an_answer_are_not_line_ends(tmp_path):
    rows = [{"text": "warm\u2028day\u0085", "label": 1}, {"text": "cold", "label": 0}]
    write_jsonl(rows, tmp_path / "a.jsonl")
    assert load_examples(tmp_path / "a.jsonl").rows[0]["text"] == "warm\u2028day\u0085"


def test_a_probe_folds_standardization_back_into_weight_and_bias():
    rng = np.random.default_rng(0)
    labels = np.array([0, 1] * 50)
    means = rng.normal(size=(100, 5)) * [1, 100, 0.01, 1, 1] + [0, 50, 0, 3, 0]
    means[:, 1] += 80 * labels
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    weight, bias = LinearProbe(regularization=0.1).fit(means, labels)
    scaled = StandardScaler().fit_transform(means)
    reference = LogisticRegression(C=0.1, class_weight="balanced").fit(scaled, labels).decision_function(scaled)
    np.testing.assert_allclose(means @ weight + bias, reference, atol=1e-4)
    weight, bias = LinearProbe("difference_of_means").fit(means, labels)
    gap = scaled[labels == 1].mean(0) - scaled[labels == 0].mean(0)
    middle = (scaled[labels == 1].mean(0) + scaled[labels == 0].mean(0)) / 2
    np.testing.assert_allclose(means @ weight + bias, (scaled - middle) @ gap, atol=1e-6)


def test_a_constant_dimension_gets_no_weight_and_nan_is_refused():
    labels = np.array([0, 1] * 10)
    means = np.stack([labels + 0.1 * np.arange(20), np.full(20, 7.0)], axis=1)
    for method in ("logistic_regression", "difference_of_means"):
        weight, _ = LinearProbe(method).fit(means, labels)
        assert weight[1] == 0
    means[3, 0] = np.nan
    with pytest.raises(ValueError, match="1 of 20 activations are NaN or infinite"):
        LinearProbe().fit(means, labels)


def test_the_mean_of_token_scores_is_what_was_fitted(load, tokenizer):
    model, examples = load(), make_examples(labelled_rows(12))
    point = decoder_layers(model)[1]
    fit = fit_probe(model, tokenizer, examples, [point], model_id="tiny")
    batch = tokenize_examples(examples.rows, tokenizer)
    readout = Readout.from_artifact(fit.artifact, "warmth", "mean")
    by_tokens = np.array(readout.score(read(model, batch, [readout])["warmth"]))
    means = read_means(model, batch, [point])[point]
    fitted = (means @ fit.artifact.weight + fit.artifact.bias).numpy()
    np.testing.assert_allclose((by_tokens - readout.offset) / readout.scale, fitted, atol=1e-4)


def test_every_pooling_is_calibrated_to_log_odds(load, tokenizer):
    model, examples, others = load(), *(make_examples(labelled_rows(count, seed=count)) for count in (60, 300))
    batch = tokenize_examples(others.rows, tokenizer)
    for fitted in FITTED:
        artifact = fit_probe(
            model, tokenizer, examples, [decoder_layers(model)[1]], model_id="tiny", pooling=fitted
        ).artifact
        assert artifact.header.pooling == fitted
        assert fitted in artifact.header.calibration
        for pooling in artifact.header.calibration:
            readout = Readout.from_artifact(artifact, "warmth", pooling)
            scores = np.array(readout.score(read(model, batch, [readout])["warmth"]))
            if roc_auc_score(others.labels, scores) > 0.7:
                slope, _, brier, _ = calibration(others.labels, scores)
                assert 0.5 < slope < 2 or np.isnan(slope), (fitted, pooling)
                assert brier < 0.25


def test_the_sweep_chooses_the_best_layer_and_keeps_prompts_together(load, tokenizer):
    model, examples = load(), make_examples(labelled_rows(20))
    points = sweep_points(model)
    assert points == decoder_layers(model)[:-1]
    fit = fit_probe(model, tokenizer, examples, points, model_id="tiny", seed=3)
    assert [point.hook_point for point in fit.curve] == points
    best = max(fit.curve, key=lambda point: point.auroc)
    assert fit.artifact.header.hook_point == best.hook_point
    assert fit_probe(model, tokenizer, examples, points, model_id="tiny", seed=3).curve == fit.curve
    from interp_rlhf.concepts.linear import folds

    for train, test in folds(examples.labels, examples.groups, seed=0):
        assert not {examples.groups[i] for i in train} & {examples.groups[i] for i in test}


def test_a_probe_is_not_fitted_on_an_adapter(load, tokenizer):
    model = with_lora(load())
    with pytest.raises(ValueError, match="has an active adapter – expected the bare reference model"):
        fit_probe(model, tokenizer, make_examples(labelled_rows(8)), ["model.layers.1"], model_id="tiny")
    with model.disable_adapter():
        fit_probe(model, tokenizer, make_examples(labelled_rows(8)), ["model.layers.1"], model_id="tiny")


def test_an_artifact_comes_back_as_it_was_written(load, tokenizer, tmp_path):
    fit = fit_probe(
        load(), tokenizer, make_examples(labelled_rows(8)), ["model.layers.1"], model_id="tiny", kind="direction"
    )
    sha256 = fit.artifact.save(tmp_path / "a.safetensors")
    again = load_artifact(tmp_path / "a.safetensors", sha256)
    assert torch.equal(again.weight, fit.artifact.weight)
    assert again.header == fit.artifact.header
    assert float(again.weight.norm()) == pytest.approx(1.0)
    assert again.bias == 0.0


def test_a_damaged_or_foreign_artifact_is_refused(load, tokenizer, tmp_path):
    from safetensors.torch import save_file

    card = load_card(make_card(tmp_path, load(), tokenizer))
    whole = card.artifact_path.read_bytes()
    card.artifact_path.write_bytes(whole[: len(whole) - 40])
    with pytest.raises(ValueError, match=r"is not a whole safetensors file .* truncated"):
        Readout.from_card(card)
    card.artifact_path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="changed or swapped after the card was written"):
        Readout.from_card(card)
    save_file({"weight": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="has no `interp_rlhf` header"):
        load_artifact(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="expected an artifact written by `interp-rlhf probe fit`"):
        load_artifact(tmp_path / "none.safetensors")


def test_an_artifact_of_another_model_width_or_hook_point_is_refused(load, tokenizer, tmp_path):
    readout = Readout.from_card(str(make_card(tmp_path, load(), tokenizer)))
    readout.check_model(load())
    with pytest.raises(ValueError, match=r"another architecture: .*`model_type` qwen2 instead of llama"):
        readout.check_model(load("qwen2"), exact=False)
    tuned = load()
    tuned.model.norm.weight.data += 1
    tuned.model.layers[0].input_layernorm.weight.data += 1
    readout.check_model(tuned, exact=False)  # a policy whose own weights are trained
    with pytest.raises(ValueError, match="was made on `tiny` and the model that would be read is not that one"):
        readout.check_model(tuned)
    with pytest.raises(ValueError, match="was made on `tiny` and the model that would be read is not that one"):
        readout.check_model(with_lora(tuned), exact=False)  # with adapters, the base is frozen and checked
    with pytest.raises(ValueError, match="has width 32 – the model's is 64"):
        readout.check_model(load(hidden_size=64))
    with pytest.raises(ValueError, match="expected a module path in `GPT2LMHeadModel`"):
        readout.check_model(load("gpt2"))


FIVE_MISTAKES = f"""\
schema: 2
name: warmth
name: warmth
role: applause
concept: Speaks warmly.
model: {{id: tiny, identity: "sha256:{"0" * 64}"}}
readout: {{kind: probe, hook_point: a.b, artifact: {{path: a.safetensors, sha256: "{"0" * 64}"}}, pooling: mean, colour: red}}
"""


def test_a_card_with_five_mistakes_names_all_five_in_one_message(tmp_path):
    (tmp_path / "card.yaml").write_text(FIVE_MISTAKES)
    with pytest.raises(ValueError) as error:
        load_card(tmp_path / "card.yaml")
    message = str(error.value)
    assert "5 problem(s)" in message
    for part in (
        "`name`: given twice, the second time in line 3",
        "`readout.colour`: unknown key",
        "`role`: 'applause' – input should be 'reward', 'penalty' or 'monitor'",
        "`schema`: 2 – input should be 1",
        "`version`: missing",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("weight: -1", "`weight`: -1 – input should be greater than 0"),
        ("version: yes", "`version`: True – input should be a valid integer"),
        ("transform: {clip: [3, -3]}", "`clip` is \\[3.0, -3.0\\] – expected \\[lower, upper\\]"),
        ("holdouts: monitor.yaml", "`holdouts`: 'monitor.yaml' – input should be a valid list"),
        ("- not a mapping", "not YAML|not a valid"),
    ],
)
def test_wrong_values_in_a_card_are_refused(change, message, load, tokenizer, tmp_path):
    path = make_card(tmp_path, load(), tokenizer, evidence=False)
    key = change.split(":")[0]
    kept = [line for line in path.read_text().splitlines() if not line.startswith(key + ":")]
    path.write_text("\n".join([*kept, change]))
    with pytest.raises(ValueError, match=message):
        load_card(path)


def test_cards_are_data_not_code(tmp_path):
    (tmp_path / "card.yaml").write_text("name: !!python/object/apply:os.system ['touch pwned']\n")
    with pytest.raises(ValueError, match="is not YAML"):
        load_card(tmp_path / "card.yaml")
    assert not (tmp_path / "pwned").exists()


def test_evidence_replaces_only_itself(load, tokenizer, tmp_path):
    path = make_card(tmp_path, load(), tokenizer)
    evidence = load_card(path).card.evidence
    text = (
        "# a comment of mine\n" + path.read_text().replace("weight: 1.0", "weight: 1.0  # another") + "# at the end\n"
    )
    once = with_evidence(text, evidence)
    assert once == with_evidence(once, evidence)
    assert "# a comment of mine" in once
    assert "weight: 1.0  # another" in once
    assert once.count("evidence:") == 1


def test_a_released_card_is_never_overwritten(load, tokenizer, tmp_path):
    fit = fit_probe(load(), tokenizer, make_examples(labelled_rows(8)), ["model.layers.1"], model_id="tiny")
    path = publish(fit, tmp_path, name="warmth", concept="Speaks warmly.")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"exists – expected a new version.*Pass version 2"):
        publish(fit, tmp_path, name="warmth", concept="Something else.")
    assert path.read_bytes() == before
    second = publish(fit, tmp_path, name="warmth", concept="Something else.", version=2)
    assert load_card(second).card.concept == "Something else."
    assert Readout.from_card(str(second)).pooling == "mean"


def test_examples_load_alike_from_jsonl_csv_and_datasets(tmp_path):
    from datasets import Dataset

    rows = [{"text": "warm day", "label": 1}, {"text": "cold, rainy", "label": 0}]
    write_jsonl(rows, tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_text('text,label\nwarm day,1\n"cold, rainy",0\n')
    Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    loaded = [load_examples(tmp_path / name) for name in ("a.jsonl", "a.csv", "set")]
    assert {examples.fingerprint for examples in loaded} == {loaded[0].fingerprint}
    assert loaded[0].labels.tolist() == [1, 0]
    named = make_examples([{"text": "a", "label": "warm"}, {"text": "b", "label": "cold"}], positive="warm")
    assert (named.labels.tolist(), named.label_names) == ([1, 0], ("cold", "warm"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no examples"),
        ("not json\n", "line 1: .* – expected one JSON object per line"),
        ("[1]\n", "line 1 is a list – expected a JSON object"),
        (
            '{"text": "a", "label": 1}\n{"text": "b", "label": 1}\n',
            "one label only, `1`, in 2 rows – expected two classes",
        ),
        ('{"text": "a", "label": 1}\n{"text": "b"}\n', "1 of 2 rows have no `label`, the first is row 1"),
        ('{"text": "a", "label": 1}\n{"answer": "b", "label": 0}\n', r"row 1 has the keys \['answer', 'label'\]"),
        ("".join(json.dumps({"text": "a", "label": i}) + "\n" for i in range(3)), "has 3 labels: `0`, `1`, `2`"),
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n', "`--positive`"),
    ],
)
def test_bad_data_files_are_refused_with_what_to_do(content, message, tmp_path):
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_examples(tmp_path / "data.jsonl")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_examples(tmp_path / "missing.jsonl")


def test_end_of_turn_tokens_are_left_out_alike_unless_the_artifact_says_otherwise(load, tokenizer, tmp_path):
    model, end = load(), tokenizer.eos_token_id
    rows = [{**row, "completion_ids": [*tokenizer(row["completion"])["input_ids"], end]} for row in labelled_rows(8)]
    without = fit_probe(model, tokenizer, make_examples(rows), ["model.layers.1"], model_id="tiny").artifact
    bare = [{k: v for k, v in row.items() if k != "completion_ids"} for row in rows]
    same = fit_probe(model, tokenizer, make_examples(bare), ["model.layers.1"], model_id="tiny").artifact
    torch.testing.assert_close(without.weight, same.weight)
    counted = fit_probe(
        model, tokenizer, make_examples(rows), ["model.layers.1"], model_id="tiny", include_end_of_turn=True
    ).artifact
    assert not torch.allclose(counted.weight, same.weight)
    assert Readout.from_artifact(counted, "warmth", "mean").include_end_of_turn


def test_activations_that_are_all_alike_are_named(load, tokenizer):
    rows = [{"prompt": f"a {i}", "completion": " day", "label": i % 2} for i in range(20)]
    with pytest.raises(ValueError, match="are alike in the 20 examples – expected some that differ"):
        fit_probe(load(), tokenizer, make_examples(rows), "model.layers.0.input", model_id="tiny", kind="direction")
    with pytest.raises(ValueError, match="`regularization` is '0\\.1' – expected a finite number"):
        LinearProbe(regularization="0.1")


def test_the_more_is_tried_the_less_is_left_to_chance():
    labels = np.arange(80) % 2
    prompts = list(map(str, range(80)))
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((300, 15, 80))
    for candidates in (1, 15):
        best = [max(scores[:candidates], key=lambda own: roc_auc_score(labels, own)) for scores in drawn]
        passed = np.mean([separates(labels, scores, prompts, candidates) for scores in best])
        assert passed < 0.06, candidates


def test_an_empty_text_beside_another_form_is_no_form():
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    examples = make_examples([{"text": "", "messages": said, "label": label} for label in (0, 1)])
    assert examples.texts == ["b", "b"]
    assert examples.prompts == ["a", "a"]
