"""Options of the causal check, which several commands have.

In: a parser. Out: the parser with these options. It must not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..validation.causal_settings import RANDOM, CausalSettings
from ..validation.measures import MEASURES

if TYPE_CHECKING:
    import argparse


def add_causal(command: argparse.ArgumentParser) -> None:
    """Add the group of options that say how a causal check is made."""
    group = command.add_argument_group("the causal check")
    group.add_argument(
        "--prompts", metavar="FILE", help="JSONL, CSV or Parquet file with a column `prompt`, at least 10 rows"
    )
    group.add_argument(
        "--causal-measure", metavar="NAME",
        help=f"independent measure of an answer's text: {', '.join(MEASURES)}, one that a `--module` registers, or regex:PATTERN",
    )  # fmt: skip
    group.add_argument(
        "--causal-pairs", metavar="FILE",
        help="in place of both, if no measure exists: rows with `prompt`, `followed` and `violated`; measured by their log-probs",
    )  # fmt: skip
    group.add_argument(
        "--foreign", action="append", default=[], metavar="CARD",
        help="card of a foreign concept at the same hook point, as a control; may be repeated (default: built-in contrasts)",
    )  # fmt: skip
    shown = ",".join(f"{dose:g}" for dose in CausalSettings.doses)
    group.add_argument(
        "--doses",
        metavar="LIST",
        help=f"doses in standard deviations of the activation, as --doses=LIST (default: {shown})",
    )
    group.add_argument(
        "--random", type=int, default=RANDOM, metavar="N", help="number of random directions (default: %(default)s)"
    )
    group.add_argument(
        "--occurs", type=float, metavar="VALUE",
        help="the concept occurs above this value of the measure (default: the middle of all measured values)",
    )  # fmt: skip
    group.add_argument(
        "--max-new-tokens", type=int, default=CausalSettings.max_new_tokens, metavar="N",
        help="length of an answer (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--require-causal", action="store_true",
        help="exit code 1 unless the verdict is `causal`; a frozen reading is a valid reward without it",
    )  # fmt: skip
