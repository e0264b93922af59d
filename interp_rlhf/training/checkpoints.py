"""Checkpoints: which one a run may resume from, at which steps a rollout trainer may save, and which counters are saved too.

In: a trainer and its output folder. Out: a complete checkpoint, or an error with the `save_steps` to use.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback

from .trl import restore_order

logger = logging.getLogger(__name__)
STATE_KEY = "interp_rlhf"


class Stateful(Protocol):
    """A part with counters that a resumed run must know."""

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...


def last_complete_checkpoint(output_dir: str | Path, weights_only: bool = False) -> str | None:
    """The complete checkpoint with the highest step in a folder; None if there is none.

    transformers writes `trainer_state.json` last, so a kill during a save leaves a folder without that whole file.

    Args:
        output_dir (`str` or `Path`): holds `checkpoint-<step>` folders.
        weights_only (`bool`, defaults to `False`): the run saves no optimizer and no random state (`save_only_model`).
    """
    folders = [f for f in Path(output_dir).glob("checkpoint-*") if f.is_dir() and f.name.split("-")[-1].isdigit()]
    for folder in sorted(folders, key=lambda f: int(f.name.split("-")[-1]), reverse=True):
        if (lacking := _lacks(folder, weights_only)) is None:
            return str(folder)
        logger.warning("`%s` is not complete (%s): the checkpoint before it is used.", folder, lacking)
    logger.warning("`%s` holds no complete checkpoint: the run starts at step 0.", output_dir)
    return None


def _lacks(folder: Path, weights_only: bool) -> str | None:
    from safetensors import SafetensorError, safe_open

    step = int(folder.name.split("-")[-1])
    try:
        state = json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return "no whole `trainer_state.json`"
    if not isinstance(state, Mapping):
        return "no whole `trainer_state.json`"
    if state.get("global_step") != step:
        return f"its `trainer_state.json` is of step {state.get('global_step')}"
    for name in ("optimizer.pt", "scheduler.pt"):
        if (folder / name).exists() and (folder / name).stat().st_size == 0:
            return f"`{name}` is empty"
    engine = [*folder.glob("global_step*"), *folder.glob("pytorch_model*")]
    if not weights_only and (absent := _absent_state(folder, state, bool(list(folder.glob("global_step*"))))):
        return f"no `{absent}`"
    weights = list(folder.glob("*.safetensors"))
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            return f"`{file.name}` is torn"
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"`{index.name}` is torn"
        if lacking := sorted(shards - {file.name for file in weights}):
            return f"no `{lacking[0]}`"
    return None if weights or engine else "no weights"


def _absent_state(folder: Path, state: Mapping[str, Any], deepspeed: bool) -> str | None:
    """A missing file of optimizer, schedule or random state; None if all exist. Each rank writes its own, in any order."""
    counters = (state.get("stateful_callbacks") or {}).get(STATE_KEY) or {}
    ranks = int(counters.get("processes", 1))
    needed = ["rng_state*.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    if deepspeed:  # it may keep the schedule itself; it writes `latest` at the end
        needed += ["latest"] + [f"global_step*/*_rank_{rank}_mp_rank_*_optim_states.pt" for rank in range(ranks)]
    else:
        needed.append("scheduler.pt")
    return next((pattern for pattern in needed if not list(folder.glob(pattern))), None)


def prompts_of(trainer: Any) -> int | None:
    """Rows of a trainer's data set; None if it has no length."""
    try:
        return len(trainer.train_dataset)
    except TypeError:
        return None


def _steps_per_epoch(args: Any, prompts: int | None) -> int | None:
    """Optimizer steps of an epoch; its last one may have fewer micro-batches than the others."""
    if prompts is None:
        return None
    batches = prompts // max(1, args.generation_batch_size // args.num_generations)
    return (
        math.ceil(batches * args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps) or None
    )


def is_aligned(args: Any, step: int, prompts: int | None = None) -> bool:
    """True if, after an optimizer step, a rollout trainer has used up its generated batch.

    An epoch ends with a used-up batch, even if its last step has fewer micro-batches.
    """
    epoch = _steps_per_epoch(args, prompts)
    inside = step if epoch is None else step % epoch
    return bool(inside * args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) == 0)


def save_multiple(args: Any, prompts: int | None = None) -> int:
    """Optimizer steps of which every multiple is aligned (`is_aligned`)."""
    every = args.steps_per_generation * args.num_iterations  # micro-steps
    within = int(every // math.gcd(args.gradient_accumulation_steps, every))
    epoch = _steps_per_epoch(args, prompts)
    return within if epoch is None or epoch % within == 0 else epoch


def require_aligned_saves(args: Any, save_steps: float | None, prompts: int | None = None) -> None:
    """Refuse saves in the middle of a generated batch: a run that resumes there draws other batches (TRL 1.16).

    Args:
        args (`GRPOConfig` or `RLOOConfig`): the trainer's.
        save_steps (`int`, *optional*): steps between saves; a share below 1 counts as unknown.
        prompts (`int`, *optional*): rows of the data set.

    Raises:
        `ValueError`: a save is not aligned. The message has the number to use.
    """
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    multiple = save_multiple(args, prompts)
    if multiple == 1 or strategy == "no" or (strategy == "steps" and (save_steps is None or save_steps < 1)):
        return
    if strategy == "steps" and int(save_steps or 0) % multiple == 0:
        return
    saves = range(int(save_steps or 0), args.max_steps + 1, int(save_steps or 0)) if strategy == "steps" else ()
    if saves and all(
        is_aligned(args, step, prompts) for step in saves
    ):  # before the end of the epoch fewer steps may do
        return
    if strategy == "epoch" and prompts is not None:
        return
    nearest = max(multiple, round((save_steps or 0) / multiple) * multiple) if strategy == "steps" else multiple
    what = f"`save_steps` is {int(save_steps or 0)}" if strategy == "steps" else f"`save_strategy` is `{strategy}`"
    raise ValueError(
        f"{what} – expected a multiple of {multiple} steps: a generated batch is used for {args.steps_per_generation} × "
        f"{args.num_iterations} micro-batches (`steps_per_generation` × `num_iterations`), {args.gradient_accumulation_steps} "
        "per step"
        f"{'' if prompts is None else f', with {prompts} prompts in an epoch'}, and a run resumed in between would draw "
        "another one. Use "
        f'`save_strategy="steps", save_steps={nearest}`.'
    )


class ResumeCallback(TrainerCallback):
    """Keeps the counters of attached parts in `trainer_state.json`, and restores them.

    It does not use `ExportableState`: transformers would rebuild the callback from its numbers alone, without the parts.

    Args:
        parts (`dict[str, Stateful]`): by name.
        aligned (`bool`): whether saves must be aligned with generated batches.
        prompts (`int`, *optional*): rows of the data set.
    """

    def __init__(self, parts: Mapping[str, Stateful], aligned: bool, prompts: int | None = None):
        self._parts, self._aligned, self._prompts = parts, aligned, prompts

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._aligned:
            require_aligned_saves(args, state.save_steps, self._prompts)
            self._require_aligned_start(args, state)
            if state.global_step > 0:
                restore_order(kwargs.get("train_dataloader"), int(state.epoch or 0))
        saved = state.stateful_callbacks.get(STATE_KEY, {})
        for name, part in self._parts.items():
            if name in saved:
                part.load_state(saved[name])

    def _require_aligned_start(self, args: Any, state: Any) -> None:
        if not is_aligned(args, state.global_step, self._prompts) and state.global_step < state.max_steps:
            before = next(step for step in range(state.global_step, -1, -1) if is_aligned(args, step, self._prompts))
            raise ValueError(
                f"The run is to go on from step {state.global_step} – expected a step after which no generated batch is half "
                f"used: it is not saved. Resume from a checkpoint at step {before} or before, by its path."
            )
        strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
        if not is_aligned(args, state.max_steps, self._prompts) and strategy != "no":
            logger.warning(
                "`max_steps` is %d, inside of a generated batch: the checkpoint that is saved at the end cannot be resumed from.",
                state.max_steps,
            )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        known = state.stateful_callbacks.get(STATE_KEY, {})  # PPO has another such callback
        state.stateful_callbacks[STATE_KEY] = {
            **known, "processes": args.world_size, **{name: part.state() for name, part in self._parts.items()}
        }  # fmt: skip
