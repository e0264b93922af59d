"""What a causal check found, as a card holds it.

In: numbers of `validation.causal`. Out: strict models. It must not know how they were measured, and imports no torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .strict import Difference, Digest, Strict

CausalVerdict = Literal["causal", "steers only", "silences only", "read-only", "insufficient evidence"]
ControlKind = Literal["random", "same variance", "foreign"]


class Dose(Strict):
    """One dose of steering.

    Attributes:
        alpha: dose, in standard deviations of the activation along the direction.
        value: typical value of the measure over prompts.
        perplexity: median perplexity of the answers for the model without a change.
        empty, repeated: shares of answers without text, and with mostly repeated text.
        counts: within the limits, as all smaller doses of its sign.
    """

    alpha: float
    value: float
    perplexity: float
    empty: float
    repeated: float
    counts: bool


class Effect(Strict):
    """What a change did to the measure, prompt by prompt, in the direction that the concept predicts.

    Attributes:
        prompts: number of prompts.
        typical: median over prompts; for a measure with two values, the share of prompts that rise minus those that fall.
        share: share of prompts that move as predicted, ties count one half.
        bound: typical effect that a direction without meaning exceeds in 1 of 100 cases, by the random directions.
        beats: for every control direction, share of prompts on which the concept moves more, ties count one half.
        passes: the share is above one half, the typical effect above the bound, and every control is beaten, each by the lower
            bound of its interval.
    """

    prompts: int
    typical: Difference
    share: Difference
    bound: float
    beats: dict[str, Difference]
    passes: bool


class CausalControl(Strict):
    """One control direction.

    Attributes:
        kind: `random`, `same variance` or `foreign`.
        cosine, weighted_cosine: with the concept's direction, plain and weighted by the activations' covariance.
        steer, silence: its typical effects, with their sign.
    """

    name: str
    kind: ControlKind
    cosine: float
    weighted_cosine: float
    steer: float | None = None
    silence: float | None = None


class OtherRecipe(Strict):
    """The direction that the other way of fitting gives on the same examples, and what it does."""

    method: str
    cosine: float
    weighted_cosine: float
    steer: Effect
    silence: Effect | None = None
    verdict: CausalVerdict
    disagrees: bool


class CausalFindings(Strict):
    """Result of a causal check.

    Attributes:
        readout: digest of the readout that was checked.
        verdict: *causal*: steering and silencing both pass. *insufficient evidence*: something could not be tested.
        reasons: why it is not `causal`, in words.
        measure: what was measured in the text.
        occurs: value of the measure above which the concept occurs.
        sigma: standard deviation of the activation along the direction, the unit of a dose.
        doses: curve of the concept, from the lowest dose; the dose 0 is the model as it is.
        monotone: share of the curve's variance that a rising curve explains.
        compared_at: dose α at which the concept is compared with controls: the smallest that counts on both sides and has nine
            tenths of the largest rise from −α to α; 0 if there is none.
        steer: rise from −α to α.
        project, mean: fall when the coordinate is projected out, and when it is set to its mean, where the concept occurs.
        interchange: move towards the partner when two prompts' mean coordinates are swapped.
        other: the other recipe; None without labelled examples.
        model: model that was checked, where it is not the card's own.
    """

    readout: Digest
    verdict: CausalVerdict
    reasons: list[str]
    measure: str
    prompts: int
    occurs: float
    sigma: float
    doses: list[Dose]
    monotone: float
    compared_at: float
    steer: Effect | None = None
    project: Effect | None = None
    mean: Effect | None = None
    interchange: Effect | None = None
    other: OtherRecipe | None = None
    controls: list[CausalControl] = Field(default_factory=list)
    limits: dict[str, float]
    model: str | None = None
    seed: int
    command: str
    versions: dict[str, str]

    @property
    def effects(self) -> dict[str, Effect | None]:
        """The effects under the names that people read, in the order in which they are shown; None: not tested."""
        return {
            "steer": self.steer, "project out": self.project, "set to its mean": self.mean,
            "interchange": self.interchange,
        }  # fmt: skip
