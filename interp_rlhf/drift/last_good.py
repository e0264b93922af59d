"""`last_good`: a checkpoint under a second name that outlives the rotation of checkpoints.

In: folders. Out: the same files again, as hard links where the file system has them. It must not know trainers.
"""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

LAST_GOOD = "last_good"


def step_of_last_good(output_dir: Path) -> int | None:
    """Step of the checkpoint in `last_good`; None if there is none."""
    state = output_dir / LAST_GOOD / "trainer_state.json"
    return int(json.loads(state.read_text())["global_step"]) if state.exists() else None


def link_folder(source: Path, target: Path) -> None:
    """Put a folder's files under another name, replacing what was there. Hard links take no space."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=link_or_copy)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)


def link_or_copy(source: str, target: str) -> None:
    """A hard link, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
