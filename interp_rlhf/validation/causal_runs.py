"""Runs of a causal check: doses, silences and interchanges of one direction and of its controls.

In: a behaviour, a direction, its controls. Out: `CausalFindings`. It must not know where prompts and directions come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ..activations.changes import Change
from ..concepts.artifact import library_versions
from ..concepts.causal_findings import CausalControl, CausalFindings, Dose, OtherRecipe
from .causal_settings import FOREIGN
from .effects import MIN_OCCURRING, effect_of, monotone_fit, typical, verdict_of
from .jobs import Job
from .statistics import MIN_PROMPTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from ..concepts.causal_findings import Effect
    from .directions import ControlDirection, Spread
    from .jobs import Behaviour, Guards

# A dose counts if the answers are not much less likely, and not much more often empty or repeated, than without a change.
LIMITS = {"perplexity": 3.0, "empty": 0.1, "repeated": 0.25}
# Share of the largest rise at which a dose is large enough.
ENOUGH = 0.9
# Two recipes disagree below this weighted cosine.
AGREE = 0.5


@dataclass(frozen=True, eq=False)
class DoseCurve:
    """The concept's dose curve: values (A, P), guards per dose, and which doses count. The dose 0 is among them."""

    alphas: np.ndarray
    values: np.ndarray
    guards: list[Guards]
    counts: np.ndarray

    @cached_property
    def dose(self) -> float:
        """Dose α at which −α and α are compared; 0 if no dose counts on both sides.

        The smallest with `ENOUGH` of the largest rise from −α to α. Beyond it the concept gains nothing, and directions without
        meaning catch up. Both sides have one dose, so that a random direction and its opposite are alike.
        """
        both = [a for a in self.alphas[self.counts & (self.alphas > 0)] if self.counts[self.alphas == -a].any()]
        rises = [float(typical(self._at(a) - self._at(-a), self.two_values)) for a in both]
        if not both:
            return 0.0
        largest = max(rises)
        reached = [a for a, rise in zip(both, rises, strict=True) if rise >= ENOUGH * largest]
        return float(reached[0] if largest > 0 else both[-1])

    def _at(self, alpha: float) -> np.ndarray:
        """Values (P,) at a dose."""
        return np.asarray(self.values[self.alphas == alpha][0])

    def rises(self) -> np.ndarray:
        """Rise (P,) from −`dose` to `dose`."""
        return self._at(self.dose) - self._at(-self.dose)

    @cached_property
    def two_values(self) -> bool:
        """True if the measure has two values."""
        return len(np.unique(self.values)) <= 2

    @property
    def counted(self) -> np.ndarray:
        """Values (C, P) at the doses that count."""
        return self.values[self.counts]


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured on the concept's doses and on the controls, which other effects are compared with.

    Attributes:
        unchanged (`np.ndarray` of shape (P,)): values of the model as it is.
        occurring (`np.ndarray`): prompts on which the concept occurs.
        randoms (`list[str]`): names of the random directions among the controls.
        steered, silenced (`dict[str, np.ndarray]`): rises (P,), and falls where the concept occurs, by control.
    """

    curve: DoseCurve
    unchanged: np.ndarray
    occurring: np.ndarray
    randoms: list[str]
    steered: dict[str, np.ndarray]
    silenced: dict[str, np.ndarray]
    seed: int

    def rise(self, moves: np.ndarray) -> Effect:
        """Effect of steering."""
        return self._effect(moves, self.steered, MIN_PROMPTS)

    def fall(self, moves: np.ndarray) -> Effect | None:
        """Effect of silencing; None if the concept occurs on too few prompts."""
        return None if len(moves) < MIN_OCCURRING else self._effect(moves, self.silenced, MIN_OCCURRING)

    def move(self, moves: np.ndarray, of_controls: dict[str, np.ndarray]) -> Effect:
        """Effect of an interchange, next to controls without random directions, whose coordinates hardly differ."""
        return self._effect(moves, of_controls, MIN_PROMPTS // 2)

    def _effect(self, moves: np.ndarray, of_controls: dict[str, np.ndarray], enough: int) -> Effect:
        randoms = [of_controls[name] for name in self.randoms if name in of_controls]
        others = {name: moved for name, moved in of_controls.items() if name not in self.randoms}
        drawn = np.stack(randoms) if randoms else np.zeros((1, len(moves)))
        return effect_of(moves, drawn, others, self.curve.two_values, self.seed, enough)


@dataclass(frozen=True, eq=False)
class CausalRuns:
    """One direction, what it is compared with, and the behaviour that is measured.

    Attributes:
        means (`list[torch.Tensor]`): mean activation (D,) of each prompt's own run.
        other (`tuple[str, torch.Tensor]`, *optional*): method and direction of the other recipe.
    """

    behaviour: Behaviour
    direction: torch.Tensor
    spread: Spread
    means: list[torch.Tensor]
    controls: list[ControlDirection]
    other: tuple[str, torch.Tensor] | None
    doses: tuple[float, ...]
    seed: int

    def findings(self, occurs: float | None, digest: str, command: str) -> CausalFindings:
        """Run everything and judge it."""
        step = self._require_step()
        curve = self._curve()
        unchanged = curve.values[curve.alphas == 0][0]
        level = float(curve.counted.min() + curve.counted.max()) / 2 if occurs is None else occurs
        occurring = np.flatnonzero(unchanged > level)
        self._require_occurring(occurring, unchanged, level, curve)
        vectors = {one.name: one.vector for one in self.controls}
        own = {"project": Change.silencing(self.direction), "mean": self._to_mean(self.direction)}
        silences = {name: self._to_mean(vector) for name, vector in vectors.items()}
        falls = self._falls({**own, **silences}, occurring, unchanged)
        measured = Measured(
            curve, unchanged, occurring, [one.name for one in self.controls if one.kind == "random"],
            self._rises(vectors, curve.dose, "steering along controls"), {name: falls[name] for name in vectors}, self.seed,
        )  # fmt: skip
        steer = measured.rise(curve.rises()) if curve.dose else None
        project, mean = measured.fall(falls["project"]), measured.fall(falls["mean"])
        monotone = monotone_fit(curve.alphas[curve.counts], typical_values(curve.counted, measured.curve.two_values))
        verdict, reasons = verdict_of(steer, [project, mean], monotone)
        if lacks := self._lacking(curve):
            verdict, reasons = "insufficient evidence", lacks
        kept = [one for one in self.controls if one.kind != "random"]
        swapped = {one.name: self._moves(one.vector, unchanged) for one in kept}
        return CausalFindings(
            readout=digest, verdict=verdict, reasons=reasons, measure=self.behaviour.measure, prompts=self.behaviour.prompts,
            occurs=round(level, 4), sigma=round(step, 4), doses=self._dose_entries(measured), monotone=monotone,
            compared_at=curve.dose, steer=steer, project=project, mean=mean,
            interchange=measured.move(self._moves(self.direction, unchanged), swapped),
            other=self._of_other_recipe(measured, verdict), controls=self._control_entries(measured), limits=LIMITS,
            seed=self.seed, command=command, versions=library_versions(),
        )  # fmt: skip

    def _lacking(self, curve: DoseCurve) -> list[str]:
        """Why nothing can be said at all."""
        foreign = sum(one.kind == "foreign" for one in self.controls)
        lacks = []
        if np.ptp(curve.values) == 0:
            lacks.append(f"`{self.behaviour.measure}` is {curve.values[0, 0]:.3g} for every answer")
        if foreign < FOREIGN:
            lacks.append(f"{foreign} foreign directions are unrelated to the concept, fewer than {FOREIGN}")
        return lacks

    def _require_step(self) -> float:
        """The unit of a dose."""
        step = self.spread.sigma(self.direction)
        if step < 1e-6 * float(self.spread.activations.norm(dim=1).median()):
            raise ValueError(
                f"The activation has the standard deviation {step:.3g} along the direction in the model's own text – expected "
                "a direction along which it varies there: a dose is counted in that unit. Use prompts whose answers differ in "
                "the concept."
            )
        return step

    def _curve(self) -> DoseCurve:
        """Values of the concept's doses, in ascending order. Doses beyond one that breaks the text do not count."""
        prompts = range(self.behaviour.prompts)
        alphas = sorted({0.0, *self.doses})
        step = self.spread.sigma(self.direction) * self.direction
        jobs = {alpha: [Job(i, Change.steering(alpha * step)) for i in prompts] for alpha in alphas if alpha}
        finished = self.behaviour.run([job for part in jobs.values() for job in part], "steering along the concept")
        done = {0.0: self.behaviour.unchanged()}
        done |= {a: finished[i * len(prompts) : (i + 1) * len(prompts)] for i, a in enumerate(jobs)}
        rows = [(jobs.get(alpha) or [Job(i) for i in prompts], done[alpha]) for alpha in alphas]
        guards = [self.behaviour.guards(*row) for row in rows]
        calm = guards[alphas.index(0.0)]
        within = [
            guard.perplexity <= LIMITS["perplexity"] * calm.perplexity
            and guard.empty <= calm.empty + LIMITS["empty"]
            and guard.repeated <= calm.repeated + LIMITS["repeated"]
            for guard in guards
        ]
        counts = [
            all(within[b] for b, beta in enumerate(alphas) if alpha * beta > 0 and abs(beta) <= abs(alpha))
            or alpha == 0
            for alpha in alphas
        ]
        values = np.array([[done.value for done in part] for _, part in rows])
        return DoseCurve(np.array(alphas), values, guards, np.array(counts))

    def _values(self, jobs: Mapping[str, Sequence[Job]], label: str) -> dict[str, np.ndarray]:
        """Values of several lists of jobs, in common batches."""
        values = self.behaviour.values([job for part in jobs.values() for job in part], label)
        ends = np.cumsum([len(part) for part in jobs.values()])[:-1]
        return dict(zip(jobs, np.split(values, ends), strict=True))

    def _rises(self, vectors: Mapping[str, torch.Tensor], dose: float, label: str) -> dict[str, np.ndarray]:
        """Rise (P,) of the measure from a step against each direction to the same step along it, by the concept's unit."""
        prompts, size = range(self.behaviour.prompts), dose * self.spread.sigma(self.direction)
        if not dose:
            return {name: np.zeros(len(prompts)) for name in vectors}
        jobs = {
            name: [Job(i, Change.steering(side * size * vector)) for side in (-1, 1) for i in prompts]
            for name, vector in vectors.items()
        }
        halves = {name: np.split(values, 2) for name, values in self._values(jobs, label).items()}
        return {name: high - low for name, (low, high) in halves.items()}

    def _falls(
        self, changes: Mapping[str, Change], prompts: np.ndarray, unchanged: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Fall of the measure on some prompts, by change."""
        jobs = {name: [Job(int(i), change) for i in prompts] for name, change in changes.items()}
        return {name: unchanged[prompts] - values for name, values in self._values(jobs, "silencing").items()}

    def _to_mean(self, vector: torch.Tensor) -> Change:
        """Sets the coordinate along a unit vector to its mean."""
        return Change.silencing(vector, self.spread.mean(vector))

    def _moves(self, vector: torch.Tensor, unchanged: np.ndarray) -> np.ndarray:
        """Moves of pairs of prompts towards each other when their mean coordinates are swapped, half the sum of both."""
        order = np.argsort(unchanged, kind="stable")
        half = len(order) // 2
        jobs, signs = [], []
        for low, high in zip(order[:half].tolist(), order[::-1][:half].tolist(), strict=True):
            gap = float((self.means[high] - self.means[low]) @ vector) * vector
            jobs += [Job(low, Change.steering(gap)), Job(high, Change.steering(-gap))]
            signs += [1.0, -1.0]
        moved = self.behaviour.values(jobs, "interchange") - unchanged[[job.prompt for job in jobs]]
        return np.asarray((moved * np.array(signs)).reshape(-1, 2).mean(1))

    def _of_other_recipe(self, measured: Measured, verdict: str) -> OtherRecipe | None:
        if self.other is None:
            return None
        (method, vector), curve = self.other, measured.curve
        if not curve.dose:
            return None
        # The same dose in its own standard deviations.
        dose = curve.dose * self.spread.sigma(vector) / self.spread.sigma(self.direction)
        steer = measured.rise(self._rises({method: vector}, dose, "steering along the other recipe")[method])
        falls = self._falls({method: self._to_mean(vector)}, measured.occurring, measured.unchanged)
        silence = measured.fall(falls[method])
        of_other, _ = verdict_of(steer, [silence], 1.0)
        weighted = self.spread.weighted_cosine(vector, self.direction)
        return OtherRecipe(
            method=method, cosine=round(float(vector @ self.direction), 4), weighted_cosine=round(weighted, 4), steer=steer,
            silence=silence, verdict=of_other, disagrees=weighted < AGREE or of_other != verdict,
        )  # fmt: skip

    def _dose_entries(self, measured: Measured) -> list[Dose]:
        curve = measured.curve
        middles = typical_values(curve.values, measured.curve.two_values)
        return [
            Dose(
                alpha=float(alpha), value=round(float(middle), 4), perplexity=_in_yaml(guard.perplexity),
                empty=round(guard.empty, 4), repeated=round(guard.repeated, 4), counts=bool(counts),
            )
            for alpha, middle, guard, counts in zip(curve.alphas, middles, curve.guards, curve.counts, strict=True)
        ]  # fmt: skip

    def _control_entries(self, measured: Measured) -> list[CausalControl]:
        def middle(moves: np.ndarray) -> float | None:
            return round(float(typical(moves, measured.curve.two_values)), 4) if len(moves) else None

        return [
            CausalControl(
                name=one.name, kind=one.kind, cosine=round(float(one.vector @ self.direction), 4),
                weighted_cosine=round(self.spread.weighted_cosine(one.vector, self.direction), 4),
                steer=middle(measured.steered[one.name]), silence=middle(measured.silenced[one.name]),
            )
            for one in self.controls
        ]  # fmt: skip

    def _require_occurring(self, occurring: np.ndarray, unchanged: np.ndarray, level: float, curve: DoseCurve) -> None:
        if not len(occurring) and np.ptp(curve.values) > 0:
            raise ValueError(
                f"The concept occurs in no answer: `{self.behaviour.measure}` is at most {unchanged.max():.3g} without a change, "
                f"and it occurs above {level:.3g} – expected prompts on which the model shows the concept, so that it can be "
                "silenced. Add such prompts, or say above which value it occurs (`occurs`, `--occurs`)."
            )


def typical_values(values: np.ndarray, two_values: bool) -> np.ndarray:
    """Typical value (A,) of each dose over prompts: the median, or the mean of a measure with two values."""
    return np.asarray(values.mean(1) if two_values else np.median(values, axis=1))


def _in_yaml(value: float) -> float:
    """A number that a card can hold."""
    return round(value, 4) if math.isfinite(value) else 1e9
