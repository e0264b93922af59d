"""Which tokens count: one rule for fitting, checking, `read()`, rewards, monitors, terms, drift, subspaces and autoencoders.

In: token ids, and what a chat template writes around an answer. Out: a mask. The rule:

1. The first token of a row never counts. It draws attention whatever it is (an attention sink), so its activation says nothing of
   the text.
2. In a completion nothing counts from the end-of-turn token that closes it on, whatever follows (`include_end_of_turn` counts
   that one token too).
3. What the template writes is not the answer: role markers, a line break after the turn, an empty think block.
4. In a plain text all tokens but the special ones count. Where it holds turns of an assistant in the template's own marks, only
   those turns count; where it holds other marks of it alone, the conversation was cut before an answer, and nothing counts.
5. A row without a counted token is in no denominator.

Tokens with an outlying norm (`outliers`) are left out where a statistic runs over many tokens: drift metrics, principal
components, autoencoders. A score of one row keeps them: whether a token counts must not depend on the other rows. It must not
know trainers, nor what is read.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .hook_points import unwrap

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

logger = logging.getLogger(__name__)

# A word that no template writes by itself: what is rendered around it is the template's.
_ANSWER = "zqxanswer"


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
        opener (`int`, *optional*): a mark of its own by which every turn opens (`<|im_start|>`).
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


def end_of_turn_ids(model: Any, tokenizer: Any, chat_template: str | None = None) -> set[int]:
    """Ids that end a completion: the end-of-sequence tokens of the tokenizer and of the model's generation config, as in TRL, and
    the token by which the chat template closes a turn.

    Fitting, checking, watching and rewarding all leave out just these.
    """
    config = getattr(unwrap(model), "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    return set(ChatMarks.of(tokenizer, chat_template, ends=[token for token in listed if token is not None]).ends)


def counted_length(
    completion: Sequence[int], end_of_turn_ids: Collection[int], include_end_of_turn: bool = False
) -> int:
    """Tokens of a completion that count: those before the first end-of-turn token, and that one too on request."""
    for place, token in enumerate(completion):
        if token in end_of_turn_ids:
            return place + int(include_end_of_turn)
    return len(completion)


def without_first(mask: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """A mask (B, T) without the first real token of each row."""
    return mask & ~(real & (real.cumsum(1) == 1))


def counted_in_text(ids: Sequence[int], marks: ChatMarks) -> list[bool]:
    """Per token of a plain text whether it counts."""
    line = torch.tensor([list(ids)], dtype=torch.long)
    every = torch.ones_like(line, dtype=torch.bool)
    starts = torch.zeros_like(every)
    starts[:, :1] = True
    found: list[bool] = _answers(line, every, starts, marks, texts=True).mask[0].tolist()
    return found


@dataclass(frozen=True)
class Counted:
    """Counted tokens of a training batch, N of them in M sequences, through which every term reduces: the mean over sequences of
    the mean over that sequence's counted tokens.

    One path for all trainers, so that padding, packing, accumulation and ranks cannot move a term.

    Attributes:
        mask (`torch.BoolTensor` of shape (B, T)): True on them.
        sequence (`torch.LongTensor` of shape (N,)): which sequence each belongs to, 0 to M − 1, in order of the batch.
        sequences (`int`): M. A row of the batch is one sequence, unless it is packed, or holds several turns of an assistant.
        template (`torch.BoolTensor` of shape (B, T)): tokens that the template wrote between an assistant's header and its
            answer.
        starts (`torch.BoolTensor` of shape (B, T)): where a text begins.
        opens (`torch.BoolTensor` of shape (B, T)): where a turn of the assistant begins.
    """

    mask: torch.Tensor
    sequence: torch.Tensor
    sequences: int
    template: torch.Tensor
    starts: torch.Tensor
    opens: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        """How many tokens of each sequence count, (M,)."""
        return torch.bincount(self.sequence, minlength=self.sequences)

    def means(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over each sequence's counted tokens, (M, ...), of values (N, ...); 0 where none counts."""
        sums = values.new_zeros((self.sequences, *values.shape[1:])).index_add(0, self.sequence, values)
        return sums / self.counts.clamp(min=1).view(-1, *[1] * (values.dim() - 1))

    def rows(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (N, K) laid out as one row per sequence, (M, L, K), and the mask (M, L) of those that are there."""
        counts = self.counts
        longest = int(counts.max()) if self.sequences else 0
        mask = torch.arange(longest, device=values.device) < counts[:, None]
        return values.new_zeros((*mask.shape, *values.shape[1:])).masked_scatter(
            mask.view(*mask.shape, *[1] * (values.dim() - 1)).expand(*mask.shape, *values.shape[1:]), values
        ), mask

    @property
    def any(self) -> torch.Tensor:
        """Which sequences have a counted token, (M,)."""
        return self.counts > 0

    def texts(
        self, ids: torch.Tensor, template: bool = False, dropped: Sequence[int] = ()
    ) -> tuple[list[list[int]], list[list[bool]]]:
        """Ids and counts of each sequence as a row of its own, as `read()` would see it: without padding, without the template's
        tokens before the answer, and up to the last token that counts. Empty where none does.

        Args:
            ids (`torch.LongTensor` of shape (B, T)): of the batch.
            template (`bool`, defaults to `False`): leave the template's tokens in, as the trainer's own pass sees them.
            dropped (`Sequence[int]`): what the generation prompt has and a rendered row has not; see `ChatMarks`.
        """
        places = self.mask.nonzero().tolist()
        owners = self.sequence.tolist()
        last: dict[int, tuple[int, int]] = {}
        own: dict[int, set[int]] = {}
        for (row, place), sequence in zip(places, owners, strict=True):
            last[sequence] = (row, place)
            own.setdefault(sequence, set()).add(place)
        rows: list[list[int]] = [[] for _ in range(self.sequences)]
        counts: list[list[bool]] = [[] for _ in range(self.sequences)]
        for sequence, (row, end) in last.items():
            first = int(self.starts[row, : end + 1].nonzero()[-1])
            kept = [p for p in range(first, end + 1) if template or not self.template[row, p]]
            rows[sequence] = ids[row, kept].tolist()
            counts[sequence] = [place in own[sequence] for place in kept]
            if dropped and not template:  # before the turn that is scored; earlier ones are as the template has them
                answer = min(own[sequence])
                opened: list[int] = self.opens[row, first : answer + 1].nonzero()[:, 0].tolist()
                if opened:
                    at = sum(p < first + opened[-1] for p in kept)
                    rows[sequence][at:at] = list(dropped)
                    counts[sequence][at:at] = [False] * len(dropped)
        return rows, counts


def input_ids(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Ids (B, T) that the policy's training pass runs over."""
    if "prompt_ids" in inputs:  # GRPO and RLOO
        return torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    ids: torch.Tensor = inputs["input_ids"]
    return ids


def counted(
    inputs: Mapping[str, Any], marks: ChatMarks | Collection[int] = (), include_end_of_turn: bool = False
) -> Counted:
    """Counted tokens of a trainer's batch: those of the answers among the ones that its own loss counts.

    Args:
        inputs (`dict`): what `compute_loss` gets.
        marks (`ChatMarks`): of the trainer's tokenizer and template; or only the ids that end a turn.
        include_end_of_turn (`bool`, defaults to `False`): count the end-of-turn token that closes an answer too.
    """
    if not isinstance(marks, ChatMarks):
        marks = ChatMarks(ends=frozenset(marks))
    ids = input_ids(inputs)
    position_ids = None
    if "prompt_ids" in inputs:
        mask = inputs["completion_mask"].bool()
        if inputs.get("tool_mask") is not None:
            mask = mask & inputs["tool_mask"].bool()
        mask = torch.cat([torch.zeros_like(inputs["prompt_ids"], dtype=torch.bool), mask], dim=1)
        real = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1).bool()
        # What a policy wrote is its answer, whatever marks it writes.
        marks = ChatMarks(ends=marks.ends, special=marks.special)
    else:
        mask = inputs["labels"] != -100 if "labels" in inputs else inputs["completion_mask"].bool()
        # Packed or padding-free batches are one long row, and come with positions instead of an attention mask.
        if "attention_mask" not in inputs:
            position_ids = inputs.get("position_ids")
        real = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(mask)
    starts = real & (real.cumsum(1) == 1) if position_ids is None else position_ids == 0
    found = _answers(ids, mask & real, starts, marks, include_end_of_turn, texts="labels" in inputs)
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    sequences = len(ids)
    if "labels" in inputs:
        # A pack holds several texts, and a conversation several turns: each that has a counted token is a sequence.
        texts = starts.flatten().cumsum(0).view_as(ids)
        keys = texts * (int(found.turn.max()) + 1) + found.turn
        present = keys[found.mask].unique()
        rows = torch.searchsorted(present, keys.contiguous())
        sequences = len(present)
    return Counted(found.mask, rows[found.mask], sequences, found.template, starts, found.opens)


def turns_in(ids: Sequence[int], marks: ChatMarks) -> int:
    """How many turns of an assistant a completion holds: its own, and one for each header in it; where the template has no
    header, one for each end of a turn that more follows on."""
    stem = marks.header[: marks.stem]
    if not stem:
        rest = list(ids)
        while rest and (rest[-1] in marks.ends or rest[-1] in marks.closing):
            rest.pop()
        return 1 + (sum(token in marks.ends for token in rest) if marks.closing else 0)
    if stem[0] not in ids:
        return 1
    size = len(stem)
    return 1 + sum(tuple(ids[i : i + size]) == stem for i in range(len(ids) - size + 1))


@dataclass(frozen=True)
class _Answers:
    mask: torch.Tensor  # (B, T)
    template: torch.Tensor  # (B, T)
    turn: torch.Tensor  # (B, T), how many turns have begun in the row
    opens: torch.Tensor  # (B, T)


def _answers(
    ids: torch.Tensor,
    mask: torch.Tensor,
    starts: torch.Tensor,
    marks: ChatMarks,
    include_end_of_turn: bool = False,
    texts: bool = False,
) -> _Answers:
    """The answers' own tokens among those of `mask` (B, T), in texts that begin where `starts` (B, T) says.

    A turn begins after the template's header (where there is none, where the mask begins), and is over at the end-of-turn
    token, or where a user's turn opens. With `texts`, a text whose mask begins at its first token and which has no mark of a
    turn is no answer to anything: all of it but special tokens counts. Where it has one, but no header, the conversation was cut
    before the answer, and nothing counts.
    """
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    start = torch.where(starts, place, 0).cummax(1).values
    after_header = _after(ids, marks.header, start, place)
    if (
        0 < marks.stem < len(marks.header)
    ):  # the answer's white space merged with the header's: that token is of the answer
        after_stem = _after(ids, marks.header[: marks.stem], start, place)
        after_header |= after_stem & (ids != marks.header[marks.stem])
    before = torch.zeros_like(mask)
    before[:, 1:] = mask[:, :-1]
    edge = mask & (~before | starts)
    text_of = starts.flatten().cumsum(0).view_as(ids)
    # Only where the header was cut away, or there is no template, does the mask say where the answer begins.
    with_header = torch.isin(text_of, text_of[after_header])
    whole = edge & starts
    cut = torch.zeros_like(mask)  # conversations that are all counted, and end before an answer begins
    turned = torch.zeros_like(mask)
    if texts:
        # TRL leaves the first token of each text of a pack out of the loss.
        whole[:, 1:] |= edge[:, 1:] & starts[:, :-1] & ~mask[:, :-1]
        turned = _begins(ids, marks.asked, start, place)
        marked = turned if marks.opener is None else turned | (ids == marks.opener)
        cut = torch.isin(text_of, text_of[whole]) & torch.isin(text_of, text_of[marked]) & ~with_header
    opens = after_header | (edge & ~with_header & ~cut)
    opened = torch.where(opens, place, -1).cummax(1).values
    ends = torch.isin(ids, _tensor(marks.ends | marks.inner, ids)) | turned
    ended = torch.where(ends, place, -1).cummax(1).values
    if include_end_of_turn:
        kept = ends & ~turned
        ended = torch.where(turned, place, -1).cummax(1).values
        earlier = torch.where(kept, place, -1).cummax(1).values
        ended = torch.maximum(ended, torch.cat([torch.full_like(earlier[:, :1], -1), earlier[:, :-1]], dim=1))
    inside = (opened >= start) & (ended < opened)
    template = torch.zeros_like(mask)
    size = len(marks.prefix)
    if size:
        last = _after(ids, marks.prefix, start, place, gap=0)  # at the last token of the prefix
        last &= opened == place - (size - 1)  # where it stands right at the beginning of the turn
        template = _spread(last, size) & mask  # what stands in the prompt stays there
    found = mask & inside & ~template
    head = marks.closing_head
    if head:  # the template's tokens between the answer and the end of its turn
        closed = _after(ids, head, start, place, gap=0)
        following = torch.ones_like(ends)
        following[:, :-1] = ends[:, 1:] | ~mask[:, 1:]
        closed &= following & found
        found &= ~_spread(closed, len(head))
    if texts:
        plain = torch.isin(text_of, text_of[whole]) & ~with_header & ~cut
        every = mask & ~torch.isin(ids, _tensor(marks.special, ids))
        if any(
            token in marks.ends for token in marks.closing
        ):  # a piece of an answer: what the template closes it with
            every &= ~_spread(_after(ids, marks.closing, start, place, gap=0), len(marks.closing))
        found = torch.where(plain, every, found)
    return _Answers(found & ~starts, template, opens.cumsum(1), opens)


def _after(
    ids: torch.Tensor, pattern: Sequence[int], start: torch.Tensor, place: torch.Tensor, gap: int = 1
) -> torch.Tensor:
    """Where a pattern of ids is over: at its last token with `gap` 0, at the token after it with 1; within one text."""
    size = len(pattern)
    found = torch.zeros_like(ids, dtype=torch.bool)
    if not size or size + gap > ids.shape[1]:
        return found
    window = ids.unfold(1, size, 1)  # (B, T − size + 1, size)
    match = (window == _tensor(pattern, ids, ordered=True)).all(-1)
    last = size - 1 + gap
    found[:, last:] = match[:, : ids.shape[1] - last]
    return found & (place - last >= start)


def _spread(last: torch.Tensor, size: int) -> torch.Tensor:
    """All `size` tokens of patterns, of which `last` (B, T) says where each ends."""
    found = last.clone()
    for shift in range(1, min(size, last.shape[1])):
        found[:, :-shift] |= last[:, shift:]
    return found


def _begins(ids: torch.Tensor, pattern: Sequence[int], start: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Where a pattern of ids begins, within one text."""
    size = len(pattern)
    found = torch.zeros_like(ids, dtype=torch.bool)
    if 0 < size <= ids.shape[1]:
        found[:, : ids.shape[1] - size + 1] = _after(ids, pattern, start, place, gap=0)[:, size - 1 :]
    return found


def _tensor(values: Collection[int], like: torch.Tensor, ordered: bool = False) -> torch.Tensor:
    return torch.tensor(list(values) if ordered else sorted(values), dtype=like.dtype, device=like.device)


_Ids = tuple[int, ...]


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
            beside = _in_three(tokenizer, other, other.rfind(_ANSWER))[0]
            header = before[len(before) - _common(before[::-1], beside[::-1]) :]
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
