"""Token batches and the scores that belong to them.

In: texts, conversations or token ids. Out: `TokenBatch`, which says for every token whether it counts, and
`ConceptScores`, which says for every score on which token it was computed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..messages import as_list, content_text, split_example
from .answers import counted_in_text, counted_length, without_first
from .chat_marks import ChatMarks

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


@dataclass(frozen=True)
class TokenBatch:
    """Token ids with two masks.

    Attributes:
        input_ids (`torch.LongTensor` of shape (B, T)): padded on either side or both.
        attention_mask (`torch.BoolTensor` of shape (B, T)): True on tokens that the model reads.
        completion_mask (`torch.BoolTensor` of shape (B, T)): True on tokens that count in a score; never on a row's first token,
            whatever is given (see `counted`).

    Example:

    ```python
    >>> from interp_rlhf import TokenBatch

    >>> batch = TokenBatch.from_ids(prompt_ids=[[5, 6], [5]], completion_ids=[[7, 8], [9]])
    >>> batch.completion_mask.tolist()
    [[False, False, True, True], [False, True, False, False]]

    ```
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor

    def __post_init__(self) -> None:
        shapes = {tuple(tensor.shape) for tensor in (self.input_ids, self.attention_mask, self.completion_mask)}
        if len(shapes) != 1 or self.input_ids.dim() != 2:
            raise ValueError(
                f"`input_ids`, `attention_mask` and `completion_mask` have shapes {sorted(shapes)} – expected one "
                "shape (B, T)."
            )
        for name in ("attention_mask", "completion_mask"):
            object.__setattr__(self, name, getattr(self, name).bool())
        object.__setattr__(self, "completion_mask", without_first(self.completion_mask, self.attention_mask))

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def part(self, rows: slice) -> TokenBatch:
        """Some of its rows."""
        return TokenBatch(self.input_ids[rows], self.attention_mask[rows], self.completion_mask[rows])

    @classmethod
    def from_ids(
        cls,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        end_of_turn_ids: Collection[int] = (),
        counts: Sequence[Sequence[bool]] | None = None,
    ) -> TokenBatch:
        """Right-padded batch of prompts and completions given as token ids.

        Args:
            prompt_ids (`list[list[int]]`): B prompts.
            completion_ids (`list[list[int]]`): B completions, exactly as they were generated.
            end_of_turn_ids (`set[int]`): ids of which the first ends a completion: it and what follows do not count. Pass none to
                count all.
            counts (`list[list[bool]]`, *optional*): per completion token whether it counts, in place of that rule.
        """
        if counts is None:
            counted = [counted_length(completion, end_of_turn_ids) for completion in completion_ids]
            counts = [[i < n for i in range(len(ids))] for n, ids in zip(counted, completion_ids, strict=True)]
        width = max((len(p) + len(c) for p, c in zip(prompt_ids, completion_ids, strict=True)), default=0)
        input_ids = torch.zeros(len(prompt_ids), width, dtype=torch.long)
        attention_mask = torch.zeros(len(prompt_ids), width, dtype=torch.bool)
        completion_mask = torch.zeros(len(prompt_ids), width, dtype=torch.bool)
        for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
            ids = [*prompt, *completion]
            input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            attention_mask[row, : len(ids)] = True
            completion_mask[row, len(prompt) : len(ids)] = torch.tensor(counts[row], dtype=torch.bool)
        return cls(input_ids, attention_mask, completion_mask)


@dataclass(frozen=True)
class ConceptScores:
    """Scores per token, with the tokens that they belong to.

    Attributes:
        scores (`torch.FloatTensor` of shape (B, T, K)): float32, 0 where the model read nothing.
        mask (`torch.BoolTensor` of shape (B, T)): True on tokens that count.
        token_ids (`torch.LongTensor` of shape (B, T)): ids that the scores were computed on.
        name (`str`): name of the readout.
        reader (`str`): which model read them: `reference` or `policy`.

    Example:

    ```python
    >>> from interp_rlhf import read

    >>> scores = read(model, ["A letter came late."], readout, tokenizer=tokenizer)[readout.name]
    >>> scores.scores.shape[:2] == scores.mask.shape == scores.token_ids.shape
    True

    ```
    """

    scores: torch.Tensor
    mask: torch.Tensor
    token_ids: torch.Tensor
    name: str
    reader: str = "policy"

    def require_finite(self) -> None:
        """Raises `ValueError` where a counted token has a score that is not a number: a wrong reward is worse than none."""
        if (problem := self.problem()) is not None:
            raise ValueError(problem)

    def problem(self) -> str | None:
        """What `require_finite` would say; None where all is well."""
        bad = ~torch.isfinite(self.scores).all(-1) & self.mask
        if bad.any():
            row, token = bad.nonzero()[0].tolist()
            return (
                f"Readout `{self.name}` gives {self.scores[row, token].tolist()} at row {row}, token {token} (token id "
                f"{int(self.token_ids[row, token])}, {int(bad.sum())} such tokens) – expected finite scores. The "
                f"activations of the {self.reader} model or the artifact hold NaN or infinity: check both before training on."
            )
        return None


def tokenize_examples(
    examples: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
    tokenizer: Any,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    end_of_turn_ids: Collection[int] = (),
    include_end_of_turn: bool = False,
) -> TokenBatch:
    """Token batch of examples in the formats that TRL's datasets have.

    A `completion` is tokenized behind the end of its prompt, by itself where tokens of both would merge; where the example has
    `completion_ids`, they are taken as they are. No end-of-turn token is added. What counts is in `counted`. Columns that TRL
    renders, `tools` and `chat_template_kwargs`, are rendered here too.

    Args:
        examples (`list`): strings, or mappings with `text`, with `messages` (the last one from the assistant), or with
            `prompt` and `completion`, each plain or conversational. One of them alone is that one.
        tokenizer: the model's tokenizer.
        chat_template (`str`, *optional*), chat_template_kwargs (`dict`, *optional*): as the trainer was given them; an example's
            own `chat_template_kwargs` come first.
        end_of_turn_ids (`set[int]`, *optional*): ids that end a completion, besides the tokenizer's EOS token and that
            by which the template closes a turn.
        include_end_of_turn (`bool`, defaults to `False`): count the end-of-turn token that closes a completion.

    Raises:
        `ValueError`: an example of another form, one with several turns to score, or one that the template does not take; the
            message names its index.
    """
    marks = ChatMarks.of(tokenizer, chat_template, chat_template_kwargs, end_of_turn_ids)
    prompts: list[list[int]] = []
    completions: list[list[int]] = []
    counts: list[list[bool]] = []
    for index, example in enumerate(as_list(examples)):
        if isinstance(example, str):
            example = {"text": example}
        if not isinstance(example, Mapping):
            raise ValueError(f"Example {index} is a {type(example).__name__} – expected a string or a mapping.")
        prompt, completion = split_example(example, f"Example {index}")
        if prompt is None:
            ids = list(tokenizer(text=completion)["input_ids"])
            prompts.append([])
            completions.append(ids)
            counts.append(counted_in_text(ids, marks))
            continue
        arguments = {**dict(chat_template_kwargs or {}), **_column_kwargs(example, index)}
        prompt_ids = _prompt_ids(prompt, example, index, tokenizer, chat_template, arguments, marks.parts)
        completion_ids = _completion_ids(prompt, completion, example, tokenizer, marks)
        counted = counted_length(completion_ids, marks.ends, include_end_of_turn)
        prompts.append(prompt_ids)
        completions.append(completion_ids)
        counts.append([i < counted for i in range(len(completion_ids))])
    return TokenBatch.from_ids(prompts, completions, counts=counts)


def _prompt_ids(
    prompt: Any,
    example: Mapping[str, Any],
    index: int,
    tokenizer: Any,
    chat_template: str | None,
    arguments: Mapping[str, Any],
    parts: bool,
) -> list[int]:
    """Ids of an example's prompt; errors name the example's index."""
    try:
        return tokenize_prompt(prompt, tokenizer, chat_template, arguments, _tools(example, index), parts)
    except ValueError as error:
        said = str(error)
        raise ValueError(said if said.startswith("Example") else f"Example {index}: {said}") from None


def _completion_ids(
    prompt: Any, completion: str, example: Mapping[str, Any], tokenizer: Any, marks: ChatMarks
) -> list[int]:
    """Ids of an example's completion: its own `completion_ids`, or those of the text behind the end of the prompt."""
    if example.get("completion_ids") is not None:
        return list(example["completion_ids"])
    if isinstance(prompt, str):
        return _behind(prompt, completion, tokenizer)
    written = len(marks.prefix) if marks.space else 0
    return _behind(marks.lead, marks.space + completion, tokenizer, written, completion)


def tokenize_prompt(
    prompt: Any,
    tokenizer: Any,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Sequence[Any] | None = None,
    parts: bool = False,
) -> list[int]:
    """Ids of one prompt, as TRL's rollout trainers make them; with `parts`, content goes to the template as a list of parts.

    Raises:
        `ValueError`: the chat template does not take it, or there is none.
    """
    if isinstance(prompt, str):
        return list(tokenizer(text=prompt)["input_ids"])
    from jinja2.exceptions import TemplateError

    messages = [
        {**message, "content": content_text(message["content"])} if "content" in message else dict(message)
        for message in prompt
    ]
    if parts:
        messages = [
            {**m, "content": [{"type": "text", "text": m["content"]}]} if "content" in m else m for m in messages
        ]
    if chat_template is None and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "the prompt is a conversation and the tokenizer has no chat template – expected one. Use the tokenizer of a chat "
            "model, set `tokenizer.chat_template`, or give plain text."
        )
    try:
        encoded = tokenizer.apply_chat_template(
            messages,
            chat_template=chat_template,
            tools=tools,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **dict(chat_template_kwargs or {}),
        )
    except TemplateError as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise ValueError(
            f"the chat template does not take a conversation of the roles {roles}: {error} – expected one that it renders. "
            "Where it has no system role, put those words into the first user message."
        ) from None
    return list(encoded["input_ids"])


def _behind(lead: str, text: str, tokenizer: Any, written: int = 0, bare: str | None = None) -> list[int]:
    """Ids of a text as they are behind what comes before it, without the first `written`; those of `bare` (by default, of the
    text) by itself where tokens of both sides would merge, since what is generated never does."""
    before = list(tokenizer(text=lead, add_special_tokens=False)["input_ids"])
    both = list(tokenizer(text=lead + text, add_special_tokens=False)["input_ids"])
    if both[: len(before)] == before:
        return both[len(before) + written :]
    return list(tokenizer(text=text if bare is None else bare, add_special_tokens=False)["input_ids"])


def _tools(example: Mapping[str, Any], index: int) -> Any:
    """The column `tools` as TRL takes it: a list, or JSON of one."""
    tools = example.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(
                f"Example {index} has `tools` that are no JSON ({error}) – expected a list of tools."
            ) from None
    return tools or None


def _column_kwargs(example: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The column `chat_template_kwargs`; what a data set filled up with None was not given."""
    template_kwargs = example.get("chat_template_kwargs")
    if isinstance(template_kwargs, str):
        try:
            template_kwargs = json.loads(template_kwargs)
        except ValueError as error:
            raise ValueError(f"Example {index} has `chat_template_kwargs` that are no JSON ({error}).") from None
    if template_kwargs is not None and not isinstance(template_kwargs, Mapping):
        raise ValueError(f"Example {index} has `chat_template_kwargs` {template_kwargs!r} – expected a mapping.")
    return dict(template_kwargs or {})
