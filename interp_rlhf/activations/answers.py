"""Where answers are in rows of token ids: the rule that `counted` states, on tensors.

In: token ids, masks, and what a chat template writes around an answer. Out: masks. It must not know trainers or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from .chat_marks import ChatMarks


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
    found: list[bool] = find_answers(line, every, starts, marks, texts=True).mask[0].tolist()
    return found


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
class Answers:
    mask: torch.Tensor  # (B, T)
    template: torch.Tensor  # (B, T)
    turn: torch.Tensor  # (B, T), how many turns have begun in the row
    opens: torch.Tensor  # (B, T)


def find_answers(
    ids: torch.Tensor,
    mask: torch.Tensor,
    starts: torch.Tensor,
    marks: ChatMarks,
    include_end_of_turn: bool = False,
    texts: bool = False,
) -> Answers:
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
    ends = torch.isin(ids, _ids_like(marks.ends | marks.inner, ids)) | turned
    ended = torch.where(ends, place, -1).cummax(1).values
    if include_end_of_turn:
        ended = _ended_before(ends & ~turned, turned, place)
    inside = (opened >= start) & (ended < opened)
    template = torch.zeros_like(mask)
    size = len(marks.prefix)
    if size:
        last = _after(ids, marks.prefix, start, place, gap=0)  # at the last token of the prefix
        last &= opened == place - (size - 1)  # where it stands right at the beginning of the turn
        template = _whole_patterns(last, size) & mask  # what stands in the prompt stays there
    found = mask & inside & ~template
    found &= ~_closings(ids, found, mask, ends, marks, start, place)
    if texts:
        plain = torch.isin(text_of, text_of[whole]) & ~with_header & ~cut
        found = torch.where(plain, _plain_tokens(ids, mask, marks, start, place), found)
    return Answers(found & ~starts, template, opens.cumsum(1), opens)


def _ended_before(ends: torch.Tensor, turned: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Where a turn ended last, (B, T), if the end-of-turn token itself counts: only tokens after it are outside of the turn."""
    earlier = torch.where(ends, place, -1).cummax(1).values
    shifted = torch.cat([torch.full_like(earlier[:, :1], -1), earlier[:, :-1]], dim=1)
    return torch.maximum(torch.where(turned, place, -1).cummax(1).values, shifted)


def _closings(
    ids: torch.Tensor,
    answers: torch.Tensor,
    mask: torch.Tensor,
    ends: torch.Tensor,
    marks: ChatMarks,
    start: torch.Tensor,
    place: torch.Tensor,
) -> torch.Tensor:
    """The template's tokens (B, T) between an answer and the end of its turn."""
    head = marks.closing_head
    if not head:
        return torch.zeros_like(mask)
    closed = _after(ids, head, start, place, gap=0)
    following = torch.ones_like(ends)
    following[:, :-1] = ends[:, 1:] | ~mask[:, 1:]
    return _whole_patterns(closed & following & answers, len(head))


def _plain_tokens(
    ids: torch.Tensor, mask: torch.Tensor, marks: ChatMarks, start: torch.Tensor, place: torch.Tensor
) -> torch.Tensor:
    """Tokens (B, T) that count in plain texts: all but special ones, and but those by which the template closes an answer."""
    counted = mask & ~torch.isin(ids, _ids_like(marks.special, ids))
    if any(token in marks.ends for token in marks.closing):
        counted &= ~_whole_patterns(_after(ids, marks.closing, start, place, gap=0), len(marks.closing))
    return counted


def _after(
    ids: torch.Tensor, pattern: Sequence[int], start: torch.Tensor, place: torch.Tensor, gap: int = 1
) -> torch.Tensor:
    """True where a pattern of ids is over: at its last token with `gap` 0, at the token after it with 1; within one text."""
    size = len(pattern)
    over = torch.zeros_like(ids, dtype=torch.bool)
    if not size or size + gap > ids.shape[1]:
        return over
    window = ids.unfold(1, size, 1)  # (B, T − size + 1, size)
    match = (window == _ids_like(pattern, ids, ordered=True)).all(-1)
    last = size - 1 + gap
    over[:, last:] = match[:, : ids.shape[1] - last]
    return over & (place - last >= start)


def _whole_patterns(last: torch.Tensor, size: int) -> torch.Tensor:
    """Mask of all `size` tokens of each pattern; `last` (B, T) marks the patterns' last tokens."""
    inside = last.clone()
    for shift in range(1, min(size, last.shape[1])):
        inside[:, :-shift] |= last[:, shift:]
    return inside


def _begins(ids: torch.Tensor, pattern: Sequence[int], start: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """True where a pattern of ids begins, within one text."""
    size = len(pattern)
    begins = torch.zeros_like(ids, dtype=torch.bool)
    if 0 < size <= ids.shape[1]:
        begins[:, : ids.shape[1] - size + 1] = _after(ids, pattern, start, place, gap=0)[:, size - 1 :]
    return begins


def _ids_like(values: Collection[int], like: torch.Tensor, ordered: bool = False) -> torch.Tensor:
    return torch.tensor(list(values) if ordered else sorted(values), dtype=like.dtype, device=like.device)
