"""`interp-rlhf drift`: compare two checkpoints.

In: parsed arguments. Out: text on the terminal, exit codes. The comparison and its limits are in `drift.compare`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..concepts.examples import load_examples
from ..drift.compare import compare_checkpoints, crossed, load_texts, parse_limits
from ..embedded import place_of
from ..runlog.log import jsonable
from ..validation.contrast_pairs import load_pairs
from .console import print_aligned

if TYPE_CHECKING:
    import argparse

    from ..drift.verdicts import Verdict


def drift_compare(arguments: argparse.Namespace) -> int:
    """`interp-rlhf drift compare`."""
    limits = parse_limits(arguments.max, arguments.min, arguments.fail_on)
    texts = load_texts(arguments.texts) if arguments.texts else None
    labelled = load_examples(arguments.labelled, arguments.positive) if arguments.labelled else None
    pairs = load_pairs(arguments.patch) if arguments.patch else None
    drift, verdict = compare_checkpoints(
        place_of(arguments.before), place_of(arguments.after), texts=texts, hook_points=arguments.hook_point,
        monitors=arguments.monitor, labelled=labelled, pairs=pairs, seed=arguments.seed,
    )  # fmt: skip
    problems = crossed(drift, verdict, limits)
    event = drift.fields()
    if arguments.json:
        judged = {"verdict": verdict.name, "because": verdict.because, "next": verdict.next}
        print(json.dumps(jsonable({**judged, "crossed": problems, **event})))
    else:
        _print_event(event)
        if "patching" in event:
            _print_patching_between(event["patching"])
        _print_verdict(verdict, problems)
    return int(bool(problems))


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
