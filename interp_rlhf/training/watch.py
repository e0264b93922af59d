"""Watches rollouts: monitors, measures, and correlations of the reward.

In: a rollout batch after its rewards. Out: metrics, and samples in the run log. It must not change rewards.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback

from ..activations.ranks import of_all_ranks
from ..messages import completion_text, prompt_text
from ..validation.measures import values_of
from ..validation.statistics import correlation
from .trl import add_metric, mode_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from ..concepts.readout import Readout
    from ..runlog.log import RunLog
    from .rollout import Reader, Rollout

logger = logging.getLogger(__name__)

SAMPLE_ROWS = 4
# Share of the reward's variance within groups below which a warning is given.
WITHIN_GROUP = 0.02
# Batches that are kept per monitor between two drift evaluations.
MOVED_BATCHES = 3


class FirstPassCheck(TrainerCallback):
    """Stops a run before its first optimizer step if a hook point never fired."""

    def __init__(self, rollout: Rollout):
        self._rollout: Rollout | None = rollout

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._rollout is not None:
            self._rollout.policy_tap.require_fired()
            self._rollout = None


class RolloutWatch:
    """Scores monitors and measures on a rollout batch after its rewards, logs them, and writes samples to the run log.

    Args:
        trainer (`GRPOTrainer` or `RLOOTrainer`): the trainer that makes the rollouts.
        rollout (`Rollout`): reads the rollout batches.
        monitors (`dict[Readout, str]`): monitors, each with the model that it is read on.
        measures (`dict[str, Callable]`): independent measures of a completion's text.
        log (`RunLog`): the run log that takes the samples.
        samples_every (`int`): rollout batches between two samples.
    """

    def __init__(
        self,
        trainer: Any,
        rollout: Rollout,
        monitors: Mapping[Readout, Reader],
        measures: Mapping[str, Callable[[str], float]],
        log: RunLog,
        samples_every: int,
    ):
        self._trainer, self._rollout = trainer, rollout
        self._monitors, self._measures = monitors, measures
        self._log, self._samples_every = log, samples_every
        self._batches = 0
        self._warned = False
        self._seen: dict[str, list[dict[str, Any]]] = {}
        self._usual: dict[str, float] = {}

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], rewards: torch.Tensor, trained: torch.Tensor
    ) -> None:
        scores: dict[str, list[float | None]] = {}
        for readout, reader in self._monitors.items():
            scores[readout.name] = self._rollout.values(readout, reader)
            self._metric(f"interp/{readout.name}/mean_score", scores[readout.name], np.mean)
            self._metric(f"interp/{readout.name}/std", scores[readout.name], np.std)
            self._remember(readout.name, scores[readout.name], prompts, completions)
        texts = [completion_text(completion) for completion in completions]
        for name, measure in self._measures.items():
            scores[name] = [None if v != v else v for v in values_of(name, measure, texts)]
            self._metric(f"interp/measure/{name}/mean", scores[name], np.mean)
            self._metric(f"interp/measure/{name}/std", scores[name], np.std)
        self._about_reward(trained, scores)
        if not self._trainer.model.training:
            return  # evaluation: metrics, no samples of training
        if self._trainer.interp_writes_samples:
            self._trainer.interp_sample_scores = scores
        elif self._batches % self._samples_every == 0 and self._log.writable:
            self._write_samples(prompts, texts, rewards, scores)
        self._batches += 1

    def _write_samples(
        self,
        prompts: Sequence[Any],
        texts: Sequence[str],
        rewards: torch.Tensor,
        scores: dict[str, list[float | None]],
    ) -> None:
        of_this_rank = rewards[: len(prompts)]  # rank 0 writes, and its rows come first
        for index, name in enumerate(self._trainer.reward_func_names):
            scores[f"reward: {name}"] = of_this_rank[:, index].tolist()
        rows = [
            {
                "prompt": prompt_text(prompts[i]),
                "completion": texts[i],
                "scores": {name: values[i] for name, values in scores.items()},
            }
            for i in range(min(SAMPLE_ROWS, len(prompts)))
        ]
        self._log.append("samples", self._trainer.state.global_step, when="train", rows=rows)

    def _remember(
        self, name: str, scores: Sequence[float | None], prompts: Sequence[Any], completions: Sequence[Any]
    ) -> None:
        """Keep the batches whose mean score is farthest from the mean of the run's first batch, with their extreme samples."""
        known = [(value, i) for i, value in enumerate(scores) if value is not None]
        everywhere, _ = of_all_ranks([value for value, _ in known])
        if not everywhere or not self._trainer.model.training:
            return
        mean = float(np.mean(everywhere))
        usual = self._usual.setdefault(name, mean)

        def farthest(samples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
            return sorted(samples, key=lambda sample: -abs(sample["score"] - usual))[:2]

        here = farthest(
            {"prompt": prompt_text(prompts[i]), "completion": completion_text(completions[i]), "score": value}
            for value, i in known
        )
        samples = farthest(of_all_ranks(here)[0])
        seen = self._seen.setdefault(name, [])
        seen.append({"step": self._trainer.state.global_step, "mean_score": mean, "samples": samples})
        seen.sort(key=lambda batch: -abs(batch["mean_score"] - usual))
        del seen[MOVED_BATCHES:]

    def moved(self) -> dict[str, list[dict[str, Any]]]:
        """For each monitor, the batches since the last call whose mean score is farthest from the run's first batch."""
        seen, self._seen = self._seen, {}
        return seen

    def _about_reward(self, rewards: torch.Tensor, scores: Mapping[str, Sequence[float | None]]) -> None:
        """Log the correlations of the total reward with length and measures, and the share that the prompt alone explains."""
        trainer = self._trainer
        ids = self._rollout.completion_ids
        assert ids is not None
        weights = trainer.reward_weights.to(rewards.device)
        # The rewards of all ranks are added as TRL adds them. TRL leaves out completions that no function judged.
        total = (rewards * weights).nansum(1).double()
        total = total.masked_fill(torch.isnan(rewards).all(1) | total.isinf(), torch.nan).cpu().numpy()
        others = {"length": [float(len(row)) for row in ids]} | {name: scores[name] for name in self._measures}
        mode = mode_of(trainer)
        for name, values in others.items():
            if (value := correlation(total, np.array(of_all_ranks(list(values))[0], dtype=float))) is not None:
                add_metric(trainer, f"interp/reward/{name}_correlation", value)
        self._within_groups(total, mode)

    def _within_groups(self, total: np.ndarray, mode: str) -> None:
        """Log the share of the reward's variance within groups. Warn if the prompt alone explains the reward."""
        trainer = self._trainer
        size = trainer.num_generations if mode == "train" else trainer.num_generations_eval
        groups = total.reshape(-1, size) if size > 1 and len(total) % size == 0 else np.empty((0, 1))
        groups = groups[np.isfinite(groups).sum(1) > 1]  # one row alone has no variance
        if not len(groups) or not np.nanmax(groups) > np.nanmin(groups):
            return
        within = groups - np.nanmean(groups, axis=1, keepdims=True)  # groups count by the rows that were judged
        share = float(np.nanmean(within**2) / np.nanvar(groups))
        add_metric(trainer, "interp/reward/within_group_share", share)
        if share < WITHIN_GROUP and len(groups) > 1 and not self._warned:
            self._warned = True
            logger.warning(
                "%.1f %% of the reward's variance is within groups of completions of one prompt – expected more than %.0f "
                "%%: the reward is nearly a function of the prompt, which no policy can change.", 100 * share, 100 *
                WITHIN_GROUP,
            )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """The state that a resumed run needs."""
        return {"batches": self._batches, "usual": self._usual, "seen": self._seen}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state` returned."""
        self._batches = int(state["batches"])
        self._usual, self._seen = dict(state["usual"]), dict(state["seen"])

    def _metric(self, key: str, values: Sequence[float | None], reduce: Callable[[Any], Any]) -> None:
        """Add a statistic over all ranks to TRL's metrics. TRL averages these over the steps of a logging interval."""
        kept = [value for value in of_all_ranks(list(values))[0] if value is not None]
        if kept:
            add_metric(self._trainer, key, float(reduce(kept)))
