"""The normalised text of a row of a data set. Rows with the same normalised text are the same, even if their forms differ.

In: a row with a text, messages, or a prompt and a completion. Out: normalised text of its prompt and of its answer. It must not
know models, and does not import torch.
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING, Any

from ..messages import prompt_text, split_example

if TYPE_CHECKING:
    from collections.abc import Mapping

Spoken = tuple[str, str]

_ROLES = "system|developer|user|human|assistant|model|tool|ipython"
# Markers that chat templates put around messages, in normalised text.
_MARKERS = re.compile(
    r"<\|(?:start_header_id|header_start|start_of_role)\|>[^<>|]{0,40}<\|(?:end_header_id|header_end|end_of_role)\|>"
    rf"|(?:<\|(?:im_start|start)\|>|<\|turn>|<start_of_turn>) ?(?:{_ROLES})\b"  # ChatML, gpt-oss, Gemma
    r"|<\|channel\|> ?(?:analysis|commentary|final)\b"
    r"|<\|[^<>|]{1,40}\|>|<\|turn>|<turn\|>|<(?:start|end)_of_turn>"
    r"|</?s>|<(?:bos|eos|pad|unk)>|\[/?(?:inst|system_prompt)\]|<</?sys>>"  # Llama 2, Mistral
    r"|<think> ?</think>"  # Qwen 3 without thinking
)
# Names of speakers in a dialogue that is written as plain text. They are removed only if both speakers are named.
_ASKED, _ANSWERED = re.compile(r"(?<!\w)(?:human|user):"), re.compile(r"(?<!\w)assistant:")
_SPEAKERS = re.compile(r"(?<!\w)(?:human|user|system|assistant):")


def spoken(row: Mapping[str, Any]) -> Spoken:
    """Normalised text of a row's prompt and of its answer. It does not depend on the form of the row.

    The text is normalised as Unicode's NFKC_Casefold, with one space for all white space and without the markers of chat
    templates. Messages are joined by a space. A plain `text` is an answer without a prompt (`""`).

    Raises:
        `ValueError`: the row has another form, or a message is not text.
    """
    filled = {key: value for key, value in row.items() if key not in ("text", "messages") or value != ""}
    prompt, answer = split_example(filled)
    return _normalised(prompt_text(prompt, roles=False)), _normalised(answer)


def _normalised(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    if not folded.isascii():  # without zero-width spaces and soft hyphens
        folded = "".join(letter for letter in folded if unicodedata.category(letter) != "Cf")
    folded = " ".join(folded.split())
    bare = _MARKERS.sub(" ", folded)
    if _ASKED.search(bare) and _ANSWERED.search(bare):
        bare = _SPEAKERS.sub(" ", bare)
    return " ".join(bare.split()) or folded
