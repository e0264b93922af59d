"""What a causal check asks of a model, and what it gets: a value per prompt and change.

In: prompts by number, changes. Out: values, and guards of the text. It must not know how a value is measured.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ..activations.changes import Change


@dataclass(frozen=True)
class Job:
    """One prompt under one change. None: the model as it is."""

    prompt: int
    change: Change | None = None


@dataclass(frozen=True)
class Done:
    """What a job gave.

    Attributes:
        value (`float`): the measure of the answer, or the margin in nats.
        text (`str`): the answer; empty for a margin.
        ids (`list[int]`): its tokens.
        surprise (`float`): for a margin: negative log-likelihood per token of both given answers, in nats.
    """

    value: float
    text: str = ""
    ids: tuple[int, ...] = ()
    surprise: float = math.nan


@dataclass(frozen=True)
class Guards:
    """What says that a model still writes text: `perplexity` is the median over prompts, the others are shares of answers."""

    perplexity: float
    empty: float = 0.0
    repeated: float = 0.0


class Behaviour(ABC):
    """A model's behaviour on some prompts, as it is and with its activation at one hook point changed row by row.

    Attributes:
        measure (`str`): what the values are.
        prompts (`int`): number of prompts P.
    """

    measure: str
    prompts: int

    def __init__(self, model: Any, hook_point: str, batch_rows: int, progress: bool):
        self.model, self.hook_point, self.batch_rows, self.progress = model, hook_point, batch_rows, progress
        self._unchanged: list[Done] | None = None

    def unchanged(self) -> list[Done]:
        """What the model as it is does on each prompt (P), run once."""
        if self._unchanged is None:
            self._unchanged = self.run([Job(i) for i in range(self.prompts)], "answers without a change")
        return self._unchanged

    def run(self, jobs: Sequence[Job], label: str) -> list[Done]:
        """One `Done` per job, in batches of prompts of like length."""
        order = sorted(range(len(jobs)), key=lambda i: (-self.length(jobs[i].prompt), i))
        finished: dict[int, Done] = {}
        with tqdm(total=len(jobs), desc=label, unit="answer", disable=not self.progress, leave=False) as bar:
            for start in range(0, len(order), self.batch_rows):
                part = order[start : start + self.batch_rows]
                finished |= dict(zip(part, self.run_batch([jobs[i] for i in part]), strict=True))
                bar.update(len(part))
        return [finished[i] for i in range(len(jobs))]

    def values(self, jobs: Sequence[Job], label: str) -> np.ndarray:
        """Values (J,) of jobs."""
        return np.array([done.value for done in self.run(jobs, label)])

    @abstractmethod
    def length(self, prompt: int) -> int:
        """Number of tokens of a prompt."""

    @abstractmethod
    def run_batch(self, jobs: Sequence[Job]) -> list[Done]:
        """One `Done` per job, all in one batch."""

    @abstractmethod
    def guards(self, jobs: Sequence[Job], finished: Sequence[Done]) -> Guards:
        """Guards of what some jobs gave."""

    @abstractmethod
    def activations(self) -> list[torch.Tensor]:
        """Activations (N, D) of each prompt's own run without a change, P of them; N = 0 after an empty answer."""
