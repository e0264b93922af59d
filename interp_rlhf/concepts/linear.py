"""Linear probes. Their regularization, and the meaning of their scores, are found on rows that a fit did not see.

In: features (N, D) of examples, labels, and the prompt of each example. Out: weights, biases, and scores out of fold. It must not
know models: features may be pooled activations or pooled latents.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

METHODS = ("logistic_regression", "difference_of_means")
# Inverse strengths of the L2 penalty on standardized features, from strong to weak. At the strongest penalty the weight points
# from the mean of one class to the mean of the other. At the weakest it separates the examples, and follows their noise.
STRENGTHS = tuple(10.0**power for power in range(-5, 2))
FOLDS = 5
# Scores out of fold separate the labels if chance gives such a high AUROC in at most this share of cases.
BY_CHANCE = 0.025


class LinearProbe:
    """A linear classifier on pooled activations: one weight and one bias on raw activations.

    The mean over tokens commutes with a linear map, so the mean of its per-token scores is exactly the fitted score.

    Args:
        method (`str`, defaults to `"logistic_regression"`): `difference_of_means` is the direction from the mean of one class to
            the mean of the other, on standardized activations, with the threshold half-way (Marks & Tegmark, arXiv 2310.06824).
            Deviation: they do not standardize. Without it, the few dimensions with massive activations decide alone.
        regularization (`float`, *optional*): inverse strength of the L2 penalty (scikit-learn's `C`). By default the one of
            `STRENGTHS` whose scores out of fold have the lowest log-loss.
        seed (`int`, defaults to 0): seed of the folds.

    Raises:
        `ValueError`: an unknown method, or a regularization that is not a finite number above 0.

    Example:
        >>> import numpy as np
        >>> from interp_rlhf import LinearProbe
        >>> labels = np.array([0, 1] * 20)
        >>> means = np.random.default_rng(0).normal(size=(40, 3)) + np.outer(labels, [4.0, 0.0, 0.0])
        >>> weight, bias = LinearProbe().fit(means, labels)
        >>> int(np.argmax(np.abs(weight)))  # the classes differ in the first dimension
        0
        >>> bool(((means @ weight + bias > 0) == labels).mean() > 0.9)
        True
    """

    def __init__(self, method: str = "logistic_regression", regularization: float | None = None, seed: int = 0):
        if method not in METHODS:
            raise ValueError(f"`method` is {method!r} – expected one of {', '.join(METHODS)}.")
        number = isinstance(regularization, int | float) and not isinstance(regularization, bool)
        if regularization is not None and not (number and 0 < regularization < float("inf")):
            raise ValueError(
                f"`regularization` is {regularization!r} – expected a finite number above 0. Pass None to choose it by "
                "cross-validation."
            )
        self.method, self.regularization, self.seed = method, regularization, seed

    def fit(
        self, means: np.ndarray, labels: np.ndarray, groups: Sequence[str] | None = None
    ) -> tuple[np.ndarray, float]:
        """Weight (D,) and bias on raw activations.

        Args:
            means (`np.ndarray` of shape (N, D)): pooled activations.
            labels (`np.ndarray` of shape (N,)): 0 or 1.
            groups (`Sequence[str]`, *optional*): the prompt of each row. Rows of one prompt stay in one fold. By default every
                row is its own group.

        Raises:
            `ValueError`: activations that are not finite, or too few prompts to choose the regularization on.
        """
        strength = self.regularization
        if strength is None and self.method == "logistic_regression":
            splits = folds(labels, list(map(str, range(len(labels)))) if groups is None else groups, self.seed)
            strength = cross_validate(means, labels, splits, self.method).strength
        path = fit_path(means, labels, self.method, (strength or STRENGTHS[0],))
        return path.weights[0], float(path.biases[0])


@dataclass(frozen=True, eq=False)
class Path:
    """One linear classifier per strength of regularization, on raw features.

    Attributes:
        weights (`np.ndarray` of shape (S, D)), biases (`np.ndarray` of shape (S,)): strong to weak.
    """

    weights: np.ndarray
    biases: np.ndarray

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Scores (S, N) of features (N, D)."""
        return np.asarray(self.weights @ features.T + self.biases[:, None])


def fit_path(features: np.ndarray, labels: np.ndarray, method: str, strengths: Sequence[float] = STRENGTHS) -> Path:
    """Classifiers at every strength. Each fit starts from the solution of the one before it.

    Classes of all sizes weigh alike. A difference of means has no strength, so it is the same at each.

    Raises:
        `ValueError`: features that are not finite.
    """
    return fit_paths(features, [labels], method, strengths)[0]


def fit_paths(
    features: np.ndarray, labelings: Sequence[np.ndarray], method: str, strengths: Sequence[float] = STRENGTHS
) -> list[Path]:
    """`fit_path` for several labelings of the same features. The features are prepared once."""
    require_finite(features)
    center, spread = features.mean(0), spreads(features)
    standardized = (features - center) / spread
    # The weight is a sum of examples. With fewer examples than dimensions, it is fitted in the space that they span.
    basis = None
    if method == "logistic_regression" and len(standardized) < standardized.shape[1]:
        values, vectors = np.linalg.eigh(standardized @ standardized.T)
        kept = values > max(1e-12 * values[-1], 1e-30)  # none where all features are alike
        sizes = np.sqrt(values[kept])
        basis = standardized.T @ (vectors[:, kept] / sizes)  # (D, R), orthonormal
        standardized = vectors[:, kept] * sizes
    paths = []
    for labels in labelings:
        if method == "difference_of_means":
            one, other = standardized[labels == 1].mean(0), standardized[labels == 0].mean(0)
            weights = np.repeat((one - other)[None], len(strengths), axis=0)
            biases = -weights @ (one + other) / 2
        else:
            weights, biases = _logistic(standardized, labels, strengths)
            weights = weights if basis is None else weights @ basis.T
        weights = weights / spread
        paths.append(Path(weights, biases - weights @ center))
    return paths


def require_finite(features: np.ndarray) -> None:
    """Raises `ValueError` for features (N, D) that are not finite."""
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features).all(axis=1)).sum())
        raise ValueError(
            f"{bad} of {len(features)} activations are NaN or infinite – expected finite numbers. Load the model in "
            "float32 or bfloat16 and check its weights."
        )


def spreads(features: np.ndarray) -> np.ndarray:
    """Standard deviation of each dimension (D,). A constant dimension has an infinite one, so that it gets no weight."""
    spread = features.std(0)
    return np.where(spread > 1e-6 * spread.max(initial=1e-12), spread, np.inf)


def _logistic(
    standardized: np.ndarray, labels: np.ndarray, strengths: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.linear_model import LogisticRegression

    if standardized.shape[1] == 0:
        return np.zeros((len(strengths), 0)), np.zeros(len(strengths))
    model = LogisticRegression(class_weight="balanced", warm_start=True, max_iter=1000)
    weights, biases = [], []
    for strength in strengths:
        model.C = strength
        model.fit(standardized, labels)
        weights.append(model.coef_[0].copy())
        biases.append(float(model.intercept_[0]))
    return np.stack(weights), np.array(biases)


def folds(labels: np.ndarray, groups: Sequence[str], seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Train and test rows of each fold. Rows of one prompt stay together, and every training part has both labels.

    Raises:
        `ValueError`: there are too few prompts for that.
    """
    counts = np.bincount(labels, minlength=2)
    splits = []
    if counts.min() >= FOLDS and len(set(groups)) >= FOLDS:
        splits = group_splits(labels, groups, FOLDS, seed)
    splits = [(train, test) for train, test in splits if len(test)]
    if len(splits) < 2 or any(len(set(labels[train])) < 2 for train, _ in splits):
        raise ValueError(
            f"{len(set(groups))} prompts with {counts[0]} and {counts[1]} examples of the two labels – expected at least {FOLDS} "
            "prompts, and each label under several of them: regularization and calibration are found on prompts that a fit has "
            "not seen. Add examples with other prompts."
        )
    return splits


def group_splits(
    labels: np.ndarray, groups: Sequence[str], count: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Train and test rows of `count` folds. Rows of one group stay together, and the labels are spread evenly."""
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    return list(splitter.split(np.zeros(len(labels)), labels, groups))


@dataclass(frozen=True, eq=False)
class CrossValidated:
    """Scores out of fold, and the fits that gave them: each on all folds except the one that it scores.

    Attributes:
        strength (`float`): the chosen regularization, whose scores have the lowest log-loss.
        scores (`np.ndarray` of shape (N,)): scores out of fold at that strength.
        weights (`np.ndarray` of shape (F, D)), biases (`np.ndarray` of shape (F,)): one probe per fold.
        loss (`float`): their log-loss in nats. Classes weigh alike.
    """

    strength: float
    scores: np.ndarray
    weights: np.ndarray
    biases: np.ndarray
    loss: float


def cross_validate(
    features: np.ndarray, labels: np.ndarray, splits: Sequence[tuple[np.ndarray, np.ndarray]], method: str,
    strengths: Sequence[float] = STRENGTHS,
) -> CrossValidated:  # fmt: skip
    """Scores out of fold at the strength whose log-loss is lowest.

    Raises:
        `ValueError`: features that are not finite.
    """
    require_finite(features)
    if method == "difference_of_means":
        strengths = strengths[:1]
    paths = [fit_path(features[train], labels[train], method, strengths) for train, _ in splits]
    scores = np.zeros((len(strengths), len(labels)))
    for path, (_, test) in zip(paths, splits, strict=True):
        scores[:, test] = path.scores(features[test])
    of_strength = [log_loss(labels, values) for values in scores]
    best = int(np.argmin(of_strength))
    return CrossValidated(
        strengths[best], scores[best], np.stack([path.weights[best] for path in paths]),
        np.array([path.biases[best] for path in paths]), of_strength[best],
    )  # fmt: skip


def equal_classes(labels: np.ndarray) -> np.ndarray:
    """Weights (N,) of the rows. They sum to one half for each label; both labels must occur."""
    positive = labels.sum()
    return np.where(labels == 1, 0.5 / positive, 0.5 / (len(labels) - positive))


def losses(labels: np.ndarray, log_odds: np.ndarray) -> np.ndarray:
    """Log-loss of each row (N,) in nats."""
    return np.logaddexp(0.0, np.where(labels == 1, -log_odds, log_odds))


def log_loss(labels: np.ndarray, log_odds: np.ndarray) -> float:
    """Mean negative log-likelihood in nats. Both labels weigh alike. Scores of 0 have ln 2 = 0.693."""
    return float(equal_classes(labels) @ losses(labels, log_odds))


def fold_aurocs(
    labels: np.ndarray, scores: np.ndarray, splits: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[float, float]:
    """Mean and standard deviation of the AUROC over folds. If no fold has both labels, the AUROC of all rows."""
    from sklearn.metrics import roc_auc_score

    aurocs = [roc_auc_score(labels[test], scores[test]) for _, test in splits if len(set(labels[test])) == 2]
    if not aurocs:
        aurocs = [roc_auc_score(labels, scores)]
    return float(np.mean(aurocs)), float(np.std(aurocs))


def separates(labels: np.ndarray, scores: np.ndarray, groups: Sequence[str], candidates: int = 1) -> bool:
    """True if scores out of fold tell the labels apart better than chance, by a one-sided rank-sum test over prompts.

    Args:
        candidates (`int`, defaults to 1): number of candidates of which these scores were the best. The test gets stricter with
            it (Bonferroni).
    """
    from sklearn.metrics import roc_auc_score

    sides = [len({group for group, label in zip(groups, labels, strict=True) if label == side}) for side in (0, 1)]
    error = np.sqrt((sum(sides) + 1) / (12 * sides[0] * sides[1]))
    errors = NormalDist().inv_cdf(1 - BY_CHANCE / candidates)
    return bool(roc_auc_score(labels, scores) > 0.5 + errors * error)


def platt(labels: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """Scale and offset that make scores a log-odds at equal odds of both labels.

    Platt 1999: the logistic regression of the label on the score. The targets are (N₁ + 1) / (N₁ + 2) and 1 / (N₀ + 2) instead of
    1 and 0, so that scores that separate the labels do not become certain. Pass scores out of fold: on the rows that it was
    fitted on, the scores of a probe are too large.
    """
    from sklearn.linear_model import LogisticRegression

    spread = float(scores.std()) or 1.0
    counts = np.bincount(labels, minlength=2)
    target = np.where(labels == 1, (counts[1] + 1) / (counts[1] + 2), 1 / (counts[0] + 2))
    weight = len(labels) * equal_classes(labels)
    model = LogisticRegression(C=1e6, max_iter=1000)
    model.fit(
        np.tile(scores / spread, 2)[:, None], np.repeat([1, 0], len(labels)),
        sample_weight=np.concatenate([weight * target, weight * (1 - target)]),
    )  # fmt: skip
    return float(model.coef_[0, 0] / spread), float(model.intercept_[0])
