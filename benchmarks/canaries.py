"""What canaries see: how far the scores of the shipped warmth card move if a model is rounded, or trained a little.

Prints, for each change of SmolLM2-135M-Instruct, the root mean square of the difference in standard deviations of the canaries'
scores, and the range of the scores of first tokens and of others. With `--quick` a random readout of a tiny random model takes
the place of card and model, with canaries of the same kind.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import synthetic
import torch
from timing import Row, finish, parser, prepare
from transformers import AutoModelForCausalLM, AutoTokenizer

from interp_rlhf import Readout
from interp_rlhf.activations import TokenBatch, agreement, make_canaries, read
from interp_rlhf.activations.canaries import Canaries

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 4096  # of `--quick`
CARD = "reward/warmth/reward.v2.yaml"
TEXTS = ["I am very happy to help you today my friend.", "The weather in Paris is rainy and cold this week."]


def rounded(model: Any, bits: int) -> Any:
    """A copy whose matrices in the blocks hold 2^bits levels a row."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if parameter.dim() == 2 and "layers" in name:
                scale = parameter.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
                parameter.copy_((parameter / scale).round() * scale)
    return copied


def word_ids(text: str) -> dict[str, list[int]]:
    """A tokenizer for a random model: a stable id for each word."""
    numbers = [zlib.crc32(word.encode()) for word in text.split()]
    return {"input_ids": [synthetic.FIRST_WORD + number % (VOCABULARY - synthetic.FIRST_WORD) for number in numbers]}


def errors_of(
    make: Callable[[torch.dtype], Any], readout: Readout, canaries: Canaries, batch: dict[str, torch.Tensor]
) -> dict[str, float]:
    """What the canaries say of each change of the model."""
    model = make(torch.float32)

    def error(other: Any) -> float:
        return agreement(other, canaries, readout.hook_point, readout.read_directions).error

    errors = {"float32": error(model)}
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        errors[name] = error(make(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        errors["autocast"] = error(model)
    for bits in (8, 4):
        errors[f"{bits} bits"] = error(rounded(model, bits))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    for step in range(1, 11):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, 5, 10):
            errors[f"{step} steps of AdamW at 1e-6"] = error(model)
    return errors


def ranges_of(model: Any, readout: Readout, canaries: Canaries) -> dict[str, float]:
    """Lowest and highest score of the first token of the plain texts, and of the others."""
    every = TokenBatch.from_ids([[]] * len(canaries.ids), canaries.ids)
    scores = read(model, every, [readout])[readout.name].scores[..., 0]
    first, rest = scores[:, 0], scores[every.completion_mask]
    ranges = {"first_low": float(first.min()), "first_high": float(first.max())}
    return ranges | {"rest_low": float(rest.min()), "rest_high": float(rest.max())}


def main() -> None:
    made = parser(__doc__, pairs=1)
    made.set_defaults(model="embedded")
    arguments = made.parse_args()
    prepare(arguments)
    with synthetic.subject(arguments, VOCABULARY) as (subject, _):
        tokenizer = AutoTokenizer.from_pretrained(subject.folder)

        def make(dtype: torch.dtype) -> Any:
            return AutoModelForCausalLM.from_pretrained(subject.folder, dtype=dtype).eval()

        if subject.real:
            readout, texts = Readout.from_card(str(ROOT / CARD)), TEXTS
            canaries = readout.canaries
        else:
            fresh = make(torch.float32)
            readout, texts = (
                synthetic.make_readout(fresh.config.hidden_size, 1, arguments.seed),
                ["w5 w6 w7", "w8 w9 w10"],
            )
            canaries = make_canaries(fresh, word_ids, readout.hook_point, readout.read_directions)
        assert canaries is not None
        errors = errors_of(make, readout, canaries, tokenizer(texts, return_tensors="pt", padding=True))
        ranges = ranges_of(make(torch.float32), readout, canaries)
    said = "first tokens of plain texts {first_low:.1f} to {first_high:.1f}, others {rest_low:.1f} to {rest_high:.1f}"
    print(said.format(**ranges))
    rows = [Row(name, [value]) for name, value in errors.items()]
    card = CARD if subject.real else "a random readout"
    finish("canaries", rows, arguments, {"model": subject.name, "card": card, **ranges})


if __name__ == "__main__":
    main()
