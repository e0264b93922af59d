"""Samples before and after training, side by side per prompt.

In: loaded runs. Out: one comparison per prompt, with the completions of every arm. Knows nothing of HTML or Markdown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from interp_rlhf.report.load import Run, Sample, Samples
from interp_rlhf.report.text import show


@dataclass
class Cell:
    """One completion, and when it was sampled."""

    when: str
    completion: str
    scores: list[tuple[str, str]]


@dataclass
class Comparison:
    """All that the arms answered to one prompt, the earlier completion first."""

    prompt: str
    arms: list[tuple[str, list[Cell]]] = field(default_factory=list)


def compare_samples(runs: Sequence[Run]) -> list[Comparison]:
    """Comparisons in the order in which the prompts first occur.

    A prompt that was sampled several times is compared several times: its first completion before with its first
    completion after, and so on.
    """
    found: dict[tuple[str, int], Comparison] = {}
    for run in runs:
        cells: dict[tuple[str, int], list[Cell]] = {}
        for samples in _ends(run.samples):
            seen: Counter[str] = Counter()
            for row in samples.rows:
                cells.setdefault((row.prompt, seen[row.prompt]), []).append(_cell(samples, row))
                seen[row.prompt] += 1
        for key, answers in cells.items():
            found.setdefault(key, Comparison(key[0])).arms.append((run.label, answers))
    return list(found.values())


def _ends(samples: Sequence[Samples]) -> list[Samples]:
    """The earliest and the latest moment: `before` and `after`, in place of either the first or last `train`."""
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


def _cell(samples: Samples, row: Sample) -> Cell:
    when = {"before": "before training", "after": "after training"}.get(samples.when, "during training")
    scores = [(name, show(value)) for name, value in row.scores.items()]
    return Cell(f"{when}, step {samples.step}", row.completion, scores)
