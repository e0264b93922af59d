"""Passes that this package makes itself: marked, so that no tap records them, and without dropout, so that they repeat.

In: a model. Out: context managers to run it in. It must not know hook points or readouts.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

# True while `read()` runs the model: its passes are ours and no tap looks at them.
_reading: ContextVar[bool] = ContextVar("interp_rlhf_reading", default=False)


@contextmanager
def reading() -> Iterator[None]:
    """Marks passes as ours, so that no tap records them."""
    token = _reading.set(True)
    try:
        yield
    finally:
        _reading.reset(token)


def is_reading() -> bool:
    """True if `read()` makes the pass that runs now."""
    return _reading.get()


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Without dropout, so that a reading repeats and draws no random numbers; every module's flag is put back as it was.

    The trainer's own model object keeps its flag: TRL reads its mode from it, and only the backbone is touched.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
