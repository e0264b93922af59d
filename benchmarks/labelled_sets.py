"""Labelled texts for the probes benchmark: sets of `sae-probes`, sets of the shared data, and made-up ones.

In: names and a seed. Out: rows as `tokenize_examples` takes them, with a label each. It must not know probes.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import synthetic

from interp_rlhf.activations import tokenize_examples

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "runs" / "benchmarks"
DATA = ROOT.parent / "shared" / "data"
SAE_PROBES = "sae-probes==0.4.2"
CHARACTERS = 180
SIZES = (84, 120, 180, 260, 394)  # examples to fit on, in turn
LEAST_TEST = 150  # a small set is fitted on fewer examples before it is tested on fewer than these
# One binary set of each family that sae-probes has, two or three of the larger families.
NAMES = (
    "5_hist_fig_ismale", "22_headline_isobama", "26_headline_isfrontpage", "36_sciq_tf", "41_truthqa_tf",
    "47_reasoning_tf", "50_deon_isvalid", "52_virtue_is", "54_cs_tf", "59_wikidata_occupation_isjournalist",
    "65_high-school", "78_north-america", "87_glue_cola", "91_glue_qqp", "92_glue_sst2", "95_toxic_is", "96_spam_is",
    "105_click_bait", "106_hate_hate", "107_hate_offensive", "110_aimade_humangpt3", "113_movie_sent",
    "115_nyc_borough_Brooklyn", "123_world_country_United_Kingdom", "126_art_type_book", "129_arith_mc_A",
    "130_temp_cat_Frequency", "133_context_type_Causality", "139_news_class_Politics", "149_twt_emotion_happiness",
    "151_it_tick_HR Support", "155_athlete_sport_basketball",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Rows as `tokenize_examples` takes them, and a label of each: 0 or 1."""

    name: str
    rows: list[dict[str, str]]
    labels: list[int]


def sae_probes_sets(names: Sequence[str]) -> Iterator[LabelledSet]:
    """Sets from the wheel, which is not unpacked. pip fetches it at the first call."""
    import pandas
    import pyarrow

    folder = CACHE / "wheels"
    wheels = list(folder.glob("sae_probes-*.whl"))
    if not wheels:
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), SAE_PROBES]
        subprocess.run(fetch, check=True)
        wheels = list(folder.glob("sae_probes-*.whl"))
    with zipfile.ZipFile(wheels[0]) as archive:
        for name in names:
            packed = archive.read(f"sae_probes/data/cleaned_data/{name}.csv.zst")
            with pyarrow.input_stream(pyarrow.py_buffer(packed), compression="zstd") as stream:
                table = pandas.read_csv(io.BytesIO(stream.read()))
            low, high = sorted(table["target"].unique().tolist(), key=str)
            rows = [{"text": str(text)} for text in table["prompt"]]
            yield LabelledSet(name, rows, [int(value == high) for value in table["target"]] if low != high else [])


def sentiment() -> LabelledSet:
    """Sentences of film reviews."""
    sides = [
        (DATA / "sentiment" / f"rt_polarity_{side}.txt").read_text("utf-8").splitlines() for side in ("neg", "pos")
    ]
    rows = [{"text": line} for side in sides for line in side]
    return LabelledSet("sentiment", rows, [0] * len(sides[0]) + [1] * len(sides[1]))


def truth(name: str) -> LabelledSet:
    """True and false statements."""
    rows = read_csv(DATA / "truth" / f"got_{name}.csv")
    return LabelledSet(
        f"truth_{name}", [{"text": row["statement"]} for row in rows], [int(row["label"]) for row in rows]
    )


def refusal() -> LabelledSet:
    """Answers that comply and answers that refuse, under their prompts."""
    labels = {"1_full_compliance": 0, "2_full_refusal": 1}
    rows = [row for row in read_csv(DATA / "refusal" / "xstest_completions_gpt4.csv") if row["final_label"] in labels]
    return LabelledSet(
        "refusal", [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows],
        [labels[row["final_label"]] for row in rows],
    )  # fmt: skip


def persona(name: str) -> LabelledSet:
    """Statements that somebody with a trait would make, and statements that they would not make."""
    with gzip.open(DATA / "persona" / f"anthropic_{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    labels = [int(row["answer_matching_behavior"].strip() == "Yes") for row in rows]
    return LabelledSet(f"persona_{name}", [{"text": row["statement"]} for row in rows], labels)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


SHARED: tuple[tuple[str, Callable[[], LabelledSet]], ...] = (
    ("sentiment", sentiment),
    ("truth_cities", lambda: truth("cities")),
    ("truth_sp_en_trans", lambda: truth("sp_en_trans")),
    ("refusal", refusal),
    *((f"persona_{name}", lambda name=name: persona(name))
      for name in ("agreeableness", "extraversion", "no-shut-down", "risk-averse")),
)  # fmt: skip


def shared_sets(skipped: dict[str, str]) -> Iterator[LabelledSet]:
    """Sets of the shared data. Those whose file is absent are noted in `skipped`."""
    for name, load in SHARED:
        try:
            yield load()
        except FileNotFoundError as error:
            skipped[name] = f"no file {error.filename}"


def made_up_set(texts: int = 200, words: int = 30) -> LabelledSet:
    """For `--quick`: texts of the random model's words; the positive ones have words of a lexicon among them."""
    rng = random.Random(0)
    labels = [i % 2 for i in range(texts)]
    lexicon = range(synthetic.FIRST_WORD, synthetic.FIRST_WORD + 4)
    said = [
        " ".join(
            f"w{rng.choice(lexicon) if label and rng.random() < 0.3 else rng.randrange(100, 999)}"
            for _ in range(words)
        )
        for label in labels
    ]
    return LabelledSet("made_up", [{"text": text} for text in said], labels)


def film_reviews(quick: bool) -> LabelledSet:
    """Sentences of film reviews: of the shared data, else of sae-probes; made-up texts for `--quick`."""
    if quick:
        return made_up_set()
    first = next(shared_sets({}), None)
    return first if first is not None and first.name == "sentiment" else next(sae_probes_sets(["113_movie_sent"]))


def drawn(
    labelled: LabelledSet, tokenizer: Any, size: int, test: int, seed: int
) -> tuple[list[dict[str, str]], np.ndarray, int]:
    """Rows in random order, cut and without duplicates, their labels, and the number of rows to fit on."""
    kept: dict[tuple[str, ...], tuple[dict[str, str], int]] = {}
    for place in np.random.default_rng(seed).permutation(len(labelled.rows)):
        row = {key: value.strip()[:CHARACTERS].strip() for key, value in labelled.rows[place].items()}
        if all(row.values()):
            kept.setdefault(tuple(row.values()), (row, labelled.labels[place]))
    size = max(s for s in SIZES if s <= size and s <= max(SIZES[0], len(kept) - LEAST_TEST))
    chosen: list[tuple[dict[str, str], int]] = []
    for row, label in kept.values():
        if len(chosen) < size + test and tokenize_examples([row], tokenizer).completion_mask.any():
            chosen.append((row, label))
    return [row for row, _ in chosen], np.array([label for _, label in chosen]), size
