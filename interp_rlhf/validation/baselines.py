"""Text baselines, which need no activations. A probe is reported next to them.

In: texts and labels of the fit, texts of the check. Out: scores of the check's rows. They do not gate a card: a concept that
words alone give away is still a concept, but then a word list would do. It must not know models.
"""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

import numpy as np

from ..concepts.linear import group_splits, log_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

TFIDF_FOLDS = 3
TFIDF_STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # scikit-learn's C


def tfidf(
    train: Sequence[str],
    labels: np.ndarray,
    test: Sequence[str],
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Scores of a logistic regression on TF-IDF of words, word pairs and runs of characters, fitted on the probe's own examples.

    Runs of 2 to 5 characters cross spaces: Chinese and Japanese have none, and endings count in other languages. `C` is chosen
    by log-loss in three folds of the fit's examples.

    Args:
        train (`Sequence[str]`), labels (`np.ndarray` of shape (N,)): the fit's texts, and 0 or 1 for each.
        test (`Sequence[str]`): M texts to score.
        groups (`Sequence[str]`, *optional*): prompt of each fit text. Folds are split by prompt, by default by text.
        seed (`int`, defaults to 0): seed of the folds.

    Returns:
        `np.ndarray` of shape (M,): log-odds of label 1, with both labels equally likely. Zeros if the fit's texts are all alike.
    """
    from sklearn.linear_model import LogisticRegression

    if len(set(train)) < 2:
        return np.zeros(len(test))
    fit, rest = _counted(train, test)
    if not fit.shape[1]:
        return np.zeros(len(test))

    def fitted(rows: np.ndarray, penalty: float) -> Any:
        model = LogisticRegression(C=penalty, solver="liblinear", class_weight="balanced", intercept_scaling=10.0)
        return model.fit(fit[rows], labels[rows])

    folds = _tfidf_folds(labels, groups, seed)
    everything = np.arange(len(labels))
    best = TFIDF_STRENGTHS[len(TFIDF_STRENGTHS) // 2]
    if folds:
        lost = []
        for penalty in TFIDF_STRENGTHS:
            log_odds = np.zeros(len(labels))
            for kept, held in folds:
                log_odds[held] = fitted(kept, penalty).decision_function(fit[held])
            lost.append(log_loss(labels, log_odds))
        best = TFIDF_STRENGTHS[int(np.argmin(lost))]
    return np.asarray(fitted(everything, best).decision_function(rest))


def _counted(train: Sequence[str], test: Sequence[str]) -> tuple[Any, Any]:
    """TF-IDF (rows, terms) of both, first words, then characters. The terms are those of the fit."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer

    sides = []
    for kind in (
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b|[^\w\s]"),
        TfidfVectorizer(analyzer="char", ngram_range=(2, 5), sublinear_tf=True, min_df=2),
    ):
        try:
            sides.append((kind.fit_transform(train), kind.transform(test)))
        except ValueError:  # no term: all texts are empty or blank
            continue
    if not sides:
        from scipy.sparse import csr_matrix

        return csr_matrix((len(train), 0)), csr_matrix((len(test), 0))
    return hstack([fit for fit, _ in sides]).tocsr(), hstack([rest for _, rest in sides]).tocsr()


def _tfidf_folds(labels: np.ndarray, groups: Sequence[str] | None, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Train and test rows of three folds by group; no fold if a part would lack a label."""
    names = list(groups) if groups is not None else [str(row) for row in range(len(labels))]
    of_label = [{name for name, other in zip(names, labels, strict=True) if other == label} for label in (0, 1)]
    if min(map(len, of_label)) < TFIDF_FOLDS:
        return []
    splits = group_splits(labels, names, TFIDF_FOLDS, seed)
    return splits if all(len(set(labels[train])) == 2 for train, _ in splits) else []


def length(train: Sequence[str], labels: np.ndarray, test: Sequence[str]) -> np.ndarray:
    """Number of characters, with the sign that separates the fit's examples."""
    return _signed(np.array([len(text) for text in train]), labels, np.array([len(text) for text in test]))


def punctuation(train: Sequence[str], labels: np.ndarray, test: Sequence[str]) -> np.ndarray:
    """Scores of a logistic regression on the rate of each punctuation mark, of digits, capitals and line breaks."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=1000, class_weight="balanced"))
    model.fit(_marks(train), labels)
    return np.asarray(model.decision_function(_marks(test)))


def _marks(texts: Sequence[str]) -> np.ndarray:
    rows = []
    for text in texts:
        size = max(len(text), 1)
        marks = [text.count(mark) / size for mark in string.punctuation]
        kinds = [sum(map(kind, text)) / size for kind in (str.isdigit, str.isupper)]
        rows.append([*marks, *kinds, text.count("\n") / size])
    return np.array(rows)


def _signed(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    return test if train[labels == 1].mean() >= train[labels == 0].mean() else -test
