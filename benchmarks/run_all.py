"""Runs the benchmarks, one after the other, and writes their figures to the JSON files that the documents are rendered from.

    export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000
    python benchmarks/run_all.py                      everything that this environment can run, about four and a quarter hours
    python benchmarks/run_all.py --only read drift    some of them
    python benchmarks/run_all.py --list               what there is, what it needs, and how long each takes

Every ratio is measured side by side in one process. Absolute times differ from machine to machine, so nothing else should run
meanwhile. A run that fails leaves its file as it was. `python tools/render.py` then renders the documents.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FOLDER_OF_ACTIVATIONS = "runs/sae-activations"


@dataclass(frozen=True)
class Run:
    """One run of a benchmark.

    Attributes:
        name (`str`): how `--only` calls it.
        script (`str`): the benchmark, without `.py`.
        options (`tuple[str, ...]`): its options.
        minutes (`int`): how long it took on two cores of an AMD EPYC.
        key (`str`): where its JSON line goes in the file; empty if the file is one line, or if the script writes it.
        needs (`str`): what must be there, `trl-1-12` (an interpreter), `activations` (a folder), `transformer-lens`;
            empty for nothing.
    """

    name: str
    script: str
    options: tuple[str, ...]
    minutes: int
    key: str = ""
    needs: str = ""

    @property
    def file(self) -> str:
        """Where its figures are stored; those of PPO on both models are in one file."""
        return f"{self.script.removesuffix('_real_model')}.json"


def pairs(number: int) -> tuple[str, str]:
    return "--pairs", str(number)


EMBEDDED = ("--model", "embedded")
RUNS = (
    Run("read", "read", pairs(9), 6, "random_model"),
    Run("reward-random", "reward", pairs(12), 6, "random_model"),
    Run("reward", "reward", (*pairs(5), *EMBEDDED), 15, "smollm2"),
    Run("dpo", "dpo", (*pairs(5), *EMBEDDED), 40, "smollm2"),
    Run("drift", "drift", (*pairs(5), "--memory-pairs", "2"), 10, "smollm2"),
    Run("canaries", "canaries", (), 2, "."),
    Run("locate", "locate", ("--part", "quality"), 18, "quality"),
    Run("locate-others", "locate", ("--part", "quality", "--concept", "capital", "--concept", "gender"), 5, "others"),
    Run("locate-cost", "locate", ("--part", "cost"), 1, "cost"),
    Run("locate-peer", "locate", ("--part", "peer"), 2, "peer", "transformer-lens"),
    Run("sae", "sae", (), 2, "encoding"),
    Run("scaling", "scaling", ("--out", str(HERE / "scaling.json")), 12),
    Run("probes", "probes", ("--part", "sets", "--part", "planted", "--out", str(HERE / "probes.json")), 20),
    Run("probes-sweep", "probes", ("--part", "sweep", "--out", str(HERE / "probes.json")), 8),
    Run("probes-evidence", "probes", ("--part", "evidence", *pairs(2), "--out", str(HERE / "probes.json")), 7),
    Run("ppo-dense", "ppo", (*pairs(3), "--seeds", "12"), 25, "dense"),
    Run("ppo", "ppo", ("--factors",), 60, "comparison", "trl-1-12"),
    Run("ppo-real-model", "ppo_real_model", (), 26, "real_model", "trl-1-12"),
    Run("sae-training", "sae", ("--train", "10"), 20, "training", "activations"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these; `--list` names them")
    parser.add_argument("--list", action="store_true", help="list the runs")
    parser.add_argument("--trl-1-12", type=Path, metavar="PYTHON", help="interpreter of an environment with TRL 1.12")
    parser.add_argument(
        "--activations",
        type=Path,
        metavar="FOLDER",
        help=f"what `sae train --cache` filled, {FOLDER_OF_ACTIVATIONS} say",
    )
    parser.add_argument("--quick", action="store_true", help="tiny models, seconds; needs `--out`")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the JSON files (default: benchmarks/)")
    arguments = parser.parse_args()
    names = [run.name for run in RUNS]
    if unknown := sorted(set(arguments.only or ()) - set(names)):
        parser.error(f"`--only {' '.join(unknown)}` – expected some of {', '.join(sorted(names))}")
    if arguments.quick and arguments.out.resolve() == HERE:
        parser.error("`--quick` would overwrite measured figures – expected `--out FOLDER` with it")
    chosen = [run for run in RUNS if run.name in (arguments.only or names)]
    if arguments.list:
        print(
            "\n".join(
                f"{run.name:<16} {run.minutes:3} min  {run.needs and f'needs --{run.needs}'}".rstrip()
                for run in chosen
            )
        )
        return 0
    failed = [run.name for run in chosen if not carried_out(run, arguments)]
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall done; now `python tools/render.py`")
    return int(bool(failed))


def carried_out(run: Run, arguments: argparse.Namespace) -> bool:
    """Runs a benchmark and stores its figures; false if it failed. One whose needs are not met is left out."""
    installed = importlib.util.find_spec("transformer_lens")
    needed = {
        "trl-1-12": arguments.trl_1_12, "activations": arguments.activations, "transformer-lens": installed,
    }.get(run.needs)  # fmt: skip
    if run.needs and needed is None:
        missing = "`make bench-locate`" if run.needs == "transformer-lens" else f"`--{run.needs}`"
        print(f"{run.name}: left out – expected {missing}", flush=True)
        return True
    command = [sys.executable, str(HERE / f"{run.script}.py"), "--json", *run.options]
    command += ["--trl-1-12", str(needed)] if run.needs == "trl-1-12" else []
    command += ["--cache", str(needed)] if run.needs == "activations" else []
    command += ["--quick"] if arguments.quick else []
    if "--out" in command:
        place = command.index("--out") + 1
        command[place] = str(arguments.out / Path(command[place]).name)
    began = time.monotonic()
    print(f"{run.name}: about {run.minutes} min", flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        print(f"{run.name}: ended with {done.returncode}; its file was left as it was", flush=True)
        return False
    if run.key:
        store(arguments.out / run.file, run.key, json.loads(done.stdout.splitlines()[-1]))
    print(f"{run.name}: {(time.monotonic() - began) / 60:.1f} min", flush=True)
    return True


def store(path: Path, key: str, measured: dict[str, Any]) -> None:
    """Puts a benchmark's JSON line into its file, under a key, or at the top for `.`; the rest of the file stays."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept.update(measured if key == "." else {key: measured})
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
