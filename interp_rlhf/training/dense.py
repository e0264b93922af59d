"""A readout's score at every completion token, for dense concept rewards.

In: scores per token of a rollout batch. Out: one list per completion, aligned with its ids. It knows neither trainers nor
weights. The score at y_t is read at the position of y_t: it is about the text up to and including y_t.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from ..activations.ranks import of_all_ranks
from ..concepts.pooling import attention_weights, ema

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..activations.batch import ConceptScores
    from ..concepts.readout import Readout

DENSE_KINDS = ("score", "share", "ema")


def kind_of(dense: bool | str, shaping: bool) -> str | None:
    """How tokens are paid: one of `DENSE_KINDS`, `potential`, or None for one reward per completion.

    Raises:
        `ValueError`: another kind, or both at once.
    """
    if not isinstance(dense, bool) and dense not in DENSE_KINDS:
        raise ValueError(
            f"`dense` is {dense!r} – expected True, False or one of {', '.join(f'`{k}`' for k in DENSE_KINDS)}."
        )
    if shaping:
        if dense not in (True, False):
            raise ValueError(
                f"`dense` is `{dense}` and `shaping` True – expected one: shaping pays differences of the score itself."
            )
        return "potential"
    return "score" if dense is True else (dense or None)


def per_token(
    readout: Readout, scores: ConceptScores, attention_mask: torch.Tensor, lengths: Sequence[int], kind: str
) -> list[list[float] | None]:
    """Rewards of each completion's tokens.

    Args:
        readout (`Readout`): its calibration and transform are applied to each token's score.
        scores (`ConceptScores`): of a right-padded batch of prompts and completions, (B, T, 1), or with a query (B, T, 2).
        attention_mask (`torch.BoolTensor` of shape (B, T)): of that batch.
        lengths (`list[int]`): tokens of each completion, L.
        kind (`str`): `score`: the token's score. `share`: that over the number of tokens that count, so that the sum is the mean;
            with the pooling `attention`, the token's weight times it, and the sink's part shared out. `ema`: e_t − e_{t−1} of
            the score's moving average over 16 tokens, so that the sum is where it ends. `potential`:
            L + 1 scores, the first at the prompt's last token (0 if that is the row's first token).

    Returns:
        `list[list[float] | None]`: 0 at tokens that do not count. None if none counts, except for potentials.

    Raises:
        `ValueError`: the score of a counted token is not finite.
    """
    scores.require_finite()
    values = readout.calibrated(scores.scores[..., 0])  # (B, T)
    mask = scores.mask
    if kind == "ema":
        levels = ema(values[..., None], mask)[..., 0]
        before = torch.cat([torch.zeros_like(levels[:, :1]), levels[:, :-1]], dim=1)
        values = levels - before
    elif kind == "share" and readout.query is not None:
        weights = attention_weights(scores.scores, mask)
        sink = readout.calibrated(torch.zeros(()))
        rest = (1 - weights.sum(1, keepdim=True)) * sink / mask.sum(1, keepdim=True).clamp(min=1)
        values = values * weights + rest
    elif kind == "share":
        values = values / mask.sum(1, keepdim=True).clamp(min=1)
    ends = attention_mask.sum(1).tolist()
    counted = values.masked_fill(~mask, 0)
    paid: list[list[float] | None] = []
    for row, (end, length) in enumerate(zip(ends, lengths, strict=True)):
        of_row = counted[row, end - length : end].tolist()
        if kind == "potential":
            # The first token of a row never counts, also if it is the whole prompt.
            paid.append([float(values[row, end - length - 1]) if end - length > 1 else 0.0, *of_row])
        else:
            paid.append(of_row if bool(mask[row].any()) else None)
    return paid


def negated(values: Sequence[list[float] | None]) -> list[list[float] | None]:
    """Token rewards with the sign flipped."""
    return [None if row is None else [-value for value in row] for row in values]


def shuffled(rewards: Sequence[list[float] | None], seed: str) -> list[list[float] | None]:
    """The same numbers at random places among the completions of all ranks: the control arm.

    Args:
        rewards (`Sequence[list[float]]`): numbers per completion of this rank: one per token, or one in all; None stays None.
        seed (`str`): one per step, so that a resumed run repeats it. All ranks must pass the same.
    """
    everywhere, first = of_all_ranks(list(rewards))
    pool = [value for row in everywhere if row is not None for value in row]
    drawn = iter(random.Random(seed).sample(pool, len(pool)))
    dealt = [None if row is None else [next(drawn) for _ in row] for row in everywhere]
    return dealt[first : first + len(rewards)]
