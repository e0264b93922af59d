"""The same run on every engine, side by side: one command that proves parity, and names the engine that each run really had.

    python tests/engines/compare.py                                        # everything, some minutes on two cores
    python tests/engines/compare.py --engines ddp zero3 --cases dpo sft
    python tests/engines/compare.py --write docs/engines.json && python tools/render.py    # the table of docs/engines.md

Each engine is started once, by `accelerate launch` with a file of `recipes/accelerate_configs/`. Exits with 1 if anything
differs from the single process by more than `TOLERANCE`. The column `others` is not judged: TRL averages some of its metrics
over processes without weights (`entropy`, `eval_entropy`, `eval_logits/*`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TOLERANCE = 1e-4
LIMIT = 900  # seconds for all cases of an engine
CONFIGS = {"single": "cpu", "ddp": "cpu_ddp", "zero2": "cpu_zero2", "zero3": "cpu_zero3", "fsdp2": "cpu_fsdp2"}
CASES = ["dpo", "dpo_lora", "dpo_odd", "grpo", "grpo_beta0", "grpo_lora", "grpo_silent", "sft", "sft_lora"]
COLUMNS = ("losses", "terms", "rewards", "drift", "others", "weights")
# What cannot be the same: clocks, and transformers' evaluation loss, which leaves out the rows that complete a last batch.
LEFT_OUT = ("runtime", "per_second", "seconds", "step_time", "flos", "time", "epoch", "eval_loss")


def make_model(folder: Path) -> Path:
    """A tiny model with its tokenizer and two cards, in a folder."""
    sys.path[:0] = [str(HERE.parent)]
    import tiny

    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model("llama", tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tiny.make_card(folder, model, tokenizer)
    tiny.make_card(folder, model, tokenizer, role="monitor", name="watch", pooling="last", layer=2, evidence=False)
    return folder


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def command(engine: str, script: Path, *arguments: str) -> list[str]:
    """`accelerate launch` of a script on an engine."""
    config = ROOT / "recipes" / "accelerate_configs" / f"{CONFIGS[engine]}.yaml"
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", str(config)]
    if engine != "single":
        launch += ["--main_process_port", str(free_port())]
    return [*launch, str(script), *arguments]


def environment() -> dict[str, str]:
    """Of a launched process: one thread, no network."""
    return {
        **os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "8000000000", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CI": "1",
        "TRANSFORMERS_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip


def launch(engine: str, cases: Sequence[str], model: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    """Runs under way; what they write goes to `OUT/<engine>.txt`."""
    arguments = ["--engine", engine, "--cases", *cases, "--model", str(model), "--out", str(out), *more]
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{engine}.txt").open("w") as written:
        return subprocess.Popen(
            command(engine, HERE / "run.py", *arguments), stdout=written, stderr=subprocess.STDOUT, env=environment(), cwd=ROOT
        )  # fmt: skip


def run(engine: str, cases: Sequence[str], model: Path, out: Path, *more: str) -> dict[str, dict[str, Any]]:
    """Results by case.

    Raises:
        `RuntimeError`: a run failed; the message has the end of what it wrote.
        `TimeoutExpired`: it hangs.
    """
    process = launch(engine, cases, model, out, *more)
    try:
        ended = process.wait(timeout=LIMIT)
    finally:
        process.terminate()  # and with it, where it still runs, all ranks
    if ended != 0:
        raise RuntimeError(f"{cases} on `{engine}` ended with {ended}:\n{(out / f'{engine}.txt').read_text()[-6000:]}")
    return {case: json.loads((out / case / engine / "result.json").read_text()) for case in cases}


def kept(log: dict[str, Any]) -> dict[str, float]:
    """The numbers of one line of a log that have to be the same."""
    return {k: v for k, v in log.items() if isinstance(v, int | float) and not any(word in k for word in LEFT_OUT)}


def kind_of(key: str) -> str:
    """Which column of the table a metric belongs to."""
    if key.startswith("interp/"):
        return "drift" if "/drift/" in key or "/drift_" in key or "own_" in key else "terms"
    if "reward" in key:
        return "rewards"
    return "losses" if key in ("loss", "train_loss", "kl", "grad_norm") else "others"


def gap(a: float, b: float) -> float:
    """Difference, relative if a number is above 1; infinite if only one of the two is a number."""
    if math.isnan(a) and math.isnan(b):
        return 0.0
    difference = abs(a - b) / max(1.0, abs(a), abs(b))
    return math.inf if math.isnan(difference) else difference


def compare(one: dict[str, Any], other: dict[str, Any], folders: tuple[Path, Path]) -> dict[str, tuple[float, str]]:
    """Largest difference per column, and the place where it was found."""
    from safetensors.torch import load_file

    worst: dict[str, tuple[float, str]] = dict.fromkeys(COLUMNS, (0.0, ""))

    def see(column: str, value: float, where: str) -> None:
        if value > worst[column][0]:
            worst[column] = (value, where)

    if len(one["history"]) != len(other["history"]):
        see("losses", math.inf, f"{len(one['history'])} against {len(other['history'])} lines of log")
    for mine, theirs in zip(one["history"], other["history"], strict=False):
        mine, theirs = kept(mine), kept(theirs)
        for key in sorted(mine.keys() | theirs.keys()):
            where = f"{key} at step {mine.get('step')}"
            if key in mine and key in theirs:
                see(kind_of(key), gap(mine[key], theirs[key]), where)
            else:
                see(kind_of(key), math.inf, f"{where}, in one alone")
    if one["completions"] != other["completions"]:
        see("rewards", math.inf, "completions")
    for batch, (mine, theirs) in enumerate(zip(one["rewards"], other["rewards"], strict=True)):
        for row, pair in enumerate(zip(chain(*mine), chain(*theirs), strict=True)):
            see("rewards", gap(*pair), f"batch {batch}, value {row}")
    for row, pair in enumerate(zip(one["reading"], other["reading"], strict=True)):
        see("terms", gap(*pair), f"`read()`, row {row}")
    weights = [load_file(next((folder / "model").glob("*model.safetensors"))) for folder in folders]
    if weights[0].keys() != weights[1].keys():
        see("weights", math.inf, f"names: {sorted(weights[0].keys() ^ weights[1].keys())[:3]}")
    for name in weights[0].keys() & weights[1].keys():
        see("weights", float((weights[0][name].float() - weights[1][name].float()).abs().max()), name)
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["ddp", "zero2", "zero3", "fsdp2"], choices=list(CONFIGS))
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument(
        "--out", type=Path, help="folder of all runs (default: a temporary one); finished runs are kept"
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON on the last line")
    parser.add_argument("--write", type=Path, help="write the table as JSON to this file, `docs/engines.json` say")
    arguments = parser.parse_args()
    out = (arguments.out or Path(tempfile.mkdtemp(prefix="engines-"))).resolve()
    model = out / "model"
    if not (model / "config.json").exists():
        make_model(model)
    rows = compare_engines(arguments.engines, arguments.cases, model, out)
    measured = {"settings": settings(), "rows": [with_numbers_only(row) for row in rows]}
    print(table(measured["rows"]))
    if arguments.write:
        arguments.write.write_text(json.dumps(measured, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(measured))
    return 1 if any(differing(row["worst"]) for row in rows) else 0


def compare_engines(engines: Sequence[str], cases: Sequence[str], model: Path, out: Path) -> list[dict[str, Any]]:
    """One row per engine and case: the largest differences from the single process, printed as they come."""
    rows: list[dict[str, Any]] = []
    alone = run("single", cases, model, out)
    for engine in engines:
        began = time.monotonic()
        for case, result in run(engine, cases, model, out).items():
            worst = compare(alone[case], result, (out / case / "single", out / case / engine))
            rows.append({"case": case, "engine": engine, "found": result["found"], "worst": worst})
            print(line(rows[-1]), flush=True)
        print(f"{engine}: {time.monotonic() - began:.0f} s", flush=True)
    return rows


def settings() -> dict[str, Any]:
    """The command, and on what it ran."""
    names = ("torch", "transformers", "trl", "accelerate", "peft", "deepspeed")
    return {
        "command": shlex.join(["python", "tests/engines/compare.py", *sys.argv[1:]]),
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def with_numbers_only(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it is stored: each column's largest difference, without the place where it was found."""
    return {**row, "worst": {column: value for column, (value, _) in row["worst"].items()}}


def differing(worst: dict[str, tuple[float, str]]) -> dict[str, tuple[float, str]]:
    """Columns that differ by more than the tolerance. `others` is not judged."""
    return {column: worst[column] for column in worst if worst[column][0] > TOLERANCE and column != "others"}


def line(row: dict[str, Any]) -> str:
    wrong = {c: f"{v:.1e} ({where})" for c, (v, where) in differing(row["worst"]).items()}
    return f"{row['case']} on {row['engine']}: {wrong or 'the same'}"


def table(rows: list[dict[str, Any]]) -> str:
    """Largest differences from the single process, as Markdown, from stored rows."""
    lines = [f"| case | engine that it had | processes | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 3) + "|"]
    for row in rows:
        engine = row["found"]
        stage = f" stage {engine['stage']}" if "stage" in engine else ""
        name = f"{engine['distributed_type']}{stage}, `{engine['model']}`, {engine['backend']}"
        values = " | ".join(f"{row['worst'][c]:.0e}" if row["worst"][c] else "0" for c in COLUMNS)
        lines.append(f"| {row['case']} | {name} | {engine['processes']} | {values} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
