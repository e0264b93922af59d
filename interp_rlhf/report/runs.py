"""What a report knows of a run: plain records.

In: nothing. Out: the classes that the other modules of the report fill and show. It must not know logs or pages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runlog.patching_records import PatchingEntry
    from .inspection import InspectedLatents

Metrics = dict[str, dict[int, float | None]]  # metric → step → value; `None` is a value that was not finite


@dataclass
class Sample:
    """One prompt with one completion and what was scored on it."""

    prompt: str
    completion: str
    scores: dict[str, Any]
    pieces: list[str] = field(default_factory=list)  # the completion token by token, where tokens were scored
    token_scores: dict[str, list[float | None]] = field(default_factory=dict)  # readout → score per piece


@dataclass
class Samples:
    """The samples of one moment."""

    when: str  # before, train or after
    step: int
    rows: list[Sample]


@dataclass
class ResultTable:
    """A result that the run itself computed."""

    title: str
    columns: list[str]
    rows: list[list[Any]]
    note: str


@dataclass
class Judgement:
    """A verdict of the run: its name, its reasons, what to do next, and other keys of its line."""

    step: int
    name: str
    because: list[str]
    next: str
    alarm: bool
    fields: dict[str, Any]


@dataclass
class Moved:
    """An answer to a fixed prompt, or a completion of a training batch, that moved a monitor."""

    step: int
    monitor: str
    prompt: str
    completion: str
    change: float | None
    batch: bool  # of training; otherwise an answer to a fixed prompt


@dataclass
class Run:
    """What one run log says about one arm."""

    arm: str
    source: str  # folder and file name of the log
    label: str = ""  # the arm's name, made unique among the runs of a report
    title: str = ""
    model: str = ""
    trainer: str = ""
    cards: list[dict[str, str]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    started: float | None = None  # Unix seconds
    seconds: float = 0.0  # elapsed, over all starts
    starts: int = 0
    ended: bool = False
    last_step: int = 0
    metrics: Metrics = field(default_factory=dict)
    hook_points: dict[str, Metrics] = field(default_factory=dict)  # hook point → metric → step → value
    monitors: dict[str, Metrics] = field(default_factory=dict)
    evaluations: dict[int, tuple[int | None, int | None]] = field(default_factory=dict)  # step → texts, tokens
    last_evaluated: int = (
        0  # step of the evaluation that was written last: with `load_best_model_at_end`, that of the kept model
    )
    about: dict[str, str] = field(default_factory=dict)  # metric of drift → its range and direction
    overhead_seconds: float = 0.0
    samples: list[Samples] = field(default_factory=list)
    tables: dict[str, ResultTable] = field(default_factory=dict)
    verdicts: list[Judgement] = field(default_factory=list)
    moved: list[Moved] = field(default_factory=list)
    inspections: list[InspectedLatents] = field(default_factory=list)
    searches: int = 0  # for latents; their results are tables
    patchings: list[PatchingEntry] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """True if nothing but the start (and perhaps the end) was logged."""
        return not (
            self.metrics
            or self.evaluations
            or self.samples
            or self.tables
            or self.verdicts
            or self.inspections
            or self.patchings
        )

    @property
    def only_read(self) -> bool:
        """True if nothing was trained: a model was read to understand its latents, or patched."""
        trained = self.trainer or self.metrics or self.evaluations or self.samples or self.verdicts
        return not trained and bool(self.inspections or self.searches or self.patchings)
