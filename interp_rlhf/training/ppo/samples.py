"""Samples in the run log: rewards, values and advantages of a few completions, token by token.

In: a rollout with its estimates. Out: a `samples` event, whose tokens the report colours, and a `table` of one completion. It
computes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...messages import completion_text, prompt_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from ...runlog.log import RunLog

TITLE = "Tokens of one completion"
NOTE = (
    "The first sampled completion of the latest rollout that was written. Reward: all components and the KL, at the token for "
    "which it was given. Value: what the critic expected before the token was written. Advantage: as it enters the loss."
)


@dataclass
class SampledRows:
    """Rows of this rank: prompts, completions, ids, and tensors (B, T) over the completion's tokens."""

    prompts: Sequence[Any]
    completions: Sequence[Any]
    completion_ids: Sequence[Sequence[int]]
    scores: Mapping[str, Sequence[float | None]]
    rewards: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor


def write(log: RunLog, step: int, rollout: SampledRows, rows: int, tokenizer: Any) -> None:
    """Append the first `rows` completions to the run log, and one of them as a table."""
    written = [_sample(rollout, i, tokenizer) for i in range(min(rows, len(rollout.prompts)))]
    if not written:
        return
    log.append("samples", step, when="train", rows=written)
    first = written[0]["tokens"]
    columns = ["token", *first["scores"]]
    cells = [list(row) for row in zip(first["pieces"], *first["scores"].values(), strict=True)]
    log.append("table", step, title=TITLE, columns=columns, rows=cells, note=NOTE)


def _sample(rollout: SampledRows, i: int, tokenizer: Any) -> dict[str, Any]:
    ids = rollout.completion_ids[i]
    tensors = {"reward": rollout.rewards, "value": rollout.values, "advantage": rollout.advantages}
    return {
        "prompt": prompt_text(rollout.prompts[i]),
        "completion": completion_text(rollout.completions[i]),
        "scores": {name: values[i] for name, values in rollout.scores.items()},
        "tokens": {
            "pieces": [tokenizer.decode([token]) for token in ids],
            "scores": {name: tensor[i, : len(ids)].tolist() for name, tensor in tensors.items()},
        },
    }
