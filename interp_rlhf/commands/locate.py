"""`interp-rlhf locate`: where in a model a contrast acts.

In: parsed arguments. Out: a JSON file, a run log and a page with heat maps, text on the terminal. The patching itself is in
`validation`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..concepts.artifact import write_atomically
from ..concepts.readout import Readout
from ..drift.patching_between import tuned_model
from ..embedded import EMBEDDED, load_or_embedded, place_of
from ..report.page import require_own_pages, write_report
from ..runlog.log import RunLog, jsonable
from ..validation.contrast_pairs import load_pairs
from ..validation.patching import attribution_patching
from .console import print_aligned
from .own_files import require_own_json, require_own_log

if TYPE_CHECKING:
    import argparse

    from ..validation.patching import GroupEffects, Patching

_ARM = "locate"  # the first event of its logs says so
_OWN_KEYS = ("metric", "hook_points", "attribution", "exact")


def locate_contrast(arguments: argparse.Namespace) -> int:
    """`interp-rlhf locate`."""
    started = time.monotonic()
    components, random = _components_of(arguments), _random_of(arguments.random)
    out = None if arguments.out is None else _own_folder(Path(arguments.out))
    pairs = load_pairs(arguments.pairs)
    readout = None if arguments.readout is None else Readout.from_card(arguments.readout)
    model, tokenizer, model_id = load_or_embedded(arguments.model)
    tuned = None
    if arguments.tuned is not None:
        tuned = tuned_model(place_of(arguments.model or EMBEDDED), place_of(arguments.tuned))
    patching = attribution_patching(
        model, tokenizer, pairs, components=components, metric=readout, tuned=tuned, steps=arguments.steps,
        align=arguments.align, top=arguments.top, random=random, split=None if arguments.no_split else arguments.split,
        seed=arguments.seed, per_position=arguments.per_position, progress=True,
    )  # fmt: skip
    result = jsonable(patching.to_json())
    files = [] if out is None else _write_results(arguments, model_id, result, started, out)
    if arguments.json:
        print(json.dumps({**result, "model": model_id, "files": files}))
        return 0
    _print_patching(patching)
    if files:
        print(f"\npage: {files[-1]}")
    return 0


def _components_of(arguments: argparse.Namespace) -> list[str]:
    named = [name.strip() for name in arguments.components.split(",") if name.strip()]
    return [*named, *(["heads"] if arguments.heads and "heads" not in named else [])]


def _random_of(text: str) -> int | None:
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"`--random {text}` – expected a number of sites, or all.") from None


def _own_folder(folder: Path) -> Path:
    """The output folder, checked before the work starts.

    Raises:
        `ValueError`: it is a file, or a file in it that this command would replace is of somebody else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`--out` is `{folder}`, a file – expected a folder.")
    require_own_json(folder / "locate.json", _OWN_KEYS)
    require_own_log(folder / "interp.jsonl", (_ARM,))
    require_own_pages(folder / "report.html")
    return folder


def _write_results(
    arguments: argparse.Namespace, model_id: str, result: dict[str, Any], started: float, folder: Path
) -> list[str]:
    """Write the result, the log and the page; returns their paths, the page last."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "locate.json"
    settings = {
        key: value
        for key, value in vars(arguments).items()
        if key not in ("run", "json", "out") and value is not None and value is not False
    }
    write_atomically(path, (json.dumps({"model": model_id, "settings": settings, **result}, indent=1) + "\n").encode())
    log = RunLog(folder / "interp.jsonl")
    log.path.unlink(missing_ok=True)
    log.append(
        "run", title=f"Where it acts: {Path(arguments.pairs).stem}", arm=_ARM, model=model_id, settings=settings
    )
    log.append("patching", **result)
    log.append("end", seconds=round(time.monotonic() - started, 3))
    return [str(path), str(log.path), *map(str, write_report(log.path, folder / "report.html"))]


def _print_patching(patching: Patching) -> None:
    mean = [
        sum(values[i] for i in patching.evidence) / len(patching.evidence)
        for values in (patching.clean, patching.corrupt)
    ]
    sides = ("tuned", "base") if patching.tuned else ("clean", "corrupt")
    print(
        f"{patching.metric}: {sides[0]} {mean[0]:+.3f}, {sides[1]} {mean[1]:+.3f}, over {len(patching.evidence)} pairs"
    )
    if patching.left_out:
        print(f"{patching.left_out} positions have no partner in the other prompt and are left out")
    for group in patching.exact:
        _print_group(group)
    if not patching.exact:
        rows = [
            [str(site), f"{value:+.3f}", ""]
            for site, value in patching.top(list(patching.attribution), 10, chosen=False)
        ]
        print_aligned(["site", "attribution", ""], rows)


def _print_group(group: GroupEffects) -> None:
    print(f"\n{group.group}: {len(group.sites)} of {group.candidates} sites patched")
    rows = [
        [str(one.site), f"{one.exact:+.3f}", f"{one.attribution:+.3f}", "attribution" if one.top else "at random"]
        for one in group.sites[:15]
    ]
    print_aligned(["site", "exact", "attribution", "picked by"], rows)
    said = [
        "–" if value is None else f"{value:.2f}" for value in (group.spearman, group.spearman_random, group.recall)
    ]
    print(f"rank correlation {said[0]} (random sites {said[1]}); recall at {group.recall_at} {said[2]}, "
          f"by chance {group.recall_by_chance:.2f}")  # fmt: skip
