"""The part of the probes benchmark about labelled sets: our probe against others, and the poolings.

In: a model and its tokenizer. Out: quantities over sets, and a row per set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from contestants import CONTESTANTS, METHOD, ORDER_ONLY, OTHERS, LogOdds, calibration, each_its_own, judged, prior
from labelled_sets import (
    CHARACTERS,
    NAMES,
    SAE_PROBES,
    SIZES,
    LabelledSet,
    drawn,
    made_up_set,
    sae_probes_sets,
    shared_sets,
)
from quantities import Quantity, mean_of, median_of, quartiles_of
from timing import installed_version, measure
from tqdm.auto import tqdm

from interp_rlhf.activations import read_activations, tokenize_examples
from interp_rlhf.concepts import linear
from interp_rlhf.concepts.attention import Tokens, fit_attention
from interp_rlhf.concepts.linear import LinearProbe, cross_validate, fold_aurocs, folds

BLOCK = 15
TEST = 300


def compared(
    fit: Tokens, fitted: np.ndarray, test: Tokens, tested: np.ndarray, seed: int, backwards: bool
) -> dict[str, Any]:
    """Contestants on the means of one set, one after the other, and their CPU seconds."""
    features, new = fit.pooled("mean"), test.pooled("mean")
    results: dict[str, Any] = {}
    for name in reversed(CONTESTANTS) if backwards else CONTESTANTS:
        if name == "probelab" and not installed_version(name):
            continue
        made: list[LogOdds] = []
        sample = measure(lambda name=name, made=made: made.append(CONTESTANTS[name](features, fitted, seed)))
        results[name] = {**judged(made[0](new), tested), "seconds": sample.cpu}
    return {name: results[name] for name in CONTESTANTS if name in results}


def poolings(fit: Tokens, fitted: np.ndarray, test: Tokens, tested: np.ndarray, seed: int) -> dict[str, Any]:
    """How good each pooling is on held-out texts, and which one the folds pick.

    The rule is that of `fit_probe`: the highest mean AUROC of the folds, between equals the lowest log-loss.
    """
    splits = folds(fitted, each_its_own(fitted), seed)
    results: dict[str, Any] = {}
    for how in ("mean", "last", "attention"):
        if how == "attention":
            attended = fit_attention(fit, fitted, splits, METHOD)
            chosen, features, new = attended.chosen, attended.features, test.attended(attended.query)
        else:
            features, new = fit.pooled(how), test.pooled(how)
            chosen = cross_validate(features, fitted, splits, METHOD)
        weight, bias = LinearProbe(METHOD, chosen.strength).fit(features, fitted)
        if how == "attention":  # neither its readout nor its scores out of fold have a bias
            bias = 0.0
        scale, offset = calibration(fitted, chosen.scores)
        results[how] = {
            **judged(scale * (new @ weight + bias) + offset + prior(fitted), tested),
            "fold_auroc": fold_aurocs(fitted, chosen.scores, splits)[0],
            "fold_log_loss": linear.log_loss(fitted, scale * chosen.scores + offset),
            "strength": chosen.strength,
            "calibrated": scale != ORDER_ONLY,
        }
        if how == "attention":
            results[how]["sharpness"] = attended.query.sharpness
    results["picked"] = max(results, key=lambda how: (results[how]["fold_auroc"], -results[how]["fold_log_loss"]))
    return results


def sets_of(quick: bool, skipped: dict[str, str]) -> list[LabelledSet]:
    if quick:
        return [made_up_set()]
    return [*sae_probes_sets(NAMES), *shared_sets(skipped)]


def run_sets(model: Any, tokenizer: Any, arguments: Any) -> tuple[list[Quantity], dict[str, Any]]:
    """The part about labelled sets."""
    skipped: dict[str, str] = {}
    test = 60 if arguments.quick else TEST
    point = f"model.layers.{min(BLOCK, model.config.num_hidden_layers // 2)}"
    sets = sets_of(arguments.quick, skipped)
    draw = np.random.default_rng(arguments.seed)
    for name, contestant in CONTESTANTS.items():  # warm-up
        if name != "probelab" or installed_version(name):
            contestant(draw.standard_normal((40, 8)), np.arange(40) % 2, 0)
    rows: list[dict[str, Any]] = []
    for number, labelled in enumerate(tqdm(sets, desc="sets")):
        texts, labels, size = drawn(labelled, tokenizer, SIZES[number % len(SIZES)], test, arguments.seed)
        batch = tokenize_examples(texts, tokenizer)
        lengths = batch.completion_mask.sum(1).numpy()
        tokens = Tokens.of(read_activations(model, batch, point)[point].numpy(), lengths)
        to_fit, to_test = np.arange(size), np.arange(size, len(labels))
        data = tokens.rows(to_fit), labels[to_fit], tokens.rows(to_test), labels[to_test]
        rows.append({
            "set": labelled.name, "fit": size, "test": len(to_test), "positive": float(labels.mean()),
            "tokens": float(lengths.mean()),
            "methods": compared(*data, arguments.seed, number % 2 == 1),
            "poolings": poolings(*data, arguments.seed),
        })  # fmt: skip
    return quantities_of_sets(rows, arguments.seed), {
        "hook_point": point, "characters": CHARACTERS, "sets": len(rows), "fit": SIZES, "test": test,
        "source": SAE_PROBES, "skipped": skipped, "rows": rows,
    }  # fmt: skip


class Table:
    """The rows of all sets, by column."""

    def __init__(self, rows: Sequence[dict[str, Any]]):
        self.rows = rows
        self.contestants = list(rows[0]["methods"])
        self.others = {other: kinds for other, kinds in OTHERS.items() if kinds[0] in self.contestants}
        self.shared = np.array([row["set"] not in NAMES for row in rows])

    def column(self, name: str, key: str) -> np.ndarray:
        return np.array([row["methods"][name][key] for row in self.rows])

    def pooled(self, how: str) -> np.ndarray:
        """AUROC of a pooling, or of the one that the folds picked."""
        poolings = [row["poolings"] for row in self.rows]
        return np.array([every[every["picked"] if how == "picked" else how]["auroc"] for every in poolings])

    def best(self, other: str, key: str) -> str:
        """The better of the contestants that a comparison is about."""
        sign = -1 if key == "auroc" else 1
        return min(self.others[other], key=lambda name: sign * self.column(name, key).mean())


def quantities_of_sets(rows: Sequence[dict[str, Any]], seed: int) -> list[Quantity]:
    """Means and medians over all sets."""
    table = Table(rows)
    return [
        *(quantity for key in ("auroc", "log_loss", "brier") for quantity in quality(table, key, seed)),
        *(quartiles_of(f"calibration_slope_{name}", table.column(name, "slope")) for name in table.contestants),
        *fit_times(table, seed),
        *of_poolings(table, seed),
    ]


def quality(table: Table, key: str, seed: int) -> list[Quantity]:
    """One measure of every contestant, and ours less the others'."""
    quantities = [mean_of(f"{key}_{name}", table.column(name, key), seed) for name in table.contestants]
    for other in table.others:
        taken = table.best(other, key)
        target = "≥ 0" if (key, other) == ("auroc", "sklearn_cv") else ""
        differences = table.column("ours", key) - table.column(taken, key)
        quantities.append(mean_of(f"{key}_minus_{other}", differences, seed, target, f"against {taken}"))
        if table.shared.any():
            quantities.append(mean_of(f"{key}_minus_{other}_shared_data", differences[table.shared], seed))
    return quantities


def fit_times(table: Table, seed: int) -> list[Quantity]:
    quantities = []
    for other in table.others:
        taken = table.best(other, "auroc")
        ratios = table.column("ours", "seconds") / table.column(taken, "seconds")
        quantities.append(median_of(f"fit_seconds_vs_{other}", list(ratios), seed, note=f"against {taken}"))
    return quantities


def of_poolings(table: Table, seed: int) -> list[Quantity]:
    mean = table.pooled("mean")
    quantities = [mean_of("auroc_mean", mean, seed)]
    for how in ("last", "attention", "picked"):
        values = table.pooled(how)
        quantities += [mean_of(f"auroc_{how}", values, seed), mean_of(f"auroc_{how}_minus_mean", values - mean, seed)]
        if table.shared.any():
            quantities.append(mean_of(f"auroc_{how}_minus_mean_shared_data", (values - mean)[table.shared], seed))
    return quantities
