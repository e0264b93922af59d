"""What training gained: scores of answers before and after, compared prompt by prompt.

In: answers of the base model and of a trained policy. Out: gains with intervals. It must not know how the policy was trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..activations.batch import tokenize_examples
from ..activations.counted import end_of_turn_ids
from ..activations.read import read
from ..validation.statistics import mean_interval

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..attachment import Attachment
    from ..concepts.readout import Readout

_SCORES = ("probe_score", "monitor_score")


class AnswerScores:
    """Scores answers on the frozen base model and by VADER. It is the same for both arms, before and after.

    Args:
        model, tokenizer: the base model.
        readouts (`list[Readout]`): the reward's and the holdout monitor's, in this order.
        vader (`Callable`): the independent measure.
    """

    def __init__(self, model: Any, tokenizer: Any, readouts: list[Readout], vader: Callable[[str], float]):
        self.model, self.tokenizer, self.readouts, self.vader = model, tokenizer, readouts, vader

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows, each with `scores`. A score is None where the answer is empty."""
        ends = end_of_turn_ids(self.model, self.tokenizer)
        batch = tokenize_examples(rows, self.tokenizer, end_of_turn_ids=ends)
        token_scores = read(self.model, batch, self.readouts, reader="reference", progress="scoring answers")
        values = {readout.name: readout.score(token_scores[readout.name]) for readout in self.readouts}
        judged = []
        for i, row in enumerate(rows):
            scores: dict[str, float | None] = {
                key: values[readout.name][i] for key, readout in zip(_SCORES, self.readouts, strict=True)
            }
            scores["vader"] = self.vader(row["completion"])
            scores["tokens"] = float(len(row["completion_ids"]))
            judged.append({**row, "scores": scores})
        return judged


def compared(
    before: list[dict[str, Any]], after: list[dict[str, Any]], attachment: Attachment, seed: int
) -> dict[str, Any]:
    """Paired gains for each held-out prompt. Prompts with an empty answer on either side are left out and counted."""
    result: dict[str, Any] = {"gains": {}}
    for key in (*_SCORES, "vader", "tokens"):
        pairs = [(b["scores"][key], a["scores"][key]) for b, a in zip(before, after, strict=True)]
        gains = {i: a - b for i, (b, a) in enumerate(pairs) if a is not None and b is not None}
        result["gains"][key] = gains
        result[f"{key}_gain"] = _with_interval(list(gains.values()), seed) | {
            "before": round(float(np.mean([b for b, a in pairs if a is not None and b is not None])), 4),
            "after": round(float(np.mean([a for b, a in pairs if a is not None and b is not None])), 4),
        }
    history = [row for row in attachment.trainer.state.log_history if "kl" in row]
    last = history[-1]
    result["last_step"] = {
        "kl": last["kl"],
        "entropy": last["entropy"],
        "clipped_ratio": last["completions/clipped_ratio"],
        "reward": last["reward"],
    }
    result["first_step"] = {"entropy": history[0]["entropy"], "reward": history[0]["reward"]}
    assert attachment.rollout is not None
    result["extra_forward_passes_for_the_reward"] = attachment.rollout.own_forwards
    return result


def difference_of_gains(probe: dict[str, Any], sham: dict[str, Any], seed: int) -> dict[str, Any]:
    """Paired differences of the two arms' gains, over the prompts that both answered."""
    differences = {}
    for key in probe:
        rows = sorted(set(probe[key]) & set(sham[key]))
        differences[f"{key}_gain"] = _with_interval([probe[key][i] - sham[key][i] for i in rows], seed)
    return differences


def _with_interval(values: list[float], seed: int) -> dict[str, Any]:
    mean, low, high = mean_interval(np.array(values), seed)
    return {"mean": round(mean, 4), "low": round(low, 4), "high": round(high, 4), "prompts": len(values)}
