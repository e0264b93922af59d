"""`interp-rlhf card matrix`: what steering one card's concept, or training on it, does to the others.

In: parsed arguments. Out: two tables on the terminal, and a plot. The work is in `validation.off_target`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..concepts.examples import read_prompts
from ..concepts.readout import Readout
from ..concepts.svg import svg_figure
from ..drift.shifts import shifts_of_run
from ..embedded import load_or_embedded
from ..validation.measures import MEASURES
from ..validation.off_target import off_target
from .console import print_aligned
from .options import registered

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from ..validation.off_target import OffTarget


def card_matrix(arguments: argparse.Namespace) -> int:
    """`interp-rlhf card matrix`."""
    readouts = [Readout.from_card(path) for path in arguments.cards]
    prompts = read_prompts(arguments.prompts)
    measures = {name: registered(MEASURES, "--measure", name)() for name in arguments.measure}
    runs = dict(_named_run(text) for text in arguments.run_log)
    shifts = {name: shifts_of_run(path) for name, path in runs.items()}
    model, tokenizer, _ = load_or_embedded(arguments.model)
    found = off_target(
        readouts, model, tokenizer, prompts, measures, dose=arguments.dose, max_new_tokens=arguments.max_new_tokens,
        shifts=shifts, progress=True,
    )  # fmt: skip
    if arguments.plot is not None:
        plot_matrix(found, arguments.plot)
    if arguments.json:
        print(json.dumps(asdict(found)))
        return 0
    print("cosines, plain / weighted by the activations:")
    rows = [
        [
            name,
            *(f"{_move(found.cosine[i][j])} / {found.weighted_cosine[i][j]:+.2f}" for j in range(len(found.names))),
        ]
        for i, name in enumerate(found.names)
    ]
    print_aligned(["", *found.names], rows)
    print(
        f"\nmoved from −{found.dose:g} σ to +{found.dose:g} σ, median of {found.prompts} prompts in standard deviations:"
    )
    moved = [
        [f"steer {name}", *(f"{value:+.2f}" for value in found.steering[i]), _move(found.own[i])]
        for i, name in enumerate(found.names)
    ]
    moved += [[f"run {run}", *map(_move, values), ""] for run, values in found.training.items()]
    print_aligned(["", *found.targets, "largest other / own"], moved)
    return 0


def plot_matrix(found: OffTarget, path: str | Path) -> None:
    """Write an SVG heat map of the moves."""
    rows: list[Sequence[float | None]] = [*found.steering, *found.training.values()]
    names = [f"steer {name}" for name in found.names] + [f"run {run}" for run in found.training]
    values = [[float("nan") if value is None else value for value in row] for row in rows]
    limit = max(abs(value) for row in rows for value in row if value is not None) or 1.0
    size = (1.6 + 0.9 * len(found.targets), 1.2 + 0.5 * len(rows))
    with svg_figure(path, size) as (figure, axes):
        image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axes.set_xticks(range(len(found.targets)), found.targets, rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(len(rows)), names, fontsize=8)
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                axes.text(x, y, "–" if value is None else f"{value:+.1f}", ha="center", va="center", fontsize=7)
        figure.colorbar(image, label="move, in standard deviations")


def _named_run(text: str) -> tuple[str, Any]:
    name, separator, path = text.partition("=")
    if not separator or not name or not path:
        raise ValueError(f"`--run-log {text}` – expected NAME=FILE, such as warmth=runs/grpo/interp.jsonl.")
    return name, path


def _move(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"
