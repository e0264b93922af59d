"""Parsers of `interp-rlhf card`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..validation.measures import MEASURES
from .shared import MODEL_HELP, add_modules

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
    _add_matrix(card)
    _add_push(card)
    _add_pull(card)


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
        "the evidence of one says nothing about the other. Exit code 0: they read the same.",
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
        epilog="example: interp-rlhf card new reward/warmth/reward.v3.yaml --weight 0.5 --out runs/lighter",
    )
    new.add_argument("source", metavar="FROM", help="a card's YAML file, or an artifact (.safetensors)")
    new.add_argument(
        "--out",
        metavar="DIR",
        help="folder of the new card (default: that of FROM); artifact and holdout cards are copied into another folder",
    )
    new.add_argument("--name", help="name of the concept (default: the card's, or the artifact's file name)")
    new.add_argument("--concept", help="one sentence that describes the concept (default: the card's, or the name)")
    new.add_argument(
        "--role",
        choices=["reward", "penalty", "monitor"],
        help="(default: the card's, or reward); the pooling stays: for penalties and monitors, `--pooling ema_max` is usual",
    )
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


def _add_matrix(commands: Commands) -> None:
    matrix = commands.add_parser(
        "matrix",
        help="what steering one concept, or training on it, does to the others",
        description="For several cards of one model: cosines of their directions, plain and weighted by the activations, and the "
        "off-target matrix. Each concept is steered while the model answers prompts. The model as it is reads the answers with "
        "all cards, and measures read their text. With run logs, rows say how far a training moved each card that it watched.",
        epilog="example: interp-rlhf card matrix reward/warmth/reward.v3.yaml reward/warmth/monitor.v3.yaml --prompts p.jsonl "
        "--measure vader --run-log warmth=runs/grpo/interp.jsonl --plot matrix.svg",
    )
    matrix.add_argument("cards", nargs="+", metavar="CARD", help=CARD_HELP)
    matrix.add_argument(
        "--prompts", required=True, metavar="FILE", help="file with a column `prompt`, at least 10 rows"
    )
    matrix.add_argument(
        "--measure", action="append", default=[], metavar="NAME",
        help=f"independent measure of the answers: {', '.join(MEASURES)}, or one that a `--module` registers; may be repeated",
    )  # fmt: skip
    matrix.add_argument(
        "--run-log", action="append", default=[], metavar="NAME=FILE", help="run log of a training; may be repeated"
    )
    matrix.add_argument(
        "--dose", type=float, default=4.0, help="in standard deviations of the activation (default: 4)"
    )
    matrix.add_argument(
        "--max-new-tokens", type=int, default=24, metavar="N", help="length of an answer (default: 24)"
    )
    matrix.add_argument("--model", help=MODEL_HELP)
    matrix.add_argument("--plot", metavar="FILE", help="also write a heat map as SVG")
    matrix.add_argument("--json", action="store_true", help="print the matrix as JSON")
    add_modules(matrix)
    matrix.set_defaults(run=("card_matrix", "card_matrix"))


def _add_push(commands: Commands) -> None:
    push = commands.add_parser(
        "push",
        help="share a card with all its files on the Hub",
        description="Puts the card, its artifact, its holdout cards with theirs, a page (README.md) and SHA256SUMS into a "
        "repository, in one commit, and prints that commit. The repository is made if there is none. Other content under a "
        "file's name is refused: a released card is never edited. The token is that of `hf auth login` or HF_TOKEN.",
        epilog="example: interp-rlhf card push reward/warmth/reward.v3.yaml me/warmth --dry-run runs/shared",
    )
    push.add_argument("card", help=CARD_HELP)
    push.add_argument("repo_id", metavar="REPO_ID", help="repository on the Hub, owner/name")
    push.add_argument(
        "--private", action="store_true", help="make a private repository; one that exists stays as it is"
    )
    push.add_argument(
        "--revision", metavar="BRANCH", help="branch of the commit, made if there is none (default: main)"
    )
    push.add_argument("--message", help="message of the commit (default: name and version of the card)")
    push.add_argument("--dry-run", metavar="DIR", help="write the files into this folder, and send nothing")
    push.add_argument("--json", action="store_true", help="print the commit and the digests as JSON")
    add_modules(push)
    push.set_defaults(run=("card_sharing", "card_push"))


def _add_pull(commands: Commands) -> None:
    pull = commands.add_parser(
        "pull",
        help="fetch a shared card with all its files, and check them",
        description="Resolves a branch to a commit, fetches the card, its artifact and its holdout cards at that commit, and "
        "checks each against SHA256SUMS and the artifact against the card. Only then are they written, with CARD.lock.json: the "
        "repository, the commit and the digests. Files that exist stay; other content under the same name is refused.",
        epilog="example: interp-rlhf card pull me/warmth --revision 0123456789abcdef0123456789abcdef01234567 --out cards",
    )
    pull.add_argument("source", metavar="REPO_ID", help="owner/name on the Hub, or a folder of `card push --dry-run`")
    pull.add_argument(
        "--revision", default="main",
        help="SHA of a commit, or a branch or tag, which is resolved to a commit (default: %(default)s)",
    )  # fmt: skip
    pull.add_argument("--out", default="cards", metavar="DIR", help="folder for the files (default: %(default)s)")
    pull.add_argument(
        "--card", metavar="FILE", help="which card (default: the one that the repository's page is about)"
    )
    pull.add_argument("--force", action="store_true", help="replace other files under the same names")
    pull.add_argument("--json", action="store_true", help="print the commit and the digests as JSON")
    add_modules(pull)
    pull.set_defaults(run=("card_sharing", "card_pull"))
