"""Parsers of `interp-rlhf probe` and `interp-rlhf drift`."""

from __future__ import annotations

import argparse

from ..concepts.pooling import FITTED, POOLINGS
from ..validation.measures import MEASURES
from .causal_parsers import add_causal
from .shared import DATA_HELP, MODEL_HELP, PAIRS_HELP, POSITIVE_HELP, TEXTS_HELP, add_modules, add_sae_place


def add_probe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the parsers of `probe`."""
    probe = commands.add_parser("probe", help="fit a probe and check it").add_subparsers(
        title="commands", required=True, metavar="COMMAND"
    )
    _add_fit(probe)
    _add_check(probe)
    _add_causal_check(probe)
    _add_canaries(probe)


def add_drift(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the parser of `drift compare`."""
    drift = commands.add_parser("drift", help="measure how a training changed a model").add_subparsers(
        title="commands", required=True, metavar="COMMAND"
    )
    _add_compare(drift)


def _add_fit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    fit = commands.add_parser(
        "fit",
        help="fit a probe on labelled examples; writes an artifact and a card",
        description="Fits a linear probe on pooled activations of labelled examples. Cross-validation over prompts chooses its "
        "regularization and its hook point. The probe is calibrated for every pooling on scores out of fold. The command "
        "writes an artifact (safetensors) and a card (YAML). A card becomes a reward only after `probe check`.",
        epilog="example: interp-rlhf probe fit --data fit.jsonl --name warmth --out reward/warmth --sweep 4",
    )
    fit.add_argument("--data", required=True, help=DATA_HELP)
    fit.add_argument("--name", required=True, help="name of the concept: lower-case letters, digits, - and _")
    fit.add_argument("--concept", help="one sentence that describes the concept (default: the name)")
    fit.add_argument("--out", required=True, help="folder for the card and the artifact")
    fit.add_argument("--model", help=MODEL_HELP)
    where = fit.add_mutually_exclusive_group()
    where.add_argument(
        "--hook-point",
        help="module path that the probe reads: model.layers.15; with `--sae` it replaces the hook point of the file",
    )
    where.add_argument(
        "--sweep", type=int, metavar="N", help="choose among every N-th decoder layer by cross-validation (default: 3)"
    )
    fit.add_argument(
        "--at", choices=["best", "attributed"], default="best",
        help="best: where the probe's cross-validated AUROC is highest. attributed: the decoder layer where the contrast of "
        "`--pairs` acts; the sweep is reported next to it (default: best)",
    )  # fmt: skip
    fit.add_argument("--pairs", help="contrast pairs for `--at attributed`; " + PAIRS_HELP)
    fit.add_argument(
        "--kind", choices=["probe", "direction", "sae_latents"], default="probe",
        help="sae_latents: a probe on some latents of a sparse autoencoder, at that autoencoder's hook point (default: probe)",
    )  # fmt: skip
    fit.add_argument("--sae", help="folder, file or Hub id of the autoencoder, for `--kind sae_latents`")
    add_sae_place(fit)
    fit.add_argument(
        "--latents", metavar="I,J", help="which of its latents, such as 12,80; `interp-rlhf sae find` suggests some"
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
        "--pooling", metavar="NAME",
        help=f"how token scores become one: {', '.join(POOLINGS)}, one that a `--module` registers, or best. A probe is fitted "
        f"for {', '.join(FITTED)}; the others read the mean's probe. best tries these {len(FITTED)} at every hook point "
        "(default: mean for a reward, ema_max otherwise)",
    )  # fmt: skip
    fit.add_argument("--weight", type=float, default=1.0, help="weight of the reward in the trainer (default: 1)")
    fit.add_argument("--positive", help=POSITIVE_HELP)
    fit.add_argument("--version", type=int, default=1, help="version of the card (default: 1)")
    fit.add_argument("--seed", type=int, default=0, help="seed of the folds (default: 0)")
    fit.add_argument("--json", action="store_true", help="print the result as JSON")
    add_modules(fit)
    fit.set_defaults(run=("probe", "probe_fit"))


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = commands.add_parser(
        "check",
        help="check a card on data that its fit did not see; writes the evidence into the card",
        description="Measures the AUROC on held-out examples with a bootstrap interval. The baselines are TF-IDF, length, "
        "punctuation and a probe on the embedding; the controls are permuted labels and random directions. The evidence "
        "goes into the card. Exit code 1: the card is a reward or a penalty, and its evidence is too weak.",
        epilog="example: interp-rlhf probe check reward/warmth/reward.v3.yaml --fit-data fit.jsonl --data check.jsonl",
    )
    check.add_argument("card", help="the card's YAML file")
    check.add_argument("--fit-data", required=True, help="the data of `probe fit`")
    check.add_argument("--data", required=True, help="held out, with other prompts and wording; " + DATA_HELP)
    check.add_argument(
        "--completions", help="the model's own answers with labels, read as the reward will read them; " + DATA_HELP
    )
    check.add_argument("--positive", help=POSITIVE_HELP)
    check.add_argument(
        "--measure",
        action="append",
        default=[],
        metavar="NAME",
        help=f"independent measure to report as well: {', '.join(MEASURES)}, or one that a `--module` registers; may be repeated",
    )
    check.add_argument(
        "--group-by", default="group", metavar="COLUMN",
        help="column by which tables are made: AUROC, rates and calibration of each group (default: group, if it is there)",
    )  # fmt: skip
    check.add_argument("--sae", help="the autoencoder behind a card of latents")
    add_sae_place(check)
    check.add_argument("--hook-point", help="module path that the autoencoder reads; it replaces the one in the file")
    check.add_argument("--model", help=MODEL_HELP)
    check.add_argument(
        "--seed", type=int, default=0, help="seed of permutations, directions and bootstrap (default: 0)"
    )
    check.add_argument("--replace", action="store_true", help="replace the evidence that the card already has")
    check.add_argument("--json", action="store_true", help="print the evidence as JSON")
    check.add_argument(
        "--causal", action=argparse.BooleanOptionalAction, default=None,
        help="also run the causal check (default: for rewards and penalties, if `--prompts` or `--causal-pairs` is given)",
    )  # fmt: skip
    add_causal(check)
    add_modules(check)
    check.set_defaults(run=("probe", "probe_check"))


def _add_causal_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    causal = commands.add_parser(
        "causal",
        help="is the concept causal: steer it, silence it, and read the text; writes the findings into the card",
        description="While the model answers prompts, its activation at the card's hook point is moved along the card's "
        "direction, or the concept's coordinate is silenced. An independent measure of the answers says what changed, next to "
        "random, equally variable and foreign directions. Verdicts: causal, steers only, silences only, read-only, insufficient "
        "evidence. A plot goes next to the card.",
        epilog="example: interp-rlhf probe causal reward/warmth/reward.v3.yaml --prompts prompts.jsonl --causal-measure vader",
    )
    causal.add_argument("card", help="the card's YAML file")
    causal.add_argument("--fit-data", help="the data of `probe fit`: the other recipe is fitted on them; " + DATA_HELP)
    causal.add_argument("--positive", help=POSITIVE_HELP)
    causal.add_argument("--model", help=MODEL_HELP)
    causal.add_argument("--seed", type=int, default=0, help="seed of directions and bootstraps (default: 0)")
    causal.add_argument("--replace", action="store_true", help="replace the findings that the card already has")
    causal.add_argument("--json", action="store_true", help="print the findings as JSON")
    add_causal(causal)
    add_modules(causal)
    causal.set_defaults(run=("causal", "probe_causal"))


def _add_canaries(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    canaries = commands.add_parser(
        "canaries",
        help="add canaries to a card older than 0.2: sentences and scores that identify its model",
        description="Reads short sentences with the card's readout on the model that it was made on. Writes the next "
        "version of the card and of its artifact with these sentences and their scores. A model that is read later must "
        "give the same scores. The new card has no evidence: run `probe check` on it.",
        epilog="example: interp-rlhf probe canaries reward/warmth/reward.v3.yaml",
    )
    canaries.add_argument("card", help="the card's YAML file; it stays as it is")
    canaries.add_argument("--model", help=MODEL_HELP)
    canaries.add_argument("--json", action="store_true", help="print the result as JSON")
    canaries.set_defaults(run=("probe", "probe_canaries"))


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    compare = commands.add_parser(
        "compare",
        help="two checkpoints, or a base and its adapter: metrics and a verdict",
        description="Runs both models over the same fixed texts and compares activations and predictions. With cards and "
        "labelled examples it also says what the probes still read: frozen, re-standardized and refitted. Exit code 1: a "
        "limit is crossed, for use in CI.",
        epilog="example: interp-rlhf drift compare base runs/dpo/checkpoint-100 --monitor reward/warmth/reward.v3.yaml "
        "--labelled check.jsonl --max kl=0.5 --min cosine=0.9 --fail-on 'monitor stale'",
    )
    compare.add_argument(
        "before",
        metavar="A",
        help="folder or Hub id of a causal LM, a folder with a PEFT adapter, or `SmolLM2-135M-Instruct`, the embedded one",
    )
    compare.add_argument("after", metavar="B", help="the same; an adapter must belong to A or to A's base")
    compare.add_argument("--texts", help=TEXTS_HELP + " (default: 24 neutral texts)")
    compare.add_argument("--labelled", help="labelled examples to read monitors on; " + DATA_HELP)
    compare.add_argument("--positive", help=POSITIVE_HELP)
    compare.add_argument(
        "--monitor", action="append", default=[], metavar="CARD", help="card to read on both; may be repeated"
    )
    compare.add_argument(
        "--hook-point",
        action="append",
        metavar="PATH",
        help="module path to compare at; may be repeated (default: four decoder layers)",
    )
    compare.add_argument(
        "--max", action="append", default=[], metavar="NAME=VALUE",
        help="exit with 1 if a number is above VALUE at any hook point or monitor: kl=0.5, procrustes=0.1, norm_outliers=10",
    )  # fmt: skip
    compare.add_argument(
        "--min", action="append", default=[], metavar="NAME=VALUE",
        help="exit with 1 if a number is below VALUE: cosine=0.9, cka=0.95, frozen_auroc=0.8",
    )  # fmt: skip
    compare.add_argument(
        "--fail-on",
        action="append",
        default=[],
        metavar="VERDICT",
        help="exit with 1 at this verdict; may be repeated",
    )
    compare.add_argument(
        "--patch", metavar="PAIRS",
        help="contrast pairs: put B's activations into A on the same prompts and report which blocks carry the change; "
        + PAIRS_HELP,
    )  # fmt: skip
    compare.add_argument("--seed", type=int, default=0, help="seed of folds and bootstraps (default: 0)")
    add_causal(compare)
    compare.add_argument("--json", action="store_true", help="print everything as JSON")
    add_modules(compare)
    compare.set_defaults(run=("drift", "drift_compare"))
