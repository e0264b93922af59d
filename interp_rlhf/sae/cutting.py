"""How a text's tokens are cut into contexts. Training and inspection of autoencoders share this cut.

In: token ids of one text. Out: parts of it. It must not know tokenizers or models. Norm outliers are left out later:
they can only be found in the activations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# Tokens per forward. More tokens are not faster on a CPU. Norm outliers are compared with the median norm of these tokens.
FORWARD_TOKENS = 4096


def context_slices(tokens: int, length: int, head: int) -> Iterator[slice]:
    """Parts of a text, one per context, in order. A context is its head plus one part.

    The first token of a context never counts: it draws attention because of its position, not its meaning. So a context needs
    at least two tokens. A single token at the end of a text, without a head, gives no context.

    Args:
        tokens (`int`): number of tokens of the text, without the head.
        length (`int`): most tokens of a context, with the head.
        head (`int`): tokens that every context begins with, such as a beginning-of-sequence token; 0 for none.
    """
    step = length - head
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        if head + stop - start > 1:
            yield slice(start, stop)
