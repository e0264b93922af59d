"""The documents: their figures are the committed ones, their links and paths exist, and what they show is run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from statistics import mean

import pytest
import yaml
from markdown_it import MarkdownIt
from test_house import ROOMS
from tiny import make_card

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / folder / "README.md" for folder in ("benchmarks", "recipes", "reward")),
    ]
)
PLACES = ("benchmarks", "docs", "interp_rlhf", "recipes", "reward", "tests", "tools")
PLACES += tuple(path.name for path in (ROOT / "interp_rlhf").iterdir() if path.is_dir() and path.name in ROOMS)
by_name = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def document(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text()


def tokens_of(path: Path):
    """Every token of a document, also inside paragraphs and tables."""
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text()):
        yield token
        yield from token.children or []


def anchors_of(path: Path) -> set[str]:
    """The headings of a document as GitHub writes them behind a `#`."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
    titles = [re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower()) for line in lines]
    return {title.replace(" ", "-") for title in titles}


@by_name
def test_every_relative_link_leads_somewhere(path):
    for token in tokens_of(path):
        target = token.attrGet("href") or token.attrGet("src") if token.type in ("link_open", "image") else None
        if target is None or re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), f"{path.name}: {target}"
        if anchor:
            assert anchor in anchors_of(linked), f"{path.name}: {target}"


@by_name
def test_every_path_that_a_document_names_exists(path):
    """Paths in code: from the root of the repository, or from that of the package. `<name>` and `*` stand for anything."""
    if path.name == "CHANGELOG.md":  # it names files of earlier versions
        return
    for token in tokens_of(path):
        if token.type not in ("code_inline", "fence"):
            continue
        for word in re.findall(rf"(?<![\w./~<-])(?:{'|'.join(PLACES)})/[\w./*<>-]*[\w*/]", token.content):
            place = re.sub(r"<\w+>", "*", word)
            if "<" in word:  # a file that a reader adds: its folder is there
                place = place.rpartition("/")[0]
            assert list(ROOT.glob(place)) or list((ROOT / "interp_rlhf").glob(place)), f"{path.name}: {word}"


def test_the_readme_has_at_most_1500_words():
    assert len((ROOT / "README.md").read_text().split()) <= 1500


def test_every_page_is_in_the_index():
    index = document("README")
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "README.md" or f"({path.name})" in index, path.name


def test_every_public_name_is_on_its_page():
    import interp_rlhf

    listed = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", document("python"), re.M)))
    assert sorted(listed) == sorted(name for name in interp_rlhf.__all__ if not name.startswith("register_"))


def test_the_alarms_of_the_page_are_those_of_the_code():
    from interp_rlhf.drift.verdicts import ALARMS

    [said] = re.findall(r"^Three verdicts are alarms: (.*?)\.", document("drift"), re.M)
    assert sorted(re.findall(r"\*([\w ]+)\*", said)) == sorted(ALARMS)


def test_the_rooms_of_the_design_are_those_of_the_code():
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", document("design"), re.M)
    listed = [room for row in rows for room in re.findall(r"`(\w+)`", row)]
    assert [room for room in listed if room in ROOMS] == ROOMS


def test_every_document_that_shows_something_to_run_is_run():
    """CI hands the documents to `wheel_smoke.py`. The examples of `docs/extending.md` have their own test."""
    [line] = re.findall(r"^.*python wheel_smoke\.py (.*?)\)?$", (ROOT / ".ci" / "run").read_text(), re.M)
    given = shlex.split(line)
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        shown = re.search(r"^```python$|^```bash\n(?:.*\n)*?interp-rlhf ", path.read_text(), re.M)
        if shown and path.name != "extending.md":
            assert str(path.relative_to(ROOT)) in given, path.name


def python_blocks():
    for path in (ROOT / "README.md", ROOT / "docs" / "ppo.md"):
        for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)):
            yield pytest.param(block, id=f"{path.name}-{i}")


@pytest.mark.parametrize("block", python_blocks())
def test_what_the_documents_show_runs_on_a_tiny_model(block, model_folder, load, tokenizer, monkeypatch, tmp_path):
    """As it stands, but for the embedded model and the shipped cards, which CI takes (`wheel_smoke.py`)."""
    import interp_rlhf.embedded

    cards = tmp_path / "reward" / "warmth"
    cards.mkdir(parents=True)
    make_card(cards, load(), tokenizer).rename(cards / "reward.v3.yaml")
    make_card(cards, load(), tokenizer, role="monitor", name="witness", layer=0).rename(cards / "monitor.v3.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(interp_rlhf.embedded, "default_model", model_folder)
    exec(compile(block, "a document", "exec"), {"__name__": "__main__"})


def test_forms_hooks_and_citation_say_what_they_must():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        assert path.name == "config.yml" or {"name", "description", "body"} <= set(form), path.name
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]  # nothing is downloaded
    assert {hook["language"] for repo in hooks for hook in repo["hooks"]} == {"system"}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(citation)


@by_name
def test_documents_use_todays_words(path):
    """The style's list; its own page quotes what to avoid."""
    if path.name == "style.md":
        return
    said = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    old = r"\b(anew|beside|whatever|of (?:its|their|your) own|in the place of|to be had)\b"
    assert not re.findall(old, said), path.name


@by_name
def test_tables_have_both_of_their_marks(path):
    text = path.read_text()
    opened = re.findall(r"^<!-- table: (\w+) -->$", text, re.M)
    assert opened == re.findall(r"^<!-- end: (\w+) -->$", text, re.M)


def gain(found, key="probe_score"):
    return "{mean:+.2f} [{low:+.2f}, {high:+.2f}]".format(**found[f"{key}_gain"])


def test_the_demo_figures_of_the_readme_are_the_committed_ones():
    evidence = document("evidence")
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
        assert "| " + " | ".join(map(str, row)) + " |" in evidence, row
        assert gain(found["probe_minus_sham"], "monitor_score") in evidence
        assert f"{probe['adds']['auroc_without']:.3f}" in evidence
        assert f"{probe['calibration']['slope']:.2f}" in evidence
    from interp_rlhf.concepts.card import load_card

    shipped = load_card(ROOT / "reward" / "warmth" / "reward.v3.yaml").card.evidence.held_out.adds
    said = (
        "(AUROC {value:+.3f} [{low:+.3f}, {high:+.3f}] to ".format(**shipped.auroc.model_dump())
        + f"{shipped.auroc_without:.3f} in the shipped card)"
    )
    for page in (evidence, document("limits")):
        assert said in page
    summaries = [json.loads(path.read_text()) for path in files]
    gains = ["{mean:+.2f}".format(**summary["probe_minus_sham"]["probe_score_gain"]) for summary in summaries]
    assert "{}, {} and {} more".format(*gains) in (ROOT / "README.md").read_text()


def test_the_evidence_figures_of_the_readme_are_the_committed_ones():
    evidence = document("evidence")
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
        assert " | ".join(cells) + " |" in evidence, cells
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
    assert f"accuracy {again['accuracy']:.3f} and perplexity {again['perplexity']:.1f} are the same" in evidence
    assert f"the mean shifts are {shifts[0]}, where 0.1 read {shifts[1]}." in evidence
    turned = json.loads((ROOT / "recipes" / "watch_the_inside" / "rotation.json").read_text())
    point, monitor = (turned["rotated"][key] for key in ("hook_points", "monitors"))
    for figure in (
        f"CKA {point['model.layers.15']['cka']:.4f}", f"cosine {point['model.layers.15']['cosine']:.2f}",
        f"to {monitor['sentiment']['frozen_auroc']:.2f}; refitted, it reads {monitor['sentiment']['refitted_auroc']:.2f}",
        f"{turned['stored_activations']['inside']} of {turned['stored_activations']['rotations']} lie inside",
        f"is *{turned['rotated']['verdict']}*", f"copy it is *{turned['copy']['verdict']}*",
    ):  # fmt: skip
        assert figure in evidence, figure
    assert turned["greedy_text_identical"]


def test_the_readmes_verdicts_are_those_of_the_gaming_runs():
    evidence = document("evidence")
    runs = json.loads((ROOT / "recipes" / "watch_the_inside" / "gaming.json").read_text())["runs"]
    alarms = {"activations obfuscated", "collapsed", "text gamed"}
    expected = {"penalty": "activations obfuscated", "words": "text gamed"}
    arms = ("plain", "penalty", "random", "explain", "words", "sentiment")
    assert sorted({run["arm"] for run in runs}) == sorted(arms)
    for arm in arms:
        own = sorted((run for run in runs if run["arm"] == arm), key=lambda run: run["seed"])
        assert [run["seed"] for run in own] == [1, 2, 3]
        assert f"| {' | '.join(story(run['verdicts']) for run in own)} |" in evidence, arm
        for run in own:
            found = [verdict["verdict"] for verdict in run["verdicts"]]
            if arm in expected:  # and not only at the end
                assert expected[arm] in found[:-1]
                assert alarms & set(found) == {expected[arm]}
            else:
                assert not alarms & {*found, *run["as_if_pushed"]["up"], *run["as_if_pushed"]["down"]}


def test_the_figures_of_autoencoder_and_ppo_are_the_committed_ones():
    evidence, ppo = document("evidence"), document("ppo")
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
        assert figure in evidence, figure
    assert other["explained_variance"] >= 0.6
    assert other["dead_fraction"] <= 0.1
    card = yaml.safe_load((folder / "card.yaml").read_text())["evidence"]["held_out"]
    scores = [("AUROC of", card["probe"]), ("TF-IDF", card["tfidf"]), ("VADER", card["measures"]["vader"])]
    for name, score in scores:
        assert "{} {auroc:.2f} [{low:.2f}, {high:.2f}]".format(name, **score) in evidence, name
    assert f"{card['random_dictionary']['mean']:.2f} on average" in evidence
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


def test_the_curves_of_ppo_are_the_committed_ones():
    ppo = document("ppo")
    measured = json.loads((ROOT / "recipes" / "pay_for_a_concept" / "curves.json").read_text())
    assert measured["command"] in ppo
    curves = {(run["arm"], run["seed"]): run["curve"] for run in measured["runs"]}
    for arm in ("PPO, dense", "PPO, terminal", "GRPO"):
        cells = [
            "; ".join(
                f"{mean(curves[arm, seed][name][:3]):+.2f} → {mean(curves[arm, seed][name][-3:]):+.2f}"
                for seed in (0, 1)
            )
            for name in ("warmth", "holdout", "vader")
        ]
        cells.append("; ".join(f"{mean(curves[arm, seed]['kl'][-3:]):.2f}" for seed in (0, 1)))
        assert f"| {' | '.join([arm, *cells])} |" in ppo, arm


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
