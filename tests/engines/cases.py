"""The runs that have to be the same on every engine: three terms in DPO, concept rewards in GRPO, an ablation in SFT.

Each is built by the user's own calls: a trainer of TRL and `attach`. The global batch is that of the single process. Beside the
model's folder are two cards, so that an engine's weights are checked against the identity of a model that was whole.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from training import by_length, make_trainer, rows_of

GLOBAL_BATCH = 4
LAYERS = ["model.layers.0", "model.layers.1", "model.layers.2"]


def readout_of(name: str, layer: int, seed: int) -> Any:
    from interp_rlhf.concepts.readout import Readout

    weight = torch.randn(32, generator=torch.Generator().manual_seed(seed)) / 4
    return Readout(name, LAYERS[layer], weight, bias=0.25)


def _latents(count: int = 24) -> Any:
    from interp_rlhf import Latents

    rows = torch.randn(count, 32, generator=torch.Generator().manual_seed(5)) / 4
    return Latents("latents", LAYERS[1], rows, torch.zeros(count))


def _drift(**changes: Any) -> Any:
    from interp_rlhf import DriftConfig

    prompts = [row["prompt"] for row in rows_of("GRPO", 8, seed=9)]
    settings: dict[str, Any] = {
        "every": 2, "texts": ["warm kind day", "the sun is a good friend", "never rude"], "prompts": prompts,
        "max_new_tokens": 6, "measures": {"words": lambda text: float(len(text.split()))},
    }  # fmt: skip
    return DriftConfig(**{**settings, **changes})


def _terms() -> list[Any]:
    from interp_rlhf import ConceptAnchor, DriftPenalty, FeatureConstraint, Subspace

    subspace = Subspace.from_readouts([readout_of("s", 2, 11), readout_of("t", 2, 12)])
    return [
        ConceptAnchor(readout=readout_of("anchored", 1, 3), weight=0.5),
        FeatureConstraint(readout=_latents(), k=6, weight=0.5),
        DriftPenalty(subspace=subspace, weight=0.5, name="held"),
    ]


def _dpo(model: Path, **changes: Any) -> dict[str, Any]:
    from tiny import labelled_rows

    from interp_rlhf.concepts.examples import make_examples

    drift = _drift(labelled=make_examples(labelled_rows(12, seed=5)))
    return {
        "kind": "DPO",
        "rows": rows_of("DPO", 12),
        "eval_rows": rows_of("DPO", 5, seed=2),
        "attach": {
            "regularizers": _terms(),
            "monitors": [readout_of("watched", 1, 4), monitor(model)],
            "drift": drift,
        },
        **changes,
    }


def reward(model: Path) -> Path:
    """A card with the role `reward`, fitted on the model in this folder."""
    return model / "warmth.yaml"


def monitor(model: Path) -> Path:
    """The same with the role `monitor` and another fit."""
    return model / "watch.yaml"


def _grpo(model: Path, beta: float, **changes: Any) -> dict[str, Any]:
    from interp_rlhf import ConceptReward

    paid = [
        ConceptReward(readout_of("paid", 1, 3), reader="both", weight=2.0),
        ConceptReward.from_card(reward(model)),
        ConceptReward(readout_of("dealt", 1, 6), sham="shuffle", weight=0.5),
        by_length,
    ]
    return {
        "kind": "GRPO",
        "rows": rows_of("GRPO", 8),
        "settings": {"beta": beta, "reward_funcs": paid, "num_generations": 2},
        "attach": {
            "monitors": [readout_of("watched", 2, 4), monitor(model)],
            "measures": {"letters": lambda text: float(len(text))},
            "drift": _drift(),
        },
        **changes,
    }


def _sft(model: Path, **changes: Any) -> dict[str, Any]:
    from interp_rlhf import ConceptAblation, DriftPenalty, Subspace

    return {
        "kind": "SFT",
        "rows": rows_of("SFT", 12),
        "attach": {
            "interventions": [ConceptAblation(subspace=Subspace.from_readouts([readout_of("away", 1, 3)]))],
            "regularizers": [DriftPenalty(hook_point=LAYERS[0], weight=0.5)],
            "monitors": [readout_of("watched", 2, 4), monitor(model)],
            "drift": _drift(),
        },
        **changes,
    }


def _every_term(model: Path) -> dict[str, Any]:
    """One term of every registered kind, at once."""
    from test_terms import TERMS, make_term
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model)
    terms = [make_term(kind, policy, weight=0.2, name=kind) for kind in TERMS]
    return {
        "kind": "DPO", "rows": rows_of("DPO", 12), "attach": {"regularizers": terms, "monitors": [readout_of("watched", 1, 4)]},
    }  # fmt: skip


def _raises(**kwargs: Any) -> list[float]:
    raise RuntimeError("this reward is broken")


LORA: dict[str, Any] = {"lora": {}}
CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "dpo": _dpo,
    "dpo_lora": lambda model: _dpo(model, **LORA),
    "dpo_odd": lambda model: _dpo(model, rows=rows_of("DPO", 11), settings={"train_sampling_strategy": "sequential"}),
    "dpo_precomputed": lambda model: _dpo(model, settings={"precompute_ref_log_probs": True}, **LORA),
    "grpo": lambda model: _grpo(model, 0.1),
    "grpo_beta0": lambda model: _grpo(model, 0.0),
    "grpo_lora": lambda model: _grpo(model, 0.1, **LORA),
    "grpo_silent": lambda model: _grpo(model, 0.1),
    "sft": _sft,
    "terms": _every_term,
    "sft_lora": lambda model: _sft(model, **LORA),
}


def build(given: argparse.Namespace, name: str, folder: Path) -> tuple[Any, Any]:
    """The trainer of a case on the engine that was launched, and its attachment.

    A fault is met by one rank alone: `nan`, a readout that gives no numbers; `raise`, a reward function that raises. Nobody
    evaluates drift then, so that it is met in training.
    """
    import os

    from transformers import AutoTokenizer

    from interp_rlhf import attach

    case = CASES[name](Path(given.model))
    processes, own = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    rank, _, fault = given.fault.partition(":")
    faulty = bool(fault) and int(rank) == own
    settings = case.get("settings", {})
    if fault:
        del case["attach"]["drift"]
    if faulty and fault == "raise":
        settings["reward_funcs"] = [*settings["reward_funcs"][:-1], _raises]
    tokenizer = AutoTokenizer.from_pretrained(given.model, padding_side="left")
    saves = {"save_strategy": "steps", "save_steps": given.save_every} if given.save_every else {}
    rows, eval_rows = case["rows"], case.get("eval_rows", [])
    if processes == 1:  # as accelerate completes the last batch of two processes: by the first rows, here in order
        rows, eval_rows = (some + some[: -len(some) % GLOBAL_BATCH] for some in (rows, eval_rows))
    trainer = make_trainer(
        case["kind"], given.model, tokenizer, folder, lora=case.get("lora"), rows=rows, eval_rows=eval_rows,
        max_steps=given.steps, per_device_train_batch_size=GLOBAL_BATCH // processes, learning_rate=1e-3,
        per_device_eval_batch_size=GLOBAL_BATCH // processes, gradient_accumulation_steps=2,
        model_init_kwargs={"dtype": "float32"}, **saves, **settings,
    )  # fmt: skip
    if faulty and fault == "nan":
        for readout in _read_by(case, trainer):
            readout.weight.fill_(torch.nan)
    every = {"samples_every": 1} if case["kind"] == "GRPO" else {}
    return trainer, attach(trainer, **every, **case["attach"])


def _read_by(case: dict[str, Any], trainer: Any) -> list[Any]:
    if case["kind"] == "GRPO":
        return [trainer.reward_funcs[0].readout]
    return [term.readout for term in case["attach"]["regularizers"] if term.name == "anchor_anchored"]
