"""What all formats of SAE files share: named fields and tensors, held against what they should be.

In: a file as it was read. Out: `Contents`, the same in our terms. Nothing is raised while a file is looked through: whatever is
wrong with it is noted, so that one error names all of it. Each format has a reader of its own beside this module.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from ..concepts.latents import Normalization
    from .autoencoder import Architecture

Shape = tuple[int | None, ...]


@dataclass
class Contents:
    """What a file says, in the terms of `SaeSpec` and `SparseAutoencoder`.

    Attributes:
        architecture, k, normalization, model_id: as in `SaeSpec`.
        tensors (`dict[str, torch.FloatTensor]`): as `SparseAutoencoder` takes them; empty if there are problems.
        reads (`str`, *optional*): the file's name for where it reads; None if it does not say.
        predicts (`str`, *optional*): a transcoder's name for what it predicts.
        transcoder (`bool`): whether its output is another activation than its input.
        metadata (`dict`): whatever else the file says of its origin.
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
    """A file as it was read, and what is wrong with it.

    Attributes:
        folder (`Path`): where the weights are.
        origin (`str`): path or Hub id and subfolder: names in it say what some formats' files do not.
        config (`dict`): the JSON beside the weights; empty if there is none.
        tensors (`dict[str, torch.Tensor]`): the weights.
        problems (`list[str]`): what was found to be wrong so far.
    """

    folder: Path
    origin: str
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    problems: list[str] = field(default_factory=list)

    def number(self, name: str, default: int | None = None) -> int | None:
        """A positive integer of the config; None, and noted, if it is none."""
        value = self.config.get(name, default)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        self.problems.append(f"`{name}` is {value!r} – expected a positive integer")
        return None

    def flag(self, name: str, default: bool) -> bool:
        value = self.config.get(name, default)
        if not isinstance(value, bool):
            self.problems.append(f"`{name}` is {value!r} – expected true or false")
        return bool(value)

    def choice(self, name: str, allowed: Sequence[str], default: str | None = None) -> str:
        value = self.config.get(name, default)
        if value not in allowed:
            self.problems.append(f"`{name}` is `{value}` – expected one of {_listed(allowed)}")
        return str(value)

    def take(self, shapes: Mapping[str, Shape]) -> dict[str, torch.Tensor]:
        """All tensors as float32, which should have exactly these names and shapes; a dimension of None is not compared."""
        self.problems += [f"no tensor `{name}`" for name in sorted(set(shapes) - set(self.tensors))]
        unknown = sorted(set(self.tensors) - set(shapes))
        self.problems += [f"tensor `{name}` is unknown – expected only {_listed(shapes)}" for name in unknown]
        for name in sorted(set(shapes) & set(self.tensors)):
            self._check(name, self.tensors[name], shapes[name])
        return {name: tensor.float() for name, tensor in self.tensors.items()}

    def _check(self, name: str, tensor: torch.Tensor, shape: Shape) -> None:
        found = tuple(tensor.shape)
        if len(found) != len(shape) or any(want not in (None, have) for want, have in zip(shape, found, strict=True)):
            self.problems.append(f"`{name}` has shape {found} – expected {str(shape).replace('None', 'any')}")
        if not tensor.is_floating_point():
            self.problems.append(f"`{name}` holds {tensor.dtype} – expected floating-point numbers")
        elif not torch.isfinite(tensor).all():
            self.problems.append(f"`{name}` is not finite")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))
