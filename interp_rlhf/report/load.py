"""Run logs → one `Run` per arm and log.

In: paths of run logs or of folders. Out: runs. This is the border of the report: foreign and broken lines become events of
declared types here, and every text becomes safe to show. It must not know plots or pages.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from functools import singledispatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runlog.events import DriftEvent, EndEvent, MetricEvent, RunEvent, SamplesEvent, TableEvent, VerdictEvent
from ..runlog.latent_events import LatentsEvent, LatentsFoundEvent
from ..runlog.log import parse, read_run_log
from ..runlog.patching_events import PatchingEvent
from .inspection import found_table, inspected
from .runs import Judgement, Moved, ResultTable, Run, Sample, Samples
from .tables import evaluation_tables, logged_table
from .text import as_number, model_text, visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ..runlog.events import Event, SampleEntry, TokensEntry
    from .runs import Metrics

logger = logging.getLogger(__name__)

LOG_NAME = "interp.jsonl"
_CONSTANT = ("examples", "pressure", "holdout")  # of a monitor: true of the whole run, so there is no curve


def load_runs(paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str]) -> list[Run]:
    """Runs of all logs, in the order of the paths. A folder stands for every `interp.jsonl` below it, sorted.

    Raises:
        `FileNotFoundError`: a path that does not exist, or a folder without a run log.
        `ValueError`: no path, or a log without one complete event.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    if not paths:
        raise ValueError("`runs` is empty – expected at least one run log or folder – pass the run's `output_dir`.")
    runs = [run for path in _log_files(paths) for run in _runs_of(path)]
    _make_labels_unique(runs)
    return runs


def _log_files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Every log once, in the order of the paths."""
    files: dict[Path, Path] = {}
    for path in map(Path, paths):
        for file in _logs_below(path) if path.is_dir() else [path]:
            files.setdefault(file.resolve(), file)
    return list(files.values())


def _logs_below(folder: Path) -> list[Path]:
    files = sorted(folder.rglob(LOG_NAME))
    started = [file for file in files if file.stat().st_size]
    for file in sorted(set(files) - set(started)):
        logger.warning("`%s` is empty and left out of the report.", file)
    if not started:
        what = "only empty run logs" if files else "no run log"
        raise FileNotFoundError(
            f"`{folder}` holds {what} – expected an `{LOG_NAME}` with events in it or below it – "
            "pass the `output_dir` of a run, or the log file itself."
        )
    return started


def _runs_of(path: Path) -> list[Run]:
    """One run per arm named in the log. A second `run` event of the same arm is a restart of the same run."""
    folder = path.resolve().parent.name
    runs: dict[str, Run] = {}
    for segment in _segments([parse(_safe(line)) for line in read_run_log(path)]):
        first = segment[0]
        arm = (first.arm if isinstance(first, RunEvent) else "") or visible(folder)
        run = runs.setdefault(arm, Run(arm=arm, source=visible(f"{folder}/{path.name}")))
        _add_segment(run, segment)
    return list(runs.values())


def _safe(value: Any) -> Any:
    """A JSON value whose texts are safe to show, names included."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, list):
        return [_safe(item) for item in value]
    if isinstance(value, dict):
        return {visible(key): _safe(item) for key, item in value.items()}
    return value


def _segments(events: list[Event]) -> Iterator[list[Event]]:
    """Events from one start to the next."""
    segment: list[Event] = []
    for event in events:
        if isinstance(event, RunEvent) and segment:
            yield segment
            segment = []
        segment.append(event)
    yield segment


def _add_segment(run: Run, segment: list[Event]) -> None:
    run.starts += 1
    ends = [event for event in segment if isinstance(event, EndEvent)]
    run.ended = bool(ends)
    times = [event.time for event in segment if event.time is not None]
    if run.started is None and times:
        run.started = times[0]
    said = [event.seconds for event in ends if event.seconds]
    run.seconds += said[-1] if said else max(times, default=0.0) - min(times, default=0.0)
    step = 0
    for event in segment:
        # An event without a step belongs to the latest step.
        step = step if event.step is None else event.step
        run.last_step = max(run.last_step, step)
        _add(event, run, step)


@singledispatch
def _add(event: Event, run: Run, step: int) -> None:
    """Add an event to its run. An event of another kind adds nothing."""


@_add.register
def _(event: RunEvent, run: Run, step: int) -> None:
    run.title, run.model, run.trainer = (
        event.title or run.title, event.model or run.model, event.trainer or run.trainer,
    )  # fmt: skip
    run.cards = [{"name": card.name, "role": card.role, "sha256": card.sha256} for card in event.cards] or run.cards
    run.settings |= event.settings


@_add.register
def _(event: MetricEvent, run: Run, step: int) -> None:
    _add_numbers(run.metrics, event.metrics, step)


@_add.register
def _(event: DriftEvent, run: Run, step: int) -> None:
    run.evaluations[step], run.last_evaluated = (event.texts, event.tokens), step
    run.overhead_seconds += event.overhead_seconds or 0.0
    run.about |= event.about
    for point, metrics in event.hook_points.items():
        _add_numbers(run.hook_points.setdefault(point, {}), metrics, step)
    for name, monitor in event.monitors.items():
        numbers = {key: value for key, value in monitor.to_json().items() if _is_curve(key, value)}
        _add_numbers(run.monitors.setdefault(name, {}), numbers, step)
    run.tables |= {table.title: table for table in evaluation_tables(event, step)}
    run.moved += _moved_in(event, step)
    run.patchings += [] if event.patching is None else [event.patching]


def _is_curve(key: str, value: Any) -> bool:
    return key not in _CONSTANT and (value is None or as_number(value) is not None)


def _add_numbers(series: Metrics, metrics: Mapping[str, float | None], step: int) -> None:
    """Numbers join their series. `None` is a hole in it."""
    for name, value in metrics.items():
        series.setdefault(name, {})[step] = as_number(value)


def _moved_in(event: DriftEvent, step: int) -> Iterator[Moved]:
    """Answers, then completions of training batches, that moved a monitor."""
    for monitor, answers in (event.moved or {}).items():
        for row in answers:
            yield Moved(step, monitor, model_text(row.prompt), model_text(row.completion), row.change, batch=False)
    for monitor, batches in (event.batches or {}).items():
        for batch in batches:
            for sample in batch.samples:
                prompt, completion = model_text(sample.prompt), model_text(sample.completion)
                yield Moved(batch.step or 0, monitor, prompt, completion, sample.score, batch=True)


@_add.register
def _(event: SamplesEvent, run: Run, step: int) -> None:
    if event.rows:
        run.samples.append(Samples(event.when, step, [_sample_of(row) for row in event.rows]))


def _sample_of(row: SampleEntry) -> Sample:
    return Sample(model_text(row.prompt), model_text(row.completion), row.scores, **_tokens(row.tokens))


def _tokens(tokens: TokensEntry | None) -> dict[str, Any]:
    """Pieces, and the scores of readouts that scored every piece."""
    if tokens is None:
        return {}
    scores = {name: values for name, values in tokens.scores.items() if len(values) == len(tokens.pieces)}
    return {"pieces": tokens.pieces, "token_scores": scores} if tokens.pieces and scores else {}


@_add.register
def _(event: TableEvent, run: Run, step: int) -> None:
    table = logged_table(event)
    run.tables[table.title] = table


@_add.register
def _(event: VerdictEvent, run: Run, step: int) -> None:
    name = event.verdict or visible(event.other.get("name") or "no name")
    run.verdicts.append(Judgement(step, name, event.because, event.next, event.alarm, event.other))


@_add.register
def _(event: LatentsEvent, run: Run, step: int) -> None:
    run.inspections.append(inspected(event, step))


@_add.register
def _(event: LatentsFoundEvent, run: Run, step: int) -> None:
    table = ResultTable(*found_table(event))
    run.tables[table.title] = table
    run.searches += 1


@_add.register
def _(event: PatchingEvent, run: Run, step: int) -> None:
    run.patchings.append(event)


def _make_labels_unique(runs: list[Run]) -> None:
    """Runs of one arm get their log's folder in the name, and a number if the folder is the same too."""
    arms = Counter(run.arm for run in runs)
    for run in runs:
        run.label = run.arm if arms[run.arm] == 1 else f"{run.arm} ({run.source.rsplit('/', 1)[0]})"
    seen: Counter[str] = Counter()
    labels = Counter(run.label for run in runs)
    for run in runs:
        seen[run.label] += 1
        if labels[run.label] > 1:
            run.label = f"{run.label} #{seen[run.label]}"
