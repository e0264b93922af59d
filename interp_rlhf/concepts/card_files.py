"""The files that belong to a card: the card itself, its artifact, its holdout cards and their artifacts.

In: a card, a folder. Out: the content of the files, and files placed in a folder. A file that exists is overwritten only
on request. It must not know the Hub.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from .artifact import folder_aside, write_atomically
from .card import load_card
from .claims import artifact_of

if TYPE_CHECKING:
    from .card import LoadedCard


def files_of(loaded: LoadedCard) -> dict[str, bytes]:
    """Content of all files of a card, by their names. The card comes last: a folder with the card has the others too.

    Raises:
        `FileNotFoundError`: an artifact or a holdout card is missing.
        `ValueError`: one of the files lies elsewhere, or a card does not describe its artifact.
    """
    files: dict[str, bytes] = {}
    _collect_files(loaded, files, set())
    return files


def _collect_files(loaded: LoadedCard, files: dict[str, bytes], seen: set[str]) -> None:
    seen.add(loaded.path.name)
    for name in (loaded.card.readout.artifact.path, *loaded.card.holdouts):
        require_plain(name, loaded.path)
    artifact_of(loaded)
    files[loaded.card.readout.artifact.path] = loaded.artifact_path.read_bytes()
    for holdout in loaded.card.holdouts:
        if holdout not in seen:
            _collect_files(load_card(_existing(loaded.path.parent / holdout, loaded.path)), files, seen)
    files[loaded.path.name] = loaded.path.read_bytes()


def require_plain(name: str, where: object) -> None:
    """Raises `ValueError` for a name that leads out of the card's folder, or into another one."""
    if name != PurePosixPath(name).name or "\\" in name or name in ("", ".", ".."):
        raise ValueError(
            f"`{where}` names the file `{name}` – expected a file in the card's own folder, so that they can be shared "
            "together. Put it there, and publish the card again."
        )


def _existing(path: Path, card: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"`{path}` does not exist – expected the holdout card that `{card}` names. Put it there, or take it out of "
            "`holdouts`."
        )
    return path


def digests_of(files: dict[str, bytes]) -> dict[str, str]:
    """SHA-256 of each file, sorted by name."""
    return {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)}


def require_placeable(files: dict[str, bytes], folder: Path) -> None:
    """Raises `ValueError` if the folder is a file, or holds other files under these names."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`{folder}` is a file – expected a folder.")
    others = [name for name, data in files.items() if (folder / name).exists() and not _holds(folder / name, data)]
    if others:
        raise ValueError(
            f"`{folder}` holds other files under the names {', '.join(f'`{name}`' for name in sorted(others))} – expected none, "
            "or the same content. Choose another folder, or move them away."
        )


def place(files: dict[str, bytes], folder: str | Path) -> list[str]:
    """Write files into a folder, all of them or none, in their order. What is there with the same content stays.

    A new folder appears at once. In a folder that exists, each file appears at once, and if one fails the new ones are taken away
    again. Files that exist are replaced: call `require_placeable` first. Returns the names of the files that were written.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        with folder_aside(folder.parent, f".{folder.name}-") as aside:
            for name, data in files.items():
                write_atomically(aside / name, data)
            os.chmod(aside, 0o755)
            os.rename(aside, folder)
        return list(files)
    written = [name for name, data in files.items() if not _holds(folder / name, data)]
    new = [name for name in written if not (folder / name).exists()]
    try:
        for name in written:
            write_atomically(folder / name, files[name])
    except BaseException:  # also an interruption by the user
        for name in new:
            (folder / name).unlink(missing_ok=True)
        raise
    return written


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data
