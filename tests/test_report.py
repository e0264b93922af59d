"""The report, from run logs that the real `RunLog` wrote to the files that a person opens."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from interp_rlhf.report import write_model_card, write_report
from interp_rlhf.report.groups import group_metrics
from interp_rlhf.report.load import load_runs
from interp_rlhf.report.plots import Line, arm_style, line_plot
from interp_rlhf.report.text import fence, markdown, visible
from interp_rlhf.runlog.log import RunLog

ROOT = Path(__file__).parents[1]


class Page(HTMLParser):
    """Text and elements of an HTML page, as a browser's parser sees them."""

    def __init__(self, path: Path):
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"style", "script"} & set(self._open):
            self.words.append(data)


def start(folder: Path, arm: str = "warmth", **fields) -> RunLog:
    log = RunLog(folder / "interp.jsonl")
    log.append(
        "run",
        title="Warmth",
        arm=arm,
        model="SmolLM2",
        trainer="GRPOTrainer",
        cards=[{"name": "warmth.v1", "role": "reward", "sha256": "sha256:0123456789abcdef"}],
        settings={"seed": 7, "beta": 0.02},
        **fields,
    )
    return log


def report(runs, folder: Path) -> tuple[Page, str]:
    write_report([runs] if isinstance(runs, Path) else runs, folder / "report.html")
    return Page(folder / "report.html"), (folder / "report.md").read_text(encoding="utf-8")


def test_header_says_what_ran_and_whether_it_ended(tmp_path):
    log = start(tmp_path / "run")
    log.append("metric", step=12, metrics={"loss": 1.0})
    page, text = report(tmp_path / "run", tmp_path)
    for words in ("SmolLM2", "GRPOTrainer", "seed 7", "12 steps done", "warmth.v1"):
        assert words in page.text
        assert words in text
    assert "0123456789ab" in page.text
    assert "0123456789abc" not in page.text  # the first twelve digits, not the hash
    assert "still running or ended without an end event" in page.text
    log.append("end", seconds=200)
    page, _ = report(tmp_path / "run", tmp_path)
    assert "finished after 3 min 20 s" in page.text
    assert "without an end event" not in page.text


def test_headline_table_shows_its_numbers_and_a_hole_as_a_dash(tmp_path):
    log = start(tmp_path)
    log.append(
        "table",
        title="Headline",
        columns=["measure", "before", "after"],
        rows=[["probe score", -0.71239, 4.5], ["VADER", 0.11, None], ["count", 12345, float("nan")]],
        note="32 held-out prompts.",
    )
    page, text = report(tmp_path, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert '<td>probe score</td><td class="number">-0.7124</td><td class="number">4.5</td>' in html
    assert '<td>VADER</td><td class="number">0.11</td><td class="number">–</td>' in html
    assert '<td>count</td><td class="number">12,345</td><td class="number">–</td>' in html
    assert "32 held-out prompts." in page.text
    assert "| measure | before | after |\n|---|---:|---:|\n| probe score | -0.7124 | 4.5 |" in text


def test_tables_of_one_title_are_one_table_with_a_row_per_arm(tmp_path):
    for arm, after in (("control", 0.12), ("probe", 0.61)):
        log = start(tmp_path / arm, arm=arm)
        log.append("table", title="VADER", columns=["measure", "after"], rows=[["VADER", after]], note="greedy")
    _, text = report(tmp_path, tmp_path)
    assert "| run | measure | after |\n|---|---|---:|\n| control | VADER | 0.12 |\n| probe | VADER | 0.61 |" in text
    assert text.count("greedy") == 1


def test_reward_stands_beside_the_independent_measure():
    names = ["kl", "rewards/warmth/mean", "num_tokens", "interp/measure/vader/mean", "reward", "interp/w/mean_score"]
    groups, rest = group_metrics(names)
    assert [group.names for group in groups] == [
        ("reward", "interp/measure/vader/mean", "rewards/warmth/mean"),
        ("interp/w/mean_score",),
        ("kl",),
    ]
    assert rest == ["num_tokens"]


def test_page_says_when_no_independent_measure_was_logged(tmp_path):
    log = start(tmp_path)
    log.append("metric", step=1, metrics={"reward": 1.0})
    assert "No independent measure" in report(tmp_path, tmp_path)[0].text
    log.append("metric", step=2, metrics={"interp/measure/vader/mean": 0.5})
    assert "No independent measure" not in report(tmp_path, tmp_path)[0].text


def test_arms_are_overlaid_with_first_and_last_value_of_each(tmp_path):
    for arm, steps in (("control", (1, 2)), ("probe", (2, 5, 9))):
        log = start(tmp_path / arm, arm=arm)
        for step in steps:
            log.append("metric", step=step, metrics={"reward": step / 10, "learning_rate": step * 1e-4})
    page, text = report(tmp_path, tmp_path)
    assert "Line plot of reward over steps 1 to 9. control: 0.1 → 0.2; probe: 0.2 → 0.9." in text
    assert ("aria-label", "Line plot of reward over steps 1 to 9. control: 0.1 → 0.2; probe: 0.2 → 0.9.") in (
        page.attributes
    )
    assert "| learning\\_rate | 0.0002 | 2 | 0.0009 | 9 |" in text  # last values, each with its step
    plot = (tmp_path / "report_plots" / "reward-01-reward.svg").read_text()
    assert plot.count(f"stroke: {arm_style(0).colour.lower()}; stroke-width: 1.7") >= 1
    assert plot.count(f"stroke: {arm_style(1).colour.lower()}; stroke-width: 1.7") >= 1


def test_runs_of_one_arm_are_told_apart_by_their_folder(tmp_path):
    for seed in ("seed0", "seed1"):
        start(tmp_path / seed, arm="probe")
    assert [run.label for run in load_runs([tmp_path])] == ["probe (seed0)", "probe (seed1)"]


def test_no_two_of_thirty_five_arms_look_alike():
    styles = {(style.colour, str(style.dashes)) for style in map(arm_style, range(35))}
    assert len(styles) == 35


def _markers(values: list[float | None]) -> int:
    svg = line_plot("x", [Line("arm", arm_style(0), range(len(values)), values)], (0, len(values)))
    return svg.count("fill: #0072b2; stroke: #0072b2")


def test_a_point_without_a_neighbour_is_marked():
    assert _markers([1.0]) == 1
    assert _markers([0.5] * 100) == 0  # a line of a hundred points needs none
    assert _markers([0.5] * 49 + [None, 0.7, None] + [0.5] * 48) == 1


def test_a_metric_that_was_never_finite_is_shown_as_such(tmp_path):
    log = start(tmp_path)
    for step in (1, 2):
        log.append("metric", step=step, metrics={"loss": float("nan"), "kl": 0.1 if step == 1 else float("inf")})
    page, _ = report(tmp_path, tmp_path)
    assert "no value (2 of 2 not finite)" in page.text
    assert "0.1 (1 of 2 not finite)" in page.text
    assert "no finite value was logged" in (tmp_path / "report_plots" / "optimizer-01-loss.svg").read_text()


def test_drift_shows_layers_monitors_and_what_it_cost(tmp_path):
    log = start(tmp_path)
    for step, cosine in ((10, 0.99), (20, 0.9)):
        points = {f"model.layers.{layer}": {"cosine": cosine, "cka": 1 - layer / 100} for layer in (9, 10)}
        monitors = {"honesty": {"auroc": cosine - 0.1}}
        log.append(
            "drift", step=step, texts=64, tokens=2048, hook_points=points, monitors=monitors, overhead_seconds=1.5
        )
    log.append("end", seconds=60)
    page, text = report(tmp_path, tmp_path)
    # 2 evaluations × 1.5 s = 3 s of 60 s = 5 %.
    assert "| warmth | 2 | 64 | 2,048 | 3 s | 5 % | 1 min 0 s |" in text.replace("\xa0", " ")
    assert "model.layers.9: 0.99 → 0.9" in page.text
    assert "Line plot of honesty: AUROC over steps 10 to 20. 0.89 → 0.8." in text
    # From the ninth layer to the tenth, not in the order of the alphabet.
    assert (
        "Heat map of CKA: 2 hook points from model.layers.9 to model.layers.10, 2 evaluations from step 10 to 20, "
        "values from 0.9 to 0.91."
    ) in [value for name, value in page.attributes if name == "aria-label"]


def test_one_evaluation_has_no_heat_map(tmp_path):
    log = start(tmp_path)
    log.append("drift", step=1, texts=1, tokens=9, hook_points={"a": {"cka": 1.0}, "b": {"cka": 0.5}}, monitors={})
    _, text = report(tmp_path, tmp_path)
    assert "Line plot of CKA" in text
    assert "Heat map" not in text


def test_samples_of_one_prompt_stand_side_by_side_with_their_scores(tmp_path):
    log = start(tmp_path)
    log.append("samples", step=0, when="before", rows=[{"prompt": "Hi", "completion": "cold", "scores": {"w": -0.7}}])
    log.append("samples", step=5, when="train", rows=[{"prompt": "Hi", "completion": "unseen", "scores": {}}])
    log.append("samples", step=9, when="after", rows=[{"prompt": "Hi", "completion": "warm", "scores": {"w": None}}])
    page, text = report(tmp_path, tmp_path)
    assert "Hi before training, step 0 cold w -0.7 after training, step 9 warm w –" in page.text
    assert "unseen" not in page.text + text
    assert page.text.count("Prompt Hi") == 1


def test_an_empty_completion_is_said_to_be_empty(tmp_path):
    log = start(tmp_path)
    log.append("samples", step=1, when="after", rows=[{"prompt": "Hi", "completion": "", "scores": {"w": 0.0}}])
    page, text = report(tmp_path, tmp_path)
    assert "The completion is empty. w 0" in page.text
    assert "The completion is empty.\n\nScores: w 0\n" in text


def test_first_and_last_training_samples_stand_in_for_before_and_after(tmp_path):
    log = start(tmp_path)
    for step in (1, 5, 9):
        log.append("samples", step=step, when="train", rows=[{"prompt": "Hi", "completion": f"answer{step}"}])
    page, _ = report(tmp_path, tmp_path)
    assert "during training, step 1 answer1 during training, step 9 answer9" in page.text
    assert "answer5" not in page.text


HOSTILE = [
    "<script>alert(1)</script>",
    "</textarea></p><img src=x onerror=alert(1)>",
    "{{ 7907*7919 }} {% raw %}",
    "```\n<b>out</b>\n````\n# heading",
    "]]> --> <!-- & &lt; \" ' `",
    "| a | b |\\| $x$ [link](javascript:alert) ![i](http://x/y.png) https://evil.example",
    "zażółć 你好 👩‍🚀 עברית",
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_foreign_text_arrives_as_text_wherever_it_comes_from(tmp_path, hostile):
    name = " ".join(hostile.split())
    log = start(tmp_path, arm=hostile)
    log.append(
        "run", arm=hostile, model=hostile, title=hostile, settings={hostile: hostile}, cards=[{"name": hostile}]
    )
    log.append("metric", step=1, metrics={"reward": 1.0, f"interp/{hostile}/mean_score": 2.0, hostile: 3.0})
    log.append("drift", step=1, texts=1, tokens=1, hook_points={hostile: {hostile: 1.0}}, monitors={hostile: {"x": 1}})
    log.append("table", title=hostile, columns=[hostile], rows=[[hostile]], note=hostile)
    log.append("verdict", step=1, verdict=hostile, because=[hostile], next=hostile, reason=hostile)
    log.append(
        "drift", step=1, texts=1, tokens=1, moved={hostile: [{"prompt": hostile, "completion": hostile, "change": 1.0}]},
        batches={hostile: [{"step": 1, "samples": [{"prompt": hostile, "completion": hostile, "score": 1.0}]}]},
    )  # fmt: skip
    log.append(
        "samples",
        step=1,
        when="after",
        rows=[
            {
                "prompt": hostile,
                "completion": hostile,
                "scores": {hostile: 1},
                "tokens": {"pieces": [hostile, "x"], "scores": {hostile: [1.0, 2.0]}},
            }
        ],
    )
    page, text = report(tmp_path / "interp.jsonl", tmp_path)
    assert page.text.count(name) >= 12
    assert not {"img", "b", "textarea"} & set(page.tags)
    assert page.tags.count("script") == 1  # our own
    assert str(7907 * 7919) not in page.text  # a product that no clock shows
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    inline = [child for token in tokens for child in token.children or []]
    assert {child.content for child in inline if child.type == "html_inline"} <= {"<br>"}
    assert not [token for token in tokens if token.type == "html_block"]
    assert not [child for child in inline if child.type == "link_open"]
    assert all(child.attrs["src"].startswith("report_plots/") for child in inline if child.type == "image")
    assert [token.content for token in tokens if token.type == "fence"] == [hostile + "\n"] * 2
    for plot in (tmp_path / "report_plots").iterdir():
        ElementTree.parse(plot)  # well-formed: nothing in a name broke out of its element


def test_characters_that_cannot_be_seen_are_spelled_out(tmp_path):
    log = start(tmp_path)
    unseen = "a\x00b\u202ec\ud800d\x1b[31m\u200be\ufffff"
    log.append("samples", step=1, when="after", rows=[{"prompt": unseen, "completion": unseen, "scores": {}}])
    log.append("metric", step=1, metrics={unseen: 1.0, f"interp/{unseen}": 1.0})
    page, text = report(tmp_path, tmp_path)
    shown = "a<U+0000>b<U+202E>c<U+D800>d<U+001B>[31m<U+200B>e<U+FFFF>f"
    assert page.text.count(shown) == 3  # prompt, completion and the table of last values; a plot's title is shortened
    assert f"```text\n{shown}\n```" in text
    for plot in (tmp_path / "report_plots").iterdir():
        ElementTree.parse(plot)


def test_a_name_in_a_plot_is_not_read_as_mathematics(tmp_path):
    log = start(tmp_path, arm="_hidden $x^2$")
    start(tmp_path / "b", arm="other").append("metric", step=1, metrics={"interp/$\\frac{1}{2}$/_x": 1.0})
    log.append("metric", step=1, metrics={"interp/$\\frac{1}{2}$/_x": 1.0})
    report(tmp_path, tmp_path)
    (plot,) = (tmp_path / "report_plots").iterdir()
    words = [element.text for element in ElementTree.parse(plot).iter("{http://www.w3.org/2000/svg}text")]
    assert "interp/$\\frac{1}{2}$/_x" in words
    assert "_hidden $x^2$" in words


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("`~\n\t abc<>&|\\*_[]()#\x00\r\u2028é"), max_size=40))
def test_no_text_closes_its_markdown_fence(text):
    tokens = MarkdownIt("commonmark").parse(fence(visible(text)))
    assert [token.type for token in tokens] == ["fence"]
    assert tokens[0].content == visible(text) + "\n"


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("`~\n abc<>&;|\\*_[]()#!$:/@^{}+-=.\"'1é"), max_size=40))
def test_a_line_of_markdown_shows_exactly_its_text(text):
    (line,) = MarkdownIt("commonmark", {"html": True}).parseInline(markdown(text))
    assert {child.type for child in line.children or []} <= {"text"}
    assert "".join(child.content for child in line.children or []) == " ".join(text.split())


def test_page_loads_nothing_and_works_without_scripts(tmp_path):
    log = start(tmp_path)
    for step in (1, 2):
        log.append("metric", step=step, metrics={"reward": 1.0, "kl": 0.5})
    page, _ = report(tmp_path, tmp_path)
    references = [value for name, value in page.attributes if name in ("href", "src", "xlink:href", "data", "srcset")]
    assert references
    assert all(value.startswith("#") for value in references)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in references} <= set(ids)
    assert "url(http" not in (tmp_path / "report.html").read_text()
    assert not {"link", "iframe", "object"} & set(page.tags)
    # The one script is named in the page's policy by its hash: no other can run.
    script = re.search(r"<script>(.*?)</script>", (tmp_path / "report.html").read_text(), re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert any(f"script-src 'sha256-{digest}'" in value for name, value in page.attributes if name == "content")


def judged(log, step=20, verdict="text gamed"):
    log.append("metric", step=step, metrics={"reward": 1.0})
    log.append(
        "verdict", step=step, verdict=verdict, because=["the reward rose by +2.0", "`vader` did not"], next="Read the samples.",
        alarm=verdict == "text gamed",
    )  # fmt: skip


def test_the_verdict_stands_on_top_with_its_reasons_and_what_to_do(tmp_path):
    log = start(tmp_path)
    judged(log, 10, "steady")
    judged(log, 20)
    page, text = report(tmp_path, tmp_path)
    assert page.text.index("text gamed") < page.text.index("SmolLM2")
    for words in (
        "the reward rose by +2.0",
        "vader did not",
        "Read the samples.",
        "step 10: steady → step 20: text gamed",
    ):
        assert words in page.text
    assert text.index("Verdict: text gamed") < text.index("SmolLM2")
    found = json.loads((tmp_path / "report.json").read_text())["runs"][0]
    assert [v["verdict"] for v in found["verdicts"]] == ["steady", "text gamed"]
    assert found["metrics"]["reward"] == 1.0


def test_what_moved_a_monitor_is_named_the_latest_and_largest_first(tmp_path):
    log = start(tmp_path)
    for step in (10, 20):
        log.append(
            "drift", step=step, texts=1, tokens=1,
            moved={
                "warmth": [{"prompt": f"p{step}{i}", "completion": "c", "change": c} for i, c in enumerate((-3.0, 1.0))]
            },
        )  # fmt: skip
    page, _ = report(tmp_path, tmp_path)
    places = [page.text.index(prompt) for prompt in ("p200", "p201", "p100", "p101")]
    assert places == sorted(places)


def test_latents_that_changed_are_named_and_what_the_autoencoder_leaves(tmp_path):
    log, path = RunLog(tmp_path / "run" / "interp.jsonl"), tmp_path / "report.html"
    log.append("run", arm="one", title="t", model="m", trainer="T", cards=[], settings={})
    row = {"latent": 802, "before": 0.25, "after": 1.5, "on_before": 0.125, "on_after": 0.5}
    sparse = {
        "hook_point": "model.layers.15",
        "tokens": 321,
        "fvu_before": 0.25,
        "fvu": 0.375,
        "l0_before": 32.0,
        "l0": 31.5,
    }
    for step, own in ((1, {}), (2, {"fvu_before": 0.5, "fvu": 0.625})):
        log.append(
            "drift",
            step=step,
            texts=1,
            tokens=1,
            hook_points={},
            monitors={},
            sae={**sparse, "changed": [row]},
            own_text=own,
        )
    write_report(tmp_path / "run", path)
    for page in (path, path.with_suffix(".md")):
        text = page.read_text()
        assert "Latents that changed most" in text
        assert re.search(r"802\D+0\.25\D+1\.5\D+0\.125\D+0\.5", text)
        assert "step 2" in text
        for told in ("0.25 → 0.375", "32 → 31.5", "own text 0.5 → 0.625"):
            assert told in text, told


def test_tokens_are_coloured_by_their_scores(tmp_path):
    log = start(tmp_path)
    tokens = {"pieces": ["cold", " and", " warm"], "scores": {"warmth": [-2.0, 0.0, 2.0]}}
    log.append(
        "samples", step=1, when="after", rows=[{"prompt": "p", "completion": "cold and warm", "tokens": tokens}]
    )
    log.append(
        "samples",
        step=1,
        when="before",
        rows=[{"prompt": "p", "completion": "x", "tokens": {"pieces": ["x", "y"], "scores": {"warmth": [1.0]}}}],
    )  # torn: left out
    report(tmp_path, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert '<span class="t-2">cold</span><span> and</span><span class="t2"> warm</span>' in html


def test_the_model_card_gets_its_section_once_and_keeps_the_rest(tmp_path):
    log = start(tmp_path)
    judged(log)
    card = tmp_path / "README.md"
    card.write_text("# Model\n\nWritten by TRL.\n")
    write_model_card(tmp_path, card)
    first = card.read_text()
    judged(log, 30, "collapsed")
    write_model_card(tmp_path, card)
    second = card.read_text()
    assert first.startswith("# Model\n\nWritten by TRL.\n")
    assert "Verdict: text gamed" in first
    assert "Verdict: collapsed" in second
    assert "Verdict: text gamed" not in second
    assert second.count("interp_rlhf: begin") == 1
    card.write_text(second.replace("<!-- interp_rlhf: end -->", ""))
    with pytest.raises(ValueError, match="without"):
        write_model_card(tmp_path, card)


WRITE = "import sys; from interp_rlhf.report import write_report; write_report([sys.argv[1]], sys.argv[2])"


def run_python(code: str, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=120,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_log_gives_the_same_bytes_in_another_process(tmp_path):
    for arm in ("a", "b"):
        log = start(tmp_path / "runs" / arm, arm=arm)
        for step in (1, 2):
            log.append("metric", step=step, metrics={"reward": 1.0 * step, "x": 2.0, "interp/c/mean_score": 0.5})
            points = {"l.0": {"cka": 1.0}, "l.1": {"cka": 0.5 / step}}
            log.append("drift", step=step, texts=2, tokens=9, hook_points=points, monitors={"m": {"auroc": 0.5}})
    # Another hash seed and other settings of the user's matplotlib.
    rc = tmp_path / "matplotlibrc"
    rc.write_text("svg.fonttype: path\nfont.size: 20\naxes.facecolor: black\nxtick.major.size: 9\n")
    for index, environment in enumerate(({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2", "MATPLOTLIBRC": str(rc)})):
        done = run_python(WRITE, tmp_path / "runs", tmp_path / str(index) / "report.html", **environment)
        assert done.returncode == 0, done.stderr
    first, second = contents(tmp_path / "0"), contents(tmp_path / "1")
    assert len(first) > 5
    assert first == second


def test_report_is_cheap_to_import_and_never_loads_torch_or_trl(tmp_path):
    log = start(tmp_path)
    log.append("metric", step=1, metrics={"reward": 1.0})
    code = (
        "import sys, interp_rlhf.report\n"
        "def loaded(*names): return [name for name in names if name in sys.modules]\n"
        "assert not loaded('matplotlib', 'jinja2', 'numpy', 'torch', 'trl'), loaded('matplotlib', 'jinja2', 'numpy')\n"
        "interp_rlhf.report.write_report([sys.argv[1]], sys.argv[2])\n"
        "assert loaded('matplotlib', 'jinja2') == ['matplotlib', 'jinja2']\n"
        "assert not loaded('torch', 'trl', 'transformers', 'accelerate', 'matplotlib.pyplot')\n"
    )
    done = run_python(code, tmp_path, tmp_path / "report.html")
    assert done.returncode == 0, done.stderr


def test_full_disk_leaves_the_earlier_report_and_nothing_else(tmp_path):
    log = start(tmp_path / "runs")
    report(tmp_path / "runs", tmp_path / "out")
    earlier = contents(tmp_path / "out")
    for step in range(30):
        log.append("metric", step=step, metrics={"reward": 1.0, "kl": 0.5})
    # The operating system refuses to let any file grow past 24 kB: the plots fit, the page does not.
    code = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (24000, 24000))\n" + WRITE
    )
    done = run_python(code, tmp_path / "runs", tmp_path / "out" / "report.html")
    assert done.returncode != 0
    assert f"to `{tmp_path / 'out'}` failed: File too large" in done.stderr
    assert "An earlier report there is unchanged – free space" in done.stderr
    assert "pass --out" in done.stderr
    assert contents(tmp_path / "out") == earlier
    assert not (tmp_path / "out" / "report_plots").exists()


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this machine does not let root mount a tmpfs: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_really_full_disk_leaves_the_earlier_report_and_nothing_else(tmp_path, tiny_disk):
    log = start(tmp_path / "runs")
    out = tiny_disk / "report.html"
    write_report([tmp_path / "runs"], out)
    earlier = contents(tiny_disk)
    for step in range(30):
        log.append("metric", step=step, metrics={"reward": 1.0, "kl": 0.5, "entropy": 2.0, "loss": 0.1})
    with pytest.raises(OSError, match=r"No space left on device.*unchanged – free space.*--out"):
        write_report([tmp_path / "runs"], out)
    assert contents(tiny_disk) == earlier
    assert [path.name for path in tiny_disk.iterdir() if path.is_dir()] == []
    write_report([tmp_path / "runs"], tmp_path / "elsewhere" / "report.html")  # what the message advises works


def test_a_log_torn_by_a_crash_shows_what_was_complete(tmp_path):
    log = start(tmp_path)
    log.append("metric", step=1, metrics={"reward": 0.25})
    with log.path.open("ab") as file:
        file.write(b'{"event": "metric", "step": 2, "metrics": {"rew')
    page, _ = report(tmp_path, tmp_path)
    assert "1 step done" in page.text
    RunLog(log.path).append("metric", step=3, metrics={"reward": 0.75})  # the run goes on after the crash
    page, _ = report(tmp_path, tmp_path)
    assert "0.25 → 0.75" in page.text


def test_a_restart_replaces_the_steps_that_it_repeats(tmp_path):
    log = start(tmp_path)
    log.append("samples", step=0, when="before", rows=[{"prompt": "Hi", "completion": "first start"}])
    for step, reward in ((1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)):
        log.append("metric", step=step, metrics={"reward": reward, "old": reward})
    log = start(tmp_path)  # resumed from step 1
    for step, reward in ((2, 0.7), (3, 0.8)):
        log.append("metric", step=step, metrics={"reward": reward})
    (run,) = load_runs([tmp_path])
    assert run.metrics["reward"] == {1: 0.1, 2: 0.7, 3: 0.8}
    assert run.metrics["old"] == {1: 0.1}
    assert run.last_step == 3
    assert "Restarted 1 time." in report(tmp_path, tmp_path)[0].text
    log = start(tmp_path)  # from the beginning
    log.append("samples", step=0, when="before", rows=[{"prompt": "Hi", "completion": "third start"}])
    log.append("metric", step=1, metrics={"reward": 0.9})
    page, _ = report(tmp_path, tmp_path)
    assert load_runs([tmp_path])[0].metrics["reward"] == {1: 0.9}
    assert "third start" in page.text
    assert "first start" not in page.text


def test_only_a_start_says_that_nothing_was_logged_yet(tmp_path):
    start(tmp_path)
    page, text = report(tmp_path, tmp_path)
    assert "Nothing was logged yet." in page.text
    assert "Nothing was logged yet." in text
    assert not (tmp_path / "report_plots").exists()


def test_a_log_without_a_start_takes_its_name_from_the_folder(tmp_path):
    RunLog(tmp_path / "lost" / "interp.jsonl").append("metric", step=4, metrics={"loss": 0.5})
    page, text = report(tmp_path / "lost", tmp_path)
    assert "lost: model not logged, trainer not logged" in text.replace("*", "")
    assert "Nothing was logged yet" not in page.text


def test_events_without_their_usual_content_do_not_stop_the_report(tmp_path):
    log = RunLog(tmp_path / "interp.jsonl")
    log.append("run", arm=None, cards=None, settings=None, title=None)
    log.append("metric", step=None, metrics={})
    log.append("metric", step=1, metrics=None)
    log.append("metric", step=2, metrics={"text": "words", "flag": True, "list": [1.0], "": 1.5, "huge": 10**400})
    log.append("drift", step=2, hook_points=None, monitors={"m": 0.5}, overhead_seconds=None)
    log.append("samples", when=None, rows=None)
    log.append("samples", when="train", rows=[{}, {"prompt": [{"role": "user", "content": "Hi"}], "scores": 2}])
    log.append("table", columns=None, rows=[{"a": 1, "b": None}, [3]])
    log.append("table", title=None, columns=["only a head"], rows=[])
    log.append("verdict")
    log.append("end")
    page, text = report(tmp_path, tmp_path)
    assert "user: Hi" in page.text
    assert "m: value" in text
    assert "only a head" in page.text


def test_errors_say_what_was_given_what_was_expected_and_what_to_do(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty` holds no run log – expected an `interp.jsonl`.*– pass the"):
        write_report([tmp_path / "empty"], tmp_path / "report.html")
    with pytest.raises(FileNotFoundError, match="does not exist – expected a run log"):
        write_report([tmp_path / "nowhere.jsonl"], tmp_path / "report.html")
    (tmp_path / "text.jsonl").write_text("not json\n")
    with pytest.raises(ValueError, match="holds no complete event"):
        write_report([tmp_path / "text.jsonl"], tmp_path / "report.html")
    with pytest.raises(ValueError, match="`runs` is empty – expected"):
        write_report([], tmp_path / "report.html")
    start(tmp_path / "run")
    with pytest.raises(ValueError, match=r"`out` is .*run` – expected an HTML file – pass for example .*report.html"):
        write_report([tmp_path / "run"], tmp_path / "run")
    assert not list(tmp_path.glob("report*"))


def test_a_folder_stands_for_all_logs_below_it_and_a_log_counts_once(tmp_path):
    for arm in ("b", "a"):
        start(tmp_path / "deep" / arm, arm=arm)
    (tmp_path / "deep" / "c").mkdir()
    (tmp_path / "deep" / "c" / "interp.jsonl").touch()  # a run that has only just begun
    runs = load_runs([tmp_path / "deep" / "b" / "interp.jsonl", tmp_path])
    assert [run.arm for run in runs] == ["b", "a"]


def test_paths_written_are_the_files_that_are_there(tmp_path):
    log = start(tmp_path / "run")
    log.append("metric", step=1, metrics={"reward": 1.0, "a/../../b": 1.0, "interp/../../c": 1.0})
    written = write_report([tmp_path / "run"], tmp_path / "out" / "my page.html", title="Mine")
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in written) == sorted(contents(tmp_path / "out"))
    assert written[-1] == tmp_path / "out" / "my page.html"
    assert (tmp_path / "out" / "my page.md").read_text().startswith("# Mine\n")
    assert "](my%20page_plots/reward-01-reward.svg)" in (tmp_path / "out" / "my page.md").read_text()
