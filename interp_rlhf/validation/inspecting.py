"""`inspect_latents`: evidence about latents on some texts, to read before giving a latent a name.

In: a model, a sparse autoencoder, texts, optionally labelled examples and readouts. Out: an `Inspection` with a page per latent
and the quality of the autoencoder on these texts. It must not know how pages look. The caller passes the judge that names.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..messages import as_list
from ..sae.autoencoder import describe
from ..sae.contexts import gather_contexts, require_windows, survey
from ..sae.effects import cosines, promotions
from ..sae.reading import ReadingOptions, counted_batch, pool_latents
from .naming import named_pages
from .split import split_examples
from .statistics import auroc_interval

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from ..concepts.examples import Examples
    from ..concepts.readout import Readout
    from ..sae.autoencoder import SparseAutoencoder
    from ..sae.contexts import LatentContexts, Survey
    from ..sae.effects import Promotion
    from .judges import Judge
    from .naming import LatentName


@dataclass(frozen=True)
class Detection:
    """A latent as a detector of a labelled concept. It predicts label 1 if its maximum over a text exceeds a threshold.

    Attributes:
        threshold (`float`, *optional*): the threshold with the highest F1 on one half of the examples; if several tie, the
            highest. None for a latent with the same value on all examples.
        precision (`float`, *optional*), recall (`float`): at that threshold on the other half; precision is None where the latent
            never exceeds it.
        auroc (`tuple[float, float, float]`): AUROC of the maximum on the other half, with its 95 % interval.
        positives, examples (`int`): numbers of positives and of examples in the other half.
    """

    threshold: float | None
    precision: float | None
    recall: float
    auroc: tuple[float, float, float]
    positives: int
    examples: int


@dataclass(frozen=True)
class LatentPage:
    """Evidence about one latent.

    Attributes:
        contexts (`LatentContexts`): windows in which it is on or off, and its density.
        written (`float`): how much it writes: its mean activation over all tokens, times the norm of its decoder row.
        promoted, suppressed (`list[Promotion]`): see `promotions`.
        cosines (`dict[str, float]`): cosines of its decoder row with readouts.
        detection (`Detection`, *optional*): how well it detects the labelled concept.
        name (`LatentName`, *optional*): what a judge calls it, with the score of that name.
    """

    contexts: LatentContexts
    written: float
    promoted: list[Promotion]
    suppressed: list[Promotion]
    cosines: dict[str, float]
    detection: Detection | None = None
    name: LatentName | None = None

    @property
    def index(self) -> int:
        """Index of the latent."""
        return self.contexts.index

    def entry(self) -> dict[str, Any]:
        """The page as one flat mapping for JSON and the run log. Numbers have five digits."""
        found = {name: getattr(self, name) for name in ("written", "cosines")}
        found["label"] = None if self.name is None else str(self.name)
        found["name"] = None if self.name is None else asdict(self.name)
        found |= {name: [asdict(p) for p in getattr(self, name)] for name in ("promoted", "suppressed")}
        found["detection"] = None if self.detection is None else asdict(self.detection)
        short: dict[str, Any] = _five_digits(asdict(self.contexts) | found)
        return short


@dataclass(frozen=True)
class Inspection:
    """Pages of latents, and the quality of the autoencoder on the same texts.

    Attributes:
        sae (`dict`): the inspected autoencoder: architecture, number of latents, hook point, source.
        chosen (`str`): the rule by which the latents were chosen.
        pages (`list[LatentPage]`): one per latent.
        whole (`Survey`, *optional*): FVU, L0 and the dead fraction; None if only the chosen latents were read.
        concept (`str`, *optional*): label names of the labelled examples.
    """

    sae: dict[str, Any]
    chosen: str
    pages: list[LatentPage]
    whole: Survey | None
    concept: str | None = None

    def event(self) -> dict[str, Any]:
        """Fields of the run log's event `latents`."""
        numbers = ("texts", "contexts", "tokens", "outliers", "fvu", "l0", "dead")
        whole = {} if self.whole is None else {name: getattr(self.whole, name) for name in numbers}
        return {
            "sae": self.sae, "chosen": self.chosen, "concept": self.concept, **whole,
            "latents": [page.entry() for page in self.pages],
        }  # fmt: skip


def inspect_latents(
    model: Any,
    tokenizer: Any,
    sae: SparseAutoencoder,
    texts: Sequence[str | Mapping[str, Any]],
    *,
    latents: Sequence[int] | str | None = None,
    top: int = 20,
    contexts: int = 10,
    labelled: Examples | None = None,
    readouts: Sequence[Readout] = (),
    seed: int = 0,
    judge: Judge | None = None,
    whole: bool = True,
    how: ReadingOptions | None = None,
    progress: bool = False,
) -> Inspection:
    """Pages of latents of a sparse autoencoder.

    It takes one pass over the texts if `latents` are indices. Otherwise it takes two: the first finds the latents that are on.
    Memory does not grow with the texts: only the best windows are kept, and histograms have a fixed number of bins.

    Args:
        model (`nn.Module`), tokenizer: the causal LM whose activations are encoded, with its adapters as they are.
        texts (`list`): strings, or examples as in `tokenize_examples`.
        latents (`Sequence[int]`, *optional*): indices, or `"random"` to draw `top` latents among those that are on somewhere. By
            default the `top` that write most: mean activation over all tokens, times the norm of the decoder row. Such a latent
            may be on everywhere; its density says so.
        contexts (`int`, defaults to 10): windows of each kind per latent, at most: with the highest activations, one per context;
            near misses, in which the latent is off throughout although its pre-activation is highest; and random windows in which
            it is off.
        labelled (`Examples`, *optional*): labelled examples for precision and recall of each latent. One half sets the threshold,
            the other half is reported; they share no prompt.
        readouts (`Sequence[Readout]`): directions to compare decoder rows with, at the hook point where the autoencoder writes.
        seed (`int`, defaults to 0): seed of the draw, the random windows, the split and the bootstraps.
        judge (`Judge`, *optional*): who names the latents, see `judges`. A name comes with its score on other
            windows; take 20 `contexts` or more.
        whole (`bool`, defaults to `True`): also measure FVU, L0 and the dead fraction, which computes all latents. If false, only
            the rows of the chosen latents are computed, where the architecture allows that; `latents` must then be indices.
        how (`ReadingOptions`, *optional*): lengths of contexts, windows and batches.
        progress (`bool`): show progress bars.

    Raises:
        `ValueError`: another model's autoencoder, a latent out of range, readouts elsewhere, no text that counts.
    """
    texts, readouts = as_list(texts), as_list(readouts)
    how = replace(how or ReadingOptions(), progress=progress)
    _check_request(model, sae, latents, readouts, contexts, whole)
    halves = None if labelled is None else split_examples(labelled, seed)
    chosen, rule, all_latents = _choose_indices(model, tokenizer, sae, texts, how, latents, top, seed)
    gathered, survey_of_pass = gather_contexts(
        model, tokenizer, sae, texts, chosen, how, contexts=contexts, seed=seed, whole=whole and all_latents is None
    )
    detected: Sequence[Detection | None] = [None] * len(chosen)
    if halves is not None:
        detected = _detect(model, tokenizer, sae, chosen, halves, seed, progress)
    pages = _pages(model, tokenizer, sae, gathered, cosines(sae, chosen, readouts), detected)
    pages = pages if judge is None else named_pages(pages, judge, seed)
    concept = None if labelled is None else labelled.label_names[1]
    return Inspection(describe(sae), rule, pages, all_latents or survey_of_pass, concept)


def _check_request(
    model: Any,
    sae: SparseAutoencoder,
    latents: Sequence[int] | str | None,
    readouts: Sequence[Readout],
    contexts: int,
    whole: bool,
) -> None:
    """Refuse an impossible request before any text is read."""
    sae.check_model(model)
    for readout in readouts:
        readout.check_model(model)
    _check_choice(latents, whole)
    require_windows(contexts)
    cosines(sae, [], readouts)


def _choose_indices(
    model: Any,
    tokenizer: Any,
    sae: SparseAutoencoder,
    texts: Sequence[str | Mapping[str, Any]],
    how: ReadingOptions,
    latents: Sequence[int] | str | None,
    top: int,
    seed: int,
) -> tuple[list[int], str, Survey | None]:
    """Indices, the rule in words, and the survey of all latents if the choice needed one."""
    if latents is None or isinstance(latents, str):
        every = survey(model, tokenizer, sae, texts, how)
        norms = sae.decoder.norm(dim=1).cpu()
        return *_choose_by_rule(every, norms, top, None if latents is None else seed), every
    chosen = list(dict.fromkeys(int(index) for index in latents))
    sae.latents(chosen)
    return chosen, "as given", None


def _check_choice(latents: Sequence[int] | str | None, whole: bool) -> None:
    if isinstance(latents, str) and latents != "random":
        raise ValueError(
            f"`latents` is {latents!r} – expected indices, `random`, or none for the `top` that write most."
        )
    if (latents is None or isinstance(latents, str)) and not whole:
        raise ValueError(
            "`whole` is False without `latents` – expected indices: choosing among all means to read all."
        )


def _pages(
    model: Any,
    tokenizer: Any,
    sae: SparseAutoencoder,
    gathered: Sequence[LatentContexts],
    compared: Sequence[dict[str, float]],
    detected: Sequence[Detection | None],
) -> list[LatentPage]:
    norms = sae.decoder.norm(dim=1).cpu()
    written = promotions(model, tokenizer, sae, [one.index for one in gathered])
    return [
        LatentPage(one, one.density * one.mean * float(norms[one.index]), *written[i], compared[i], detected[i])
        for i, one in enumerate(gathered)
    ]


def _five_digits(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _five_digits(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_five_digits(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _choose_by_rule(survey: Survey, norms: torch.Tensor, top: int, seed: int | None) -> tuple[list[int], str]:
    """Indices, and the rule in words."""
    alive = (survey.density > 0).nonzero().squeeze(1)
    if not len(alive) or top < 1:
        raise ValueError(
            f"{len(alive)} latents are on anywhere in {survey.tokens} tokens, and `top` is {top} – expected one of each or more. "
            "Is this the autoencoder of this model and hook point?"
        )
    if seed is not None:
        drawn = np.random.default_rng(seed).permutation(len(alive))[:top]
        return sorted(
            alive[drawn].tolist()
        ), f"drawn at random (seed {seed}) among the {len(alive)} that are on somewhere"
    order = (survey.mean * norms.double()).argsort(descending=True, stable=True)[: min(top, len(alive))]
    return order.tolist(), "those that write most: mean activation times the norm of the decoder row"


def _detect(
    model: Any,
    tokenizer: Any,
    sae: SparseAutoencoder,
    chosen: list[int],
    halves: tuple[Examples, Examples],
    seed: int,
    progress: bool,
) -> list[Detection]:
    maxima = []
    for half in halves:
        batch = counted_batch(model, tokenizer, half.rows)
        label = "labelled examples" if progress else None
        (found,), _ = pool_latents(model, batch, [sae.latents(chosen)], progress=label)
        maxima.append(found.maxima.double().numpy())
    fit, rest = halves
    return [_as_detector(a, fit.labels, b, rest, seed) for a, b in zip(maxima[0].T, maxima[1].T, strict=True)]


def _as_detector(values: np.ndarray, labels: np.ndarray, others: np.ndarray, rest: Examples, seed: int) -> Detection:
    threshold = best_threshold(values, labels)
    positive = rest.labels == 1
    said = others > threshold if threshold is not None else np.zeros(len(others), dtype=bool)
    hits = int((said & positive).sum())
    return Detection(
        threshold, hits / int(said.sum()) if said.any() else None, hits / int(positive.sum()),
        auroc_interval(rest.labels, others, rest.groups, seed), int(positive.sum()), len(rest),
    )  # fmt: skip


def best_threshold(values: np.ndarray, labels: np.ndarray) -> float | None:
    """Middle between two neighbouring values (N,) above which predicting label 1 has the highest F1; the highest of several."""
    order = np.argsort(-values, kind="stable")
    ordered, hits = values[order], np.cumsum(labels[order])
    ends = np.flatnonzero(ordered[:-1] > ordered[1:])  # the last row of each value but the lowest
    if not len(ends):
        return None
    best = ends[np.argmax(2 * hits[ends] / (ends + 1 + labels.sum()))]
    return float(ordered[best] + ordered[best + 1]) / 2
