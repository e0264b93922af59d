"""The registry of formats: the files that `load_sae` can read.

In: the names of a format's files and a function that reads them. Out: the format by its name. It must not know any format: each
one is a file `format_<name>.py` that registers itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from .raw_file import Contents, RawFile

    Reader = Callable[[RawFile], Contents]

# Files of weights with other suffixes could only be unpickled, which runs code.
SUFFIXES = (".npz", ".safetensors")


@dataclass(frozen=True)
class SaeFormat:
    """A format of autoencoder files.

    Attributes:
        title (`str`): its name for people, as errors, `--help` and `spec.source` have it.
        weights (`str`): name of the file with the weights. It tells the format: no two formats share it.
        config (`str`, *optional*): name of the JSON file next to the weights.
        config_required (`bool`): whether a folder without that JSON file is an error.
        read (`Callable[[RawFile], Contents]`): translates the file into our terms, and notes problems in `raw.problems`.
        defined_in (`str`): file and name of `read`.
    """

    title: str
    weights: str
    config: str | None
    config_required: bool
    read: Reader = field(compare=False, repr=False)
    defined_in: str


SAE_FORMATS: Registry[SaeFormat] = Registry("a format of autoencoder files")


def register_sae_format(
    name: str, *, weights: str, config: str | None = None, config_required: bool = True, title: str | None = None
) -> Callable[[Reader], Reader]:
    """Decorator that registers a format of autoencoder files, for `load_sae` and every command that takes an autoencoder.

    The decorated function takes a `RawFile` (config and tensors by the file's names) and returns `Contents` (the same in our
    terms). It notes problems in `raw.problems` and raises nothing, so that `load_sae` lists all of them in one error.

    Args:
        name (`str`): a lower-case identifier.
        weights (`str`): name of the file with the weights, in `.safetensors` or `.npz`. It tells the format.
        config (`str`, *optional*): name of the JSON file next to the weights; none by default.
        config_required (`bool`, defaults to `True`): whether a folder without that JSON file is an error.
        title (`str`, *optional*): name for people, `name` by default.

    Returns:
        `Callable`: the decorator. It returns the decorated function unchanged.

    Raises:
        `ValueError`: another format has this name or the name of its weights, or the weights have another suffix.

    Example:
        >>> import torch
        >>> from safetensors.torch import save_file
        >>> from interp_rlhf import register_sae_format
        >>> from interp_rlhf.sae.files import load_sae
        >>> from interp_rlhf.sae.raw_file import Contents
        >>> @register_sae_format("tied", weights="tied.safetensors")
        ... def read_tied(raw):
        ...     tensors = raw.take({"rows": (None, None), "bias": (None,)})
        ...     rows, bias = tensors["rows"], tensors["bias"]
        ...     ours = {"encoder": rows, "encoder_bias": bias, "decoder": rows, "decoder_bias": torch.zeros(rows.shape[1])}
        ...     return Contents("standard", ours, reads="model.layers.1")
        >>> save_file({"rows": torch.eye(2), "bias": torch.ones(2)}, "tied.safetensors")
        >>> load_sae("tied.safetensors").encode(torch.tensor([2.0, -3.0])).tolist()
        [3.0, 0.0]
    """
    if not weights.endswith(SUFFIXES):
        raise ValueError(
            f"`weights` of the format `{name}` is {weights!r} – expected a file name that ends in one of "
            f"{', '.join(f'`{suffix}`' for suffix in SUFFIXES)}. Other files are never read."
        )

    def enter(read: Reader) -> Reader:
        for other, known in SAE_FORMATS.items():
            if known.weights == weights and other != name:
                raise ValueError(
                    f"`weights` of the format `{name}` is `{weights}`, which is the file name of the format `{other}` – expected "
                    "a file name that no other format has."
                )
        code = getattr(read, "__code__", None)
        defined_in = f"{getattr(code, 'co_filename', read.__module__)}:{read.__qualname__}"
        entry = SaeFormat(title or name, weights, config, config is not None and config_required, read, defined_in)
        SAE_FORMATS.register(name)(entry)
        return read

    return enter
