"""Values and foreign text → characters of a page.

In: numbers of a run log and text that a model or a user wrote. Out: strings that are safe to encode, to show and to
put into Markdown. HTML escaping is the template engine's job, not done here.
"""

from __future__ import annotations

import html
import json
import math
import re
import unicodedata
from typing import Any

MISSING = "–"

_KEPT = {"\n", "\t"}
_JOINERS = {"\u200c", "\u200d"}  # emoji and several scripts need them
_MARKDOWN_SPECIAL = re.compile(r"([\\`*_{}\[\]()#!|~$@^]|:(?=//))")
_HIDDEN_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
_NONCHARACTERS = {code + plane for plane in range(0, 0x110000, 0x10000) for code in (0xFFFE, 0xFFFF)}


def visible(value: Any) -> str:
    """Text with every character visible: control, bidirectional and unpaired surrogate characters become `<U+202E>`.

    Such characters can break the encoding (surrogates), the parser (NUL) or the reader's eye (right-to-left
    overrides). Line feeds and tabs stay, `\\r\\n` becomes a line feed.
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return "".join(_shown(character) for character in text.replace("\r\n", "\n"))


def _shown(character: str) -> str:
    if character in _KEPT or character in _JOINERS:
        return character
    if unicodedata.category(character) in _HIDDEN_CATEGORIES or ord(character) in _NONCHARACTERS:
        return f"<U+{ord(character):04X}>"
    return character


def model_text(value: Any) -> str:
    """A prompt or completion as text: a list of chat messages becomes `role: content` paragraphs."""
    if isinstance(value, list) and value and all(isinstance(item, dict) and "content" in item for item in value):
        return "\n\n".join(f"{visible(item.get('role', '?'))}: {visible(item['content'])}" for item in value)
    return "" if value is None else visible(value)


def as_number(value: Any) -> float | None:
    """A finite float, or `None` for everything that is not one (booleans, text, `None`, NaN, infinity)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def show(value: Any) -> str:
    """One value for a table cell or a caption: four significant digits for floats, `–` for `None`, yes and no."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else f"{as_number(value) or math.inf:.4g}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return MISSING
        return f"{value:,.0f}" if value.is_integer() and 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(show, value))}]"
    if isinstance(value, dict):
        return ", ".join(f"{visible(name)}: {show(item)}" for name, item in value.items())
    return visible(value)


def show_seconds(seconds: float | None) -> str:
    """A duration that no line break parts: `42.1 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.3g}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\u00a0min\u00a0{rest}\u00a0s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}\u00a0h\u00a0{minutes}\u00a0min"


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters on one line: the middle gives way, because names differ at their ends."""
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    head = (limit - 1) // 2
    return f"{text[:head]}…{text[-(limit - 1 - head) :]}"


def markdown(text: Any) -> str:
    """One line of Markdown that shows exactly this text: no markup, no HTML, no table cell break."""
    line = " ".join(show(text).split())
    return _MARKDOWN_SPECIAL.sub(r"\\\1", html.escape(line, quote=True).replace("&#x27;", "'"))


def fence(text: str) -> str:
    """A Markdown code block that the text cannot close: its fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}text\n{text}\n{ticks}"
