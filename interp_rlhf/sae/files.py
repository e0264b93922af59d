"""Sparse autoencoders from and to files: sae-lens, sparsify and Gemma Scope, without their libraries.

In: a folder, a file or a Hub id. Out: a `SparseAutoencoder` that says where it came from; and back, whole or not at all. Formats
have readers of their own beside this module; everything is float32, nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..activations.hook_points import resolve
from ..concepts.artifact import folder_aside, load_tensors
from .autoencoder import SaeSpec, SparseAutoencoder
from .format_gemma_scope import read_gemma_scope, read_gemma_scope_2
from .format_sae_lens import read_sae_lens, write_sae_lens
from .format_sparsify import read_sparsify
from .formats import RawFile
from .hook_names import Layout, module_path
from .locate import FILES, locate

if TYPE_CHECKING:
    from collections.abc import Callable

    from .formats import Contents

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# Name and reader of a format by the name of the file with the weights.
FORMATS: dict[str, tuple[str, Callable[[RawFile], Contents]]] = {
    WEIGHTS: ("sae-lens", read_sae_lens),
    "sae.safetensors": ("sparsify", read_sparsify),
    "params.npz": ("gemma-scope", read_gemma_scope),
    "params.safetensors": ("gemma-scope-2", read_gemma_scope_2),
}


def load_sae(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    model: Any = None,
    hook_point: str | None = None,
    output_point: str | None = None,
) -> SparseAutoencoder:
    """A sparse autoencoder or transcoder of a file, with float32 weights.

    Args:
        source (`str` or `Path`): a folder, the file with the weights, or a Hub id. Formats: sae-lens 6
            (`sae_weights.safetensors`), sparsify (`sae.safetensors`), Gemma Scope (`params.npz`) and Gemma Scope 2
            (`params.safetensors`), each with its config beside it.
        revision (`str`, *optional*): branch, tag or commit on the Hub; the commit that was read is in `spec.source`.
        subfolder (`str`, *optional*): folder in it, such as sparsify's `layers.3`.
        model (`nn.Module`, *optional*): the causal LM to read: the file's hook name becomes a module of it, and its width is
            compared. Without it, module names are those of Llama, or of GPT-2 and Gemma by the model's name in the file.
        hook_point (`str`, *optional*): module path whose output it reads, in place of what the file says.
        output_point (`str`, *optional*): module path whose output a transcoder predicts, in place of what the file says.

    Raises:
        `FileNotFoundError`: no such folder or file.
        `OSError`: the Hub cannot be reached, or has no such repository.
        `ValueError`: no autoencoder in it, a truncated file, one of sae-lens before version 6, or one that is wrong: the error
            lists all that is.
    """
    found = locate(source, revision, subfolder)
    form, read = FORMATS.get(found.weights.name, FORMATS["params.npz"])
    raw = RawFile(found.weights.parent, found.origin, _config(found.weights, form), _tensors(found.weights))
    contents = read(raw)
    layout = Layout.of_name(contents.model_id) if model is None else Layout.of_model(model)
    reads = hook_point or _point(contents.reads, "hook_point", layout, raw.problems)
    predicts = None
    if contents.transcoder or output_point:
        predicts = output_point or _point(contents.predicts, "output_point", layout, raw.problems)
    for point in filter(None, (reads, predicts)) if model is not None else ():
        _check_point(model, point, raw.problems)
    if raw.problems:
        listed = "\n".join(f"  - {problem}" for problem in raw.problems)
        raise ValueError(f"`{found.weights}` ({form}) has {len(raw.problems)} problem(s):\n{listed}")
    origin = {**found.source, "sha256": _sha256(found.weights), "format": form, "hook_name": contents.reads}
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
    """Write it in the format of sae-lens, `cfg.json` and `sae_weights.safetensors`, which sae-lens and `load_sae` read.

    The folder appears whole or not at all; one that is replaced stays as it was until the new one is written.

    Args:
        sae (`SparseAutoencoder`): all but group-max, a TopK or gated transcoder, and an autoencoder with a skip path.
        folder (`str` or `Path`): a folder of its own.
        metadata (`dict`, *optional*): JSON values kept in `cfg.json` under `metadata`, and in `spec.source` when it is loaded.
        replace (`bool`, defaults to `False`): whether an autoencoder that is there is replaced.

    Returns:
        SHA-256 of the file with the weights.

    Raises:
        `FileExistsError`: there is one and `replace` is false, or there are files of somebody else.
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
        for path, mode in ((new / WEIGHTS, 0o644), (new, 0o755)):  # both were made for this user only
            os.chmod(path, mode)
        _swap(new, folder)
    return digest


def _config(weights: Path, form: str) -> dict[str, Any]:
    name = FILES.get(weights.name)
    if name is None:
        return {}
    path = weights.with_name(name)
    if not path.exists():
        if form == "gemma-scope-2":  # some of its folders have none
            return {}
        raise FileNotFoundError(f"`{path}` does not exist – expected the config of {form} beside `{weights.name}`.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`{path}` is not JSON ({error}) – it may be truncated: copy it again.") from None
    if not isinstance(config, dict):
        raise ValueError(f"`{path}` holds a {type(config).__name__} – expected a JSON object, the config of {form}.")
    return config


def _tensors(path: Path) -> dict[str, torch.Tensor]:
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
    except (ValueError, TypeError) as error:  # pickled objects, or numbers that torch has no type for
        raise ValueError(
            f"`{path}` cannot be read as plain arrays ({error}) – expected floating-point arrays; pickled ones are never loaded. "
            "Save it anew with `numpy.savez`."
        ) from None


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
            f"`{folder}` holds {', '.join(f'`{name}`' for name in others[:5])} – expected a folder of its own."
        )
    if there and not replace:
        raise FileExistsError(
            f"`{folder}` holds an autoencoder – expected no folder yet. Pass `replace=True` to overwrite it."
        )


def _swap(new: Path, folder: Path) -> None:
    """Put the new folder in place of the old, if any; the old one comes back if that fails."""
    if not folder.exists():
        os.replace(new, folder)
        return
    old = new.with_name(f"{new.name}-old")
    os.replace(folder, old)
    try:
        os.replace(new, folder)
    except BaseException:
        os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
