"""Training of a sparse autoencoder: TopK (Gao et al. 2024, arXiv 2406.04093) and BatchTopK (Bussmann et al. 2024, 2412.06410).

In: a model, texts, settings. Out: a `SparseAutoencoder`, written in the format of sae-lens, and a run log. It must not know what
it will be used for.

Inputs are divided by their mean norm over √D (the `expected_average_only_in` of sae-lens) and the division is folded into the
weights at the end. The loss is the fraction of the batch's variance that is not explained, plus the auxiliary loss of Gao et al.:
what the latents that have been silent for long make of the error. Deviations from the papers:
1. The auxiliary latents are `aux_k` = 2k, not half the width: each costs as much as one of the k.
2. A latent counts as silent after one pass over the corpus by default, not after ten million tokens: corpora here are small.
3. BatchTopK's threshold is the moving average of the smallest entry that is kept, as in sae-lens, and it is exported as JumpReLU.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tqdm.auto import tqdm

from ..activations.canaries import make_canaries
from ..activations.hook_points import resolve
from ..activations.identity import identity
from ..concepts.artifact import library_versions
from ..runlog.log import RunLog, read_run_log
from .autoencoder import SaeSpec, SparseAutoencoder
from .cache import (
    HEAD,
    HELD_OUT,
    SHARDS,
    CachedActivations,
    cached_tokens,
    fill_cache,
)
from .checkpoint import drop_checkpoints, load_checkpoint, save_checkpoint
from .sparse import keep_largest, keep_rows
from .stream import (
    FORWARD_TOKENS,
    Contexts,
    ModelActivations,
    ShuffleBuffer,
    cut,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from .cache import (
        CacheType,
    )
    from .sparse import Entries
    from .stream import (
        Source,
    )

logger = logging.getLogger(__name__)

LOG_EVERY = 50  # steps
# What the state of a checkpoint has.
STATE = ("step", "stream", "scale", "threshold", "seconds", "settings", "threads")
_PARAMETERS = ("encoder", "encoder_bias", "decoder", "decoder_bias")


@dataclass(frozen=True)
class SaeTraining:
    """Settings of a training.

    Attributes:
        hook_point (`str`): module path whose output is read.
        latents (`int`): S.
        k (`int`, defaults to 32): latents that are on per token; of `batchtopk`, on average.
        architecture (`str`, defaults to `"topk"`): or `batchtopk`.
        epochs (`float`, *optional*), tokens (`int`, *optional*): how long; one of the two.
        batch_tokens (`int`, defaults to 2048): activations of a step.
        learning_rate (`float`, defaults to 3e-3): of Adam.
        warm_up (`float`, defaults to 0.02): share of the steps over which it rises from 0.
        decay (`float`, defaults to 0.2): share of the steps, the last ones, over which it falls to 0.
        aux_k (`int`, *optional*): silent latents that explain the error; 2k by default, 0 for none.
        aux_weight (`float`, defaults to 1/32): of the auxiliary loss.
        dead_after (`int`, *optional*): a latent that was on for none of so many tokens is silent; one epoch by default.
        context (`int`, defaults to 128): tokens that the model reads at once.
        buffer (`int`, defaults to 131072): activations held for shuffling, 4 D bytes each.
        checkpoint_every (`int`, defaults to 1000): steps; 0 for never. A checkpoint holds the buffer.
        seed (`int`, defaults to 0): of weights and order.
    """

    hook_point: str
    latents: int
    k: int = 32
    architecture: Literal["topk", "batchtopk"] = "topk"
    epochs: float | None = None
    tokens: int | None = None
    batch_tokens: int = 2048
    learning_rate: float = 3e-3
    warm_up: float = 0.02
    decay: float = 0.2
    aux_k: int | None = None
    aux_weight: float = 1 / 32
    dead_after: int | None = None
    context: int = 128
    buffer: int = 2**17
    checkpoint_every: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.latents < 1:
            problems.append(f"`latents` is {self.latents} – expected at least 1")
        elif not 1 <= self.k <= self.latents:
            problems.append(f"`k` is {self.k} – expected 1 to {self.latents}, the number of latents")
        if self.architecture not in ("topk", "batchtopk"):
            problems.append(f"`architecture` is `{self.architecture}` – expected `batchtopk` or `topk`")
        if (self.epochs is None) == (self.tokens is None):
            problems.append(f"`epochs` is {self.epochs} and `tokens` {self.tokens} – expected one of them")
        for name in ("epochs", "tokens", "batch_tokens", "learning_rate", "dead_after", "context", "buffer"):
            if (value := getattr(self, name)) is not None and not value > 0:
                problems.append(f"`{name}` is {value} – expected more than 0")
        for name in ("aux_k", "aux_weight", "checkpoint_every", "seed"):
            if (value := getattr(self, name)) is not None and value < 0:
                problems.append(f"`{name}` is {value} – expected 0 or more")
        for name in ("warm_up", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"`{name}` is {getattr(self, name)} – expected a share of the steps, 0 to 1")
        if self.buffer < 4 * self.context:
            problems.append(f"`buffer` is {self.buffer} – expected at least {4 * self.context}, four contexts")
        if self.buffer < 2 * self.batch_tokens:
            problems.append(f"`buffer` is {self.buffer} – expected at least {2 * self.batch_tokens}, two batches")
        if problems:
            listed = "\n".join(f"  - {problem}" for problem in problems)
            raise ValueError(f"The settings of the training have {len(problems)} problem(s):\n{listed}")


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

    The same arguments, machine and number of threads give the same weights, bit for bit, also where the training was stopped and
    taken up again. The model is read, not changed.

    Args:
        model (`nn.Module`): a causal LM, read as its adapters stand, up to the hook point.
        tokenizer: the model's own.
        texts (`list[str]`, or `Contexts` of `cut`): what it reads.
        config (`SaeTraining`): settings.
        out (`str` or `Path`): folder for the run log (`interp.jsonl`), checkpoints, and at the end `sae/`; empty, but for
            hidden files and the cache.
        cache (`str` or `Path`, *optional*): folder for activations: the model then reads the texts once and not once per epoch,
            and not at all where the folder has them.
        cache_type (`str`, defaults to `"float16"`): or `float32`, twice as large.
        resume (`bool`): go on from the last checkpoint in `out`, or from the start where there is none yet. A training that is
            done is loaded, where the settings are its own; whether and how activations are cached may differ then.
        progress (`bool`, defaults to `True`): show progress bars.
        model_id (`str`): name of the model, for the file.

    Raises:
        `ValueError`: no such hook point, no text, fewer tokens than two batches, `out` holds files and `resume` is false, or
            what it holds is no training, one with other settings, or a checkpoint that is not whole.
    """
    from .files import load_sae, save_sae

    out = Path(out)
    check_folder(out, resume, cache)
    resolve(model, config.hook_point)
    contexts = texts if isinstance(texts, Contexts) else cut(texts, tokenizer, config.context)
    _check_amount(contexts.tokens, config)
    given = {
        **asdict(config), "texts": contexts.fingerprint, "model": identity(model, config.hook_point),
        "cached": None if cache is None else cache_type,
    }  # fmt: skip
    if resume and (out / "sae").exists():
        sae = load_sae(str(out / "sae"))
        _check_settings(_settings_of(sae, out / "sae"), given, besides=("cached",))
        drop_checkpoints(out)
        return sae
    found = load_checkpoint(out, STATE) if resume else None
    if found is not None:
        _check_settings(found[1]["settings"], given)
        if (threads := found[1]["threads"]) != torch.get_num_threads():
            logger.warning("Resumed on another number of threads than %d: not the same to the last bit.", threads)
    started = time.monotonic()
    source: Source
    if cache is None:
        source = ModelActivations(model, contexts, config.hook_point, _block(contexts.tokens, config), config.seed)
        if (config.epochs or 0) > 1 or (config.tokens or 0) > contexts.tokens:
            logger.warning("The model reads the texts anew in every epoch; a cache folder saves that.")
    else:
        fill_cache(cache, model, contexts, config.hook_point, dtype=cache_type, progress=progress)
        tokens = cached_tokens(cache)  # without norm outliers, which `contexts.tokens` has
        _check_amount(tokens, config, "and are no norm outliers")
        source = CachedActivations(cache, _block(tokens, config), config.seed)
    log = RunLog(out / "interp.jsonl")
    training = Training(source, config, found)
    if training.steps < 1:
        raise ValueError(
            f"{training.total} tokens are less than one batch of {config.batch_tokens} – expected more. Train for longer."
        )
    log.append(
        "run", step=training.step, title=f"sparse autoencoder at {config.hook_point}", arm="", model=model_id,
        trainer="train_sae", cards=[], settings={**given, "threads": torch.get_num_threads(), "versions": library_versions()},
    )  # fmt: skip
    _run(training, log, out, given, started, progress)
    sae = training.finished(model_id)
    metadata = {
        "training": given, "tokens": training.step * config.batch_tokens, "seconds": round(training.seconds, 1),
        "versions": library_versions(), **training.last,
        "canaries": make_canaries(model, tokenizer, config.hook_point, sae.encoder).entry(),
    }  # fmt: skip
    save_sae(sae, out / "sae", metadata=metadata)
    log.append("end", step=training.step, seconds=round(training.seconds, 1))
    drop_checkpoints(out)
    return load_sae(str(out / "sae"))


class Training:
    """The state of a training: weights, optimizer, stream, and which latents are silent.

    Args:
        source (`Source`): activations of the corpus.
        config (`SaeTraining`): settings.
        found (`tuple`, *optional*): tensors and state of a checkpoint.
    """

    def __init__(
        self, source: Source, config: SaeTraining, found: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None
    ):
        self.config = config
        size = min(config.buffer, source.tokens)
        self.buffer = ShuffleBuffer(source, size, config.batch_tokens, config.seed)
        self.total = config.tokens if config.tokens is not None else round((config.epochs or 0) * source.tokens)
        self.steps = self.total // config.batch_tokens
        self.dead_after = config.dead_after or source.tokens
        self.aux_k = 2 * config.k if config.aux_k is None else config.aux_k
        self.step = 0
        self.seconds = 0.0
        self.threshold: float | None = None
        self.last: dict[str, float] = {}
        if found is None:
            self._start()
        else:
            self._restore(*found)
        self.optimizer = torch.optim.Adam([self.weights[name] for name in _PARAMETERS], fused=True)
        if found is not None:
            self._restore_optimizer(found[0])

    def _start(self) -> None:
        config = self.config
        held = self.buffer.held()
        self.scale = float(held.shape[1] ** 0.5 / held.norm(dim=1).double().mean())
        center = held.double().mean(0).float() * self.scale
        random = torch.Generator().manual_seed(config.seed)
        rows = _unit(torch.randn(config.latents, held.shape[1], generator=random))
        self.weights = {
            "encoder": rows.clone(), "encoder_bias": torch.zeros(config.latents), "decoder": rows, "decoder_bias": center,
        }  # fmt: skip
        self.silent = torch.zeros(config.latents, dtype=torch.long)  # tokens since each was on
        for weight in self.weights.values():
            weight.requires_grad_()

    def take_step(self) -> dict[str, torch.Tensor]:
        """One optimizer step; what it measured on its batch before."""
        activation = self.buffer.next() * self.scale
        weights = self.weights
        centred = activation - weights["decoder_bias"].detach()
        with torch.no_grad():
            before = torch.addmm(weights["encoder_bias"], centred, weights["encoder"].T)  # (N, S)
        entries = self._choose(before)
        values = self._values(entries, before, centred)
        error = entries.decode(values, weights["decoder"]) + weights["decoder_bias"] - activation
        variance = (activation - activation.mean(0)).pow(2).sum()
        fvu = error.pow(2).sum() / variance
        dead = self.silent > self.dead_after
        loss = fvu
        if self.aux_k and bool(dead.any()):
            loss = loss + self.config.aux_weight * self._auxiliary(dead, before, centred, -error.detach())
        self.optimizer.zero_grad()
        loss.backward()
        self._descend()
        kept = values.detach()
        on = kept > 0
        self.silent += len(activation)
        self.silent[entries.columns[on]] = 0
        if self.config.architecture == "batchtopk" and bool(on.any()):
            smallest = float(kept[on].min())
            self.threshold = smallest if self.threshold is None else 0.99 * self.threshold + 0.01 * smallest
        self.step += 1
        return {"fvu": fvu.detach(), "l0": on.sum() / len(activation), "dead_fraction": dead.float().mean()}

    def _choose(self, before: torch.Tensor) -> Entries:
        config = self.config
        if config.architecture == "topk":
            return keep_rows(before.topk(config.k, dim=-1, sorted=False).indices, config.latents)
        hint = 0.0 if self.threshold is None else 0.8 * self.threshold
        return keep_largest(before, len(before) * config.k, hint)

    def _values(self, entries: Entries, before: torch.Tensor, centred: torch.Tensor) -> torch.Tensor:
        weights = self.weights
        return entries.pick(
            before, weights["encoder"], weights["encoder_bias"], weights["decoder_bias"], centred
        ).relu()

    def _auxiliary(
        self, dead: torch.Tensor, before: torch.Tensor, centred: torch.Tensor, missing: torch.Tensor
    ) -> torch.Tensor:
        """How much of the error silent latents leave: ‖missing − theirs‖² / ‖missing‖²."""
        silent = dead.nonzero().squeeze(1)
        chosen = before[:, silent].topk(min(self.aux_k, len(silent)), dim=-1, sorted=False).indices
        entries = keep_rows(silent[chosen], self.config.latents)
        theirs = entries.decode(self._values(entries, before, centred), self.weights["decoder"])
        return (missing - theirs).pow(2).sum() / missing.pow(2).sum()

    @torch.no_grad()
    def _descend(self) -> None:
        config = self.config
        rows = self.weights["decoder"]
        assert rows.grad is not None
        # Rows have length 1: what would change that is no descent.
        rows.grad -= (rows.grad * rows).sum(1, keepdim=True) * rows
        rising = min(1.0, (self.step + 1) / max(1.0, config.warm_up * self.steps))
        falling = min(1.0, (self.steps - self.step) / max(1.0, config.decay * self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * min(rising, falling)
        self.optimizer.step()
        rows.copy_(_unit(rows))

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and JSON values from which it goes on as if it had not been stopped."""
        held, position = self.buffer.state()
        tensors = {name: self.weights[name].detach() for name in _PARAMETERS}
        for name in _PARAMETERS:
            for key, value in self.optimizer.state[self.weights[name]].items():
                tensors[f"adam.{name}.{key}"] = value
        tensors |= {"silent": self.silent} | {f"buffer.{key}": value for key, value in held.items()}
        return tensors, {
            "step": self.step, "stream": position, "scale": self.scale, "threshold": self.threshold, "seconds": self.seconds,
        }  # fmt: skip

    def _restore(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        self.weights = {name: tensors[name].requires_grad_() for name in _PARAMETERS}
        self.silent = tensors["silent"]
        self.step, self.scale, self.threshold = state["step"], state["scale"], state["threshold"]
        self.seconds = state["seconds"]
        self.buffer.restore({key: tensors[f"buffer.{key}"] for key in ("held", "random")}, state["stream"])

    def _restore_optimizer(self, tensors: dict[str, torch.Tensor]) -> None:
        for name in _PARAMETERS:
            kept = {key: tensors[f"adam.{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[self.weights[name]] = kept

    def finished(self, model_id: str = "") -> SparseAutoencoder:
        """What the weights are now, in the activation's own scale."""
        weights = {name: weight.detach().clone() for name, weight in self.weights.items()}
        # Latents and reconstruction are both in the scaled input's units: with rows of length 1 only the biases change.
        for name in ("encoder_bias", "decoder_bias"):
            weights[name] /= self.scale
        config = self.config
        if config.architecture == "topk":
            spec = SaeSpec("topk", config.hook_point, config.k, model_id=model_id)
            return SparseAutoencoder(spec, center=weights["decoder_bias"], **weights)
        spec = SaeSpec("jumprelu", config.hook_point, model_id=model_id)
        threshold = torch.full((config.latents,), (self.threshold or 0.0) / self.scale)
        return SparseAutoencoder(spec, center=weights["decoder_bias"], threshold=threshold, **weights)


def _run(training: Training, log: RunLog, out: Path, settings: dict[str, Any], started: float, progress: bool) -> None:
    """Steps until the end, with a line of the log now and then, and checkpoints."""
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


def check_folder(out: Path, resume: bool, cache: str | Path | None = None) -> None:
    """Whether a training may write into a folder.

    Raises:
        `ValueError`: a new training would meet files other than hidden ones and its own cache; a resumed one would find none, or
            the log of something else; the cache would lie where the autoencoder goes.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"`{out}` is a file – expected a folder. Name another one.")
    if cache is not None and Path(cache).resolve().is_relative_to((out / "sae").resolve()):
        raise ValueError(f"`{cache}` is where the autoencoder goes – expected another folder for the cache.")
    log = out / "interp.jsonl"
    there = log.exists() or (out / "sae").exists()
    if resume and not there:
        raise ValueError(f"`{out}` holds no training – expected one to resume. Start it without `resume`.")
    if resume and log.exists() and log.stat().st_size and (trainers := _trainers(log)) - {"train_sae"}:
        raise ValueError(
            f"`{log}` is the log of {sorted(trainers)} – expected that of `train_sae`. Name the folder of the training to resume."
        )
    if resume:
        return
    if there:
        raise ValueError(f"`{out}` holds a training – expected an empty folder. Resume it, or name another folder.")
    if others := [path.name for path in _visible(out) if not _of_cache(path, cache)]:
        listed = ", ".join(f"`{name}`" for name in others[:5]) + (" and more" if len(others) > 5 else "")
        raise ValueError(f"`{out}` holds {listed} – expected an empty folder. Name another one.")


def _trainers(log: Path) -> set[str]:
    """What wrote a log, by its `run` events; `something else` where it has none."""
    found = {str(event.get("trainer")) for event in read_run_log(log) if event["event"] == "run"}
    return found or {"something else"}


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.exists() else []


def _of_cache(path: Path, cache: str | Path | None) -> bool:
    """Whether a file or folder is, leads to, or is in the cache."""
    if cache is None:
        return False
    folder = Path(cache).resolve()
    if folder == path.parent.resolve():
        return path.name == HEAD or path.name.startswith((SHARDS, HELD_OUT))
    return folder.is_relative_to(path.resolve())


def _block(tokens: int, config: SaeTraining) -> int:
    """Activations read at a time: at most a quarter of the buffer."""
    return min(FORWARD_TOKENS, min(config.buffer, tokens) // 4)


def _check_amount(tokens: int, config: SaeTraining, which: str = "") -> None:
    needed = max(2 * config.batch_tokens, 4 * config.context)
    if tokens < needed:
        raise ValueError(
            f"The texts have {tokens} tokens that count{which and ' '}{which} – expected at least {needed}: two batches of "
            f"{config.batch_tokens} and four contexts of {config.context}. Give more text, or make these smaller."
        )


def _settings_of(sae: SparseAutoencoder, folder: Path) -> dict[str, Any]:
    """Settings of the training that an autoencoder came from, as its file has them."""
    if not sae.spec.training:
        raise ValueError(
            f"`{folder}` does not say how it was trained – expected the end of a training to resume. Name another."
        )
    return sae.spec.training


def _check_settings(before: dict[str, Any], now: dict[str, Any], besides: Sequence[str] = ()) -> None:
    differing = [
        f"  - `{key}` was {before.get(key)!r} – now {now.get(key)!r}"
        for key in sorted(set(before) | set(now))
        if before.get(key) != now.get(key) and key not in ("checkpoint_every", *besides)
    ]
    if differing:
        listed = "\n".join(differing)
        raise ValueError(
            f"The training to resume had other settings:\n{listed}\nGive the same ones, or start another training."
        )


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-8)
