"""Sites of patching: a component of a block, one of its heads, or one of its positions.

In: components and hook points. Out: sites, and arrays of one number per site. It must not know models.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..activations.components import ATTENTION_OUT, HEADS, MLP_OUT, RESIDUAL

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# Sites that are ranked together. What a whole residual stream carries cannot be ranked with what one module adds to it, nor a
# module with one of the module's heads.
GROUPS: dict[str, tuple[str, ...]] = {"outputs": (ATTENTION_OUT, MLP_OUT), "heads": (HEADS,), "residual": (RESIDUAL,)}


@dataclass(frozen=True)
class Site:
    """Where an activation is replaced.

    Attributes:
        component (`str`): `residual`, `attention`, `mlp` or `heads`.
        block (`int`): index of the decoder layer.
        hook_point (`str`): path of the activation.
        head (`int`, *optional*): index of the head.
        position (`int`, *optional*): −1 is the last token of the prompt. All positions if it is None.
    """

    component: str
    block: int
    hook_point: str
    head: int | None = None
    position: int | None = None

    def __str__(self) -> str:
        head = "" if self.head is None else f" head {self.head}"
        return f"{self.hook_point}{head}" + ("" if self.position is None else f" at {self.position}")

    def to_json(self) -> dict[str, Any]:
        """The site as a JSON object, without what it leaves open."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def value(self, maps: Mapping[str, np.ndarray]) -> float:
        """What maps of one number per component, block, head and position hold for this site; sums are taken over positions."""
        row = maps[self.component][self.block]
        row = row if self.head is None else row[self.head]
        if self.position is None:
            return float(row.sum())
        return float(row[self.position]) if -self.position <= len(row) else 0.0


def sites_of(
    points: Mapping[str, Sequence[str]], components: Sequence[str], heads: int, positions: int, whole: bool
) -> list[Site]:
    """All sites of some components.

    Args:
        points (`Mapping[str, Sequence[str]]`): component to hook points, one per block.
        heads (`int`), positions (`int`): how many there are.
        whole (`bool`): one site for all positions; otherwise one per position.
    """

    def places() -> Iterator[tuple[str, int, str, int | None]]:
        for component in components:
            for block, point in enumerate(points[component]):
                for head in range(heads) if component == HEADS else (None,):
                    yield component, block, point, head

    where = (None,) if whole else tuple(range(-positions, 0))
    return [Site(*place, position) for place in places() for position in where]


def from_the_end(maps: Sequence[np.ndarray], width: int) -> np.ndarray:
    """Mean of arrays whose last axis has up to `width` entries, matched at their ends; what an array lacks counts as 0."""
    total = np.zeros((*maps[0].shape[:-1], width))
    for one in maps:
        if one.shape[-1]:
            total[..., width - one.shape[-1] :] += one
    return total / len(maps)
