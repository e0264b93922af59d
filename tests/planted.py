"""A tiny model with planted causes: one direction of the stream drives words, another is decodable and does nothing."""

from __future__ import annotations

import random

import torch
from tiny import WORDS, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

HOOK_POINT = "model.layers.0"
GOOD, BAD = ("good", "kind", "warm", "hope"), ("bad", "cold", "rude", "never")
NEUTRAL = [word for word in WORDS if word not in GOOD + BAD]
MARKED = NEUTRAL[::2]


def mood(text: str) -> float:
    """Good words less bad words: the independent measure."""
    words = text.split()
    return float(sum(w in GOOD for w in words) - sum(w in BAD for w in words))


class Planted:
    """A two-block Llama of width 64.

    Attributes:
        drives (`torch.Tensor`): unit vector that raises the logits of good words and lowers those of bad ones. They carry it
            in their embedding, so that a mood goes on.
        inert (`torch.Tensor`): unit vector that good and bad words carry too, and that nothing behind block 0 reads.
        marked (`torch.Tensor`): unit vector that the words in `MARKED` carry, and that nothing reads either: a mark of the
            text.
    """

    def __init__(self, seed: int, width: int = 64):
        self.tokenizer = make_tokenizer()
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(self.tokenizer), hidden_size=width, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
            eos_token_id=self.tokenizer.eos_token_id, pad_token_id=self.tokenizer.pad_token_id, bos_token_id=None,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).eval()
        self.drives, self.inert, self.marked = torch.linalg.qr(torch.randn(width, 3))[0].T.contiguous()
        with torch.no_grad():
            self._plant()

    def _plant(self) -> None:
        model, silent = self.model, torch.stack([self.inert, self.marked])
        embedding, head = model.get_input_embeddings().weight, model.lm_head.weight
        embedding.copy_(torch.randn_like(embedding) * 0.3)
        head.copy_(torch.randn_like(head) * 0.08)
        planted = torch.stack([self.drives, self.inert, self.marked])
        embedding -= embedding @ planted.T @ planted
        head -= head @ planted.T @ planted
        for words, sign in ((GOOD, 1.0), (BAD, -1.0)):
            for word in words:
                embedding[self._token(word)] += 2.0 * sign * (self.drives + self.inert)
                head[self._token(word)] += 1.2 * sign * self.drives
        # All tokens carry one more direction, by which the head says whole words.
        speaks = torch.nn.functional.normalize(torch.randn(len(self.drives)), dim=0)
        speaks -= planted.T @ planted @ speaks
        embedding += speaks
        for word in NEUTRAL:
            head[self._token(word)] += 0.7 * speaks
        for word in MARKED:
            embedding[self._token(word)] += 1.5 * self.marked
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for part in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                part.weight -= part.weight @ silent.T @ silent
            for part in (attention.o_proj, mlp.down_proj):
                part.weight -= planted.T @ planted @ part.weight

    def foreign(self) -> dict[str, torch.Tensor]:
        """Directions from one neutral word to another: concepts that have nothing to do with moods."""
        rows = self.model.get_input_embeddings().weight.detach()
        words = NEUTRAL[:12]
        return {
            f"{a} {b}": rows[self._token(a)] - rows[self._token(b)] for a, b in zip(words[:6], words[6:], strict=True)
        }

    def _token(self, word: str) -> int:
        ids = self.tokenizer(text=f" {word}")["input_ids"]
        assert len(ids) == 1, (word, ids)
        return ids[0]


def prompts(seed: int, count: int = 48) -> list[str]:
    """Prompts that end in a good word (a quarter), a bad one (an eighth), and in neutral words, whose mood is open."""
    rng = random.Random(seed)
    ends = (GOOD, BAD, GOOD, NEUTRAL, NEUTRAL, NEUTRAL, NEUTRAL, NEUTRAL)
    return [" ".join([*rng.choices(NEUTRAL, k=5), rng.choice(ends[i % len(ends)])]) for i in range(count)]
