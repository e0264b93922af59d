"""Events about latents of sparse autoencoders → records.

In: events `latents` and `latents_found`, of whatever shape. Out: records of declared types, whose text is safe to show. Knows
nothing of pages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .text import MISSING, as_dict, as_list, as_number, show, visible

if TYPE_CHECKING:
    from collections.abc import Sequence

KINDS = ("top", "near", "off")  # of contexts


@dataclass
class Context:
    """A window of tokens. An activation of `None` is a token that is not counted."""

    pieces: list[str]
    activations: list[float | None]
    peak: int
    value: float | None
    text: int | None


@dataclass
class Latent:
    """One latent, as it was logged."""

    index: int
    label: str
    numbers: dict[str, float | None]  # density, mean, maximum, written
    contexts: dict[str, list[Context]]
    edges: list[float]
    counts: list[int]
    promoted: list[tuple[str, float | None]]
    suppressed: list[tuple[str, float | None]]
    cosines: dict[str, float | None]
    detection: dict[str, Any] | None


@dataclass
class Inspection:
    """Latents of one autoencoder on some texts."""

    step: int
    sae: dict[str, Any]
    chosen: str
    concept: str
    numbers: dict[str, float | None]  # texts, contexts, tokens, outliers, fvu, l0, dead
    latents: list[Latent] = field(default_factory=list)


def parse_inspection(event: dict[str, Any], step: int) -> Inspection:
    """An event `latents` as records; what has another shape than declared is left out."""
    return Inspection(
        step=step,
        sae={visible(name): value for name, value in as_dict(event.get("sae")).items()},
        chosen=visible(event.get("chosen") or ""),
        concept=visible(event.get("concept") or ""),
        numbers=_numbers(event, ("texts", "contexts", "tokens", "outliers", "fvu", "l0", "dead")),
        latents=[_latent(page) for page in as_list(event.get("latents")) if isinstance(page, dict)],
    )


def found_table(event: dict[str, Any]) -> tuple[str, list[str], list[list[Any]], str]:
    """Title, columns, rows and note of an event `latents_found`."""
    concept = [visible(name) for name in as_list(event.get("concept"))] + ["0", "1"]
    rows: list[list[Any]] = []
    for found in map(as_dict, as_list(event.get("latents"))):
        index = as_number(found.get("index"))
        name = f"latent {MISSING if index is None else int(index)}"
        higher = concept[1] if as_number(found.get("sign")) != -1 else concept[0]
        rows.append([name, higher, as_number(found.get("fit_auroc")), *interval(found.get("held_out")), None])
    for key, name in (("probe", "dense probe, same hook point"), ("tfidf", "TF-IDF of words")):
        if key in event:
            rows.append([name, None, None, *interval(event[key]), interval(event.get(f"less_{key}"))])
    drawn = [interval(one) for one in as_list(event.get("random"))]
    best = max(range(len(drawn)), key=lambda i: drawn[i][0] or 0.0, default=0)
    for i, one in enumerate(drawn):
        less = interval(event.get("less_random")) if i == best else None
        rows.append([f"best latent of random dictionary {i + 1}", None, None, *one, less])
    columns = ["what", "higher on", "AUROC, fit", "AUROC, held out", "from", "to", "best latent less this, interval"]
    sizes = [show(size) for size in as_list(event.get("examples"))] + [MISSING, MISSING]
    sae = as_dict(event.get("sae"))
    note = (
        f"{sae_name(sae)}. Latents are pooled by their {visible(event.get('pooling') or 'value')} over an example's tokens and "
        f"ranked on {sizes[0]} examples; AUROC and its 95 % interval are on {sizes[1]} others."
    )
    return f"Latents for {concept[1]} against {concept[0]}", columns, rows, note


def sae_name(sae: dict[str, Any]) -> str:
    """An autoencoder in one line."""
    where = visible(sae.get("hook_point") or "a hook point that was not logged")
    to = f", predicting {visible(sae['output_point'])}" if sae.get("output_point") else ""
    return f"{visible(sae.get('architecture') or 'autoencoder')}, {show(sae.get('latents'))} latents at {where}{to}"


def _latent(page: dict[str, Any]) -> Latent:
    histogram = as_dict(page.get("histogram"))
    edges = [edge for edge in map(as_number, as_list(histogram.get("edges"))) if edge is not None]
    counts = [int(count) for count in map(as_number, as_list(histogram.get("counts"))) if count is not None]
    whole = len(edges) == len(counts) + 1 and all(a < b for a, b in pairwise(edges))
    index = as_number(page.get("index"))
    detection = page.get("detection")
    return Latent(
        index=-1 if index is None else int(index),
        label=visible(page.get("label") or ""),
        numbers=_numbers(page, ("density", "mean", "maximum", "written")),
        contexts={
            kind: [found for one in as_list(page.get(kind)) if (found := _window(as_dict(one))) is not None]
            for kind in KINDS
        },
        edges=edges if whole else [],
        counts=counts if whole else [],
        promoted=_promotions(page.get("promoted")),
        suppressed=_promotions(page.get("suppressed")),
        cosines={visible(name): as_number(value) for name, value in as_dict(page.get("cosines")).items()},
        detection=_detection(detection) if isinstance(detection, dict) else None,
    )


def _window(one: dict[str, Any]) -> Context | None:
    pieces, activations = as_list(one.get("pieces")), as_list(one.get("activations"))
    if not pieces or len(pieces) != len(activations):
        return None
    peak, text = as_number(one.get("peak")), as_number(one.get("text"))
    return Context(
        [visible(piece) for piece in pieces], [as_number(value) for value in activations], -1 if peak is None else int(peak),
        as_number(one.get("value")), None if text is None else int(text),
    )  # fmt: skip


def _detection(found: dict[str, Any]) -> dict[str, Any]:
    numbers: dict[str, Any] = _numbers(found, ("threshold", "precision", "recall"))
    for name in ("positives", "examples"):
        number = as_number(found.get(name))
        numbers[name] = None if number is None else int(number)
    return numbers | {"auroc": interval(found.get("auroc"))}


def _promotions(value: Any) -> list[tuple[str, float | None]]:
    return [
        (visible(as_dict(one).get("piece") or ""), as_number(as_dict(one).get("effect"))) for one in as_list(value)
    ]


def _numbers(event: dict[str, Any], names: Sequence[str]) -> dict[str, float | None]:
    return {name: as_number(event.get(name)) for name in names}


def interval(value: Any) -> list[float | None]:
    """A number and its two bounds; None for what is missing."""
    numbers = [as_number(number) for number in as_list(value)][:3]
    return numbers + [None] * (3 - len(numbers))
