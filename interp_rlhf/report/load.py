"""Run logs → plain records of what a report shows.

In: paths of run logs or of folders. Out: one `Run` per arm and log. Validates at the border: whatever shape an event
has, what leaves here has the declared types, and every name is safe to show. Knows nothing of plots or pages.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runlog.log import read_run_log
from .inspection import found_table, parse_inspection
from .text import as_dict, as_list, as_number, model_text, show, visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .inspection import Inspection

logger = logging.getLogger(__name__)

LOG_NAME = "interp.jsonl"
_CONSTANT = ("examples", "pressure")  # of a monitor: true of the whole run, no curve

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
class Table:
    """A result that the run itself worked out."""

    title: str
    columns: list[str]
    rows: list[list[Any]]
    note: str


@dataclass
class Verdict:
    """A judgement: its name, what made it, what to do next, and anything else that was logged with it."""

    step: int
    name: str
    because: list[str]
    next: str
    alarm: bool
    fields: dict[str, Any]


@dataclass
class Moved:
    """An answer, or a training batch's sample, that moved a monitor."""

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
    evaluations: dict[int, tuple[Any, Any]] = field(default_factory=dict)  # step → (texts, tokens) of a drift event
    overhead_seconds: float = 0.0
    samples: list[Samples] = field(default_factory=list)
    tables: dict[str, Table] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    moved: list[Moved] = field(default_factory=list)
    inspections: list[Inspection] = field(default_factory=list)
    searches: int = 0  # for latents; their results are tables

    @property
    def empty(self) -> bool:
        """Whether nothing beside the start (and perhaps the end) was logged."""
        return not (
            self.metrics or self.evaluations or self.samples or self.tables or self.verdicts or self.inspections
        )

    @property
    def only_read(self) -> bool:
        """Whether nothing was trained here: a model was read to understand its latents."""
        trained = self.trainer or self.metrics or self.evaluations or self.samples or self.verdicts
        return not trained and bool(self.inspections or self.searches)


def load_runs(paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str]) -> list[Run]:
    """Runs of all logs, in the order given; a folder stands for every `interp.jsonl` below it, sorted.

    Raises:
        `FileNotFoundError`: a path that does not exist, or a folder without a run log.
        `ValueError`: no path, or a log without one complete event.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    if not paths:
        raise ValueError("`runs` is empty – expected at least one run log or folder – pass the run's `output_dir`.")
    runs = [run for path in _log_files(paths) for run in _runs_of(path, read_run_log(path))]
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
    found = sorted(folder.rglob(LOG_NAME))
    started = [file for file in found if file.stat().st_size]
    for file in sorted(set(found) - set(started)):
        logger.warning("`%s` is empty and left out of the report.", file)
    if not started:
        what = "only empty run logs" if found else "no run log"
        raise FileNotFoundError(
            f"`{folder}` holds {what} – expected an `{LOG_NAME}` with events in it or below it – "
            "pass the `output_dir` of a run, or the log file itself."
        )
    return started


def _runs_of(path: Path, events: list[dict[str, Any]]) -> list[Run]:
    """One run per arm named in the log. A second `run` event of the same arm is a restart of the same run."""
    folder = path.resolve().parent.name
    runs: dict[str, Run] = {}
    for segment in _segments(events):
        head = segment[0] if segment[0]["event"] == "run" else {}
        arm = visible(head.get("arm") or folder)
        run = runs.setdefault(arm, Run(arm=arm, source=visible(f"{folder}/{path.name}")))
        _forget_superseded(run, segment)
        _add_segment(run, segment)
    return list(runs.values())


def _segments(events: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Events from one start to the next."""
    segment: list[dict[str, Any]] = []
    for event in events:
        if event["event"] == "run" and segment:
            yield segment
            segment = []
        segment.append(event)
    yield segment


def _forget_superseded(run: Run, segment: list[dict[str, Any]]) -> None:
    """A restart from step s repeats every step from s on: what an earlier start logged there no longer counts."""
    for when in ("before", "after"):
        again = [_step(event) or 0 for event in segment if event["event"] == "samples" and event.get("when") == when]
        if again:
            run.samples = [old for old in run.samples if old.when != when or old.step < min(again)]
    steps = [step for event in segment if event["event"] == "metric" and (step := _step(event)) is not None]
    if not run.starts or not steps:
        return
    first = min(steps)
    for family in (run.metrics, *run.hook_points.values(), *run.monitors.values()):
        for name in family:
            family[name] = {step: value for step, value in family[name].items() if step < first}
    run.evaluations = {step: value for step, value in run.evaluations.items() if step < first}
    run.samples = [samples for samples in run.samples if samples.step < first]
    run.verdicts = [verdict for verdict in run.verdicts if verdict.step < first]
    run.moved = [moved for moved in run.moved if moved.step < first]
    run.inspections = [inspection for inspection in run.inspections if inspection.step < first]
    run.last_step = min(run.last_step, first)


def _add_segment(run: Run, segment: list[dict[str, Any]]) -> None:
    run.starts += 1
    run.ended = any(event["event"] == "end" for event in segment)
    times = [time for event in segment if (time := as_number(event.get("time"))) is not None]
    if run.started is None and times:
        run.started = times[0]
    said = [seconds for event in segment if event["event"] == "end" and (seconds := as_number(event.get("seconds")))]
    run.seconds += said[-1] if said else max(times, default=0.0) - min(times, default=0.0)
    add = {"run": _add_run, "metric": _add_metric, "drift": _add_drift, "samples": _add_samples, "table": _add_table}
    add |= {"verdict": _add_verdict, "latents": _add_latents, "latents_found": _add_found}
    step = 0
    for event in segment:
        # An event without a step belongs to the latest step.
        step = step if (own := _step(event)) is None else own
        run.last_step = max(run.last_step, step)
        if event["event"] in add:
            add[event["event"]](run, event, step)


def _add_run(run: Run, event: dict[str, Any], step: int) -> None:
    for name in ("title", "model", "trainer"):
        if event.get(name):
            setattr(run, name, visible(event[name]))
    run.cards = [_card(card) for card in as_list(event.get("cards"))] or run.cards
    run.settings |= {visible(name): value for name, value in as_dict(event.get("settings")).items()}


def _card(card: Any) -> dict[str, str]:
    card = card if isinstance(card, dict) else {"name": card}
    return {key: visible(card.get(key) or "") for key in ("name", "role", "sha256")}


def _add_metric(run: Run, event: dict[str, Any], step: int) -> None:
    _add_numbers(run.metrics, event.get("metrics"), step)


def _add_numbers(series: Metrics, metrics: Any, step: int) -> None:
    """Numbers join their series; `None` stays a hole in it; text, lists and booleans are not plotted."""
    for name, value in as_dict(metrics).items():
        number = as_number(value)
        if number is not None or value is None or isinstance(value, float):
            series.setdefault(visible(name), {})[step] = number


def _add_drift(run: Run, event: dict[str, Any], step: int) -> None:
    run.evaluations[step] = (_amount(event.get("texts")), _amount(event.get("tokens")))
    run.overhead_seconds += as_number(event.get("overhead_seconds")) or 0.0
    for key, target in (("hook_points", run.hook_points), ("monitors", run.monitors)):
        for name, metrics in as_dict(event.get(key)).items():
            metrics = metrics if isinstance(metrics, dict) else {"value": metrics}
            metrics = {key: value for key, value in metrics.items() if key not in _CONSTANT}
            _add_numbers(target.setdefault(visible(name), {}), metrics, step)

    _add_readings(run, event, step)
    for key, number, batch in (("moved", "change", False), ("batches", "score", True)):
        for monitor, found in as_dict(event.get(key)).items():
            for item in as_list(found):
                for row in as_list(as_dict(item).get("samples")) if batch else [item]:
                    run.moved.append(
                        _moved(monitor, as_dict(row), as_dict(item).get("step") if batch else step, number, batch)
                    )


def _add_readings(run: Run, event: dict[str, Any], step: int) -> None:
    """Tables of the latest evaluation: monitors on labelled text, and the policy's own text, with their intervals."""
    rows: list[list[Any]] = []
    for name, found in as_dict(event.get("monitors")).items():
        found = as_dict(found)
        for way in ("frozen", "restandardized", "refitted"):
            if f"{way}_auroc" in found:
                alarms = found.get("false_alarms") if way == "frozen" else None
                rows.append(
                    [name, way, *(found.get(f"{way}_{key}") for key in ("auroc", "interval", "change")), alarms]
                )
    if rows:
        columns = [
            "monitor",
            "read",
            "AUROC",
            "95 % interval",
            "change, interval",
            "false alarms, short to long texts",
        ]
        note = f"At step {step}. False alarms are at the threshold that gave 5 % at the start."
        run.tables["Monitors on labelled text"] = Table("Monitors on labelled text", columns, rows, note)
    own = as_dict(event.get("own_text"))
    lines = [
        [
            name,
            as_dict(found).get("policy"),
            as_dict(found).get("text"),
            *(as_dict(found).get(f"{way}_change") for way in ("policy", "text")),
        ]
        for name, found in as_dict(own.get("monitors")).items()
    ]
    lines += [
        [name, as_dict(found).get("mean"), None, as_dict(found).get("change"), None]
        for name, found in as_dict(own.get("measures")).items()
    ]
    if lines:
        shares = ", ".join(
            f"{key} {show(own.get(key))}" for key in ("clipped", "empty", "repetition", "reference_perplexity")
        )
        run.tables["The policy's own text"] = Table(
            "The policy's own text",
            ["what", "read on the policy", "on the reference", "change, interval", "by the text alone, interval"],
            lines,
            f"At step {step}, on {show(own.get('prompts'))} prompts; changes in its standard deviations. {shares}.",
        )
    if sparse := as_dict(event.get("sae")):
        _add_changed_latents(run, sparse, own, step)


def _add_changed_latents(run: Run, sparse: dict[str, Any], own: dict[str, Any], step: int) -> None:
    """The table of what a sparse autoencoder saw change, and in its note whether it still stands for the activations."""
    kept = ("latent", "before", "after", "on_before", "on_after")
    rows = [[as_dict(row).get(key) for key in kept] for row in as_list(sparse.get("changed"))]
    pairs = [("variance unexplained", sparse, "fvu"), ("latents on per token", sparse, "l0")]
    pairs += [("variance unexplained on the policy's own text", own, "fvu")] if "fvu" in own else []
    told = ", ".join(f"{words} {show(at.get(key + '_before'))} → {show(at.get(key))}" for words, at, key in pairs)
    title = "Latents that changed most"
    run.tables[title] = Table(
        title,
        ["latent", "mean before", "mean now", "share of tokens before", "now"],
        rows,
        f"At step {step} against the start, at {visible(sparse.get('hook_point'))}, on {show(sparse.get('tokens'))} tokens of "
        f"the fixed texts: {told}. Where more is left unexplained than before, the latents say less about this model.",
    )


def _moved(monitor: str, row: dict[str, Any], step: Any, number: str, batch: bool) -> Moved:
    prompt, completion = model_text(row.get("prompt")), model_text(row.get("completion"))
    return Moved(int(as_number(step) or 0), visible(monitor), prompt, completion, as_number(row.get(number)), batch)


def _amount(value: Any) -> Any:
    return len(value) if isinstance(value, list) else value


def _add_samples(run: Run, event: dict[str, Any], step: int) -> None:
    rows = [_sample(row) for row in as_list(event.get("rows")) if isinstance(row, dict)]
    if rows:
        run.samples.append(Samples(visible(event.get("when") or "train"), step, rows))


def _sample(row: dict[str, Any]) -> Sample:
    scores = row.get("scores")
    named = scores if isinstance(scores, dict) else {} if scores is None else {"score": scores}
    return Sample(
        prompt=model_text(row.get("prompt")),
        completion=model_text(row.get("completion")),
        scores={visible(name): value for name, value in named.items()},
        **_tokens(row.get("tokens")),
    )


def _tokens(tokens: Any) -> dict[str, Any]:
    """Pieces and their scores, where there are as many of the one as of the other."""
    pieces = [visible(piece) for piece in as_list(as_dict(tokens).get("pieces"))]
    scores = {
        visible(name): [as_number(value) for value in values]
        for name, values in as_dict(as_dict(tokens).get("scores")).items()
        if isinstance(values, list) and len(values) == len(pieces)
    }
    return {"pieces": pieces, "token_scores": scores} if pieces and scores else {}


def _add_table(run: Run, event: dict[str, Any], step: int) -> None:
    rows = as_list(event.get("rows"))
    named = dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row)
    columns = [show(name) for name in as_list(event.get("columns"))] or list(named)
    cells = [[row.get(name) for name in columns] if isinstance(row, dict) else as_list(row) for row in rows]
    width = max([len(columns), *map(len, cells)])
    table = Table(
        title=visible(event.get("title") or "Result"),
        columns=[visible(name) for name in columns] + [""] * (width - len(columns)),
        rows=[row + [None] * (width - len(row)) for row in cells],
        note=visible(event.get("note") or ""),
    )
    run.tables[table.title] = table


def _add_verdict(run: Run, event: dict[str, Any], step: int) -> None:
    known = ("event", "time", "step", "verdict", "because", "next", "alarm")
    fields = {visible(key): value for key, value in event.items() if key not in known}
    because = [visible(reason) for reason in as_list(event.get("because"))]
    name = visible(event.get("verdict") or event.get("name") or "no name")
    run.verdicts.append(
        Verdict(step, name, because, visible(event.get("next") or ""), event.get("alarm") is True, fields)
    )


def _add_latents(run: Run, event: dict[str, Any], step: int) -> None:
    run.inspections.append(parse_inspection(event, step))


def _add_found(run: Run, event: dict[str, Any], step: int) -> None:
    table = Table(*found_table(event))
    run.tables[table.title] = table
    run.searches += 1


def _step(event: dict[str, Any]) -> int | None:
    number = as_number(event.get("step"))
    return None if number is None else int(number)


def _make_labels_unique(runs: list[Run]) -> None:
    """Runs of one arm get their log's folder in the name, and a number where that is the same too."""
    arms = Counter(run.arm for run in runs)
    for run in runs:
        run.label = run.arm if arms[run.arm] == 1 else f"{run.arm} ({run.source.rsplit('/', 1)[0]})"
    seen: Counter[str] = Counter()
    labels = Counter(run.label for run in runs)
    for run in runs:
        seen[run.label] += 1
        if labels[run.label] > 1:
            run.label = f"{run.label} #{seen[run.label]}"
