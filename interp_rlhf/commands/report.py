"""`interp-rlhf report`: run logs to pages.

In: parsed arguments. Out: files, and their paths on the terminal.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..report.page import write_model_card, write_report

if TYPE_CHECKING:
    import argparse


def report(arguments: argparse.Namespace) -> int:
    """`interp-rlhf report`."""
    for path in write_report(arguments.runs, Path(arguments.out), title=arguments.title):
        if path.suffix != ".svg":
            print(path)
    if arguments.model_card:
        print(write_model_card(arguments.runs, Path(arguments.model_card)))
    return 0
