"""Samples before and after training, side by side per prompt.

In: loaded runs. Out: one comparison per prompt, with the completions of every arm. It must not know HTML or Markdown.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

from .runs import Samples
from .text import show

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .runs import Run, Sample


@dataclass
class Cell:
    """One completion, and when it was sampled."""

    when: str
    completion: str
    scores: list[tuple[str, str]]
    pieces: list[tuple[str, int]] = field(default_factory=list)  # tokens with their level, −3 to 3


@dataclass
class Comparison:
    """All answers of the arms to one prompt, the earlier completion first."""

    prompt: str
    arms: list[tuple[str, list[Cell]]] = field(default_factory=list)


def token_readout(runs: Sequence[Run]) -> str | None:
    """The readout whose scores colour the tokens: the first that was logged."""
    return next((name for run in runs for one in run.samples for row in one.rows for name in row.token_scores), None)


def compare_samples(runs: Sequence[Run], readout: str | None = None) -> list[Comparison]:
    """Comparisons in the order in which the prompts first occur; tokens with levels of `readout` where it scored them.

    A prompt that was sampled several times is compared several times: its first completion before with its first
    completion after, and so on.
    """
    comparisons: dict[tuple[str, int], Comparison] = {}
    level = _levels(runs, readout)
    for run in runs:
        cells: dict[tuple[str, int], list[Cell]] = {}
        for samples in _ends(run.samples):
            seen: Counter[str] = Counter()
            for row in samples.rows:
                cells.setdefault((row.prompt, seen[row.prompt]), []).append(_answer(samples, row, readout, level))
                seen[row.prompt] += 1
        for key, answers in cells.items():
            comparisons.setdefault(key, Comparison(key[0])).arms.append((run.label, answers))
    return list(comparisons.values())


def _ends(samples: Sequence[Samples]) -> list[Samples]:
    """The earliest and the latest moment: `before` and `after`. A missing one is replaced by the first or last `train`."""
    moments: dict[str, dict[int, Samples]] = {"before": {}, "train": {}, "after": {}}
    for one in samples:
        by_step = moments.setdefault(one.when, {})
        rows = by_step[one.step].rows if one.step in by_step else []
        by_step[one.step] = Samples(one.when, one.step, rows + one.rows)
    during = [one for _, one in sorted(moments["train"].items())]
    before = [one for _, one in sorted(moments["before"].items())] or during
    after = [one for _, one in sorted(moments["after"].items())] or during
    first, last = before[:1], after[-1:]
    return first if first == last else first + last


def _levels(runs: Sequence[Run], readout: str | None) -> Callable[[float | None], int]:
    """A function from score to level: distance from the mean over all tokens, in steps of two thirds of a standard deviation,
    from −3 to 3.
    """
    values = [
        v
        for run in runs
        for one in run.samples
        for row in one.rows
        for v in row.token_scores.get(readout or "", ())
        if v is not None
    ]
    mean = fmean(values) if values else 0.0
    step = (pstdev(values) if values else 0.0) / 1.5
    return lambda value: 0 if value is None or step == 0 else max(-3, min(3, round((value - mean) / step)))


def _answer(samples: Samples, row: Sample, readout: str | None, level: Callable[[float | None], int]) -> Cell:
    when = {"before": "before training", "after": "after training"}.get(samples.when, "during training")
    scores = [(name, show(value)) for name, value in row.scores.items()]
    own = row.token_scores.get(readout or "", [])
    pieces = [(piece, level(value)) for piece, value in zip(row.pieces, own, strict=True)] if own else []
    return Cell(f"{when}, step {samples.step}", row.completion, scores, pieces)
