"""One training step of a trainer, timed: what benchmarks of whole steps share.

In: a function that gives a trainer. Out: a `Sample` of its step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from timing import Sample
from transformers import TrainerCallback


class StepClock(TrainerCallback):
    """Calls a function where a step begins and where training ends."""

    def __init__(self, mark: Callable[[], None], epoch: bool = False):
        self.mark, self.epoch = mark, epoch

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        if self.epoch:
            self.mark()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.epoch:
            self.mark()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.mark()


def timed_step(make: Callable[[], Any], epoch: bool = False) -> Sample:
    """From the beginning of the step to the end of training: without the making of optimizer and data loader.

    With `epoch`, the fetching of the step's batches counts too.
    """
    begun: list[Sample] = []
    clock = StepClock(lambda: begun.append(Sample(time.process_time(), time.perf_counter())), epoch)
    trainer = make()
    trainer.add_callback(clock)
    trainer.train()
    ended = Sample(time.process_time(), time.perf_counter())
    trainer.remove_callback(clock)
    return Sample(ended.cpu - begun[0].cpu, ended.wall - begun[0].wall)
