"""Benchmarks: each runs with a small setting and prints the promised last line, and documents show the committed figures."""

from __future__ import annotations

import json
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
    assert render(tmp_path).returncode == 0
    assert "| 3.21 [" in (tmp_path / "docs" / "evidence.md").read_text()
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
