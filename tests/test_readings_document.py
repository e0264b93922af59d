"""docs/readings.md: its figures are the committed ones."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = (ROOT / "docs" / "readings.md").read_text()
FOUND = json.loads((ROOT / "benchmarks" / "canaries.json").read_text())


def test_what_canaries_see_is_what_was_measured():
    errors, said = FOUND["ratios"], FOUND["settings"]
    assert errors["float32"] < 1e-5
    steps = ", ".join(f"{errors[f'{n} steps of AdamW at 1e-6']:.2g}" for n in (1, 5, 10))
    rows = [
        f"| after 1, 5, 10 steps of AdamW at 1e-6 | {steps} |",
        f"| the same in float16, in bfloat16, under autocast | {errors['float16']:.4f}, {errors['bfloat16']:.3f}, "
        f"{errors['autocast']:.4f} |",
        f"| weights rounded to 8 bits, to 4 bits, and saved as floats | {errors['8 bits']:.3f}, {errors['4 bits']:.2f} |",
        f"first tokens of plain texts as +{said['first_low']:.1f} to +{said['first_high']:.1f} and their other tokens as "
        f"−{-said['rest_low']:.1f} to +{said['rest_high']:.1f}",
    ]
    for row in rows:
        assert row in DOCUMENT, row


def test_the_limits_of_the_document_are_those_of_the_code():
    from interp_rlhf.activations import canaries, recheck

    assert f"| {canaries.ALLOWED['float32']:g} |" in DOCUMENT
    assert f"| {canaries.ALLOWED['16 bits']:g} |" in DOCUMENT
    assert f"every {recheck.EVERY}th" in DOCUMENT
    ratios = FOUND["check"]
    assert f"costs {100 * ratios['check_share']:.2f} % of a GRPO step" in DOCUMENT
    assert ratios["check_share"] <= 0.005
