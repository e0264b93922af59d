"""Benchmarks: each runs with a small setting and prints the promised last line, and documents show the committed figures."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COSTS = {
    "read": ["random_model"],
    "reward": ["random_model", "smollm2"],
    "dpo": ["smollm2"],
    "drift": ["smollm2"],
}


def render(root, *arguments):
    return subprocess.run([sys.executable, root / "tools" / "render.py", *arguments], capture_output=True, text=True)


def test_the_tables_of_the_documents_are_those_of_the_committed_data():
    assert (done := render(ROOT, "--check")).returncode == 0, done.stdout + done.stderr


def test_a_changed_figure_makes_the_check_fail_until_it_is_rendered(tmp_path):
    for folder in ("tools", "docs", "benchmarks", "tests/engines"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "README.md", tmp_path)
    assert render(tmp_path, "--check").returncode == 0
    path = tmp_path / "benchmarks" / "read.json"
    measured = json.loads(path.read_text())
    measured["random_model"]["ratios"]["early_stop_vs_output_hidden_states"] = 3.21
    path.write_text(json.dumps(measured))
    engines = tmp_path / "docs" / "engines.json"
    engines.write_text(engines.read_text().replace('"losses": 2e-06', '"losses": 7.7e-05', 1))
    done = render(tmp_path, "--check")
    assert done.returncode == 1
    assert "docs/evidence.md: not rendered" in done.stdout
    assert "docs/engines.md: not rendered" in done.stdout
    assert "benchmarks/README.md: not rendered" in done.stdout
    assert render(tmp_path).returncode == 0
    assert "| 3.21 [" in (tmp_path / "docs" / "evidence.md").read_text()
    assert "| **3.21** [" in (tmp_path / "benchmarks" / "README.md").read_text()
    assert "| 8e-05 |" in (tmp_path / "docs" / "engines.md").read_text()
    assert render(tmp_path, "--check").returncode == 0


@pytest.mark.parametrize("name", COSTS)
def test_committed_costs_say_what_was_measured_on_what(name):
    runs = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())
    assert sorted(runs) == COSTS[name]
    for measured in runs.values():
        assert measured["benchmark"] == name
        assert measured["pairs"] >= 1
        settings = measured["settings"]
        assert {"model", "command", "seed", "threads", "cores", "versions", "intervals", "targets"} <= settings.keys()
        assert set(settings["intervals"]) | set(settings["targets"]) <= set(measured["ratios"])
        for ratio, (low, high) in settings["intervals"].items():
            assert low <= measured["ratios"][ratio] <= high, ratio


SCRIPTS = ("canaries", "dpo", "drift", "locate", "ppo", "ppo_real_model", "probes", "read", "reward", "sae", "scaling")
LIGHT = ("canaries", "read")  # the others take minutes on a busy machine


def benchmark(*arguments):
    """What a process with one thread and this checkout's package prints."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "120",
    }
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_benchmark_is_known_here_and_has_help():
    """In one process: most of the time goes to the imports."""
    code = """
import contextlib, io, runpy, sys
sys.path.insert(0, "benchmarks")
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        runpy.run_path(f"benchmarks/{name}.py", run_name="__main__")
    print(name, all(option in out.getvalue() for option in ("--json", "--quick", "--seed")))
"""
    assert benchmark("-c", code, *SCRIPTS).split() == [word for name in SCRIPTS for word in (name, "True")]
    with_main = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "parser(__doc__" in path.read_text()}
    assert with_main == set(SCRIPTS)


@pytest.mark.parametrize(
    "name", [name if name in LIGHT else pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS]
)
def test_a_small_run_of_a_benchmark_ends_with_the_promised_line(name):
    printed = benchmark(f"benchmarks/{name}.py", "--quick", "--json").splitlines()
    last = json.loads(printed[-1])
    assert last.keys() == {"benchmark", "ratios", "pairs", "settings"}
    assert (last["benchmark"], last["pairs"]) == (name, 1)
    assert last["ratios"]
    assert all(math.isfinite(ratio) for ratio in last["ratios"].values())
    settings = last["settings"]
    assert settings["quick"] is True
    assert settings["command"] == f"python benchmarks/{name}.py --quick --json"
    assert {"model", "seed", "processor", "cores", "threads", "versions"} <= settings.keys()
    assert any(line.startswith("Measured on: ") for line in printed)
    assert all("expected" in why or "not " in why or "skipped" in why for why in settings["not_run"].values())


def test_run_all_stores_a_run_under_its_key_and_leaves_the_rest(tmp_path):
    (tmp_path / "read.json").write_text('{"other": 1}')
    printed = benchmark("benchmarks/run_all.py", "--quick", "--only", "read", "ppo", "--out", tmp_path)
    assert "ppo: left out – expected `--trl-1-12`" in printed
    stored = json.loads((tmp_path / "read.json").read_text())
    assert stored.keys() == {"other", "random_model"}
    assert stored["random_model"]["benchmark"] == "read"
    listed = benchmark("benchmarks/run_all.py", "--list")
    assert "drift             10 min" in listed


def test_run_all_writes_every_file_that_a_document_is_rendered_from():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from run_all import RUNS

    stored = {(run.script, run.key) for run in RUNS}
    assert {(name, key) for name, keys in COSTS.items() for key in keys} <= stored
    for run in RUNS:
        if run.key not in ("", "."):  # these write the whole file
            assert run.key in json.loads((ROOT / "benchmarks" / run.file).read_text()), run.name
