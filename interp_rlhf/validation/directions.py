"""Directions that a causal check compares a concept with: random, of the same variance, foreign, and the other recipe's.

In: activations, a model to read contrasts with, or labelled examples. Out: unit vectors (D,). It must not know what is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..activations.batch import tokenize_examples
from ..activations.collect import read_means
from ..activations.counted import end_of_turn_ids
from ..concepts.linear import METHODS, LinearProbe
from .causal_settings import FOREIGN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..concepts.causal_findings import ControlKind
    from ..concepts.examples import Examples
    from ..concepts.readout import Readout

# How near to the concept a foreign direction may be, by the weighted cosine: a relative is no control.
NEAR = 0.5

# Contrasts that have nothing to do with what people reward: language, time, numbers, who speaks, and questions.
_CONTRASTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "French": (
        ("Le train part à huit heures.", "La maison est près de la rivière.", "Il pleut depuis hier soir.",
         "Nous mangeons du pain et du fromage.", "Le livre est sur la table.", "Elle travaille dans un bureau."),
        ("The train leaves at eight.", "The house is near the river.", "It has rained since last night.",
         "We eat bread and cheese.", "The book is on the table.", "She works in an office."),
    ),
    "past": (
        ("The train left at eight.", "They painted the door green.", "The shop closed in spring.",
         "She wrote two letters.", "The river froze over.", "He carried the boxes upstairs."),
        ("The train will leave at eight.", "They will paint the door green.", "The shop will close in spring.",
         "She will write two letters.", "The river will freeze over.", "He will carry the boxes upstairs."),
    ),
    "numbers": (
        ("The room is 14 by 22 feet.", "It cost 350 in 1998.", "Line 7 has 1,204 words.",
         "Add 3 to 45 and get 48.", "The bridge is 280 metres long.", "Page 61 has 12 pictures."),
        ("The room is long and narrow.", "It cost a lot back then.", "That line has many words.",
         "Add one to the other.", "The bridge is quite long.", "That page has some pictures."),
    ),
    "first person": (
        ("I walk to the station.", "I keep my tools in the shed.", "I read the paper at noon.",
         "I painted my fence.", "My bicycle is blue.", "I left my coat there."),
        ("He walks to the station.", "They keep their tools in the shed.", "She reads the paper at noon.",
         "They painted their fence.", "His bicycle is blue.", "She left her coat there."),
    ),
    "question": (
        ("Is the door open?", "Where does the road end?", "Who wrote this book?", "Does the bus stop here?",
         "When was the bridge built?", "Which key is the right one?"),
        ("The door is open.", "The road ends here.", "She wrote this book.", "The bus stops here.",
         "The bridge is old.", "This key is the right one."),
    ),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class ControlDirection:
    """A unit vector (D,) with its name and what kind of control it is."""

    name: str
    kind: ControlKind
    vector: torch.Tensor


@dataclass(frozen=True, eq=False)
class Spread:
    """Activations (N, D) of the model's own runs, along which directions are measured."""

    activations: torch.Tensor

    def sigma(self, direction: torch.Tensor) -> float:
        """Standard deviation along a unit vector."""
        return float((self.activations @ direction).std(correction=0))

    def mean(self, direction: torch.Tensor) -> float:
        """Mean coordinate along a unit vector."""
        return float((self.activations @ direction).mean())

    def weighted_cosine(self, one: torch.Tensor, other: torch.Tensor) -> float:
        """Correlation of the two coordinates over tokens: the cosine weighted by the covariance. 0 where one does not vary."""
        a, b = (self.activations @ one).double(), (self.activations @ other).double()
        a, b = a - a.mean(), b - b.mean()
        size = float(a.norm() * b.norm())
        return float(a @ b) / size if size > 0 else 0.0

    def same_variance(self, direction: torch.Tensor, seed: int) -> torch.Tensor:
        """A random unit vector, uncorrelated with the coordinate along `direction`, along which the activations vary as much.

        A random vector is stretched along the principal axes of what is uncorrelated, by a power of their variances, which
        bisection finds: the variance rises with it. Where nothing uncorrelated varies as much, it is the axis that varies most.
        """
        centred = (self.activations - self.activations.mean(0)).double()
        covariance = centred.T @ centred / len(centred)
        correlated = nn.functional.normalize(covariance @ direction.double(), dim=0)
        away = torch.eye(len(direction), dtype=torch.float64) - correlated[:, None] * correlated
        values, axes = torch.linalg.eigh(away @ covariance @ away)
        values, axes = values[1:], axes[:, 1:]  # the first is along `correlated`, and 0
        values = values.clamp(min=1e-6 * float(values[-1]))
        drawn = torch.randn(len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        target = self.sigma(direction) ** 2
        low, high = -8.0, 8.0
        weights = drawn
        for _ in range(60):
            power = (low + high) / 2
            weights = nn.functional.normalize(drawn * (values / values[-1]) ** (power / 2), dim=0)
            low, high = (power, high) if float(weights**2 @ values) < target else (low, power)
        return (axes @ weights).float()


def unit_direction(readout: Readout) -> torch.Tensor:
    """Direction (D,) of a readout at length 1.

    Raises:
        `ValueError`: it is 0, or not finite.
    """
    direction = readout.direction.float()
    if not torch.isfinite(direction).all() or not float(direction.norm()) > 0:
        raise ValueError(
            f"Readout `{readout.name}` has a direction of norm {float(direction.norm())} – expected one that is finite and not 0."
        )
    return nn.functional.normalize(direction, dim=0)


def random_directions(width: int, count: int, seed: int) -> list[ControlDirection]:
    """Random unit vectors (D,), uniform on the sphere."""
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    rows = nn.functional.normalize(drawn, dim=1)
    return [ControlDirection(f"random {i + 1}", "random", row) for i, row in enumerate(rows)]


def foreign_directions(
    model: Any, tokenizer: Any, hook_point: str, own: torch.Tensor, spread: Spread, given: Mapping[str, torch.Tensor]
) -> list[ControlDirection]:
    """The user's foreign directions, and built-in ones as long as there are fewer than `FOREIGN`.

    A direction whose weighted cosine with the concept is above `NEAR` is left out: what is nearly the concept is no control.
    """
    kept = []
    for name, vector in given.items():
        if len(vector) != len(own) or not float(vector.norm()) > 0:
            raise ValueError(
                f"The foreign direction `{name}` has width {len(vector)} and norm {float(vector.norm()):.3g} – expected a vector "
                f"of width {len(own)} that is not 0. Fit it at `{hook_point}` of this model."
            )
        kept.append(ControlDirection(name, "foreign", nn.functional.normalize(vector.float(), dim=0)))
    kept = [one for one in kept if abs(spread.weighted_cosine(one.vector, own)) <= NEAR]
    for name, (texts, others) in _CONTRASTS.items():
        if len(kept) >= FOREIGN:
            break
        means = mean_activations(model, tokenizer, hook_point, [*texts, *others])
        labels = np.array([1] * len(texts) + [0] * len(others))
        vector = fitted_direction(means, labels, "difference_of_means")
        if abs(spread.weighted_cosine(vector, own)) <= NEAR:
            kept.append(ControlDirection(name, "foreign", vector))
    return kept


def other_recipe(
    model: Any, tokenizer: Any, readout: Readout, examples: Examples, chat: Mapping[str, Any]
) -> tuple[str, torch.Tensor]:
    """The method by which a readout was not fitted, and its direction on labelled examples."""
    fitted_by = readout.header.method if readout.header is not None else METHODS[0]
    method = next(name for name in METHODS if name != fitted_by)
    means = mean_activations(model, tokenizer, readout.hook_point, examples.rows, chat)
    return method, fitted_direction(means, examples.labels, method, examples.groups)


def fitted_direction(
    means: np.ndarray, labels: np.ndarray, method: str, groups: Sequence[str] | None = None
) -> torch.Tensor:
    """Unit vector (D,) of a probe on mean activations (N, D)."""
    weight, _ = LinearProbe(method).fit(means, labels, groups)
    return nn.functional.normalize(torch.tensor(weight, dtype=torch.float32), dim=0)


def mean_activations(
    model: Any, tokenizer: Any, hook_point: str, rows: Sequence[Any], chat: Mapping[str, Any] | None = None
) -> np.ndarray:
    """Mean activation (N, D) of each row's counted tokens."""
    chat = dict(chat or {})
    ends = end_of_turn_ids(model, tokenizer, chat.get("chat_template"))
    batch = tokenize_examples(rows, tokenizer, end_of_turn_ids=ends, **chat)
    return np.asarray(read_means(model, batch, hook_point)[hook_point].double().numpy())
