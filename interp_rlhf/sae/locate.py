"""Where the weights of a sparse autoencoder are: in a folder, in a file, or on the Hub.

In: a path or a Hub id. Out: the path of the weights, their format and their source. It must not know the content of the files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .known_formats import format_of, known_formats, weights_names

if TYPE_CHECKING:
    from .formats import SaeFormat


@dataclass(frozen=True)
class SaeLocation:
    """The place of an autoencoder's files.

    Attributes:
        weights (`Path`): the file with the weights.
        form (`SaeFormat`): its format.
        origin (`str`): the folder's path, or Hub id and subfolder. Some formats read names in it.
        source (`dict`): path or Hub id, commit and subfolder, for `SaeSpec.source`.
    """

    weights: Path
    form: SaeFormat
    origin: str
    source: dict[str, Any]


def locate_sae(source: str | Path, revision: str | None, subfolder: str | None) -> SaeLocation:
    """Weights at a path or, if no such path exists, on the Hub.

    Raises:
        `FileNotFoundError`: neither a path nor a Hub id.
        `OSError`: the Hub cannot be reached, or has no such repository.
        `ValueError`: no weights there. The error names the folders that have some.
    """
    path = Path(source).absolute()
    if path.is_file():
        form = format_of(path.name)
        if form is None:
            raise ValueError(
                f"`{source}` is no file of a known format, which its name tells – expected {weights_names()}, or their folder."
            )
        return SaeLocation(path, form, path.parent.as_posix(), {"path": str(path)})
    if path.is_dir():
        inner = (path / (subfolder or "")).resolve()
        form = _form_in(inner)
        if form is None:
            root = inner if inner.is_dir() else path
            raise _none_in(str(root), _folders_with_weights(root))
        return SaeLocation(inner / form.weights, form, inner.as_posix(), {"path": str(inner)})
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith("."):
        raise FileNotFoundError(
            f"`{source}` does not exist – expected a folder, a file with weights or a Hub id `owner/name`."
        )
    return _locate_on_hub(str(source), revision, subfolder)


def _locate_on_hub(name: str, revision: str | None, subfolder: str | None) -> SaeLocation:
    from huggingface_hub import snapshot_download

    inside = f"{subfolder.strip('/')}/" if subfolder else ""
    files = [f"{inside}{file}" for form in known_formats() for file in (form.weights, form.config) if file]
    try:  # sparsify's config at the top of the repository names the model
        root = Path(snapshot_download(name, revision=revision, allow_patterns=[*files, "config.json"]))
    except OSError as error:
        at = f" at revision `{revision}`" if revision else ""
        raise OSError(
            f"`{name}`{at} is no folder here, is not in the Hub's cache, and could not be fetched ({type(error).__name__}) – "
            "expected a folder, or a Hub id and a connection. Fetch it on a machine with a connection, or pass the folder."
        ) from error
    form = _form_in(root / inside)
    if form is None:
        raise _none_in(f"{name}/{inside}".rstrip("/"), _folders_on_hub(name, revision, root))
    source = {"hub": name, "revision": root.name, "subfolder": subfolder}
    return SaeLocation(root / inside / form.weights, form, f"{name}/{inside}".rstrip("/"), source)


def _form_in(folder: Path) -> SaeFormat | None:
    return next((form for form in known_formats() if (folder / form.weights).is_file()), None)


def _folders_with_weights(root: Path) -> list[str]:
    paths = [path for form in known_formats() for path in root.rglob(form.weights)]
    return [path.parent.relative_to(root).as_posix() for path in paths]


def _folders_on_hub(name: str, revision: str | None, root: Path) -> list[str]:
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import HfHubHTTPError

    # Without a connection, the Hub's HTTP library raises its own errors. The Hub's error class derives from them.
    unreachable: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)
    try:
        files = [Path(file) for file in list_repo_files(name, revision=revision)]
    except unreachable:
        return _folders_with_weights(root)  # the cache may hold a part of the repository
    return [file.parent.as_posix() for file in files if format_of(file.name)]


def _none_in(where: str, folders: list[str]) -> ValueError:
    if not folders:
        return ValueError(f"`{where}` holds no autoencoder – expected {weights_names()}.")
    by_number = sorted(folders, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])
    listed = ", ".join(f"`{name}`" for name in by_number[:30])
    more = f" and {len(folders) - 30} more" if len(folders) > 30 else ""
    return ValueError(f"`{where}` holds no autoencoder itself – expected `subfolder` to be one of {listed}{more}.")
