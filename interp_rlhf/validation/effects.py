"""Whether an effect is the concept's: medians and shares of prompts, next to random and foreign directions.

In: the measure's move on each prompt, under the concept's direction and under controls. Out: an `Effect`, and a verdict. It must
not know models. Medians and shares are used because the mean of a few prompts with huge moves says little about the rest.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..concepts.causal_findings import Effect
from ..concepts.strict import Difference
from .statistics import MIN_PROMPTS, RESAMPLES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..concepts.causal_findings import CausalVerdict

# A direction without meaning exceeds the bound in this share of cases, one-sided.
BY_LUCK = 0.01
# Prompts on which the concept occurs, without which silencing is not tested.
MIN_OCCURRING = 8
# Share of the dose curve's variance that a rising curve must explain.
MONOTONE = 0.75


def typical(moves: np.ndarray, two_values: bool) -> np.ndarray:
    """Typical move over the last axis: the median; of a measure with two values, the share of rises less that of falls."""
    return np.sign(moves).mean(-1) if two_values else np.median(moves, axis=-1)


def effect_of(
    moves: np.ndarray, randoms: np.ndarray, others: Mapping[str, np.ndarray], two_values: bool, seed: int,
    enough: int = MIN_PROMPTS,
) -> Effect:  # fmt: skip
    """The effect of a direction.

    Args:
        moves (`np.ndarray` of shape (P,)): each prompt's move, higher = more as the concept predicts.
        randoms (`np.ndarray` of shape (R, P)): the same of random directions.
        others (`dict[str, np.ndarray]`): the same of other controls. Their sign is free, so each is taken with the sign that
            helps it most.
        two_values (`bool`): the measure has two values.
        enough (`int`): number of prompts below which nothing passes.
    """
    drawn = np.random.default_rng(seed).integers(len(moves), size=(RESAMPLES, len(moves)))

    def with_bounds(value: float, resampled: np.ndarray) -> Difference:
        if len(moves) < enough:
            return Difference(value=round(value, 4))
        low, high = np.percentile(resampled, [2.5, 97.5])
        return Difference(value=round(value, 4), low=round(float(low), 4), high=round(float(high), 4))

    def share(wins: np.ndarray) -> Difference:
        return with_bounds(float(wins.mean()), wins[drawn].mean(1))

    middle = with_bounds(float(typical(moves, two_values)), typical(moves[drawn], two_values))
    rising = share(_wins(moves, np.zeros_like(moves)))
    beats = {}
    for name, other in others.items():
        sign = 1.0 if typical(other, two_values) >= 0 else -1.0
        beats[name] = share(_wins(moves, sign * other))
    bound = luck(randoms, two_values)
    sure = [rising, *beats.values()]
    passes = all(part.low is not None and part.low > 0.5 for part in sure) and middle.value > bound
    return Effect(
        prompts=len(moves), typical=middle, share=rising, bound=round(bound, 4), beats=beats, passes=passes
    )  # fmt: skip


def luck(randoms: np.ndarray, two_values: bool) -> float:
    """Typical effect that one more random direction exceeds in `BY_LUCK` of cases.

    Typical effects of random directions are taken as normal around 0, since a direction and its opposite are alike: with R of
    them, the next is within t(R) · s · √(1 + 1/R), a prediction interval with s² their mean square.
    """
    from scipy.stats import t

    effects = typical(randoms, two_values)
    spread = math.sqrt(float((effects**2).mean()))
    return float(t.ppf(1 - BY_LUCK, len(effects))) * spread * math.sqrt(1 + 1 / len(effects))


def monotone_fit(alphas: np.ndarray, values: np.ndarray) -> float:
    """Share of the variance of a dose curve (A,) that the best rising curve explains, in [0, 1]; 0 for a flat one."""
    from sklearn.isotonic import IsotonicRegression

    total = float(((values - values.mean()) ** 2).sum())
    if total == 0:
        return 0.0
    fitted = IsotonicRegression().fit_transform(alphas, values)
    return round(1 - float(((values - fitted) ** 2).sum()) / total, 4)


def verdict_of(
    steer: Effect | None, silences: list[Effect | None], monotone: float
) -> tuple[CausalVerdict, list[str]]:
    """Verdict, and the reasons why it is not `causal`.

    Args:
        steer (`Effect`, *optional*): None if no dose counts on both sides.
        silences (`list[Effect | None]`): projecting out and mean-ablating; None where the concept occurs too rarely.
        monotone (`float`): see `monotone_fit`.
    """
    reasons = []
    if steer is None:
        reasons.append("no dose keeps the text within the limits on both sides")
    tested = [silence for silence in silences if silence is not None]
    if len(tested) < len(silences):
        reasons.append("silencing was not tested")
    steers = steer is not None and steer.passes and monotone >= MONOTONE
    if steer is not None and not steers:
        reasons.append(f"steering: {_shortfall(steer, monotone)}")
    ways = ("projected out", "set to its mean")
    failed = [
        f"{way}: {_shortfall(silence)}" for way, silence in zip(ways, tested, strict=False) if not silence.passes
    ]
    if steer is None or len(tested) < len(silences):
        return "insufficient evidence", reasons + failed
    if steers:
        return ("causal", []) if not failed else ("steers only", reasons + failed)
    return ("silences only" if not failed else "read-only"), reasons + failed


def _shortfall(effect: Effect, monotone: float = 1.0) -> str:
    """Why an effect does not pass."""
    if effect.share.low is None:
        return f"{effect.prompts} prompts are too few"
    if effect.share.low <= 0.5:
        share = effect.share
        return f"{share.value:.0%} of {effect.prompts} prompts move as predicted, by the lower bound {share.low:.0%}"
    if effect.typical.value <= effect.bound:
        return (
            f"the typical effect {effect.typical.value:.3g} is within what random directions do ({effect.bound:.3g})"
        )
    lost = [name for name, part in effect.beats.items() if part.low is None or part.low <= 0.5]
    if lost:
        return f"it does not move more than {', '.join(f'`{name}`' for name in lost)}"
    return f"a rising curve explains {monotone:.0%} of the doses' variance, less than {MONOTONE:.0%}"


def _wins(moves: np.ndarray, others: np.ndarray) -> np.ndarray:
    """1 where the first is larger, 1/2 for ties. Moves within a millionth of the largest are ties: they are rounding."""
    close = 1e-6 * max(float(np.abs(moves).max(initial=0)), float(np.abs(others).max(initial=0)))
    gap = moves - others
    return np.where(np.abs(gap) <= close, 0.5, (gap > 0).astype(float))
