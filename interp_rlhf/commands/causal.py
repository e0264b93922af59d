"""`interp-rlhf probe causal`, and the causal part of `probe check`.

In: parsed arguments. Out: a card with causal findings, a plot next to it, lines on the terminal. The check is in `validation`.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from ..concepts.card import load_card
from ..concepts.causal_card import write_causal
from ..concepts.examples import load_examples, read_prompts, read_rows
from ..concepts.readout import Readout
from ..embedded import load_or_embedded
from ..validation.causal import causal_check
from ..validation.causal_settings import CausalSettings
from ..validation.measures import MEASURES
from .causal_lines import causal_lines
from .options import registered, typed_command

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping

    import torch

    from ..concepts.card import LoadedCard
    from ..concepts.causal_findings import CausalFindings
    from ..concepts.examples import Examples

REGEX = "regex:"


def probe_causal(arguments: argparse.Namespace) -> int:
    """`interp-rlhf probe causal`."""
    card = load_card(arguments.card)
    if card.card.causal is not None and not arguments.replace:
        raise ValueError(
            f"`{arguments.card}` has causal findings already – expected none. Pass `--replace` to write them again."
        )
    asked = causal_inputs(arguments)
    examples = load_examples(arguments.fit_data, arguments.positive) if arguments.fit_data is not None else None
    model, tokenizer, _ = load_or_embedded(arguments.model)
    findings = checked_causally(card, model, tokenizer, asked, examples)
    if arguments.json:
        print(json.dumps({"card": str(card.path), **findings.model_dump()}))
    else:
        print("\n".join(causal_lines(findings)))
    return int(findings.verdict != "causal" and arguments.require_causal)


def causal_inputs(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `causal_check` from the command line. Runs before a model is loaded.

    Raises:
        `ValueError`: prompts without a measure, or the reverse, or both prompts and pairs.
    """
    if (arguments.causal_pairs is None) == (arguments.prompts is None):
        raise ValueError(
            f"`--prompts` is {arguments.prompts} and `--causal-pairs` {arguments.causal_pairs} – expected one of them: prompts "
            "whose answers a measure reads, or pairs of completions."
        )
    if arguments.prompts is not None and arguments.causal_measure is None:
        raise ValueError(
            "`--prompts` is given without `--causal-measure` – expected an independent measure of the answers: "
            f"{', '.join(MEASURES)}, or {REGEX}PATTERN. Without one, give `--causal-pairs`."
        )
    settings = CausalSettings(
        doses=doses_of(arguments.doses), random=arguments.random, occurs=arguments.occurs,
        max_new_tokens=arguments.max_new_tokens, seed=arguments.seed,
    )  # fmt: skip
    foreign = [Readout.from_card(load_card(path)) for path in arguments.foreign]
    asked: dict[str, Any] = {"settings": settings, "foreign": {one.name: one for one in foreign}}
    if arguments.causal_pairs is not None:
        return asked | {"pairs": read_rows(arguments.causal_pairs)}
    return asked | {"prompts": read_prompts(arguments.prompts), "measure": measure_of(arguments.causal_measure)}


def measure_of(name: str) -> str | Callable[[str], float]:
    """A registered measure's name, or the measure that a pattern means: 1 for a text in which it is found.

    Raises:
        `ValueError`: an unknown name, or a pattern that is none.
    """
    if not name.startswith(REGEX):
        registered(MEASURES, "--causal-measure", name)
        return name
    try:
        pattern = re.compile(name.removeprefix(REGEX), re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"`--causal-measure {name}` – expected a regular expression: {error}.") from None

    def found(text: str) -> float:
        return float(pattern.search(text) is not None)

    found.__name__ = name
    return found


def doses_of(text: str | None) -> tuple[float, ...]:
    """Doses of `--doses=-4,-2,2,4`."""
    if text is None:
        return tuple(CausalSettings.doses)
    try:
        return tuple(float(part) for part in text.split(",") if float(part) != 0)
    except ValueError:
        raise ValueError(f"`--doses {text}` – expected numbers such as -4,-2,2,4.") from None


def checked_causally(
    card: LoadedCard, model: Any, tokenizer: Any, asked: Mapping[str, Any], examples: Examples | None
) -> CausalFindings:
    """Run the check, write its findings into the card and a plot next to it. The card's other content stays.

    Raises:
        `ValueError`: a foreign card of another hook point, or an input that `causal_check` refuses. The card is not changed then.
    """
    readout = Readout.from_card(card)
    asked = {**asked, "foreign": directions_at(readout.hook_point, asked["foreign"])}
    findings = causal_check(
        readout,
        model,
        tokenizer,
        examples=examples,
        command=typed_command(),
        progress=True,
        **asked,
    )
    return write_causal(card, findings)


def directions_at(hook_point: str, readouts: Mapping[str, Readout]) -> dict[str, torch.Tensor]:
    """Directions of foreign readouts, by name.

    Raises:
        `ValueError`: one is at another hook point.
    """
    elsewhere = [f"`{name}` at `{one.hook_point}`" for name, one in readouts.items() if one.hook_point != hook_point]
    if elsewhere:
        raise ValueError(
            f"{', '.join(elsewhere)} – expected foreign concepts at `{hook_point}`: directions of two hook points cannot be "
            "compared. Fit them there, or leave them out: built-in ones take their place."
        )
    return {name: one.direction for name, one in readouts.items()}
