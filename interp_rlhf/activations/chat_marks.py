"""What a chat template writes around an assistant's answer, found by rendering one question and one answer.

In: a tokenizer and its template. Out: `ChatMarks`, token ids. It must not know models or masks.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

logger = logging.getLogger(__name__)

# A word that no template writes by itself: what is rendered around it is the template's.
_ANSWER = "zqxanswer"
_Ids = tuple[int, ...]


@dataclass(frozen=True)
class ChatMarks:
    """What a chat template writes around an assistant's answer, as token ids.

    Attributes:
        header (`tuple[int, ...]`): what opens an assistant's turn: of the generation prompt, what is there before an answer too.
        dropped (`tuple[int, ...]`): the rest of the generation prompt, which a rendered answer does not have: TRL leaves it out
            of training rows (`<think>` and a line break, in templates of models that always think).
        prefix (`tuple[int, ...]`): what it writes between that and the answer: an empty think block, in Qwen3's.
        closing (`tuple[int, ...]`): what it writes after the answer.
        ends (`frozenset[int]`): ids that end a turn.
        inner (`frozenset[int]`): ids that end a turn in the middle of a rendered conversation only (`<|end|>`, in gpt-oss's); a
            policy may write them within its answer.
        special (`frozenset[int]`): ids that are no text.
        parts (`bool`): whether the template takes a message's content as a list of parts only, as those of vision models do.
        asked (`tuple[int, ...]`): what opens a user's turn after an answer.
        opener (`int`, *optional*): a special token with which every turn opens (`<|im_start|>`).
        stem (`int`): how many ids of `header` come before its last white space, which may merge with an answer's own.
        lead (`str`): the end of the generation prompt as text: an answer is tokenized behind it.
        space (`str`): white space that a rendered conversation has between that and the answer.
    """

    header: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()
    ends: frozenset[int] = frozenset()
    inner: frozenset[int] = frozenset()
    special: frozenset[int] = frozenset()
    parts: bool = False
    asked: tuple[int, ...] = ()
    opener: int | None = None
    stem: int = 0
    lead: str = ""
    space: str = ""

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        ends: Collection[int] = (),
    ) -> ChatMarks:
        """Marks of a tokenizer's template, found by rendering one question and one answer; `ends` are added to its own."""
        special = frozenset(tokenizer.all_special_ids)
        known = {token for token in (tokenizer.eos_token_id, *ends) if token is not None}
        around = _around(tokenizer, chat_template, dict(chat_template_kwargs or {}))
        if around is None:
            return cls(ends=frozenset(known), special=special)
        marks = special | set(getattr(tokenizer, "added_tokens_decoder", {}))
        close, inner = (next(((t,) for t in after if t in marks), ()) for after in (around.closing, around.within))
        ends = frozenset(known) | set(close)

        def blank(token: int) -> bool:
            return token not in marks and not tokenizer.decode([token]).strip()

        header, asked = around.header, around.asked
        if all(blank(token) for token in header):  # no mark: a line break stands in any text
            header = ()
        stem = len(header)
        while stem and blank(header[stem - 1]):
            stem -= 1
        while asked and blank(asked[0]):
            asked = asked[1:]
        while asked and blank(asked[-1]):
            asked = asked[:-1]
        own = set(ends) | {tokenizer.bos_token_id, tokenizer.pad_token_id}
        opener = asked[0] if asked and asked[0] in marks and asked[0] not in own else None
        return cls(
            header, around.dropped, around.prefix, around.closing, ends, frozenset(inner), special, around.parts,
            asked, opener, stem, around.lead, around.space,
        )  # fmt: skip

    @property
    def closing_head(self) -> tuple[int, ...]:
        """What of `closing` comes before the end-of-turn token: all of it where the template has none."""
        return self.closing[: next((i for i, token in enumerate(self.closing) if token in self.ends), None)]


@dataclass(frozen=True)
class _Around:
    header: _Ids
    dropped: _Ids
    prefix: _Ids
    closing: _Ids
    within: _Ids  # what follows an answer within a conversation
    parts: bool
    asked: _Ids
    lead: str
    space: str


def _around(tokenizer: Any, chat_template: str | None, kwargs: dict[str, Any]) -> _Around | None:
    """What a template writes around questions and answers; None for a tokenizer without a template, or one that takes no such
    conversation. See `ChatMarks`."""
    if chat_template is None and getattr(tokenizer, "chat_template", None) is None:
        return None
    from jinja2.exceptions import TemplateError

    first, second = "What is it?", "And then?"

    def rendered(parts: bool, turns: int, question: str = first, **more: Any) -> str:
        said = [("user", question), ("assistant", _ANSWER), ("user", second)][:turns]
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if parts else text} for role, text in said
        ]
        return str(
            tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False, **{**kwargs, **more})
        )

    for parts in (False, True):
        try:
            bare, whole, longer = rendered(parts, 1), rendered(parts, 2), rendered(parts, 3)
            other = rendered(parts, 2, "Tell me more")
            prompt = rendered(parts, 1, add_generation_prompt=True)
        except (TemplateError, TypeError, KeyError, AttributeError):
            continue
        place = whole.rfind(_ANSWER)
        if place < 0:
            continue
        before, answer, after = _in_three(tokenizer, whole, place)
        asked_ids, prompt_ids = _ids(tokenizer, bare), _ids(tokenizer, prompt)
        # As TRL cuts: where the ids of prompt and conversation part.
        shared = _common(prompt_ids, (*before, *answer, *after))
        opening = min(_common(asked_ids, before), shared)
        header = before[opening:shared]
        if (
            not header and _ANSWER in other
        ):  # a template without a generation prompt: what closes every question opens an answer
            other_before = _in_three(tokenizer, other, other.rfind(_ANSWER))[0]
            header = before[len(before) - _common(before[::-1], other_before[::-1]) :]
        within = _in_three(tokenizer, longer, longer.rfind(_ANSWER))[2] if _ANSWER in longer else ()
        asked: _Ids = ()
        if longer.rfind(second) > longer.rfind(_ANSWER) >= 0:
            to = _in_three(tokenizer, longer, longer.rfind(second), len(second))[0]
            at = len(_in_three(tokenizer, longer, longer.rfind(_ANSWER))[0]) + len(answer)
            asked = to[at:]
            asked = asked[_common(asked, after) :]
        ended = prompt.rfind(first) + len(first)
        lead = prompt[ended:] if prompt.rfind(first) >= 0 else ""
        between = whole[len(prompt) : place] if whole.startswith(prompt) else ""
        space = "" if between.strip() else between
        # A space merges with most answers, and belongs to them then: to all of them, so that one rule holds.
        prefix = () if space and "\n" not in space else before[shared:]
        return _Around(header, prompt_ids[shared:], prefix, after, within, parts, asked, lead, space)
    logger.warning(
        "The chat template renders no conversation of one question and one answer: what it writes around an answer is not known, "
        "and counts in DPO, KTO and SFT on conversations."
    )
    return None


def _in_three(tokenizer: Any, whole: str, place: int, length: int = len(_ANSWER)) -> tuple[_Ids, _Ids, _Ids]:
    """Ids before the answer, of it and after it, in their context; a token that reaches into the answer is of it."""
    end = place + length
    if not getattr(tokenizer, "is_fast", False):  # without places of tokens: each part by itself
        return _ids(tokenizer, whole[:place]), _ids(tokenizer, whole[place:end]), _ids(tokenizer, whole[end:])
    found = tokenizer(text=whole, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = tuple(found["input_ids"]), found["offset_mapping"]
    first = next(i for i, (_, stop) in enumerate(places) if stop > place)
    last = max(i for i, (start, stop) in enumerate(places) if start < end and stop > start)
    return ids[:first], ids[first : last + 1], ids[last + 1 :]


def _ids(tokenizer: Any, text: str) -> _Ids:
    return tuple(tokenizer(text=text, add_special_tokens=False)["input_ids"])


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two sequences share at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
