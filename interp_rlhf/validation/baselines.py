"""What needs no model inside: text baselines that a probe should be seen beside.

In: texts and labels of the fit, texts of the check. Out: scores of the check's rows. None of them gates a card: a concept
that words alone give away is still a concept, but then a word list would have done.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np


def tfidf(train: Sequence[str], labels: np.ndarray, test: Sequence[str]) -> np.ndarray:
    """Scores of a logistic regression on TF-IDF of words and word pairs, fitted on the probe's own examples."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b|[^\w\s]"),
        LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced"),
    )
    return np.asarray(model.fit(list(train), labels).decision_function(list(test)))


def length(train: Sequence[str], labels: np.ndarray, test: Sequence[str]) -> np.ndarray:
    """Number of characters, signed by what the fit's examples say of it."""
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
