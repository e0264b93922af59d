"""The drift callback: on fixed texts, the policy against its own start.

In: a built trainer, of TRL or of transformers. Out: metrics through the trainer's log, and `drift` events in the run log. It
reads the policy between two steps and leaves it as it was: training flags, random state, and TRL's own metrics.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback

from ..activations import (
    TokenBatch,
    decoder_layers,
    end_of_turn_ids,
    read,
    read_activations,
    resolve,
    tokenize_examples,
)
from ..concepts.artifact import write_atomically
from ..concepts.card import LoadedCard
from ..concepts.examples import Examples, load_examples
from ..concepts.readout import Readout
from . import metrics
from .recorder import record
from .texts import TEXTS

logger = logging.getLogger(__name__)

MAX_TOKENS = 2048
START_FILE = "interp_drift_start.safetensors"


@dataclass(frozen=True)
class DriftConfig:
    """What `attach(trainer, drift=…)` passes on to `DriftCallback`; the fields are documented there."""

    every: int = 50
    texts: Sequence[Any] | None = None
    labelled: str | Path | Examples | None = None
    hook_points: Sequence[str] | None = None


class DriftCallback(TrainerCallback):
    """Logs how far the policy's activations have moved from where they started.

    Add it to any trainer: `trainer.add_callback(DriftCallback(trainer))`.

    Args:
        trainer (`transformers.Trainer`): already built.
        texts (`Sequence`, *optional*): texts or examples (see `tokenize_examples`); by default 24 neutral ones that come
            with the package. At most 2,048 tokens are used; what is over is left out with a warning. The first token of
            each text is left out of every metric.
        monitors (`Sequence`): cards or readouts, read frozen on the policy.
        labelled (`str`, `Path` or `Examples`, *optional*): labelled examples on which monitors are read, for the AUROC;
            without them, monitors give their mean score on `texts`.
        every (`int`, defaults to 50): optimizer steps between two evaluations; there is one at the start and one at the
            end.
        hook_points (`Sequence[str]`, *optional*): where to measure; by default four decoder layers spread over the depth.
        run_log (`str` or `Path`, *optional*): `interp.jsonl` in the trainer's output folder by default.

    Logged under `interp/drift/<hook point>/` are `cosine`, `relative_norm` and `cka` (see `drift.metrics`), under
    `interp/<monitor>/` `drift_mean_score` and `drift_auroc`, and `interp/drift/overhead_seconds`.
    """

    def __init__(
        self,
        trainer: Trainer,
        texts: Sequence[Any] | None = None,
        monitors: Sequence[str | Path | LoadedCard | Readout] = (),
        labelled: str | Path | Examples | None = None,
        every: int = 50,
        hook_points: Sequence[str] | None = None,
        run_log: str | Path | None = None,
    ):
        if every < 1:
            raise ValueError(f"`every` is {every} – expected a number of optimizer steps, at least 1.")
        self.trainer = trainer
        self.every = every
        model: Any = trainer.model
        self.hook_points = list(hook_points) if hook_points else _spread(decoder_layers(model))
        for point in self.hook_points:
            resolve(model, point)
        self.monitors = [m if isinstance(m, Readout) else Readout.from_card(m) for m in monitors]  # type: ignore[arg-type]
        for monitor in self.monitors:
            monitor.check_model(model, exact=False)
        processing: Any = trainer.processing_class
        tokenizer = getattr(processing, "tokenizer", processing)
        chat: dict[str, Any] = {
            "chat_template": getattr(trainer, "chat_template", None),
            "chat_template_kwargs": getattr(trainer, "chat_template_kwargs", None),
        }
        ends = end_of_turn_ids(model, tokenizer)
        self._batch = _fixed(
            tokenize_examples(list(TEXTS if texts is None else texts), tokenizer, **chat, end_of_turn_ids=ends)
        )
        self._labelled: tuple[TokenBatch, np.ndarray] | None = None
        if labelled is not None:
            examples = labelled if isinstance(labelled, Examples) else load_examples(labelled)
            self._labelled = tokenize_examples(examples.rows, tokenizer, **chat, end_of_turn_ids=ends), examples.labels
        self._log = record(trainer, run_log)
        self._start: dict[str, torch.Tensor] | None = None
        self._last_step = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = None
        if state.global_step > 0:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            for folder in (self._log.path.parent, checkpoint):
                self._start = self._start or self._load_start(folder / START_FILE)
            if self._start is not None:
                self._last_step = (
                    state.global_step
                )  # what the run had to say of this step, it said before it was saved
                return
            logger.warning(
                "Resumed at step %d without `%s` of the same texts and hook points in `%s` or `%s`: drift is now "
                "measured from here.",
                state.global_step, START_FILE, self._log.path.parent, checkpoint,
            )  # fmt: skip
        self._evaluate(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The start travels with the checkpoint, which may be moved away from the run."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        source = self._log.path.with_name(START_FILE)
        if self._log.writable and checkpoint.is_dir() and source.exists():
            write_atomically(checkpoint / START_FILE, source.read_bytes())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # At the last step here and not in `on_train_end`: by then trackers have closed.
        if state.global_step % self.every == 0 or control.should_training_stop:
            self._evaluate(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self._last_step:  # stopped in a way that no step foresaw: into the run log only
            self._evaluate(state.global_step, publish=False)

    def _evaluate(self, step: int, publish: bool = True) -> None:
        started = time.monotonic()
        model: Any = self.trainer.model
        now = read_activations(model, self._batch, self.hook_points)
        if self._start is None:
            self._start = now
            self._save_start()
        points = {
            point: {
                "cosine": metrics.cosine(self._start[point], now[point]),
                "relative_norm": metrics.relative_norm(self._start[point], now[point]),
                "cka": metrics.linear_cka(self._start[point], now[point]),
            }
            for point in self.hook_points
        }
        monitors = self._read_monitors(model)
        seconds = time.monotonic() - started
        logged = {
            f"interp/drift/{point}/{key}": value for point, found in points.items() for key, value in found.items()
        }
        logged |= {
            f"interp/{name}/drift_{key}": value for name, found in monitors.items() for key, value in found.items()
        }
        if publish:
            self._publish({**logged, "interp/drift/overhead_seconds": round(seconds, 4)})
        self._log.append(
            "drift", step, texts=len(self._batch), tokens=int(self._batch.completion_mask.sum()), hook_points=points,
            monitors=monitors, overhead_seconds=round(seconds, 4),
        )  # fmt: skip
        self._last_step = step

    def _publish(self, logged: dict[str, float]) -> None:
        """Through the log of transformers' own `Trainer`: it reaches `log_history` and every tracker at this very step.

        TRL's `log` would first empty the metrics that TRL is still averaging. Logging also takes back the wish of others to
        log at this step, so that wish is put back.
        """
        wanted = self.trainer.control.should_log
        Trainer.log(self.trainer, logged)
        self.trainer.control.should_log = wanted

    def _read_monitors(self, model: Any) -> dict[str, dict[str, float]]:
        if not self.monitors:
            return {}
        batch, labels = self._labelled if self._labelled is not None else (self._batch, None)
        scores = read(model, batch, self.monitors)
        found: dict[str, dict[str, float]] = {}
        for monitor in self.monitors:
            values = monitor.score(scores[monitor.name])
            kept = [value for value in values if value is not None]
            found[monitor.name] = {"mean_score": float(np.mean(kept))}
            if labels is not None:
                from sklearn.metrics import roc_auc_score

                rows = [i for i, value in enumerate(values) if value is not None]
                found[monitor.name]["auroc"] = float(roc_auc_score(labels[rows], kept))
        return found

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.hook_points).encode())
        digest.update(self._batch.input_ids.numpy().tobytes())
        return digest.hexdigest()

    def _save_start(self) -> None:
        from safetensors.torch import save

        assert self._start is not None
        if self._log.writable:
            tensors = {point: values.contiguous() for point, values in self._start.items()}
            write_atomically(
                self._log.path.with_name(START_FILE), save(tensors, metadata={"fingerprint": self._fingerprint()})
            )

    def _load_start(self, path: Path) -> dict[str, torch.Tensor] | None:
        from safetensors import safe_open

        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("fingerprint") != self._fingerprint():
                return None
            return {point: file.get_tensor(point) for point in self.hook_points}


def _spread(layers: list[str]) -> list[str]:
    """Four layers over the depth, the last one among them."""
    count = len(layers)
    return list(dict.fromkeys(layers[max(0, round(count * part / 4) - 1)] for part in (1, 2, 3, 4)))


def _fixed(batch: TokenBatch) -> TokenBatch:
    """At most `MAX_TOKENS` tokens, without the first token of each row: it carries massive activations, not the text."""
    lengths = batch.attention_mask.sum(1)
    kept = int((lengths.cumsum(0) <= MAX_TOKENS).sum())
    if kept == 0:
        raise ValueError(
            f"The first of `texts` has {int(lengths[0])} tokens – expected texts of at most {MAX_TOKENS}."
        )
    if kept < len(batch):
        logger.warning(
            "Drift is measured on the first %d of %d texts: %d tokens at most.", kept, len(batch), MAX_TOKENS
        )
    counted = batch.completion_mask[:kept].clone()
    counted[batch.attention_mask[:kept].cumsum(1) == 1] = False
    return TokenBatch(batch.input_ids[:kept], batch.attention_mask[:kept], counted)
