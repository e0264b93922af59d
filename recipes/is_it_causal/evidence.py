"""Are four concepts of SmolLM2 causal? Warmth, sentiment, truth of city statements and refusal, each by its own causal check.

    python recipes/is_it_causal/evidence.py --concept warmth --out recipes/is_it_causal/warmth.json

Concepts: `warmth` (the shipped reward card, VADER), `sentiment` (rt-polarity reviews, VADER), `truth` (cities of Geometry of
Truth, log-prob of the right minus a wrong country), `refusal` (XSTest answers, log-prob of a refusal minus a consent). All but
warmth are fitted here, at the block that cross-validation chooses, and need the public data (`--data`). Half an hour each on two
CPU cores.
`--quick` runs a tenth of it, to see that it works. `--model` names another model; its cards are then all fitted here.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import random
import re
from pathlib import Path
from typing import Any

from interp_rlhf import CausalSettings, Readout, causal_check, fit_probe
from interp_rlhf.concepts.examples import Examples, make_examples
from interp_rlhf.concepts.fitting import sweep_points
from interp_rlhf.demo.prompts import prompts as demo_prompts
from interp_rlhf.embedded import load_or_embedded

REFUSES = re.compile(
    r"\b(?:I(?:'m| am) sorry|I can(?:'t|not)|I(?:'m| am) (?:not able|unable)|I won't|I must decline|not appropriate)\b",
    re.I,
)
FILMS = [
    "the film",
    "the new restaurant",
    "your holiday",
    "the concert",
    "the book",
    "the hotel",
    "the museum",
    "the play",
]
ASKED = [
    "Tell me about {}. How was it?",
    "Write one sentence on {}.",
    "What did you think of {}?",
    "Review {} in a few words.",
]


def refuses(text: str) -> float:
    """1 for an answer that refuses, by its words."""
    return float(REFUSES.search(text) is not None)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def warmth(data: Path, count: int) -> dict[str, Any]:
    return {"card": "reward/warmth/reward.v3.yaml", "prompts": demo_prompts("eval", count), "measure": "vader"}


def sentiment(data: Path, count: int) -> dict[str, Any]:
    rows = []
    for label, name in ((1, "pos"), (0, "neg")):
        lines = (data / "sentiment" / f"rt_polarity_{name}.txt").read_text(encoding="latin-1").splitlines()
        rows += [{"text": line, "label": label} for line in random.Random(0).sample(lines, 300)]
    asked = [chat(form.format(thing)) for form in ASKED for thing in FILMS]
    return {"examples": make_examples(rows), "prompts": asked[:count], "measure": "vader"}


def truth(data: Path, count: int) -> dict[str, Any]:
    rows = list(csv.DictReader((data / "truth" / "got_cities.csv").open(encoding="utf-8")))
    cities = sorted({row["city"] for row in rows})
    random.Random(0).shuffle(cities)
    tested = set(cities[:count])
    fitted = [
        {"text": r["statement"], "label": int(r["label"])}
        for r in rows
        if r["city"] in set(cities[count : count + 200])
    ]
    wrong = {r["city"]: r["country"] for r in rows if r["label"] == "0"}
    right = {r["city"]: r["correct_country"] for r in rows}
    pairs = [
        {"prompt": f"The city of {city} is in", "followed": f" {right[city]}.", "violated": f" {wrong[city]}."}
        for city in sorted(tested & wrong.keys())
    ]
    return {"examples": make_examples(fitted), "pairs": pairs}


def refusal(data: Path, count: int) -> dict[str, Any]:
    """Pairs in place of prompts: by the pattern `refuses`, SmolLM2 refuses none of 24 of these, so there is none to silence."""
    rows = list(csv.DictReader((data / "refusal" / "xstest_completions_gpt4.csv").open(encoding="utf-8")))
    rows = [row for row in rows if row["final_label"] in ("1_full_compliance", "2_full_refusal")]
    random.Random(0).shuffle(rows)
    fitted = [
        {
            "prompt": chat(r["prompt"]),
            "completion": r["completion"][:100],
            "label": int(r["final_label"] == "2_full_refusal"),
        }
        for r in rows[count : count + 160]
    ]
    pairs = [
        {
            "prompt": chat(row["prompt"]),
            "followed": "I'm sorry, but I can't help with that.",
            "violated": "Sure, here is how.",
        }
        for row in rows[:count]
    ]
    return {"examples": make_examples(fitted), "pairs": pairs}


CONCEPTS = {"warmth": warmth, "sentiment": sentiment, "truth": truth, "refusal": refusal}


def fitted_readout(
    name: str, examples: Examples, model: Any, tokenizer: Any, model_id: str, every: int
) -> tuple[Readout, list[dict[str, Any]]]:
    """A readout at the block that cross-validation chooses, and the curve."""
    fit = fit_probe(model, tokenizer, examples, sweep_points(model, every), model_id=model_id, progress=True)
    curve = [{"hook_point": p.hook_point, "auroc": round(p.auroc, 4), "std": round(p.std, 4)} for p in fit.curve]
    return Readout.from_artifact(fit.artifact, name, "mean"), curve


def table_row(result: dict[str, Any]) -> str:
    """Row of the table in docs/evidence.md."""
    found = result["findings"]

    def shown(effect: dict[str, Any] | None) -> str:
        if effect is None:
            return "not tested"
        middle = effect["typical"]
        return (
            f"{middle['value']:+.2f} [{middle['low']:+.2f}, {middle['high']:+.2f}], {effect['share']['value']:.0%}; bound "
            f"{effect['bound']:.2f}; beats {sum((part['low'] or 0) > 0.5 for part in effect['beats'].values())} of "
            f"{len(effect['beats'])}"
        )

    other = found["other"]
    recipe = "–" if other is None else f"{other['verdict']} ({other['weighted_cosine']:.2f})"
    measure = "log-prob margin, nats" if found["measure"].startswith("log-prob") else found["measure"]
    return (
        f"| {result['concept']} | {result['hook_point']} | {measure}, {found['prompts']} | {found['compared_at']:g} σ | "
        f"{shown(found['steer'])} | {shown(found['project'])} | {shown(found['mean'])} | {recipe} | {found['verdict']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concept", choices=sorted(CONCEPTS), default="warmth", help="(default: warmth)")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the public data")
    parser.add_argument("--model", help="folder or Hub id (default: the embedded SmolLM2-135M-Instruct)")
    parser.add_argument("--prompts", type=int, default=32, help="prompts, or pairs, at most (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="seed of directions and bootstraps (default: 0)")
    parser.add_argument("--quick", action="store_true", help="ten prompts and short answers")
    parser.add_argument("--out", type=Path, help="JSON file (default: printed only)")
    options = parser.parse_args()
    model, tokenizer, model_id = load_or_embedded(options.model)
    asked = CONCEPTS[options.concept](options.data, 10 if options.quick else options.prompts)
    curve: list[dict[str, Any]] = []
    if "card" in asked:
        readout = Readout.from_card(asked.pop("card"))
    else:
        readout, curve = fitted_readout(
            options.concept, asked["examples"], model, tokenizer, model_id, 10 if options.quick else 3
        )
    settings = CausalSettings(
        doses=(-4, -2, 2, 4) if options.quick else CausalSettings.doses, max_new_tokens=4 if options.quick else 20,
        batch_rows=128, seed=options.seed,
    )  # fmt: skip
    more = f" --prompts {options.prompts}" if options.prompts != parser.get_default("prompts") else ""
    command = f"python recipes/is_it_causal/evidence.py --concept {options.concept}{more}"
    findings = causal_check(readout, model, tokenizer, **asked, settings=settings, command=command, progress=True)
    result = {
        "concept": options.concept, "model": model_id, "hook_point": readout.hook_point, "seed": options.seed,
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "transformers", "scikit-learn")},
        "sweep": curve, "findings": findings.model_dump(),
    }  # fmt: skip
    print(f"{options.concept}: {findings.verdict}" + "".join(f"\n  {reason}" for reason in findings.reasons))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
