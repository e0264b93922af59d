"""`interp-rlhf probe`: fit a probe, check its card, add canaries to an older card.

In: parsed arguments. Out: cards and artifacts on disk, text on the terminal, exit codes. Fitting and checking are in `concepts`
and `validation`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..activations.hook_points import decoder_layers
from ..concepts.artifact import write_atomically
from ..concepts.card import load_card, with_evidence
from ..concepts.examples import load_examples
from ..concepts.fitting import fit_probe, sweep_points
from ..concepts.pooling import FITTED, POOLINGS
from ..concepts.publish import publish, require_new, with_canaries
from ..concepts.sweep_plot import plot_sweep
from ..embedded import load_or_embedded
from ..sae.files import load_sae
from ..validation.attributed import attributed_layer
from ..validation.check import check_card
from ..validation.contrast_pairs import load_pairs
from ..validation.gate import gate
from ..validation.measures import MEASURES
from .causal import causal_inputs, checked_causally
from .causal_lines import causal_lines
from .evidence_lines import print_findings
from .options import autoencoder_place, latent_numbers, registered, typed_command

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from ..concepts.card import Card
    from ..concepts.examples import Examples
    from ..concepts.fitting import Fit
    from ..sae.autoencoder import SparseAutoencoder
    from ..validation.attributed import AttributedLayer


def probe_fit(arguments: argparse.Namespace) -> int:
    """`interp-rlhf probe fit`."""
    latents = latent_numbers(arguments.latents)
    _require_options_that_fit(arguments, latents)
    require_new(
        arguments.out, name=arguments.name, role=arguments.role, version=arguments.version, weight=arguments.weight
    )
    examples = load_examples(arguments.data, arguments.positive)
    fit, layer = _fit_as_asked(arguments, latents, examples)
    path = publish(
        fit, arguments.out, name=arguments.name, concept=arguments.concept or arguments.name, role=arguments.role,
        version=arguments.version, pooling=None if arguments.pooling == "best" else arguments.pooling, weight=arguments.weight,
    )  # fmt: skip
    card = load_card(path).card
    if arguments.json:
        print(json.dumps(_fit_entry(fit, path, card, len(examples)) | _two_places(fit, layer)))
    else:
        _print_fit(arguments, fit, path, card, len(examples))
        _print_two_places(_two_places(fit, layer))
    return 0


def _require_options_that_fit(arguments: argparse.Namespace, latents: list[int] | None) -> None:
    """Raises `ValueError` if options of `probe fit` contradict each other. It runs before anything is loaded."""
    if (arguments.kind == "sae_latents") != (arguments.sae is not None and latents is not None):
        raise ValueError(
            f"`--kind` is {arguments.kind}, `--sae` {arguments.sae}, `--latents` {arguments.latents} – expected both with "
            "`--kind sae_latents`, and neither otherwise."
        )
    if arguments.kind == "sae_latents" and arguments.sweep is not None:
        raise ValueError(
            "`--sweep` is given with `--kind sae_latents` – expected none: the autoencoder reads at one place."
        )
    attributed = arguments.at == "attributed"
    if attributed != (arguments.pairs is not None) or (attributed and (arguments.hook_point or latents)):
        raise ValueError(
            f"`--at` is {arguments.at}, with{'' if arguments.pairs else 'out'} `--pairs` – expected `--at attributed` with "
            "`--pairs`, and then neither `--hook-point` nor `--latents`: the pairs choose the place."
        )
    if latents is not None and len(set(latents)) < len(latents):
        raise ValueError(f"`--latents {arguments.latents}` names one twice – expected each once.")
    if arguments.pooling not in (None, "best"):
        registered(POOLINGS, "--pooling", arguments.pooling)
    if arguments.sweep is not None and arguments.sweep < 1:
        raise ValueError(f"`--sweep` is {arguments.sweep} – expected every how many layers to look at, at least 1.")


def _fit_as_asked(
    arguments: argparse.Namespace, latents: list[int] | None, examples: Examples
) -> tuple[Fit, AttributedLayer | None]:
    """The fit, and the layer that attribution chose if it was asked to."""
    pairs = None if arguments.pairs is None else load_pairs(arguments.pairs)
    model, tokenizer, model_id = load_or_embedded(arguments.model)
    every = 3 if arguments.sweep is None else arguments.sweep
    points = [arguments.hook_point] if arguments.hook_point is not None else sweep_points(model, every)
    layer = None
    if pairs is not None:
        layer = attributed_layer(model, tokenizer, pairs, seed=arguments.seed, progress=True)
        points = [point for point in decoder_layers(model) if point in {*points, layer.hook_point}]
    fit = partial(
        fit_probe, model, tokenizer, examples, model_id=model_id, kind=arguments.kind, method=arguments.method,
        pooling=_poolings_to_fit(arguments.pooling), sae=_sae_of(arguments, model), latents=latents,
        seed=arguments.seed, regularization=arguments.regularization, progress=True,
    )  # fmt: skip
    swept = fit(points)
    if layer is None or swept.artifact.header.hook_point == layer.hook_point:
        return swept, layer
    return replace(fit(layer.hook_point), curve=swept.curve), layer


def _two_places(fit: Fit, layer: AttributedLayer | None) -> dict[str, Any]:
    """Where the concept acts and where it is decoded best, with the cross-validated AUROC of both."""
    if layer is None or not fit.curve:
        return {}
    best = max(fit.curve, key=lambda point: point.auroc)
    there = max((point for point in fit.curve if point.hook_point == layer.hook_point), key=lambda point: point.auroc)
    return {
        "attributed": {**asdict(layer), "auroc": round(there.auroc, 4)},
        "decoded_best": {"hook_point": best.hook_point, "auroc": round(best.auroc, 4)},
    }


def _print_two_places(places: dict[str, Any]) -> None:
    if places:
        acts, best = places["attributed"], places["decoded_best"]
        print(
            f"the concept acts at {acts['hook_point']} (attribution {acts['chosen']:+.3f} on the choosing pairs, "
            f"{acts['attribution']:+.3f} on the others), AUROC {acts['auroc']:.3f}; it is decoded best at "
            f"{best['hook_point']}, AUROC {best['auroc']:.3f}"
        )


def _sae_of(arguments: argparse.Namespace, model: Any) -> SparseAutoencoder | None:
    return None if arguments.sae is None else load_sae(arguments.sae, model=model, **autoencoder_place(arguments))


def _poolings_to_fit(pooling: str | None) -> str | list[str]:
    """The poolings for which a probe is fitted, given `--pooling`. Poolings without their own fit use the probe of the mean."""
    return list(FITTED) if pooling == "best" else pooling if pooling in FITTED else "mean"


def _fit_entry(fit: Fit, path: Path, card: Card, examples: int) -> dict[str, Any]:
    curve = [
        {
            "hook_point": point.hook_point, "pooling": point.pooling, "auroc": round(point.auroc, 4),
            "std": round(point.std, 4), "log_loss": round(point.log_loss, 4),
        } for point in fit.curve
    ]  # fmt: skip
    return {
        "card": str(path), "hook_point": card.readout.hook_point, "pooling": card.readout.pooling, "examples": examples,
        "sweep": curve,
    }  # fmt: skip


def _print_fit(arguments: argparse.Namespace, fit: Fit, path: Path, card: Card, examples: int) -> None:
    if fit.curve:
        figure = path.with_suffix(".sweep.svg")
        plot_sweep(fit.curve, figure, f"{arguments.name}: cross-validated on {examples} examples")
        for point in fit.curve:
            chosen = point.hook_point == card.readout.hook_point and point.pooling == fit.artifact.header.pooling
            mark = "  ← chosen" if chosen else ""
            print(f"{point.hook_point:>32}  {point.pooling:>9}  AUROC {point.auroc:.3f} ± {point.std:.3f}{mark}")
        print(f"curve: {figure}")
    print(f"card: {path} ({card.readout.pooling} pooling at {card.readout.hook_point}, {examples} examples)")
    print(f"next: interp-rlhf probe check {path} --fit-data {arguments.data} --data HELD_OUT")


def probe_canaries(arguments: argparse.Namespace) -> int:
    """`interp-rlhf probe canaries`."""
    card = load_card(arguments.card)
    model, tokenizer, _ = load_or_embedded(arguments.model)
    path = with_canaries(card, model, tokenizer)
    if arguments.json:
        print(json.dumps({"card": str(path), "version": load_card(path).card.version}))
        return 0
    print(f"card: {path}, with canaries and without evidence")
    print(f"next: interp-rlhf probe check {path} --fit-data FIT --data HELD_OUT")
    return 0


def probe_check(arguments: argparse.Namespace) -> int:
    """`interp-rlhf probe check`."""
    card = load_card(arguments.card)
    if card.card.evidence is not None and not arguments.replace:
        raise ValueError(
            f"`{arguments.card}` has evidence already – expected none. Pass `--replace` to write it again."
        )
    asked = causal_inputs(arguments) if _wants_causal(arguments, card.card.role) else None
    measures = {name: registered(MEASURES, "--measure", name)() for name in arguments.measure}
    paths = {"fit": arguments.fit_data, "check": arguments.data, "completions": arguments.completions}
    examples = {
        name: load_examples(path, arguments.positive, "group" if name == "fit" else arguments.group_by)
        for name, path in paths.items() if path is not None
    }  # fmt: skip
    model, tokenizer, _ = load_or_embedded(arguments.model)
    evidence = check_card(
        card, model, tokenizer, examples["fit"], examples["check"], completions=examples.get("completions"),
        measures=measures, sae=_sae_of(arguments, model), seed=arguments.seed,
        command=typed_command(), progress=True,
    )  # fmt: skip
    write_atomically(card.path, with_evidence(card.path.read_text(encoding="utf-8"), evidence).encode())
    checked = load_card(card.path).card
    reasons = gate(checked)
    if not arguments.json:
        print_findings("held out", evidence.held_out)
        if evidence.completions is not None:
            print_findings("the model's own completions", evidence.completions)
    causal = None
    if asked is not None:  # the evidence above is on disk by now: a check that stops here loses nothing
        causal = checked_causally(load_card(card.path), model, tokenizer, asked, examples["fit"])
        reasons = gate(load_card(card.path).card, arguments.require_causal)
    if arguments.json:
        entry = {"card": str(card.path), "passed": not reasons, "reasons": reasons, **evidence.model_dump()}
        print(json.dumps(entry | {"causal": None if causal is None else causal.model_dump()}))
    else:
        if causal is not None:
            print("\n".join(causal_lines(causal)))
        print(
            f"\n{card.path}: " + ("may be a reward" if not reasons else "may be a monitor only: " + "; ".join(reasons))
        )
    return int(bool(reasons) and checked.role != "monitor")


def _wants_causal(arguments: argparse.Namespace, role: str) -> bool:
    """True if the check has a causal part: asked for, or by default for what is rewarded or punished, where there are prompts."""
    given = arguments.prompts is not None or arguments.causal_pairs is not None
    if arguments.require_causal and arguments.causal is False:
        raise ValueError("`--require-causal` is given with `--no-causal` – expected one of them.")
    if arguments.causal is None:
        return given and (role != "monitor" or arguments.require_causal)
    return bool(arguments.causal)
