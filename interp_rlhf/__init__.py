"""Interpretability inside RLHF training: probes and latents as rewards, regularizers and monitors in
TRL's trainers.

The names below are the public surface. They are loaded when they are first used: `import interp_rlhf` imports neither
torch nor TRL.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.5.0"

_HOMES = {
    "ConceptAblation": "training.interventions",
    "ConceptAnchor": "training.terms.anchor",
    "ConceptPenalty": "training.terms.penalty",
    "ConceptReward": "training.rewards",
    "ConceptScores": "activations",
    "DriftCallback": "drift.callback",
    "DriftConfig": "drift.config",
    "DriftPenalty": "training.terms.drift_penalty",
    "ExplainAway": "training.terms.explain_away",
    "FeatureConstraint": "training.terms.features",
    "InterpDPOTrainer": "trainers",
    "InterpGRPOTrainer": "trainers",
    "InterpKTOTrainer": "trainers",
    "InterpPPOTrainer": "trainers",
    "InterpRLOOTrainer": "trainers",
    "InterpSFTTrainer": "trainers",
    "Latents": "concepts.latents",
    "LinearProbe": "concepts.linear",
    "PPOConfig": "training.ppo.config",
    "PPOTrainer": "training.ppo.trainer",
    "PreventativeSteering": "training.interventions",
    "Readout": "concepts.readout",
    "Schedule": "training.schedule",
    "Subspace": "concepts.subspace",
    "TokenBatch": "activations",
    "attach": "attachment",
    "CausalSettings": "validation.causal_settings",
    "causal_check": "validation.causal",
    "attribution_patching": "validation.patching",
    "check_card": "validation.check",
    "fit_probe": "concepts.fitting",
    "load_card": "concepts.card",
    "off_target": "validation.off_target",
    "load_examples": "concepts.examples",
    "pull_card": "validation.sharing",
    "push_card": "validation.sharing",
    "read": "activations",
    "register_drift_metric": "drift.metrics",
    "register_measure": "validation.measures",
    "register_pooling": "concepts.pooling",
    "register_sae_format": "sae.formats",
    "register_term": "training.terms.registry",
    "write_report": "report",
}

__all__ = [
    "CausalSettings",
    "ConceptAblation",
    "ConceptAnchor",
    "ConceptPenalty",
    "ConceptReward",
    "ConceptScores",
    "DriftCallback",
    "DriftConfig",
    "DriftPenalty",
    "ExplainAway",
    "FeatureConstraint",
    "InterpDPOTrainer",
    "InterpGRPOTrainer",
    "InterpKTOTrainer",
    "InterpPPOTrainer",
    "InterpRLOOTrainer",
    "InterpSFTTrainer",
    "Latents",
    "LinearProbe",
    "PPOConfig",
    "PPOTrainer",
    "PreventativeSteering",
    "Readout",
    "Schedule",
    "Subspace",
    "TokenBatch",
    "attach",
    "causal_check",
    "attribution_patching",
    "check_card",
    "fit_probe",
    "load_card",
    "load_examples",
    "off_target",
    "pull_card",
    "push_card",
    "read",
    "register_drift_metric",
    "register_measure",
    "register_pooling",
    "register_sae_format",
    "register_term",
    "write_report",
]

if TYPE_CHECKING:
    from .activations.batch import ConceptScores, TokenBatch
    from .activations.read import read
    from .attachment import attach
    from .concepts.card import load_card
    from .concepts.examples import load_examples
    from .concepts.fitting import fit_probe
    from .concepts.latents import Latents
    from .concepts.linear import LinearProbe
    from .concepts.pooling import register_pooling
    from .concepts.readout import Readout
    from .concepts.subspace import Subspace
    from .drift.callback import DriftCallback
    from .drift.config import DriftConfig
    from .drift.metrics import register_drift_metric
    from .report import write_report
    from .sae.formats import register_sae_format
    from .trainers import (
        InterpDPOTrainer,
        InterpGRPOTrainer,
        InterpKTOTrainer,
        InterpPPOTrainer,
        InterpRLOOTrainer,
        InterpSFTTrainer,
    )
    from .training.interventions import ConceptAblation, PreventativeSteering
    from .training.ppo.config import PPOConfig
    from .training.ppo.trainer import PPOTrainer
    from .training.rewards import ConceptReward
    from .training.schedule import Schedule
    from .training.terms.anchor import ConceptAnchor
    from .training.terms.drift_penalty import DriftPenalty
    from .training.terms.explain_away import ExplainAway
    from .training.terms.features import FeatureConstraint
    from .training.terms.penalty import ConceptPenalty
    from .training.terms.registry import register_term
    from .validation.causal import causal_check
    from .validation.causal_settings import CausalSettings
    from .validation.check import check_card
    from .validation.measures import register_measure
    from .validation.off_target import off_target
    from .validation.patching import attribution_patching
    from .validation.sharing import pull_card, push_card


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`; it has {', '.join(__all__)}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
