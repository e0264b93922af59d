"""What canaries see: how far the scores of the shipped warmth card move where a model is rounded, or trained a little.

Prints, per change of SmolLM2-135M-Instruct, the root mean square of the difference in standard deviations of the canaries'
scores; `--json` prints them as a JSON object too.
"""

from __future__ import annotations

import argparse
import copy
import json
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from interp_rlhf import Readout
from interp_rlhf.activations import TokenBatch, agreement, read
from interp_rlhf.embedded import default_model

CARD = "reward/warmth/reward.v2.yaml"
TEXTS = ["I am very happy to help you today my friend.", "The weather in Paris is rainy and cold this week."]


def rounded(model: Any, bits: int) -> Any:
    """A copy whose matrices in the blocks hold 2^bits levels a row."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if parameter.dim() == 2 and "layers" in name:
                scale = parameter.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
                parameter.copy_((parameter / scale).round() * scale)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the errors as JSON too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = default_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    readout = Readout.from_card(CARD)
    kept = readout.canaries
    assert kept is not None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def error(other: Any) -> float:
        return agreement(other, kept, readout.hook_point, readout.read_directions).error

    found = {"float32": error(model)}
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        found[name] = error(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval())
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = error(model)
    for bits in (8, 4):
        found[f"{bits} bits"] = error(rounded(model, bits))
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    for step in range(1, 11):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, 5, 10):
            found[f"{step} steps of AdamW at 1e-6"] = error(model)
    # The shipped card on plain texts: what the first token of each gives, and the others.
    fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    every = TokenBatch.from_ids([[]] * len(kept.ids), kept.ids)
    scores = read(fresh, every, [readout])[readout.name].scores[..., 0]
    first, rest = scores[:, 0], scores[every.completion_mask]
    text = {"first_low": float(first.min()), "first_high": float(first.max())}
    text |= {"rest_low": float(rest.min()), "rest_high": float(rest.max())}
    print(f"first tokens of plain texts {text['first_low']:.1f} to {text['first_high']:.1f}, others {text['rest_low']:.1f} to "
          f"{text['rest_high']:.1f}")  # fmt: skip
    for name, value in found.items():
        print(f"{name:>30}  {value:.2g}")
    if arguments.json:
        print(json.dumps({"benchmark": "canaries", "ratios": found, "pairs": 1, "settings": {"card": CARD, **text}}))


if __name__ == "__main__":
    main()
