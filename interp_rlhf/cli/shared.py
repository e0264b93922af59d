"""Help texts and options that several parsers share.

In: a parser. Out: the parser with these options. It must not know what a command does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

DATA_HELP = (
    "JSONL, CSV or Parquet file, or a `datasets` path, with `label` and one of `text`, `messages`, "
    "or `prompt` and `completion`"
)
PAIRS_HELP = (
    "JSONL, CSV or Parquet file with prompts `clean` and `corrupt` (texts or messages) "
    "and answers `followed` and `violated`"
)
TEXTS_HELP = "JSONL or CSV file of texts, or a text file with one per line"
POSITIVE_HELP = "which of two text labels means that the concept is present"
MODEL_HELP = "folder or Hub id of the causal LM (default: the embedded SmolLM2-135M-Instruct)"


def add_modules(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--module", action="append", default=[], metavar="NAME", dest="modules",
        help="Python module to import first, which registers poolings, measures, formats or metrics; may be repeated",
    )  # fmt: skip


def add_sae_place(command: argparse.ArgumentParser) -> None:
    command.add_argument("--subfolder", help="folder in the autoencoder's folder or repository")
    command.add_argument("--revision", help="branch, tag or commit on the Hub")
