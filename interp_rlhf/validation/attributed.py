"""The decoder layer at which a concept acts, as a place to read.

In: a model and contrast pairs. Out: a hook point. It must not know probes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..activations.components import ATTENTION_OUT, MLP_OUT
from ..activations.hook_points import decoder_layers
from .patching import attribution_patching

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class AttributedLayer:
    """A decoder layer that was chosen by attribution.

    Attributes:
        hook_point (`str`): its path.
        chosen (`float`), attribution (`float`): attribution of its attention and MLP together, on the choosing pairs and on the
            others.
    """

    hook_point: str
    chosen: float
    attribution: float


def attributed_layer(
    model: Any, tokenizer: Any, pairs: Sequence[Any], *, seed: int = 0, progress: bool = False
) -> AttributedLayer:
    """The decoder layer whose attention and MLP together have the largest absolute attribution, on one half of the pairs.

    The sums over positions of the residual stream cannot tell layers apart: each carries about the whole effect. The last
    layer is left out, as in a sweep: its output serves the prediction.

    Raises:
        `ValueError`: pairs of another form, or too few.
    """
    found = attribution_patching(
        model, tokenizer, pairs, components=(ATTENTION_OUT, MLP_OUT), top=0, random=0, split=seed, progress=progress
    )
    chosen, others = (maps[ATTENTION_OUT].sum(1) + maps[MLP_OUT].sum(1) for maps in (found.chosen, found.attribution))
    layers = decoder_layers(model)
    best = int(abs(chosen[:-1]).argmax()) if len(layers) > 1 else 0
    return AttributedLayer(layers[best], float(chosen[best]), float(others[best]))
