"""What the command line does: one function per command, from parsed arguments to an exit code."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any


def demo(arguments: argparse.Namespace) -> int:
    """`interp-rlhf demo`."""
    from dataclasses import replace

    from .demo.story import Settings, quick, run

    settings = Settings(seed=arguments.seed)
    if arguments.quick:
        settings = quick(settings)
    if arguments.steps is not None:
        if arguments.steps < 1:
            raise ValueError(f"`--steps` is {arguments.steps} – expected at least 1.")
        settings = replace(settings, steps=arguments.steps)
    summary = run(arguments.out, settings, arguments.model, arguments.quick)
    if arguments.json:
        print(json.dumps(summary))
        return 0
    print()
    for arm, found in summary["arms"].items():
        gains = ", ".join(_gain(key, found[f"{key}_gain"]) for key in ("probe_score", "monitor_score", "vader"))
        print(
            f"{arm:>5}: {gains}; KL {found['last_step']['kl']:.2f}, {found['extra_forward_passes_for_the_reward']} extra passes"
        )
    print(f"probe − sham: {_gain('probe_score', summary['probe_minus_sham']['probe_score_gain'])}")
    print(
        f"\n{arguments.out}/summary.json and {arguments.out}/report.html after {summary['seconds'] / 60:.1f} minutes"
    )
    return 0


def probe_fit(arguments: argparse.Namespace) -> int:
    """`interp-rlhf probe fit`."""
    from .concepts.card import load_card
    from .concepts.examples import load_examples
    from .concepts.probe import fit_probe, sweep_points
    from .concepts.publish import plot_sweep, publish

    latents = _indices(arguments.latents)
    if (arguments.kind == "sae_latents") != (arguments.sae is not None and latents is not None):
        raise ValueError(
            f"`--kind` is {arguments.kind}, `--sae` {arguments.sae}, `--latents` {arguments.latents} – expected both with "
            "`--kind sae_latents`, and neither otherwise."
        )
    examples = load_examples(arguments.data, arguments.positive)
    model, tokenizer, model_id = _load(arguments.model)
    points = [arguments.hook_point] if arguments.hook_point else sweep_points(model, arguments.sweep or 3)
    fit = fit_probe(
        model, tokenizer, examples, points, model_id=model_id, kind=arguments.kind, method=arguments.method,
        sae=_sae(arguments.sae, model), latents=latents, seed=arguments.seed, progress=True,
    )  # fmt: skip
    path = publish(
        fit, arguments.out, name=arguments.name, concept=arguments.concept or arguments.name, role=arguments.role,
        version=arguments.version, pooling=arguments.pooling, weight=arguments.weight,
    )  # fmt: skip
    card = load_card(path).card
    curve = [{"hook_point": p.hook_point, "auroc": round(p.auroc, 4), "std": round(p.std, 4)} for p in fit.curve]
    if arguments.json:
        print(
            json.dumps(
                {"card": str(path), "hook_point": card.readout.hook_point, "examples": len(examples), "sweep": curve}
            )
        )
        return 0
    if curve:
        figure = path.with_suffix(".sweep.svg")
        plot_sweep(fit.curve, figure, f"{arguments.name}: cross-validated on {len(examples)} examples")
        for point in fit.curve:
            mark = "  ← chosen" if point.hook_point == card.readout.hook_point else ""
            print(f"{point.hook_point:>32}  AUROC {point.auroc:.3f} ± {point.std:.3f}{mark}")
        print(f"curve: {figure}")
    print(f"card: {path} ({card.readout.pooling} pooling at {card.readout.hook_point}, {len(examples)} examples)")
    print(f"next: interp-rlhf probe check {path} --fit-data {arguments.data} --data HELD_OUT")
    return 0


def probe_check(arguments: argparse.Namespace) -> int:
    """`interp-rlhf probe check`."""
    from .concepts.artifact import write_atomically
    from .concepts.card import load_card, with_evidence
    from .concepts.examples import load_examples
    from .validation import measures
    from .validation.check import check_card
    from .validation.gate import gate

    card = load_card(arguments.card)
    if card.card.evidence is not None and not arguments.replace:
        raise ValueError(
            f"`{arguments.card}` has evidence already – expected none. Pass `--replace` to write it anew."
        )
    examples = {
        name: load_examples(path, arguments.positive)
        for name, path in (
            ("fit", arguments.fit_data),
            ("check", arguments.data),
            ("completions", arguments.completions),
        )
        if path is not None
    }
    model, tokenizer, _ = _load(arguments.model)
    evidence = check_card(
        card, model, tokenizer, examples["fit"], examples["check"], completions=examples.get("completions"),
        measures={name: getattr(measures, name)() for name in arguments.measure}, sae=_sae(arguments.sae, model),
        seed=arguments.seed,
        command="interp-rlhf " + shlex.join(sys.argv[1:]), progress=True,
    )  # fmt: skip
    write_atomically(card.path, with_evidence(card.path.read_text(encoding="utf-8"), evidence).encode())
    checked = load_card(card.path).card
    reasons = gate(checked)
    if arguments.json:
        print(json.dumps({"card": str(card.path), "passed": not reasons, "reasons": reasons, **evidence.model_dump()}))
    else:
        _print_findings("held out", evidence.held_out)
        if evidence.completions is not None:
            _print_findings("the model's own completions", evidence.completions)
        print(
            f"\n{card.path}: " + ("may be a reward" if not reasons else "may be a monitor only: " + "; ".join(reasons))
        )
    return int(bool(reasons) and checked.role != "monitor")


def drift_compare(arguments: argparse.Namespace) -> int:
    """`interp-rlhf drift compare`."""
    from .concepts.examples import load_examples
    from .drift.compare import compare_checkpoints, crossed, load_texts, parse_limits
    from .runlog import jsonable

    limits = parse_limits(arguments.max, arguments.min, arguments.fail_on)
    texts = load_texts(arguments.texts) if arguments.texts else None
    labelled = load_examples(arguments.labelled, arguments.positive) if arguments.labelled else None
    event, verdict = compare_checkpoints(
        _path(arguments.before), _path(arguments.after), texts=texts, hook_points=arguments.hook_point,
        monitors=arguments.monitor, labelled=labelled, seed=arguments.seed,
    )  # fmt: skip
    problems = crossed(event, verdict, limits)
    if arguments.json:
        said = {"verdict": verdict.name, "because": verdict.because, "next": verdict.next}
        print(json.dumps(jsonable({**said, "crossed": problems, **event})))
        return int(bool(problems))
    print(f"{event['texts']} texts, {event['tokens']} tokens")
    names = list(dict.fromkeys(name for part in event["hook_points"].values() for name in part))
    width = max(map(len, event["hook_points"]))
    print(" " * width, *(f"{name:>14}" for name in names))
    for point, part in event["hook_points"].items():
        print(f"{point:>{width}}", *(f"{part[name]:>14.4g}" for name in names))
    print("output: " + ", ".join(f"{name} {value:.4g}" for name, value in event["output"].items()))
    for name, part in event["monitors"].items():
        print(f"{name} at {part['hook_point']}: moved by {part['shift']:+.2f} standard deviations")
        for way in ("frozen", "restandardized", "refitted"):
            if f"{way}_auroc" in part:
                low, high = part[f"{way}_interval"]
                change = part[f"{way}_change"]
                print(f"{way:>16} AUROC {part[f'{way}_auroc']:.3f} [{low:.3f}, {high:.3f}], "
                      f"change {change[0]:+.3f} [{change[1]:+.3f}, {change[2]:+.3f}]")  # fmt: skip
    print(f"\nverdict: {verdict.name}")
    for reason in verdict.because:
        print(f"  - {reason}")
    print(f"next: {verdict.next}")
    for problem in problems:
        print(f"limit crossed: {problem}")
    return int(bool(problems))


def report(arguments: argparse.Namespace) -> int:
    """`interp-rlhf report`."""
    from .report import write_model_card, write_report

    for path in write_report(arguments.runs, Path(arguments.out), title=arguments.title):
        if path.suffix != ".svg":
            print(path)
    if arguments.model_card:
        print(write_model_card(arguments.runs, Path(arguments.model_card)))
    return 0


def recipes_copy(arguments: argparse.Namespace) -> int:
    """`interp-rlhf recipes copy`."""
    from .concepts.card import locate

    source = locate("recipes/README.md").parent
    target = Path(arguments.folder) / "recipes"
    files = sorted(f for f in source.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    changed = [
        str(target / f.relative_to(source))
        for f in files
        if (there := target / f.relative_to(source)).exists() and there.read_bytes() != f.read_bytes()
    ]
    if changed and not arguments.force:
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in changed)} – expected no file that differs from the package's: "
            "nothing was copied. "
            "Choose another folder, or pass --force to overwrite."
        )
    for file in files:
        there = target / file.relative_to(source)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(file.read_bytes())
    if arguments.json:
        print(json.dumps({"folder": str(target), "files": [str(f.relative_to(source)) for f in files]}))
        return 0
    print(f"{len(files)} files in {target}; {target / 'README.md'} says what each recipe asks and what to look at")
    print(f"next: cd {shlex.quote(str(target.parent))} && accelerate launch --config_file recipes/accelerate_configs/cpu.yaml "
          "recipes/dpo.py --config recipes/keep_a_concept/dpo/config_anchor.yaml")  # fmt: skip
    return 0


def _path(name: str) -> str:
    """The embedded model by its name; anything else as it is."""
    from .recipe import EMBEDDED

    if name != EMBEDDED:
        return name
    from .demo.model import default_model

    return str(default_model())


def _sae(source: str | None, model: Any) -> Any:
    """The autoencoder that an argument names, resolved on the model."""
    from .concepts.sae.files import load_sae

    return None if source is None else load_sae(source, model=model)


def _indices(given: str | None) -> list[int] | None:
    """Latents of an argument, `12,80`."""
    try:
        return None if given is None else [int(index) for index in given.split(",")]
    except ValueError:
        raise ValueError(f"`--latents {given}` – expected numbers such as 12,80.") from None


def _load(name: str | None) -> tuple[Any, Any, str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .demo.model import MODEL_ID, default_model

    path = name or str(default_model())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path), name or MODEL_ID


def _print_findings(title: str, found: Any) -> None:
    print(f"\n{title}: {found.examples} examples, {found.positives} positive")
    rows = {"probe": found.probe, "TF-IDF": found.tfidf, "length": found.length, "punctuation": found.punctuation}
    for name, estimate in (rows | {"embedding probe": found.embedding} | found.measures).items():
        print(f"{name:>20}  AUROC {estimate.auroc:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]")
    controls = {
        "permuted labels": found.permutation, "random directions": found.random_direction,
        "random dictionaries": found.random_dictionary,
    }  # fmt: skip
    for name, control in controls.items():
        if control is not None:
            print(f"{name:>20}  AUROC {control.mean:.3f}, 95th percentile {control.p95:.3f} of {control.repeats}")
    if found.sae is not None:
        print(
            f"{'autoencoder here':>20}  explained variance {found.sae.explained_variance:.3f}, L0 {found.sae.l0:.1f}, "
            f"{found.sae.dead_fraction:.1%} of {found.sae.latents} latents never on in {found.sae.tokens} tokens"
        )


def _gain(name: str, gain: dict[str, Any]) -> str:
    return f"{name} {gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"
