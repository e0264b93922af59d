"""Which metrics are drawn together, decided by their names alone.

In: names of metrics. Out: groups of names in reading order, and the rest. It must not know runs or plots.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

MEASURE = re.compile(r"interp/measure/.+/(?:own_)?mean")
_REWARD = re.compile(r"rewards/.+/mean|rewards/[^/]+")  # GRPO and PPO; DPO's margins, accuracies, chosen, rejected
# What the drift callback logs is drawn from its own events, in the section on drift.
_MONITORED = re.compile(r"interp/(?!drift/)(?:.+/)?(?!drift_)[^/]+")
_OWN_TEXT = re.compile(r"interp/(?:.+/own_(?:policy|text|drift|mean)|own_text/.+)")


@dataclass(frozen=True)
class MetricGroup:
    """Metrics that one figure shows on a shared step axis."""

    key: str  # anchor and file name
    title: str
    caption: str
    names: tuple[str, ...]


_Rank = Callable[[str], int | None]


def _ranked(*patterns: str | re.Pattern[str]) -> _Rank:
    """Position of the first pattern that is the name, `None` where none is."""

    def rank(name: str) -> int | None:
        for position, pattern in enumerate(patterns):
            if name == pattern if isinstance(pattern, str) else pattern.fullmatch(name):
                return position
        return None

    return rank


_GROUPS: tuple[tuple[str, str, str, _Rank], ...] = (
    (
        "reward",
        "Reward and independent measure",
        "What was optimized, and next to it what no reward saw. A reward that rises alone is a warning.",
        _ranked("reward", MEASURE, _REWARD),
    ),
    (
        "own-text",
        "The policy's own text",
        "Answers to fixed prompts. Read on the policy = what the text does, read on the frozen reference (own_text), less "
        "what the representation does (own_drift = own_text − own_policy). A readout that moves on the policy alone moved "
        "inside, not in the text.",
        _ranked(
            re.compile(r"interp/.+/own_policy"),
            re.compile(r"interp/.+/own_text"),
            re.compile(r"interp/.+/own_drift"),
            _OWN_TEXT,
        ),
    ),
    (
        "monitors",
        "Concept monitors",
        "Scores of reward cards and monitors, as the trainer logged them.",
        _ranked(re.compile(r"interp/.+/mean_score"), _MONITORED),
    ),
    (
        "policy",
        "Distance from the reference and diversity",
        "KL to the reference model, and the entropy of the policy.",
        _ranked("kl", "entropy"),
    ),
    (
        "completions",
        "Completions",
        "Share of completions cut off at the length limit, and their mean length in tokens.",
        _ranked("completions/clipped_ratio", "completions/mean_length"),
    ),
    (
        "output",
        "Predictions on fixed text",
        "KL from the start's predictions, and perplexity, on the battery's texts.",
        _ranked("interp/drift/kl", "interp/drift/perplexity"),
    ),
    ("optimizer", "Optimization", "Training loss and gradient norm.", _ranked("loss", "grad_norm")),
)


def group_metrics(names: Iterable[str]) -> tuple[list[MetricGroup], list[str]]:
    """Sort metric names into the groups of the page.

    Args:
        names (`Iterable[str]`): names of all numeric metrics of all arms.

    Returns:
        The groups that have at least one metric, in reading order, and the names in no group, sorted.
    """
    left = set(names)
    groups = []
    for key, title, caption, rank in _GROUPS:
        chosen = sorted((position, name) for name in left if (position := rank(name)) is not None)
        if chosen:
            groups.append(MetricGroup(key, title, caption, tuple(name for _, name in chosen)))
            left -= set(groups[-1].names)
    return groups, sorted(left)
