"""Attention pooling: a query that learns where in a completion a concept stands.

In: activations of the counted tokens of each example, labels. Out: a query, and attended activations (N, D) on which a linear
probe is fitted as on means. The pooled score is Σ_t a_t (⟨h_t, w⟩ + b) with a = softmax_t ⟨h_t, q⟩ over the counted tokens.

The query is not learned by gradient descent, which on a few hundred examples fits their noise, but by turns: the query is the
probe's own direction at some sharpness, the probe is fitted anew on what that attends to, and so on, while the sharpness grows.
It starts next to mean pooling. Scores out of fold say where to stop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from .linear import STRENGTHS, CrossValidated, Path, fit_path, log_loss

# Standard deviations of ⟨h, q⟩ over tokens, each with the number of turns taken at it.
SHARPNESS = ((0.25, 2), (0.5, 2), (1.0, 6), (1.5, 2), (2.0, 2), (3.0, 2))
# Regularization of the turns: where to look is found with a strong one, what to make of it is chosen after.
TURNING = 0.001


@dataclass(frozen=True, eq=False)
class Tokens:
    """Activations of the counted tokens of examples.

    Attributes:
        values (`np.ndarray` of shape (M, D)): float32, in the order of examples and of tokens in each.
        starts (`np.ndarray` of shape (N + 1,)): where each example begins; no example is empty.
    """

    values: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, lengths: np.ndarray) -> Tokens:
        """Tokens of examples that have so many each."""
        return cls(values, np.concatenate([[0], np.cumsum(lengths)]))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def rows(self, rows: np.ndarray) -> Tokens:
        """Some of the examples."""
        lengths = np.diff(self.starts)[rows]
        return Tokens.of(np.concatenate([self.values[self.starts[i] : self.starts[i + 1]] for i in rows]), lengths)

    def pooled(self, pooling: str) -> np.ndarray:
        """Mean or last activation (N, D) of each example, float64."""
        if pooling == "last":
            return self.values[self.starts[1:] - 1].astype(np.float64)
        return self._weighted(np.repeat(1 / np.diff(self.starts), np.diff(self.starts)))

    def attended(self, query: np.ndarray) -> np.ndarray:
        """Activations (N, D) of each example, averaged by softmax ⟨h_t, q⟩, float64."""
        logits = (self.values @ query.astype(np.float32)).astype(np.float64)
        highest = np.maximum.reduceat(logits, self.starts[:-1])
        lengths = np.diff(self.starts)
        weights = np.exp(logits - np.repeat(highest, lengths))
        return self._weighted(weights / np.repeat(np.add.reduceat(weights, self.starts[:-1]), lengths))

    def _weighted(self, weights: np.ndarray) -> np.ndarray:
        from scipy.sparse import csr_matrix

        places = np.arange(len(weights))
        matrix = csr_matrix((weights.astype(np.float32), places, self.starts), shape=(len(self), len(weights)))
        return np.asarray(matrix @ self.values, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Attended:
    """A query, and the probe on what it attends to.

    Attributes:
        query (`np.ndarray` of shape (D,)): of the fit on all examples.
        sharpness (`float`): standard deviation of ⟨h, q⟩ over the fit's tokens.
        queries (`np.ndarray` of shape (F, D)): of the fits on all folds but one.
        chosen (`CrossValidated`): see there.
    """

    query: np.ndarray
    sharpness: float
    queries: np.ndarray
    chosen: CrossValidated


def stages(tokens: Tokens, labels: np.ndarray, method: str) -> Iterator[tuple[float, np.ndarray, np.ndarray]]:
    """Sharpness, query (D,) and attended activations (N, D) of each stage, blunt to sharp."""
    weight = fit_path(tokens.pooled("mean"), labels, method, (TURNING,)).weights[0]
    for sharpness, turns in SHARPNESS:
        for _ in range(turns):
            spread = float((tokens.values @ weight.astype(np.float32)).std(dtype=np.float64))
            query = sharpness * weight / max(spread, 1e-30)
            attended = tokens.attended(query)
            weight = fit_path(attended, labels, method, (TURNING,)).weights[0]
        yield sharpness, query, attended


def fit_attention(
    tokens: Tokens, labels: np.ndarray, splits: Sequence[tuple[np.ndarray, np.ndarray]], method: str
) -> tuple[Attended, np.ndarray]:
    """A query whose sharpness and whose probe's regularization have the lowest log-loss out of fold.

    Returns:
        The query, and the attended activations (N, D) of all examples.
    """
    strengths = STRENGTHS if method == "logistic_regression" else STRENGTHS[:1]
    scores = np.zeros((len(SHARPNESS), len(strengths), len(labels)))
    kept: list[list[tuple[np.ndarray, Path]]] = []
    for train, test in splits:
        others = tokens.rows(test)
        own = []
        for number, (_, query, attended) in enumerate(stages(tokens.rows(train), labels[train], method)):
            path = fit_path(attended, labels[train], method, strengths)
            scores[number][:, test] = path.scores(others.attended(query))
            own.append((query, path))
        kept.append(own)
    losses = np.array([[log_loss(labels, values) for values in of_stage] for of_stage in scores])
    stage, place = map(int, np.unravel_index(losses.argmin(), losses.shape))
    best = [own[stage] for own in kept]
    chosen = CrossValidated(
        strengths[place], scores[stage, place], np.stack([path.weights[place] for _, path in best]),
        np.array([path.biases[place] for _, path in best]), float(losses.min()),
    )  # fmt: skip
    sharpness, query, attended = next(islice(stages(tokens, labels, method), stage, None))
    return Attended(query, sharpness, np.stack([query for query, _ in best]), chosen), attended
