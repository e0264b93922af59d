"""`interp-rlhf sae train`: train a sparse autoencoder on texts and evaluate it on others.

In: parsed arguments. Out: a folder with the autoencoder, its run log and `training.json`. Training and evaluation are in `sae`.
"""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..activations.hook_points import hidden_size, resolve
from ..concepts.artifact import write_atomically
from ..embedded import load_or_embedded
from ..sae.held_out import check_other_contexts, check_other_texts, evaluate
from ..sae.stream import cut, load_corpus
from ..sae.train import train_sae
from ..sae.training_folder import check_folder
from ..sae.training_settings import SaeTraining
from .options import typed_command

if TYPE_CHECKING:
    import argparse

    from ..sae.autoencoder import SparseAutoencoder
    from ..sae.held_out import HeldOut
    from ..sae.stream import Contexts

_SAME_NAMES = (
    "architecture", "tokens", "batch_tokens", "learning_rate", "warm_up", "decay", "aux_k", "dead_after", "context",
    "buffer", "checkpoint_every", "seed",
)  # fmt: skip


def sae_train(arguments: argparse.Namespace) -> int:
    """`interp-rlhf sae train`."""
    settings = _settings_of_arguments(arguments)
    SaeTraining(**settings)  # refuses wrong settings before anything is loaded
    out = Path(arguments.out)
    check_folder(out, arguments.resume, arguments.cache)
    before = _earlier_result(out) if (out / "sae").exists() else {}
    outcome = _train_as_asked(arguments, settings, out)
    result = _result(arguments, outcome, out) | before | {"sae": str(out / "sae")}
    if outcome.held_out is not None:
        _add_evaluation(arguments, outcome, result)
    path = out / "training.json"
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
    if arguments.json:
        print(json.dumps(result))
    else:
        _print_training(outcome, result, path)
    return 0


@dataclass(frozen=True)
class _Outcome:
    """The results of a training that are still in memory.

    Attributes:
        sae (`SparseAutoencoder`): the trained autoencoder.
        config (`SaeTraining`): its settings.
        model_id (`str`): name of the model that it reads.
        contexts (`Contexts`): the training text.
        held_out (`HeldOut`, *optional*): the evaluation on other text.
        seconds (`float`): duration of that evaluation.
    """

    sae: SparseAutoencoder
    config: SaeTraining
    model_id: str
    contexts: Contexts
    held_out: HeldOut | None
    seconds: float


def _settings_of_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = {
        "hook_point": arguments.hook_point, "k": arguments.k,
        "latents": arguments.k if arguments.latents is None else arguments.latents,
        "epochs": 20.0 if arguments.epochs is None and arguments.tokens is None else arguments.epochs,
    }  # fmt: skip
    return settings | {name: getattr(arguments, name) for name in _SAME_NAMES}


def _train_as_asked(arguments: argparse.Namespace, settings: dict[str, Any], out: Path) -> _Outcome:
    texts, other = load_corpus(arguments.data), load_corpus(arguments.eval) if arguments.eval else None
    if other is not None:
        check_other_texts(texts, other)
    model, tokenizer, model_id = load_or_embedded(arguments.model)
    resolve(model, arguments.hook_point)
    latents = 4 * hidden_size(model) if arguments.latents is None else arguments.latents
    config = SaeTraining(**{**settings, "latents": latents})
    contexts = cut(texts, tokenizer, config.context)
    other_contexts = None
    if other is not None:
        other_contexts = cut(other, tokenizer, config.context)
        check_other_contexts(contexts.fingerprint, other_contexts)
        other_contexts = other_contexts.spread(arguments.eval_tokens)
    sae = train_sae(
        model, tokenizer, contexts, config, out, cache=arguments.cache, cache_type=arguments.cache_type,
        resume=arguments.resume, model_id=model_id,
    )  # fmt: skip
    started, held_out = time.monotonic(), None
    if other_contexts is not None:
        held_out = evaluate(
            sae, model, other_contexts, config.k, cache=arguments.cache, cache_type=arguments.cache_type
        )
    return _Outcome(sae, config, model_id, contexts, held_out, time.monotonic() - started)


def _result(arguments: argparse.Namespace, outcome: _Outcome, out: Path) -> dict[str, Any]:
    """The content of `training.json` for a training."""
    trained = outcome.sae.spec.source["metadata"]
    return {
        "sae": str(out / "sae"), "model": outcome.model_id, "data": arguments.data,
        "tokens_of_data": outcome.contexts.tokens,
        **{name: trained[name] for name in ("training", "tokens", "fvu", "l0", "dead_fraction")},
        "seconds": {"training": trained["seconds"]}, "command": typed_command(), "versions": trained["versions"],
    }  # fmt: skip


def _add_evaluation(arguments: argparse.Namespace, outcome: _Outcome, result: dict[str, Any]) -> None:
    assert outcome.held_out is not None
    result["eval"] = {"data": arguments.eval, **outcome.held_out.entry()}
    result["seconds"] = {**result["seconds"], "eval": round(outcome.seconds, 1)}
    if result["command"] != typed_command():  # an earlier command trained, this one evaluates
        result["eval"]["command"] = typed_command()


def _earlier_result(out: Path) -> dict[str, Any]:
    """The `training.json` of a training that has ended; empty if the command stopped before it wrote the file.

    Raises:
        `ValueError`: the file is not JSON, or `sae train` did not write it.
    """
    path = out / "training.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"`{path}` is not JSON ({error}) – expected what was measured. Mend or delete it.") from None
    if not isinstance(result, dict) or not isinstance(result.get("seconds", {}), dict):
        raise ValueError(
            f"`{path}` is not what `sae train` writes – expected an object with `seconds`. Mend or delete it."
        )
    return result


def _print_training(outcome: _Outcome, result: dict[str, Any], path: Path) -> None:
    trained, config, held_out = outcome.sae.spec.source["metadata"], outcome.config, outcome.held_out
    print(
        f"{outcome.sae.size} latents at {config.hook_point}, {trained['tokens']} activations: FVU {trained['fvu']:.3f}"
    )
    if held_out is not None:
        pca = "" if held_out.pca is None else f", PCA of the training text {held_out.pca:.3f}"
        print(
            f"on {held_out.tokens} other tokens: explained variance {held_out.explained_variance:.3f}, L0 {held_out.l0:.1f}, "
            f"{held_out.dead_fraction:.1%} of latents dead; with {config.k} numbers{pca}, "
            f"PCA of these tokens {held_out.pca_here:.3f}"
        )
    print(f"{result['sae']} and {path}")
    print(f"next: interp-rlhf sae inspect {shlex.quote(result['sae'])} --texts TEXTS")
