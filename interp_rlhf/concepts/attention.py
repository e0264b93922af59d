"""Attention pooling: a query that learns where in a completion a concept stands.

In: activations of the counted tokens of each example, labels. Out: a query, and attended activations (N, D) on which a linear
probe is fitted as on means. The pooled score is Σ_t a_t ⟨h_t − μ, w⟩ with a_t = exp z_t / (1 + Σ_s exp z_s), z_t = ⟨h_t, q⟩ − c,
over the counted tokens; μ is the mean activation. The 1 is a sink that counts like an average token. Without it, the score of an
example without the concept would be the extreme of its noise, and filler makes that more extreme. It must not know models.

The query is not learned by gradient descent, which fits the noise of a few hundred examples. Query and probe take turns: the
query is the probe's direction, scaled to some sharpness, and the probe is fitted again on the attended activations. The sharpness
grows with the turns; the first turn is close to mean pooling. Out-of-fold scores choose the last turn and the weight of the sink.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from .linear import (
    STRENGTHS,
    CrossValidated,
    fit_path,
    log_loss,
    require_finite,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .linear import (
        Path,
    )

# Standard deviations of ⟨h, q⟩ over tokens, each with the number of turns taken at it.
SHARPNESS = ((0.25, 2), (0.5, 2), (1.0, 6), (1.5, 2), (2.0, 2), (3.0, 2))
# Regularization of the turns. It is strong while the query is found; the final probe chooses its own.
TURNING = 0.001
# The sink's logit, relative to the lower quartile over examples of log Σ exp ⟨h, q⟩. The first gives the sink almost no weight.
# The second gives it more weight than the tokens of most examples without the concept, and is tried from a sharpness of 1.
SINKS = (-30.0, 4.0)
SINK_FROM = 1.0


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
        """Tokens of examples with these numbers of tokens."""
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

    def attended(self, query: Query) -> np.ndarray:
        """Sum (N, D) of each example's activations minus μ, weighted by attention, float64."""
        logits = self._logits(query.vector) - query.sink
        highest = np.maximum(np.maximum.reduceat(logits, self.starts[:-1]), 0)
        lengths = np.diff(self.starts)
        weights = np.exp(logits - np.repeat(highest, lengths))
        total = np.exp(-highest) + np.add.reduceat(weights, self.starts[:-1])
        weights /= np.repeat(total, lengths)
        shares = np.add.reduceat(weights, self.starts[:-1])
        return self._weighted(weights) - shares[:, None] * query.center

    def log_sum_exp(self, vector: np.ndarray) -> np.ndarray:
        """log Σ_t exp ⟨h_t, q⟩ (N,) of each example."""
        logits = self._logits(vector)
        highest = np.maximum.reduceat(logits, self.starts[:-1])
        lengths = np.diff(self.starts)
        return np.asarray(
            highest + np.log(np.add.reduceat(np.exp(logits - np.repeat(highest, lengths)), self.starts[:-1]))
        )

    def _logits(self, vector: np.ndarray) -> np.ndarray:
        return np.asarray(self.values @ vector.astype(np.float32), dtype=np.float64)

    def _weighted(self, weights: np.ndarray) -> np.ndarray:
        from scipy.sparse import csr_matrix

        places = np.arange(len(weights))
        matrix = csr_matrix((weights.astype(np.float32), places, self.starts), shape=(len(self), len(weights)))
        return np.asarray(matrix @ self.values, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Query:
    """The query of an attention pooling.

    Attributes:
        vector (`np.ndarray` of shape (D,)): q.
        sink (`float`): c, the sink's logit.
        center (`np.ndarray` of shape (D,)): μ, the mean over the fit's tokens.
        sharpness (`float`): standard deviation of ⟨h, q⟩ over the fit's tokens.
    """

    vector: np.ndarray
    sink: float
    center: np.ndarray
    sharpness: float


@dataclass(frozen=True, eq=False)
class Attended:
    """A query, and the cross-validated probe on the activations that it attends to.

    Attributes:
        query (`Query`): the query of the fit on all examples.
        features (`np.ndarray` of shape (N, D)): attended activations.
        chosen (`CrossValidated`): the probe. Its out-of-fold scores leave out the biases, as the readout's scores do.
    """

    query: Query
    features: np.ndarray
    chosen: CrossValidated


def queries(tokens: Tokens, labels: np.ndarray, method: str) -> Iterator[tuple[Query, np.ndarray]]:
    """Queries from blunt to sharp, without and with a sink, each with the activations (N, D) that it attends to."""
    center = tokens.values.mean(0, dtype=np.float64)
    weight = fit_path(tokens.pooled("mean"), labels, method, (TURNING,)).weights[0]
    for sharpness, turns in SHARPNESS:
        for _ in range(turns):
            spread = float((tokens.values @ weight.astype(np.float32)).std(dtype=np.float64))
            vector = sharpness * weight / max(spread, 1e-30)
            floor = float(np.quantile(tokens.log_sum_exp(vector), 0.25))
            blunt = Query(vector, floor + SINKS[0], center, sharpness)
            attended = tokens.attended(blunt)
            weight = fit_path(attended, labels, method, (TURNING,)).weights[0]
        yield blunt, attended
        if sharpness >= SINK_FROM:
            deep = Query(vector, floor + SINKS[1], center, sharpness)
            yield deep, tokens.attended(deep)


def fit_attention(
    tokens: Tokens, labels: np.ndarray, splits: Sequence[tuple[np.ndarray, np.ndarray]], method: str,
    strengths: Sequence[float] = STRENGTHS,
) -> Attended:  # fmt: skip
    """The query and the probe with the lowest out-of-fold log-loss, over sharpness, sink and regularization."""
    require_finite(tokens.pooled("mean"))
    if method == "difference_of_means":
        strengths = strengths[:1]
    fold_paths: list[list[Path]] = []
    scores: list[np.ndarray] = []  # (S, N) per query
    for train, test in splits:
        others = tokens.rows(test)
        paths = []
        for number, (query, attended) in enumerate(queries(tokens.rows(train), labels[train], method)):
            path = fit_path(attended, labels[train], method, strengths)
            if number == len(scores):
                scores.append(np.zeros((len(strengths), len(labels))))
            scores[number][:, test] = path.scores(others.attended(query))
            paths.append(path)
        fold_paths.append(paths)
    losses = np.array([[log_loss(labels, values) for values in of_query] for of_query in scores])
    number, place = map(int, np.unravel_index(losses.argmin(), losses.shape))
    weights = np.stack([paths[number].weights[place] for paths in fold_paths])
    biases = np.array([paths[number].biases[place] for paths in fold_paths])
    out_of_fold = scores[number][place]
    for bias, (_, test) in zip(biases, splits, strict=True):
        out_of_fold[test] -= bias
    query, features = next(islice(queries(tokens, labels, method), number, None))
    return Attended(
        query, features, CrossValidated(strengths[place], out_of_fold, weights, biases, float(losses.min()))
    )
