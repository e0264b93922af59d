"""Events about latents of sparse autoencoders → records.

In: events `latents` and `latents_found`. Out: records of what a page shows, and a table. It must not know pages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .text import MISSING, as_number, show, visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..runlog.latent_events import DetectionEntry, LatentEntry, LatentsEvent, LatentsFoundEvent, WindowEntry

WINDOWS = ("top", "near", "off")  # kinds of contexts
NUMBERS = ("texts", "contexts", "tokens", "outliers", "fvu", "l0", "dead")


@dataclass
class Context:
    """A window of tokens. An activation of `None` is a token that does not count."""

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
class InspectedLatents:
    """Latents of one autoencoder on some texts."""

    step: int
    sae: dict[str, Any]
    chosen: str
    concept: str
    numbers: dict[str, float | None]  # those of `NUMBERS`
    latents: list[Latent] = field(default_factory=list)


def inspected(event: LatentsEvent, step: int) -> InspectedLatents:
    """The records of an event `latents`."""
    numbers = {name: getattr(event, name) for name in NUMBERS}
    return InspectedLatents(
        step, event.sae, event.chosen, event.concept, numbers, [_latent(one) for one in event.latents]
    )


def found_table(event: LatentsFoundEvent) -> tuple[str, list[str], list[list[Any]], str]:
    """Title, columns, rows and note of an event `latents_found`."""
    concept = [*event.concept, "0", "1"]
    rows: list[list[Any]] = []
    for latent in event.latents:
        name = f"latent {MISSING if latent.index is None else latent.index}"
        higher = concept[1] if latent.sign != -1 else concept[0]
        rows.append([name, higher, latent.fit_auroc, *interval(latent.held_out), None])
    if event.probe is not None:
        rows.append(["dense probe, same hook point", None, None, *interval(event.probe), interval(event.less_probe)])
    if event.tfidf is not None:
        rows.append(["TF-IDF of words", None, None, *interval(event.tfidf), interval(event.less_tfidf)])
    drawn = [interval(one) for one in event.random]
    best = max(range(len(drawn)), key=lambda i: drawn[i][0] or 0.0, default=0)
    for i, one in enumerate(drawn):
        less = interval(event.less_random) if i == best else None
        rows.append([f"best latent of random dictionary {i + 1}", None, None, *one, less])
    columns = ["what", "higher on", "AUROC, fit", "AUROC, held out", "from", "to", "best latent less this, interval"]
    sizes = [show(size) for size in event.examples] + [MISSING, MISSING]
    note = (
        f"{sae_name(event.sae)}. Latents are pooled by their {event.pooling or 'value'} over an example's tokens and "
        f"ranked on {sizes[0]} examples; AUROC and its 95 % interval are on {sizes[1]} others."
    )
    return f"Latents for {concept[1]} against {concept[0]}", columns, rows, note


def sae_name(sae: dict[str, Any]) -> str:
    """An autoencoder in one line."""
    where = visible(sae.get("hook_point") or "a hook point that was not logged")
    to = f", predicting {visible(sae['output_point'])}" if sae.get("output_point") else ""
    return f"{visible(sae.get('architecture') or 'autoencoder')}, {show(sae.get('latents'))} latents at {where}{to}"


def _latent(page: LatentEntry) -> Latent:
    edges = page.histogram.edges if page.histogram is not None else []
    counts = page.histogram.counts if page.histogram is not None else []
    whole = len(edges) == len(counts) + 1 and all(a < b for a, b in pairwise(edges))
    return Latent(
        index=page.index,
        label=page.label,
        numbers={name: getattr(page, name) for name in ("density", "mean", "maximum", "written")},
        contexts={kind: [_context_of(one) for one in getattr(page, kind) if _is_whole(one)] for kind in WINDOWS},
        edges=edges if whole else [],
        counts=counts if whole else [],
        promoted=[(one.piece, one.effect) for one in page.promoted],
        suppressed=[(one.piece, one.effect) for one in page.suppressed],
        cosines=page.cosines,
        detection=_detection_numbers(page.detection) if page.detection is not None else None,
    )


def _is_whole(window: WindowEntry) -> bool:
    return bool(window.pieces) and len(window.pieces) == len(window.activations)


def _context_of(window: WindowEntry) -> Context:
    return Context(window.pieces, window.activations, window.peak, window.value, window.text)


def _detection_numbers(detection: DetectionEntry) -> dict[str, Any]:
    names = ("threshold", "precision", "recall", "positives", "examples")
    return {name: getattr(detection, name) for name in names} | {"auroc": interval(detection.auroc)}


def interval(value: Sequence[Any] | None) -> list[float | None]:
    """A number and its two bounds; None for what is missing."""
    numbers = [as_number(number) for number in value or ()][:3]
    return numbers + [None] * (3 - len(numbers))
