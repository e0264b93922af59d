"""Who spends the CPU time of a training step: this package or TRL.

In: the package's entry points, wrapped for the length of a `with` block. Out: CPU seconds per entry point, each second counted
once: where TRL calls us and we call TRL back, the time goes to whoever is running. The wrapping itself is charged to us.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from trl import GRPOTrainer

from interp_rlhf.activations import Tap
from interp_rlhf.runlog.recorder import Recorder
from interp_rlhf.training.mixin import RolloutMixin
from interp_rlhf.training.rewards import ConceptReward
from interp_rlhf.training.rollout import Rollout
from interp_rlhf.training.watch import FirstPassCheck, RolloutWatch

THEIRS = "TRL"
# Everything that a trainer or a model calls of ours, and, below it, what our code calls of TRL's.
ENTRY_POINTS: list[tuple[type, str, str]] = [
    (Tap, "_begin", "Tap._begin"),
    (Tap, "_end", "Tap._end"),
    (RolloutMixin, "interp_tokenize_prompts", "mixin"),
    (RolloutMixin, "interp_calculate_rewards", "mixin"),
    (Rollout, "open", "Rollout.open"),
    (ConceptReward, "__call__", "ConceptReward"),
    (RolloutWatch, "__call__", "watchers"),
    (FirstPassCheck, "on_pre_optimizer_step", "first-pass check"),
    (Recorder, "on_log", "run log"),
    (GRPOTrainer, "_tokenize_prompts", THEIRS),
    (GRPOTrainer, "_calculate_rewards", THEIRS),
]


class Ledger:
    """Exclusive CPU seconds per owner.

    Attributes:
        seconds (`Counter[str]`): owner to seconds so far; `TRL` is everything outside our entry points.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._owners = [THEIRS]
        self._mark = time.process_time()

    def charge(self) -> None:
        """Books the time since the last booking on whoever runs now."""
        now = time.process_time()
        self.seconds[self._owners[-1]] += now - self._mark
        self._mark = now

    def owned(self, owner: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time booked on `owner`."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.charge()
            self._owners.append(owner)
            try:
                return function(*args, **kwargs)
            finally:
                self.charge()
                self._owners.pop()

        return run

    def snapshot(self) -> Counter[str]:
        """Seconds per owner up to now."""
        self.charge()
        return Counter(self.seconds)


@contextmanager
def keeping(ledger: Ledger) -> Iterator[None]:
    """Wraps the entry points; call `attach` inside, since hooks are bound when they are registered."""
    originals = [(cls, name, cls.__dict__[name]) for cls, name, _ in ENTRY_POINTS]
    make_hook = Tap._hook
    for cls, name, owner in ENTRY_POINTS:
        setattr(cls, name, ledger.owned(owner, cls.__dict__[name]))
    Tap._hook = lambda self, point: ledger.owned("Tap hooks", make_hook(self, point))  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tap._hook = make_hook  # type: ignore[method-assign]
        for cls, name, original in originals:
            setattr(cls, name, original)
