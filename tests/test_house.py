"""The rooms: which way imports go, what stays light, what travels in the wheel."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "interp_rlhf"
# In the order in which data flows: a room imports only rooms above it. The report stands apart: it reads the run log.
ROOMS = [
    "registry",
    "runlog",
    "messages",
    "activations",
    "concepts",
    "sae",
    "validation",
    "drift",
    "training",
    "attachment",
    "trainers",
    "report",
    "embedded",
    "demo",
    "recipe",
    "commands",
    "cli",
]
ALLOWED = {room: set(ROOMS[:i]) | {room} for i, room in enumerate(ROOMS)}
ALLOWED["concepts"] |= {"sae"}
ALLOWED["runlog"] |= {"concepts"}
ALLOWED["report"] = {"report", "runlog"}
ALLOWED["cli"] = {"cli", "commands", "__init__"}


def imports_of(path: Path) -> set[tuple[str, str]]:
    """(room or outside package, line) of every import of a module, also inside functions."""
    package = ["interp_rlhf", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, str(node.lineno)) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module or "").split(".")]
            names = [".".join(filter(None, [*module, alias.name])) for alias in node.names]
            found |= {(name, str(node.lineno)) for name in names}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room.startswith("__"):
        return
    for name, line in imports_of(path):
        parts = name.split(".")
        if parts[0] == "interp_rlhf":
            target = parts[1] if len(parts) > 1 and parts[1] in ROOMS else "__init__"
            assert target in ALLOWED[room] | {"__init__"}, f"{path.name}:{line}: {room} imports {target}"
        if parts[0] == "trl":
            assert room in {"training", "attachment", "trainers", "demo"}, f"{path.name}:{line} imports TRL"


def modules_after(code: str) -> set[str]:
    command = [sys.executable, "-c", f"import sys\n{code}\nprint(*sorted(m for m in sys.modules if '.' not in m))"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split())


def test_what_must_be_light_imports_neither_torch_nor_trl():
    heavy = {"torch", "trl", "transformers"}
    for code in (
        "import interp_rlhf",
        "import interp_rlhf.cli",
        "import interp_rlhf.report",
        "import interp_rlhf.concepts.card, interp_rlhf.validation.gate",
        "import interp_rlhf.runlog",
    ):
        assert not modules_after(code) & heavy, code


def test_help_takes_less_than_half_a_cpu_second():
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "interp_rlhf", "--help"], check=True, capture_output=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_the_public_names_resolve_and_are_listed():
    import interp_rlhf

    assert sorted(interp_rlhf._HOMES) == sorted(interp_rlhf.__all__)
    for name in interp_rlhf.__all__:
        assert callable(getattr(interp_rlhf, name)), name
    import interp_rlhf.attachment

    assert interp_rlhf.attach is interp_rlhf.attachment.attach
    with pytest.raises(AttributeError, match="has no attribute `attatch`"):
        interp_rlhf.attatch  # noqa: B018


def test_versions_agree_between_project_constraints_and_package():
    import tomllib
    from importlib.metadata import version

    import interp_rlhf

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == interp_rlhf.__version__
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets"):
        assert version(name).split("+")[0] == pinned[name]
    assert "trl>=1.16,<1.17" in project["dependencies"]


def test_every_shipped_card_loads_and_passes_the_gate_of_its_role():
    from interp_rlhf.concepts.card import load_card
    from interp_rlhf.concepts.readout import Readout
    from interp_rlhf.validation.gate import gate

    cards = sorted((ROOT / "reward").rglob("*.v*.yaml"))
    assert cards
    for path in cards:
        card = load_card(path).card
        Readout.from_card(str(path))
        for holdout in card.holdouts:
            assert (path.parent / holdout).exists()
        if card.role != "monitor":
            assert gate(card) == []


def gain(found, key="probe_score"):
    return "{mean:+.2f} [{low:+.2f}, {high:+.2f}]".format(**found[f"{key}_gain"])


def test_the_demo_figures_of_the_readme_are_the_committed_ones():
    readme = (ROOT / "README.md").read_text()
    files = sorted((ROOT / "reward" / "warmth" / "evidence").glob("demo-seed*.json"))
    assert len(files) == 3
    for path in files:
        found = json.loads(path.read_text())
        assert found["command"].startswith("interp-rlhf demo --seed")
        assert not found["quick"]
        probe, arms, last = found["probe"], found["arms"], found["arms"]["probe"]["last_step"]
        row = [
            found["settings"]["seed"],
            "{auroc:.2f} [{low:.2f}, {high:.2f}]".format(**probe["probe"]),
            "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**probe["adds"]["auroc"]),
            f"{probe['permutation']['p95']:.2f} / {probe['random_direction']['p95']:.2f}",
            f"{probe['tfidf']['auroc']:.2f} / {probe['embedding']['auroc']:.2f} / {probe['likelihood']['mean']['auroc']:.2f} / "
            f"{probe['measures']['vader']['auroc']:.2f}",
            gain(arms["probe"]),
            gain(arms["sham"]),
            gain(found["probe_minus_sham"]),
            gain(found["probe_minus_sham"], "vader"),
            f"{last['kl']:.2f} / {last['entropy']:.2f} / {last['clipped_ratio']:.2f}",
        ]
        assert "| " + " | ".join(map(str, row)) + " |" in readme, row
        assert gain(found["probe_minus_sham"], "monitor_score") in readme
        assert f"{probe['adds']['auroc_without']:.3f}" in readme
        assert f"{probe['calibration']['slope']:.2f}" in readme
    from interp_rlhf.concepts.card import load_card

    shipped = load_card(ROOT / "reward" / "warmth" / "reward.v3.yaml").card.evidence.held_out.adds
    assert (
        "(AUROC {value:+.3f} [{low:+.3f}, {high:+.3f}] to ".format(**shipped.auroc.model_dump())
        + f"{shipped.auroc_without:.3f} in the shipped card)"
        in readme
    )


def test_the_evidence_figures_of_the_readme_are_the_committed_ones():
    readme = (ROOT / "README.md").read_text()
    found = json.loads((ROOT / "recipes" / "keep_a_concept" / "evidence.json").read_text())
    assert sorted((run["arm"], run["seed"]) for run in found["runs"]) == [
        (arm, seed) for arm in ("anchor", "plain", "random") for seed in range(3)
    ]
    for arm, made in found["summary"]["arms"].items():
        warmth, compared = made["drift"][found["anchored"]], found["summary"]["compared_with_plain"].get(arm)
        cells = [
            "{mean:+.2f} ± {std_over_seeds:.2f}".format(**warmth["mean_shift"]),
            "{mean:.2f} ± {std_over_seeds:.2f}".format(**warmth["root_mean_square"]),
            "–", " / ".join(f"{made['drift'][name]['mean_shift']['mean']:+.2f}" for name in ("sentiment", "city_truth")),
            f"{made['accuracy']:.3f}", "–", f"{made['perplexity']:.1f}",
        ]  # fmt: skip
        if compared is not None:
            cells[2] = f"{compared['share_of_plain_shift']:.2f} / {compared['share_of_plain_root_mean_square']:.2f}"
            low, high = compared["accuracy_difference_95"]
            cells[5] = f"{compared['accuracy_difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
        assert " | ".join(cells) + " |" in readme, cells
    anchor = found["summary"]["compared_with_plain"]["anchor"]
    assert anchor["share_of_plain_shift"] <= 0.5
    assert anchor["accuracy_difference_95"][0] > -0.05
    [again], [first, *_] = found["read_again_with_0.2"]["runs"], found["runs"]
    assert (again["arm"], again["seed"]) == (first["arm"], first["seed"]) == ("plain", 0)
    assert (again["accuracy"], again["perplexity"]) == (first["accuracy"], first["perplexity"])
    shifts = [
        "{warmth:.2f}{0} {sentiment:.2f}{1} and {city_truth:.2f}{2}".format(
            *names, **{name: run["drift"][name]["mean_shift"] for name in run["drift"]}
        )
        for run, names in ((again, (" (warmth),", " (sentiment)", " (city truth)")), (first, (",", "", "")))
    ]
    assert f"accuracy {again['accuracy']:.3f} and perplexity {again['perplexity']:.1f} are the same" in readme
    assert f"the mean shifts are {shifts[0]}, where 0.1 read {shifts[1]}." in readme
    turned = json.loads((ROOT / "recipes" / "watch_the_inside" / "rotation.json").read_text())
    point, monitor = (turned["rotated"][key] for key in ("hook_points", "monitors"))
    for figure in (
        f"CKA {point['model.layers.15']['cka']:.4f}", f"cosine {point['model.layers.15']['cosine']:.2f}",
        f"to {monitor['sentiment']['frozen_auroc']:.2f}; fitted anew it reads {monitor['sentiment']['refitted_auroc']:.2f}",
        f"{turned['stored_activations']['inside']} of {turned['stored_activations']['rotations']} inside",
        f"is *{turned['rotated']['verdict']}*", f"copy it is *{turned['copy']['verdict']}*",
    ):  # fmt: skip
        assert figure in readme, figure
    assert turned["greedy_text_identical"]


def test_the_readmes_verdicts_are_those_of_the_gaming_runs():
    readme = (ROOT / "README.md").read_text()
    runs = json.loads((ROOT / "recipes" / "watch_the_inside" / "gaming.json").read_text())["runs"]
    alarms = {"activations obfuscated", "collapsed", "text gamed"}
    expected = {"penalty": "activations obfuscated", "words": "text gamed"}
    arms = ("plain", "penalty", "random", "explain", "words", "sentiment")
    assert sorted({run["arm"] for run in runs}) == sorted(arms)
    for arm in arms:
        own = sorted((run for run in runs if run["arm"] == arm), key=lambda run: run["seed"])
        assert [run["seed"] for run in own] == [1, 2, 3]
        assert f"| {' | '.join(story(run['verdicts']) for run in own)} |" in readme, arm
        for run in own:
            found = [verdict["verdict"] for verdict in run["verdicts"]]
            if arm in expected:  # and not only at the end
                assert expected[arm] in found[:-1]
                assert alarms & set(found) == {expected[arm]}
            else:
                assert not alarms & {*found, *run["as_if_pushed"]["up"], *run["as_if_pushed"]["down"]}


def test_the_figures_of_autoencoder_and_ppo_are_the_committed_ones():
    readme, ppo = (ROOT / "README.md").read_text(), (ROOT / "docs" / "ppo.md").read_text()
    folder = ROOT / "recipes" / "train_an_autoencoder"
    trained, found = (json.loads((folder / f"{name}.json").read_text()) for name in ("training", "find"))
    other = trained["eval"]
    best = max(found["random"])
    for figure in (
        f"On {other['tokens']:,} tokens of the other corpus it explains {other['explained_variance']:.2f} of the variance",
        f"PCA with 32 components of the training text {other['pca']:.2f}, of that very text {other['pca_here']:.2f}",
        "held-out AUROC of {:.2f} [{:.2f}, {:.2f}]".format(*found["latents"][0]["held_out"]),
        "TF-IDF {:.2f} [{:.2f}, {:.2f}]".format(*found["tfidf"]), f"to {best[0]:.2f}",
        "a dense probe at the same place {:.2f} [{:.2f}, {:.2f}]".format(*found["probe"]),
    ):  # fmt: skip
        assert figure in readme, figure
    assert other["explained_variance"] >= 0.6
    assert other["dead_fraction"] <= 0.1
    card = yaml.safe_load((folder / "card.yaml").read_text())["evidence"]["held_out"]
    scores = [("AUROC of", card["probe"]), ("TF-IDF", card["tfidf"]), ("VADER", card["measures"]["vader"])]
    for name, score in scores:
        assert "{} {auroc:.2f} [{low:.2f}, {high:.2f}]".format(name, **score) in readme, name
    assert f"{card['random_dictionary']['mean']:.2f} on average" in readme
    measured = json.loads((ROOT / "benchmarks" / "ppo.json").read_text())

    def ratio(run, name):
        low, high = measured[run]["settings"]["intervals"][name]
        return f"{measured[run]['ratios'][name]:.2f} [{low:.2f}, {high:.2f}]"

    for name in (
        "score_vs_trl_1_12",
        "score_vs_trl_1_12_model",
        "samples_per_second_vs_trl_1_12",
        "step_vs_grpo_model",
    ):
        assert ratio("comparison", name) in ppo, name
    for name in ("separate_value_model", "four_mini_batches", "vf_coef_1", "no_critic", "detached_trunk"):
        assert f"| {ratio('comparison', f'factor_{name}')} |" in ppo, name
    for name in ("samples_per_second_vs_trl_1_12", "peak_memory_vs_trl_1_12"):
        for critic in ("", "_model"):
            assert f"| {ratio('real_model', name + critic)}" in ppo, name
    for name in ("dense_samples", "dense_samples_model"):
        assert ratio("dense", name) in ppo, name
        assert measured["dense"]["ratios"][name] <= 0.6


def test_the_figures_of_the_probes_benchmark_are_the_committed_ones():
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    parts = json.loads((ROOT / "benchmarks" / "probes.json").read_text())

    def shown(part, name, form):
        low, high = parts[part]["settings"]["intervals"][name]
        value = format(parts[part]["ratios"][name], form)
        return f"{value}** [{low:{form}}, {high:{form}}]".replace("-", "−")

    for part, name, form in (
        ("sets", "auroc_minus_sklearn_cv", "+.4f"), ("planted", "filler_change_128", ".3f"),
        ("planted", "planted_auroc_attention_576", ".3f"), ("sweep", "sweep_vs_0_2", ".2f"),
        ("evidence", "evidence_vs_0_2", ".2f"),
    ):  # fmt: skip
        assert f"**{shown(part, name, form)}" in readme, name
    ratios = {name: value for part in parts.values() for name, value in part["ratios"].items()}
    assert ratios["auroc_minus_sklearn_cv"] >= 0
    assert ratios["auroc_minus_probelab"] >= 0
    assert ratios["sweep_vs_0_2"] <= 2
    assert ratios["evidence_vs_0_2"] <= 1.5
    for width in (128, 576):
        assert ratios[f"planted_auroc_attention_{width}"] >= 0.95
        assert ratios[f"planted_auroc_mean_{width}"] <= 0.7
        assert max(ratios[f"filler_change_{width}"], ratios[f"repeated_filler_change_{width}"]) <= 0.05


def story(verdicts):
    """Each verdict where it first holds: `steady, changed from 6`."""
    parts = []
    for before, now in zip([None, *verdicts], verdicts, strict=False):
        if before is None or now["verdict"] != before["verdict"]:
            parts.append(now["verdict"] + (f" from {now['step']}" if now["step"] else ""))
    return ", ".join(parts)


def test_no_registry_host_is_named_and_nothing_is_left_to_do():
    hosts = re.compile(r"pypi\.org|pythonhosted|registry\.npmjs|deb\.debian")
    unfinished = re.compile(r"\b(TODO|FIXME|XXX)\b|NotImplementedError|pickle\.load\b|trust_remote_code=True")
    for path in [
        *PACKAGE.rglob("*.py"),
        *(ROOT / "recipes").rglob("*"),
        ROOT / "Makefile",
        ROOT / ".ci" / "run",
        ROOT / "README.md",
    ]:
        if path.is_file() and path.suffix != ".pyc":
            assert not hosts.search(path.read_text()), path
            assert not unfinished.search(path.read_text()), path
