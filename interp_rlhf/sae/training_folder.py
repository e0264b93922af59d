"""The folder of a training: its allowed content, and the settings that a resumed training must keep.

In: a folder, settings. Out: an error, or nothing. It must not know models or weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runlog.log import read_run_log
from .cache_names import CACHE_HEAD, HELD_OUT, SHARDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .autoencoder import SparseAutoencoder


def check_folder(out: Path, resume: bool, cache: str | Path | None = None) -> None:
    """Refuse a folder that a training may not write into.

    Raises:
        `ValueError`: the folder holds files other than hidden files and the training's own cache; there is no training to
            resume; another trainer wrote the log; or the cache would lie in the folder of the autoencoder.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"`{out}` is a file – expected a folder. Name another one.")
    if cache is not None and Path(cache).resolve().is_relative_to((out / "sae").resolve()):
        raise ValueError(f"`{cache}` is where the autoencoder goes – expected another folder for the cache.")
    log = out / "interp.jsonl"
    there = log.exists() or (out / "sae").exists()
    if resume and not there:
        raise ValueError(f"`{out}` holds no training – expected one to resume. Start it without `resume`.")
    if resume and log.exists() and log.stat().st_size and (trainers := _trainers(log)) - {"train_sae"}:
        raise ValueError(
            f"`{log}` is the log of {sorted(trainers)} – expected that of `train_sae`. Name the folder of the training to resume."
        )
    if resume:
        return
    if there:
        raise ValueError(f"`{out}` holds a training – expected an empty folder. Resume it, or name another folder.")
    if others := [path.name for path in _visible(out) if not _of_cache(path, cache)]:
        listed = ", ".join(f"`{name}`" for name in others[:5]) + (" and more" if len(others) > 5 else "")
        raise ValueError(f"`{out}` holds {listed} – expected an empty folder. Name another one.")


def _trainers(log: Path) -> set[str]:
    """The trainers that wrote a log, by its `run` events; `something else` if it has none."""
    trainers = {str(event.get("trainer")) for event in read_run_log(log) if event["event"] == "run"}
    return trainers or {"something else"}


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.exists() else []


def _of_cache(path: Path, cache: str | Path | None) -> bool:
    """True for the cache folder, a folder above it, and a file in it."""
    if cache is None:
        return False
    folder = Path(cache).resolve()
    if folder == path.parent.resolve():
        return path.name == CACHE_HEAD or path.name.startswith((SHARDS, HELD_OUT))
    return folder.is_relative_to(path.resolve())


def settings_of(sae: SparseAutoencoder, folder: Path) -> dict[str, Any]:
    """Settings of an autoencoder's training, as its file has them."""
    if not sae.spec.training:
        raise ValueError(
            f"`{folder}` does not say how it was trained – expected the end of a training to resume. Name another folder."
        )
    return sae.spec.training


def check_settings(before: dict[str, Any], now: dict[str, Any], besides: Sequence[str] = ()) -> None:
    """Raises `ValueError` if a training to resume had other settings. `checkpoint_every` and `besides` may differ."""
    differing = [
        f"  - `{key}` was {before.get(key)!r} – now {now.get(key)!r}"
        for key in sorted(set(before) | set(now))
        if before.get(key) != now.get(key) and key not in ("checkpoint_every", *besides)
    ]
    if differing:
        listed = "\n".join(differing)
        raise ValueError(
            f"The training to resume had other settings:\n{listed}\nGive the same ones, or start another training."
        )
