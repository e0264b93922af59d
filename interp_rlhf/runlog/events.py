"""The events of a run log: one class per event, and the records inside them.

In: what a run measured. Out: JSON objects, and events from the JSON objects of this and older versions. `docs/run_log.md` is made
from these classes (`runlog.document`). It must not know torch, models or pages.

Versions of the run log: 1 had no `schema` in its `run` events. 2 writes it, and `about` in the first `drift` event.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .patching_records import PatchingEntry  # noqa: TC001
from .records import Record, fact

SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class Event(Record):
    """One line of a run log.

    Attributes:
        event (`str`): its name in the file.
        time (`float`, *optional*): when it was written, in Unix seconds.
        step (`int`, *optional*): optimizer step to which it belongs.
    """

    event: ClassVar[str] = ""
    time: float | None = fact("when the event was written", unit="Unix seconds", optional=True)
    step: int | None = fact("optimizer step to which the event belongs", unit="steps", optional=True)

    def to_json(self) -> dict[str, Any]:
        """The event as a JSON object that begins with its name."""
        return {"event": self.event, **super().to_json()}

    def fields(self) -> dict[str, Any]:
        """The keys of the JSON object without name, time and step: what happened."""
        return {key: value for key, value in self.to_json().items() if key not in ("event", "time", "step")}

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> Any:
        """The event of a line of its name."""
        return super().from_json({key: value for key, value in line.items() if key != "event"})


@dataclass(frozen=True, kw_only=True)
class CardEntry(Record):
    """A card of the run."""

    name: str = fact("its name", "")
    role: str = fact("its role: `reward`, `penalty` or `monitor`", "")
    sha256: str = fact("hash of its file", "")

    @classmethod
    def from_other(cls, value: Any) -> CardEntry:
        """A card of which only the name was logged."""
        return cls(name=str(value))


@dataclass(frozen=True, kw_only=True)
class RunEvent(Event):
    """A training begins, or resumes. It says which earlier events no longer count (`runlog.log.in_force`)."""

    event: ClassVar[str] = "run"
    title: str = fact("name of the output folder, or a title", "")
    arm: str = fact("name of this run among those that a report compares", "")
    model: str = fact("name of the model", "")
    trainer: str = fact("class of the trainer", "")
    cards: list[CardEntry] = fact("cards of rewards, terms and monitors", list)
    settings: dict[str, Any] = fact("arguments of the trainer", dict)
    schema: int = fact("version of the run log, added by the writer", 1, since=2, optional=True)


@dataclass(frozen=True, kw_only=True)
class MetricEvent(Event):
    """What the trainer logged at this step."""

    event: ClassVar[str] = "metric"
    metrics: dict[str, float | None] = fact("name to value; null is a value that was not finite", dict)


@dataclass(frozen=True, kw_only=True)
class MonitorEntry(Record):
    """One monitor at one evaluation of drift. The AUROCs need labelled examples."""

    mean_score: float | None = fact("mean score, frozen", unit="logits", optional=True)
    shift: float | None = fact(
        "movement of the frozen score since the start", unit="standard deviations of the start", optional=True
    )
    direction_cosine: float | None = fact("refitted direction now and at the start", unit="[−1, 1]", optional=True)
    examples: int | None = fact("labelled examples", optional=True)
    frozen_auroc: float | None = fact("AUROC of the readout as it is", unit="[0, 1]", optional=True)
    frozen_interval: list[float | None] | None = fact("its 95 % interval", unit="[low, high]", optional=True)
    frozen_change: list[float | None] | None = fact(
        "its change since the start", unit="[value, low, high]", optional=True
    )
    restandardized_auroc: float | None = fact("AUROC with means and scales of the start", unit="[0, 1]", optional=True)
    restandardized_interval: list[float | None] | None = fact("its 95 % interval", unit="[low, high]", optional=True)
    restandardized_change: list[float | None] | None = fact(
        "its change since the start", unit="[value, low, high]", optional=True
    )
    refitted_auroc: float | None = fact("AUROC of probes fitted on this model", unit="[0, 1]", optional=True)
    refitted_interval: list[float | None] | None = fact("its 95 % interval", unit="[low, high]", optional=True)
    refitted_change: list[float | None] | None = fact(
        "its change since the start", unit="[value, low, high]", optional=True
    )
    false_alarms: list[float | None] | None = fact(
        "share of false alarms in short, middle and long texts, at the threshold that gave 5 % at the start",
        unit="[0, 1]",
        optional=True,
    )
    hook_point: str = fact("where it reads", "", optional=True)
    pressure: int | None = fact("direction in which training pushes it", unit="+1 or −1", optional=True)
    holdout: int | None = fact(
        "direction in which it follows an honest reward, for a holdout", unit="+1 or −1", optional=True
    )

    @classmethod
    def from_other(cls, value: Any) -> MonitorEntry:
        """A monitor of which a single number was logged."""
        return cls(other={"value": value})


@dataclass(frozen=True, kw_only=True)
class OwnMonitorEntry(Record):
    """One monitor on the policy's own text."""

    policy: float | None = fact("mean score, read on the policy", unit="logits")
    policy_change: list[float | None] | None = fact(
        "its change since the start", unit="standard deviations of the start, [value, low, high]"
    )
    text: float | None = fact("mean score, read on the frozen reference", unit="logits", optional=True)
    drift: float | None = fact("`text` − `policy`: what the representation does", unit="logits", optional=True)
    text_change: list[float | None] | None = fact(
        "change of `text` since the start", unit="standard deviations of the start, [value, low, high]", optional=True
    )


@dataclass(frozen=True, kw_only=True)
class OwnMeasureEntry(Record):
    """One independent measure of the policy's own text."""

    mean: float | None = fact("mean value")
    change: list[float | None] | None = fact(
        "its change since the start", unit="standard deviations of the start, [value, low, high]"
    )


@dataclass(frozen=True, kw_only=True)
class OwnTextEntry(Record):
    """The policy's answers to the fixed prompts."""

    prompts: int | None = fact("number of prompts")
    monitors: dict[str, OwnMonitorEntry] = fact("monitor to its readings", dict)
    measures: dict[str, OwnMeasureEntry] = fact("measure to its values", dict)
    clipped: float | None = fact("share of answers that reached the length limit", unit="[0, 1]")
    empty: float | None = fact("share of answers without text", unit="[0, 1]")
    repetition: float | None = fact("mean share of an answer's 4-grams that it repeats", unit="[0, 1]")
    reference_perplexity: float | None = fact("perplexity of the answers under the reference")
    fvu: float | None = fact("variance that the autoencoder leaves unexplained", unit="FVU", optional=True)
    fvu_before: float | None = fact("the same at the start", unit="FVU", optional=True)
    scores: dict[str, list[float | None]] | None = fact(
        "monitor to the score of each answer", unit="logits", optional=True
    )


@dataclass(frozen=True, kw_only=True)
class ChangedLatentEntry(Record):
    """A latent whose mean over the fixed texts changed."""

    latent: int | None = fact("its index")
    before: float | None = fact("mean activation at the start")
    after: float | None = fact("mean activation now")
    on_before: float | None = fact("share of tokens on which it was on", unit="[0, 1]")
    on_after: float | None = fact("share of tokens on which it is on", unit="[0, 1]")


@dataclass(frozen=True, kw_only=True)
class SaeEntry(Record):
    """A sparse autoencoder on the fixed texts."""

    hook_point: str = fact("where it reads", "")
    tokens: int | None = fact("tokens read", unit="tokens")
    fvu_before: float | None = fact("fraction of variance unexplained at the start", unit="FVU")
    fvu: float | None = fact("the same now", unit="FVU")
    l0_before: float | None = fact("mean number of latents that were on per token at the start")
    l0: float | None = fact("the same now")
    changed: list[ChangedLatentEntry] = fact("the latents that changed most, the largest change first", list)


@dataclass(frozen=True, kw_only=True)
class MovedEntry(Record):
    """An answer to a fixed prompt whose score moved since the evaluation before."""

    prompt: Any = fact("text or chat messages")
    completion: Any = fact("the answer")
    change: float | None = fact("change of the score", unit="logits")


@dataclass(frozen=True, kw_only=True)
class BatchSampleEntry(Record):
    """A completion of a training batch that scored far from the first batch."""

    prompt: Any = fact("text or chat messages")
    completion: Any = fact("the completion")
    score: float | None = fact("its score", unit="logits")


@dataclass(frozen=True, kw_only=True)
class BatchEntry(Record):
    """A training batch whose scores were far from those of the first batch."""

    step: int | None = fact("its step", unit="steps")
    mean_score: float | None = fact("mean score", unit="logits")
    samples: list[BatchSampleEntry] = fact("its completions that are farthest away", list)


@dataclass(frozen=True, kw_only=True)
class DriftEvent(Event):
    """An evaluation: the policy compared with its own start, or one checkpoint with another."""

    event: ClassVar[str] = "drift"
    before: str = fact("first checkpoint, if two were compared", "", optional=True)
    after: str = fact("second checkpoint", "", optional=True)
    texts: int | None = fact("number of fixed texts")
    tokens: int | None = fact("number of their tokens that count", unit="tokens")
    hook_points: dict[str, dict[str, float | None]] = fact("hook point to metric to value (`drift.metrics`)", dict)
    output: dict[str, float | None] = fact(
        "metric of the predictions to value; empty for a model without a head", dict
    )
    monitors: dict[str, MonitorEntry] = fact("monitor to its readings", dict)
    finite: bool = fact("false if the model gave numbers that are not finite", True, optional=True)
    sae: SaeEntry | None = fact("a sparse autoencoder on the fixed texts", optional=True)
    own_text: OwnTextEntry | None = fact("the policy's answers to the fixed prompts", optional=True)
    patching: PatchingEntry | None = fact(
        "which block carries what the training changed, if contrast pairs were given", since=2, optional=True
    )
    moved: dict[str, list[MovedEntry]] | None = fact(
        "monitor to the answers that moved it most since the evaluation before", optional=True
    )
    batches: dict[str, list[BatchEntry]] | None = fact(
        "monitor to the training batches that moved it most", optional=True
    )
    about: dict[str, str] = fact(
        "metric to its range and direction; only in the first evaluation of a run", dict, since=2, optional=True
    )
    overhead_seconds: float | None = fact("duration of the evaluation", unit="seconds", optional=True)


@dataclass(frozen=True, kw_only=True)
class VerdictEvent(Event):
    """What the evaluation of the same step means."""

    event: ClassVar[str] = "verdict"
    verdict: str = fact("its name in the table of verdicts", "")
    because: list[str] = fact("the numbers that decided it", list)
    next: str = fact("what to do", "")
    alarm: bool = fact("whether `on_verdict: stop` stops at it", False)


@dataclass(frozen=True, kw_only=True)
class TokensEntry(Record):
    """A completion token by token."""

    pieces: list[str] = fact("text of each token", list)
    scores: dict[str, list[float | None]] = fact("readout to one score per token", dict)


@dataclass(frozen=True, kw_only=True)
class SampleEntry(Record):
    """One prompt with one completion."""

    prompt: Any = fact("text or chat messages")
    completion: Any = fact("text or chat messages")
    scores: dict[str, Any] = fact("name to score; null does not apply", dict)
    tokens: TokensEntry | None = fact("the completion token by token", optional=True)

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> SampleEntry:
        """A sample; a single score without a name is called `score`."""
        scores = line.get("scores")
        return super().from_json(line if isinstance(scores, dict | None) else {**line, "scores": {"score": scores}})


@dataclass(frozen=True, kw_only=True)
class SamplesEvent(Event):
    """Some completions."""

    event: ClassVar[str] = "samples"
    when: str = fact("`before`, `train`, `kept` or `after`", "train")
    rows: list[SampleEntry] = fact("the completions", list)


@dataclass(frozen=True, kw_only=True)
class TableEvent(Event):
    """A result that the run itself computed."""

    event: ClassVar[str] = "table"
    title: str = fact("its title; a later table of the same title replaces it", "")
    columns: list[Any] = fact("names of the columns", list)
    rows: list[Any] = fact("lists of cells, or mappings from column to cell", list)
    note: str = fact("what to know to read it", "")


@dataclass(frozen=True, kw_only=True)
class EndEvent(Event):
    """The training ended."""

    event: ClassVar[str] = "end"
    seconds: float | None = fact("duration since the last `run` event", unit="seconds")
