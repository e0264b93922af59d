"""The parts of the probes benchmark about time: a sweep by `fit_probe`, and evidence by `check_card`, against version 0.2.

In: a model and its tokenizer. Out: ratios of CPU time and of time by the clock, pair by pair. The steps of version 0.2 are
written out with today's functions.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from contestants import version_0_2
from labelled_sets import CHARACTERS, film_reviews
from quantities import Quantity, median_of
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from timing import Sample, measure
from tqdm.auto import tqdm

from interp_rlhf.activations import (
    embedding_point,
    end_of_turn_ids,
    identity,
    make_canaries,
    read,
    read_means,
    structure,
    tokenize_examples,
)
from interp_rlhf.concepts.card import load_card
from interp_rlhf.concepts.examples import Examples, make_examples
from interp_rlhf.concepts.fitting import fit_probe, sweep_points
from interp_rlhf.concepts.pooling import POOLINGS, pool
from interp_rlhf.concepts.publish import publish
from interp_rlhf.concepts.readout import Readout
from interp_rlhf.embedded import MODEL_ID
from interp_rlhf.validation.check import check_card
from interp_rlhf.validation.controls import RANDOM_DIRECTIONS
from interp_rlhf.validation.dictionaries import PERMUTATIONS
from interp_rlhf.validation.statistics import auroc_interval

SWEEP_EXAMPLES, SWEEP_EVERY, SWEEP_CHARACTERS = 300, 3, 110
EVIDENCE_POINT = "model.layers.20"  # that of the shipped card


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


def sweep_examples(count: int, seed: int, quick: bool) -> Examples:
    """Film reviews of about forty tokens."""
    labelled = film_reviews(quick)
    long = [i for i, row in enumerate(labelled.rows) if len(row["text"]) >= SWEEP_CHARACTERS]
    order = np.random.default_rng(seed).permutation(long)
    rows = [{"text": labelled.rows[i]["text"].strip()[:CHARACTERS], "label": labelled.labels[i]} for i in order]
    return make_examples(list({row["text"]: row for row in rows}.values())[:count])


def in_turn(runs: dict[str, Callable[[], Any]], pairs: int, name: str) -> list[dict[str, Sample]]:
    """Times every run once per pair, forwards and backwards in turn."""
    samples = []
    for pair in tqdm(range(pairs), desc=name):
        order = list(runs) if pair % 2 == 0 else list(reversed(runs))
        samples.append({key: measure(runs[key]) for key in order})
    return samples


def ratios_of(samples: list[dict[str, Sample]], kind: str, name: str, seed: int, target: str = "") -> list[Quantity]:
    """A run over that of version 0.2, by CPU time and by the clock."""
    by_cpu = [sample[kind].cpu / sample["0_2"].cpu for sample in samples]
    by_clock = [sample[kind].wall / sample["0_2"].wall for sample in samples]
    return [median_of(name, by_cpu, seed, target), median_of(f"{name}_wall", by_clock, seed)]


def run_sweep(model: Any, tokenizer: Any, arguments: Any) -> tuple[list[Quantity], dict[str, Any]]:
    """The part about the time of a sweep."""
    seed, count = arguments.seed, 60 if arguments.quick else SWEEP_EXAMPLES
    points = ["model.layers.0", "model.layers.1"] if arguments.quick else sweep_points(model, SWEEP_EVERY)
    taken: dict[str, Any] = {}

    def fit(name: str, examples: Examples, pooling: str | list[str]) -> None:
        made = fit_probe(model, tokenizer, examples, points, model_id=MODEL_ID, pooling=pooling, seed=seed)
        taken[name] = f"{made.artifact.header.hook_point}, {made.artifact.header.pooling}"

    def runs_on(examples: Examples) -> dict[str, Callable[[], None]]:
        def as_0_2() -> None:
            taken["0_2"] = f"{fit_as_0_2(model, tokenizer, examples, points, seed)}, mean"

        poolings = ["mean", "last", "attention"]
        return {
            "0_2": as_0_2, "mean": lambda: fit("mean", examples, "mean"), "all": lambda: fit("all", examples, poolings),
        }  # fmt: skip

    for run in runs_on(
        sweep_examples(30, seed, arguments.quick)
    ).values():  # a warm-up on few examples: a run takes a minute
        run()
    examples = sweep_examples(count, seed, arguments.quick)
    samples = in_turn(runs_on(examples), arguments.pairs, "sweep")
    quantities = ratios_of(samples, "mean", "sweep_vs_0_2", seed, "≤ 2")
    quantities += ratios_of(samples, "all", "sweep_all_poolings_vs_0_2", seed)
    batch = tokenize_examples(examples.rows, tokenizer)
    return quantities, {
        "hook_points": points, "examples": len(examples), "pairs": arguments.pairs, "taken": taken,
        "tokens": float(batch.completion_mask.sum(1).double().mean()),
    }  # fmt: skip


def answers(count: int, seed: int, quick: bool) -> list[Examples]:
    """Film reviews as answers, each to its own prompt: examples to fit on, and examples to check on."""
    labelled = film_reviews(quick)
    order = np.random.default_rng(seed).permutation(len(labelled.rows))[: 2 * count]
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Say what you think of film number {number}."}],
            "completion": [{"role": "assistant", "content": labelled.rows[i]["text"].strip()}], "label": labelled.labels[i],
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
    seed, count = arguments.seed, 100 if arguments.quick else SWEEP_EXAMPLES
    point = "model.layers.1" if arguments.quick else EVIDENCE_POINT
    fit_on, rows = answers(count, seed, arguments.quick)
    with tempfile.TemporaryDirectory() as folder:
        made = fit_probe(model, tokenizer, fit_on, point, model_id=MODEL_ID, seed=seed)
        card = load_card(publish(made, folder, name="sentiment", concept="Praises.", role="reward"))
        readout = Readout.from_card(card)
        runs: dict[str, Callable[[], Any]] = {
            "0_2": lambda: check_as_0_2(model, tokenizer, readout, fit_on, rows, seed),
            "now": lambda: check_card(card, model, tokenizer, fit_on, rows, seed=seed),
        }
        samples = in_turn(runs, arguments.pairs, "evidence")
    quantities = ratios_of(samples, "now", "evidence_vs_0_2", seed, "≤ 1.5")
    return quantities, {"hook_point": point, "examples": [count, count], "pairs": arguments.pairs}
