"""What differs between two cards, key by key.

In: two cards. Out: the differences, and if they read the same. It must not know files, models or how a difference is shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .card import Card


@dataclass(frozen=True)
class CardDifference:
    """A key whose value differs between two cards.

    Attributes:
        key (`str`): its place, such as `readout.pooling`.
        before, after: the values. None where the card lacks the key.
        overlap (`bool`, *optional*): whether the 95 % intervals overlap, for two numbers that have one.
    """

    key: str
    before: Any
    after: Any
    overlap: bool | None = None


def card_differences(before: Card, after: Card) -> list[CardDifference]:
    """All differences, in the order of the schema. A number with its interval is one value.

    If only one card has evidence, that is one difference: `evidence`, with the readout that it was written for. Of causal
    findings, the verdict is compared.
    """
    both = before.evidence is not None and after.evidence is not None
    first, second = (_values_of(card, both) for card in (before, after))
    return [
        CardDifference(key, first.get(key), second.get(key), _overlap(first.get(key), second.get(key)))
        for key in dict.fromkeys([*first, *second])
        if first.get(key) != second.get(key)
    ]


def _values_of(card: Card, with_evidence: bool) -> dict[str, Any]:
    content = card.model_dump(by_alias=True, exclude_none=True)
    if not with_evidence and card.evidence is not None:
        content["evidence"] = f"written for {card.evidence.readout}"
    if card.causal is not None:
        content["causal"] = card.causal.verdict
    return dict(_values(content))


def _values(content: dict[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        key = f"{place}{name}"
        if isinstance(value, dict) and not _is_number(value):
            yield from _values(value, f"{key}.")
        else:
            yield key, value


def _is_number(value: dict[str, Any]) -> bool:
    """Whether it is an AUROC or a difference, with or without its interval."""
    return "low" in value or set(value) in ({"auroc"}, {"value"})


def _overlap(first: Any, second: Any) -> bool | None:
    if not all(isinstance(value, dict) and "low" in value and "high" in value for value in (first, second)):
        return None
    return bool(first["low"] <= second["high"] and second["low"] <= first["high"])
