"""How good the probes are: on labelled texts, on a concept planted in one token, and how long a sweep and evidence take.

Four parts, all by default; `--part` picks some, `--quick` is a small run that only shows that everything works.

sets     Forty labelled sets, SmolLM2-135M-Instruct after block 15, some hundred examples to fit on, 300 to test on. On the same
         mean-pooled activations: `LinearProbe` with its calibration, scikit-learn's `LogisticRegressionCV`, probelab's
         `Logistic`, and the probe of version 0.2. On the same texts: mean, last and attention pooling, and what the folds pick.
  auroc_minus_<other>         held-out AUROC, ours less theirs, mean over sets; higher is better
  log_loss_minus_<other>      held-out log-loss in nats, mean over sets; lower is better
  calibration_slope_<whose>   slope of the held-out labels on the log-odds, median over sets; 1 is right, less is overconfident
  fit_seconds_vs_<other>      CPU time of a fit, ours over theirs, median over sets
  auroc_<pooling>_minus_mean  held-out AUROC less that of mean pooling, mean over sets
  …_shared_data               the same of the sets of `../shared/data` alone: nothing was tuned while looking at those
planted  Normal noise, 200 tokens a row; one token of each positive row is shifted by 8 standard deviations along one direction.
  planted_auroc_<pooling>_<D>  held-out AUROC, mean over seeds
  filler_change_<D>            mean absolute change of the attended score when 500 tokens of fresh noise are appended to each row,
                               over the standard deviation of the scores, mean over seeds
  repeated_filler_change_<D>   the same for one token of noise that is repeated 500 times, another one in each row
sweep    `fit_probe` over 10 hook points, 300 texts.
  sweep_vs_0_2                 its CPU time over that of the steps that version 0.2 took
  sweep_all_poolings_vs_0_2    the same with a choice of mean, last and attention pooling
evidence `check_card` on 300 answers, of a probe after block 20 that was fitted on 300 others.
  evidence_vs_0_2              its CPU time over that of the steps that version 0.2 took

scikit-learn's row is the better of raw and standardized activations, by the mean over sets of what is compared. Methods that
weigh both labels alike (ours, 0.2's) get the log of the fit's label ratio added to their log-odds, since the others know it.
probelab is a comparator only (`pip install 'interp-rlhf[bench]'`); without it its rows say so. Sets come from the wheel of
`sae-probes`, which pip fetches into `runs/benchmarks/`, and from `../shared/data`.
"""

from __future__ import annotations

import csv
import gzip
import importlib.metadata
import io
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timing import RESAMPLES, Row, machine, measure, parser, prepare
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from interp_rlhf.activations import (
    embedding_point,
    end_of_turn_ids,
    identity,
    make_canaries,
    read,
    read_activations,
    read_means,
    structure,
    tokenize_examples,
)
from interp_rlhf.concepts import linear
from interp_rlhf.concepts.attention import Tokens, fit_attention
from interp_rlhf.concepts.card import load_card
from interp_rlhf.concepts.examples import Examples, make_examples
from interp_rlhf.concepts.fitting import fit_probe, sweep_points
from interp_rlhf.concepts.linear import LinearProbe, cross_validate, fold_aurocs, folds, platt
from interp_rlhf.concepts.pooling import POOLINGS, pool
from interp_rlhf.concepts.publish import publish
from interp_rlhf.concepts.readout import Readout
from interp_rlhf.embedded import MODEL_ID, default_model
from interp_rlhf.validation.check import RANDOM_DIRECTIONS, check_card
from interp_rlhf.validation.dictionaries import PERMUTATIONS
from interp_rlhf.validation.statistics import auroc_interval

PARTS = ("sets", "planted", "sweep", "evidence")
ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "runs" / "benchmarks"
DATA = ROOT.parent / "shared" / "data"
SAE_PROBES = "sae-probes==0.4.2"
NOT_INSTALLED = "not installed (pip install 'interp-rlhf[bench]')"
METHOD = "logistic_regression"
ORDER_ONLY = 1e-9  # scale of a score that has no calibration

POINT = "model.layers.15"
CHARACTERS = 180
SIZES = (84, 120, 180, 260, 394)  # examples to fit on, in turn
TEST = 300
LEAST_TEST = 150  # a small set is fitted on fewer examples before it is tested on fewer than these

ROWS, TOKENS, SHIFT, FILLER = 300, 200, 8.0, 500
WIDTHS, SEEDS = (128, 576), 5

SWEEP_EXAMPLES, SWEEP_EVERY, SWEEP_CHARACTERS = 300, 3, 110
EVIDENCE_POINT = "model.layers.20"  # that of the shipped card

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


# What comes out


@dataclass(frozen=True)
class Quantity:
    """One line of the table; `interval` is the 95 % bootstrap interval, or the quartiles where `note` says so."""

    name: str
    value: float
    interval: tuple[float, float]
    target: str = ""
    note: str = ""


def mean_of(name: str, values: Sequence[float], seed: int, target: str = "", note: str = "") -> Quantity:
    """Mean over sets or seeds, with a bootstrap interval; paired, where the values are differences."""
    found = np.asarray(values)
    draws = np.random.default_rng(seed).choice(found, (RESAMPLES, len(found))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Quantity(name, float(found.mean()), (float(low), float(high)), target, note)


def median_of(name: str, values: Sequence[float], seed: int, target: str = "", note: str = "") -> Quantity:
    """Median of ratios, with a bootstrap interval, as in the other benchmarks."""
    row = Row(name, values, target, note)
    return Quantity(name, row.median, row.interval(seed), target, note)


def quartiles_of(name: str, values: Sequence[float | None]) -> Quantity:
    """Median and quartiles of what is there."""
    found = [value for value in values if value is not None]
    low, middle, high = np.quantile(found, [0.25, 0.5, 0.75])
    return Quantity(
        name,
        float(middle),
        (float(low), float(high)),
        note=f"median and quartiles, {len(found)} of {len(values)} sets",
    )


# Labelled sets


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Rows as `tokenize_examples` takes them, and a label of each: 0 or 1."""

    name: str
    rows: list[dict[str, str]]
    labels: list[int]


def sae_probes_sets(names: Sequence[str]) -> Iterator[LabelledSet]:
    """Sets of the wheel, read where it lies."""
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
    """Sets of the shared data; what is absent is booked under `skipped`."""
    for name, load in SHARED:
        try:
            yield load()
        except FileNotFoundError as error:
            skipped[name] = f"no file {error.filename}"


def drawn(
    given: LabelledSet, tokenizer: Any, size: int, test: int, seed: int
) -> tuple[list[dict[str, str]], np.ndarray, int]:
    """Rows in random order, cut and without duplicates, their labels, and how many of them are to fit on."""
    kept: dict[tuple[str, ...], tuple[dict[str, str], int]] = {}
    for place in np.random.default_rng(seed).permutation(len(given.rows)):
        row = {key: value.strip()[:CHARACTERS].strip() for key, value in given.rows[place].items()}
        if all(row.values()):
            kept.setdefault(tuple(row.values()), (row, given.labels[place]))
    size = max(s for s in SIZES if s <= size and s <= max(SIZES[0], len(kept) - LEAST_TEST))
    found: list[tuple[dict[str, str], int]] = []
    for row, label in kept.values():
        if len(found) < size + test and tokenize_examples([row], tokenizer).completion_mask.any():
            found.append((row, label))
    return [row for row, _ in found], np.array([label for _, label in found]), size


# Contestants: each is given features (N, D), labels and a seed, and gives back what makes log-odds of new features

LogOdds = Callable[[np.ndarray], np.ndarray]
Contestant = Callable[[np.ndarray, np.ndarray, int], LogOdds]


def prior(labels: np.ndarray) -> float:
    """Log of how many positives there are for each negative."""
    return float(np.log(labels.mean() / (1 - labels.mean())))


def each_its_own(labels: np.ndarray) -> list[str]:
    """Groups of rows that share no prompt."""
    return list(map(str, range(len(labels))))


def calibration(labels: np.ndarray, out_of_fold: np.ndarray) -> tuple[float, float]:
    """Scale and offset as `fit_probe` finds them. Where scores out of fold do not rise with the label it gives none: then only
    the order of the scores is kept, and each log-odds is that of the labels."""
    scale, offset = platt(labels, out_of_fold)
    return (scale, offset) if scale > 0 else (ORDER_ONLY, 0.0)


def ours(features: np.ndarray, labels: np.ndarray, seed: int) -> LogOdds:
    """What `fit_probe` does with means: folds, the strength, the fit, and the calibration on scores out of fold."""
    chosen = cross_validate(features, labels, folds(labels, each_its_own(labels), seed), METHOD)
    weight, bias = LinearProbe(METHOD, chosen.strength).fit(features, labels)
    scale, offset = calibration(labels, chosen.scores)
    return lambda new: scale * (new @ weight + bias) + offset + prior(labels)


def version_0_2(features: np.ndarray, labels: np.ndarray, seed: int = 0) -> LogOdds:
    """The probe of version 0.2: C = 0.001, and its scores taken as log-odds."""
    center, spread = features.mean(0), features.std(0)
    spread = np.where(spread > 1e-6 * spread.max(initial=1e-12), spread, np.inf)
    model = LogisticRegression(C=0.001, max_iter=1000, class_weight="balanced")
    model.fit((features - center) / spread, labels)
    weight, bias = model.coef_[0] / spread, float(model.intercept_[0])
    return lambda new: (new - center) @ weight + bias + prior(labels)


def sklearn_cv(standardized: bool, scoring: str | None) -> Contestant:
    """scikit-learn's own choice of the strength. Without `scoring` it chooses by accuracy; from 1.11 on by log-loss."""

    def fit(features: np.ndarray, labels: np.ndarray, seed: int) -> LogOdds:
        model = LogisticRegressionCV(Cs=10, cv=5, max_iter=5000, scoring=scoring)
        return (
            (make_pipeline(StandardScaler(), model) if standardized else model).fit(features, labels).decision_function
        )

    return fit


def probelab(features: np.ndarray, labels: np.ndarray, seed: int) -> LogOdds:
    """probelab's `Logistic` with its defaults."""
    from probelab import Activations
    from probelab.probes import Logistic

    def wrapped(values: np.ndarray) -> Any:
        return Activations(torch.tensor(values, dtype=torch.float32), dims="bh")

    probe = Logistic(seed=seed).fit(wrapped(features), torch.tensor(labels))
    return lambda new: probe.predict_logits(wrapped(new)).detach().double().numpy()


CONTESTANTS: dict[str, Contestant] = {
    "ours": ours,
    "0_2": version_0_2,
    "sklearn_cv_raw": sklearn_cv(False, None),
    "sklearn_cv_standardized": sklearn_cv(True, None),
    "sklearn_cv_log_loss_raw": sklearn_cv(False, "neg_log_loss"),
    "sklearn_cv_log_loss_standardized": sklearn_cv(True, "neg_log_loss"),
    "probelab": probelab,
}
# What is compared with, as one name: the better of several.
OTHERS = {
    "sklearn_cv": ("sklearn_cv_raw", "sklearn_cv_standardized"),
    "sklearn_cv_log_loss": ("sklearn_cv_log_loss_raw", "sklearn_cv_log_loss_standardized"),
    "probelab": ("probelab",),
    "0_2": ("0_2",),
}


def judged(log_odds: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """AUROC, log-loss in nats, Brier score, and the slope of the labels on the log-odds, none where all are alike."""
    probability = 1 / (1 + np.exp(-log_odds))
    spread, slope = float(log_odds.std()), None
    if spread > 1e-6:
        slope = LogisticRegression(C=1e6, max_iter=1000).fit(log_odds[:, None] / spread, labels).coef_[0, 0] / spread
    return {
        "auroc": float(roc_auc_score(labels, log_odds)),
        "log_loss": float(log_loss(labels, np.clip(probability, 1e-15, 1 - 1e-15))),
        "brier": float(brier_score_loss(labels, probability)),
        "slope": None if slope is None else float(slope),
    }


# Part: sets


def compared(
    fit: Tokens, fitted: np.ndarray, test: Tokens, tested: np.ndarray, seed: int, backwards: bool
) -> dict[str, Any]:
    """Contestants on the means of one set, one after the other, and their CPU seconds."""
    features, new = fit.pooled("mean"), test.pooled("mean")
    found: dict[str, Any] = {}
    for name in reversed(CONTESTANTS) if backwards else CONTESTANTS:
        if name == "probelab" and not installed(name):
            continue
        made: list[LogOdds] = []
        sample = measure(lambda name=name, made=made: made.append(CONTESTANTS[name](features, fitted, seed)))
        found[name] = {**judged(made[0](new), tested), "seconds": sample.cpu}
    return {name: found[name] for name in CONTESTANTS if name in found}


def poolings(fit: Tokens, fitted: np.ndarray, test: Tokens, tested: np.ndarray, seed: int) -> dict[str, Any]:
    """How good each pooling is on held-out texts, and which one the folds pick by the rule of `fit_probe`: the highest mean AUROC
    of the folds, between equals the lowest log-loss."""
    splits = folds(fitted, each_its_own(fitted), seed)
    found: dict[str, Any] = {}
    for how in ("mean", "last", "attention"):
        if how == "attention":
            attended = fit_attention(fit, fitted, splits, METHOD)
            chosen, features, new = attended.chosen, attended.features, test.attended(attended.query)
        else:
            features, new = fit.pooled(how), test.pooled(how)
            chosen = cross_validate(features, fitted, splits, METHOD)
        weight, bias = LinearProbe(METHOD, chosen.strength).fit(features, fitted)
        if how == "attention":  # its readout has no bias, nor have its scores out of fold
            bias = 0.0
        scale, offset = calibration(fitted, chosen.scores)
        found[how] = {
            **judged(scale * (new @ weight + bias) + offset + prior(fitted), tested),
            "fold_auroc": fold_aurocs(fitted, chosen.scores, splits)[0],
            "fold_log_loss": linear.log_loss(fitted, scale * chosen.scores + offset),
            "strength": chosen.strength,
            "calibrated": scale != ORDER_ONLY,
        }
        if how == "attention":
            found[how]["sharpness"] = attended.query.sharpness
    found["picked"] = max(found, key=lambda how: (found[how]["fold_auroc"], -found[how]["fold_log_loss"]))
    return found


def installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def run_sets(model: Any, tokenizer: Any, arguments: Any) -> tuple[list[Quantity], dict[str, Any]]:
    """The part about labelled sets."""
    skipped: dict[str, str] = {}
    names, test = (NAMES[:2], 60) if arguments.quick else (NAMES, TEST)
    sets = [*sae_probes_sets(names), *shared_sets(skipped)][: 3 if arguments.quick else None]
    draw = np.random.default_rng(arguments.seed)
    for contestant in CONTESTANTS.values() if installed("probelab") else list(CONTESTANTS.values())[:-1]:  # warm-up
        contestant(draw.standard_normal((40, 8)), np.arange(40) % 2, 0)
    rows: list[dict[str, Any]] = []
    for number, given in enumerate(tqdm(sets, desc="sets")):
        texts, labels, size = drawn(given, tokenizer, SIZES[number % len(SIZES)], test, arguments.seed)
        batch = tokenize_examples(texts, tokenizer)
        lengths = batch.completion_mask.sum(1).numpy()
        tokens = Tokens.of(read_activations(model, batch, POINT)[POINT].numpy(), lengths)
        parts = [np.arange(size), np.arange(size, len(labels))]
        fit, held = (tokens.rows(part) for part in parts)
        given_parts = fit, labels[parts[0]], held, labels[parts[1]]
        rows.append({
            "set": given.name, "fit": size, "test": len(parts[1]), "positive": float(labels.mean()),
            "tokens": float(lengths.mean()),
            "methods": compared(*given_parts, arguments.seed, number % 2 == 1),
            "poolings": poolings(*given_parts, arguments.seed),
        })  # fmt: skip
    return quantities_of_sets(rows, arguments.seed), {
        "model": MODEL_ID, "hook_point": POINT, "characters": CHARACTERS, "sets": len(rows), "fit": SIZES, "test": test,
        "source": SAE_PROBES, "skipped": skipped, "rows": rows,
    }  # fmt: skip


def quantities_of_sets(rows: Sequence[dict[str, Any]], seed: int) -> list[Quantity]:
    """What the sets say together."""
    there = rows[0]["methods"]
    shared = np.array([row["set"] not in NAMES for row in rows])

    def column(name: str, key: str) -> np.ndarray:
        return np.array([row["methods"][name][key] for row in rows])

    def best(other: str, key: str) -> str:
        sign = -1 if key == "auroc" else 1
        return min(OTHERS[other], key=lambda name: sign * column(name, key).mean())

    found = []
    for key in ("auroc", "log_loss", "brier"):
        found += [mean_of(f"{key}_{name}", column(name, key), seed) for name in there]
        for other, kinds in OTHERS.items():
            if kinds[0] in there:
                taken = best(other, key)
                target = "≥ 0" if (key, other) == ("auroc", "sklearn_cv") else ""
                differences = column("ours", key) - column(taken, key)
                found.append(mean_of(f"{key}_minus_{other}", differences, seed, target, f"against {taken}"))
                if shared.any():
                    found.append(mean_of(f"{key}_minus_{other}_shared_data", differences[shared], seed))
    found += [quartiles_of(f"calibration_slope_{name}", column(name, "slope")) for name in there]
    for other, kinds in OTHERS.items():
        if kinds[0] in there:
            taken = best(other, "auroc")
            ratios = column("ours", "seconds") / column(taken, "seconds")
            found.append(median_of(f"fit_seconds_vs_{other}", list(ratios), seed, note=f"against {taken}"))
    mean = np.array([row["poolings"]["mean"]["auroc"] for row in rows])
    found.append(mean_of("auroc_mean", mean, seed))
    for how in ("last", "attention", "picked"):
        values = np.array(
            [row["poolings"][row["poolings"]["picked"] if how == "picked" else how]["auroc"] for row in rows]
        )
        found += [mean_of(f"auroc_{how}", values, seed), mean_of(f"auroc_{how}_minus_mean", values - mean, seed)]
        if shared.any():
            found.append(mean_of(f"auroc_{how}_minus_mean_shared_data", (values - mean)[shared], seed))
    return found


# Part: planted


def planted(width: int, rows: int, seed: int) -> dict[str, float]:
    """AUROC of both poolings, and how fillers move the attended score, for one draw."""
    draw = np.random.default_rng(seed)
    direction = draw.standard_normal(width)
    shift = (SHIFT * direction / np.linalg.norm(direction)).astype(np.float32)
    labels = np.arange(rows) % 2

    def noise(tokens: int) -> np.ndarray:
        return draw.standard_normal((rows, tokens, width), dtype=np.float32)

    def texts() -> np.ndarray:
        made = noise(TOKENS)
        positive = labels.nonzero()[0]
        made[positive, draw.integers(TOKENS, size=len(positive))] += shift
        return made

    def tokens_of(values: np.ndarray) -> Tokens:
        return Tokens.of(values.reshape(-1, width), np.full(rows, values.shape[1]))

    fit, test = tokens_of(texts()), texts()
    held = tokens_of(test)
    weight, bias = LinearProbe(METHOD, seed=seed).fit(fit.pooled("mean"), labels)
    splits = folds(labels, each_its_own(labels), seed)
    attended = fit_attention(fit, labels, splits, METHOD)
    attending, _ = LinearProbe(METHOD, attended.chosen.strength).fit(attended.features, labels)

    def scores(tokens: Tokens) -> np.ndarray:
        return tokens.attended(attended.query) @ attending

    plain = scores(held)

    def change(filler: np.ndarray) -> float:
        longer = tokens_of(np.concatenate([test, filler], axis=1))
        return float(np.abs(scores(longer) - plain).mean() / plain.std())

    return {
        "auroc_mean": float(roc_auc_score(labels, held.pooled("mean") @ weight + bias)),
        "auroc_attention": float(roc_auc_score(labels, plain)),
        "filler_change": change(noise(FILLER)),
        "repeated_filler_change": change(np.repeat(noise(1), FILLER, axis=1)),
        "sharpness": attended.query.sharpness,
        "sink": attended.query.sink,
        "strength": float(attended.chosen.strength),
    }


def run_planted(arguments: Any) -> tuple[list[Quantity], dict[str, Any]]:
    """The part about one planted token."""
    widths, rows, seeds = ((32,), 100, 2) if arguments.quick else (WIDTHS, ROWS, SEEDS)
    targets = {
        "planted_auroc_attention": "≥ 0.95", "planted_auroc_mean": "≤ 0.7", "filler_change": "≤ 0.05",
        "repeated_filler_change": "≤ 0.05",
    }  # fmt: skip
    found, kept = [], {}
    for width in widths:
        seen = [planted(width, rows, arguments.seed + i) for i in tqdm(range(seeds), desc=f"planted, D = {width}")]
        kept[str(width)] = seen
        for name, target in targets.items():
            values = [one[name.removeprefix("planted_")] for one in seen]
            note = f"{min(values):.3g} to {max(values):.3g}"
            found.append(mean_of(f"{name}_{width}", values, arguments.seed, target, note))
    return found, {
        "fit": rows, "test": rows, "tokens": TOKENS, "shift": SHIFT, "filler": FILLER, "seeds": seeds, "by_width": kept,
    }  # fmt: skip


# Part: sweep


def fit_as_0_2(model: Any, tokenizer: Any, examples: Examples, points: Sequence[str], seed: int) -> str:
    """The steps of `fit_probe` in version 0.2, with today's functions; gives back the hook point that it takes."""
    ends = end_of_turn_ids(model, tokenizer)
    batch = tokenize_examples(examples.rows, tokenizer, None, None, ends)
    labels = examples.labels
    means = {point: values.double().numpy() for point, values in read_means(model, batch, points).items()}
    splitter = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
    splits = list(splitter.split(np.zeros(len(labels)), labels, examples.groups))
    aurocs = {
        point: statistics.mean(
            roc_auc_score(labels[test], version_0_2(values[train], labels[train])(values[test]))
            for train, test in splits
        )
        for point, values in means.items()
    }
    best = max(aurocs, key=lambda point: aurocs[point])
    log_odds = version_0_2(means[best], labels)
    zero = np.zeros((1, means[best].shape[1]))
    bias = float(log_odds(zero)[0])
    weight = log_odds(np.eye(zero.shape[1])) - bias
    readout = Readout("fit", best, torch.tensor(weight, dtype=torch.float32), bias)
    identity(model, best)
    structure(model)
    make_canaries(model, tokenizer, best, readout.read_directions).entry()
    scores = read(model, batch, [readout])["fit"]
    for pooling in POOLINGS:
        if pooling not in ("mean", "attention"):
            pooled = pool(scores.scores, scores.mask, pooling)[:, :1].double().numpy()
            LogisticRegression(C=1.0, class_weight="balanced").fit(pooled / (pooled.std() or 1.0), labels)
    return best


def sweep_examples(count: int, seed: int) -> Examples:
    """Sentences of film reviews of about forty tokens: of the shared data, else of sae-probes."""
    given = next(shared_sets({}), None)
    if given is None or given.name != "sentiment":
        given = next(sae_probes_sets(["113_movie_sent"]))
    long = [i for i, row in enumerate(given.rows) if len(row["text"]) >= SWEEP_CHARACTERS]
    order = np.random.default_rng(seed).permutation(long)
    rows = [{"text": given.rows[i]["text"].strip()[:CHARACTERS], "label": given.labels[i]} for i in order]
    return make_examples(list({row["text"]: row for row in rows}.values())[:count])


def run_sweep(model: Any, tokenizer: Any, arguments: Any) -> tuple[list[Quantity], dict[str, Any]]:
    """The part about the time of a sweep."""
    points = sweep_points(model, SWEEP_EVERY)
    count, pairs = (60, 1) if arguments.quick else (SWEEP_EXAMPLES, arguments.pairs)
    points = points[:2] if arguments.quick else points
    taken: dict[str, Any] = {}

    def fit(name: str, chosen: Examples, pooling: str | list[str]) -> None:
        made = fit_probe(
            model, tokenizer, chosen, points, model_id=MODEL_ID, pooling=pooling, seed=arguments.seed
        )  # fmt: skip
        taken[name] = f"{made.artifact.header.hook_point}, {made.artifact.header.pooling}"

    def old(name: str, chosen: Examples) -> None:
        taken[name] = f"{fit_as_0_2(model, tokenizer, chosen, points, arguments.seed)}, mean"

    runs: dict[str, Callable[[Examples], None]] = {
        "0_2": lambda chosen: old("0_2", chosen),
        "mean": lambda chosen: fit("mean", chosen, "mean"),
        "all": lambda chosen: fit("all", chosen, ["mean", "last", "attention"]),
    }
    for run in runs.values():  # a warm-up on few examples is enough: a run takes a minute
        run(sweep_examples(30, arguments.seed))
    examples = sweep_examples(count, arguments.seed)
    samples: list[dict[str, Any]] = []
    for pair in tqdm(range(pairs), desc="sweep"):
        order = list(runs) if pair % 2 == 0 else list(reversed(runs))
        samples.append({name: measure(lambda name=name: runs[name](examples)) for name in order})
    found = []
    for name, kind, target in (("sweep_vs_0_2", "mean", "≤ 2"), ("sweep_all_poolings_vs_0_2", "all", "")):
        for suffix, clock in (("", "cpu"), ("_wall", "wall")):
            ratios = [getattr(sample[kind], clock) / getattr(sample["0_2"], clock) for sample in samples]
            found.append(median_of(f"{name}{suffix}", ratios, arguments.seed, "" if suffix else target))
    batch = tokenize_examples(examples.rows, tokenizer)
    return found, {
        "model": MODEL_ID, "hook_points": points, "examples": len(examples), "pairs": pairs, "taken": taken,
        "tokens": float(batch.completion_mask.sum(1).double().mean()),
    }  # fmt: skip


# Part: evidence


def answers(count: int, seed: int) -> list[Examples]:
    """Film reviews as answers to prompts of their own: to fit on, and to check on."""
    given = next(shared_sets({}), None) or next(sae_probes_sets(["113_movie_sent"]))
    order = np.random.default_rng(seed).permutation(len(given.rows))[: 2 * count]
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Say what you think of film number {number}."}],
            "completion": [{"role": "assistant", "content": given.rows[i]["text"].strip()}], "label": given.labels[i],
        }
        for number, i in enumerate(order)
    ]  # fmt: skip
    return [make_examples(rows[:count]), make_examples(rows[count:])]


def check_as_0_2(model: Any, tokenizer: Any, readout: Readout, fit: Examples, rows: Examples, seed: int) -> None:
    """The steps of `check_card` in version 0.2, with today's functions."""
    readout.check_model(model)
    ends, embedding = end_of_turn_ids(model, tokenizer), embedding_point(model)
    batches = [tokenize_examples(one.rows, tokenizer, None, None, ends) for one in (fit, rows)]
    points = [readout.hook_point, embedding]
    means = {point: values.double().numpy() for point, values in read_means(model, batches[0], points).items()}
    rng = np.random.default_rng(seed)
    features, zero = means[readout.hook_point], np.zeros((1, readout.width))
    drawn = [version_0_2(features, rng.permutation(fit.labels)) for _ in range(PERMUTATIONS)]
    weights = np.stack([one(np.eye(readout.width)) - one(zero) for one in drawn])
    directions = np.concatenate([weights, rng.standard_normal((RANDOM_DIRECTIONS, readout.width))])
    controls = Columns(readout.hook_point, torch.tensor(directions.T, dtype=torch.float32))
    by_words = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b|[^\w\s]"),
        LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced"),
    )
    estimates = []
    for start in range(0, len(rows), 256):
        part = batches[1].part(slice(start, start + 256))
        scores = read(model, part, [readout, controls])
        estimates.append(readout.score(scores[readout.name]))
        pool(scores["columns"].scores, part.completion_mask, "mean")
    lexical = read_means(model, batches[1], [embedding])[embedding].double().numpy()
    for values in (
        np.concatenate(estimates), by_words.fit(fit.texts, fit.labels).decision_function(rows.texts),
        np.array([len(text) for text in rows.texts]), version_0_2(means[embedding], fit.labels)(lexical),
    ):  # fmt: skip
        auroc_interval(rows.labels, values, rows.groups, seed)


@dataclass(frozen=True, eq=False)
class Columns:
    """Scores along many directions (D, K)."""

    hook_point: str
    directions: torch.Tensor
    name: str = "columns"

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        return activation @ self.directions.to(activation)


def run_evidence(model: Any, tokenizer: Any, arguments: Any) -> tuple[list[Quantity], dict[str, Any]]:
    """The part about the time of evidence."""
    count, pairs = (120, 1) if arguments.quick else (SWEEP_EXAMPLES, arguments.pairs)
    fit_on, rows = answers(count, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        made = fit_probe(model, tokenizer, fit_on, EVIDENCE_POINT, model_id=MODEL_ID, seed=arguments.seed)
        card = load_card(publish(made, folder, name="sentiment", concept="Praises.", role="reward"))
        readout = Readout.from_card(card)
        runs: dict[str, Callable[[], Any]] = {
            "0_2": lambda: check_as_0_2(model, tokenizer, readout, fit_on, rows, arguments.seed),
            "now": lambda: check_card(card, model, tokenizer, fit_on, rows, seed=arguments.seed),
        }
        samples = []
        for pair in tqdm(range(pairs), desc="evidence"):
            order = list(runs) if pair % 2 == 0 else list(reversed(runs))
            samples.append({name: measure(runs[name]) for name in order})
    found = []
    for suffix, clock in (("", "cpu"), ("_wall", "wall")):
        ratios = [getattr(sample["now"], clock) / getattr(sample["0_2"], clock) for sample in samples]
        found.append(median_of(f"evidence_vs_0_2{suffix}", ratios, arguments.seed, "" if suffix else "≤ 1.5"))
    return found, {"model": MODEL_ID, "hook_point": EVIDENCE_POINT, "examples": [count, count], "pairs": pairs}


# All parts


def report(part: str, found: Sequence[Quantity]) -> None:
    """The table of one part."""
    print(f"\nprobes, {part}: mean or median [95 % bootstrap interval]; CPU time unless it says wall\n")
    width = max(len(one.name) for one in found)
    for one in found:
        figure = f"{one.value:7.4g} [{one.interval[0]:.4g}, {one.interval[1]:.4g}]"
        print(f"{one.name:<{width}}  {figure:<30} {one.target and f'target {one.target}':<14} {one.note}".rstrip())


def as_json(found: Sequence[Quantity], settings: dict[str, Any], arguments: Any) -> dict[str, Any]:
    """The object of one part, in the form of the other benchmarks."""
    about = machine()
    for name in ("scikit-learn", "numpy", "probelab"):
        if installed(name):
            about["versions"][name] = importlib.metadata.version(name)
    kept = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
    return {
        "benchmark": "probes",
        "command": shlex.join(["python", "benchmarks/probes.py", *sys.argv[1:]]),
        "environment": {name: os.environ[name] for name in kept if name in os.environ},
        "ratios": {one.name: one.value for one in found},
        "settings": {
            "seed": arguments.seed,
            "device": f"cpu, {processor()}",
            "intervals": {one.name: one.interval for one in found},
            "targets": {one.name: one.target for one in found if one.target},
            "notes": {one.name: one.note for one in found if one.note},
            "not_run": {} if installed("probelab") else {"probelab": NOT_INSTALLED},
            **about,
            **settings,
        },
    }


def processor() -> str:
    """Name of the processor, as the system gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    made = parser(__doc__, pairs=3)
    made.add_argument("--part", action="append", choices=PARTS, help="only this part; may be given several times")
    made.add_argument("--quick", action="store_true", help="a small run that only shows that everything works")
    made.add_argument("--out", type=Path, help="JSON file; parts that did not run now stay in it as they are")
    arguments = made.parse_args()
    prepare(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    chosen = [part for part in PARTS if part in (arguments.part or PARTS)]
    model = tokenizer = None
    if chosen != ["planted"]:
        folder = default_model()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    runs = {
        "sets": lambda: run_sets(model, tokenizer, arguments),
        "planted": lambda: run_planted(arguments),
        "sweep": lambda: run_sweep(model, tokenizer, arguments),
        "evidence": lambda: run_evidence(model, tokenizer, arguments),
    }
    parts: dict[str, Any] = {}
    for part in chosen:
        found, settings = runs[part]()
        report(part, found)
        parts[part] = as_json(found, settings, arguments)
        if arguments.out:
            before = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
            arguments.out.write_text(json.dumps({**before, part: parts[part]}, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(parts))


if __name__ == "__main__":
    main()
