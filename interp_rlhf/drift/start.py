"""The start of a run: what later evaluations are compared with, in a file that travels with checkpoints.

In: an observation, and a digest of everything that it depends on. Out: a safetensors file, and the observation from it. It must
not know trainers or logs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..concepts.artifact import load_tensors, write_atomically
from .observed import LabelledScores, Sampled, Snapshot

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

START_FILE = "interp_drift_start.safetensors"


@dataclass(frozen=True)
class Observation:
    """One model as an evaluation sees it.

    Attributes:
        snapshot (`Snapshot`): on the fixed texts.
        readings (`dict[str, LabelledScores]`): monitor to its scores on the labelled examples; empty without them.
        sampled (`Sampled`, *optional*): the model's own text; None without prompts.
    """

    snapshot: Snapshot
    readings: dict[str, LabelledScores]
    sampled: Sampled | None


def start_file(run_log: Path) -> Path:
    """The file of a run's start. It is named after the run log, because several runs may log into one folder."""
    return run_log.with_name(f"{run_log.stem}_{START_FILE.removeprefix('interp_')}")


def save_start(start: Observation, path: Path, fingerprint: str, note: str) -> None:
    """Write a start.

    Args:
        fingerprint (`str`): of the battery.
        note (`str`): digest of everything else that the start depends on.
    """
    from safetensors.torch import save

    snapshot = start.snapshot
    tensors = {f"activations/{point}": values for point, values in snapshot.activations.items()}
    tensors |= {"log_probs": snapshot.log_probs, "predictions": snapshot.predictions}
    for name, reading in start.readings.items():
        tensors |= {f"extra/labelled/{key}": values for key, values in reading.tensors(name).items()}
    if start.sampled is not None:
        tensors |= {f"extra/{key}": values for key, values in start.sampled.tensors().items()}
    copies = {key: values.clone(memory_format=torch.contiguous_format) for key, values in tensors.items()}
    write_atomically(path, save(copies, metadata={"fingerprint": fingerprint, "note": note}))


def load_start(path: Path, fingerprint: str, note: str, labelled: Sequence[str], own_text: bool) -> Observation | None:
    """A saved start; None if there is no file, or if its fingerprint or note differ.

    Args:
        labelled (`Sequence[str]`): names of the monitors that are read on labelled examples.
        own_text (`bool`): whether the model's own text belongs to it.
    """
    from safetensors import safe_open

    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        if file.metadata() != {"fingerprint": fingerprint, "note": note}:
            return None
    tensors = load_tensors(path)
    activations = _part(tensors, "activations/")
    readings = {name: LabelledScores.from_tensors(name, _part(tensors, "extra/labelled/")) for name in labelled}
    sampled = Sampled.from_tensors(_part(tensors, "extra/")) if own_text else None
    return Observation(Snapshot(activations, tensors["log_probs"], tensors["predictions"]), readings, sampled)


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): values for key, values in tensors.items() if key.startswith(prefix)}
