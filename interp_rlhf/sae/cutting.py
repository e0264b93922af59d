"""The cut of a text's tokens into contexts, which training and inspection of autoencoders share.

In: token ids of one text. Out: parts of it. It must not know tokenizers or models. Norm outliers are left out later, when
activations are at hand: they need more than ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# Tokens per forward. More of them are not faster on a CPU. Norm outliers are compared with the median norm of these tokens.
FORWARD_TOKENS = 4096


def context_slices(tokens: int, length: int, head: int) -> Iterator[slice]:
    """Parts of a text, one per context, in order. A context is its head plus one part.

    The first token of a context never counts: it draws attention for its position, not for what it is. So a context needs at
    least two tokens, and a single token at the end of a text, without a head, gives none.

    Args:
        tokens (`int`): tokens of the text, head left out.
        length (`int`): most tokens of a context, head included.
        head (`int`): tokens that every context begins with, such as a beginning-of-sequence token; 0 for none.
    """
    step = length - head
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        if head + stop - start > 1:
            yield slice(start, stop)
