"""Sparse autoencoders from and to files, without the libraries that wrote them.

In: a folder, a file or a Hub id. Out: a `SparseAutoencoder` in float32 that names its origin. For writing: an autoencoder goes
in, a folder comes out, whole or not at all. Nothing is unpickled. It must not know what a format's config and tensors mean:
each format has a reader in its `format_<name>.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..activations.hook_points import resolve
from ..concepts.artifact import folder_aside, load_tensors
from .autoencoder import SaeSpec, SparseAutoencoder
from .format_sae_lens import CONFIG, WEIGHTS, write_sae_lens
from .hook_names import Layout, module_path
from .locate import locate_sae
from .raw_file import RawFile

if TYPE_CHECKING:
    from .formats import SaeFormat
    from .locate import SaeLocation
    from .raw_file import Contents


def load_sae(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    model: Any = None,
    hook_point: str | None = None,
    output_point: str | None = None,
) -> SparseAutoencoder:
    """A sparse autoencoder or transcoder from a file, with float32 weights.

    Args:
        source (`str` or `Path`): a folder, the file with the weights, or a Hub id. The file name of the weights tells the format:
            sae-lens 6 (`sae_weights.safetensors`), sparsify (`sae.safetensors`), Gemma Scope (`params.npz`), Gemma Scope 2
            (`params.safetensors`), and formats that `register_sae_format` added. The config is expected in the same folder.
        revision (`str`, *optional*): branch, tag or commit on the Hub. `spec.source` names the commit that was read.
        subfolder (`str`, *optional*): folder in it, such as sparsify's `layers.3`.
        model (`nn.Module`, *optional*): the causal LM whose activations are encoded. The file's hook name becomes a module path
            of this model, and the widths are compared. Without a model, module paths are those of Llama, or of GPT-2 or Gemma if
            the model's name in the file says so.
        hook_point (`str`, *optional*): module path whose output is encoded, instead of the one in the file.
        output_point (`str`, *optional*): module path whose output a transcoder predicts, instead of the one in the file.

    Returns:
        `SparseAutoencoder`: its `spec.source` names its origin.

    Raises:
        `FileNotFoundError`: no such folder or file.
        `OSError`: the Hub cannot be reached, or has no such repository.
        `ValueError`: no autoencoder there, a truncated file, a file of sae-lens before version 6, or a file with problems. The
            error lists all problems.
    """
    place = locate_sae(source, revision, subfolder)
    raw = RawFile(place.weights.parent, place.origin, _config(place), _weights_in(place.weights))
    contents = place.form.read(raw)
    reads, predicts = _points(contents, raw.problems, model, hook_point, output_point)
    if raw.problems:
        listed = "\n".join(f"  - {problem}" for problem in raw.problems)
        raise ValueError(f"`{place.weights}` ({place.form.title}) has {len(raw.problems)} problem(s):\n{listed}")
    origin = {
        **place.source, "sha256": _sha256(place.weights), "format": place.form.title, "hook_name": contents.reads,
    }  # fmt: skip
    spec = SaeSpec(
        contents.architecture, str(reads), k=contents.k, normalization=contents.normalization, restore=predicts is None,
        output_point=predicts, model_id=contents.model_id, source=origin | {"metadata": contents.metadata},
    )  # fmt: skip
    sae = SparseAutoencoder(spec, **contents.tensors)
    if model is not None:
        sae.check_model(model)
    return sae


def save_sae(
    sae: SparseAutoencoder, folder: str | Path, *, metadata: dict[str, Any] | None = None, replace: bool = False
) -> str:
    """Write an autoencoder in the format of sae-lens, which sae-lens and `load_sae` read.

    The folder with `cfg.json` and `sae_weights.safetensors` appears whole or not at all. An older one stays until the new one is
    written.

    Args:
        sae (`SparseAutoencoder`): any except group-max, a TopK or gated transcoder, and an autoencoder with a skip path.
        folder (`str` or `Path`): a separate folder.
        metadata (`dict`, *optional*): JSON values. `cfg.json` keeps them under `metadata`; after loading they are in
            `spec.source`.
        replace (`bool`, defaults to `False`): True if an autoencoder in that folder may be replaced.

    Returns:
        `str`: SHA-256 of the file with the weights.

    Raises:
        `FileExistsError`: the folder holds an autoencoder and `replace` is false, or it holds other files.
        `ValueError`: the format has no such autoencoder.
    """
    from safetensors.torch import save_file

    folder = Path(folder).resolve()
    config, tensors = write_sae_lens(sae, metadata or {})
    _check_free(folder, replace)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder_aside(folder.parent, f".{folder.name}-") as new:
        save_file(tensors, new / WEIGHTS)
        (new / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        digest = _sha256(new / WEIGHTS)
        for path, mode in (
            (new / WEIGHTS, 0o644),
            (new, 0o755),
        ):  # the temporary folder is readable for this user only
            os.chmod(path, mode)
        _swap(new, folder)
    return digest


def _config(place: SaeLocation) -> dict[str, Any]:
    form: SaeFormat = place.form
    if form.config is None:
        return {}
    path = place.weights.with_name(form.config)
    if not path.exists():
        if not form.config_required:
            return {}
        raise FileNotFoundError(
            f"`{path}` does not exist – expected the config of {form.title} next to `{place.weights.name}`."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`{path}` is not JSON ({error}) – it may be truncated: copy it again.") from None
    if not isinstance(config, dict):
        raise ValueError(
            f"`{path}` holds a {type(config).__name__} – expected a JSON object, the config of {form.title}."
        )
    return config


def _weights_in(path: Path) -> dict[str, torch.Tensor]:
    import numpy
    from safetensors import SafetensorError

    try:
        if path.suffix != ".npz":
            return load_tensors(path)
        with numpy.load(path, allow_pickle=False) as arrays:
            return {name: torch.tensor(arrays[name]) for name in arrays.files}
    except (SafetensorError, zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"`{path}` ({path.stat().st_size} bytes) is not a whole {path.suffix[1:]} file ({error}). It may be truncated: copy "
            "or fetch it again."
        ) from None
    except (ValueError, TypeError) as error:  # pickled objects, or numbers for which torch has no type
        raise ValueError(
            f"`{path}` cannot be read as plain arrays ({error}) – expected floating-point arrays; pickled ones are never loaded. "
            "Save it again with `numpy.savez`."
        ) from None


def _points(
    contents: Contents, problems: list[str], model: Any, hook_point: str | None, output_point: str | None
) -> tuple[str | None, str | None]:
    """Hook points of the activations that are encoded and, by a transcoder, predicted. An argument overrides the file."""
    layout = Layout.of_name(contents.model_id) if model is None else Layout.of_model(model)
    reads = hook_point or _point(contents.reads, "hook_point", layout, problems)
    predicts = None
    if contents.transcoder or output_point:
        predicts = output_point or _point(contents.predicts, "output_point", layout, problems)
    for point in filter(None, (reads, predicts)) if model is not None else ():
        _check_point(model, point, problems)
    return reads, predicts


def _point(name: Any, argument: str, layout: Layout, problems: list[str]) -> str | None:
    if not isinstance(name, str) or not name:
        problems.append(f"the file does not say its hook point – expected `{argument}` to be passed")
        return None
    try:
        return module_path(name, layout)
    except ValueError as error:
        problems.append(str(error).replace("pass `hook_point`", f"pass `{argument}`"))
        return None


def _check_point(model: Any, point: str, problems: list[str]) -> None:
    try:
        resolve(model, point)
    except ValueError as error:
        problems.append(str(error))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_free(folder: Path, replace: bool) -> None:
    if not folder.exists():
        return
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [folder.name]
    if others := [name for name in there if name not in (CONFIG, WEIGHTS)]:
        raise FileExistsError(
            f"`{folder}` holds {', '.join(f'`{name}`' for name in others[:5])} – expected a separate folder."
        )
    if there and not replace:
        raise FileExistsError(
            f"`{folder}` holds an autoencoder – expected no folder yet. Pass `replace=True` to overwrite it."
        )


def _swap(new: Path, folder: Path) -> None:
    """Put the new folder in place of the old one. If that fails, the old one comes back."""
    if not folder.exists():
        os.replace(new, folder)
        return
    old = new.with_name(f"{new.name}-old")
    os.replace(folder, old)
    with ExitStack() as undo:
        undo.callback(os.replace, old, folder)
        os.replace(new, folder)
        undo.pop_all()
    shutil.rmtree(old, ignore_errors=True)
