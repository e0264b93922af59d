"""Independent measures of a text. A reward is compared with them and never sees them.

In: the name of a measure. Out: a function from a text to a float. It must not know models, cards or trainers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Each entry makes a measure. It is called when the measure is used, so that registering one imports nothing.
MEASURES: Registry[Callable[[], Callable[[str], float]]] = Registry("a measure")


def register_measure(
    name: str,
) -> Callable[[Callable[[], Callable[[str], float]]], Callable[[], Callable[[str], float]]]:
    """Decorator that registers an independent measure of a text. Recipes and `--measure` then know it by its name.

    The decorated function takes nothing and returns the measure: a function from a text to a finite float. It is called once for
    each use, so it is the place to load a lexicon or a model.

    Args:
        name (`str`): a lower-case identifier, as recipes write it: `measures: [vader, my_own]`. A recipe has a list of
            modules to import: name the one there that registers the measure.

    Returns:
        `Callable`: the decorator. It returns the decorated function unchanged.

    Raises:
        `ValueError`: the name is not an identifier, or another measure has it.

    Example:
        >>> from interp_rlhf import register_measure
        >>> @register_measure("exclamations")
        ... def exclamations():
        ...     return lambda text: float(text.count("!"))
        >>> from interp_rlhf.validation.measures import MEASURES
        >>> measure = MEASURES["exclamations"]()
        >>> measure("Well done! Go on!")
        2.0
    """
    return MEASURES.register(name)


@register_measure("vader")
def vader() -> Callable[[str], float]:
    """VADER's compound sentiment of a text, in [−1, 1]; higher = more positive.

    Source: Hutto & Gilbert 2014. VADER is a lexicon with rules. It uses no language model.

    Raises:
        `RuntimeError`: the package is not installed.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise RuntimeError(
            "The measure `vader` needs the package vaderSentiment – expected the extra `demo`. Run "
            "`pip install 'interp-rlhf[demo]'`."
        ) from None
    analyzer = SentimentIntensityAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])


def values_of(name: str, measure: Callable[[str], Any], texts: Sequence[str]) -> list[float]:
    """Values of a measure on texts. NaN if the measure returns None because it does not apply.

    Args:
        name (`str`): name of the measure, for errors.
        measure (`Callable`): from a text to a number or None.
        texts (`Sequence[str]`): texts to measure.

    Raises:
        `ValueError`: it gives something else; the message names it.
    """
    values = []
    for text in texts:
        value = measure(text)
        try:
            values.append(math.nan if value is None else float(value))
        except (TypeError, ValueError):
            raise ValueError(
                f"The measure `{name}` gives {value!r} for {text[:60]!r} – expected a number, or None where it does not apply."
            ) from None
    return values
