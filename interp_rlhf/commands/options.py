"""Arguments that several commands share.

In: parsed arguments. Out: their values, or a `ValueError`. It must not print, and it must not load a model.
"""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping


def typed_command() -> str:
    """The command as it was typed, for evidence and findings."""
    return "interp-rlhf " + shlex.join(sys.argv[1:])


def latent_numbers(text: str | None) -> list[int] | None:
    """Latents of the argument `--latents 12,80`; None if it is not given.

    Raises:
        `ValueError`: the text is not a list of numbers.
    """
    try:
        return None if text is None else [int(index) for index in text.split(",")]
    except ValueError:
        raise ValueError(f"`--latents {text}` – expected numbers such as 12,80.") from None


def autoencoder_place(arguments: argparse.Namespace) -> dict[str, str | None]:
    """Keywords of `load_sae` for the location and the hook point of an autoencoder."""
    return {name: getattr(arguments, name) for name in ("revision", "subfolder", "hook_point")}


def registered(entries: Mapping[str, Any], option: str, name: str) -> Any:
    """The entry of a registry that an option names.

    Raises:
        `ValueError`: nothing is registered under this name.
    """
    if name not in entries:
        raise ValueError(
            f"`{option} {name}` – expected one of {', '.join(f'`{known}`' for known in sorted(entries))}. If a module of yours "
            "registers it, pass `--module`."
        )
    return entries[name]
