"""Content of a file of a sparse autoencoder: as it was read, and in our terms.

In: a config and tensors by the file's names. Out: `Contents`, the same in our terms. A reader raises nothing while it looks
through a file. It notes each problem, so that one error lists them all. It must not know any format.

The command line reads the names of formats, whose modules import this one. So it does without torch at run time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import torch

    from ..concepts.latents import Normalization
    from .autoencoder import Architecture

Shape = tuple[int | None, ...]


@dataclass
class Contents:
    """Content of a file, in the terms of `SaeSpec` and `SparseAutoencoder`.

    Attributes:
        architecture, k, normalization, model_id: as in `SaeSpec`.
        tensors (`dict[str, torch.FloatTensor]`): as `SparseAutoencoder` takes them; empty if there are problems.
        reads (`str`, *optional*): the file's name for the activation that is encoded; None if the file does not say.
        predicts (`str`, *optional*): the file's name for the activation that a transcoder predicts.
        transcoder (`bool`): True if the output is another activation than the input.
        metadata (`dict`): everything else that the file says of its origin.
    """

    architecture: Architecture
    tensors: dict[str, torch.Tensor]
    reads: str | None
    k: int | None = None
    normalization: Normalization = "none"
    predicts: str | None = None
    transcoder: bool = False
    model_id: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class RawFile:
    """A file as it was read, and its problems.

    Attributes:
        folder (`Path`): the folder with the weights.
        origin (`str`): path, or Hub id and subfolder. Some formats say in these names what their files do not.
        config (`dict`): the JSON next to the weights; empty if there is none.
        tensors (`dict[str, torch.Tensor]`): the weights.
        problems (`list[str]`): the problems found so far.
    """

    folder: Path
    origin: str
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    problems: list[str] = field(default_factory=list)

    def number(self, name: str, default: int | None = None) -> int | None:
        """A positive integer of the config. Any other value is a problem and gives None."""
        value = self.config.get(name, default)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        self.problems.append(f"`{name}` is {value!r} – expected a positive integer")
        return None

    def flag(self, name: str, default: bool) -> bool:
        """True or false of the config. Any other value is a problem."""
        value = self.config.get(name, default)
        if not isinstance(value, bool):
            self.problems.append(f"`{name}` is {value!r} – expected true or false")
        return bool(value)

    def choice(self, name: str, allowed: Sequence[str], default: str | None = None) -> str:
        """One of the allowed words of the config. Any other value is a problem."""
        value = self.config.get(name, default)
        if value not in allowed:
            self.problems.append(f"`{name}` is `{value}` – expected one of {_listed(allowed)}")
        return str(value)

    def take(self, shapes: Mapping[str, Shape]) -> dict[str, torch.Tensor]:
        """All tensors as float32. They should have exactly these names and shapes; None fits any size."""
        self.problems += [f"no tensor `{name}`" for name in sorted(set(shapes) - set(self.tensors))]
        unknown = sorted(set(self.tensors) - set(shapes))
        self.problems += [f"tensor `{name}` is unknown – expected only {_listed(shapes)}" for name in unknown]
        for name in sorted(set(shapes) & set(self.tensors)):
            self._check(name, self.tensors[name], shapes[name])
        return {name: tensor.float() for name, tensor in self.tensors.items()}

    def _check(self, name: str, tensor: torch.Tensor, shape: Shape) -> None:
        actual = tuple(tensor.shape)
        fits = len(actual) == len(shape) and all(
            want in (None, have) for want, have in zip(shape, actual, strict=True)
        )
        if not fits:
            self.problems.append(f"`{name}` has shape {actual} – expected {str(shape).replace('None', 'any')}")
        if not tensor.is_floating_point():
            self.problems.append(f"`{name}` holds {tensor.dtype} – expected floating-point numbers")
        elif not tensor.isfinite().all():
            self.problems.append(f"`{name}` is not finite")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))
