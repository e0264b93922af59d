"""The part of the probes benchmark about a concept that is planted in one token of many.

In: nothing but a seed. Out: quantities over seeds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from contestants import METHOD, each_its_own
from quantities import Quantity, mean_of
from sklearn.metrics import roc_auc_score
from tqdm.auto import tqdm

from interp_rlhf.concepts.attention import Tokens, fit_attention
from interp_rlhf.concepts.linear import LinearProbe, folds

ROWS, TOKENS, SHIFT, FILLER = 300, 200, 8.0, 500
WIDTHS, SEEDS = (128, 576), 5


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
    quantities, by_width = [], {}
    for width in widths:
        seen = [planted(width, rows, arguments.seed + i) for i in tqdm(range(seeds), desc=f"planted, D = {width}")]
        by_width[str(width)] = seen
        for name, target in targets.items():
            values = [one[name.removeprefix("planted_")] for one in seen]
            note = f"{min(values):.3g} to {max(values):.3g}"
            quantities.append(mean_of(f"{name}_{width}", values, arguments.seed, target, note))
    return quantities, {
        "fit": rows, "test": rows, "tokens": TOKENS, "shift": SHIFT, "filler": FILLER, "seeds": seeds, "by_width": by_width,
    }  # fmt: skip
