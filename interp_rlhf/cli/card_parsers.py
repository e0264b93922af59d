"""Parsers of `interp-rlhf card`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .shared import add_modules

if TYPE_CHECKING:
    import argparse

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

CARD_HELP = "the card's YAML file, or a shipped card such as reward/warmth/reward.v3.yaml"


def add_card(commands: Commands) -> None:
    """Add the parsers of `card`."""
    card = commands.add_parser("card", help="look at cards, compare them, make and share them").add_subparsers(
        title="commands", required=True, metavar="COMMAND"
    )
    _add_show(card)
    _add_diff(card)
    _add_new(card)


def _add_show(commands: Commands) -> None:
    show = commands.add_parser(
        "show",
        help="what a card says, with its evidence drawn in the terminal",
        description="Prints what a card reads, on which model, and what is known about it: the AUROC of the probe and of all "
        "baselines with intervals on one axis, the controls, what the probe adds, its calibration and the verdict of the gate. "
        "The artifact is read and held against the card's SHA-256.",
        epilog="example: interp-rlhf card show reward/warmth/reward.v3.yaml",
    )
    show.add_argument("card", help=CARD_HELP)
    show.add_argument("--json", action="store_true", help="print the card, the gate and the hashes as JSON")
    add_modules(show)
    show.set_defaults(run=("card", "card_show"))


def _add_diff(commands: Commands) -> None:
    diff = commands.add_parser(
        "diff",
        help="what differs between two cards",
        description="Prints every key whose value differs, the numbers of the evidence with their intervals and whether these "
        "overlap. Exit code 1: the cards read different things (artifact, hook point, pooling, counted tokens or model), so that "
        "the evidence of one says nothing about the other. Exit code 0: they read the same, whatever else differs.",
        epilog="example: interp-rlhf card diff reward/warmth/reward.v2.yaml reward/warmth/reward.v3.yaml",
    )
    diff.add_argument("before", metavar="A", help=CARD_HELP)
    diff.add_argument("after", metavar="B", help="the same")
    diff.add_argument("--json", action="store_true", help="print the differences as JSON")
    add_modules(diff)
    diff.set_defaults(run=("card", "card_diff"))


def _add_new(commands: Commands) -> None:
    new = commands.add_parser(
        "new",
        help="the next version of a card with another role, weight, transform or pooling, without a fit",
        description="Writes ROLE.vN.yaml: the next version of a card, or the first card of an artifact. What is not given "
        "stays as it is, and the old card is not touched. The evidence is kept if the new card reads the same (another role, "
        "weight or transform), and left out if it does not (another pooling): then run `probe check`. For new labelled data use "
        "`probe fit`.",
        epilog="example: interp-rlhf card new reward/warmth/reward.v3.yaml --role penalty --weight 0.2 --out runs/penalty",
    )
    new.add_argument("source", metavar="FROM", help="a card's YAML file, or an artifact (.safetensors)")
    new.add_argument(
        "--out",
        metavar="DIR",
        help="folder of the new card (default: that of FROM); artifact and holdout cards are copied into another folder",
    )
    new.add_argument("--name", help="name of the concept (default: the card's, or the artifact's file name)")
    new.add_argument("--concept", help="one sentence that describes the concept (default: the card's, or the name)")
    new.add_argument("--role", choices=["reward", "penalty", "monitor"], help="(default: the card's, or reward)")
    new.add_argument("--version", type=int, metavar="N", help="(default: the card's version + 1, or 1)")
    new.add_argument("--weight", type=float, help="weight of the reward in the trainer (default: the card's, or 1)")
    new.add_argument("--pooling", metavar="NAME", help="one that the artifact is calibrated for (default: the card's)")
    new.add_argument(
        "--transform", metavar="MEAN,STD[,LOWER,UPPER]",
        help="the score becomes (score − MEAN) / STD, clipped to LOWER and UPPER; write --transform=-1,2 if MEAN is negative",
    )  # fmt: skip
    new.add_argument(
        "--holdout", action="append", metavar="FILE",
        help="monitor card in the folder of FROM that watches the reward; may be repeated (default: the card's)",
    )  # fmt: skip
    new.add_argument("--json", action="store_true", help="print the result as JSON")
    add_modules(new)
    new.set_defaults(run=("card", "card_new"))
