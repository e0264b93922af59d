"""Records a trainer: what it logs goes into the run log.

In: the callbacks of a transformers or TRL trainer. Out: `run`, `metric` and `end` events. It must not know cards: it
takes their name, role and hash.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from transformers import TrainerCallback

from .events import CardEntry, EndEvent, MetricEvent, RunEvent
from .log import RunLog

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .events import TableEvent

RUN_LOG = "interp.jsonl"
# Arguments of the trainer that the report shows.
SETTINGS = (
    "learning_rate", "beta", "seed", "max_steps", "num_train_epochs", "per_device_train_batch_size",
    "gradient_accumulation_steps", "num_generations", "max_completion_length", "temperature", "steps_per_generation",
    "num_iterations", "loss_type", "scale_rewards",
)  # fmt: skip


class NamedCard(Protocol):
    """What the run log says of a card."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...


class HashedCard(Protocol):
    """A card with the SHA-256 of its file, as `load_card` returns it."""

    @property
    def card(self) -> NamedCard: ...
    @property
    def sha256(self) -> str: ...


def default_path(trainer: Any) -> Path:
    """`interp.jsonl` in the trainer's output folder."""
    return Path(trainer.args.output_dir) / RUN_LOG


def record(
    trainer: Any, path: str | Path | None = None, cards: Sequence[HashedCard] = (), arm: str = "",
    tables: Sequence[TableEvent] = (),
) -> RunLog:  # fmt: skip
    """Record a trainer's metrics into a run log from now on.

    A trainer that is recorded already keeps its log; the cards and the arm are added to it.

    Args:
        trainer (`transformers.Trainer`): built.
        path (`str` or `Path`, *optional*): `interp.jsonl` in the trainer's output folder by default.
        cards (`Sequence`): cards as `load_card` returns them.
        arm (`str`): name of this run among those that a report compares.
        tables (`Sequence[TableEvent]`): tables that are known before training, such as what a card's causal check found.

    Returns:
        `RunLog`: writable on rank 0 only.

    Raises:
        `ValueError`: the trainer is recorded into another file already.
    """
    recorder = _RECORDERS.get(trainer)
    if recorder is not None:
        recorder.add(path, cards, arm, tables)
        return recorder.log
    log = RunLog(path or default_path(trainer), writable=trainer.is_world_process_zero())
    _RECORDERS[trainer] = Recorder(trainer, log, cards, arm, tables)
    trainer.add_callback(_RECORDERS[trainer])
    return log


class Recorder(TrainerCallback):
    """The callback behind `record`."""

    def __init__(
        self, trainer: Any, log: RunLog, cards: Sequence[HashedCard], arm: str, tables: Sequence[TableEvent] = ()
    ):
        self.log = log
        self._trainer_name = type(trainer).__name__
        self._model_name = getattr(trainer.model.config, "name_or_path", "") or type(trainer.model).__name__
        self._cards = _described(cards)
        self._arm = arm
        self._tables = list(tables)
        self._started = time.monotonic()

    def add(
        self, path: str | Path | None, cards: Sequence[HashedCard], arm: str, tables: Sequence[TableEvent] = ()
    ) -> None:
        """Add cards, the arm and tables before training begins.

        Raises:
            `ValueError`: `path` is another file than that of the log.
        """
        if path is not None and Path(path) != self.log.path:
            raise ValueError(
                f"`run_log` is `{path}` – the trainer is recorded into `{self.log.path}` already. Pass the same file, or pass it "
                "to the first of the two calls."
            )
        known = {card.sha256 for card in self._cards}
        self._cards += [card for card in _described(cards) if card.sha256 not in known]
        self._arm = arm or self._arm
        self._tables += tables

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.monotonic()
        settings = {name: getattr(args, name) for name in SETTINGS if getattr(args, name, None) is not None}
        event = RunEvent(
            title=Path(args.output_dir).name, arm=self._arm, model=self._model_name, trainer=self._trainer_name,
            cards=self._cards, settings=settings,
        )  # fmt: skip
        self.log.append(event, state.global_step)
        for table in self._tables:
            self.log.append(table, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        metrics: dict[str, float | None] = {
            key: value for key, value in (logs or {}).items() if isinstance(value, int | float)
        }
        if metrics:
            self.log.append(MetricEvent(metrics=metrics), state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.log.append(EndEvent(seconds=round(time.monotonic() - self._started, 3)), state.global_step)


def _described(cards: Sequence[HashedCard]) -> list[CardEntry]:
    return [CardEntry(name=card.card.name, role=card.card.role, sha256=card.sha256) for card in cards]


# The recorder of each trainer. A recorder holds no reference to its trainer, so that both can be freed.
_RECORDERS: WeakKeyDictionary[Any, Recorder] = WeakKeyDictionary()
