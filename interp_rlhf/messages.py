"""Texts and messages as people write them: one or many, plain or conversational, a string or parts.

In: a value from a row of a data set, or an argument. Out: a list, a text, or an error that says what was expected. It must not
know models, and does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any


def as_list(value: Any) -> list[Any]:
    """An argument as a list. One text, path, card or mapping becomes a list of one; a table becomes its rows."""
    if value is None:
        return []
    if hasattr(value, "columns") and hasattr(value, "to_dict"):  # a DataFrame, which iterates over its columns
        return [
            {key: None if isinstance(cell, float) and cell != cell else cell for key, cell in row.items()}
            for row in value.to_dict("records")
        ]
    if isinstance(value, str | os.PathLike | Mapping) or not isinstance(value, Iterable):
        return [value]
    return list(value)


def as_prompts(value: Any) -> list[Any]:
    """An argument as a list of prompts. One text, or one conversation (a list of messages), becomes a list of one."""
    prompts = as_list(value)
    if prompts and all(isinstance(item, Mapping) and "role" in item for item in prompts):
        return [prompts]
    return prompts


def prompt_text(prompt: Any, roles: bool = True) -> str:
    """Text of a prompt: a string stays as it is, messages are joined one per line.

    Args:
        prompt (`str` or `list[dict]`, *optional*): the prompt. The text of None is empty.
        roles (`bool`, defaults to `True`): begin each message with its role, for people who read it.
    """
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    texts = ((message, content_text(message.get("content"))) for message in prompt)
    return "\n".join(f"{message['role']}: {text}" if roles else text for message, text in texts)


def completion_text(completion: Any) -> str:
    """Text of a completion, plain or conversational."""
    if isinstance(completion, str):
        return completion
    return "".join(content_text(message.get("content")) for message in completion)


def content_text(content: Any) -> str:
    """Text of a message's content: a string, or a list of parts as in multimodal data sets. The text of None is empty.

    Raises:
        `ValueError`: a part is not text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Iterable):
        raise ValueError(
            f"a message has the content {content!r} – expected text, or a list of parts. Write it as a string."
        )
    pieces = []
    for part in as_list(content):
        if isinstance(part, str):
            pieces.append(part)
        elif isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(
                f"a message has a part of type `{kind}` – expected text: other parts are not read. Remove it."
            )
    return "".join(pieces)


def conversation(value: Any) -> list[Any]:
    """A value as a list of messages.

    Raises:
        `ValueError`: the value is not a list of messages.
    """
    if isinstance(value, str) or not all(isinstance(item, Mapping) and "role" in item for item in as_list(value)):
        raise ValueError(
            f"{str(value)[:80]!r} is not a conversation – expected a list of messages with `role` and `content`."
        )
    return as_list(value)


def answer_text(completion: Any) -> str:
    """The text of a completion that a readout scores: a string, or one message of the assistant.

    Raises:
        `ValueError`: several messages, a message of another role, or a message without text.
    """
    if isinstance(completion, str):
        return completion
    messages = as_list(completion)
    if not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(f"the completion is {completion!r} – expected text, or a list with one message.")
    roles = [str(message.get("role")) for message in messages]
    if roles != ["assistant"]:
        raise ValueError(
            f"the completion has messages of {', '.join(f'`{role}`' for role in roles) or 'nobody'} – expected one, of the "
            "`assistant`: several turns are not one answer. Make one example per turn, with the turns before it as its prompt."
        )
    message = messages[0]
    if message.get("content") is None:
        calls = " and calls tools" if "tool_calls" in message else ""
        raise ValueError(f"the assistant's message has no `content`{calls} – expected text to score. Remove it.")
    return content_text(message["content"])


def split_example(example: Mapping[str, Any], name: str = "The example") -> tuple[Any, str]:
    """Prompt and completion of an example. The completion is the text that a readout scores; a plain text has no prompt (None).

    Raises:
        `ValueError`: another form, several forms at once, or no text to score. The message begins with `name`.
    """
    forms = {
        "`text`": example.get("text") is not None, "`messages`": example.get("messages") is not None,
        "`prompt` and `completion`": example.get("completion") is not None,
    }  # fmt: skip
    present = [form for form, there in forms.items() if there]
    if len(present) != 1 or (present[0].startswith("`prompt`") and example.get("prompt") is None):
        raise ValueError(
            f"{name} has the keys {sorted(example)} – expected one of `text`, `messages`, or `prompt` and `completion`: it must "
            "be clear which text is scored."
        )
    if forms["`text`"]:
        if not isinstance(example["text"], str):
            raise ValueError(f"{name} has a `text` of type {type(example['text']).__name__} – expected a string.")
        return None, example["text"]
    try:
        if forms["`messages`"]:
            messages = conversation(example["messages"])
            if not messages or messages[-1].get("role") != "assistant":
                raise ValueError(
                    "it has `messages` that do not end with the assistant – expected the text to score as the last message, with "
                    "the role `assistant`."
                )
            return messages[:-1], answer_text(messages[-1:])
        prompt = example["prompt"]
        return prompt if isinstance(prompt, str) else conversation(prompt), answer_text(example["completion"])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
