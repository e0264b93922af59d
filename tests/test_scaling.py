"""docs/scaling.md: its figures are the committed ones, and its formulas hold on shapes that nobody fitted them to."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import costs  # noqa: E402
import scaling_pieces  # noqa: E402
import scaling_tables  # noqa: E402

DOCUMENT = (ROOT / "docs" / "scaling.md").read_text()
FOUND = json.loads((ROOT / "benchmarks" / "scaling.json").read_text())
SHAPE = costs.Shape(rows=4, length=96, counted=120, width=64, latents=640, chosen=5, on=12, rank=6)
# More counted tokens than a block of this many latents has.
WIDE = costs.Shape(rows=4, length=96, counted=256, width=16, latents=40_960, chosen=5, on=12, rank=6)


def test_the_tables_of_the_document_are_the_committed_figures():
    for table in scaling_tables.tables(FOUND):
        assert table in DOCUMENT


def test_what_the_document_says_of_the_agreement_is_so():
    times, others = scaling_tables.agreement(FOUND)
    assert all(abs(ratio - 1) <= 0.15 for ratio in others.values())
    outside = {name: ratio for name, ratio in times.items() if abs(ratio - 1) > 0.15}
    assert f"{len(times) - len(outside)} of {len(times)} times" in DOCUMENT
    for name, ratio in outside.items():
        assert f"{name}: {ratio:.2f}" in DOCUMENT


def test_what_is_derived_is_what_the_formulas_give():
    assert FOUND["derived"] == json.loads(json.dumps({name: costs.at_scale(name) for name in costs.PUBLIC}))
    sizes = {name: costs.Model(*public).parameters for name, public in costs.PUBLIC.items()}
    assert sizes["8B"] == 8_030_261_248  # as the model card of Llama-3.1-8B has it
    assert sizes["70B"] == 70_553_706_496


def test_two_processes_add_what_the_formula_says():
    found = FOUND["collectives"]
    plain, terms = found["DPO, plain"], found["DPO, terms"]
    assert found["engine"] == "DistributedDataParallel"
    assert terms[0] - plain[0] == costs.collectives(metrics=9)
    assert terms[1] - plain[1] == 2


@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, narrow=True), WIDE], ids=["float32", "bfloat16", "in blocks"])
@pytest.mark.parametrize("name", costs.FORMULAS)
def test_operations_and_bytes_are_those_of_the_formula(name, shape):
    cost = costs.FORMULAS[name](shape)
    piece = scaling_pieces.pieces(shape, seed=1)[name]
    assert scaling_pieces.counted_flops(lambda: piece(scaling_pieces.no_mark)) == cost.flops
    found = scaling_pieces.memory_of(name, shape, seed=1)
    for key in ("carried", "held", "peak"):
        assert found[key] == pytest.approx(getattr(cost, key), rel=0.15), key
