"""Independent measures of a text: what a reward is compared with and never sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def vader() -> Callable[[str], float]:
    """VADER's compound sentiment of a text, in [−1, 1], higher = more positive.

    Source: Hutto & Gilbert 2014, a lexicon with rules; knows nothing of any model.

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
