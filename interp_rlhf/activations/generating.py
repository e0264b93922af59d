"""Generation: completions of prompts given as token ids, greedy or sampled.

In: a model, prompt ids, the ids that end a turn. Out: completion ids, and how much of one is repeated. It must not know
tokenizers' templates, trainers or measures.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from .own_passes import measuring, reading
from .sharding import device_of

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from contextlib import AbstractContextManager

    from torch import nn

_NGRAM = 4


def left_padded(prompt_ids: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as (input_ids, attention_mask) (B, T), padded on the left."""
    width = max(map(len, prompt_ids))
    ids = torch.full((len(prompt_ids), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompt_ids):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def pad_token(tokenizer: Any) -> int:
    """Id of the padding token; of the end of a sequence where there is none."""
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id)


@torch.no_grad()
def completions_of(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    *,
    pad: int,
    ends: Collection[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int | None = 0,
    prepared: AbstractContextManager[Any] | None = None,
    device: torch.device | None = None,
) -> list[list[int]]:
    """One completion per prompt, with the token that ends it.

    The distribution is not truncated. The same seed and prompts give the same completions. The model's training flags are
    left as they were, and so is the global random state if there is a seed.

    Args:
        model (`nn.Module`): what generates, out of its engine's wrapping.
        prompt_ids (`list[list[int]]`): B prompts.
        pad (`int`): padding token, see `pad_token`.
        ends (`set[int]`): ids that end a completion.
        max_new_tokens (`int`): length at which a completion is cut.
        temperature (`float`, defaults to 0): 0 is greedy.
        seed (`int`, *optional*, defaults to 0): with None, the global random state is used and moves on.
        prepared (context manager, *optional*): what has to be open around the generation, such as gathered parameters.
        device (`torch.device`, *optional*): where the prompts go; by default where the model takes its inputs.
    """
    device = device or device_of(model)
    ids, mask = left_padded(prompt_ids, pad)
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    generate: Any = model.generate
    devices = [device] if device.type == "cuda" else []
    with prepared or nullcontext(), reading(), measuring(model), torch.random.fork_rng(devices, seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        output = generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=max_new_tokens, pad_token_id=pad,
            repetition_penalty=1.0, eos_token_id=sorted(ends) or None, **how,
        )  # fmt: skip
    return [_to_the_end(line, ends) for line in output[:, ids.shape[1] :].tolist()]


def repetition(ids: Sequence[int]) -> float:
    """Share of 4-grams that occurred before; 0 below five tokens."""
    grams = [tuple(ids[i : i + _NGRAM]) for i in range(len(ids) - _NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def _to_the_end(line: list[int], ends: Collection[int]) -> list[int]:
    end = next((place for place, token in enumerate(line) if token in ends), None)
    return line if end is None else line[: end + 1]
