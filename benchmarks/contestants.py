"""The ways of fitting a probe that are compared: ours, that of version 0.2, scikit-learn's and probelab's.

In: features (N, D), labels and a seed. Out: a function from new features to log-odds, and how good these are. It must not know
models and texts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from interp_rlhf.concepts.linear import LinearProbe, cross_validate, folds, platt

METHOD = "logistic_regression"
ORDER_ONLY = 1e-9  # scale of a score that has no calibration
LogOdds = Callable[[np.ndarray], np.ndarray]
Contestant = Callable[[np.ndarray, np.ndarray, int], LogOdds]


def prior(labels: np.ndarray) -> float:
    """Log of how many positives there are for each negative."""
    return float(np.log(labels.mean() / (1 - labels.mean())))


def each_its_own(labels: np.ndarray) -> list[str]:
    """Groups of rows that share no prompt."""
    return list(map(str, range(len(labels))))


def calibration(labels: np.ndarray, out_of_fold: np.ndarray) -> tuple[float, float]:
    """Scale and offset as `fit_probe` finds them.

    If the scores out of fold do not rise with the label, `fit_probe` gives no calibration. Then only the order of the scores is
    kept, and each log-odds is that of the labels.
    """
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
# Each comparison by its name. If there are several contestants, the better one is compared.
OTHERS = {
    "sklearn_cv": ("sklearn_cv_raw", "sklearn_cv_standardized"),
    "sklearn_cv_log_loss": ("sklearn_cv_log_loss_raw", "sklearn_cv_log_loss_standardized"),
    "probelab": ("probelab",),
    "0_2": ("0_2",),
}


def judged(log_odds: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """AUROC, log-loss in nats, Brier score, and the slope of the labels on the log-odds (`None` if all log-odds are equal)."""
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
