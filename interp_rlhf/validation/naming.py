"""Names of latents by a judge, each with its score: does the name tell where the latent is on, on windows that did not name it?

In: pages of latents and a judge. Out: pages with names. A name without a score cannot be made.

Source: detection scoring as in Paulo et al. 2024, *Automatically interpreting millions of features in large language models*
(arXiv 2410.13928). Deviation: the score stands next to that of another latent's name on the same windows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from .judges import CountedJudge
from .statistics import RESAMPLES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..sae.contexts import Window
    from .inspecting import LatentPage
    from .judges import Judge

ASK_NAME = (
    "In the first texts below, one feature is present at the words in [[ ]]. In the other texts it is absent. Name what these "
    "words have in common, in at most five words.\n\nPresent:\n{on}\n\nAbsent:\n{off}\n\nName:"
)
ASK_FITS = "Does the text contain this: {name}?\n\nText: {text}\n\nAnswer yes or no:"


@dataclass(frozen=True)
class LatentName:
    """A name and how well it detects its latent on windows that the judge had not seen.

    Attributes:
        name (`str`): what the judge wrote.
        score (`float`): balanced accuracy: mean of the shares of windows with and without the latent that the judge gets right.
            One half is chance.
        low (`float`), high (`float`): its 95 % interval, a bootstrap over windows.
        other (`float`, *optional*): score of another latent's name on the same windows.
        windows (`int`): number of windows.
        judge (`str`), prompts (`str`): who judged, and the SHA-256 of both questions.
    """

    name: str
    score: float
    low: float
    high: float
    other: float | None
    windows: int
    judge: str
    prompts: str

    def __str__(self) -> str:
        other = "" if self.other is None else f"; another latent's name {self.other:.2f}"
        return f"{self.name} (detects {self.score:.2f} [{self.low:.2f}, {self.high:.2f}]{other})"


def named_pages(pages: Sequence[LatentPage], judge: Judge, seed: int) -> list[LatentPage]:
    """Pages with names where the judge gave one that could be scored.

    The judge names a latent by every second window, and is scored on the others.

    Raises:
        `RuntimeError`: more than a tenth of the judge's calls failed. No name is kept then.
    """
    counted = CountedJudge(judge)
    names = [_name_of(page, counted) for page in pages]
    scored = []
    for i, (page, name) in enumerate(zip(pages, names, strict=True)):
        other = next((n for n in [*names[i + 1 :], *names[:i]] if n is not None and n != name), None)
        scored.append(replace(page, name=None if name is None else _scored(page, name, other, counted, seed)))
    counted.require_reliable()
    return scored


def _name_of(page: LatentPage, judge: CountedJudge) -> str | None:
    on, off = page.contexts.top[0::2], page.contexts.off[0::2]
    if not on or not page.contexts.top[1::2] or not page.contexts.off[1::2]:
        return None  # nothing to score a name on
    return judge.write(ASK_NAME.format(on=_as_lines(on, marked=True), off=_as_lines(off, marked=False)))


def _scored(page: LatentPage, name: str, other: str | None, judge: CountedJudge, seed: int) -> LatentName | None:
    rng = np.random.default_rng(seed + page.index)
    windows = [(window, True) for window in page.contexts.top[1::2]]
    windows += [(window, False) for window in page.contexts.off[1::2][: len(windows)]]
    windows = [windows[i] for i in rng.permutation(len(windows))]
    right = _right(name, windows, judge)
    kept = [value is not None for value in right]
    labels = np.array([label for (_, label), keep in zip(windows, kept, strict=True) if keep])
    hits = np.array([float(value) for value in right if value is not None])
    if len(set(labels.tolist())) < 2:
        return None  # the judge abstained on all windows of one kind
    drawn = rng.integers(len(hits), size=(RESAMPLES, len(hits)))
    with np.errstate(invalid="ignore"):
        accuracies = np.array([_balanced(labels[rows], hits[rows]) for rows in drawn])
    low, high = np.nanpercentile(accuracies, [2.5, 97.5])
    of_other = None
    if other is not None:
        answers = _right(other, windows, judge)
        there = [value is not None for value in answers]
        held = np.array([label for (_, label), keep in zip(windows, there, strict=True) if keep])
        if len(set(held.tolist())) == 2:
            of_other = round(_balanced(held, np.array([float(v) for v in answers if v is not None])), 4)
    prompts = hashlib.sha256((ASK_NAME + ASK_FITS).encode()).hexdigest()
    score = round(_balanced(labels, hits), 4)
    return LatentName(
        name,
        score,
        round(float(low), 4),
        round(float(high), 4),
        of_other,
        len(hits),
        judge.identity,
        f"sha256:{prompts}",
    )


def _right(name: str, windows: Sequence[tuple[Window, bool]], judge: CountedJudge) -> list[bool | None]:
    """Whether the judge is right about each window; None where it abstains."""
    right: list[bool | None] = []
    for window, label in windows:
        chances = judge.choose(ASK_FITS.format(name=name, text="".join(window.pieces).strip()), ("yes", "no"))
        right.append(None if chances is None else (chances["yes"] > chances["no"]) == label)
    return right


def _balanced(labels: np.ndarray, hits: np.ndarray) -> float:
    """Mean of the accuracies on both labels; NaN if one is missing."""
    sides = [hits[labels == side] for side in (True, False)]
    return float(np.mean([side.mean() if len(side) else np.nan for side in sides]))


def _as_lines(windows: Sequence[Window], marked: bool) -> str:
    """Windows as lines; the token of the highest activation in double brackets."""
    lines = []
    for window in windows:
        pieces = [f"[[{piece}]]" if marked and i == window.peak else piece for i, piece in enumerate(window.pieces)]
        lines.append("- " + " ".join("".join(pieces).split()))
    return "\n".join(lines)
