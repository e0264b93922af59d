"""The readout that a term trains through: the concept's, or a random control of the same strength.

In: a readout. Out: a readout. It must not know terms.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ...activations.counted import Counted
    from ...concepts.readout import Readout


def trained_through(readout: Readout, random_direction: int | None) -> Readout:
    """The readout through which a term's gradient runs: the concept's without its transform, or the random control.

    A transform may clip. Clipped scores have no gradient, so the term would not touch the sequences with the highest scores.
    """
    readout = replace(readout, transform=None)
    return readout if random_direction is None else random_like(readout, random_direction)


def random_like(readout: Readout, seed: int) -> Readout:
    """A control readout: each direction is replaced by a random one of the same norm, drawn from `seed`."""
    name = f"{readout.name}_random{seed}"
    generator = torch.Generator().manual_seed(seed)
    if readout.latents is not None:
        rows = readout.latents.chosen.cpu()
        drawn = torch.randn(rows.shape, generator=generator)
        rows = drawn * (rows.norm(dim=1) / drawn.norm(dim=1))[:, None]
        return replace(readout, latents=readout.latents.with_rows(rows), transform=None, name=name, made_of=readout)

    def like(vector: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(vector.shape, generator=generator)
        return drawn / drawn.norm() * vector.detach().cpu().float().norm()

    weight = like(readout.weight)
    query = None if readout.query is None else like(readout.query)
    return replace(
        readout, weight=weight, query=query, bias=0.0, offset=0.0, transform=None, name=name, made_of=readout
    )


def pooled_scores(readout: Readout, scores: torch.Tensor, tokens: Counted) -> torch.Tensor:
    """One score per sequence (M,) of scores per counted token (N, K)."""
    rows, mask = tokens.rows(scores)
    return readout.pooled(rows, mask)
