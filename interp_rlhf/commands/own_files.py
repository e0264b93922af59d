"""Files that a command may replace: those that it wrote itself.

In: paths. Out: nothing, or a `ValueError` before anything is written. It must not write.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path


def require_own_log(log: Path, arms: Collection[str]) -> None:
    """Raises `ValueError` before a log is replaced that none of these commands wrote."""
    first = _object_in(log, first_line=True)
    if log.exists() and (first is None or first.get("arm") not in arms):
        raise _foreign(log)


def require_own_json(path: Path, keys: Collection[str]) -> None:
    """Raises `ValueError` before a JSON file is replaced that lacks the keys of this command's own."""
    found = _object_in(path)
    if path.exists() and (found is None or not set(keys) <= found.keys()):
        raise _foreign(path)


def _object_in(path: Path, first_line: bool = False) -> dict[str, Any] | None:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text.split("\n", 1)[0] if first_line else text)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _foreign(path: Path) -> ValueError:
    return ValueError(
        f"`{path}` would be replaced, and this command did not write it – expected no such file. Pass another `--out`, or "
        "move it away."
    )
