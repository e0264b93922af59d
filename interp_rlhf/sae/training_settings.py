"""Settings of a training of a sparse autoencoder. They are checked when they are created.

In: numbers and names. Out: `SaeTraining`. It must not know models or texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .cutting import FORWARD_TOKENS


@dataclass(frozen=True)
class SaeTraining:
    """Settings of a training.

    Attributes:
        hook_point (`str`): module path whose output is encoded.
        latents (`int`): S, number of latents.
        k (`int`, defaults to 32): latents that are on per token. Under `batchtopk` this is their mean.
        architecture (`str`, defaults to `"topk"`): `topk` or `batchtopk`.
        epochs (`float`, *optional*), tokens (`int`, *optional*): length of the training. Give one of the two.
        batch_tokens (`int`, defaults to 2048): activations per step.
        learning_rate (`float`, defaults to 3e-3): learning rate of Adam.
        warm_up (`float`, defaults to 0.02): share of the steps over which the learning rate rises from 0.
        decay (`float`, defaults to 0.2): share of the steps, at the end, over which the learning rate falls to 0.
        aux_k (`int`, *optional*): silent latents that explain the error; 2k by default, 0 for none.
        aux_weight (`float`, defaults to 1/32): weight of the auxiliary loss.
        dead_after (`int`, *optional*): tokens without a latent after which it counts as silent; one epoch by default.
        context (`int`, defaults to 128): tokens that the model reads at once.
        buffer (`int`, defaults to 131072): activations held for shuffling, 4 D bytes each.
        checkpoint_every (`int`, defaults to 1000): steps between checkpoints; 0 for none. A checkpoint holds the buffer.
        seed (`int`, defaults to 0): seed of weights and order.
    """

    hook_point: str
    latents: int
    k: int = 32
    architecture: Literal["topk", "batchtopk"] = "topk"
    epochs: float | None = None
    tokens: int | None = None
    batch_tokens: int = 2048
    learning_rate: float = 3e-3
    warm_up: float = 0.02
    decay: float = 0.2
    aux_k: int | None = None
    aux_weight: float = 1 / 32
    dead_after: int | None = None
    context: int = 128
    buffer: int = 2**17
    checkpoint_every: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.latents < 1:
            problems.append(f"`latents` is {self.latents} – expected at least 1")
        elif not 1 <= self.k <= self.latents:
            problems.append(f"`k` is {self.k} – expected 1 to {self.latents}, the number of latents")
        if self.architecture not in ("topk", "batchtopk"):
            problems.append(f"`architecture` is `{self.architecture}` – expected `batchtopk` or `topk`")
        if (self.epochs is None) == (self.tokens is None):
            problems.append(f"`epochs` is {self.epochs} and `tokens` {self.tokens} – expected one of them")
        for name in ("epochs", "tokens", "batch_tokens", "learning_rate", "dead_after", "context", "buffer"):
            if (value := getattr(self, name)) is not None and not value > 0:
                problems.append(f"`{name}` is {value} – expected more than 0")
        for name in ("aux_k", "aux_weight", "checkpoint_every", "seed"):
            if (value := getattr(self, name)) is not None and value < 0:
                problems.append(f"`{name}` is {value} – expected 0 or more")
        for name in ("warm_up", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"`{name}` is {getattr(self, name)} – expected a share of the steps, 0 to 1")
        if self.buffer < 4 * self.context:
            problems.append(f"`buffer` is {self.buffer} – expected at least {4 * self.context}, four contexts")
        if self.buffer < 2 * self.batch_tokens:
            problems.append(f"`buffer` is {self.buffer} – expected at least {2 * self.batch_tokens}, two batches")
        if problems:
            listed = "\n".join(f"  - {problem}" for problem in problems)
            raise ValueError(f"The settings of the training have {len(problems)} problem(s):\n{listed}")

    def block(self, tokens: int) -> int:
        """Number of activations to read at a time from a corpus of `tokens` tokens: at most a quarter of the buffer."""
        return min(FORWARD_TOKENS, min(self.buffer, tokens) // 4)

    def check_amount(self, tokens: int, which: str = "") -> None:
        """Raises `ValueError` if a corpus has too few tokens that count."""
        needed = max(2 * self.batch_tokens, 4 * self.context)
        if tokens < needed:
            raise ValueError(
                f"The texts have {tokens} tokens that count{which and ' '}{which} – expected at least {needed}: two batches of "
                f"{self.batch_tokens} and four contexts of {self.context}. Give more text, or make these smaller."
            )
