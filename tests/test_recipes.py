"""Recipes: every file parses and names what exists, and every script trains through a real `accelerate launch`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from engines import compare
from markdown_it import MarkdownIt
from test_sae import latent_card, planted_sae
from tiny import make_card
from training import rows_of

from interp_rlhf.cli import main
from interp_rlhf.concepts.card import load_card, locate
from interp_rlhf.concepts.examples import write_jsonl
from interp_rlhf.recipe import InterpArguments
from interp_rlhf.runlog.log import read_run_log
from interp_rlhf.sae.files import save_sae
from interp_rlhf.training.make import make_intervention, make_regularizer

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
CONFIGS = sorted(RECIPES.glob("*/*/config_*.yaml"))
SCRIPTS = sorted(RECIPES.glob("*.py"))


def script_of(name: str):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed(name: str, *arguments: str):
    from trl import TrlParser

    return TrlParser(script_of(name).ARGUMENTS).parse_args_and_config(list(arguments))


def paths_in(value):
    """Files that a configuration names."""
    if isinstance(value, dict):
        return [path for item in value.values() for path in paths_in(item)]
    if isinstance(value, list):
        return [path for item in value for path in paths_in(item)]
    return [value] if isinstance(value, str) and value.startswith(("recipes/", "reward/")) else []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(RECIPES)))
def test_every_configuration_parses_and_names_what_exists(path, monkeypatch, tmp_path, load, tokenizer):
    monkeypatch.chdir(tmp_path)
    if "runs/sae" in path.read_text():  # what the commands in recipes/README.md leave behind
        make_sae(tmp_path / "runs" / "sae", load(), tokenizer)
    _, args, _, ours = parsed(path.parent.name, "--config", str(path))
    assert args.output_dir == "runs/" + "/".join(
        [*path.relative_to(RECIPES).parts[:2], path.stem.removeprefix("config_")]
    )
    named = paths_in(yaml.safe_load(path.read_text()))
    assert len(named) >= 1
    for name in named:
        assert locate(name).is_file()
        if name.startswith("reward/"):
            load_card(name)
    keywords = ours.attach_keywords()
    assert keywords["arm"] == path.stem.removeprefix("config_")
    if path.parent.name in ("grpo", "ppo"):
        assert ours.rewards()
    for key, make in {"regularizers": make_regularizer, "interventions": make_intervention}.items():
        for given in keywords.get(key, []):
            make(given)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("accelerate_configs/*.yaml")), ids=lambda path: path.stem)
def test_every_accelerate_configuration_is_one(path):
    from accelerate.commands.config.config_args import ClusterConfig

    found = ClusterConfig.from_yaml_file(str(path))
    assert found.num_processes >= 1
    if found.distributed_type == "DEEPSPEED":
        assert found.deepspeed_config["zero_stage"] == int(path.stem[-1])


@pytest.mark.parametrize("name", ["README.md", "recipes/README.md", "reward/README.md", "benchmarks/README.md"])
def test_every_path_in_a_readme_exists(name):
    text = (ROOT / name).read_text()
    blocks = [token.content for token in MarkdownIt().parse(text) if token.type == "fence"]
    words = [word for block in blocks for word in re.findall(r"[\w./-]+", block)]
    paths = [word for word in words if re.match(r"(recipes|reward|benchmarks|tests)/.", word)]
    assert len(paths) >= {"recipes/README.md": 3, "reward/README.md": 0}.get(name, 2)
    for path in paths:
        assert (ROOT / path).exists(), path


def test_every_recipe_is_in_the_table():
    text = (RECIPES / "README.md").read_text()
    for config in CONFIGS:
        assert str(config.relative_to(ROOT)) in text, config
    for script in SCRIPTS:
        assert f"recipes/{script.name}" in text, script


def make_sae(folder, model, tokenizer):
    """A tiny autoencoder and a card of one of its latents, where the recipes look for them."""
    sae = planted_sae(model, tokenizer)
    save_sae(sae, folder / "sae")
    return latent_card(folder / "cards", model, tokenizer, sae)


@pytest.fixture
def smoke(tmp_path, model_folder, load, tokenizer):
    """Tiny model, data and card, and what every launch overrides."""
    write = {"dpo": "DPO", "kto": "KTO", "sft": "SFT", "grpo": "GRPO", "ppo": "GRPO"}
    for name, kind in write.items():
        write_jsonl(rows_of(kind, 8), tmp_path / f"{name}.jsonl")
    card = make_card(tmp_path, load(), tokenizer)
    return card, [
        "--model_name_or_path", str(model_folder()), "--max_steps", "2", "--per_device_train_batch_size", "4",
        "--save_strategy", "no",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config", "section", "metric"),
    [
        ("dpo", "keep_a_concept/dpo/config_anchor.yaml", "anchor", "interp/anchor_warmth/squared_gap"),
        ("kto", "keep_a_concept/kto/config_anchor.yaml", "anchor", "interp/anchor_warmth/squared_gap"),
        ("sft", "learn_without_a_concept/sft/config_ablation.yaml", "ablation", "interp/warmth/mean_score"),
        ("grpo", "pay_for_a_concept/grpo/config_warmth.yaml", "reward", "rewards/warmth/mean"),
        ("dpo", "hold_latents/dpo/config_features.yaml", "features", "interp/features_sae/delta"),
        ("grpo", "pay_for_a_latent/grpo/config_latents.yaml", "latents", "rewards/warm_latent/mean"),
        ("ppo", "pay_for_a_concept/ppo/config_dense.yaml", "dense", "returns/share/warmth"),
    ],
)
def test_every_script_trains_through_accelerate_launch(
    name, config, section, metric, smoke, tmp_path, load, tokenizer
):
    card, overrides = smoke
    if section in ("features", "latents"):
        card = make_sae(tmp_path / "runs" / "sae", load(), tokenizer)
    sections = {
        "anchor": {"regularizers": [{"kind": "concept_anchor", "card": str(card), "weight": 0.1}]},
        "ablation": {"interventions": [{"kind": "concept_ablation", "cards": [str(card)]}], "monitors": [str(card)]},
        "reward": {"rewards": [str(card)], "drift": {"every": 1}},
        "features": {
            "regularizers": [{"kind": "feature_constraint", "sae": "runs/sae/sae", "k": 8}],
            "drift": {"every": 1, "sae": "runs/sae/sae"},
        },
        "latents": {"rewards": ["runs/sae/cards/reward.v1.yaml"], "drift": {"every": 1, "sae": "runs/sae/sae"}},
        "dense": {"rewards": [{"path": str(card), "dense": "share"}], "drift": {"every": 1}},
    }
    own = {"grpo": ["--num_generations", "2"], "ppo": ["--num_ppo_epochs", "1"]}
    if name in own:
        overrides = [*overrides, *own[name], "--max_completion_length", "6"]
    command = [
        str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", str(RECIPES / "accelerate_configs/cpu.yaml"),
        str(RECIPES / f"{name}.py"), "--config", str(RECIPES / config), *overrides, "--output_dir", str(tmp_path / "out"),
        "--dataset_name", str(tmp_path / f"{name}.jsonl"), "--interp", json.dumps(sections[section]),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    events = read_run_log(tmp_path / "out" / "interp.jsonl")
    assert [event["trainer"] for event in events if event["event"] == "run"] == [f"Interp{name.upper()}Trainer"]
    assert len([event for event in events if metric in event.get("metrics", {})]) == 2
    assert list((tmp_path / "out").glob("adapter_model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recipe", "section", "engine"),
    [
        ("grpo", "pay_for_a_concept/grpo/config_warmth.yaml", {"rewards": ["CARD"], "drift": {"every": 1}}, "ddp"),
        (
            "dpo",
            "keep_a_concept/dpo/config_anchor.yaml",
            {"regularizers": [{"kind": "concept_anchor", "card": "CARD", "weight": 0.1}], "drift": {"every": 1}},
            "zero3",
        ),
    ],
)
def test_recipes_run_unchanged_on_two_processes(name, recipe, section, engine, smoke, tmp_path):
    if engine != "ddp":
        pytest.importorskip("deepspeed")
    card, overrides = smoke
    command = compare.command(
        engine, RECIPES / f"{name}.py", "--config", str(RECIPES / recipe), *overrides, "--output_dir", str(tmp_path / "out"),
        "--dataset_name", str(tmp_path / f"{name}.jsonl"), "--interp", json.dumps(section).replace("CARD", str(card)),
        "--save_strategy", "steps", "--save_steps", "2",
    )  # fmt: skip
    if name == "grpo":
        command += ["--num_generations", "2", "--max_completion_length", "6"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=compare.environment(), cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    saved = tmp_path / "out" / "checkpoint-2"  # what the second process left there says which engine it had
    assert len(list(saved.glob("rng_state_*.pth"))) == 2
    assert len(list(saved.glob("global_step2/zero_pp_rank_1_*_model_states.pt"))) == (engine == "zero3")
    events = read_run_log(tmp_path / "out" / "interp.jsonl")  # written by rank 0 alone
    assert [event["trainer"] for event in events if event["event"] == "run"] == [f"Interp{name.upper()}Trainer"]
    assert [event["step"] for event in events if event["event"] == "drift"] == [0, 1, 2]
    metric = {"grpo": "rewards/warmth/mean", "dpo": "interp/anchor_warmth/squared_gap"}[name]
    assert len([event for event in events if metric in event.get("metrics", {})]) == 2
    assert list((tmp_path / "out").glob("adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--interp", '{"monitorz": []}'], "Did you mean `monitors`"),
        (["--interp", '{"arm": false}'], "YAML takes no, off, yes and on"),
        (["--interp", '{"drift": {"evry": 1}}'], "Did you mean `every`"),
        (["--interp", "[]"], "expected a mapping"),
    ],
)
def test_a_section_that_is_said_wrongly_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        parsed("dpo", "--config", str(CONFIGS[0]), *arguments)


def test_measures_and_prompts_are_named_in_a_section(tmp_path):
    def keywords(**section):
        return InterpArguments(json.dumps(section)).attach_keywords()

    drift = {"prompts": "recipes/pay_for_a_concept/prompts.jsonl", "measures": ["vader"], "on_verdict": "stop"}
    found = keywords(measures=["vader"], drift=drift)
    assert found["measures"]["vader"]("What a wonderful day!") > 0.5
    assert found["drift"].prompts[0][0]["role"] == "user"
    assert found["drift"].on_verdict == "stop"
    with pytest.raises(ValueError, match=r"`measures` is \['length'\] – expected a list of `vader`"):
        keywords(measures=["length"])
    (tmp_path / "none.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match="1 of them without a `prompt`"):
        keywords(drift={"prompts": str(tmp_path / "none.jsonl")})


def test_unknown_keys_of_a_recipe_are_refused(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIGS[0].read_text() + "lerning_rate: 1.0\n")
    with pytest.raises(ValueError, match="lerning_rate"):
        parsed(CONFIGS[0].parent.name, "--config", str(config))
    with pytest.raises(ValueError, match="names no card"):
        parsed("grpo", "--config", str(RECIPES / "pay_for_a_concept/grpo/config_warmth.yaml"), "--interp", "{}")[
            3
        ].rewards()


def test_recipes_are_copied_and_changes_are_not_lost(tmp_path, capsys):
    assert main(["recipes", "copy", str(tmp_path), "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert {"dpo.py", "README.md", "accelerate_configs/cpu.yaml", "keep_a_concept/dpo/config_anchor.yaml"} <= set(
        files
    )
    changed = tmp_path / "recipes" / "dpo.py"
    changed.write_text("mine")
    assert main(["recipes", "copy", str(tmp_path)]) == 2
    assert "dpo.py" in capsys.readouterr().err
    assert changed.read_text() == "mine"
    assert main(["recipes", "copy", str(tmp_path), "--force"]) == 0
    assert "accelerate launch" in capsys.readouterr().out
    assert changed.read_text() == (RECIPES / "dpo.py").read_text()
