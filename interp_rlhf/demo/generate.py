"""The model's own answers: sampled in batches, with the token ids that were sampled.

In: a model, a tokenizer, conversational prompts. Out: rows with `prompt`, `completion` and `completion_ids`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..activations.batch import tokenize_prompt
from ..activations.counted import end_of_turn_ids
from ..activations.generating import completions_of, pad_token
from .prompts import FOLLOWS, VIOLATES

if TYPE_CHECKING:
    from collections.abc import Sequence

Message = dict[str, str]

# At 1 a model of this size writes word salad under either system prompt; rollouts need some variety to learn from.
CONTRAST_TEMPERATURE = 0.4
ROLLOUT_TEMPERATURE = 0.7


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[Message]],
    *,
    tokens: int,
    seed: int,
    temperature: float = ROLLOUT_TEMPERATURE,
    batch_size: int = 32,
    label: str = "generating",
) -> list[dict[str, Any]]:
    """One sampled answer per prompt (the distribution is not truncated).

    The same seed, prompts and batch size give the same answers; the global random state is left as it was.
    """
    rows: list[dict[str, Any]] = []
    ends, pad = end_of_turn_ids(model, tokenizer), pad_token(tokenizer)
    with tqdm(total=len(prompts), desc=label, unit="answer") as bar, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            part = list(prompts[start : start + batch_size])
            completions = completions_of(
                model, [tokenize_prompt(prompt, tokenizer) for prompt in part], pad=pad, ends=ends, max_new_tokens=tokens,
                temperature=temperature, seed=None,
            )  # fmt: skip
            for prompt, ids in zip(part, completions, strict=True):
                text = tokenizer.decode(ids, skip_special_tokens=True)
                rows.append({"prompt": prompt, "completion": text, "completion_ids": ids})
            bar.update(len(part))
    return rows


def contrast(
    model: Any, tokenizer: Any, prompts: Sequence[list[Message]], *, tokens: int, seed: int, label: str
) -> list[dict[str, Any]]:
    """Labelled answers: every prompt once under a system prompt that follows the clause (1) and once under one that
    violates it (0). The rows hold the prompt without any system prompt: the probe must find the concept in the answer.
    """
    rows = []
    for value, system in ((1, FOLLOWS), (0, VIOLATES)):
        steered = [[{"role": "system", "content": system}, *prompt] for prompt in prompts]
        answers = generate(
            model,
            tokenizer,
            steered,
            tokens=tokens,
            seed=seed + value,
            temperature=CONTRAST_TEMPERATURE,
            label=f"{label}, clause {'kept' if value else 'broken'}",
        )
        rows += [
            {**answer, "prompt": prompt, "label": value}
            for prompt, answer in zip(prompts, answers, strict=True)
            if answer["completion"].strip()
        ]
    return rows
