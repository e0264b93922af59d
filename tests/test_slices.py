"""Evidence by group: numbers by hand, and columns that are refused."""

import numpy as np
import pytest
from tiny import labelled_rows, make_card

from interp_rlhf import check_card, load_card
from interp_rlhf.cli import main
from interp_rlhf.concepts.examples import make_examples, write_jsonl
from interp_rlhf.validation.slices import findings_by_group

# Twelve rows of group `right`, scored by their label; twelve of `wrong`, scored against it; two of `tiny`.
LABELS = np.array([0, 1] * 12 + [1, 1])
SLICES = ["right"] * 12 + ["wrong"] * 12 + ["tiny"] * 2
LOG_ODDS = np.concatenate(
    [np.where(LABELS[:12] == 1, 2.0, -2.0), np.where(LABELS[12:24] == 1, -2.0, 2.0), [3.0, -3.0]]
)
PROMPTS = [f"prompt {i}" for i in range(26)]


def by_name():
    return {one.name: one for one in findings_by_group(LABELS, LOG_ODDS, LOG_ODDS, PROMPTS, SLICES, 0)}


def test_a_group_in_which_the_probe_is_inverted_is_seen():
    found = by_name()
    assert found["right"].probe.auroc == 1
    assert found["wrong"].probe.auroc == 0
    assert (found["right"].true_positive_rate, found["right"].false_positive_rate) == (1, 0)
    assert (found["wrong"].true_positive_rate, found["wrong"].false_positive_rate) == (0, 1)
    # Mean of (p − y)²: p = 1 / (1 + e²) = 0.1192 on the wrong side each time.
    assert found["wrong"].calibration.brier == pytest.approx((1 - 0.1192) ** 2, abs=1e-3)


def test_the_smallest_group_comes_first_and_has_no_invented_numbers():
    first = findings_by_group(LABELS, LOG_ODDS, LOG_ODDS, PROMPTS, SLICES, 0)[0]
    assert (first.name, first.examples, first.positives) == ("tiny", 2, 2)
    assert first.probe is None
    assert first.calibration is None
    assert first.false_positive_rate is None
    assert first.true_positive_rate == 0.5  # one of its two positive rows is above 0


def test_a_group_with_few_prompts_has_an_auroc_and_no_interval():
    few = findings_by_group(LABELS[:4], LOG_ODDS[:4], LOG_ODDS[:4], PROMPTS[:4], ["a", "a", "b", "b"], 0)
    assert [one.probe.low for one in few] == [None, None]


def test_the_column_does_not_change_what_the_examples_are():
    rows = labelled_rows(12, seed=3)
    plain = make_examples(rows)
    grouped = make_examples([{**row, "group": "ab"[i % 2]} for i, row in enumerate(rows)])
    assert grouped.fingerprint == plain.fingerprint
    assert plain.slices == ()
    assert set(grouped.slices) == {"a", "b"}


def test_a_row_without_a_group_is_counted_as_such():
    rows = labelled_rows(12, seed=3)
    rows = [{**row, "group": None if i < 3 else "x"} for i, row in enumerate(rows)]
    assert make_examples(rows).slices.count("(none)") == 3


@pytest.mark.parametrize(
    ("values", "column", "said"),
    [
        (["one"] * 24, "group", "has 1 values in 24 rows"),
        ([f"g{i}" for i in range(24)], "topic", "has no column `topic`"),
    ],
)
def test_columns_that_make_no_table_are_refused(values, column, said):
    rows = [{**row, "group": value} for row, value in zip(labelled_rows(12, seed=3), values, strict=True)]
    with pytest.raises(ValueError, match=said):
        make_examples(rows, group_by=column)


def test_more_than_fifty_groups_are_refused():
    rows = [{**row, "group": f"g{i}"} for i, row in enumerate(labelled_rows(60, seed=3))]
    with pytest.raises(ValueError, match="expected 2 to 50 groups"):
        make_examples(rows)


def test_a_card_without_groups_says_nothing_of_them(load, tokenizer, tmp_path):
    card = make_card(tmp_path, load(), tokenizer)
    assert "by_group" not in card.read_text()


def test_probe_check_prints_and_writes_the_groups(load, model_folder, tokenizer, tmp_path, capsys):
    card = make_card(tmp_path, load(), tokenizer)
    rows = [{**row, "topic": "abc"[i % 3]} for i, row in enumerate(labelled_rows(40, seed=2))]
    write_jsonl(labelled_rows(24, seed=1), tmp_path / "fit.jsonl")
    write_jsonl(rows, tmp_path / "check.jsonl")
    words = [
        "probe",
        "check",
        card,
        "--fit-data",
        tmp_path / "fit.jsonl",
        "--data",
        tmp_path / "check.jsonl",
        "--replace",
    ]
    assert main([str(word) for word in [*words, "--model", model_folder(), "--group-by", "topic"]]) == 0
    out = capsys.readouterr().out
    assert "group a" in out
    assert "smallest: " in out
    found = load_card(card).card.evidence.held_out.by_group
    assert sorted(one.name for one in found) == ["a", "b", "c"]
    assert sum(one.examples for one in found) == 80


def test_check_card_in_python_has_them_too(load, tokenizer, tmp_path):
    model = load()
    card = make_card(tmp_path, model, tokenizer)
    rows = [{**row, "group": "ab"[i % 2]} for i, row in enumerate(labelled_rows(40, seed=2))]
    evidence = check_card(
        load_card(card), model, tokenizer, make_examples(labelled_rows(24, seed=1)), make_examples(rows)
    )
    assert len(evidence.held_out.by_group) == 2
