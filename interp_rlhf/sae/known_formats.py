"""All formats of autoencoder files: those of the package, and those that a user registered.

In: the modules `format_*.py` of this folder. Out: the formats, in the order in which a folder is searched for them.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from .formats import SAE_FORMATS

if TYPE_CHECKING:
    from .formats import SaeFormat

for _path in sorted(Path(__file__).parent.glob("format_*.py")):
    import_module(f".{_path.stem}", __package__)


def known_formats() -> list[SaeFormat]:
    """Formats with a required config first: two file names identify a format better than one does."""
    return sorted(SAE_FORMATS.values(), key=lambda entry: not entry.config_required)


def format_of(weights: str) -> SaeFormat | None:
    """The format whose file of weights has this name."""
    return next((entry for entry in known_formats() if entry.weights == weights), None)


def format_titles() -> str:
    """Names of all formats, for help texts."""
    return ", ".join(entry.title for entry in known_formats())


def weights_names() -> str:
    """Names of the files of weights, for errors."""
    return ", ".join(f"`{entry.weights}`" for entry in known_formats())
