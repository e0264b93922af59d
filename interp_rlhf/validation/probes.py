"""Probes that a check fits before it looks at other examples, and one pass that scores them all.

In: a model, the fit's examples, a card's readout. Then other examples. Out: scores of the card, of the controls and of probes on
the embedding and the prompt, and the model's likelihood. Every probe is read at the positions and with the pooling that the
reward will use. It must not know what the scores are compared for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..activations.collect import read_activations, read_pooled, read_with_likelihood, token_weights
from ..activations.hook_points import embedding_point
from ..concepts.attention import Query, Tokens
from ..concepts.linear import LinearProbe
from ..concepts.pooling import pool
from .controls import Controls

if TYPE_CHECKING:
    from ..activations.batch import TokenBatch
    from ..concepts.examples import Examples
    from ..concepts.latents import Latents
    from ..concepts.readout import Readout

CHECKED_ROWS = 256


@dataclass(frozen=True, eq=False)
class CheckRead:
    """Scores of one pass over examples.

    Attributes:
        card (`np.ndarray` of shape (N,)): the card's score.
        log_odds (`np.ndarray` of shape (N,)): the card's score without its transform.
        controls (`np.ndarray` of shape (N, C)): pooled scores of the controls.
        embedding, prompt (`np.ndarray` of shape (N,)): scores of a probe on mean embeddings, and of a probe at the prompt's last
            token.
        likelihood (`dict[str, np.ndarray]`): `mean` and `sum` of the log-probs of the counted tokens.
    """

    card: np.ndarray
    log_odds: np.ndarray
    controls: np.ndarray
    embedding: np.ndarray
    prompt: np.ndarray
    likelihood: dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class CheckProbes:
    """Controls and baseline probes, fitted on the fit's examples before any other is read.

    Attributes:
        controls (`Controls`): probes without knowledge of the concept.
        embedding (`tuple[str, np.ndarray]`): hook point and weight (D,) of a probe on mean embeddings.
        prompt (`np.ndarray` of shape (D,)): weight of a probe at the prompt's last token; zeros without prompts.
    """

    controls: Controls
    embedding: tuple[str, np.ndarray]
    prompt: np.ndarray

    @classmethod
    def on(
        cls, model: Any, batch: TokenBatch, examples: Examples, readout: Readout, seed: int,
        permuted: tuple[Latents, np.ndarray] | None, progress: str | None,
    ) -> CheckProbes:  # fmt: skip
        """Fit them in one pass over the fit's examples (two under `attention`)."""
        assert readout.header is not None
        how = "last" if readout.header.pooling == "last" else "mean"
        point, embedding = readout.hook_point, embedding_point(model)
        pooled = {
            name: values.double().numpy() for name, values in read_pooled(
                model, batch,
                {
                    "features": (point, token_weights(batch, how)), "embedding": (embedding, token_weights(batch, "mean")),
                    "prompt": (point, token_weights(batch, "before")),
                },
                progress=progress,
            ).items()
        }  # fmt: skip
        center = None
        if readout.query is not None:
            pooled["features"], center = _attended(model, batch, readout)
        labels, groups = examples.labels, examples.groups

        def weight(name: str) -> np.ndarray:
            return LinearProbe(readout.header.method, seed=seed).fit(pooled[name], labels, groups)[0]  # type: ignore[union-attr]

        return cls(
            Controls(readout, pooled["features"], labels, seed, permuted, center),
            (embedding, weight("embedding")),
            weight("prompt") if any(examples.prompts) else np.zeros(pooled["prompt"].shape[1]),
        )

    def read(self, model: Any, batch: TokenBatch, readout: Readout, progress: str | None) -> CheckRead:
        """Scores of examples, by one whole forward pass. Chunks of rows keep the per-token scores of so many controls small."""
        parts: list[list[np.ndarray]] = []
        plain = replace(readout, transform=None)
        for start in range(0, len(batch), CHECKED_ROWS):
            part = batch.part(slice(start, start + CHECKED_ROWS))
            scores, pooled, log_probs = read_with_likelihood(
                model, part, [readout, self.controls],
                {
                    "embedding": (self.embedding[0], token_weights(part, "mean")),
                    "prompt": (readout.hook_point, token_weights(part, "before")),
                },
                reader="reference", progress=progress,
            )  # fmt: skip
            drawn = pool(scores["controls"].scores, part.completion_mask, self.controls.pooling)
            total = log_probs.double().sum(1).numpy()
            parts.append([
                np.array(readout.score(scores[readout.name]), dtype=float),
                np.array(plain.score(scores[readout.name]), dtype=float), drawn.double().numpy(),
                pooled["embedding"].double().numpy() @ self.embedding[1], pooled["prompt"].double().numpy() @ self.prompt,
                total / part.completion_mask.sum(1).numpy(), total,
            ])  # fmt: skip
        card, log_odds, controls, embedding, prompt, mean, total = map(np.concatenate, zip(*parts, strict=True))
        return CheckRead(card, log_odds, controls, embedding, prompt, {"mean": mean, "sum": total})


def _attended(model: Any, batch: TokenBatch, readout: Readout) -> tuple[np.ndarray, np.ndarray]:
    """Activations (N, D) of the fit's examples, pooled by a readout's query, and the mean (D,) over their tokens."""
    assert readout.query is not None
    values = read_activations(model, batch, [readout.hook_point])[readout.hook_point].numpy()
    center = values.mean(0, dtype=np.float64)
    query = Query(readout.query.double().numpy(), -readout.query_bias, center, float("nan"))
    return Tokens.of(values, batch.completion_mask.sum(1).numpy()).attended(query), center
