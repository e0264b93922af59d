"""The files that `sae inspect` and `sae find` write: a log of one event, and its page.

In: where the page goes, and an event. Out: paths. It must not know how latents were found.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..report import write_report
from ..report.page import require_own_pages
from ..runlog.log import RunLog

if TYPE_CHECKING:
    import argparse

_COMMANDS = ("sae inspect", "sae find")


def page_path(path: str) -> Path:
    """Where a page goes. It is checked before the work starts.

    Raises:
        `ValueError`: the path is no HTML file, or writing would replace a file that these commands did not write.
    """
    out = Path(path)
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise ValueError(f"`--out` is `{path}` – expected an HTML file, such as `{out.with_suffix('.html')}`.")
    _require_our_log(out.with_name(f"{out.stem}.events.jsonl"))
    require_own_pages(out)
    return out


def write_latent_files(
    arguments: argparse.Namespace, model_id: str, name: str, event: dict[str, Any], started: float, out: Path
) -> list[str]:
    """Write the log and the page; returns their paths, the page last."""
    log = RunLog(out.with_name(f"{out.stem}.events.jsonl"))
    _require_our_log(log.path)
    log.path.unlink(missing_ok=True)
    settings = {
        key: value
        for key, value in vars(arguments).items()
        if key not in ("run", "json", "out") and value is not None and value != [] and value is not False
    }
    command = arguments.run[1].replace("_", " ")
    log.append("run", title=f"Latents of {arguments.sae}", arm=command, model=model_id, settings=settings)
    log.append(name, **event)
    log.append("end", seconds=round(time.monotonic() - started, 3))
    return [str(log.path), *map(str, write_report(log.path, out))]


def _require_our_log(log: Path) -> None:
    """Raises `ValueError` where a log would be replaced that these commands did not write."""
    if not log.exists():
        return
    try:
        first = json.loads(log.read_text(encoding="utf-8").split("\n", 1)[0])
    except ValueError:
        first = None
    if not isinstance(first, dict) or first.get("arm") not in _COMMANDS:
        raise ValueError(
            f"`{log}` would be replaced, and this command did not write it – expected no such file. Pass another `--out`, or "
            "move it away."
        )
