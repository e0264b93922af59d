"""The run log's events: what is written is read back, old and broken lines are read too, and restarts follow one rule."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from interp_rlhf.runlog import document
from interp_rlhf.runlog.events import (
    CardEntry,
    DriftEvent,
    MonitorEntry,
    OwnMonitorEntry,
    OwnTextEntry,
    RunEvent,
    SampleEntry,
    SamplesEvent,
    TokensEntry,
    VerdictEvent,
)
from interp_rlhf.runlog.log import CLASSES, RunLog, in_force, jsonable, parse, read_events, read_run_log
from interp_rlhf.runlog.records import own_fields

ROOT = Path(__file__).parents[1]
EVENTS = [
    RunEvent(step=0, arm="probe", cards=[CardEntry(name="warmth", role="reward", sha256="sha256:1")], settings={"seed": 1}),
    DriftEvent(
        step=5, texts=2, tokens=9, hook_points={"p": {"cka": 1.0, "cosine": None}},
        monitors={"m": MonitorEntry(mean_score=0.5, shift=-1.0, hook_point="p", pressure=-1, frozen_change=[0.1, None, 0.2])},
        own_text=OwnTextEntry(prompts=8, monitors={"m": OwnMonitorEntry(policy=1.0)}, scores={"m": [1.0, None]}),
    ),
    VerdictEvent(step=5, verdict="steady", because=["nothing moved"], next="Nothing to do."),
    SamplesEvent(
        step=5, when="train",
        rows=[SampleEntry(prompt="Hi", completion="Ho", tokens=TokensEntry(pieces=["Ho"], scores={"m": [1.0]}))],
    ),
]  # fmt: skip


def test_the_documentation_of_the_run_log_is_what_the_classes_say():
    committed = (ROOT / "docs" / "run_log.md").read_text(encoding="utf-8")
    assert committed == document.page(), "run `python -m interp_rlhf.runlog.document > docs/run_log.md`"


def test_every_key_is_documented():
    for event in CLASSES:
        for one in own_fields(event):
            assert one.metadata["about"], f"{event.__name__}.{one.name}"


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.event)
def test_what_is_written_is_read_back(tmp_path, event):
    log = RunLog(tmp_path / "interp.jsonl")
    log.append(event)
    (line,), (read,) = read_run_log(log.path), read_events(log.path)
    assert list(line)[:3] == ["event", "time", "step"]
    expected = jsonable(event.to_json()) | ({"schema": 2} if event.event == "run" else {})
    assert {key: value for key, value in line.items() if key != "time"} == expected
    assert read.to_json() == line


def test_a_line_of_version_1_is_read_and_keeps_keys_that_are_unknown():
    line = {"event": "drift", "time": 1.0, "step": 3, "texts": 2, "monitors": {"m": {"auroc": 0.7}}, "new": [1]}
    event = parse(line)
    assert (event.step, event.texts, event.monitors["m"].other) == (3, 2, {"auroc": 0.7})
    assert event.to_json()["new"] == [1]
    assert parse({"event": "run", "arm": "a"}).schema == 1


def test_a_value_of_another_type_counts_as_missing():
    event = parse(
        {"event": "drift", "texts": "many", "hook_points": {"p": {"a": True, "b": 1, "c": None, "d": "x"}, "q": 3},
         "monitors": {"m": 0.5}, "own_text": {"scores": {"m": [1, "x", None]}, "fvu": math.nan}, "finite": "no"}
    )  # fmt: skip
    assert event.texts is None
    assert event.hook_points == {"p": {"b": 1.0, "c": None}}
    assert event.monitors == {"m": MonitorEntry(other={"value": 0.5})}
    assert event.own_text.scores == {"m": [1.0, None, None]}
    assert event.own_text.fvu is None
    assert event.finite


def logged(*lines):
    return [{"event": event, "step": step, "arm": arm} for event, step, arm in lines]


def test_a_resumed_run_takes_back_what_came_after_its_checkpoint():
    lines = logged(
        ("run", 0, ""), ("metric", 1, ""), ("metric", 2, ""), ("drift", 2, ""), ("run", 1, ""), ("metric", 2, "")
    )
    assert [(line["event"], line["step"]) for line in in_force(lines)] == [
        ("run", 0), ("metric", 1), ("run", 1), ("metric", 2),
    ]  # fmt: skip


def test_a_run_that_begins_again_takes_back_all_that_its_arm_said():
    lines = logged(
        ("metric", 0, ""), ("run", 0, "a"), ("metric", 1, ""), ("run", 0, "b"), ("metric", 1, ""), ("run", 0, "a")
    )
    assert [json.dumps(line) for line in in_force(lines)] == [json.dumps(lines[i]) for i in (0, 3, 4, 5)]


def test_the_first_run_of_an_arm_takes_nothing_back():
    lines = logged(("metric", 0, ""), ("run", 0, ""), ("metric", 1, ""))
    assert in_force(lines) == lines


def test_a_restart_without_a_step_begins_just_before_its_first_metrics():
    lines = [{"event": "run"}, *({"event": "metric", "step": step} for step in (1, 2, 3)), {"event": "run"}]
    assert in_force(lines) == lines  # nothing follows yet
    lines += [{"event": "metric", "step": 3}]
    assert [line.get("step") for line in in_force(lines)] == [None, 1, 2, None, 3]
