"""Checkpoints of a training of a sparse autoencoder: tensors as safetensors, the rest as JSON.

In and out: tensors by name and a JSON state. A checkpoint exists whole or not at all. The previous checkpoint is
deleted afterwards. A folder is deleted only if it has our name pattern and holds only our two files. It must not know what the
tensors mean.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from typing import TYPE_CHECKING, Any

from ..concepts.artifact import folder_aside, load_tensors

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    import torch

_NAME = re.compile(r"sae-checkpoint-(\d+)")  # trainers write, and delete, `checkpoint-<step>`
_TENSOR_FILE, _STATE_FILE = "tensors.safetensors", "state.json"


def save_checkpoint(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> Path:
    """Write `folder/sae-checkpoint-<step>` and delete the older ones."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    older = _checkpoints(folder)
    path = folder / f"sae-checkpoint-{step}"
    with folder_aside(folder, ".sae-checkpoint-") as made:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, made / _TENSOR_FILE)
        (made / _STATE_FILE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        if path.exists():  # left over after a partial deletion by hand
            _delete(path)
        os.replace(made, path)
    for _, old in older:
        if old != path:
            _delete(old)
    return path


def load_checkpoint(folder: Path, keys: Collection[str] = ()) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Tensors and state of the last checkpoint; None if there is no checkpoint.

    Args:
        keys (`Collection[str]`): keys that the state must have.

    Raises:
        `ValueError`: the last checkpoint is not whole. The message says where the training goes on without it.
    """
    from safetensors import SafetensorError

    whole = [
        path for _, path in _checkpoints(folder) if any((path / name).exists() for name in (_TENSOR_FILE, _STATE_FILE))
    ]
    if not whole:
        return None
    path = whole[-1]
    before = f"from `{whole[-2].name}`" if len(whole) > 1 else "from its start"
    todo = f"It may be truncated. Delete `{path}`: the training then goes on {before}."
    for name in (_STATE_FILE, _TENSOR_FILE):
        if not (path / name).exists():
            raise ValueError(f"`{path}` has no `{name}` – expected a whole checkpoint. {todo}")
    try:
        state = json.loads((path / _STATE_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"`{path / _STATE_FILE}` is not JSON ({error}) – expected the state of a training. {todo}"
        ) from None
    if not isinstance(state, dict) or (missing := sorted(set(keys) - set(state))):
        lacking = f"lacks the keys {missing}" if isinstance(state, dict) else f"holds a {type(state).__name__}"
        raise ValueError(f"`{path / _STATE_FILE}` {lacking} – expected the state of a training. {todo}")
    try:
        return load_tensors(path / _TENSOR_FILE), state
    except SafetensorError as error:
        raise ValueError(
            f"`{path / _TENSOR_FILE}` is not a whole safetensors file ({error}) – expected the tensors of a training. {todo}"
        ) from None


def drop_checkpoints(folder: Path) -> None:
    """Delete all checkpoints, and the unfinished one of a killed run."""
    for path in [*(path for _, path in _checkpoints(folder)), *folder.glob(".sae-checkpoint-*")]:
        _delete(path)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    found = [
        (int(match[1]), path) for path in folder.glob("sae-checkpoint-*") if (match := _NAME.fullmatch(path.name))
    ]
    return sorted(found)


def _delete(path: Path) -> None:
    """Delete a checkpoint, also an incomplete one. A folder that holds any other file stays."""
    if (
        path.is_dir()
        and not path.is_symlink()
        and {inside.name for inside in path.iterdir()} <= {_TENSOR_FILE, _STATE_FILE}
    ):
        shutil.rmtree(path)
