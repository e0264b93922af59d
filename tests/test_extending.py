"""`docs/extending.md`: its module registers five things, and its recipe and command use them by name.

Each runs as a user runs it, in a separate process, so nothing stays registered for other tests.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny import labelled_rows, make_card
from training import rows_of

from interp_rlhf.concepts.examples import write_jsonl
from interp_rlhf.extensions import import_modules
from interp_rlhf.recipe import InterpArguments
from interp_rlhf.runlog.log import read_run_log

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_folder, tokenizer):
    """A user's folder: the page's module, data, the launch script of DPO, and what the page's command makes there."""
    from transformers import AutoModelForCausalLM

    place = tmp_path_factory.mktemp("extending")
    (place / "my_extensions.py").write_text("\n\n".join(blocks("python")))
    write_jsonl(labelled_rows(24, seed=1), place / "fit.jsonl")
    write_jsonl(rows_of("DPO", 8), place / "pairs.jsonl")
    write_jsonl([{"prompt": row["prompt"]} for row in rows_of("DPO", 8)], place / "prompts.jsonl")
    make_card(place, AutoModelForCausalLM.from_pretrained(model_folder()), tokenizer)
    shutil.copy(ROOT / "recipes" / "dpo.py", place / "dpo.py")
    [command] = [shlex.split(line) for line in "".join(blocks("text")).splitlines()]
    run(place, sys.executable, "-m", "interp_rlhf", *command[1:], "--model", str(model_folder()))
    return place


def test_the_examples_are_short_and_there_is_one_of_each_kind():
    registered = re.findall(r"^@(register_\w+)", PAGE, re.M)
    assert sorted(registered) == [
        "register_drift_metric", "register_measure", "register_pooling", "register_sae_format", "register_term",
    ]  # fmt: skip
    for block in blocks("python"):
        assert len([line for line in block.splitlines() if line.strip() and "import" not in line]) <= 12


def test_the_command_writes_a_card_with_the_pooling_of_the_module(folder):
    card = yaml.safe_load((folder / "cards" / "monitor.v1.yaml").read_text())
    assert card["readout"]["pooling"] == "my_median"


def test_the_recipe_uses_what_the_module_registers_by_its_name(folder, model_folder):
    """Term, pooling, measure and drift metric in one launch; the module lies in the script's folder."""
    [section] = [yaml.safe_load(block) for block in blocks("yaml")]
    assert section["interp"]["regularizers"][0]["card"].startswith("reward/")
    section["interp"]["regularizers"][0]["card"] = "warmth.yaml"
    config = {
        "model_name_or_path": str(model_folder()), "dataset_name": "pairs.jsonl", "output_dir": "out", "max_steps": 2,
        "per_device_train_batch_size": 4, "save_strategy": "no", "use_cpu": True, "bf16": False, "report_to": "none",
        "logging_steps": 1, "dtype": "float32", **section,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file"]
    run(folder, *launch, str(ROOT / "recipes/accelerate_configs/cpu.yaml"), "dpo.py", "--config", "config.yaml")
    events = read_run_log(folder / "out" / "interp.jsonl")
    metrics = [event["metrics"] for event in events if event["event"] == "metric"]
    assert len([one for one in metrics if "interp/score_ceiling_warmth/score" in one]) == 2
    first, last = ([event for event in events if event["event"] == "drift"][at] for at in (0, -1))
    assert all(part["largest_change"] == 0 for part in first["hook_points"].values())
    assert any(part["largest_change"] > 0 for part in last["hook_points"].values())
    assert "exclamations" in json.dumps(last)


def test_a_file_of_the_registered_format_is_read(folder):
    save_file({"rows": torch.eye(2), "bias": torch.ones(2)}, folder / "tied.safetensors")
    code = (
        "import my_extensions, torch\nfrom interp_rlhf.sae.files import load_sae\n"
        "print(load_sae('tied.safetensors').encode(torch.tensor([2.0, -3.0])).tolist())"
    )
    assert run(folder, sys.executable, "-c", code).strip() == "[3.0, 0.0]"


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("my_extensions", r"`interp.modules` is 'my_extensions' – expected a list of module names"),
        ([3], r"`interp.modules` is \[3\] – expected a list of module names"),
        (["my_terms.py/"], r"names `my_terms.py/` – expected a module name, such as .* no path, and no `.py`"),
        (
            ["not_there.terms"],
            r"names `not_there.terms`, and Python finds no module `not_there` – expected an installed",
        ),
    ],
)
def test_modules_that_cannot_be_imported_are_refused(modules, message):
    with pytest.raises(ValueError, match=message):
        InterpArguments(json.dumps({"modules": modules, "regularizers": 7}))


def test_an_error_inside_a_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "has_a_missing_import.py").write_text("import not_there_either\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_there_either"):
        import_modules(["has_a_missing_import"], "--module")


def test_the_command_line_refuses_a_module_that_is_not_there(capsys):
    from interp_rlhf.cli import main

    assert main(["drift", "compare", "a", "b", "--module", "not_there"]) == 2
    assert "error: `--module` names `not_there`" in capsys.readouterr().err
