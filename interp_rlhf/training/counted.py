"""Where the counted tokens of a training batch were defined before 0.2: now in `activations.counted`, with the one rule."""

from ..activations.counted import Counted, counted, input_ids

__all__ = ["Counted", "counted", "input_ids"]
