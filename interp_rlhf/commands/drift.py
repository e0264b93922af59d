"""`interp-rlhf drift`: compare two checkpoints.

In: parsed arguments. Out: text on the terminal, exit codes. The comparison and its limits are in `drift.compare`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..concepts.card import load_card
from ..concepts.examples import load_examples
from ..concepts.readout import Readout
from ..drift.compare import compare_checkpoints, crossed, load_texts, loaded_second, parse_limits
from ..embedded import place_of
from ..runlog.log import jsonable
from ..validation.causal import causal_check
from ..validation.contrast_pairs import load_pairs
from .causal import causal_inputs, directions_at
from .causal_lines import causal_lines
from .console import print_aligned

if TYPE_CHECKING:
    import argparse

    from ..concepts.causal_findings import CausalFindings
    from ..drift.verdicts import Verdict


def drift_compare(arguments: argparse.Namespace) -> int:
    """`interp-rlhf drift compare`."""
    limits = parse_limits(arguments.max, arguments.min, arguments.fail_on)
    asked = _causal_again(arguments)
    texts = load_texts(arguments.texts) if arguments.texts else None
    labelled = load_examples(arguments.labelled, arguments.positive) if arguments.labelled else None
    pairs = load_pairs(arguments.patch) if arguments.patch else None
    drift, verdict = compare_checkpoints(
        place_of(arguments.before), place_of(arguments.after), texts=texts, hook_points=arguments.hook_point,
        monitors=arguments.monitor, labelled=labelled, pairs=pairs, seed=arguments.seed,
    )  # fmt: skip
    problems = crossed(drift, verdict, limits)
    event = drift.fields()
    causal = {} if asked is None else _causal_of(arguments, asked)
    if arguments.json:
        judged = {"verdict": verdict.name, "because": verdict.because, "next": verdict.next}
        found = {name: {"before": before, "after": after.model_dump()} for name, (before, after) in causal.items()}
        print(json.dumps(jsonable({**judged, "crossed": problems, **event, **({"causal": found} if asked else {})})))
    else:
        _print_event(event)
        for name, (before, after) in causal.items():
            print(f"\n{name} on {arguments.after}; its card says: {before or 'not checked'}")
            print("\n".join(causal_lines(after)))
        if "patching" in event:
            _print_patching_between(event["patching"])
        _print_verdict(verdict, problems)
    return int(bool(problems))


def _causal_again(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Keywords of the causal check on the second model; None if none is asked for."""
    if arguments.prompts is None and arguments.causal_pairs is None:
        return None
    if not arguments.monitor:
        raise ValueError("`--prompts` or `--causal-pairs` is given without `--monitor` – expected the card to check.")
    return causal_inputs(arguments)


def _causal_of(arguments: argparse.Namespace, asked: dict[str, Any]) -> dict[str, tuple[str | None, CausalFindings]]:
    """Card to the verdict that it holds, and the findings on the second model."""
    model, tokenizer = loaded_second(place_of(arguments.before), place_of(arguments.after))
    verdicts: dict[str, tuple[str | None, CausalFindings]] = {}
    for path in arguments.monitor:
        card = load_card(path)
        readout = Readout.from_card(card)
        of_card = {**asked, "foreign": directions_at(readout.hook_point, asked["foreign"]), "progress": True}
        held = card.card.causal.verdict if card.card.causal is not None else None
        verdicts[card.card.name] = held, causal_check(readout, model, tokenizer, trained=True, **of_card)
    return verdicts


def _print_event(event: dict[str, Any]) -> None:
    print(f"{event['texts']} texts, {event['tokens']} tokens")
    names = list(dict.fromkeys(name for numbers in event["hook_points"].values() for name in numbers))
    width = max(map(len, event["hook_points"]))
    print(" " * width, *(f"{name:>14}" for name in names))
    for point, numbers in event["hook_points"].items():
        print(f"{point:>{width}}", *(f"{numbers[name]:>14.4g}" for name in names))
    print("output: " + ", ".join(f"{name} {value:.4g}" for name, value in event["output"].items()))
    for name, numbers in event["monitors"].items():
        print(f"{name} at {numbers['hook_point']}: moved by {numbers['shift']:+.2f} standard deviations")
        for way in ("frozen", "restandardized", "refitted"):
            if f"{way}_auroc" in numbers:
                low, high = numbers[f"{way}_interval"]
                change = numbers[f"{way}_change"]
                print(f"{way:>16} AUROC {numbers[f'{way}_auroc']:.3f} [{low:.3f}, {high:.3f}], "
                      f"change {change[0]:+.3f} [{change[1]:+.3f}, {change[2]:+.3f}]")  # fmt: skip


def _print_patching_between(patching: dict[str, Any]) -> None:
    """The sites that carry most of what the training changed, by group."""
    print(
        f"\nthe tuned model's activations in its base, by {patching['metric']}, over {len(patching['evidence'])} pairs"
    )
    for group in patching["exact"]:
        rows = [
            [one["hook_point"], f"{one['exact']:+.3f}", f"{one['attribution']:+.3f}", ""] for one in group["sites"][:5]
        ]
        print_aligned([group["group"], "exact", "attribution", ""], rows)


def _print_verdict(verdict: Verdict, problems: list[str]) -> None:
    print(f"\nverdict: {verdict.name}")
    for reason in verdict.because:
        print(f"  - {reason}")
    print(f"next: {verdict.next}")
    for problem in problems:
        print(f"limit crossed: {problem}")
