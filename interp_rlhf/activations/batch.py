"""Token batches and the scores that belong to them.

In: texts, conversations or token ids. Out: `TokenBatch`, which says for every token whether it counts, and
`ConceptScores`, which says for every score on which token it was computed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .hook_points import unwrap


@dataclass(frozen=True)
class TokenBatch:
    """Token ids with two masks.

    Attributes:
        input_ids (`torch.LongTensor` of shape (B, T)): padded on either side or both.
        attention_mask (`torch.BoolTensor` of shape (B, T)): True on tokens that the model reads.
        completion_mask (`torch.BoolTensor` of shape (B, T)): True on tokens that count in a score.
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
            end_of_turn_ids (`set[int]`): ids that do not count where they end a completion. Pass none to count them.
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


def prompt_text(prompt: Any) -> str:
    """A prompt as it is shown: text as it is, messages one per line."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def end_of_turn_ids(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end a completion: the tokenizer's and the model's generation config's end-of-sequence tokens, as in TRL.

    Fitting, checking, watching and rewarding all leave out just these.
    """
    config = getattr(unwrap(model), "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    return {token for token in [tokenizer.eos_token_id, *listed] if token is not None}


def counted_length(completion: Sequence[int], end_of_turn_ids: Collection[int]) -> int:
    """Tokens of a completion that count: all but the end-of-turn tokens that close it."""
    length = len(completion)
    while length and completion[length - 1] in end_of_turn_ids:
        length -= 1
    return length


@dataclass(frozen=True)
class ConceptScores:
    """Scores per token, with the tokens that they belong to.

    Attributes:
        scores (`torch.FloatTensor` of shape (B, T, K)): float32, 0 where the model read nothing.
        mask (`torch.BoolTensor` of shape (B, T)): True on tokens that count.
        token_ids (`torch.LongTensor` of shape (B, T)): ids that the scores were computed on.
        name (`str`): name of the readout.
        reader (`str`): which model read them: `reference` or `policy`.
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
                f"activations of the {self.reader} model or the artifact hold NaN or infinity: check both before "
                "training on."
            )
        return None


def tokenize_examples(
    examples: Sequence[str | Mapping[str, Any]],
    tokenizer: Any,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    end_of_turn_ids: Collection[int] | None = None,
) -> TokenBatch:
    """Token batch of examples in the formats that TRL's datasets have.

    A `completion` is tokenized by itself and put behind its prompt, as generation puts it; where the example has
    `completion_ids`, they are taken as they are. No end-of-turn token is added. In a plain text all tokens but the
    special ones count.

    Args:
        examples (`list`): strings, or mappings with `text`, with `messages` (the last one from the assistant), or with
            `prompt` and `completion`, each plain or conversational.
        tokenizer: the model's tokenizer.
        chat_template (`str`, *optional*), chat_template_kwargs (`dict`, *optional*): as the trainer was given them.
        end_of_turn_ids (`set[int]`, *optional*): ids that do not count at the end of a completion; the tokenizer's
            end-of-sequence token where none are given.

    Raises:
        `ValueError`: an example of another form; the message names its index.
    """
    if end_of_turn_ids is None:
        end_of_turn_ids = {tokenizer.eos_token_id}
    special = set(tokenizer.all_special_ids)
    prompts: list[list[int]] = []
    completions: list[list[int]] = []
    counts: list[list[bool]] = []
    for index, example in enumerate(examples):
        if isinstance(example, str):
            example = {"text": example}
        if "text" in example:
            ids = list(tokenizer(text=example["text"])["input_ids"])
            prompts.append([])
            completions.append(ids)
            counts.append([token not in special for token in ids])
            continue
        prompt, completion = _split(example, index)
        prompt_ids = tokenize_prompt(prompt, tokenizer, chat_template, chat_template_kwargs)
        if example.get("completion_ids") is not None:
            completion_ids = list(example["completion_ids"])
        else:
            completion_ids = list(tokenizer(text=completion, add_special_tokens=False)["input_ids"])
        counted = counted_length(completion_ids, end_of_turn_ids)
        prompts.append(prompt_ids)
        completions.append(completion_ids)
        counts.append([i < counted for i in range(len(completion_ids))])
    return TokenBatch.from_ids(prompts, completions, counts=counts)


def tokenize_prompt(
    prompt: Any,
    tokenizer: Any,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of one prompt, as TRL's rollout trainers make them."""
    if isinstance(prompt, str):
        return list(tokenizer(text=prompt)["input_ids"])
    encoded = tokenizer.apply_chat_template(
        list(prompt),
        chat_template=chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **dict(chat_template_kwargs or {}),
    )
    return list(encoded["input_ids"])


def completion_text(completion: Any) -> str:
    """Text of a completion, plain or conversational."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] or "" for message in completion)


def _split(example: Mapping[str, Any], index: int) -> tuple[Any, str]:
    if "messages" in example:
        messages = list(example["messages"])
        if not messages or messages[-1].get("role") != "assistant":
            raise ValueError(
                f"Example {index} has `messages` that do not end with the assistant – expected the text to score as "
                "the last message, with role `assistant`."
            )
        return messages[:-1], completion_text(messages[-1:])
    if "prompt" in example and "completion" in example:
        return example["prompt"], completion_text(example["completion"])
    raise ValueError(
        f"Example {index} has the keys {sorted(example)} – expected `text`, `messages`, or `prompt` and `completion`."
    )
