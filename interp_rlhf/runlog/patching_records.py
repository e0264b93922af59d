"""Records of patching: where in a model a contrast acts, and what a training changed.

In: what `attribution_patching` computed. Out: as for `events`. It must not know torch, models or pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .records import Record, fact


@dataclass(frozen=True, kw_only=True)
class PatchedSiteEntry(Record):
    """A site whose activation was replaced."""

    component: str = fact("`residual`, `attention`, `mlp` or `heads`", "", since=2)
    block: int = fact("index of the decoder layer", -1, since=2)
    hook_point: str = fact("path of the activation", "", since=2)
    head: int | None = fact("index of the head", since=2, optional=True)
    position: int | None = fact("position, −1 is the prompt's last token; all if absent", since=2, optional=True)
    top: bool = fact("whether attribution chose it; otherwise it was drawn at random", False, since=2)
    chosen: float | None = fact("its attribution on the choosing pairs", unit="of the metric", since=2)
    attribution: float | None = fact("its attribution on the evidence pairs", unit="of the metric", since=2)
    exact: float | None = fact("change of the metric by replacing it", unit="of the metric", since=2)


@dataclass(frozen=True, kw_only=True)
class PatchedGroupEntry(Record):
    """Sites that are ranked together."""

    group: str = fact("`outputs` (attention and MLP), `heads` or `residual`", "", since=2)
    candidates: int | None = fact("sites of the group", since=2)
    sites: list[PatchedSiteEntry] = fact("those that were replaced, the largest effect first", list, since=2)
    spearman: float | None = fact("rank correlation of attribution and effect", unit="[−1, 1]", since=2)
    spearman_random: float | None = fact("the same over sites drawn at random", unit="[−1, 1]", since=2)
    recall: float | None = fact(
        "share of the `recall_at` largest effects that are among the `recall_at` largest attributions",
        unit="[0, 1]",
        since=2,
    )
    recall_at: int | None = fact("that number", since=2)
    recall_by_chance: float | None = fact("recall of a random order", unit="[0, 1]", since=2)


@dataclass(frozen=True, kw_only=True)
class PatchingEntry(Record):
    """Where a contrast acts, or which block carries what a training changed."""

    metric: str = fact("what was measured, in words", "", since=2)
    steps: int | None = fact("gradients per pair", since=2)
    tuned: bool = fact("whether activations of a tuned model were put into its base", False, since=2)
    hook_points: dict[str, list[str]] = fact("component to hook points, one per block", dict, since=2)
    positions: list[str] = fact("names of the positions, counted from the end", list, since=2)
    left_out: int | None = fact("positions without a partner in the other prompt", unit="tokens", since=2)
    choosing: list[int] = fact("indices of the pairs that chose the sites", list, since=2)
    evidence: list[int] = fact("indices of the pairs of the evidence", list, since=2)
    clean: list[float | None] = fact("metric of each pair's clean run", list, since=2)
    corrupt: list[float | None] = fact("metric of each pair's corrupt run", list, since=2)
    chosen: dict[str, list[Any]] = fact(
        "component to attributions on the choosing pairs, by block and position; of heads by block, head and position",
        dict,
        since=2,
    )
    attribution: dict[str, list[Any]] = fact("the same on the evidence pairs", dict, since=2)
    exact: list[PatchedGroupEntry] = fact("exact effects, by group of sites", list, since=2)
