"""What each readout and each term costs by formula, and the formulas against what is counted and measured.

The formulas are those of `costs.py`. They are compared on random Llama-shaped models of three sizes with

  operations  `torch.utils.flop_counter`, exactly;
  memory      every allocation of torch's CPU allocator, from its profiler;
  time        the elementary operations alone at the same shapes, alternating with the piece itself: measured over predicted;
  steps       whole steps of TRL's `DPOTrainer` in full fine-tuning with three terms, over steps without any;
  bytes sent  two gloo processes under DDP, by counting what collectives are given.

Prints the tables of `docs/scaling.md`; `--out` writes their figures. The figures for 8B and 70B are derived from the same
formulas and public shapes (`at_scale`), not measured. `--quick` takes one small model and starts no second process.

  export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000
  python benchmarks/scaling.py --out benchmarks/scaling.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import dpo
from costs import PUBLIC, Model, Shape, at_scale
from scaling_measured import (
    EVALUATED,
    count_collectives,
    measured_collectives,
    measured_evaluation,
    measured_pieces,
    measured_read,
    measured_step,
)
from scaling_tables import agreement, tables
from timing import command, machine, parser, prepare, print_what_was_measured

# Width, blocks and intermediate width of the three models; latents are 16 per dimension.
SIZES = ((128, 4, 352), (256, 6, 704), (512, 8, 1376))
QUICK_SIZES = ((64, 2, 160),)
# An activation is then larger than the cache of a core, as it is in training.
VOCABULARY, ROWS, LENGTH, COUNTED = 4096, 8, 1024, 2048
QUICK_LENGTH, QUICK_COUNTED = 64, 128


def measured(sizes: Model, s: Shape, pairs: int, seed: int) -> dict[str, Any]:
    """Every figure about a model of one size."""
    return {
        "blocks": sizes.blocks, "parameters": sizes.parameters,
        "pieces": measured_pieces(s, pairs, seed),
        "read": measured_read(s, sizes, pairs, seed),
        "evaluation": measured_evaluation(sizes, pairs, seed),
        "step": measured_step(replace(sizes, vocabulary=dpo.VOCABULARY), pairs, seed),
    }  # fmt: skip


def figures_of(arguments: argparse.Namespace) -> dict[str, Any]:
    quick, pairs, seed = arguments.quick, arguments.pairs, arguments.seed
    length, counted = (QUICK_LENGTH, QUICK_COUNTED) if quick else (LENGTH, COUNTED)
    models = QUICK_SIZES if quick else SIZES
    figures: dict[str, Any] = {
        "settings": {
            "model": f"Llamas of width {', '.join(str(width) for width, *_ in models)}, float32, random",
            "rows": ROWS, "length": length, "counted": counted, "latents_per_dimension": 16, "evaluated": EVALUATED,
            "pairs": pairs, "seed": seed, "quick": quick, "command": command("scaling"), **machine(),
        },
        "sizes": {},
        "collectives": None if quick else measured_collectives(Path(__file__), seed),
        "derived": {name: at_scale(name) for name in PUBLIC},
    }  # fmt: skip
    for width, blocks, intermediate in models:
        sizes = Model(width, blocks, intermediate, width, VOCABULARY)
        figures["sizes"][str(width)] = measured(sizes, Shape(ROWS, length, counted, width, 16 * width), pairs, seed)
    return figures


def main() -> None:
    made = parser(__doc__, pairs=7)
    made.add_argument("--out", type=Path, help="write the figures here")
    made.add_argument("--count-collectives", type=Path, help=argparse.SUPPRESS)  # in each of two processes
    arguments = made.parse_args()
    prepare(arguments)
    if arguments.count_collectives is not None:
        count_collectives(arguments.count_collectives, arguments.seed)
        return
    figures = figures_of(arguments)
    for table in tables(figures):
        print(f"\n{table}")
    print_what_was_measured(figures["settings"])
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
    if arguments.json:
        times, others = agreement(figures)
        ratios = {**{f"{name}, time": ratio for name, ratio in times.items()}, **others}
        settings = {**figures["settings"], "not_run": {}}
        print(json.dumps({"benchmark": "scaling", "ratios": ratios, "pairs": arguments.pairs, "settings": settings}))


if __name__ == "__main__":
    main()
