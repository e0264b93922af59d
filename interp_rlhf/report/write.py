"""Files that appear all together or not at all.

In: file contents. Out: the files. A full disk never replaces a whole report by half a one. It must not know what is in the
files.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


def write_all(contents: Mapping[Path, str]) -> list[Path]:
    """Write every file next to its destination first, and move all of them there once all are on the disk.

    Args:
        contents (`Mapping[Path, str]`): destination to text, written as UTF-8. The last one is moved last: the page
            that refers to the others belongs there.

    Returns:
        `list[Path]`: the destinations, in the order given.

    Raises:
        `OSError`: one of them cannot be written. The temporary files are removed, earlier files stay as they were.
    """
    made: list[Path] = []
    moved = 0
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in contents}
    try:
        for path, text in contents.items():
            made += _missing_folders(path.parent)
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(temporary[path], text)
        for path in contents:
            os.replace(temporary[path], path)
            moved += 1
    except BaseException as error:
        _remove(temporary.values(), made)
        if isinstance(error, OSError):
            raise OSError(error.errno, _failure(contents, moved, error)) from error
        raise
    return list(contents)


def _failure(contents: Mapping[Path, str], moved: int, error: OSError) -> str:
    size = sum(len(text.encode()) for text in contents.values())
    earlier = f"{moved} of its files were replaced" if moved else "An earlier report there is unchanged"
    return (
        f"Writing the report ({len(contents)} files, {size:,} bytes) to `{list(contents)[-1].parent}` failed: "
        f"{error.strerror or error}. Expected a folder that can be written to and has room for it. {earlier} – "
        "free space (or make the folder writable), or pass --out with another place."
    )


def _missing_folders(folder: Path) -> list[Path]:
    """The folder and its parents as far as they do not exist, the deepest last."""
    return [path for path in (folder, *folder.parents) if not path.exists()][::-1]


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # some file systems report a full disk only here


def _remove(files: Iterable[Path], folders: list[Path]) -> None:
    for path in files:
        with contextlib.suppress(OSError):
            path.unlink()
    for folder in reversed(folders):
        with contextlib.suppress(OSError):  # not empty: it holds files of others
            folder.rmdir()
