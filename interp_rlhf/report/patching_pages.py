"""Records of patching → what the page shows of each: a heat map per component, and the sites that were patched exactly.

In: records. Out: the values that the templates show. It must not know HTML or Markdown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .figures import Figure
from .plots import heat_map
from .text import MISSING, as_number, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..runlog.patching_records import PatchedGroupEntry, PatchingEntry

_TITLES_OF_COMPONENTS = {
    "residual": "Residual stream", "attention": "Attention out", "mlp": "MLP out", "heads": "Heads",
}  # fmt: skip
_GROUP_TITLES = {"outputs": "attention and MLP", "heads": "heads", "residual": "residual stream"}


def patching_content(patchings: Sequence[tuple[str, PatchingEntry]]) -> list[dict[str, Any]]:
    """What the templates show of each record.

    Args:
        patchings (`Sequence[tuple[str, PatchingEntry]]`): with the label of its run; empty where there is one run.
    """
    return [_patching_section(label, one, number) for number, (label, one) in enumerate(patchings, 1)]


def _patching_section(label: str, one: PatchingEntry, number: int) -> dict[str, Any]:
    what = "What the training changed" if one.tuned else "Where the contrast acts"
    where = "base with the tuned model's activation" if one.tuned else "corrupt run with the clean activation"
    caption = (
        f"Attribution of {one.metric}: estimated change of the {where} here, mean over {len(one.evidence)} pairs. Early blocks "
        "at the bottom, the end of the prompt to the right; red raises it, blue lowers it."
    )
    figure = Figure(f"patching-{number}", f"{label}: {what}" if label else what, caption)
    for component, values in one.attribution.items():
        _add_map(figure, one, component, values)
    return {
        "key": f"patching-{number}",
        "figure": figure,
        "facts": _facts(one),
        "groups": [_group(g) for g in one.exact],
    }


def _facts(one: PatchingEntry) -> list[tuple[str, str]]:
    pairs = sorted({*one.choosing, *one.evidence})
    split = (
        "the same pairs chose the sites"
        if one.choosing == one.evidence
        else f"{len(one.choosing)} others chose the sites"
    )
    facts = [
        ("metric", one.metric or MISSING),
        ("pairs", f"{len(one.evidence)} of {len(pairs)} for the evidence; {split}"),
        ("tuned run, mean" if one.tuned else "clean run, mean", show(_mean_of_pairs(one.clean, one.evidence))),
        ("base run, mean" if one.tuned else "corrupt run, mean", show(_mean_of_pairs(one.corrupt, one.evidence))),
        ("gradients per pair", show(one.steps)),
    ]
    return facts + ([("positions left out", show(one.left_out))] if one.left_out else [])


def _mean_of_pairs(values: Sequence[float | None], which: Sequence[int]) -> float | None:
    known = [value for i in which if 0 <= i < len(values) and (value := values[i]) is not None]
    return sum(known) / len(known) if known else None


def _add_map(figure: Figure, one: PatchingEntry, component: str, values: list[Any]) -> None:
    """A map of block by position, of heads block by head. Values of another shape are left out."""
    title = _TITLES_OF_COMPONENTS.get(component, component)
    if component == "heads":
        values = [[_sum(head) for head in row] if isinstance(row, list) else None for row in values]
    rows = [[as_number(value) for value in row] for row in values if isinstance(row, list)]
    points = one.hook_points.get(component, [])
    widths = {len(row) for row in rows}
    finite = [value for row in rows for value in row if value is not None]
    if len(rows) != len(values) or len(rows) != len(points) or len(widths) != 1 or not finite:
        return
    (width,) = widths
    columns = [f"head {head}" for head in range(width)] if component == "heads" else one.positions
    if len(columns) != width:
        return
    top = max(map(abs, finite)) or 1.0
    largest = max(range(len(rows)), key=lambda block: sum(abs(value or 0) for value in rows[block]))
    alt = (
        f"Heat map of {title}: {len(rows)} blocks by {width} {'heads' if component == 'heads' else 'positions'}, values from "
        f"{show(min(finite))} to {show(max(finite))}, largest in block {largest}."
    )
    across = "head" if component == "heads" else "position from the end, token where all prompts share it"
    names = [f"block {block}" for block in range(len(rows))]
    figure.add(
        title, heat_map(title, names, [], rows, (-top, top), columns, across), alt, [f"{points[0]} … {points[-1]}"]
    )


def _sum(values: Any) -> float | None:
    numbers = [as_number(value) for value in values] if isinstance(values, list) else [None]
    return None if None in numbers else sum(value for value in numbers if value is not None)


def _group(group: PatchedGroupEntry) -> dict[str, Any]:
    rows = []
    for one in group.sites:
        head = "" if one.head is None else f" head {one.head}"
        where = "all positions" if one.position is None else f"position {one.position}"
        rows.append([
            f"{one.hook_point}{head}", where, show(one.exact), show(one.attribution), show(one.chosen),
            "attribution" if one.top else "at random",
        ])  # fmt: skip
    note = (
        f"{len(group.sites)} of {show(group.candidates)} sites were patched. Rank correlation of attribution and exact effect "
        f"{show(group.spearman)} (sites drawn at random: {show(group.spearman_random)}); of the {show(group.recall_at)} largest "
        f"effects attribution had {show(group.recall)} among its own first {show(group.recall_at)}, a random order has "
        f"{show(group.recall_by_chance)}."
    )
    return {"title": f"Exact effects: {_GROUP_TITLES.get(group.group, group.group)}", "rows": rows, "note": note}
