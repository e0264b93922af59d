"""Two processes on every engine, by `accelerate launch`: the numbers of one process, and an end where a rank fails.

`engines/compare.py` starts the runs, each engine once for all cases. These are real engines on a CPU (gloo); FSDP2 is one by a
patch that only tests know (`engines/cpu_engines.py`). Run them by `python -m pytest -m slow tests/test_engines.py`.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytest.importorskip("deepspeed")

from engines import compare

from interp_rlhf.runlog.log import read_run_log
from interp_rlhf.training.checkpoints import last_complete_checkpoint

pytestmark = pytest.mark.slow

CASES = ["dpo", "dpo_odd", "grpo", "grpo_beta0", "grpo_silent", "sft"]
ENGINES = {
    "ddp": {"distributed_type": "MULTI_CPU", "stage": None, "model": "DistributedDataParallel"},
    "zero2": {"distributed_type": "DEEPSPEED", "stage": 2, "model": "DeepSpeedEngine"},
    "zero3": {"distributed_type": "DEEPSPEED", "stage": 3, "model": "DeepSpeedEngine"},
    "fsdp2": {"distributed_type": "FSDP", "stage": None, "model": "FSDPLlamaForCausalLM"},
}
STEPS = ("--steps", "4")
# A run that is killed in its third step, after the save of its second.
KILLED = (*STEPS, "--save-every", "1", "--kill-at", "1:3")
END = 60  # seconds in which all ranks have ended once one has failed


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    compare.make_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def results(place):
    """Results of all cases on an engine, which is started once."""
    found: dict[str, dict] = {}

    def of(engine):
        if engine not in found:
            found[engine] = compare.run(engine, CASES, place / "model", place / "whole", *STEPS)
        return found[engine]

    return of


@pytest.fixture(scope="module")
def killed(place):
    """Folder of a run on an engine one of whose ranks was killed, all others having ended of themselves."""
    folders: dict[str, Path] = {}

    def of(engine, case):
        if engine not in folders:
            folders[engine] = place / f"killed_{engine}"
            written = ended_within_a_minute(engine, case, place / "model", folders[engine], "killed", *KILLED)
            assert "ChildFailedError" in written
            assert "exitcode  : -9" in written
        return folders[engine]

    return of


def ended_within_a_minute(engine, case, model, out, word, *more):
    """What a run wrote that has to fail: a minute after it says the word, no process of it is left, and it has not succeeded."""
    process = compare.launch(engine, [case], model, out, *more)
    file = out / f"{engine}.txt"
    try:
        while word not in file.read_text() and process.poll() is None:
            time.sleep(0.1)
        assert process.wait(timeout=END) not in (0, None)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{engine} hangs:\n{file.read_text()[-3000:]}")
    finally:
        process.terminate()
        process.wait()
    written = file.read_text()
    ranks = [int(line.split()[1]) for line in written.splitlines() if line.startswith("ready ")]
    assert len(ranks) == 2
    assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
    return written


def differences(one, other, folders):
    """What differs from a whole run; of a resumed one's rollouts, those that it made itself."""
    count = len(other["rewards"])
    kept = [
        {
            **result,
            "history": [
                {key: value for key, value in log.items() if key != "train_loss"} for log in result["history"]
            ],
            "rewards": result["rewards"][-count:] if count else [],
            "completions": result["completions"][-count:] if count else [],
        }
        for result in (one, other)
    ]
    return compare.differing(compare.compare(*kept, folders))


def numbers(value, path=""):
    """Leaves of nested lists and mappings, by path."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {path: value}
    return {k: v for key, item in items for k, v in numbers(item, f"{path}/{key}").items()}


def drift_of(folder):
    """What the drift callback wrote down, without clocks."""
    events = [event for event in read_run_log(folder / "interp.jsonl") if event["event"] in ("drift", "verdict")]
    return [
        numbers({key: value for key, value in event.items() if key not in ("time", "overhead_seconds")})
        for event in events
    ]


def same_drift(one, other):
    """The same evaluations with the same findings: distances from the start, which texts moved, which batches moved."""
    ours, theirs = drift_of(one), drift_of(other)
    assert [event["/step"] for event in ours] == [event["/step"] for event in theirs] == [0, 0, 2, 2, 4, 4]
    assert any(path.startswith("/moved/") for path in ours[-2])
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for path, value in a.items():
            if isinstance(value, float):
                assert compare.gap(value, b[path]) < compare.TOLERANCE, path
            elif "/because/" not in path:  # numbers in words
                assert value == b[path], path


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_numbers_of_one_process(engine, results, place):
    alone, found = results("single"), results(engine)
    start = load_file(place / "model" / "model.safetensors")
    for case in CASES:
        had = found[case]["found"]
        assert {key: had.get(key) for key in ENGINES[engine]} == ENGINES[engine]
        assert (had["processes"], had["world_size"], had["backend"]) == (2, 2, "gloo")
        assert had["in_pieces"] > 0.9 if engine in ("zero3", "fsdp2") else had["in_pieces"] == 0
        assert alone[case]["found"]["distributed_type"] == "NO"
        folders = place / "whole" / case / "single", place / "whole" / case / engine
        assert compare.differing(compare.compare(alone[case], found[case], folders)) == {}, case
        assert found[case]["own_forwards"] == alone[case]["own_forwards"]
        trained = load_file(folders[1] / "model" / "model.safetensors")
        assert max(float((trained[name] - weight).abs().max()) for name, weight in start.items()) > 1e-3
        logged = {key for log in found[case]["history"] for key in log}
        expected = {"interp/watched/mean_score", "interp/drift/kl", "interp/drift/model.layers.1/cosine", "grad_norm"}
        expected |= {
            "dpo": {
                "interp/anchor_anchored/loss",
                "interp/features_latents/loss",
                "interp/held/loss",
                "rewards/margins",
            },
            "grp": {
                "rewards/paid/mean",
                "interp/paid/drift",
                "interp/measure/letters/mean",
                "interp/watch/own_policy",
            },
            "sft": {"interp/drift_model_layers_0/loss", "interp/watch/own_policy"},
        }[case[:3]]
        assert expected <= logged, expected - logged


@pytest.mark.parametrize("engine", ENGINES)
def test_metrics_are_over_the_completions_that_count_where_a_rank_has_none(engine, results):
    found = results(engine)["grpo_silent"]
    for batch, completions in zip(found["rewards"], found["completions"], strict=True):
        assert [ids == [0] for ids in completions] == [False] * (len(completions) // 2) + [True] * (
            len(completions) // 2
        )
        assert [math.isnan(row[0]) for row in batch] == [ids == [0] for ids in completions]
    logged = [log["rewards/paid/mean"] for log in found["history"] if "rewards/paid/mean" in log]
    by_hand = [[row[0] for row in batch if not math.isnan(row[0])] for batch in found["rewards"]]
    assert logged == pytest.approx([sum(values) / len(values) for values in by_hand], abs=1e-5)


@pytest.mark.parametrize(("engine", "case"), [("ddp", "grpo"), ("zero3", "dpo")])
def test_a_killed_rank_ends_all_and_the_resumed_run_is_the_whole_one(engine, case, results, killed, place):
    folder = killed(engine, case)
    assert Path(last_complete_checkpoint(folder / case / engine)).name == "checkpoint-2"
    out = place / f"resumed_{engine}"
    shutil.copytree(folder, out)
    resumed = compare.run(engine, [case], place / "model", out, *STEPS, "--save-every", "1", "--resume")[case]
    whole = results(engine)[case]
    assert {key: resumed["found"].get(key) for key in ENGINES[engine]} == ENGINES[engine]
    assert len(resumed["rewards"]) == (2 if case == "grpo" else 0)
    folders = place / "whole" / case / engine, out / case / engine
    assert differences(whole, resumed, folders) == {}
    same_drift(*folders)


def test_a_run_moves_from_two_processes_to_one(results, killed, place):
    """With the monitors' statistics, the drift's start and what it has seen since."""
    out = place / "moved"
    shutil.copytree(killed("ddp", "grpo") / "grpo" / "ddp", out / "grpo" / "single")
    moved = compare.run("single", ["grpo"], place / "model", out, *STEPS, "--save-every", "1", "--resume")["grpo"]
    assert moved["found"]["processes"] == 1
    assert len(moved["rewards"]) == 2
    folders = place / "whole" / "grpo" / "single", out / "grpo" / "single"
    assert differences(results("single")["grpo"], moved, folders) == {}
    same_drift(*folders)
    kept = [json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"]["interp_rlhf"] for folder in
            (out / "grpo" / "single" / "checkpoint-2", out / "grpo" / "single" / "checkpoint-4")]  # fmt: skip
    assert [state["processes"] for state in kept] == [2, 1]
    assert kept[0]["rollouts"]["usual"] == kept[1]["rollouts"]["usual"] != {}
    assert [state["rollouts"]["batches"] for state in kept] == [2, 4]


@pytest.mark.parametrize(
    ("engine", "case", "fault", "said"),
    [
        ("ddp", "grpo", "1:nan", ["[rank0]: ValueError: Rank 1: Readout `paid` gives [nan] at row",
                                  "[rank1]: ValueError: Rank 1: Readout `paid` gives [nan] at row"]),
        ("zero3", "dpo", "1:nan", ["[rank0]: ValueError: Regularizer `anchor_anchored` is not a number on another rank",
                                   "[rank1]: ValueError: Regularizer `anchor_anchored` is [nan, nan, nan, nan] on this"]),
        ("zero3", "grpo", "1:raise", ["[rank1]: RuntimeError: this reward is broken"]),
    ],
)  # fmt: skip
def test_the_error_of_one_rank_ends_all_with_its_message(engine, case, fault, said, place, tmp_path):
    written = ended_within_a_minute(engine, case, place / "model", tmp_path, "ready", *STEPS, "--fault", fault)
    for message in said:
        assert message in written
    assert not (tmp_path / case / engine / "result.json").exists()
