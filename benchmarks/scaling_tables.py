"""The tables of `docs/scaling.md`, from the figures that `scaling.py` writes.

In: the figures. Out: Markdown, and how far the measured is from the formulas. It measures nothing.
"""

from __future__ import annotations

from typing import Any

from costs import FORMULAS


def agreement(found: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Measured over formula by name and width: times, and operations and memory."""
    times: dict[str, float] = {}
    others: dict[str, float] = {}
    for width, size in found["sizes"].items():
        parts = {**size["pieces"], "`read()`": size["read"], "drift comparison": size["evaluation"]}
        for name, figures in parts.items():
            times[f"{name}, {width}"] = figures["time"][0]
            for key, pair in figures.items():
                if key not in ("time", "share") and pair[0]:
                    others[f"{name}, {width}, {key}"] = pair[1] / pair[0]
        step = size["step"]
        times[f"step, {width}"] = step["time"][1] / step["time"][0]
        for key in ("plain_flops", "flops", "memory"):
            others[f"step, {width}, {key}"] = step[key][1] / step[key][0]
    return times, others


def tables(found: dict[str, Any]) -> list[str]:
    """The tables of the document, from the figures."""
    return [pieces_table(found), others_table(found), steps_table(found), derived_table(found)]


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def over(pair: list[float]) -> str:
    """Measured over formula."""
    formula, measured = pair
    return f"{measured / formula:.2f}" if formula else "–"


def interval(values: list[float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*values)


def bytes_(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError


def pieces_table(found: dict[str, Any]) -> str:
    rows = []
    for name in FORMULAS:
        for width, size in found["sizes"].items():
            piece = size["pieces"][name]
            memories = [over(piece[key]) for key in ("carried", "held", "peak", "peak_bf16")]
            rows.append([name, width, over(piece["flops"]), *memories, interval(piece["time"])])
    return table(["piece", "D", "operations", "carried", "held", "peak", "peak, bf16", "time [95 %]"], rows)


def others_table(found: dict[str, Any]) -> str:
    rows = []
    for width, size in found["sizes"].items():
        early, drift = size["read"], size["evaluation"]
        half = f"`read()` of {early['share']:.0%} of the blocks"
        rows.append([half, width, over(early["flops"]), "–", "–", interval(early["time"])])
        rows.append(["drift: forward", width, over(drift["forward_flops"]), "–", "–", "–"])
        figures = [over(drift[key]) for key in ("flops", "carried", "peak")]
        rows.append(["drift: comparison", width, *figures, interval(drift["time"])])
    return table(["piece", "D", "operations", "carried", "peak", "time [95 %]"], rows)


def steps_table(found: dict[str, Any]) -> str:
    rows = []
    for width, size in found["sizes"].items():
        step = size["step"]
        pairs = [f"{step[key][0]:.3f} / {step[key][1]:.3f}" for key in ("flops", "memory")]
        predicted, *measured = step["time"]
        time = "{:.3f} / {:.3f} [{:.3f}, {:.3f}]".format(predicted, *measured)
        rows.append([width, f"{step['parameters'] / 1e6:.1f} M", *pairs, time])
    return table(["D", "parameters", "operations", "peak memory", "time [95 %]"], rows)


def derived_table(found: dict[str, Any]) -> str:
    rows = []
    for name, sizes in found["derived"].items():
        for piece, cost in sizes["pieces"].items():
            rows.append(
                [
                    name,
                    piece,
                    f"{cost['flops_share']:.2g}",
                    *(bytes_(cost[key]) for key in ("carried", "held", "peak")),
                ]
            )
    return table(["model", "piece", "share of operations", "carried", "held", "peak"], rows)
