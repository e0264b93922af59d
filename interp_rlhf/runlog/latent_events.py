"""Events about latents of sparse autoencoders: pages of latents, and latents that were searched for.

In: what `sae inspect` and `sae find` computed. Out: as for `events`. It must not know torch, models or pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .events import Event
from .records import Record, fact


@dataclass(frozen=True, kw_only=True)
class WindowEntry(Record):
    """A window of tokens from one context."""

    pieces: list[str] = fact("text of each token", list)
    activations: list[float | None] = fact(
        "activation of the latent at each token; null is a token that does not count", list
    )
    peak: int = fact("place of the highest activation, or pre-activation, in the window", -1)
    value: float | None = fact("activation there")
    text: int | None = fact("index of the text")


@dataclass(frozen=True, kw_only=True)
class HistogramEntry(Record):
    """The activations that are not zero."""

    edges: list[float] = fact("edges of the bins, ascending", list)
    counts: list[int] = fact("tokens per bin", list, unit="tokens")


@dataclass(frozen=True, kw_only=True)
class PromotedEntry(Record):
    """A token whose logit the latent changes."""

    piece: str = fact("text of the token", "")
    effect: float | None = fact("change of its logit per unit of activation", unit="logits")


@dataclass(frozen=True, kw_only=True)
class DetectionEntry(Record):
    """A latent as a detector of a labelled concept."""

    threshold: float | None = fact("threshold with the best F1 on one half of the examples")
    precision: float | None = fact("precision at the threshold on the other half", unit="[0, 1]")
    recall: float | None = fact("recall there", unit="[0, 1]")
    auroc: list[float | None] = fact("AUROC of the maximum there", list, unit="[value, low, high]")
    positives: int | None = fact("positive examples of the other half")
    examples: int | None = fact("examples of the other half")


@dataclass(frozen=True, kw_only=True)
class LatentEntry(Record):
    """What is known of one latent."""

    index: int = fact("which latent", -1)
    density: float | None = fact("share of tokens on which it is on", unit="[0, 1]")
    mean: float | None = fact("mean activation where it is on")
    maximum: float | None = fact("highest activation")
    top: list[WindowEntry] = fact("windows with the highest activations", list)
    near: list[WindowEntry] = fact("windows where it is off and its pre-activation is highest", list)
    off: list[WindowEntry] = fact("random windows where it is off", list)
    histogram: HistogramEntry | None = fact("activations that are not zero")
    label: str = fact("what a judge called it, with the score of the name", "")
    name: dict[str, Any] | None = fact(
        "the judge's name, its score, interval, control, judge and hash of the questions"
    )
    written: float | None = fact("mean activation times the norm of its decoder row")
    cosines: dict[str, float | None] = fact("readout to cosine with the decoder row", dict, unit="[−1, 1]")
    promoted: list[PromotedEntry] = fact("tokens whose logits it raises most", list)
    suppressed: list[PromotedEntry] = fact("tokens whose logits it lowers most", list)
    detection: DetectionEntry | None = fact("precision and recall for a labelled concept")


@dataclass(frozen=True, kw_only=True)
class LatentsEvent(Event):
    """Pages of latents of one autoencoder on some texts."""

    event: ClassVar[str] = "latents"
    sae: dict[str, Any] = fact("what was inspected: architecture, latents, hook point, source", dict)
    chosen: str = fact("rule by which the latents were chosen", "")
    concept: str = fact("labelled concept", "")
    texts: float | None = fact("texts read")
    contexts: float | None = fact("contexts read")
    tokens: float | None = fact("tokens read", unit="tokens")
    outliers: float | None = fact("tokens left out because of their norm", unit="tokens")
    fvu: float | None = fact("fraction of variance unexplained", unit="FVU")
    l0: float | None = fact("mean number of latents that are on per token")
    dead: float | None = fact("share of latents that are on nowhere", unit="[0, 1]")
    latents: list[LatentEntry] = fact("one page per latent", list)


@dataclass(frozen=True, kw_only=True)
class FoundLatentEntry(Record):
    """A latent that separates the labels."""

    index: int | None = fact("which latent")
    sign: int = fact("−1 if it is higher on the other label", 1)
    fit_auroc: float | None = fact("AUROC on the examples that ranked it", unit="[0, 1]")
    held_out: list[float | None] = fact("AUROC on the other examples", list, unit="[value, low, high]")


@dataclass(frozen=True, kw_only=True)
class LatentsFoundEvent(Event):
    """Latents that separate labelled examples, next to what separates them without an autoencoder."""

    event: ClassVar[str] = "latents_found"
    sae: dict[str, Any] = fact("what was searched: architecture, latents, hook point, source", dict)
    concept: list[str] = fact("names of labels 1 and 0", list)
    pooling: str = fact("pooling over an example's tokens", "")
    examples: list[int | None] = fact("examples that ranked, and examples held out", list)
    latents: list[FoundLatentEntry] = fact("the latents, the best first", list)
    probe: list[float | None] | None = fact("AUROC of a dense probe", unit="[value, low, high]", optional=True)
    tfidf: list[float | None] | None = fact("AUROC of words", unit="[value, low, high]", optional=True)
    random: list[list[float | None]] = fact(
        "AUROC of the best latent of each random dictionary", list, unit="[value, low, high]"
    )
    less_probe: list[float | None] | None = fact(
        "best latent less the probe", unit="[value, low, high]", optional=True
    )
    less_tfidf: list[float | None] | None = fact(
        "best latent less the words", unit="[value, low, high]", optional=True
    )
    less_random: list[float | None] | None = fact(
        "best latent less the best random one", unit="[value, low, high]", optional=True
    )
