"""The command line as a user types it, through `main`: exit codes, files and messages, on a tiny model."""

from __future__ import annotations

import json

import pytest
from tiny import labelled_rows

from interp_rlhf.cli import build_parser, main
from interp_rlhf.concepts.card import load_card
from interp_rlhf.concepts.examples import write_jsonl
from interp_rlhf.runlog.log import RunLog, read_run_log


@pytest.fixture
def files(tmp_path, model_folder):
    write_jsonl(labelled_rows(24, seed=1), tmp_path / "fit.jsonl")
    write_jsonl(labelled_rows(40, seed=2), tmp_path / "check.jsonl")
    return tmp_path, str(model_folder("llama"))


def fit(folder, model, *more):
    data, out = str(folder / "fit.jsonl"), str(folder / "cards")
    return main(["probe", "fit", "--data", data, "--name", "warmth", "--out", out, "--model", model, *more])


def check(folder, model, *more):
    paths = ["--fit-data", str(folder / "fit.jsonl"), "--data", str(folder / "check.jsonl")]
    return main(["probe", "check", str(folder / "cards" / "reward.v1.yaml"), *paths, "--model", model, *more])


def test_fit_then_check_makes_a_card_that_may_be_a_reward(files, capsys):
    folder, model = files
    assert fit(folder, model, "--sweep", "1") == 0
    assert "next: interp-rlhf probe check" in capsys.readouterr().out
    assert (folder / "cards" / "reward.v1.sweep.svg").read_text().startswith("<?xml")
    assert load_card(folder / "cards" / "reward.v1.yaml").card.evidence is None
    assert check(folder, model, "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["passed"]
    card = load_card(folder / "cards" / "reward.v1.yaml").card
    assert card.evidence.held_out.probe.auroc == found["held_out"]["probe"]["auroc"]
    assert card.evidence.command.startswith("interp-rlhf ")


def test_evidence_is_not_replaced_by_accident(files, capsys):
    folder, model = files
    assert fit(folder, model, "--hook-point", "model.layers.1", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["hook_point"] == "model.layers.1"
    assert check(folder, model, "--measure", "vader") == 0
    assert "vader" in capsys.readouterr().out
    before = (folder / "cards" / "reward.v1.yaml").read_bytes()
    assert check(folder, model) == 2
    assert "has evidence already – expected none. Pass `--replace`" in capsys.readouterr().err
    assert (folder / "cards" / "reward.v1.yaml").read_bytes() == before
    assert check(folder, model, "--replace", "--seed", "4") == 0
    assert load_card(folder / "cards" / "reward.v1.yaml").card.evidence.seed == 4


def test_a_card_whose_evidence_does_not_reach_ends_with_1(files, capsys):
    folder, model = files
    write_jsonl(
        [{**row, "label": i % 2} for i, row in enumerate(labelled_rows(40, seed=2)[::2])], folder / "check.jsonl"
    )
    assert fit(folder, model, "--hook-point", "model.layers.1") == 0
    assert check(folder, model) == 1
    assert "may be a monitor only: on held-out examples" in capsys.readouterr().out


def test_bad_input_ends_with_2_one_line_and_nothing_lost(files, capsys):
    folder, model = files
    assert fit(folder, model, "--hook-point", "model.layers.9") == 2
    error = capsys.readouterr().err
    assert (
        error.strip().splitlines()[-1].startswith("error: `hook_point` is `model.layers.9` – expected a module path")
    )
    assert not (folder / "cards").exists()
    assert fit(folder, model, "--hook-point", "model.layers.1") == 0
    artifact = (folder / "cards" / "warmth.v1.safetensors").read_bytes()
    assert fit(folder, model, "--hook-point", "model.layers.0") == 2
    assert "Pass version 2" in capsys.readouterr().err
    assert (folder / "cards" / "warmth.v1.safetensors").read_bytes() == artifact
    (folder / "fit.jsonl").write_text("")
    assert check(folder, model) == 2
    assert "holds no examples" in capsys.readouterr().err


def test_report_writes_both_pages_from_a_run_log(tmp_path, capsys):
    log = RunLog(tmp_path / "run" / "interp.jsonl")
    log.append("run", 0, title="run", arm="probe", model="tiny", trainer="GRPOTrainer", cards=[], settings={"seed": 1})
    log.append("metric", 1, metrics={"reward": 0.5, "kl": 0.1})
    card = ["--model-card", str(tmp_path / "README.md")]
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report.html"), *card]) == 0
    printed = capsys.readouterr().out.split()
    assert sorted(printed) == [
        str(tmp_path / name) for name in ("README.md", "report.html", "report.json", "report.md")
    ]
    assert "What training did to the inside" in (tmp_path / "README.md").read_text()
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_the_demo_stops_where_its_probe_fails_the_gate(tmp_path, model_folder, capsys):
    """A model with random weights follows no clause, so there is nothing to find, and the demo says so."""
    out = tmp_path / "demo"
    assert main(["demo", "--quick", "--model", str(model_folder("llama")), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "may not be a reward" in said or "does not separate the labels on prompts that it has not seen" in said
    assert (out / "data" / "fit.jsonl").exists()
    assert not (out / "summary.json").exists()


def test_a_finished_demo_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "summary.json").write_text("{}")
    assert main(["demo", "--out", str(tmp_path), "--model", "unused"]) == 2
    assert "holds a finished demo – expected a new folder" in capsys.readouterr().err
    assert (tmp_path / "summary.json").read_text() == "{}"
    assert main(["demo", "--steps", "0"]) == 2
    assert "`--steps` is 0 – expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["--help"], ["demo", "--help"], ["probe", "fit", "--help"], ["probe", "check", "--help"], ["report", "--help"]],
)
def test_every_command_has_help(words, capsys):
    with pytest.raises(SystemExit) as done:
        build_parser().parse_args(words)
    assert done.value.code == 0
    assert "usage: interp-rlhf" in capsys.readouterr().out


def test_a_run_log_survives_a_torn_line_and_foreign_values(tmp_path):
    log = RunLog(tmp_path / "interp.jsonl")
    log.append("metric", 1, metrics={"nan": float("nan"), "text": "ü\ud800"})
    with (tmp_path / "interp.jsonl").open("ab") as file:
        file.write(b'{"event": "metric", "step": 2, "met')  # a kill in the middle of a write
    RunLog(tmp_path / "interp.jsonl").append("end", 3, seconds=1.5)
    events = read_run_log(tmp_path / "interp.jsonl")
    assert [event["event"] for event in events] == ["metric", "end"]
    assert events[0]["metrics"]["nan"] is None
    with pytest.raises(ValueError, match="`event` is 'applause'"):
        log.append("applause")
    RunLog(tmp_path / "other.jsonl", writable=False).append("end")
    assert not (tmp_path / "other.jsonl").exists()
