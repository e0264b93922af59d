"""A causal check as a table of a run log: the report shows it with two sentences that say what it means.

In: findings. Out: the fields of a `table` event. It must not know pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .causal_findings import CausalFindings, Effect

_MEANING = {
    "causal": "Steering along the direction moves the text and silencing it takes the concept away, more than others do.",
    "steers only": "Steering along the direction moves the text, but the model does not need it to show the concept.",
    "silences only": "Silencing the direction takes the concept away, but steering along it does not bring the concept.",
    "read-only": "The concept can be read there, and the model's text does not follow the direction.",
    "insufficient evidence": "Something could not be tested, so nothing is said.",
}
_LIMITS = (
    "A frozen reading is a valid reward without this; what reads or changes the policy needs it. Measured by `{measure}` in "
    "greedy answers to {prompts} prompts, never by the probe."
)


def causal_table(name: str, findings: CausalFindings, when: str = "") -> dict[str, Any]:
    """Title, columns, rows and note of a table.

    Args:
        name (`str`): the card's name.
        when (`str`): says which model was checked, such as "after training".
    """
    return {
        "title": f"Is `{name}` causal{f' {when}' if when else ''}? {findings.verdict}",
        "columns": [
            "done",
            "typical move",
            "95 % interval",
            "prompts as predicted",
            "bound of chance",
            "beaten",
            "passes",
        ],
        "rows": [[what, *_row(effect)] for what, effect in findings.effects.items()],
        "note": f"{_MEANING[findings.verdict]} {_LIMITS.format(measure=findings.measure, prompts=findings.prompts)}",
    }


def _row(effect: Effect | None) -> list[Any]:
    if effect is None:
        return ["not tested", None, None, None, None, None]
    low, high = effect.typical.low, effect.typical.high
    interval = None if low is None or high is None else f"[{low:+.3f}, {high:+.3f}]"
    beaten = [name for name, part in effect.beats.items() if part.low is not None and part.low > 0.5]
    return [
        effect.typical.value, interval, f"{effect.share.value:.0%} of {effect.prompts}", effect.bound,
        f"{len(beaten)} of {len(effect.beats)} controls", "yes" if effect.passes else "no",
    ]  # fmt: skip
