"""Records of latents → what the page shows of each.

In: inspections. Out: the values that the templates show, and the histograms. It must not know HTML or Markdown.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .figures import Panel
from .inspection import interval, sae_name
from .plots import COLOURS
from .text import MISSING, show, visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .inspection import Context, InspectedLatents, Latent

LEVELS = 4  # of a token's mark, in quarters of the latent's highest activation
_KINDS = (
    ("top", "Highest activations", "one window per context"),
    ("near", "Near misses", "off throughout; the marked token has the highest pre-activation"),
    ("off", "At random", "off throughout, drawn from the same texts"),
)


_BARS_WIDTH, _BARS_HEIGHT = 300, 96  # of a histogram


def latents_content(inspections: Sequence[tuple[str, InspectedLatents]]) -> list[dict[str, Any]]:
    """What the templates show of each inspection.

    Args:
        inspections (`Sequence[tuple[str, InspectedLatents]]`): with the label of its run; empty where there is one run.
    """
    return [_inspection(label, one, number) for number, (label, one) in enumerate(inspections, 1)]


def _inspection(label: str, one: InspectedLatents, number: int) -> dict[str, Any]:
    fvu = one.numbers["fvu"]
    facts = [
        ("chosen", one.chosen or MISSING),
        *((name, _whole_number(one.numbers[name])) for name in ("texts", "contexts", "tokens")),
        ("left out, by their norm", _whole_number(one.numbers["outliers"])),
        ("FVU", show(fvu)),
        ("explained variance", show(None if fvu is None else 1 - fvu)),
        ("L0", show(one.numbers["l0"])),
        ("dead", _percent(one.numbers["dead"])),
    ]
    source = one.sae.get("source")
    facts += [("model", show(one.sae["model"]))] if one.sae.get("model") else []
    facts += [
        (f"source: {visible(name)}", show(value))
        for name, value in (source if isinstance(source, dict) else {}).items()
    ]
    names = list(dict.fromkeys(name for latent in one.latents for name in latent.cosines))
    detected = any(latent.detection for latent in one.latents)
    labelled = any(latent.label for latent in one.latents)
    concept = "" if one.concept in ("", "1") else f" for {one.concept}"
    columns = [("latent", True)] + ([("label", False)] if labelled else [])
    columns += [("density", True), ("mean when on", True), ("maximum", True), ("promotes", False)]
    columns += [(f"cosine with {name}", True) for name in names]
    columns += [(f"{word}{concept}", True) for word in ("precision", "recall", "AUROC")] if detected else []
    return {
        "key": f"latents-{number}",
        "title": f"{label}: {sae_name(one.sae)}" if label else sae_name(one.sae),
        "facts": facts,
        "columns": columns,
        "latents": [_page(latent, f"latent-{number}-{i}", concept) for i, latent in enumerate(one.latents)],
        "rows": [_summary_row(latent, names, detected, labelled) for latent in one.latents],
    }


def _summary_row(latent: Latent, names: list[str], detected: bool, labelled: bool) -> list[str]:
    promotes = " ".join(_spell(piece).strip() or _spell(piece) for piece, _ in latent.promoted[:5])
    cells = [latent.label or MISSING] if labelled else []
    cells += [
        _percent(latent.numbers["density"]),
        show(latent.numbers["mean"]),
        show(latent.numbers["maximum"]),
        promotes,
    ]
    cells += [show(latent.cosines.get(name)) for name in names]
    if detected:
        detection = latent.detection or {}
        cells += [
            show(detection.get("precision")),
            show(detection.get("recall")),
            show((detection.get("auroc") or [None])[0]),
        ]
    return cells


def _page(latent: Latent, key: str, concept: str) -> dict[str, Any]:
    numbers = latent.numbers
    facts = [
        ("density", _percent(numbers["density"])),
        ("mean when on", show(numbers["mean"])),
        ("maximum", show(numbers["maximum"])),
        ("writes", show(numbers["written"])),
        *((f"cosine with {name}", show(value)) for name, value in latent.cosines.items()),
    ]
    if latent.detection:
        detection = latent.detection
        auroc, low, high = interval(detection.get("auroc"))
        facts += [
            (f"precision{concept}", show(detection.get("precision"))),
            (f"recall{concept}", show(detection.get("recall"))),
            ("threshold", show(detection.get("threshold"))),
            ("AUROC", f"{show(auroc)} [{show(low)}, {show(high)}]"),
            ("labelled examples", f"{show(detection.get('examples'))}, {show(detection.get('positives'))} positive"),
        ]
    highest = numbers["maximum"] or max((c.value or 0.0 for c in latent.contexts["top"]), default=0.0)
    return {
        "key": key,
        "index": str(latent.index),
        "label": latent.label,
        "facts": facts,
        "histogram": _histogram(latent, key),
        "tokens": [
            (title, [(_spell(piece), show(value)) for piece, value in tokens])
            for title, tokens in (("Promotes", latent.promoted), ("Suppresses", latent.suppressed))
            if tokens
        ],
        "groups": [
            {
                "kind": kind,
                "title": title,
                "note": note,
                "contexts": [_context(c, highest) for c in latent.contexts[kind]],
            }
            for kind, title, note in _KINDS
            if latent.contexts[kind]
        ],
    }


def _context(context: Context, highest: float) -> dict[str, Any]:
    tokens = []
    for place, (piece, value) in enumerate(zip(context.pieces, context.activations, strict=True)):
        level = _level(value, highest) if value and value > 0 and highest > 0 else 0
        said = "not counted" if value is None else show(value)
        tokens.append({"piece": _spell(piece), "level": level, "title": said, "peak": place == context.peak})
    on = [(token["piece"], token["title"]) for token in tokens if token["level"]]
    text = MISSING if context.text is None else show(context.text + 1)
    split = max(context.peak, 0)
    return {
        "value": "" if context.value is None else show(context.value), "text": text, "tokens": tokens, "on": on,
        "before": "".join(context.pieces[:split]), "at": "".join(context.pieces[split : split + 1]),
        "after": "".join(context.pieces[split + 1 :]),
    }  # fmt: skip


def _level(value: float, highest: float) -> int:
    """1 to `LEVELS`. It does not overflow for any pair of numbers."""
    return LEVELS if value >= highest else max(1, math.ceil(LEVELS * (value / highest)))


def _histogram(latent: Latent, key: str) -> Panel | None:
    """Bars over the activations that are not 0. The fullest bar is as high as the plot."""
    if not latent.counts or max(latent.counts) <= 0:
        return None
    edges, counts = latent.edges, latent.counts
    low, high, top = edges[0], edges[-1], max(counts)

    def across(edge: float) -> float:
        return _BARS_WIDTH * ((edge - low) / (high - low))

    bars = "".join(
        f'<rect x="{across(edges[i]):.2f}" y="{14 + 64 * (1 - count / top):.2f}" '
        f'width="{max(0.5, across(edges[i + 1]) - across(edges[i]) - 0.8):.2f}" height="{64 * count / top:.2f}"/>'
        for i, count in enumerate(counts)
        if count
    )
    fullest = counts.index(top)
    total = sum(counts)
    alt = (
        f"Histogram of the {show(total)} activations of latent {latent.index} that are not zero, from {show(low)} to "
        f"{show(high)} in {len(counts)} bins. The fullest, {show(edges[fullest])} to "
        f"{show(edges[fullest + 1])}, holds {show(top)}."
    )
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_BARS_WIDTH} {_BARS_HEIGHT}"><g fill="{COLOURS[0]}">{bars}</g>'
        f'<line x1="0" y1="78.5" x2="{_BARS_WIDTH}" y2="78.5" stroke="#8a8f98"/><g fill="#3d434d" font-size="11">'
        f'<text x="0" y="10">{show(top)} tokens</text><text x="0" y="92">{show(low)}</text>'
        f'<text x="{_BARS_WIDTH}" y="92" text-anchor="end">{show(high)}</text></g></svg>'
    )
    return Panel(f"latent {latent.index}", svg, alt, ["activations that are not zero"], f"{key}.svg")


def _spell(piece: str) -> str:
    """A token's text with line breaks and tabs as visible characters."""
    return piece.replace("\n", "↵").replace("\t", "⇥")


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.3g} %"


def _whole_number(number: float | None) -> str:
    return MISSING if number is None else show(int(number))
