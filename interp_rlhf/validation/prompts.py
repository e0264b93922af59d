"""Tells whether a score depends on the answer or on the prompt: answers are put under other prompts and read again.

In: examples with prompts, a readout. Out: scores of the original pairs, and of each prompt with another prompt's answer. It must
not know how the scores are judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..activations.read import read
from ..concepts.examples import Examples
from .statistics import shares

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..activations.batch import TokenBatch
    from ..concepts.readout import Readout

SWAPPED_PROMPTS = 60
FEWEST_SWAPPED = 10


@dataclass(frozen=True, eq=False)
class Swapped:
    """Scores of M prompts with their own answers and with those of other prompts.

    Attributes:
        labels (`np.ndarray` of shape (M,)), groups (`list[str]`): label and group of the original pair.
        own, other (`np.ndarray` of shape (M,)): scores with the original answer, and with another prompt's.
    """

    labels: np.ndarray
    groups: list[str]
    own: np.ndarray
    other: np.ndarray

    @property
    def share(self) -> float:
        """Share of the score's variance within a prompt, which is due to the answer. Near 0, the score is a function of the
        prompt; near 1, the prompt does not matter. NaN if the score is constant.

        Half the mean squared difference of two answers under one prompt, over the variance of all.
        """
        return shares(self.own, self.other, np.ones((1, len(self.own))))[0]


def read_swapped(
    model: Any,
    rows: Examples,
    scores: np.ndarray,
    tokens: Callable[[Examples], TokenBatch],
    readout: Readout,
    seed: int,
    progress: str | None,
) -> Swapped | None:
    """Up to 60 prompts drawn at random, each with its own answer and with another prompt's. None with fewer than ten prompts.

    Args:
        scores (`np.ndarray` of shape (N,)): scores of the original rows.
        tokens (`Callable`): makes a batch of examples.
    """
    form = {i: swappable(row) for i, row in enumerate(rows.rows)}
    groups = rows.groups
    first: dict[str, int] = {}
    rng = np.random.default_rng(seed)
    for i in rng.permutation(len(rows)).tolist():
        if form[i] is not None:
            first.setdefault(groups[i], i)
    drawn = list(first.values())[:SWAPPED_PROMPTS]
    kinds: dict[str | None, list[int]] = {}
    for i in drawn:
        kinds.setdefault(form[i], []).append(i)
    places, partners = [], []
    for same in kinds.values():  # each takes the answer of the next one, the last that of the first
        if len(same) > 1:
            places += same
            partners += same[1:] + same[:1]
    if len(places) < FEWEST_SWAPPED:
        return None
    mixed = [with_answer(rows.rows[i], rows.rows[j]) for i, j in zip(places, partners, strict=True)]
    labels = rows.labels[places]
    batch = tokens(Examples(mixed, labels, rows.label_names, rows.fingerprint))
    swapped = read(model, batch, [readout], reader="reference", progress=progress)[readout.name]
    return Swapped(labels, [groups[i] for i in places], scores[places], np.array(readout.score(swapped), dtype=float))


def swappable(row: dict[str, Any]) -> str | None:
    """The form of a row whose answer can stand under another prompt of that form; None without a prompt."""
    if "messages" in row:
        return "messages" if len(row["messages"]) > 1 else None
    if not row.get("prompt"):
        return None
    kind = "text" if isinstance(row["completion"], str) else "messages"
    return f"prompt and {kind}{' and ids' if 'completion_ids' in row else ''}"


def with_answer(row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A row with the answer of another row."""
    if "messages" in row:
        return {**row, "messages": [*list(row["messages"])[:-1], list(other["messages"])[-1]]}
    answer: dict[str, Any] = {key: other[key] for key in ("completion", "completion_ids") if key in other}
    return {**row, **answer}
