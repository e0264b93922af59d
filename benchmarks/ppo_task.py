"""The toy task of the PPO benchmarks: a tiny model, prompts of one length, and a lexicon to write from.

In: a seed. Out: files and numbers that two environments share: the project's and TRL 1.12's. So only torch and transformers are
imported here. The reward is the share of a completion's `LENGTH` tokens that are in the lexicon.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

VOCABULARY, WIDTH, BLOCKS, HEADS = 256, 64, 2, 4
EOS, PAD, FIRST_WORD = 0, 1, 2
PROMPT, LENGTH, PROMPTS = 6, 16, 64
LEXICON = tuple(range(FIRST_WORD, VOCABULARY, 16))  # 16 of 254 words: 6 % at first
NO_TRL_1_12 = "not run: needs `--trl-1-12 PYTHON`, an environment with TRL 1.12 (see benchmarks/ppo_trl_1_12.py)"
# Settings of both trainers. One optimizer step per pass over the rollout: TRL 1.12 never takes more.
SETTINGS = {
    "learning_rate": 3e-3, "batch": 32, "epochs": 4, "gamma": 1.0, "lam": 0.95, "kl_coef": 0.02, "cliprange": 0.2,
    "cliprange_value": 0.2, "vf_coef": 0.1, "temperature": 1.0,
}  # fmt: skip


def described() -> str:
    """The model of the toy task in words."""
    return f"Llama, {BLOCKS} blocks, width {WIDTH}, vocabulary {VOCABULARY}, float32, random"


def save_model(folder: Path, seed: int) -> Path:
    """A Llama of two blocks with random weights, and a tokenizer whose words are its ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=128, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD, dtype="float32",
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    ids = {"<eos>": EOS, "<pad>": PAD} | {f"w{i}": i for i in range(FIRST_WORD, VOCABULARY)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    ).save_pretrained(folder)
    return folder


def prompts(seed: int) -> list[str]:
    """Texts of `PROMPT` words."""
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(FIRST_WORD, VOCABULARY)}" for _ in range(PROMPT)) for _ in range(PROMPTS)]


def token_scores(ids: list[int]) -> list[float]:
    """What each token of a completion is worth; they add up to the completion's reward."""
    lexicon = set(LEXICON)
    return [(token in lexicon) / LENGTH for token in ids]


def last_mean(rewards: list[float], count: int = 3) -> float:
    """Mean reward of the last rollouts."""
    return sum(rewards[-count:]) / len(rewards[-count:])


def settings(**changes: Any) -> dict[str, Any]:
    unknown = set(changes) - set(SETTINGS)
    assert not unknown, unknown
    return {**SETTINGS, **changes}
