"""Cards as people look at them, compare them, derive new ones and share them, through the command line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from interp_rlhf.cli import main
from interp_rlhf.commands.evidence_chart import WIDTH, Axis
from interp_rlhf.concepts.card import load_card

ROOT = Path(__file__).resolve().parent.parent
WARMTH = ROOT / "reward" / "warmth"


@pytest.fixture
def cards(tmp_path):
    """A copy of the shipped cards of version 3."""
    folder = tmp_path / "cards"
    folder.mkdir()
    for name in ("reward.v3.yaml", "monitor.v3.yaml", "warmth.v3.safetensors", "warmth-holdout.v3.safetensors"):
        shutil.copy(WARMTH / name, folder)
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*words, capsys) -> dict:
    assert main(["card", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_an_axis_puts_equal_numbers_in_the_same_column_and_one_at_its_end():
    axis = Axis(0.22)  # starts at 0.2, so that 0.6 lies in the middle
    assert axis.start == 0.2
    assert [axis(value) for value in (0.1, 0.2, 0.6, 1.0)] == [0, 0, (WIDTH - 1) // 2, WIDTH - 1]
    row = axis.drawn({0.6: "●"}, (0.52, 0.68))  # 0.08 is a tenth of the axis
    assert [row.index(mark) for mark in "├●┤"] == [20, 25, 30]
    assert row.index("┊") == axis(0.5)
    assert Axis(0.9).start == 0.4  # chance is always on the axis


def test_show_draws_every_number_of_the_evidence(cards, capsys):
    assert main(["card", "show", str(cards / "reward.v3.yaml")]) == 0
    shown = capsys.readouterr().out
    loaded = load_card(cards / "reward.v3.yaml")
    found = loaded.card.evidence.held_out
    rows = [found.probe, found.tfidf, found.length, found.punctuation, found.embedding, *found.likelihood.values()]
    rows += [
        found.prompt.tfidf,
        found.prompt.probe,
        found.prompt.within,
        found.prompt.other_answers,
        found.measures["vader"],
    ]
    for estimate in rows:
        assert f"{estimate.auroc:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]" in shown
    for control in (found.permutation, found.random_direction):
        assert f"p95 {control.p95:.3f} of {control.repeats}" in shown
    assert f"{found.adds.auroc.value:+.3f}" in shown
    assert "slope 1.46" in shown
    assert "canaries   4 sequences" in shown
    for digest in (loaded.sha256, loaded.card.readout.artifact.sha256, loaded.card.model.identity):
        assert digest in shown
    assert "gate: may be a reward" in shown
    chart = [line for line in shown.splitlines() if "●" in line and "interval" not in line]
    assert len(chart) == len(rows) + 1  # TF-IDF of prompt and completion together
    assert run("show", cards / "reward.v3.yaml", capsys=capsys)["passed"]


def test_show_says_why_a_card_without_evidence_may_be_a_monitor_only(cards, capsys):
    text = (cards / "reward.v3.yaml").read_text()
    (cards / "bare.yaml").write_text(text[: text.index("evidence:")])
    assert main(["card", "show", str(cards / "bare.yaml")]) == 0
    assert "gate: may be a monitor only\n  - it has no evidence" in capsys.readouterr().out


def test_show_refuses_a_card_whose_artifact_was_changed(cards, capsys):
    artifact = cards / "warmth.v3.safetensors"
    data = bytearray(artifact.read_bytes())
    data[-1] ^= 1
    artifact.write_bytes(data)
    assert main(["card", "show", str(cards / "reward.v3.yaml")]) == 2
    assert "was changed or swapped" in capsys.readouterr().err


def test_diff_lists_what_differs_and_its_exit_code_says_if_the_cards_read_the_same(cards, capsys):
    text = (cards / "reward.v3.yaml").read_text()
    (cards / "lighter.yaml").write_text(
        text.replace("weight: 1.0", "weight: 0.5").replace("auroc: 0.9241", "auroc: 0.9")
    )
    assert main(["card", "diff", str(cards / "reward.v3.yaml"), str(cards / "lighter.yaml")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^weight +1\.0 → 0\.5$", shown, re.M)
    assert re.search(r"^evidence\.held_out\.probe +0\.9241 \[.*\] → 0\.9 \[.*\]  intervals overlap$", shown, re.M)
    assert "they read the same" in shown
    (cards / "other.yaml").write_text(text.replace("pooling: mean", "pooling: ema_max"))
    assert main(["card", "diff", str(cards / "reward.v3.yaml"), str(cards / "other.yaml"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [difference["key"] for difference in found["differences"]] == ["readout.pooling"]
    assert not found["same_readout"]
    assert main(["card", "diff", str(cards / "reward.v3.yaml"), str(cards / "reward.v3.yaml")]) == 0
    assert "the cards say the same" in capsys.readouterr().out


def test_diff_says_where_intervals_lie_apart(cards, capsys):
    text = (cards / "reward.v3.yaml").read_text()
    apart = text.replace(
        "auroc: 0.9241\n      low: 0.8809\n      high: 0.9639", "auroc: 0.6\n      low: 0.5\n      high: 0.7"
    )
    (cards / "apart.yaml").write_text(apart)
    found = run("diff", cards / "reward.v3.yaml", cards / "apart.yaml", capsys=capsys)["differences"]
    assert [(difference["key"], difference["overlap"]) for difference in found] == [("evidence.held_out.probe", False)]


def test_a_new_card_keeps_its_evidence_as_long_as_it_reads_the_same(cards, tmp_path, capsys):
    before = content_of(cards)
    made = run(
        "new", cards / "reward.v3.yaml", "--role", "penalty", "--weight", 0.2, "--transform=-1,2,-3,3", capsys=capsys
    )
    assert made["evidence_kept"]
    assert made["passed"]
    old, new = load_card(cards / "reward.v3.yaml").card, load_card(cards / "penalty.v4.yaml").card
    assert (new.role, new.weight, new.version, new.evidence) == ("penalty", 0.2, 4, old.evidence)
    assert (new.transform.mean, new.transform.std, new.transform.clip) == (-1, 2, [-3, 3])
    made = run("new", cards / "reward.v3.yaml", "--pooling", "ema_max", "--out", tmp_path / "elsewhere", capsys=capsys)
    assert not made["evidence_kept"]
    elsewhere = load_card(tmp_path / "elsewhere" / "reward.v4.yaml").card
    assert (elsewhere.readout.pooling, elsewhere.evidence) == ("ema_max", None)
    assert sorted(content_of(tmp_path / "elsewhere")) == [
        "monitor.v3.yaml", "reward.v4.yaml", "warmth-holdout.v3.safetensors", "warmth.v3.safetensors",
    ]  # fmt: skip
    assert {name: data for name, data in content_of(cards).items() if name in before} == before


def test_the_first_card_of_an_artifact_says_what_the_artifact_says(cards, capsys):
    made = run("new", cards / "warmth.v3.safetensors", "--role", "monitor", "--concept", "Warm.", capsys=capsys)
    card, shipped = load_card(made["card"]).card, load_card(cards / "reward.v3.yaml").card
    assert (card.name, card.version, card.role, card.concept) == ("warmth", 1, "monitor", "Warm.")
    assert (card.model, card.readout.artifact) == (shipped.model, shipped.readout.artifact)
    assert card.evidence is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--version", "3"], r"reward\.v3\.yaml` exists – expected a new version"),
        (["--version", "0"], "expected at least 1"),
        (["--weight", "-1"], "expected a finite number above 0"),
        (["--pooling", "median"], "`--pooling median` – expected one of"),
        (["--pooling", "attention"], "the artifact is calibrated for"),
        (["--transform", "1"], "expected MEAN,STD or MEAN,STD,LOWER,UPPER"),
        (["--transform", "0,0"], "with STD above 0"),
        (["--name", "Warm!"], "expected lower-case letters"),
        (["--holdout", "../other.yaml"], "expected a file in the card's own folder"),
        (["--holdout", "missing.yaml"], "does not exist"),
    ],
)
def test_a_new_card_that_cannot_be_is_refused_and_nothing_is_written(words, said, cards, capsys):
    before = content_of(cards)
    assert main(["card", "new", str(cards / "reward.v3.yaml"), *words]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert content_of(cards) == before
