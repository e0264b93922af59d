"""Where the weights of a sparse autoencoder are: in a folder, in a file, or on the Hub.

In: what a user names. Out: the path of the weights and where they came from. It must not know what is in the files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Names of files with weights, and of the config that lies beside each.
FILES = {
    "sae_weights.safetensors": "cfg.json",
    "sae.safetensors": "cfg.json",
    "params.npz": None,
    "params.safetensors": "config.json",
}


@dataclass(frozen=True)
class Found:
    """Weights that were found.

    Attributes:
        weights (`Path`): the file.
        origin (`str`): its folder's path, or Hub id and subfolder: what is in names there counts.
        source (`dict`): path or Hub id, commit and subfolder, for `SaeSpec.source`.
    """

    weights: Path
    origin: str
    source: dict[str, Any]


def locate(source: str | Path, revision: str | None, subfolder: str | None) -> Found:
    """Weights at a path or, if there is none of that name, on the Hub.

    Raises:
        `FileNotFoundError`: neither a path nor a Hub id.
        `OSError`: the Hub cannot be reached, or has no such repository.
        `ValueError`: no weights there; the error names the folders that have some.
    """
    path = Path(source).absolute()
    if path.is_file():
        if path.suffix != ".npz" and path.name not in FILES:
            raise ValueError(f"`{source}` is no file of a known format – expected {_names()}, or their folder.")
        return Found(path, path.parent.as_posix(), {"path": str(path)})
    if path.is_dir():
        inner = (path / (subfolder or "")).resolve()
        weights = _weights(inner)
        if weights is None:
            root = inner if inner.is_dir() else path
            raise _none_in(str(root), _folders_with_weights(root))
        return Found(weights, inner.as_posix(), {"path": str(inner)})
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith("."):
        raise FileNotFoundError(
            f"`{source}` does not exist – expected a folder, a file with weights or a Hub id `owner/name`."
        )
    return _locate_on_hub(str(source), revision, subfolder)


def _locate_on_hub(name: str, revision: str | None, subfolder: str | None) -> Found:
    from huggingface_hub import snapshot_download

    inside = f"{subfolder.strip('/')}/" if subfolder else ""
    files = [f"{inside}{file}" for file in (*FILES, *FILES.values()) if file]
    try:  # sparsify's own config, which names the model, is at the top
        root = Path(snapshot_download(name, revision=revision, allow_patterns=[*files, "config.json"]))
    except OSError as error:
        at = f" at revision `{revision}`" if revision else ""
        raise OSError(
            f"`{name}`{at} is no folder here, is not in the Hub's cache, and could not be fetched ({type(error).__name__}) – "
            "expected a folder, or a Hub id and a connection. Fetch it where there is one, or pass the folder."
        ) from error
    weights = _weights(root / inside)
    if weights is None:
        raise _none_in(f"{name}/{inside}".rstrip("/"), _folders_on_hub(name, revision, root))
    source = {"hub": name, "revision": root.name, "subfolder": subfolder}
    return Found(weights, f"{name}/{inside}".rstrip("/"), source)


def _weights(folder: Path) -> Path | None:
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def _folders_with_weights(root: Path) -> list[str]:
    found = [path for name in FILES for path in root.rglob(name)]
    return [path.parent.relative_to(root).as_posix() for path in found]


def _folders_on_hub(name: str, revision: str | None, root: Path) -> list[str]:
    from huggingface_hub import list_repo_files

    try:
        files = [Path(file) for file in list_repo_files(name, revision=revision)]
    except Exception:  # only the error message would be better for it; offline, a part may be in the cache
        return _folders_with_weights(root)
    return [file.parent.as_posix() for file in files if file.name in FILES]


def _none_in(where: str, folders: list[str]) -> ValueError:
    if not folders:
        return ValueError(f"`{where}` holds no autoencoder – expected {_names()}.")
    by_number = sorted(folders, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])
    listed = ", ".join(f"`{name}`" for name in by_number[:30])
    more = f" and {len(folders) - 30} more" if len(folders) > 30 else ""
    return ValueError(f"`{where}` holds no autoencoder itself – expected `subfolder` to be one of {listed}{more}.")


def _names() -> str:
    return ", ".join(f"`{name}`" for name in FILES)
