"""Parsers of `interp-rlhf sae`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..sae.known_formats import format_titles
from .causal_parsers import add_causal
from .shared import DATA_HELP, MODEL_HELP, POSITIVE_HELP, TEXTS_HELP, add_modules, add_sae_place

if TYPE_CHECKING:
    import argparse


def add_sae(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the parsers of `sae`."""
    sae = commands.add_parser(
        "sae", help="sparse autoencoders: train one, understand latents and find them"
    ).add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_sae_train(sae)
    _add_sae_inspect(sae)
    _add_sae_find(sae)
    _add_sae_causal(sae)


def _add_sae_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = commands.add_parser(
        "train",
        help="train one on a model's activations of texts: TopK or BatchTopK",
        description="Reads texts with the model up to the hook point, trains a sparse autoencoder on the activations and writes "
        "it to OUT/sae in the format of sae-lens. OUT also gets the run log, checkpoints, and training.json with settings, "
        "versions and, with --eval, the quality on other text. First tokens of contexts are left out everywhere, and so are "
        "activations whose norm is above six times the median. --resume continues a stopped training, to the same weights.",
        epilog="example: interp-rlhf sae train --hook-point model.layers.15 --data a.txt --eval b.txt --latents 2304 --k 32 "
        "--epochs 20 --cache runs/activations --out runs/sae",
    )
    text = "a .txt file is one text; a JSONL or CSV file, or a `datasets` path, has one per row, in `text`"
    train.add_argument("--hook-point", required=True, help="module path whose output is read: model.layers.15")
    train.add_argument("--data", required=True, nargs="+", metavar="TEXTS", help="texts to train on; " + text)
    train.add_argument("--out", required=True, help="folder for everything; new or empty")
    train.add_argument("--model", help=MODEL_HELP)
    _add_autoencoder_and_training(train)
    _add_disk_and_evaluation(train, text)
    train.add_argument("--json", action="store_true", help="print training.json")
    train.set_defaults(run=("sae_training", "sae_train"))


def _add_autoencoder_and_training(train: argparse.ArgumentParser) -> None:
    size = train.add_argument_group("the autoencoder")
    size.add_argument("--architecture", choices=["topk", "batchtopk"], default="topk", help="(default: topk)")
    size.add_argument("--latents", type=int, metavar="S", help="(default: four times the model's width)")
    size.add_argument(
        "--k", type=int, default=32, help="active latents per token; batchtopk: on average (default: 32)"
    )
    how = train.add_argument_group("the training")
    long = how.add_mutually_exclusive_group()
    long.add_argument("--epochs", type=float, metavar="N", help="passes over the texts (default: 20)")
    long.add_argument("--tokens", type=int, metavar="N", help="number of activations to train on, instead of --epochs")
    how.add_argument("--batch-tokens", type=int, default=2048, help="activations per step (default: 2048)")
    how.add_argument("--learning-rate", type=float, default=3e-3, help="learning rate of Adam (default: %(default)s)")
    how.add_argument(
        "--warm-up", type=float, default=0.02, help="share of the steps, from the first (default: %(default)s)"
    )
    how.add_argument(
        "--decay", type=float, default=0.2, help="share of the steps, up to the last (default: %(default)s)"
    )
    how.add_argument("--aux-k", type=int, help="silent latents that learn from the error; 0 for none (default: 2 k)")
    how.add_argument(
        "--dead-after",
        type=int,
        metavar="TOKENS",
        help="a latent that is off for this many tokens counts as silent (default: one epoch)",
    )
    how.add_argument("--context", type=int, default=128, help="tokens that the model reads at once (default: 128)")
    how.add_argument("--seed", type=int, default=0, help="seed of weights and order (default: 0)")


def _add_disk_and_evaluation(train: argparse.ArgumentParser, text: str) -> None:
    keep = train.add_argument_group("memory, disk, and stopping")
    keep.add_argument(
        "--cache",
        metavar="DIR",
        help="folder to store activations in, so that the model reads the texts once instead of in every epoch",
    )
    keep.add_argument(
        "--cache-type",
        choices=["float16", "float32"],
        default="float16",
        help="2 or 4 bytes per number (default: float16)",
    )
    keep.add_argument(
        "--buffer", type=int, default=2**17, help="activations held for shuffling (default: %(default)s)"
    )
    keep.add_argument(
        "--checkpoint-every",
        type=int,
        default=1000,
        metavar="STEPS",
        help="steps between checkpoints; 0 for none (default: 1000)",
    )
    keep.add_argument(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint in OUT with the same settings; a finished training is only evaluated",
    )
    other = train.add_argument_group("on other text")
    other.add_argument(
        "--eval",
        nargs="+",
        metavar="TEXTS",
        help="measure explained variance, L0, dead latents and PCA on these; none may be a training text; " + text,
    )
    other.add_argument(
        "--eval-tokens",
        type=int,
        default=2**17,
        metavar="N",
        help="use this many of their tokens, evenly spread (default: %(default)s)",
    )


def _add_sae_source(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "sae",
        metavar="SAE",
        help=f"folder, file or Hub id: {format_titles()}, or a format that a `--module` registers",
    )
    add_sae_place(command)
    command.add_argument(
        "--hook-point", help="module path that the autoencoder reads; it replaces the one in the file"
    )
    command.add_argument("--model", help=MODEL_HELP)


def _add_sae_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="pages of latents: contexts, density, promoted tokens, precision and recall",
        description="Reads texts and writes an HTML page on latents. For each: highest contexts, near misses, windows in "
        "which it is off, histogram, density, tokens promoted and suppressed, and cosines with probes. Labelled examples "
        "add precision and recall. The page also has FVU, L0 and dead latents of the autoencoder. A log with everything is "
        "next to the page.",
        epilog="example: interp-rlhf sae inspect runs/sae/sae --texts texts.txt --top 20 --labelled check.jsonl "
        "--probe reward/warmth/reward.v3.yaml --out inspect.html",
    )
    _add_sae_source(inspect)
    inspect.add_argument("--texts", required=True, help=TEXTS_HELP)
    which = inspect.add_mutually_exclusive_group()
    which.add_argument("--latents", metavar="I,J", help="these latents, such as 3,17,42")
    which.add_argument(
        "--top", type=int, metavar="N", help="the N latents that write most on these texts (default: 20)"
    )
    which.add_argument("--random", type=int, metavar="N", help="N latents drawn from those that are on somewhere")
    inspect.add_argument("--contexts", type=int, default=10, help="windows of each kind per latent (default: 10)")
    inspect.add_argument(
        "--context-length", type=int, default=256, help="cut texts after this many tokens (default: 256)"
    )
    inspect.add_argument("--window", type=int, default=16, help="tokens shown on either side (default: 16)")
    inspect.add_argument("--labelled", help="examples of a concept, for precision and recall; " + DATA_HELP)
    inspect.add_argument("--positive", help=POSITIVE_HELP)
    inspect.add_argument(
        "--probe", action="append", default=[], metavar="CARD", help="card to compare directions with; may be repeated"
    )
    inspect.add_argument(
        "--only-chosen",
        action="store_true",
        help="read no other latents: faster with --latents, but without FVU, L0 and dead latents",
    )
    inspect.add_argument(
        "--judge", metavar="WHO",
        help="let a judge name the latents: local (the model itself), a folder or Hub id of another model, or the address of an "
        "endpoint with OpenAI's chat completions, such as http://127.0.0.1:8000/v1 (key in $OPENAI_API_KEY). A name comes with "
        "its score on other windows; give --contexts 20 or more",
    )  # fmt: skip
    inspect.add_argument("--judge-model", metavar="NAME", help="the model's name at the endpoint")
    inspect.add_argument("--seed", type=int, default=0, help="seed of draws, split and bootstrap (default: 0)")
    inspect.add_argument("--out", default="inspect.html", help="the HTML page (default: %(default)s)")
    inspect.add_argument("--json", action="store_true", help="print everything as JSON")
    add_modules(inspect)
    inspect.set_defaults(run=("sae_latents", "sae_inspect"))


def _add_sae_find(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    find = commands.add_parser(
        "find",
        help="latents that tell two sets of texts apart, compared with a probe, TF-IDF and random dictionaries",
        description="Ranks latents by AUROC on one part of the texts and reports them on the other part, with bootstrap "
        "intervals. Compares them with a dense probe at the same hook point, TF-IDF, and the best latent of random "
        "dictionaries of the same size.",
        epilog="example: interp-rlhf sae find runs/sae/sae --positive warm.txt --negative cold.txt --out find.html",
    )
    _add_sae_source(find)
    find.add_argument(
        "--positive", required=True, metavar="A", help="text file with one text per line, or JSONL with `text`"
    )
    find.add_argument("--negative", required=True, metavar="B", help="the same")
    find.add_argument(
        "--held-out-fraction", type=float, default=0.5, help="share of the texts to report on (default: 0.5)"
    )
    find.add_argument("--top", type=int, default=10, help="how many latents to report (default: 10)")
    find.add_argument(
        "--seed", type=int, default=0, help="seed of split, random dictionaries and bootstrap (default: 0)"
    )
    find.add_argument("--out", help="also write an HTML page")
    find.add_argument("--json", action="store_true", help="print everything as JSON")
    add_modules(find)
    find.set_defaults(run=("sae_latents", "sae_find"))


def _add_sae_causal(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    causal = commands.add_parser(
        "causal",
        help="are latents causal: steer along what they write, silence it, and read the text",
        description="The causal check of `probe causal`, of each latent by itself and of all together. The direction of a latent "
        "is its decoder row.",
        epilog="example: interp-rlhf sae causal runs/sae/sae --latents 12,80 --prompts prompts.jsonl --causal-measure vader "
        "--out runs/latents",
    )
    _add_sae_source(causal)
    causal.add_argument("--latents", required=True, metavar="I,J", help="which latents, such as 12,80")
    causal.add_argument("--seed", type=int, default=0, help="seed of directions and bootstraps (default: 0)")
    causal.add_argument("--out", metavar="DIR", help="folder for causal.json and a plot per latent")
    causal.add_argument("--json", action="store_true", help="print the findings as JSON")
    add_causal(causal)
    add_modules(causal)
    causal.set_defaults(run=("sae_causal", "sae_causal"))
