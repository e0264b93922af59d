"""Splits labelled examples into two parts that share no prompt: one part for choices, the other for reported numbers.

In: examples, a seed. Out: two sets of examples. It must not know models.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..concepts.examples import make_examples

if TYPE_CHECKING:
    from ..concepts.examples import Examples


def split_examples(examples: Examples, seed: int, held_out: float = 0.5) -> tuple[Examples, Examples]:
    """Fit part and held-out part, split by prompt. Prompts with the same mix of labels are split in the same proportion.

    Args:
        held_out (`float`, defaults to 0.5): share of the prompts that is held out, in (0, 1).

    Raises:
        `ValueError`: the share is outside (0, 1), or a part lacks a label.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"`held_out` is {held_out} – expected a share between 0 and 1.")
    groups = examples.groups
    labels: dict[str, set[int]] = {}
    for group, label in zip(groups, examples.labels.tolist(), strict=True):
        labels.setdefault(group, set()).add(label)
    kinds: dict[tuple[int, ...], list[str]] = {}
    for group, own in labels.items():
        kinds.setdefault(tuple(sorted(own)), []).append(group)
    rng = np.random.default_rng(seed)
    chosen: set[str] = set()
    for _, members in sorted(kinds.items()):
        count = min(max(1, round(held_out * len(members))), max(1, len(members) - 1))
        chosen |= {members[i] for i in rng.permutation(len(members))[:count]}
    parts = [[row for row, group in enumerate(groups) if (group in chosen) == wanted] for wanted in (False, True)]
    for rows in parts:
        if len(set(examples.labels[rows].tolist())) != 2:
            raise ValueError(
                f"{len(labels)} prompts of {len(examples)} examples do not make two parts with both labels in each – expected at "
                "least two prompts of each label."
            )
    fit, rest = (_part_of(examples, rows) for rows in parts)
    return fit, rest


def _part_of(examples: Examples, rows: list[int]) -> Examples:
    taken = [{**examples.rows[row], "label": int(examples.labels[row])} for row in rows]
    return replace(make_examples(taken), label_names=examples.label_names)
