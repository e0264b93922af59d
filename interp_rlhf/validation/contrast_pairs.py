"""Contrast pairs: two prompts that differ in one thing, and what a model should say after one of them.

In: rows of a file or of a program. Out: token ids of both prompts, and which of their positions belong together. It must not know
what is measured on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..activations.batch import tokenize_examples, tokenize_prompt
from ..activations.chat_marks import ChatMarks
from ..concepts.examples import read_rows
from ..messages import as_list, completion_text, conversation, prompt_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_ANSWERS = ("followed", "violated")


@dataclass(frozen=True)
class PromptRows:
    """One prompt as a model reads it: R rows of token ids, one per answer that takes more than one token, right-padded.

    Attributes:
        input_ids (`torch.LongTensor` of shape (R, T)): the prompt and what of the answer is needed to predict the rest of it.
        attention_mask (`torch.LongTensor` of shape (R, T)): 0 on padding.
        prompt (`int`): tokens of the prompt, P.
        answers (`tuple[list[int], ...]`): token ids of the followed and of the violated answer; empty where there are none.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    prompt: int
    answers: tuple[list[int], ...] = ()


@dataclass(frozen=True)
class TokenPair:
    """A pair as token ids.

    Attributes:
        group (`str`): pairs of one group have a prompt in common, and stay together in a split.
        clean, corrupt (`PromptRows`): the two prompts.
        places (`tuple[list[int], list[int]]`): positions of the clean prompt, and those of the corrupt prompt at the same places.
        pieces (`list[str]`): text at these places; both texts where they differ.
        left_out (`int`): positions of the longer prompt that have no partner.
    """

    group: str
    clean: PromptRows
    corrupt: PromptRows
    places: tuple[list[int], list[int]]
    pieces: list[str]
    left_out: int

    @property
    def same(self) -> bool:
        """True if both prompts are the same tokens."""
        return torch.equal(self.clean.input_ids, self.corrupt.input_ids)


def load_pairs(source: str | Path) -> list[dict[str, Any]]:
    """Rows of a file of contrast pairs: JSONL, CSV or Parquet.

    Raises:
        `FileNotFoundError`: no such file.
        `ValueError`: no rows, or a row without the keys of a pair.
    """
    rows = [{key: value for key, value in row.items() if value is not None} for row in read_rows(source)]
    if not rows:
        raise ValueError(
            f"`{source}` holds no pairs – expected rows with `clean`, `corrupt`, `followed` and `violated`."
        )
    return rows


def tokenize_pairs(
    pairs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    answers: bool = True,
    align: bool = False,
    one_prompt: bool = False,
) -> list[TokenPair]:
    """Pairs as token ids.

    Args:
        pairs (`list[dict]`): each with `clean` and `corrupt`, texts or lists of messages, and the texts `followed` and
            `violated`.
        answers (`bool`, defaults to `True`): whether the answers are needed.
        align (`bool`, defaults to `False`): prompts of unequal length are matched by what they begin with and end with.
        one_prompt (`bool`, defaults to `False`): two models read the clean prompt, and `corrupt` is not looked at.

    Raises:
        `ValueError`: a pair of another form, or with prompts of unequal length. The message has its number.
    """
    rows = as_list(pairs)
    if not rows:
        raise ValueError("`pairs` is empty – expected at least one pair of prompts.")
    tokenized = []
    for number, row in enumerate(rows, 1):
        try:
            tokenized.append(_tokenized(row, tokenizer, answers, align, one_prompt))
        except ValueError as error:
            raise ValueError(f"Pair {number}: {error}") from None
    return tokenized


def _tokenized(row: Any, tokenizer: Any, answers: bool, align: bool, one_prompt: bool) -> TokenPair:
    prompts = [_prompt_of(row, "clean"), _prompt_of(row, "clean" if one_prompt else "corrupt")]
    said = [_answer_of(row, name) for name in _ANSWERS] if answers else []
    if answers and said[0] == said[1]:
        raise ValueError(f"`followed` and `violated` are both {said[0]!r} – expected two answers that differ.")
    clean, corrupt = (_rows_of_prompt(prompt, said, tokenizer) for prompt in prompts)
    if clean.answers != corrupt.answers:
        raise ValueError(
            f"the answers have the tokens {list(clean.answers)} after `clean` and {list(corrupt.answers)} after `corrupt` – "
            "expected the same: they merge with the prompts' ends. End both prompts alike, and begin the answers with the space "
            "that comes before them."
        )
    ids = [one.input_ids[0, : one.prompt].tolist() for one in (clean, corrupt)]
    places = _places(ids[0], ids[1], align)
    texts = [[tokenizer.decode([own[i]]) for i in at] for own, at in zip(ids, places, strict=True)]
    pieces = [one if one == other else f"{one}/{other}" for one, other in zip(*texts, strict=True)]
    return TokenPair(prompt_text(prompts[0]), clean, corrupt, places, pieces, max(map(len, ids)) - len(pieces))


def _prompt_of(row: Any, name: str) -> Any:
    found = row.get(name) if hasattr(row, "get") else None
    if not found:
        keys = sorted(row) if hasattr(row, "get") else type(row).__name__
        raise ValueError(f"it has {keys} – expected `{name}`, a text or a list of messages.")
    return found if isinstance(found, str) else conversation(found)


def _answer_of(row: Mapping[str, Any], name: str) -> str:
    text = completion_text(row[name]) if row.get(name) else ""
    if not text:
        raise ValueError(f"it has {sorted(row)} – expected `{name}`, the text of an answer.")
    return text


def _rows_of_prompt(prompt: Any, said: Sequence[str], tokenizer: Any) -> PromptRows:
    if not said:
        ids = tokenize_prompt(prompt, tokenizer, parts=ChatMarks.of(tokenizer).parts)
        return PromptRows(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), len(ids))
    batch = tokenize_examples([{"prompt": prompt, "completion": text} for text in said], tokenizer)
    whole = [ids[seen].tolist() for ids, seen in zip(batch.input_ids, batch.attention_mask, strict=True)]
    if not bool(batch.completion_mask.any(1).all()):
        raise ValueError(
            f"the answers are {list(said)} – expected at least one token in each, which is no end of a turn."
        )
    start = int(batch.completion_mask[0].int().argmax())
    answers = tuple(ids[start:] for ids in whole)
    if all(len(answer) == 1 for answer in answers):
        return PromptRows(torch.tensor([whole[0][:start]]), torch.ones(1, start, dtype=torch.long), start, answers)
    # The last token of an answer is predicted and never read.
    width = start + max(map(len, answers)) - 1
    input_ids, attention_mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    for row, ids in enumerate(whole):
        input_ids[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        attention_mask[row, : len(ids) - 1] = 1
    return PromptRows(input_ids, attention_mask, start, answers)


def _places(clean: Sequence[int], corrupt: Sequence[int], align: bool) -> tuple[list[int], list[int]]:
    if len(clean) == len(corrupt):
        return list(range(len(clean))), list(range(len(corrupt)))
    if not align:
        raise ValueError(
            f"`clean` has {len(clean)} tokens and `corrupt` {len(corrupt)} – expected prompts of equal length, so that each "
            "position has a partner. Reword one of them, or pass `align=True` (`--align`), which leaves out the differing middle."
        )
    shorter = min(len(clean), len(corrupt))
    begin = next((i for i in range(shorter) if clean[i] != corrupt[i]), shorter)
    end = next((i for i in range(shorter - begin) if clean[-1 - i] != corrupt[-1 - i]), shorter - begin)
    at = [[*range(begin), *range(len(ids) - end, len(ids))] for ids in (clean, corrupt)]
    return at[0], at[1]
