"""Training runs on one engine, on a tiny model, with everything that has to be the same on every engine written to a file.

    accelerate launch --config_file recipes/accelerate_configs/cpu_zero3.yaml tests/engines/run.py \\
        --engine zero3 --cases dpo sft --model FOLDER --out FOLDER

`compare.py` starts it for each engine and compares. Which engine a run really had is asserted here, before anything is written.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import conftest  # noqa: E402, F401, the environment of all tests
import torch  # noqa: E402
from cases import CASES, build, readout_of  # noqa: E402
from cpu_engines import allow_fsdp_on_cpu, partition_small_weights  # noqa: E402
from deterministic import same_rollouts  # noqa: E402

ENGINES = {
    "single": {"distributed_type": "NO", "processes": 1, "model": ""},
    "ddp": {"distributed_type": "MULTI_CPU", "processes": 2, "model": "DistributedDataParallel"},
    "zero2": {"distributed_type": "DEEPSPEED", "processes": 2, "model": "DeepSpeedEngine", "stage": 2},
    "zero3": {
        "distributed_type": "DEEPSPEED",
        "processes": 2,
        "model": "DeepSpeedEngine",
        "stage": 3,
        "in_pieces": 0.9,
    },
    "fsdp2": {"distributed_type": "FSDP", "processes": 2, "model": "FSDP", "in_pieces": 0.9},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=sorted(ENGINES), required=True)
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True, help="the runs' files go to OUT/CASE/ENGINE")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--save-every", type=int, default=0)
    parser.add_argument("--fault", default="", help="RANK:NAME, see `cases.build`")
    parser.add_argument(
        "--kill-at", default="", help="RANK:STEP, the rank kills itself by signal 9 at the end of that step"
    )
    return parser.parse_args()


def engine_of(trainer: Any) -> dict[str, Any]:
    """What the run really had."""
    accelerator = trainer.accelerator
    found = {
        "distributed_type": accelerator.distributed_type.value,
        "processes": accelerator.num_processes,
        "model": type(trainer.model_wrapped).__name__,
        "backend": torch.distributed.get_backend() if torch.distributed.is_initialized() else None,
    }
    if accelerator.num_processes > 1:
        found["world_size"] = torch.distributed.get_world_size()
    found["in_pieces"] = in_pieces(trainer.model_wrapped)
    if found["distributed_type"] == "DEEPSPEED":
        found["stage"] = int(trainer.model_wrapped.zero_optimization_stage())
    return found


def in_pieces(model: Any) -> float:
    """Share of the parameters of which a rank holds a part only, between two steps."""
    parts = []
    for parameter in model.parameters():
        status = getattr(parameter, "ds_status", None)
        parts.append(hasattr(parameter, "full_tensor") or (status is not None and status.name == "NOT_AVAILABLE"))
    return sum(parts) / len(parts)


def require_engine(name: str, trainer: Any) -> dict[str, Any]:
    """Raises where a run had another engine than the one that it was asked for: parity would be shown for the wrong reason."""
    wanted, found = ENGINES[name], engine_of(trainer)
    wrong = {
        key: (found.get(key), value)
        for key, value in wanted.items()
        if key not in ("model", "in_pieces") and found.get(key) != value
    }
    if found["in_pieces"] < wanted.get(
        "in_pieces", 0
    ):  # FSDP2 leaves the outermost part whole after a forward without backward
        wrong["in_pieces"] = (found["in_pieces"], wanted["in_pieces"])
    if not found["model"].startswith(wanted["model"]) or found.get("world_size", 1) != wanted["processes"]:
        wrong["model or world size"] = (found, wanted)
    if wrong:
        raise RuntimeError(f"`{name}` was asked for and the run had {found} – expected {wanted}: {wrong}.")
    return found


class Killer:
    """A callback that ends its own process without a word at the end of a step."""

    @staticmethod
    def of(rank: int, step: int) -> Any:
        from transformers import TrainerCallback

        class Kill(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == step and args.process_index == rank:
                    print("killed", flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)

        return Kill()


def train(given: argparse.Namespace, case: str) -> None:
    """One run of one case, its result in a file."""
    folder = given.out / case / given.engine
    trainer, attached = build(given, case, folder)
    seen = same_rollouts(trainer, silent="silent" in case)
    if given.kill_at:
        rank, step = map(int, given.kill_at.split(":"))
        trainer.add_callback(Killer.of(rank, step))
    os.write(1, f"ready {os.getpid()}\n".encode())  # in one piece: the other rank writes to the same file
    trainer.train(resume_from_checkpoint=True if given.resume else None)
    engine = require_engine(given.engine, trainer)
    trainer.save_model(str(folder / "model"))
    reading = uneven_reading(trainer)
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    result = {
        "engine": given.engine, "case": case, "found": engine, "history": trainer.state.log_history, **seen,
        "own_forwards": [part.own_forwards for part in (attached.rollout, attached.terms) if part is not None],
        "reading": reading,
    }  # fmt: skip
    if trainer.is_world_process_zero():
        (folder / "result.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def uneven_reading(trainer: Any) -> list[float]:
    """Scores by `read()` where rank 0 has all rows, in several forwards, and the others none."""
    from tiny import sentences

    from interp_rlhf import read
    from interp_rlhf.activations import is_rank_zero, of_all_ranks

    rows = sentences(6, seed=8) if is_rank_zero() else []
    readout = readout_of("uneven", 1, 21)
    found = read(trainer.model_wrapped, rows, [readout], tokenizer=trainer.processing_class, batch_tokens=32)
    return of_all_ranks([score for score in readout.score(found["uneven"]) if score is not None])[0]


def main() -> None:
    given = parse()
    allow_fsdp_on_cpu()
    partition_small_weights()
    torch.set_num_threads(1)
    for case in given.cases:
        train(given, case)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
