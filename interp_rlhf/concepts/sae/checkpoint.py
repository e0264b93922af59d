"""Checkpoints of a training of a sparse autoencoder: tensors as safetensors, the rest as JSON.

In and out: tensors by name and a JSON state. A checkpoint is there whole or not at all, and the one before it goes only when it
is. It must not know what is in it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from ..artifact import folder_aside

_NAME = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> Path:
    """Write `folder/checkpoint-<step>` and delete the older ones."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    older = _checkpoints(folder)
    with folder_aside(folder, ".checkpoint-") as made:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, made / "tensors.safetensors")
        (made / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        path = folder / f"checkpoint-{step}"
        os.replace(made, path)
    for _, old in older:
        if old != path:
            shutil.rmtree(old)
    return path


def load_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Tensors and state of the last checkpoint, None where there is none."""
    from safetensors.torch import load_file

    found = _checkpoints(folder)
    if not found:
        return None
    _, path = found[-1]
    state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return load_file(path / "tensors.safetensors"), state


def drop_checkpoints(folder: Path) -> None:
    """Delete all of them, and what a kill left of one."""
    for path in [*(path for _, path in _checkpoints(folder)), *folder.glob(".checkpoint-*")]:
        shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return sorted(found)
