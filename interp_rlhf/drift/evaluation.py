"""One evaluation of drift: how a model is read, and how two models compare. The callback and `compare` both use it.

In: texts, labelled examples, monitors, prompts, an autoencoder; then models. Out: an `Observation` of each, and from two of
them a `drift` event. It must not know when an evaluation happens, nor log files.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..activations.batch import tokenize_examples
from ..activations.counted import end_of_turn_ids
from ..activations.hook_points import decoder_layers, has_adapters, layers_or_none, predicts, resolve
from ..activations.noise import require_positions
from ..activations.reference_pass import require_reference_below
from ..concepts.examples import load_examples
from ..concepts.readout import Readout
from ..messages import as_list
from ..runlog.events import DriftEvent, MonitorEntry
from .battery import Battery, spread
from .latent_drift import changed_latents
from .metrics import DRIFT_METRICS
from .monitors import LabelledSet
from .own_text import OwnText, moved_most, own_text_entry, per_prompt
from .scores import scores_of
from .start import Observation, load_start, save_start
from .texts import NEUTRAL_TEXTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from ..concepts.examples import Examples
    from ..sae.autoencoder import SparseAutoencoder
    from .config import DriftConfig
    from .observed import Sampled, Snapshot


@dataclass(frozen=True)
class RawReading:
    """What the forwards of one evaluation give, before anything is fitted on it.

    Attributes:
        snapshot (`Snapshot`): on the fixed texts.
        labelled (`dict[str, torch.Tensor]`): hook point to activations (N, D) of the labelled examples.
        sampled (`Sampled`, *optional*): the policy's own text.
    """

    snapshot: Snapshot
    labelled: dict[str, torch.Tensor]
    sampled: Sampled | None


class Evaluation:
    """What is read at every evaluation.

    Args:
        model (`nn.Module`), tokenizer: the first model that is read.
        monitors (`Sequence[Readout]`): read frozen, and in three ways on `labelled`.
        texts (`Sequence`, *optional*): texts of the battery; 24 neutral ones by default.
        hook_points (`Sequence[str]`, *optional*): four layers over the depth by default. Those of the monitors and of `sae` are
            added.
        labelled (`Examples`, *optional*): labelled examples.
        sae (`SparseAutoencoder`, *optional*): its latents on the battery are compared.
        seed (`int`): seed of folds and bootstraps.
        end_of_turn_ids (`set[int]`): tokens that end a completion.
        chat (`dict`): `chat_template` and `chat_template_kwargs`, as the trainer has them.
        pressure, holdouts (`dict[str, int]`): monitor to direction, written next to its readings.

    Attributes:
        own_text (`OwnText`, *optional*): samples the policy; set by the callback, which has a trainer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        monitors: Sequence[Readout] = (),
        *,
        texts: Sequence[Any] | None = None,
        hook_points: Sequence[str] | None = None,
        labelled: Examples | None = None,
        sae: SparseAutoencoder | None = None,
        seed: int = 0,
        end_of_turn_ids: set[int],
        chat: Mapping[str, Any] | None = None,
        pressure: Mapping[str, int] | None = None,
        holdouts: Mapping[str, int] | None = None,
    ):
        self.monitors, self.sae, self.seed = list(monitors), sae, seed
        self.pressure, self.holdouts = dict(pressure or {}), dict(holdouts or {})
        self.own_text: OwnText | None = None
        self.tokenizer, self.chat = tokenizer, dict(chat or {})

        def tokenized(rows: Sequence[Any]) -> Any:
            return tokenize_examples(list(rows), tokenizer, **self.chat, end_of_turn_ids=end_of_turn_ids)

        points = _in_order(model, hook_points, [*(m.hook_point for m in self.monitors), *_hook_points_of(sae)])
        self.battery = Battery(tokenized(NEUTRAL_TEXTS if texts is None else texts), points)
        self.labelled = LabelledSet(labelled, tokenized(labelled.rows), seed) if labelled is not None else None

    def check(self, model: Any) -> None:
        """Check that a model has the hook points and as many positions as the texts need.

        Raises:
            `ValueError`: it has not.
        """
        for point in self.battery.hook_points:
            resolve(model, point)
        require_positions(model, self.battery.batch)
        if self.labelled is not None:
            require_positions(model, self.labelled.batch)

    def read(self, model: Any, snapshot: Snapshot | None = None) -> RawReading:
        """The forwards of one evaluation. All ranks must call it together if the model is sharded.

        Args:
            snapshot (`Snapshot`, *optional*): of this model, if it was read already.
        """
        snapshot = self.battery.read(model) if snapshot is None else snapshot
        labelled = self.labelled.activations(model, self.monitors) if self.labelled is not None else {}
        return RawReading(snapshot, labelled, self.own_text.sample() if self.own_text is not None else None)

    def observe(self, raw: RawReading, start: Observation | None = None) -> Observation:
        """A reading with the monitors' scores on the labelled examples. It fits probes, so one rank is enough.

        Args:
            start (`Observation`, *optional*): the first observation of the run.
        """
        readings = {}
        if self.labelled is not None:
            readings = self.labelled.readings(
                raw.labelled, self.monitors, start.readings if start is not None else None
            )
        return Observation(raw.snapshot, readings, raw.sampled)

    def compare(
        self, start: Observation, now: Observation, before: Mapping[str, Sequence[float | None]] | None = None
    ) -> DriftEvent:
        """The `drift` event of two observations.

        Args:
            before (`dict`, *optional*): monitor to the score of each answer at the evaluation before; of the start by default.
        """
        points, output = self.battery.compare(start.snapshot, now.snapshot)
        sae = own_text = moved = None
        if self.sae is not None:
            sides = (side.snapshot.activations[self.sae.spec.hook_point] for side in (start, now))
            sae = changed_latents(self.sae, *sides)
        if self.own_text is not None and now.sampled is not None and start.sampled is not None:
            own_text = own_text_entry(now.sampled, start.sampled, self.seed)
            moved = moved_most(self.own_text.prompts, now.sampled, before or per_prompt(start.sampled))
        return DriftEvent(
            texts=len(self.battery), tokens=self.battery.tokens, hook_points=points, output=output,
            monitors={monitor.name: self._monitor(monitor, start, now) for monitor in self.monitors}, sae=sae,
            own_text=own_text, moved=moved,
        )  # fmt: skip

    def broken(self) -> DriftEvent:
        """The `drift` event of a model whose numbers are not finite."""
        return DriftEvent(texts=len(self.battery), tokens=self.battery.tokens, finite=False)

    def _monitor(self, monitor: Readout, start: Observation, now: Observation) -> MonitorEntry:
        name, point = monitor.name, monitor.hook_point
        said: dict[str, Any] = {
            "hook_point": point, "pressure": self.pressure.get(name), "holdout": self.holdouts.get(name),
        }  # fmt: skip
        if self.labelled is not None:
            return self.labelled.summary(now.readings[name], start.readings[name], **said)
        scores, first = (
            scores_of(monitor, self.battery.batch, side.snapshot.activations[point]) for side in (now, start)
        )
        kept = np.isfinite(scores)
        scale = max(float(first[kept].std()), 1e-12)
        shift = float((scores - first)[kept].mean() / scale)
        return MonitorEntry(mean_score=float(scores[kept].mean()), shift=shift, **said)

    def save(self, start: Observation, path: Path) -> None:
        """Write the start of a run."""
        save_start(start, path, self.battery.fingerprint, self._note())

    def load(self, path: Path) -> Observation | None:
        """The start in a file; None if there is none, or one of other texts, hook points, monitors or prompts."""
        labelled = [monitor.name for monitor in self.monitors] if self.labelled is not None else []
        return load_start(path, self.battery.fingerprint, self._note(), labelled, self.own_text is not None)

    def _note(self) -> str:
        """Digest of what a start depends on besides the battery."""
        own_text = self.own_text
        said: dict[str, Any] = {
            "labelled": self.labelled.examples.fingerprint if self.labelled is not None else None,
            "prompts": [own_text.prompts, own_text.max_new_tokens, own_text.seed] if own_text is not None else None,
            "measures": sorted(own_text.measures) if own_text is not None else [],
            "monitors": [(monitor.name, monitor.digest()) for monitor in self.monitors],
            "sae": self.sae.digest() if self.sae is not None else None,
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def metrics_in_words() -> dict[str, str]:
    """Range and direction of every registered metric, for the log."""
    return {name: str(metric) for name, metric in DRIFT_METRICS.items()}


def _in_order(model: Any, hook_points: Sequence[str] | None, watched: Sequence[str]) -> list[str]:
    """All hook points, each once: those that are not layers first, then layers from the first to the last."""
    layers = layers_or_none(model) if hook_points else decoder_layers(model)
    points = list(dict.fromkeys([*(hook_points or spread(layers)), *watched]))
    return sorted(points, key=lambda point: layers.index(point) if point in layers else -1)


def _hook_points_of(sae: SparseAutoencoder | None) -> list[str]:
    return [] if sae is None else [sae.spec.hook_point]


def evaluation_of(
    trainer: Any,
    config: DriftConfig,
    monitors: Any = (),
    pressure: Mapping[str, int] | None = None,
    holdouts: Mapping[str, int] | None = None,
    reference: Any = None,
    sae: SparseAutoencoder | None = None,
) -> Evaluation:
    """The evaluation of a trainer's policy.

    Args:
        monitors (`Sequence`): cards or readouts.
        pressure, holdouts (`dict[str, int]`): as in `DriftCallback`.
        reference (`nn.Module`, *optional*): the frozen reference; by default that of the trainer.
        sae (`SparseAutoencoder`, *optional*): the loaded autoencoder of `config.sae`.

    Raises:
        `ValueError`: monitors, hook points, texts or prompts that do not fit the model.
    """
    model = trainer.model
    readouts = [one if isinstance(one, Readout) else Readout.from_card(one) for one in as_list(monitors)]
    for readout in readouts:
        readout.check_model(model, exact=False, trained=trainer.state.global_step > 0)
    _check_names([readout.name for readout in readouts], {*(pressure or {}), *(holdouts or {})})
    if trainer.processing_class is None:
        raise ValueError(
            "The trainer's `processing_class` is None – expected the model's tokenizer: drift is read on texts. Pass it to "
            "the trainer."
        )
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    chat = {name: getattr(trainer, name, None) for name in ("chat_template", "chat_template_kwargs")}
    ends = end_of_turn_ids(model, tokenizer, chat["chat_template"])
    evaluation = Evaluation(
        model, tokenizer, readouts, texts=config.texts, hook_points=config.hook_points, labelled=_examples(config.labelled),
        sae=sae, seed=config.seed, end_of_turn_ids=ends, chat=chat, pressure=pressure, holdouts=holdouts,
    )  # fmt: skip
    evaluation.check(model)
    if config.prompts:
        evaluation.own_text = _own_text(trainer, config, config.prompts, evaluation, reference, ends, chat)
    return evaluation


def _check_names(names: list[str], others: set[str]) -> None:
    if wrong := sorted({name for name in names if names.count(name) > 1} | (others - {*names})):
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in wrong)} in `monitors`, `pressure` or `holdouts` – expected each monitor once, "
            f"and no other names than theirs: {', '.join(f'`{name}`' for name in sorted(set(names))) or 'there are none'}."
        )


def _examples(labelled: str | Path | Examples | None) -> Examples | None:
    return load_examples(labelled) if isinstance(labelled, str | Path) else labelled


def _own_text(
    trainer: Any, config: DriftConfig, prompts: Sequence[Any], evaluation: Evaluation, reference: Any, ends: set[int],
    chat: Mapping[str, Any],
) -> OwnText:  # fmt: skip
    if not predicts(trainer.model):
        raise ValueError(
            f"`prompts` are given and `{type(trainer.model).__name__}` has no language-model head – expected none: it answers "
            "nothing. Leave them out; activations, monitors and labelled examples are still read."
        )
    reference = reference if reference is not None else getattr(trainer, "ref_model", None)
    if reference is None and has_adapters(trainer.model):
        require_reference_below(trainer.model)
    return OwnText(
        trainer, prompts, evaluation.monitors, config.measures or {}, reference, ends, config.max_new_tokens,
        seed=config.seed, chat=chat, sae=evaluation.sae,
    )  # fmt: skip
