"""The command line: parsers and help only, so that `interp-rlhf --help` is quick. The work is in `commands`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from . import __version__
from .concepts.pooling import POOLINGS

if TYPE_CHECKING:
    from collections.abc import Sequence

DATA_HELP = (
    "JSONL, CSV or Parquet file, or a `datasets` path, with `label` and one of `text`, `messages`, "
    "or `prompt` and `completion`"
)
MODEL_HELP = "folder or Hub id of the causal LM (default: the embedded SmolLM2-135M-Instruct)"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `interp-rlhf`; returns the exit code: 0 done, 1 a card that may not be what it says, 2 bad input."""
    arguments = build_parser().parse_args(argv)
    from safetensors import SafetensorError

    from . import commands

    try:
        return int(getattr(commands, arguments.run)(arguments))
    except (ValueError, FileNotFoundError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SafetensorError as error:
        print(
            f"error: a file of weights (`.safetensors`) is not whole ({error}) – expected one. Copy it again.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was written so far is kept", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="interp-rlhf",
        description="Interpretability inside RLHF training: probes as rewards, regularizers and monitors in TRL's trainers.",
        epilog="Start with `interp-rlhf demo`: the whole story on a real 135M chat model, on a CPU.",
    )
    parser.add_argument("--version", action="version", version=f"interp-rlhf {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(commands)
    probe = commands.add_parser("probe", help="fit a probe and check it").add_subparsers(
        title="commands", required=True, metavar="COMMAND"
    )
    _add_fit(probe)
    _add_check(probe)
    _add_canaries(probe)
    drift = commands.add_parser("drift", help="what a training did to the inside").add_subparsers(
        title="commands", required=True, metavar="COMMAND"
    )
    _add_compare(drift)
    _add_sae(commands)
    _add_report(commands)
    _add_recipes(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="the whole story on a real chat model, about fifteen minutes on two CPU cores",
        description="Warmth: the model makes contrast data, a probe is fitted and checked, GRPO is run with the probe as its "
        "reward and again with the scores shuffled, and both are compared on held-out prompts, by the probe, a holdout monitor "
        "and VADER. Writes data, cards, run logs, summary.json and report.html.",
    )
    demo.add_argument("--quick", action="store_true", help="about four minutes; too small for figures that mean much")
    demo.add_argument("--steps", type=int, help="optimizer steps of each arm (default: 12, quick: 2)")
    demo.add_argument("--seed", type=int, default=0, help="of everything (default: 0)")
    demo.add_argument("--model", help=MODEL_HELP + "; it needs a chat template with system prompts")
    demo.add_argument(
        "--out", default="runs/demo", help="folder to write to; must not hold a finished demo (default: %(default)s)"
    )
    demo.add_argument("--json", action="store_true", help="print the summary as JSON")
    demo.set_defaults(run="demo")


def _add_fit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    fit = commands.add_parser(
        "fit",
        help="fit a probe on labelled examples; writes an artifact and a card",
        description="Fits a linear probe on pooled activations of labelled examples, chooses its regularization and its "
        "place by cross-validation over prompts, calibrates it on scores out of fold for every pooling, and writes an "
        "artifact (safetensors) and a card (YAML). A card becomes a reward only after `probe check`.",
        epilog="example: interp-rlhf probe fit --data fit.jsonl --name warmth --out reward/warmth --sweep 4",
    )
    fit.add_argument("--data", required=True, help=DATA_HELP)
    fit.add_argument("--name", required=True, help="name of the concept: lower-case letters, digits, - and _")
    fit.add_argument("--concept", help="one sentence that says what the concept is (default: the name)")
    fit.add_argument("--out", required=True, help="folder for the card and the artifact")
    fit.add_argument("--model", help=MODEL_HELP)
    where = fit.add_mutually_exclusive_group()
    where.add_argument(
        "--hook-point",
        help="where to read, as a module path: model.layers.15; with `--sae` in place of what its file says",
    )
    where.add_argument(
        "--sweep", type=int, metavar="N", help="choose among every N-th decoder layer by cross-validation (default: 3)"
    )
    fit.add_argument(
        "--kind", choices=["probe", "direction", "sae_latents"], default="probe",
        help="sae_latents: a probe on some latents of a sparse autoencoder, at its own hook point (default: probe)",
    )  # fmt: skip
    fit.add_argument("--sae", help="folder, file or Hub id of the autoencoder, for `--kind sae_latents`")
    _add_sae_place(fit)
    fit.add_argument(
        "--latents", metavar="I,J", help="which of its latents, 12,80 say: `interp-rlhf sae find` names some"
    )
    fit.add_argument(
        "--method", choices=["logistic_regression", "difference_of_means"], default="logistic_regression",
        help="(default: logistic_regression)",
    )  # fmt: skip
    fit.add_argument(
        "--regularization", type=float, metavar="C",
        help="inverse strength of the L2 penalty, as in scikit-learn (default: chosen by cross-validation)",
    )  # fmt: skip
    fit.add_argument("--role", choices=["reward", "penalty", "monitor"], default="reward", help="(default: reward)")
    fit.add_argument(
        "--pooling",
        choices=[*POOLINGS, "best"],
        help="how token scores become one; a probe is fitted for mean, last or attention, the others are read with what is "
        "fitted for the mean; best tries those three at every hook point (default: mean for a reward, ema_max otherwise)",
    )
    fit.add_argument("--weight", type=float, default=1.0, help="weight of the reward in the trainer (default: 1)")
    fit.add_argument("--positive", help="which of two text labels means that the concept is present")
    fit.add_argument("--version", type=int, default=1, help="version of the card (default: 1)")
    fit.add_argument("--seed", type=int, default=0, help="of the folds (default: 0)")
    fit.add_argument("--json", action="store_true", help="print the result as JSON")
    fit.set_defaults(run="probe_fit")


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = commands.add_parser(
        "check",
        help="check a card on data that its fit did not see; writes the evidence into the card",
        description="AUROC with a bootstrap interval on held-out examples, beside TF-IDF, length, punctuation and a probe on the "
        "embedding, and against permuted labels and random directions. The evidence goes into the card. Exit code 1 where the "
        "card is meant to be a reward or a penalty and its evidence does not reach.",
        epilog="example: interp-rlhf probe check reward/warmth/reward.v3.yaml --fit-data fit.jsonl --data check.jsonl",
    )
    check.add_argument("card", help="the card's YAML file")
    check.add_argument("--fit-data", required=True, help="what `probe fit` was given")
    check.add_argument("--data", required=True, help="held out, with other prompts and wording; " + DATA_HELP)
    check.add_argument(
        "--completions", help="the model's own answers with labels, read where the reward will read; " + DATA_HELP
    )
    check.add_argument("--positive", help="which of two text labels means that the concept is present")
    check.add_argument(
        "--measure", choices=["vader"], action="append", default=[], help="independent measure to report beside"
    )
    check.add_argument("--sae", help="the autoencoder that a card of latents was taken from")
    _add_sae_place(check)
    check.add_argument("--hook-point", help="module path that it reads, in place of what its file says")
    check.add_argument("--model", help=MODEL_HELP)
    check.add_argument("--seed", type=int, default=0, help="of permutations, directions and bootstrap (default: 0)")
    check.add_argument("--replace", action="store_true", help="replace evidence that the card has already")
    check.add_argument("--json", action="store_true", help="print the evidence as JSON")
    check.set_defaults(run="probe_check")


def _add_canaries(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    canaries = commands.add_parser(
        "canaries",
        help="add canaries to a card of before 0.2: scores by which a model shows that it is the right one",
        description="Reads short sentences with the card's readout on the model that it was made on and writes the next "
        "version of the "
        "card and of its artifact, with what they gave. A model that is to be read must give the same again. The new card has no "
        "evidence: run `probe check` on it.",
        epilog="example: interp-rlhf probe canaries reward/warmth/reward.v3.yaml",
    )
    canaries.add_argument("card", help="the card's YAML file; it stays as it is")
    canaries.add_argument("--model", help=MODEL_HELP)
    canaries.add_argument("--json", action="store_true", help="print the result as JSON")
    canaries.set_defaults(run="probe_canaries")


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    compare = commands.add_parser(
        "compare",
        help="two checkpoints, or a base and its adapter: metrics and a verdict",
        description="Runs both models over the same fixed texts and compares activations and predictions; with cards and "
        "labelled examples also what the probes still read: frozen, re-standardized and refitted. Exit code 1 where a limit "
        "is crossed, for use in CI.",
        epilog="example: interp-rlhf drift compare base runs/dpo/checkpoint-100 --monitor reward/warmth/reward.v3.yaml "
        "--labelled check.jsonl --max kl=0.5 --min cosine=0.9 --fail-on 'monitor stale'",
    )
    compare.add_argument(
        "before",
        metavar="A",
        help="folder or Hub id of a causal LM, a folder with a PEFT adapter, or `SmolLM2-135M-Instruct`, the embedded one",
    )
    compare.add_argument("after", metavar="B", help="the same; an adapter must be one of A, or of A's base")
    compare.add_argument(
        "--texts", help="JSONL or CSV file of texts, or a text file with one per line (default: 24 neutral texts)"
    )
    compare.add_argument("--labelled", help="labelled examples to read monitors on; " + DATA_HELP)
    compare.add_argument("--positive", help="which of two text labels means that the concept is present")
    compare.add_argument(
        "--monitor", action="append", default=[], metavar="CARD", help="card to read on both; may be repeated"
    )
    compare.add_argument(
        "--hook-point",
        action="append",
        metavar="PATH",
        help="where to compare; may be repeated (default: four decoder layers)",
    )
    compare.add_argument(
        "--max", action="append", default=[], metavar="NAME=VALUE",
        help="exit with 1 where a number is above VALUE, at any hook point or monitor: kl=0.5, procrustes=0.1, norm_outliers=10",
    )  # fmt: skip
    compare.add_argument(
        "--min", action="append", default=[], metavar="NAME=VALUE",
        help="exit with 1 where a number is below VALUE: cosine=0.9, cka=0.95, frozen_auroc=0.8",
    )  # fmt: skip
    compare.add_argument(
        "--fail-on",
        action="append",
        default=[],
        metavar="VERDICT",
        help="exit with 1 at this verdict; may be repeated",
    )
    compare.add_argument("--seed", type=int, default=0, help="of folds and bootstraps (default: 0)")
    compare.add_argument("--json", action="store_true", help="print everything as JSON")
    compare.set_defaults(run="drift_compare")


def _add_sae(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sae = commands.add_parser(
        "sae", help="sparse autoencoders: train one, understand latents and find them"
    ).add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_sae_train(sae)
    _add_sae_inspect(sae)
    _add_sae_find(sae)


def _add_sae_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = commands.add_parser(
        "train",
        help="train one on a model's activations of texts: TopK or BatchTopK",
        description="Reads texts with the model up to the hook point, trains a sparse autoencoder on the activations and writes "
        "it to OUT/sae in the format of sae-lens. OUT also gets the run log, checkpoints while it runs, and training.json: "
        "settings, versions, and with --eval how well it does on other text. First tokens of contexts and activations whose "
        "norm is above six times the median are left out everywhere. A stopped training goes on with --resume, to the same "
        "weights.",
        epilog="example: interp-rlhf sae train --hook-point model.layers.15 --data a.txt --eval b.txt --latents 2304 --k 32 "
        "--epochs 20 --cache runs/activations --out runs/sae",
    )
    text = "a .txt file is one text; a JSONL or CSV file, or a `datasets` path, has one per row, in `text`"
    train.add_argument("--hook-point", required=True, help="module path whose output is read: model.layers.15")
    train.add_argument("--data", required=True, nargs="+", metavar="TEXTS", help="texts to train on; " + text)
    train.add_argument("--out", required=True, help="folder for everything; a new one, or empty")
    train.add_argument("--model", help=MODEL_HELP)
    size = train.add_argument_group("what is trained")
    size.add_argument("--architecture", choices=["topk", "batchtopk"], default="topk", help="(default: topk)")
    size.add_argument("--latents", type=int, metavar="S", help="(default: four times the model's width)")
    size.add_argument(
        "--k", type=int, default=32, help="latents that are on per token; batchtopk: on average (default: 32)"
    )
    how = train.add_argument_group("how")
    long = how.add_mutually_exclusive_group()
    long.add_argument("--epochs", type=float, metavar="N", help="passes over the texts (default: 20)")
    long.add_argument("--tokens", type=int, metavar="N", help="activations trained on, in place of --epochs")
    how.add_argument("--batch-tokens", type=int, default=2048, help="activations of a step (default: 2048)")
    how.add_argument("--learning-rate", type=float, default=3e-3, help="of Adam (default: %(default)s)")
    how.add_argument("--warm-up", type=float, default=0.02, help="share of the steps (default: %(default)s)")
    how.add_argument(
        "--decay", type=float, default=0.2, help="share of the steps, the last ones (default: %(default)s)"
    )
    how.add_argument("--aux-k", type=int, help="silent latents that explain the error; 0 for none (default: 2 k)")
    how.add_argument(
        "--dead-after", type=int, metavar="TOKENS", help="tokens after which a latent is silent (default: an epoch's)"
    )
    how.add_argument("--context", type=int, default=128, help="tokens that the model reads at once (default: 128)")
    how.add_argument("--seed", type=int, default=0, help="of weights and order (default: 0)")
    keep = train.add_argument_group("memory, disk, and stopping")
    keep.add_argument(
        "--cache", metavar="DIR", help="keep activations there: the model reads the texts once, and not in every epoch"
    )
    keep.add_argument(
        "--cache-type",
        choices=["float16", "float32"],
        default="float16",
        help="2 or 4 bytes a number (default: float16)",
    )
    keep.add_argument(
        "--buffer", type=int, default=2**17, help="activations held for shuffling (default: %(default)s)"
    )
    keep.add_argument(
        "--checkpoint-every", type=int, default=1000, metavar="STEPS", help="0 for never (default: 1000)"
    )
    keep.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in OUT, with the same settings; a training that is done is only evaluated",
    )
    other = train.add_argument_group("on other text")
    other.add_argument(
        "--eval",
        nargs="+",
        metavar="TEXTS",
        help="explained variance, L0 and dead latents on these, none of them trained on, beside PCA; " + text,
    )
    other.add_argument(
        "--eval-tokens",
        type=int,
        default=2**17,
        metavar="N",
        help="so many of them, evenly spread (default: %(default)s)",
    )
    train.add_argument("--json", action="store_true", help="print training.json")
    train.set_defaults(run="sae_train")


def _add_sae_source(command: argparse.ArgumentParser) -> None:
    command.add_argument("sae", metavar="SAE", help="folder, file or Hub id: sae-lens, sparsify, Gemma Scope")
    _add_sae_place(command)
    command.add_argument("--hook-point", help="module path that it reads, in place of what its file says")
    command.add_argument("--model", help=MODEL_HELP)


def _add_sae_place(command: argparse.ArgumentParser) -> None:
    command.add_argument("--subfolder", help="folder in the autoencoder's folder or repository")
    command.add_argument("--revision", help="branch, tag or commit on the Hub")


def _add_sae_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="pages of latents: contexts, density, promoted tokens, precision and recall",
        description="Reads texts and writes an HTML page on latents: their highest contexts, near misses and windows in which "
        "they are off, histogram and density, tokens promoted and suppressed, cosines with probes, and for labelled examples "
        "precision and recall; of the autoencoder FVU, L0 and dead latents. The log with everything is beside the page.",
        epilog="example: interp-rlhf sae inspect runs/sae/sae --texts texts.txt --top 20 --labelled check.jsonl "
        "--probe reward/warmth/reward.v3.yaml --out inspect.html",
    )
    _add_sae_source(inspect)
    inspect.add_argument("--texts", required=True, help="JSONL or CSV file of texts, or a text file with one per line")
    which = inspect.add_mutually_exclusive_group()
    which.add_argument("--latents", metavar="I,J", help="which latents, 3,17,42 say")
    which.add_argument("--top", type=int, metavar="N", help="the N that write most on these texts (default: 20)")
    which.add_argument("--random", type=int, metavar="N", help="N drawn among those that are on somewhere")
    inspect.add_argument("--contexts", type=int, default=10, help="windows of each kind per latent (default: 10)")
    inspect.add_argument(
        "--context-length", type=int, default=256, help="tokens at which texts are cut (default: 256)"
    )
    inspect.add_argument("--window", type=int, default=16, help="tokens shown on either side (default: 16)")
    inspect.add_argument("--labelled", help="examples of a concept, for precision and recall; " + DATA_HELP)
    inspect.add_argument("--positive", help="which of two text labels means that the concept is present")
    inspect.add_argument(
        "--probe", action="append", default=[], metavar="CARD", help="card to compare directions with; may be repeated"
    )
    inspect.add_argument(
        "--only-chosen",
        action="store_true",
        help="read no other latents: quicker with --latents, without FVU, L0 and dead",
    )
    inspect.add_argument("--seed", type=int, default=0, help="of draws, split and bootstrap (default: 0)")
    inspect.add_argument("--out", default="inspect.html", help="the HTML page (default: %(default)s)")
    inspect.add_argument("--json", action="store_true", help="print everything as JSON")
    inspect.set_defaults(run="sae_inspect")


def _add_sae_find(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    find = commands.add_parser(
        "find",
        help="latents that tell two sets of texts apart, beside a probe, TF-IDF and random dictionaries",
        description="Ranks latents by AUROC on one part of the texts and reports them on the other, with bootstrap intervals, "
        "beside a dense probe at the same hook point, TF-IDF, and the best latent of random dictionaries of the same size.",
        epilog="example: interp-rlhf sae find runs/sae/sae --positive warm.txt --negative cold.txt --out find.html",
    )
    _add_sae_source(find)
    find.add_argument(
        "--positive", required=True, metavar="A", help="text file with one text per line, or JSONL with `text`"
    )
    find.add_argument("--negative", required=True, metavar="B", help="the same")
    find.add_argument("--held-out-fraction", type=float, default=0.5, help="share that only reports (default: 0.5)")
    find.add_argument("--top", type=int, default=10, help="how many latents to report (default: 10)")
    find.add_argument("--seed", type=int, default=0, help="of split, random dictionaries and bootstrap (default: 0)")
    find.add_argument("--out", help="also write an HTML page")
    find.add_argument("--json", action="store_true", help="print everything as JSON")
    find.set_defaults(run="sae_find")


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = commands.add_parser(
        "report",
        help="run logs to one HTML page and one Markdown page",
        description="Turns run logs into a self-contained HTML page and a Markdown page with plots. Works during a run and after "
        "a crash. Several runs are shown side by side.",
        epilog="example: interp-rlhf report runs/demo --out runs/demo/report.html",
    )
    report.add_argument("runs", nargs="+", help="run logs (interp.jsonl), or folders that hold some")
    report.add_argument(
        "--out", default="report.html", help="the HTML file; report.md goes beside it (default: %(default)s)"
    )
    report.add_argument("--title", help="title of the page")
    report.add_argument(
        "--model-card",
        metavar="FILE",
        help="put a section with the verdicts into this Markdown file, such as TRL's README.md",
    )
    report.set_defaults(run="report")


def _add_recipes(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    recipes = commands.add_parser("recipes", help="launch scripts and configurations").add_subparsers(
        title="commands", required=True, metavar="COMMAND"
    )
    copy = recipes.add_parser(
        "copy",
        help="copy the recipes that come with the package into a folder",
        description="Copies scripts, YAML, data and accelerate configurations into DIR/recipes, to be edited and launched "
        "there. Cards that they name are found in the package.",
        epilog="example: interp-rlhf recipes copy . && accelerate launch --config_file recipes/accelerate_configs/cpu.yaml "
        "recipes/dpo.py --config recipes/keep_a_concept/dpo/config_anchor.yaml",
    )
    copy.add_argument("folder", metavar="DIR", help="where `recipes/` goes")
    copy.add_argument("--force", action="store_true", help="overwrite files that were changed")
    copy.add_argument("--json", action="store_true", help="print the files as JSON")
    copy.set_defaults(run="recipes_copy")
