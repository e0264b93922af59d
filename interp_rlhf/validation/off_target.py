"""The off-target matrix: what steering one concept, or training on it, does to the scores and measures of the others.

In: readouts, prompts, measures, run logs. Out: cosines and moves. Steered answers are read by the model as it is, so that a score
says what the text became, not what was added to the activation. It must not know cards' files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..activations.changes import Change
from ..activations.read import read
from .behaviour import AnswerBehaviour
from .directions import Spread, unit_direction
from .jobs import Job
from .measures import values_of
from .statistics import MIN_PROMPTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..concepts.readout import Readout
    from .jobs import Done


@dataclass(frozen=True)
class OffTarget:
    """What several concepts do to each other.

    Attributes:
        names (`list[str]`): concepts K.
        cosine (`list[list[float | None]]`): (K, K), of directions at one hook point; None across hook points.
        weighted_cosine (`list[list[float]]`): (K, K), correlation of the token scores over the model's own answers.
        targets (`list[str]`): concepts and measures, the columns of `steering` and `training`.
        steering (`list[list[float]]`): (K, targets), the row's concept steered from −dose to +dose: median over prompts of the
            change of the column's score, in standard deviations of that score over the answers without a change.
        own (`list[float | None]`): for each concept, the largest move of another target over its own move.
        training (`dict[str, list[float | None]]`): run to the shift of each column in that run's last drift evaluation, in
            standard deviations; None where it was not watched.
        dose (`float`), prompts (`int`): what was done.
    """

    names: list[str]
    cosine: list[list[float | None]]
    weighted_cosine: list[list[float]]
    targets: list[str]
    steering: list[list[float]]
    own: list[float | None]
    dose: float
    prompts: int
    training: dict[str, list[float | None]] = field(default_factory=dict)


def off_target(
    readouts: Sequence[Readout], model: Any, tokenizer: Any, prompts: Sequence[Any],
    measures: Mapping[str, Callable[[str], float]] | None = None, *, dose: float = 4.0, max_new_tokens: int = 24,
    batch_rows: int = 64, shifts: Mapping[str, Mapping[str, float]] | None = None, chat: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> OffTarget:  # fmt: skip
    """Cosines of several concepts, and what steering each does to the others.

    Args:
        readouts (`Sequence[Readout]`): at least two, made on this model.
        model (`nn.Module`), tokenizer: the model.
        prompts (`Sequence`): at least 10 prompts, plain or conversational.
        measures (`dict[str, Callable]`, *optional*): independent measures of an answer's text, as further columns.
        dose (`float`, defaults to 4): in standard deviations of the activation along each direction.
        max_new_tokens (`int`), batch_rows (`int`): length of an answer, and answers that are generated at once.
        shifts (`dict[str, dict[str, float]]`, *optional*): run to monitor to shift, see `drift.shifts`.
        chat (`dict`, *optional*): `chat_template` and `chat_template_kwargs`.
        progress (`bool`): show progress bars.

    Returns:
        `OffTarget`: the matrix.

    Raises:
        `ValueError`: fewer than two readouts or ten prompts, two of one name, or a readout of another model.

    Example:
        >>> from interp_rlhf import off_target
        >>> from dataclasses import replace
        >>> prompts = [f"please {word}" for word in "help thanks sorry day night rain sun house tree walk".split()]
        >>> matrix = off_target([readout, replace(readout, name="copy")], model, tokenizer, prompts, max_new_tokens=4)
        >>> matrix.names, round(matrix.cosine[0][1], 3)
        (['concept', 'copy'], 1.0)
    """
    names = [readout.name for readout in readouts]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"The concepts are {names} – expected at least two, each name once.")
    if len(prompts) < MIN_PROMPTS:
        raise ValueError(f"{len(prompts)} prompts – expected at least {MIN_PROMPTS}.")
    for readout in readouts:
        readout.check_model(model)
    texts = _Answers(model, tokenizer, list(readouts), dict(measures or {}))
    how: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "batch_rows": batch_rows,
        "chat": dict(chat or {}),
        "progress": progress,
    }
    plain, rows = None, []
    for readout in readouts:
        behaviour = AnswerBehaviour(model, tokenizer, readout.hook_point, prompts, _length, "length", **how)
        if plain is None:
            plain = texts.scores(behaviour, [Job(i) for i in range(len(prompts))], behaviour.unchanged())
        rows.append(texts.moves(behaviour, readout, dose, plain))
    assert plain is not None
    columns = [*names, *(measures or {})]
    return OffTarget(
        names, _cosines(readouts), texts.correlations, columns, [[round(float(v), 4) for v in row] for row in rows],
        [_share(row, i) for i, row in enumerate(rows)], dose, len(prompts),
        {run: [shift.get(name) for name in columns] for run, shift in (shifts or {}).items()},
    )  # fmt: skip


class _Answers:
    """Scores of answers by the model as it is.

    Attributes:
        correlations (`list[list[float]]`): of the token scores over the answers without a change.
    """

    def __init__(
        self, model: Any, tokenizer: Any, readouts: list[Readout], measures: dict[str, Callable[[str], float]]
    ):
        self.model, self.tokenizer, self.readouts, self.measures = model, tokenizer, readouts, measures
        self.correlations: list[list[float]] = []

    def scores(self, behaviour: AnswerBehaviour, jobs: Sequence[Job], finished: Sequence[Done]) -> np.ndarray:
        """Scores (J, targets) of answers; NaN for a readout of an empty answer."""
        batch = behaviour.batch_of(jobs, finished)
        found = read(self.model, batch, self.readouts)
        pooled = [found[readout.name] for readout in self.readouts]
        if not self.correlations:
            tokens = torch.stack([one.scores[..., 0][one.mask] for one in pooled]).double()
            self.correlations = [[round(float(v), 4) for v in row] for row in torch.corrcoef(tokens)]
        columns = [
            [np.nan if score is None else score for score in readout.score(one)]
            for readout, one in zip(self.readouts, pooled, strict=True)
        ]
        texts = [done.text for done in finished]
        columns += [values_of(name, measure, texts) for name, measure in self.measures.items()]
        return np.array(columns, dtype=float).T

    def moves(self, behaviour: AnswerBehaviour, readout: Readout, dose: float, plain: np.ndarray) -> np.ndarray:
        """Median move (targets,) of every score from −dose to +dose along a readout's direction, in its standard deviations."""
        direction = unit_direction(readout)
        step = dose * Spread(torch.cat(behaviour.activations())).sigma(direction) * direction
        jobs = [Job(i, Change.steering(side * step)) for side in (-1, 1) for i in range(behaviour.prompts)]
        finished = behaviour.run(jobs, f"steering {readout.name}")
        low, high = np.split(self.scores(behaviour, jobs, finished), 2)
        spread = np.nanstd(plain, axis=0)
        return np.asarray(np.nanmedian(high - low, axis=0) / np.where(spread > 0, spread, np.inf))


def _length(text: str) -> float:
    return float(len(text))


def _cosines(readouts: Sequence[Readout]) -> list[list[float | None]]:
    rows = [unit_direction(readout) for readout in readouts]
    return [
        [
            round(float(a @ b), 4) if one.hook_point == other.hook_point and len(a) == len(b) else None
            for b, other in zip(rows, readouts, strict=True)
        ]
        for a, one in zip(rows, readouts, strict=True)
    ]


def _share(row: np.ndarray, own: int) -> float | None:
    """Largest move of another target over the own move; None without an own move."""
    others = np.abs(np.delete(row, own))
    return round(float(others.max() / abs(row[own])), 4) if row[own] else None
