"""What the command line does: one function per command, from parsed arguments to an exit code."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse


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
    from .concepts.fitting import fit_probe, sweep_points
    from .concepts.publish import plot_sweep, publish, require_new

    latents = _indices(arguments.latents)
    if (arguments.kind == "sae_latents") != (arguments.sae is not None and latents is not None):
        raise ValueError(
            f"`--kind` is {arguments.kind}, `--sae` {arguments.sae}, `--latents` {arguments.latents} – expected both with "
            "`--kind sae_latents`, and neither otherwise."
        )
    if arguments.kind == "sae_latents" and arguments.sweep is not None:
        raise ValueError(
            "`--sweep` is given with `--kind sae_latents` – expected none: the autoencoder reads at one place."
        )
    if latents is not None and len(set(latents)) < len(latents):
        raise ValueError(f"`--latents {arguments.latents}` names one twice – expected each once.")
    require_new(
        arguments.out, name=arguments.name, role=arguments.role, version=arguments.version, weight=arguments.weight
    )
    if arguments.sweep is not None and arguments.sweep < 1:
        raise ValueError(f"`--sweep` is {arguments.sweep} – expected every how many layers to look at, at least 1.")
    examples = load_examples(arguments.data, arguments.positive)
    model, tokenizer, model_id = _load(arguments.model)
    every = 3 if arguments.sweep is None else arguments.sweep
    points = [arguments.hook_point] if arguments.hook_point is not None else sweep_points(model, every)
    fit = fit_probe(
        model, tokenizer, examples, points, model_id=model_id, kind=arguments.kind, method=arguments.method,
        pooling=_fitted_for(arguments.pooling), sae=_sae_of(arguments, model), latents=latents, seed=arguments.seed,
        regularization=arguments.regularization, progress=True,
    )  # fmt: skip
    path = publish(
        fit, arguments.out, name=arguments.name, concept=arguments.concept or arguments.name, role=arguments.role,
        version=arguments.version, pooling=None if arguments.pooling == "best" else arguments.pooling, weight=arguments.weight,
    )  # fmt: skip
    card = load_card(path).card
    curve = [
        {
            "hook_point": p.hook_point, "pooling": p.pooling, "auroc": round(p.auroc, 4), "std": round(p.std, 4),
            "log_loss": round(p.log_loss, 4),
        } for p in fit.curve
    ]  # fmt: skip
    if arguments.json:
        print(
            json.dumps(
                {
                    "card": str(path),
                    "hook_point": card.readout.hook_point,
                    "pooling": card.readout.pooling,
                    "examples": len(examples),
                    "sweep": curve,
                }
            )
        )
        return 0
    if curve:
        figure = path.with_suffix(".sweep.svg")
        plot_sweep(fit.curve, figure, f"{arguments.name}: cross-validated on {len(examples)} examples")
        for point in fit.curve:
            chosen = point.hook_point == card.readout.hook_point and point.pooling == fit.artifact.header.pooling
            mark = "  ← chosen" if chosen else ""
            print(f"{point.hook_point:>32}  {point.pooling:>9}  AUROC {point.auroc:.3f} ± {point.std:.3f}{mark}")
        print(f"curve: {figure}")
    print(f"card: {path} ({card.readout.pooling} pooling at {card.readout.hook_point}, {len(examples)} examples)")
    print(f"next: interp-rlhf probe check {path} --fit-data {arguments.data} --data HELD_OUT")
    return 0


def _fitted_for(pooling: str | None) -> str | list[str]:
    """What to fit for, of `--pooling`: moving averages and maxima are read with what is fitted for the mean."""
    from .concepts.pooling import FITTED

    return list(FITTED) if pooling == "best" else pooling if pooling in FITTED else "mean"


def probe_canaries(arguments: argparse.Namespace) -> int:
    """`interp-rlhf probe canaries`."""
    from .concepts.card import load_card
    from .concepts.publish import with_canaries

    card = load_card(arguments.card)
    model, tokenizer, _ = _load(arguments.model)
    path = with_canaries(card, model, tokenizer)
    if arguments.json:
        print(json.dumps({"card": str(path), "version": load_card(path).card.version}))
        return 0
    print(f"card: {path}, with canaries and without evidence")
    print(f"next: interp-rlhf probe check {path} --fit-data FIT --data HELD_OUT")
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
        measures={name: getattr(measures, name)() for name in arguments.measure}, sae=_sae_of(arguments, model),
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
    from .runlog.log import jsonable

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


def sae_train(arguments: argparse.Namespace) -> int:
    """`interp-rlhf sae train`."""
    from .activations.hook_points import hidden_size, resolve
    from .concepts.artifact import write_atomically
    from .sae.held_out import check_other_contexts, check_other_texts, evaluate
    from .sae.stream import cut, load_corpus
    from .sae.train import SaeTraining, check_folder, train_sae

    settings = {
        "hook_point": arguments.hook_point, "k": arguments.k,
        "latents": arguments.k if arguments.latents is None else arguments.latents,
        "epochs": 20.0 if arguments.epochs is None and arguments.tokens is None else arguments.epochs,
    }  # fmt: skip
    names = (
        "architecture", "tokens", "batch_tokens", "learning_rate", "warm_up", "decay", "aux_k", "dead_after", "context",
        "buffer", "checkpoint_every", "seed",
    )  # fmt: skip
    settings |= {name: getattr(arguments, name) for name in names}
    SaeTraining(**settings)  # before a minute is spent on anything else
    out = Path(arguments.out)
    check_folder(out, arguments.resume, arguments.cache)
    before = _training_before(out) if (out / "sae").exists() else {}
    texts, other = load_corpus(arguments.data), load_corpus(arguments.eval) if arguments.eval else None
    if other is not None:
        check_other_texts(texts, other)
    model, tokenizer, model_id = _load(arguments.model)
    resolve(model, arguments.hook_point)
    settings["latents"] = 4 * hidden_size(model) if arguments.latents is None else arguments.latents
    config = SaeTraining(**settings)
    contexts = cut(texts, tokenizer, config.context)
    held_out = None
    if other is not None:
        held_out = cut(other, tokenizer, config.context)
        check_other_contexts(contexts.fingerprint, held_out)
        held_out = held_out.spread(arguments.eval_tokens)
    sae = train_sae(
        model, tokenizer, contexts, config, out, cache=arguments.cache, cache_type=arguments.cache_type,
        resume=arguments.resume, model_id=model_id,
    )  # fmt: skip
    trained = sae.spec.source["metadata"]
    command = "interp-rlhf " + shlex.join(sys.argv[1:])
    result: dict[str, Any] = {
        "sae": str(out / "sae"), "model": model_id, "data": arguments.data, "tokens_of_data": contexts.tokens,
        **{name: trained[name] for name in ("training", "tokens", "fvu", "l0", "dead_fraction")},
        "seconds": {"training": trained["seconds"]}, "command": command, "versions": trained["versions"],
    }  # fmt: skip
    result |= before | {"sae": result["sae"]}  # of a training that was done, what was measured then
    if held_out is not None:
        started = time.monotonic()
        found = evaluate(sae, model, held_out, config.k, cache=arguments.cache, cache_type=arguments.cache_type)
        result["eval"] = {"data": arguments.eval, **found.entry()}
        result["seconds"] = {**result["seconds"], "eval": round(time.monotonic() - started, 1)}
        if result["command"] != command:
            result["eval"]["command"] = command
    path = out / "training.json"
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
    if arguments.json:
        print(json.dumps(result))
        return 0
    print(f"{sae.size} latents at {config.hook_point}, {trained['tokens']} activations: FVU {trained['fvu']:.3f}")
    if held_out is not None:
        pca = "" if found.pca is None else f", PCA of the training text {found.pca:.3f}"
        print(
            f"on {found.tokens} other tokens: explained variance {found.explained_variance:.3f}, L0 {found.l0:.1f}, "
            f"{found.dead_fraction:.1%} of latents dead; with {config.k} numbers{pca}, PCA of these tokens {found.pca_here:.3f}"
        )
    print(f"{result['sae']} and {path}")
    print(f"next: interp-rlhf sae inspect {shlex.quote(result['sae'])} --texts TEXTS")
    return 0


def _training_before(out: Path) -> dict[str, Any]:
    """What the command wrote of a training that is done; nothing where it was stopped before that."""
    path = out / "training.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"`{path}` is not JSON ({error}) – expected what was measured. Mend or delete it.") from None
    if not isinstance(found, dict) or not isinstance(found.get("seconds", {}), dict):
        raise ValueError(
            f"`{path}` is not what `sae train` writes – expected an object with `seconds`. Mend or delete it."
        )
    return found


def sae_inspect(arguments: argparse.Namespace) -> int:
    """`interp-rlhf sae inspect`."""
    from .concepts.examples import load_examples
    from .concepts.readout import Readout
    from .drift.compare import load_texts
    from .runlog.log import jsonable
    from .sae.reading import Reading
    from .validation.inspecting import inspect_latents

    started, out = time.monotonic(), _html(arguments.out)
    how = Reading(context_length=arguments.context_length, window=arguments.window)
    texts, chosen = load_texts(arguments.texts), _indices(arguments.latents)
    labelled = load_examples(arguments.labelled, arguments.positive) if arguments.labelled else None
    readouts = [Readout.from_card(path) for path in arguments.probe]
    drawn = arguments.random is not None
    top = arguments.random if drawn else 20 if arguments.top is None else arguments.top
    model, tokenizer, model_id = _load(arguments.model)
    found = inspect_latents(
        model, tokenizer, _sae_of(arguments, model), texts, latents="random" if drawn else chosen,
        top=top, contexts=arguments.contexts, labelled=labelled, readouts=readouts, seed=arguments.seed,
        whole=not arguments.only_chosen, how=how, progress=not arguments.json,
    )  # fmt: skip
    files = _write_latents(arguments, model_id, "latents", found.event(), started, out)
    if arguments.json:
        print(json.dumps(jsonable({**found.event(), "files": files})))
        return 0
    if found.whole is not None:
        whole = found.whole
        print(f"{whole.texts} texts, {whole.tokens} tokens: FVU {whole.fvu:.3f}, L0 {whole.l0:.1f}, "
              f"dead {100 * whole.dead:.1f} %")  # fmt: skip
    columns = ["latent", "density", "mean on", "maximum", *(f"cos {readout.name}" for readout in readouts)]
    columns += ["precision", "recall", "AUROC"] if labelled is not None else []
    rows = []
    for page in found.pages:
        where = page.contexts
        row = [str(page.index), f"{100 * where.density:.3g} %", f"{where.mean:.3g}", f"{where.maximum:.3g}"]
        row += [f"{value:+.2f}" for value in page.cosines.values()]
        if page.detection is not None:
            precision = page.detection.precision
            row += ["–" if precision is None else f"{precision:.2f}", f"{page.detection.recall:.2f}"]
            row += [f"{page.detection.auroc[0]:.2f}"]
        rows.append([*row, " ".join(repr(promoted.piece) for promoted in page.promoted[:5])])
    _print_aligned([*columns, "promotes"], rows)
    print(f"\nchosen: {found.chosen}\npage: {files[-1]}")
    return 0


def sae_find(arguments: argparse.Namespace) -> int:
    """`interp-rlhf sae find`."""
    from dataclasses import replace

    from .concepts.examples import make_examples
    from .drift.compare import load_texts
    from .runlog.log import jsonable
    from .validation.finding import find_latents

    started, out = time.monotonic(), None if arguments.out is None else _html(arguments.out)
    rows = [
        {**(text if isinstance(text, dict) else {"text": text}), "label": label}
        for label, path in ((1, arguments.positive), (0, arguments.negative))
        for text in load_texts(path)
    ]
    examples = make_examples(rows, source=f"{arguments.positive} and {arguments.negative}")
    names = Path(arguments.negative).stem, Path(arguments.positive).stem
    names = names if names[0] != names[1] else ("negative", "positive")
    model, tokenizer, model_id = _load(arguments.model)
    found = find_latents(
        model, tokenizer, _sae_of(arguments, model), replace(examples, label_names=names), arguments.held_out_fraction,
        top=arguments.top, seed=arguments.seed, progress=not arguments.json,
    )  # fmt: skip
    files = [] if out is None else _write_latents(arguments, model_id, "latents_found", found.event(), started, out)
    if arguments.json:
        print(json.dumps(jsonable({**found.event(), "files": files})))
        return 0
    print(f"{found.examples[0]} examples to choose on, {found.examples[1]} to report on; {found.pooling} over tokens; "
          f"L0 {found.l0:.1f}")  # fmt: skip
    table = [
        [f"latent {one.index}", names[one.sign == 1], f"{one.fit_auroc:.3f}", _bounds(one.held_out), ""]
        for one in found.latents
    ]
    table.append(["dense probe", "", "", _bounds(found.probe), _bounds(found.less_probe, "+")])
    table.append(["TF-IDF", "", "", _bounds(found.tfidf), _bounds(found.less_tfidf, "+")])
    best = max(found.random)
    for number, one in enumerate(found.random, 1):
        less = _bounds(found.less_random, "+") if one == best else ""
        table.append([f"random dictionary {number}", "", "", _bounds(one), less])
    _print_aligned(["what", "higher on", "AUROC fit", "AUROC held out", "best latent less this"], table)
    if files:
        print(f"\npage: {files[-1]}")
    return 0


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
            "nothing was copied. Choose another folder, or pass --force to overwrite."
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
    from .embedded import default_model

    return str(default_model())


def _indices(given: str | None) -> list[int] | None:
    """Latents of an argument, `12,80`."""
    try:
        return None if given is None else [int(index) for index in given.split(",")]
    except ValueError:
        raise ValueError(f"`--latents {given}` – expected numbers such as 12,80.") from None


def _sae_of(arguments: argparse.Namespace, model: Any) -> Any:
    """The autoencoder that arguments name, resolved on the model; None where they name none."""
    from .sae.files import load_sae

    where = {name: getattr(arguments, name) for name in ("revision", "subfolder", "hook_point")}
    return None if arguments.sae is None else load_sae(arguments.sae, model=model, **where)


def _html(path: str) -> Path:
    """Where a page goes, looked at before the work."""
    from .report.page import require_own_pages

    out = Path(path)
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise ValueError(f"`--out` is `{path}` – expected an HTML file, such as `{out.with_suffix('.html')}`.")
    _require_own(out.with_name(f"{out.stem}.events.jsonl"))
    require_own_pages(out)
    return out


def _require_own(log: Path) -> None:
    """Refuses to replace a log that `sae inspect` or `sae find` did not write."""
    if not log.exists():
        return
    try:
        first = json.loads(log.read_text(encoding="utf-8").split("\n", 1)[0])
    except ValueError:
        first = None
    if not isinstance(first, dict) or first.get("arm") not in ("sae inspect", "sae find"):
        raise ValueError(
            f"`{log}` would be replaced, and this command did not write it – expected no such file. Pass another `--out`, or "
            "move it away."
        )


def _write_latents(
    arguments: argparse.Namespace, model_id: str, name: str, event: dict[str, Any], started: float, out: Path
) -> list[str]:
    """The event's log and its page, anew; the page is the last of the files."""
    from .report import write_report
    from .runlog.log import RunLog

    log = RunLog(out.with_name(f"{out.stem}.events.jsonl"))
    _require_own(log.path)
    log.path.unlink(missing_ok=True)
    command = f"sae {arguments.run.removeprefix('sae_')}"
    left_out = ("run", "json", "out")
    given = {key: value for key, value in vars(arguments).items() if key not in left_out}
    settings = {key: value for key, value in given.items() if value is not None and value != [] and value is not False}
    log.append("run", title=f"Latents of {arguments.sae}", arm=command, model=model_id, settings=settings)
    log.append(name, **event)
    log.append("end", seconds=round(time.monotonic() - started, 3))
    return [str(log.path), *map(str, write_report(log.path, out))]


def _print_aligned(columns: list[str], rows: list[list[str]]) -> None:
    """A table on the terminal, the last column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns) - 1)]
    for row in [columns, *rows]:
        print("  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))


def _bounds(interval: tuple[float, float, float], sign: str = "") -> str:
    value, low, high = (format(number, f"{sign}.3f") for number in interval)
    return f"{value} [{low}, {high}]" if math.isfinite(interval[1]) else f"{value} (not enough prompts)"


def _load(name: str | None) -> tuple[Any, Any, str]:
    from .activations.loading import adapter_base, load_model, load_tokenizer
    from .embedded import MODEL_ID, default_model

    path = name or str(default_model())
    base = adapter_base(path)
    return load_model(path), load_tokenizer(path, *([base] if base else [])), name or MODEL_ID


def _print_findings(title: str, found: Any) -> None:
    near = f", {found.near_duplicates} nearly rows of the fit" if found.near_duplicates else ""
    print(f"\n{title}: {found.examples} examples, {found.positives} positive{near}")
    if found.adds is None:
        print(f"{'the probe adds':>28}  not enough prompts to say")
    else:
        a = found.adds
        print(
            f"{'the probe adds':>28}  AUROC {_bounded(a.auroc, '+')} to {a.auroc_without:.3f} of all baselines, "
            f"saves {_bounded(a.log_loss, '+')} nats of {a.log_loss_without:.3f}"
        )
    rows = {"probe": found.probe, "TF-IDF": found.tfidf, "length": found.length, "punctuation": found.punctuation}
    rows |= {"embedding probe": found.embedding} | {f"likelihood, {how}": e for how, e in found.likelihood.items()}
    if found.prompt is not None:
        rows |= {
            "TF-IDF of the prompt": found.prompt.tfidf, "TF-IDF of both": found.prompt.tfidf_with_completion,
            "probe at the prompt's end": found.prompt.probe, "probe, other answers": found.prompt.other_answers,
            f"probe within {found.prompt.prompts_with_both_labels} prompts": found.prompt.within,
        }  # fmt: skip
    for name, estimate in (rows | found.measures).items():
        if estimate is not None:
            print(f"{name:>28}  AUROC {_bounded(estimate)}")
    if found.prompt is not None and found.prompt.answer_share is not None:
        print(f"{'of the answer':>28}  {_bounded(found.prompt.answer_share)} of the score's variance under one prompt")
    if (c := found.calibration) is not None:
        slope = "labels are separated" if c.slope is None else f"slope {c.slope:.2f}, intercept {c.intercept:+.2f}"
        print(f"{'calibration':>28}  {slope}, Brier score {c.brier:.3f}, log-loss {c.log_loss:.3f}")
    controls = {
        "permuted labels": found.permutation, "random directions": found.random_direction,
        "random dictionaries": found.random_dictionary,
    }  # fmt: skip
    for name, control in controls.items():
        if control is not None:
            print(f"{name:>28}  AUROC {control.mean:.3f}, 95th percentile {control.p95:.3f} of {control.repeats}")
    if found.sae is not None:
        print(
            f"{'autoencoder here':>28}  explained variance {found.sae.explained_variance:.3f}, L0 {found.sae.l0:.1f}, "
            f"{found.sae.dead_fraction:.1%} of {found.sae.latents} latents never on in {found.sae.tokens} tokens"
        )


def _bounded(found: Any, sign: str = "") -> str:
    value = found.auroc if hasattr(found, "auroc") else found.value
    if found.low is None:
        return f"{value:{sign}.3f} (not enough prompts for an interval)"
    return f"{value:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def _gain(name: str, gain: dict[str, Any]) -> str:
    return f"{name} {gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"
