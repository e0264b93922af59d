"""Interpretability inside RLHF training: probes as rewards and monitors in TRL's trainers.

The names below are the public surface. They are loaded when they are first used: `import interp_rlhf` imports neither
torch nor TRL.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ConceptReward": "training.rewards",
    "ConceptScores": "activations",
    "DriftCallback": "drift.callback",
    "DriftConfig": "drift.callback",
    "LinearProbe": "concepts.probe",
    "Readout": "concepts.readout",
    "TokenBatch": "activations",
    "attach": "attachment",
    "check_card": "validation.check",
    "fit_probe": "concepts.probe",
    "load_card": "concepts.card",
    "load_examples": "concepts.examples",
    "read": "activations",
    "write_report": "report",
}

__all__ = [
    "ConceptReward",
    "ConceptScores",
    "DriftCallback",
    "DriftConfig",
    "LinearProbe",
    "Readout",
    "TokenBatch",
    "attach",
    "check_card",
    "fit_probe",
    "load_card",
    "load_examples",
    "read",
    "write_report",
]

if TYPE_CHECKING:
    from .activations import ConceptScores, TokenBatch, read
    from .attachment import attach
    from .concepts.card import load_card
    from .concepts.examples import load_examples
    from .concepts.probe import LinearProbe, fit_probe
    from .concepts.readout import Readout
    from .drift.callback import DriftCallback, DriftConfig
    from .report import write_report
    from .training.rewards import ConceptReward
    from .validation.check import check_card


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`; it has {', '.join(__all__)}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
