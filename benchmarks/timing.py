"""Paired timing, shared by the benchmarks: how a ratio is measured and printed.

In: functions to compare. Out: ratios of pairs that ran side by side in one process, with a bootstrap interval, as a table and
as one JSON line. Absolute seconds mean nothing on a shared machine. It must not know what is measured.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

RESAMPLES = 2000
VERSIONS = (
    "torch", "transformers", "trl", "peft", "accelerate", "lmprobe", "transformer-lens", "sae-lens", "eai-sparsify",
)  # fmt: skip
# Settings of threads and allocator, which change a ratio.
ENVIRONMENT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


class Sample(NamedTuple):
    """Seconds of one run: CPU time of this process with all its threads, and time by the clock."""

    cpu: float
    wall: float


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name (`str`): key in the JSON object's `ratios`.
        values (`Sequence[float]`): one ratio per pair; empty if it could not run.
        target (`str`): what the project asks for, `≥ 1.75`; empty if the row is only for comparison.
        note (`str`): how to read it, or why it could not run.
    """

    name: str
    values: Sequence[float]
    target: str = ""
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def interval(self, seed: int) -> tuple[float, float]:
        """95 % percentile bootstrap of the median over pairs."""
        rng = random.Random(seed)
        draws = sorted(statistics.median(rng.choices(self.values, k=len(self.values))) for _ in range(RESAMPLES))
        return draws[int(0.025 * RESAMPLES)], draws[int(0.975 * RESAMPLES) - 1]


def measure(function: Callable[[], Any]) -> Sample:
    """One run of a function."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return Sample(time.process_time() - cpu, time.perf_counter() - wall)


def alternate(
    first: Callable[[], Any],
    second: Callable[[], Any],
    pairs: int,
    name: str = "",
    timed: Callable[[Callable[[], Any]], Sample] = measure,
) -> list[tuple[Sample, Sample]]:
    """Runs two functions side by side, A B B A …, after one warm-up of each that is not counted.

    Args:
        first, second (`Callable`): what to compare.
        pairs (`int`): runs of each.
        name (`str`): label of the progress bar.
        timed (`Callable`, defaults to `measure`): times one run. Give it if only a part of the run counts.

    Returns:
        `list[tuple[Sample, Sample]]`: per pair the samples of `first` and of `second`.
    """
    timed(first), timed(second)
    samples = []
    for pair in tqdm(range(pairs), desc=name, leave=False):
        if pair % 2 == 0:
            a, b = timed(first), timed(second)
        else:
            b, a = timed(second), timed(first)
        samples.append((a, b))
    return samples


def rows_of(name: str, samples: Sequence[tuple[Sample, Sample]], target: str = "", note: str = "") -> list[Row]:
    """First over second, by CPU time and by the clock. The target is about CPU time."""
    return [
        Row(name, [a.cpu / b.cpu for a, b in samples], target, note),
        Row(f"{name}_wall", [a.wall / b.wall for a, b in samples]),
    ]


def parser(description: str | None, pairs: int) -> argparse.ArgumentParser:
    """Arguments that every benchmark takes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    made.add_argument("--pairs", type=int, default=pairs, help="runs of each side, alternating (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of weights, data and sampling (default: %(default)s)")
    made.add_argument(
        "--quick", action="store_true", help="one pair on a tiny model made in code; shows only that everything works"
    )
    return made


def prepare(arguments: argparse.Namespace) -> None:
    """Seeds torch, takes one thread unless `OMP_NUM_THREADS` says otherwise, and keeps every library off the network."""
    if arguments.pairs < 1:
        raise SystemExit(f"`--pairs` is {arguments.pairs} – expected at least 1.")
    if arguments.quick:
        arguments.pairs = 1
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "CI", "TRL_EXPERIMENTAL_SILENCE"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def finish(benchmark: str, rows: Sequence[Row], arguments: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Prints the table, what was measured on what, and, with `--json`, the JSON line."""
    print(
        f"\n{benchmark}: median of {arguments.pairs} paired ratios [95 % bootstrap interval]; CPU time unless it says wall\n"
    )
    width = max(len(row.name) for row in rows)
    intervals = {row.name: row.interval(arguments.seed) for row in rows if row.values}
    for row in rows:
        figure = "      –"
        if row.values:
            low, high = intervals[row.name]
            figure = f"{row.median:7.4g} [{low:.4g}, {high:.4g}]"
        print(f"{row.name:<{width}}  {figure:<28} {row.target and f'target {row.target}':<14} {row.note}".rstrip())
    about = {
        **settings,
        "seed": arguments.seed,
        "quick": arguments.quick,
        "command": command(benchmark),
        "intervals": intervals,
        "targets": {row.name: row.target for row in rows if row.target},
        "not_run": {row.name: row.note for row in rows if not row.values},
        **machine(),
    }
    print_what_was_measured(about)
    if arguments.json:
        ratios = {row.name: float(row.median) for row in rows if row.values}
        print(json.dumps({"benchmark": benchmark, "ratios": ratios, "pairs": arguments.pairs, "settings": about}))


def print_what_was_measured(settings: dict[str, Any]) -> None:
    """The model or other subject, the machine and the versions, for the reader of a terminal."""
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    machine = f"{settings['processor']}, {settings['cores']} cores, {settings['threads']} thread"
    print(f"\nMeasured on: {settings['model']}; {machine}; {versions}.")


def command(benchmark: str) -> str:
    """The command that is running, to be typed at the root of the repository."""
    return shlex.join(["python", f"benchmarks/{benchmark}.py", *sys.argv[1:]])


def machine() -> dict[str, Any]:
    """Processor, threads, environment and versions."""
    versions = {name: version for name in VERSIONS if (version := installed_version(name))}
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "versions": {"python": platform.python_version(), **versions},
    }


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Name of the processor, as the system gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
