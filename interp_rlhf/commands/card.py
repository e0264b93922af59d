"""`interp-rlhf card show`, `diff` and `new`: look at cards, compare them, make the next version.

In: parsed arguments. Out: text on the terminal, a new card file. It must not know models.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ..concepts.card import Transform, load_card
from ..concepts.card_differences import card_differences
from ..concepts.claims import artifact_of
from ..concepts.next_card import CardChanges, next_card
from ..validation.gate import gate
from .causal_lines import causal_lines
from .evidence_chart import drawn_evidence

if TYPE_CHECKING:
    import argparse

    from ..concepts.artifact import Header
    from ..concepts.card import Card, LoadedCard
    from ..concepts.card_differences import CardDifference


def card_show(arguments: argparse.Namespace) -> int:
    """`interp-rlhf card show`."""
    loaded = load_card(arguments.card)
    card, header = loaded.card, artifact_of(loaded).header
    reasons, canaries = gate(card), len(header.canaries.get("ids", []))
    if arguments.json:
        content = {
            "path": str(loaded.path), "sha256": loaded.sha256, "readout": card.readout_digest, "canaries": canaries,
            "passed": not reasons, "reasons": reasons, "card": card.model_dump(by_alias=True, exclude_none=True),
        }  # fmt: skip
        print(json.dumps(content))
        return 0
    print(f"{card.name}, version {card.version}: {card.concept}\n")
    facts = _card_facts(loaded, header)
    width = max(map(len, facts))
    for name, said in facts.items():
        print(f"{name:<{width}}  {said}")
    for line in [] if card.evidence is None else drawn_evidence(card.evidence):
        print(line)
    for line in [] if card.causal is None else causal_lines(card.causal):
        print(line)
    print("\ngate: " + ("may be a reward" if not reasons else "may be a monitor only"))
    for reason in reasons:
        print(f"  - {reason}")
    return 0


def _card_facts(loaded: LoadedCard, header: Header) -> dict[str, str]:
    """What stands above the evidence, by the name of the line."""
    card, spec, canaries = loaded.card, loaded.card.readout, header.canaries
    tokens = sum(len(sequence) for sequence in canaries.get("ids", []))
    turn = "with end-of-turn tokens" if spec.include_end_of_turn else "without end-of-turn tokens"
    facts = {
        "role": f"{card.role}, weight {card.weight:g}",
        "reads": f"{spec.kind} at {spec.hook_point}, {spec.pooling} pooling, {turn}",
        "read on": f"{card.reader} model",
        "model": card.model.id,
        "fitted on": f"{header.examples} examples, labels {' / '.join(header.label_names)}, {header.method}",
        "canaries": f"{len(canaries['ids'])} sequences, {tokens} tokens" if canaries else "none: version before 0.2",
    }
    if card.transform is not None:
        clip = "" if card.transform.clip is None else ", clipped to [{:g}, {:g}]".format(*card.transform.clip)
        facts["transform"] = f"(score - {card.transform.mean:g}) / {card.transform.std:g}{clip}"
    if card.holdouts:
        facts["holdouts"] = ", ".join(card.holdouts)
    return facts | {
        "card": f"{loaded.path}, sha256:{loaded.sha256}",
        "artifact": f"{spec.artifact.path}, sha256:{spec.artifact.sha256}, as the card says",
        "identity": f"{card.model.identity} (model)",
        "readout": f"{card.readout_digest} (all that the score depends on)",
    }


def card_diff(arguments: argparse.Namespace) -> int:
    """`interp-rlhf card diff`."""
    before, after = load_card(arguments.before), load_card(arguments.after)
    differences = card_differences(before.card, after.card)
    same = before.card.readout_digest == after.card.readout_digest
    if arguments.json:
        content = {
            "before": str(before.path), "after": str(after.path), "same_readout": same,
            "readouts": [before.card.readout_digest, after.card.readout_digest],
            "differences": [asdict(difference) for difference in differences],
        }  # fmt: skip
        print(json.dumps(content))
        return int(not same)
    print(f"A: {before.path}\nB: {after.path}\n")
    width = max((len(difference.key) for difference in differences), default=0)
    for difference in differences:
        print(f"{difference.key:<{width}}  {_shown_difference(difference)}")
    if not differences:
        print("the cards say the same")
    what = "they read the same" if same else "they read different things: evidence of one says nothing about the other"
    print(f"\n{what}")
    return int(not same)


def _shown_difference(difference: CardDifference) -> str:
    said = f"{_shown_value(difference.before)} → {_shown_value(difference.after)}"
    if difference.overlap is None:
        return said
    return said + ("  intervals overlap" if difference.overlap else "  intervals apart")


def _shown_value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        number = value.get("auroc", value.get("value"))
        return f"{number:g} [{value['low']:g}, {value['high']:g}]" if "low" in value else f"{number:g}"
    return str(value)


def card_new(arguments: argparse.Namespace) -> int:
    """`interp-rlhf card new`."""
    changes = CardChanges(
        name=arguments.name, concept=arguments.concept, role=arguments.role, version=arguments.version,
        weight=arguments.weight, pooling=arguments.pooling, transform=_transform(arguments.transform),
        holdouts=arguments.holdout,
    )  # fmt: skip
    path = next_card(arguments.source, arguments.out, changes)
    card = load_card(path).card
    reasons = gate(card)
    if arguments.json:
        content = {"card": str(path), "version": card.version, "evidence_kept": card.evidence is not None}
        print(json.dumps(content | {"passed": not reasons, "reasons": reasons}))
        return 0
    print(f"card: {path}, {_evidence_said(card)}")
    if card.evidence is None:
        print(f"next: interp-rlhf probe check {path} --fit-data FIT --data HELD_OUT")
    elif reasons and card.role != "monitor":
        print(f"it may be a monitor only: {'; '.join(reasons)}")
    return 0


def _evidence_said(card: Card) -> str:
    return "without evidence" if card.evidence is None else "with the evidence of the old card: it reads the same"


def _transform(text: str | None) -> Transform | None:
    """Transform of the argument `--transform MEAN,STD[,LOWER,UPPER]`.

    Raises:
        `ValueError`: other numbers than these, or a standard deviation or bounds that no transform can have.
    """
    if text is None:
        return None
    try:
        mean, std, *clip = [float(number) for number in text.split(",")]
        return Transform(mean=mean, std=std, clip=clip or None)
    except (ValueError, ValidationError):
        raise ValueError(
            f"`--transform {text}` – expected MEAN,STD or MEAN,STD,LOWER,UPPER, with STD above 0 and LOWER below UPPER, such as "
            "0.3,1.4,-3,3."
        ) from None
