"""`train_sae`: a sparse autoencoder trained on a model's activations of texts, with a run log and checkpoints.

In: a model, texts, settings. Out: a `SparseAutoencoder`, written in the format of sae-lens, and a run log. It must not know what
the autoencoder is used for. The loss and the steps are in `optimizing`.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..activations.canaries import make_canaries
from ..activations.hook_points import resolve
from ..activations.identity import identity
from ..concepts.artifact import library_versions
from ..runlog.log import RunLog
from .cache import CachedActivations, cached_tokens, fill_cache
from .checkpoint import drop_checkpoints, load_checkpoint, save_checkpoint
from .optimizing import Training
from .stream import Contexts, ModelActivations, cut
from .training_folder import check_folder, check_settings, settings_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from .autoencoder import SparseAutoencoder
    from .cache import CacheType
    from .stream import Source
    from .training_settings import SaeTraining

logger = logging.getLogger(__name__)

LOG_EVERY = 50  # steps
# Keys of the state of a checkpoint.
STATE = ("step", "stream", "scale", "threshold", "seconds", "settings", "threads")


def train_sae(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str] | Contexts,
    config: SaeTraining,
    out: str | Path,
    *,
    cache: str | Path | None = None,
    cache_type: CacheType = "float16",
    resume: bool = False,
    progress: bool = True,
    model_id: str = "",
) -> SparseAutoencoder:
    """Train a sparse autoencoder on a model's activations of texts.

    The same arguments, machine and number of threads give the same weights, bit for bit, also if the training was stopped and
    resumed. The model does not change.

    Args:
        model (`nn.Module`): a causal LM. It runs up to the hook point, with its adapters as they are.
        tokenizer: the model's tokenizer.
        texts (`list[str]`, or `Contexts` of `cut`): the training text.
        config (`SaeTraining`): settings.
        out (`str` or `Path`): folder for the run log (`interp.jsonl`), checkpoints, and at the end `sae/`; empty, but for
            hidden files and the cache.
        cache (`str` or `Path`, *optional*): folder for activations. The model then reads the texts once, not once per epoch, and
            not at all if the folder already has the activations.
        cache_type (`str`, defaults to `"float16"`): `float16` or `float32`, which takes twice the space.
        resume (`bool`): go on from the last checkpoint in `out`, or from the start if there is none yet. A finished training is
            loaded if the settings are the same; the cache may differ then.
        progress (`bool`, defaults to `True`): show progress bars.
        model_id (`str`): name of the model, for the file.

    Returns:
        `SparseAutoencoder`: the trained one, loaded from `out/sae`. Its `spec.source["metadata"]` has the settings, the number of
        tokens and seconds, and the last `fvu`, `l0` and `dead_fraction`.

    Raises:
        `ValueError`: no such hook point, no text, or fewer tokens than two batches; `out` holds files and `resume` is false; or
            `out` holds no training to resume, one with other settings, or a truncated checkpoint.
    """
    from .files import load_sae

    out = Path(out)
    check_folder(out, resume, cache)
    resolve(model, config.hook_point)
    contexts = texts if isinstance(texts, Contexts) else cut(texts, tokenizer, config.context)
    config.check_amount(contexts.tokens)
    settings = asdict(config) | {"texts": contexts.fingerprint, "model": identity(model, config.hook_point)}
    settings["cached"] = None if cache is None else cache_type
    if resume and (out / "sae").exists():
        return _load_finished(out, settings)
    saved = _checkpoint_to_resume(out, settings) if resume else None
    started = time.monotonic()
    source = _source(model, contexts, config, cache, cache_type, progress)
    training, log = _train(source, config, saved, out, settings, model_id, started, progress)
    _save(training, model, tokenizer, out, settings, model_id)
    log.append("end", step=training.step, seconds=round(training.seconds, 1))
    drop_checkpoints(out)
    return load_sae(str(out / "sae"))


def _load_finished(out: Path, settings: dict[str, Any]) -> SparseAutoencoder:
    """The autoencoder of a training that is done, if its settings are the same but for the cache."""
    from .files import load_sae

    sae = load_sae(str(out / "sae"))
    check_settings(settings_of(sae, out / "sae"), settings, besides=("cached",))
    drop_checkpoints(out)
    return sae


def _train(
    source: Source,
    config: SaeTraining,
    saved: tuple[dict[str, torch.Tensor], dict[str, Any]] | None,
    out: Path,
    settings: dict[str, Any],
    model_id: str,
    started: float,
    progress: bool,
) -> tuple[Training, RunLog]:
    """All steps, from the start or from a checkpoint, and the log that they wrote."""
    log = RunLog(out / "interp.jsonl")
    training = Training(source, config, saved)
    if training.steps < 1:
        raise ValueError(
            f"{training.total} tokens are less than one batch of {config.batch_tokens} – expected more. Train for longer."
        )
    log.append(
        "run", step=training.step, title=f"sparse autoencoder at {config.hook_point}", arm="", model=model_id,
        trainer="train_sae", cards=[], settings={**settings, "threads": torch.get_num_threads(), "versions": library_versions()},
    )  # fmt: skip
    _run(training, log, out, settings, started, progress)
    return training, log


def _checkpoint_to_resume(
    out: Path, settings: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Tensors and state of the last checkpoint, None if there is none yet."""
    saved = load_checkpoint(out, STATE)
    if saved is None:
        return None
    state = saved[1]
    check_settings(state["settings"], settings)
    if state["threads"] != torch.get_num_threads():
        logger.warning("Resumed on another number of threads than %d: not the same to the last bit.", state["threads"])
    return saved


def _source(
    model: nn.Module,
    contexts: Contexts,
    config: SaeTraining,
    cache: str | Path | None,
    cache_type: CacheType,
    progress: bool,
) -> Source:
    """Activations of the contexts: from the model in every epoch, or from files that the model fills once."""
    if cache is None:
        if (config.epochs or 0) > 1 or (config.tokens or 0) > contexts.tokens:
            logger.warning("The model reads the texts again in every epoch. A cache folder saves that.")
        return ModelActivations(model, contexts, config.hook_point, config.block(contexts.tokens), config.seed)
    fill_cache(cache, model, contexts, config.hook_point, dtype=cache_type, progress=progress)
    tokens = cached_tokens(cache)  # without norm outliers, which `contexts.tokens` includes
    config.check_amount(tokens, "and are no norm outliers")
    return CachedActivations(cache, config.block(tokens), config.seed)


def _save(
    training: Training, model: nn.Module, tokenizer: Any, out: Path, settings: dict[str, Any], model_id: str
) -> None:
    """Write the finished autoencoder with canaries, settings and the last measurements."""
    from .files import save_sae

    config = training.config
    sae = training.finished(model_id)
    metadata = {
        "training": settings, "tokens": training.step * config.batch_tokens, "seconds": round(training.seconds, 1),
        "versions": library_versions(), **training.last,
        "canaries": make_canaries(model, tokenizer, config.hook_point, sae.encoder).entry(),
    }  # fmt: skip
    save_sae(sae, out / "sae", metadata=metadata)


def _run(training: Training, log: RunLog, out: Path, settings: dict[str, Any], started: float, progress: bool) -> None:
    """Take all steps, write a line of the log every `LOG_EVERY` steps, and save checkpoints."""
    config = training.config
    before = training.seconds
    bar = tqdm(
        total=training.steps * config.batch_tokens, initial=training.step * config.batch_tokens, unit="token",
        unit_scale=True, desc="training", disable=not progress, smoothing=0.05,
    )  # fmt: skip
    sums: dict[str, torch.Tensor] = {}
    steps, since = 0, time.monotonic()
    with bar:
        while training.step < training.steps:
            for name, value in training.take_step().items():
                sums[name] = sums.get(name, torch.zeros(())) + value
            steps += 1
            bar.update(config.batch_tokens)
            saving = config.checkpoint_every and training.step % config.checkpoint_every == 0
            if training.step % LOG_EVERY == 0 or training.step == training.steps or saving:
                training.last = {name: float(value) / steps for name, value in sums.items()}
                speed = steps * config.batch_tokens / (time.monotonic() - since)
                rate = training.optimizer.param_groups[0]["lr"]
                metrics = {**training.last, "learning_rate": rate, "tokens_per_second": speed}
                if training.threshold is not None:
                    metrics["threshold"] = training.threshold / training.scale
                log.append("metric", step=training.step, metrics=metrics)
                last = training.last
                bar.set_postfix_str(f"FVU {last['fvu']:.3f}, L0 {last['l0']:.1f}, dead {last['dead_fraction']:.1%}")
                sums, steps, since = {}, 0, time.monotonic()
            training.seconds = before + time.monotonic() - started
            if saving and training.step < training.steps:
                tensors, state = training.state()
                state |= {"settings": settings, "threads": torch.get_num_threads()}
                save_checkpoint(out, training.step, tensors, state)
                since = time.monotonic()
