"""Texts and messages as people hand them over: one or many, plain or conversational, a string or parts.

In: what stands in a row of a data set, or in an argument. Out: a list, a text, or an error that says what was expected. No torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any


def as_list(given: Any) -> list[Any]:
    """What a user gave where a list is expected: one text, path, card or mapping is a list of that one, a table its rows."""
    if given is None:
        return []
    if hasattr(given, "columns") and hasattr(given, "to_dict"):  # a DataFrame, which iterates over its columns
        return [
            {key: None if isinstance(value, float) and value != value else value for key, value in row.items()}
            for row in given.to_dict("records")
        ]
    if isinstance(given, str | os.PathLike | Mapping) or not isinstance(given, Iterable):
        return [given]
    return list(given)


def as_prompts(given: Any) -> list[Any]:
    """Prompts of what a user gave: one text, or one conversation (a list of messages), is a list of that one."""
    prompts = as_list(given)
    if prompts and all(isinstance(item, Mapping) and "role" in item for item in prompts):
        return [prompts]
    return prompts


def prompt_text(prompt: Any) -> str:
    """A prompt as it is shown: text as it is, messages one per line."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{m['role']}: {content_text(m.get('content'))}" for m in prompt)


def completion_text(completion: Any) -> str:
    """Text of a completion as it is shown, plain or conversational."""
    if isinstance(completion, str):
        return completion
    return "".join(content_text(message.get("content")) for message in completion)


def content_text(content: Any) -> str:
    """Text of a message's content: a string, or a list of parts as multimodal data sets have them; nothing where there is none.

    Raises:
        `ValueError`: a part that is no text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Iterable):
        raise ValueError(f"a message has the content {content!r} – expected text, or a list of parts.")
    pieces = []
    for part in as_list(content):
        if isinstance(part, str):
            pieces.append(part)
        elif isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"a message has a part of type `{kind}` – expected text: nothing else is read.")
    return "".join(pieces)


def conversation(given: Any) -> list[Any]:
    """A list of messages.

    Raises:
        `ValueError`: it is something else.
    """
    if isinstance(given, str) or not all(isinstance(item, Mapping) and "role" in item for item in as_list(given)):
        raise ValueError(
            f"{str(given)[:80]!r} is no conversation – expected a list of messages with `role` and `content`."
        )
    return as_list(given)


def answer_text(completion: Any) -> str:
    """Text to score of a completion: a string, or one message of the assistant.

    Raises:
        `ValueError`: several messages, somebody else's, or one without text.
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
            "`assistant`: several turns are not one answer. Make an example of each, with what comes before it as its prompt."
        )
    message = messages[0]
    if message.get("content") is None:
        calls = " and calls tools" if "tool_calls" in message else ""
        raise ValueError(f"the assistant's message has no `content`{calls} – expected text to score. Remove it.")
    return content_text(message["content"])


def split_example(example: Mapping[str, Any], name: str = "The example") -> tuple[Any, str]:
    """Prompt, and the text that is scored; the prompt of a plain text is None.

    Raises:
        `ValueError`: another form, several forms at once, or no text to score; the message begins with `name`.
    """
    forms = {
        "`text`": example.get("text") is not None, "`messages`": example.get("messages") is not None,
        "`prompt` and `completion`": example.get("completion") is not None,
    }  # fmt: skip
    given = [form for form, there in forms.items() if there]
    if len(given) != 1 or (given[0].startswith("`prompt`") and example.get("prompt") is None):
        raise ValueError(
            f"{name} has the keys {sorted(example)} – expected one of `text`, `messages`, or `prompt` and `completion`: "
            "which of them is scored must be clear."
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
                    "role `assistant`."
                )
            return messages[:-1], answer_text(messages[-1:])
        prompt = example["prompt"]
        return prompt if isinstance(prompt, str) else conversation(prompt), answer_text(example["completion"])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
