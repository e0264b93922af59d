#!/usr/bin/env python3
"""Renders measured figures into the documents, between `<!-- table: NAME -->` and `<!-- end: NAME -->`.

    python tools/render.py           write the tables
    python tools/render.py --check   change nothing; exit with 1 if a table in a document is not that of its data

In: `benchmarks/*.json` and `docs/engines.json`, as the benchmarks and `tests/engines/compare.py` write them. Out: the tables of
the documents, and the figures in the rows of `benchmarks/README.md`. It measures nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "engines"))

import compare  # noqa: E402

PLACE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end: \2 -->)", re.S)
MODELS = {"HuggingFaceTB/SmolLM2-135M-Instruct": "SmolLM2-135M-Instruct"}


class Run:
    """One run of a benchmark, as its `--json` gave it."""

    def __init__(self, measured: dict[str, Any]):
        self.ratios, self.pairs, self.settings = measured["ratios"], measured["pairs"], measured["settings"]

    def value(self, name: str, form: str = ".2f") -> str:
        return format(self.ratios[name], form)

    def interval(self, name: str, form: str = ".2f") -> str:
        """The ratio and, if it was stored, its 95 % interval: `2.78 [2.65, 2.90]`."""
        bounds = [format(bound, form) for bound in self.settings["intervals"].get(name, [])]
        return f"{self.value(name, form)} [{', '.join(bounds)}]" if bounds else self.value(name, form)

    def measured_on(self) -> str:
        """What was measured on what, as one line."""
        settings = self.settings
        versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
        machine = f"{settings.get('processor', 'CPU')}, {settings['cores']} cores, {settings['threads']} thread"
        return f"{MODELS.get(settings['model'], settings['model'])}; {self.pairs} pairs; {machine}; {versions}."


def read_table(runs: dict[str, Run]) -> list[tuple[str, str]]:
    run = runs["random_model"]
    return [
        ("reading block 4 of 8, `read()` against `output_hidden_states`",
         f"{run.interval('early_stop_vs_output_hidden_states')} times as fast"),
        ("the same against the backbone without its LM head", f"{run.interval('early_stop_vs_backbone')} times as fast"),
        ("`read()` on lines of WikiText against the same in file order",
         f"{run.interval('length_buckets_vs_unsorted')} times as fast"),
    ]  # fmt: skip


def reward_table(runs: dict[str, Run]) -> list[tuple[str, str]]:
    run = runs["smollm2"]
    return [
        ("CPU time in our code per GRPO step, β > 0",
         f"{run.interval('reward_share', '.4f')} of the step, {run.value('own_forwards', '.0f')} extra forward passes"),
        ("the reading with β = 0, against the same share of a no-grad forward",
         run.interval("beta0_reading_vs_forward_share")),
    ]  # fmt: skip


def dpo_table(runs: dict[str, Run]) -> list[tuple[str, str]]:
    run = runs["smollm2"]

    def both(name: str, form: str = ".2f") -> str:
        return f"{run.interval(name, form)} / {run.interval(f'{name}_full', form)}"

    return [
        (
            "a DPO step with three terms in the loss against a plain one (LoRA / full fine-tuning)",
            both("three_terms_vs_plain"),
        ),
        ("the same terms with separate forwards", both("separate_forwards_vs_plain")),
        ("peak memory with three terms", both("three_terms_vs_plain_peak_memory", ".3f")),
        ("peak memory with separate forwards", both("separate_forwards_vs_plain_peak_memory")),
    ]


def drift_table(runs: dict[str, Run]) -> list[tuple[str, str]]:
    run = runs["smollm2"]
    return [
        ("one default drift evaluation every 50 DPO steps: CPU time", run.interval("with_callback_vs_plain", ".3f")),
        ("peak memory", run.interval("with_callback_vs_plain_peak_memory", ".3f")),
    ]


# Table to what renders its rows, and the run whose settings stand below it.
COSTS: dict[str, tuple[Callable[[dict[str, Run]], list[tuple[str, str]]], str]] = {
    "read": (read_table, "random_model"),
    "reward": (reward_table, "smollm2"),
    "dpo": (dpo_table, "smollm2"),
    "drift": (drift_table, "smollm2"),
}


def rendered(name: str) -> str:
    """The Markdown of a table from its committed data."""
    if name == "engines":
        return compare.table(json.loads((ROOT / "docs" / "engines.json").read_text())["rows"])
    if name not in COSTS:
        raise ValueError(
            f"table `{name}` – expected one of {', '.join(f'`{n}`' for n in sorted([*COSTS, 'engines']))}"
        )
    make, run = COSTS[name]
    runs = {key: Run(one) for key, one in json.loads((ROOT / "benchmarks" / f"{name}.json").read_text()).items()}
    lines = ["| | ratio |", "|---|---|", *(f"| {what} | {ratio} |" for what, ratio in make(runs))]
    return "\n".join([*lines, "", f"Measured on: {runs[run].measured_on()}"])


def with_tables(text: str) -> str:
    """A document with every table rendered."""
    return PLACE.sub(lambda place: f"{place[1]}{rendered(place[2])}\n{place[4]}", text)


# A row of the table in benchmarks/README.md: benchmark, ratio, what it is, target, figure, letter of the command.
ROW = re.compile(r"^(\| `(read|reward|dpo|drift)`: `(\w+)`.* \| )([^|]+)( \| )([^|]+)( \| ([A-E]) \|)$", re.M)
LETTERS = {"A": "random_model", "B": "random_model", "C": "smollm2", "D": "smollm2", "E": "smollm2"}
FORMS = {
    "reward_share": ".4f", "with_callback_vs_plain": ".4f", "with_callback_vs_plain_peak_memory": ".3f",
    "three_terms_vs_plain_peak_memory": ".3f", "three_terms_vs_plain_peak_memory_full": ".3f", "streaming_cka_error": ".0e",
}  # fmt: skip


def with_rows(text: str) -> str:
    """The page on benchmarks with the figures of its rows; those with a target are in bold."""

    def row(place: re.Match[str]) -> str:
        measured = json.loads((ROOT / "benchmarks" / f"{place[2]}.json").read_text())[LETTERS[place[8]]]
        value, *interval = Run(measured).interval(place[3], FORMS.get(place[3], ".2f")).split(" ", 1)
        figure = " ".join([value if place[4] == "–" else f"**{value}**", *interval])
        return f"{place[1]}{place[4]}{place[5]}{figure}{place[7]}"

    return ROW.sub(row, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if a table is not that of its data"
    )
    arguments = parser.parse_args(argv)
    stale = []
    for path in [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text()
        new = with_rows(with_tables(text))
        if new != text:
            stale.append(path.relative_to(ROOT))
            if not arguments.check:
                path.write_text(new)
    for path in stale:
        print(
            f"{path}: {'not rendered from its data; run `python tools/render.py`' if arguments.check else 'rendered'}"
        )
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
