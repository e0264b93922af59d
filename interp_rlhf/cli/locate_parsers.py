"""Parser of `interp-rlhf locate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .shared import MODEL_HELP, PAIRS_HELP

if TYPE_CHECKING:
    import argparse


def add_locate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the parser of `locate`."""
    locate = commands.add_parser(
        "locate",
        help="where in a model a contrast acts: attribution and exact patching",
        description="Puts activations of the clean prompt into the run of the corrupt prompt and measures how much of the "
        "followed answer comes back. All blocks, components and positions are estimated from one gradient per pair; the "
        "strongest and some random ones are patched exactly, with rank correlation and recall next to them. One half of the "
        "pairs chooses the sites, the other half is reported. Writes locate.json, report.html with heat maps, and a run log.",
        epilog="example: interp-rlhf locate --pairs pairs.jsonl --heads --out runs/locate",
    )
    locate.add_argument("--pairs", required=True, help=PAIRS_HELP)
    locate.add_argument("--model", help=MODEL_HELP + ", or of an adapter")
    locate.add_argument(
        "--components", default="residual,attention,mlp", metavar="NAMES",
        help="some of residual, attention, mlp, heads (default: %(default)s)",
    )  # fmt: skip
    locate.add_argument("--heads", action="store_true", help="also each attention head")
    locate.add_argument(
        "--steps", type=int, default=1,
        help="gradients per pair; more are taken along the way between both activations, at each place, and cost that much more "
        "(default: 1)",
    )  # fmt: skip
    locate.add_argument(
        "--top", type=int, default=10, help="strongest sites of each group to patch exactly (default: 10)"
    )
    locate.add_argument(
        "--random",
        default="20",
        metavar="N",
        help="random sites of each group to patch as well; all patches every site (default: 20)",
    )
    locate.add_argument("--per-position", action="store_true", help="patch one position at a time")
    locate.add_argument(
        "--align", action="store_true", help="match prompts of unequal length by their beginning and end"
    )
    locate.add_argument(
        "--readout",
        metavar="CARD",
        help="measure the score of this card's readout over the prompt, in place of the answers",
    )
    locate.add_argument(
        "--tuned", metavar="MODEL",
        help="put this model's activations into `--model` on the clean prompts: which block carries what a training did",
    )  # fmt: skip
    parts = locate.add_mutually_exclusive_group()
    parts.add_argument("--split", type=int, default=0, help="seed that halves the pairs (default: 0)")
    parts.add_argument("--no-split", action="store_true", help="all pairs choose sites and are reported")
    locate.add_argument("--seed", type=int, default=0, help="seed of the random sites (default: 0)")
    locate.add_argument("--out", help="folder for locate.json, report.html and the run log (default: none)")
    locate.add_argument("--json", action="store_true", help="print the result as JSON")
    locate.set_defaults(run=("locate", "locate_contrast"))
