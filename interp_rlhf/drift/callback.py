"""The drift callback: on fixed texts and prompts, the policy against its own start, with a verdict.

In: a built trainer, of TRL or of transformers. Out: metrics through the trainer's log, and `drift`, `samples` and `verdict`
events in the run log. It reads the policy between two steps and leaves it as it was: training flags, random state, and TRL's own
metrics. With several processes all of them read together, where they must; rank 0 alone compares, judges and writes, and what it
decides (when to look again, to save, to stop) all of them do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import Trainer, TrainerCallback

from ..activations.batch import tokenize_examples
from ..activations.counted import end_of_turn_ids
from ..activations.hook_points import (
    decoder_layers,
    has_adapters,
    layers_or_none,
    predicts,
    resolve,
)
from ..activations.noise import require_positions
from ..activations.ranks import from_rank_zero
from ..activations.reference_pass import require_reference_below
from ..concepts.examples import Examples, load_examples
from ..concepts.readout import Readout
from ..messages import as_list
from ..runlog.log import read_run_log
from ..runlog.recorder import record
from ..sae.autoencoder import SparseAutoencoder
from ..sae.files import load_sae
from .battery import Battery, spread
from .config import DriftConfig
from .latent_drift import changed_latents
from .monitors import LabelledSet, Reading, scores_of
from .own_text import OwnText, Sampled, per_prompt, summarize
from .texts import TEXTS
from .verdicts import gather, judge

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from .battery import Snapshot
    from .verdicts import Verdict

logger = logging.getLogger(__name__)

START_FILE = "interp_drift_start.safetensors"
LAST_GOOD = "last_good"
SHOWN = 5  # prompts that moved a monitor most, and samples, per evaluation


@dataclass(frozen=True)
class _Start:
    """What later evaluations are compared with."""

    snapshot: Snapshot
    readings: dict[str, Reading]
    sampled: Sampled | None


@dataclass(frozen=True)
class _Decision:
    """What rank 0 makes of an evaluation, for all ranks."""

    logged: dict[str, float]
    next: int
    good: int | None
    verdict: Verdict


class DriftCallback(TrainerCallback):
    """Logs how far the policy has moved from where it started, inside and in its text, and judges it.

    Add it to any trainer: `trainer.add_callback(DriftCallback(trainer))`.

    Args:
        trainer (`transformers.Trainer`): already built.
        monitors (`Sequence`): cards or readouts, read frozen on the policy.
        pressure (`dict[str, int]`, *optional*): names of monitors that training pushes, +1 up or −1 down; `attach` fills it in.
        holdouts (`dict[str, int]`, *optional*): monitors of what a reward pays for, with artifacts of their own, and the
            direction, +1 or −1, in which they follow an honest one. `attach` fills it in.
        reference (`nn.Module`, *optional*): the frozen reference for the policy's own text; by default the trainer's own, with
            PEFT the base model.
        run_log (`str` or `Path`, *optional*): `interp.jsonl` in the trainer's output folder by default.
        config (`DriftConfig`, *optional*), **settings: the fields of `DriftConfig`, as one or by name.

    Logged under `interp/drift/<hook point>/` are `cosine`, `relative_norm`, `cka`, `procrustes`, `shift_rank`, `first_tokens`
    and `norm_outliers` (see `drift.metrics`), under `interp/drift/` `kl`, `perplexity`, `sae/fvu`, `sae/l0`, `alarm` (1 where
    the verdict is one) and `overhead_seconds`, under `interp/<monitor>/` `drift_…`. The verdict itself is in the run log and
    the report.
    """

    def __init__(
        self,
        trainer: Trainer,
        texts: Any = None,
        monitors: Any = (),
        *,
        pressure: Mapping[str, int] | None = None,
        holdouts: Mapping[str, int] | None = None,
        reference: torch.nn.Module | None = None,
        run_log: str | Path | None = None,
        config: DriftConfig | None = None,
        **settings: Any,
    ):
        config = dataclasses.replace(config or DriftConfig(), **settings)
        self.trainer, self.config = trainer, dataclasses.replace(config, texts=texts) if texts is not None else config
        config = self.config
        model: Any = trainer.model
        self.monitors = [m if isinstance(m, Readout) else Readout.from_card(m) for m in as_list(monitors)]
        for monitor in self.monitors:
            monitor.check_model(model, exact=False, trained=trainer.state.global_step > 0)
        self.pressure, self.holdouts = dict(pressure or {}), dict(holdouts or {})
        names = [monitor.name for monitor in self.monitors]
        if wrong := sorted({n for n in names if names.count(n) > 1} | ({*self.pressure, *self.holdouts} - {*names})):
            raise ValueError(
                f"{', '.join(f'`{n}`' for n in wrong)} in `monitors`, `pressure` or `holdouts` – expected each monitor once, and "
                f"no other names than theirs: {', '.join(f'`{n}`' for n in sorted(set(names))) or 'there are none'}."
            )
        layers = layers_or_none(model) if config.hook_points else decoder_layers(model)
        chosen = list(config.hook_points) if config.hook_points else spread(layers)
        self._sae = _loaded(config.sae, model)
        watched = [monitor.hook_point for monitor in self.monitors]
        watched += [self._sae.spec.hook_point] if self._sae is not None else []
        chosen = list(dict.fromkeys([*chosen, *watched]))
        for point in chosen:
            resolve(model, point)
        chosen.sort(key=lambda point: layers.index(point) if point in layers else -1)
        processing: Any = trainer.processing_class
        if processing is None:
            raise ValueError(
                "The trainer's `processing_class` is None – expected the model's tokenizer: drift is read on texts. Pass it to "
                "the trainer."
            )
        tokenizer = getattr(processing, "tokenizer", processing)
        chat: dict[str, Any] = {
            "chat_template": getattr(trainer, "chat_template", None),
            "chat_template_kwargs": getattr(trainer, "chat_template_kwargs", None),
        }
        ends = end_of_turn_ids(model, tokenizer, chat["chat_template"])

        def tokenized(rows: Sequence[Any]) -> Any:
            return tokenize_examples(list(rows), tokenizer, **chat, end_of_turn_ids=ends)

        self.battery = Battery(tokenized(TEXTS if config.texts is None else config.texts), chosen)
        require_positions(model, self.battery.batch)
        self._labelled: LabelledSet | None = None
        if config.labelled is not None:
            given = config.labelled
            examples = given if isinstance(given, Examples) else load_examples(given)
            self._labelled = LabelledSet(examples, tokenized(examples.rows), config.seed)
            require_positions(model, self._labelled.batch)
        self._own: OwnText | None = None
        if config.prompts:
            if not predicts(model):
                raise ValueError(
                    f"`prompts` are given and `{type(model).__name__}` has no language-model head – expected none: it answers "
                    "nothing. Leave them out; activations, monitors and labelled examples are read all the same."
                )
            reference = reference if reference is not None else getattr(trainer, "ref_model", None)
            if reference is None and has_adapters(model):
                require_reference_below(model)
            self._own = OwnText(
                trainer, config.prompts, self.monitors, config.measures or {}, reference, ends, config.max_new_tokens,
                seed=config.seed, chat=chat, sae=self._sae,
            )  # fmt: skip
        self._baseline = _shifts(config.baseline) if config.baseline is not None else {}
        self._log = record(trainer, run_log)
        # Set by `attach`: what checks that the reference still reads as it did.
        self.rechecks: list[Callable[[], None]] = []
        # Set by `attach`: which training batches moved each monitor most since the last call.
        self.batches: Callable[[], dict[str, Any]] | None = None
        self._start: _Start | None = None
        self._first: dict[str, Any] | None = None
        self._before: dict[str, list[float | None]] | None = None
        self._last_step = -1
        self._next = 0
        self._good: int | None = None
        self._clock = 0.0
        self._began = 0
        self._spent = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = self._first = self._before = self._good = None
        self._clock, self._spent, self._began = time.monotonic(), 0.0, state.global_step
        if state.global_step > 0:
            known = from_rank_zero(lambda: self._resume(state.global_step))
            if known is not None:
                self._last_step, self._next, self._good = known
                return
        self._evaluate(state.global_step, control, "before")

    def _resume(self, step: int) -> tuple[int, int, int | None] | None:
        """The start of a resumed run, and what it knows of itself: last and next evaluation, last step without an alarm."""
        checkpoint = Path(str(self.trainer.args.output_dir)) / f"checkpoint-{step}"
        for path in (checkpoint / START_FILE, self._start_file):
            self._start = self._start or self._load_start(path)
        if self._start is None:
            logger.warning(
                "Resumed at step %d without `%s` of the same texts, hook points and monitors in `%s` or `%s`: drift is now "
                "measured from here.",
                step, START_FILE, checkpoint, self._log.path.parent,
            )  # fmt: skip
            return None
        # What the run had to say of this step, it said before it was saved.
        self._last_step = step
        self._remember(step)
        self._schedule(step)
        return self._last_step, self._next, self._good

    def _remember(self, step: int) -> None:
        """What a resumed run knows of its earlier evaluations, from its own log and folder."""
        if self._log.path.exists():
            events = [e for e in read_run_log(self._log.path) if e["event"] == "drift" and e.get("step", 0) <= step]
            self._first = events[0] if events else None
            if events:
                self._before = events[-1].get("own_text", {}).get("scores")
                self._last_step = int(events[-1]["step"])
        state = Path(str(self.trainer.args.output_dir)) / LAST_GOOD / "trainer_state.json"
        if state.exists() and (good := json.loads(state.read_text())["global_step"]) <= step:
            self._good = good

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The start travels with the checkpoint, which may be moved away from the run."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        source = self._start_file
        good = self._stops and self._good == state.global_step
        if good:  # every rank writes its part of a checkpoint
            self.trainer.accelerator.wait_for_everyone()
        if not self._log.writable or not checkpoint.is_dir():
            return
        if source.exists():
            (checkpoint / START_FILE).unlink(missing_ok=True)
            _link_or_copy(str(source), str(checkpoint / START_FILE))
        if good:
            _link(checkpoint, Path(args.output_dir) / LAST_GOOD)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # At the last step here and not in `on_train_end`: by then trackers have closed.
        if state.global_step >= self._next or control.should_training_stop:
            self._evaluate(state.global_step, control, "after" if control.should_training_stop else "train")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = _kept_step(args, state)
        if (
            kept is not None
        ):  # the best checkpoint's weights were loaded: they are what is left, and the last to be read
            if kept != self._last_step:
                self._evaluate(kept, control, "kept", publish=False)
            return
        if state.global_step != self._last_step:  # stopped in a way that no step foresaw: into the run log only
            self._evaluate(state.global_step, control, "after", publish=False)

    def _schedule(self, step: int, seconds: float = 0.0) -> None:
        every = self.config.every
        self._next = (step // every + 1) * every
        trained = time.monotonic() - self._clock - self._spent
        steps = step - self._began
        if self.config.max_overhead is not None and steps > 0 and seconds and trained > 0:
            # As many steps as one more evaluation needs to stay within the budget.
            needed = (self._spent + seconds) / self.config.max_overhead / (trained / steps) - steps
            self._next = max(self._next, step + math.ceil(needed / every) * every)

    def _evaluate(self, step: int, control: Any, when: str, publish: bool = True) -> None:
        started = time.monotonic()
        model: Any = self.trainer.model_wrapped
        for recheck in self.rechecks:
            recheck()
        snapshot = self.battery.read(model)
        if not from_rank_zero(lambda: self._start is None or snapshot.finite):
            decision = from_rank_zero(lambda: self._broken(step, control, started))
        else:
            labelled = self._labelled.activations(model, self.monitors) if self._labelled is not None else {}
            sampled = self._own.sample() if self._own is not None else None
            decision = from_rank_zero(
                lambda: self._compared(step, control, started, when, snapshot, labelled, sampled)
            )
        self._last_step, self._next, self._good = step, decision.next, decision.good
        if publish:
            self._publish(decision.logged)
        self._act(decision.verdict, step, control)

    def _compared(
        self,
        step: int,
        control: Any,
        started: float,
        when: str,
        snapshot: Snapshot,
        labelled: Mapping[str, torch.Tensor],
        sampled: Sampled | None,
    ) -> _Decision:
        """An evaluation beside the start, judged and written down."""
        old = self._start.readings if self._start is not None else None
        readings = self._labelled.readings(labelled, self.monitors, old) if self._labelled is not None else {}
        if self._start is None:
            self._start = _Start(snapshot, readings, sampled)
            self._save_start()
        start = self._start
        points, output = self.battery.compare(start.snapshot, snapshot)
        event: dict[str, Any] = {
            "texts": len(self.battery), "tokens": self.battery.tokens, "hook_points": points, "output": output,
            "monitors": self._monitors(snapshot, readings),
        }  # fmt: skip
        if self._sae is not None:
            sides = (side.activations[self._sae.spec.hook_point] for side in (start.snapshot, snapshot))
            event["sae"] = changed_latents(self._sae, *sides)
        if sampled is not None and start.sampled is not None:
            event["own_text"] = summarize(sampled, start.sampled, self.config.seed)
            event["own_text"]["scores"] = per_prompt(sampled)
            event["moved"] = self._moved(sampled, self._before or per_prompt(start.sampled))
            self._before = event["own_text"]["scores"]
        if self.batches is not None and (batches := self.batches()):
            event["batches"] = batches
        self._first = self._first or event
        verdict = judge(
            gather(event, self._first, self.trainer.state.log_history, max(self._last_step, 0), self._baseline)
        )
        decision = self._written(step, control, started, event, _flat(event), verdict)
        if sampled is not None:
            self._log.append("samples", step, when=when, rows=self._rows(sampled))
        return decision

    def _broken(self, step: int, control: Any, started: float) -> _Decision:
        """An evaluation of a model that gives no numbers any more: no metric is one, and the verdict is clear."""
        event: dict[str, Any] = {
            "texts": len(self.battery), "tokens": self.battery.tokens, "hook_points": {}, "output": {}, "monitors": {},
            "finite": False,
        }  # fmt: skip
        return self._written(step, control, started, event, {}, judge(gather(event)))

    def _written(
        self,
        step: int,
        control: Any,
        started: float,
        event: dict[str, Any],
        logged: dict[str, float],
        verdict: Verdict,
    ) -> _Decision:
        seconds = time.monotonic() - started
        self._spent += seconds
        self._log.append("drift", step, **event, overhead_seconds=round(seconds, 4))
        self._log.append(
            "verdict", step, verdict=verdict.name, because=verdict.because, next=verdict.next, alarm=verdict.alarm
        )
        self._schedule(step, seconds)
        good = self._good
        if self._stops and step > 0 and not verdict.alarm and not control.should_training_stop:
            good = step
        logged |= {"interp/drift/alarm": float(verdict.alarm), "interp/drift/overhead_seconds": round(seconds, 4)}
        return _Decision(logged, self._next, good, verdict)

    @property
    def _stops(self) -> bool:
        return self.config.on_verdict == "stop"

    def _act(self, verdict: Verdict, step: int, control: Any) -> None:
        if verdict.alarm:
            logger.warning("Step %d: %s. %s. Next: %s", step, verdict.name, "; ".join(verdict.because), verdict.next)
        if not self._stops or step == 0:
            return
        if verdict.alarm:
            if not control.should_training_stop:  # at the last step the trainer saves what it was going to save
                control.should_save = False
            control.should_training_stop = True
            good = (
                f"`{Path(str(self.trainer.args.output_dir)) / LAST_GOOD}`, of step {self._good}"
                if self._good
                else "none yet"
            )
            logger.warning("Training stops here; the checkpoint of the last evaluation without an alarm: %s.", good)
        elif self._good == step:
            control.should_save = True

    def _monitors(self, snapshot: Snapshot, readings: Mapping[str, Reading]) -> dict[str, dict[str, Any]]:
        assert self._start is not None
        found: dict[str, dict[str, Any]] = {}
        for monitor in self.monitors:
            name = monitor.name
            if self._labelled is not None:
                found[name] = self._labelled.summary(readings[name], self._start.readings[name])
            else:
                now, then = (
                    scores_of(monitor, self.battery.batch, side.activations[monitor.hook_point])
                    for side in (snapshot, self._start.snapshot)
                )
                kept = np.isfinite(now)
                scale = max(float(then[kept].std()), 1e-12)
                found[name] = {
                    "mean_score": float(now[kept].mean()),
                    "shift": float((now - then)[kept].mean() / scale),
                }
            found[name]["hook_point"] = monitor.hook_point
            if name in self.pressure:
                found[name]["pressure"] = self.pressure[name]
            if name in self.holdouts:
                found[name]["holdout"] = self.holdouts[name]
        return found

    def _moved(self, now: Sampled, before: Mapping[str, list[float | None]]) -> dict[str, list[dict[str, Any]]]:
        """Per monitor the prompts whose answers moved it most since the last evaluation."""
        assert self._own is not None
        found = {}
        for name, scores in per_prompt(now).items():
            pairs = zip(scores, before[name], strict=True)
            gaps = [(i, new - old) for i, (new, old) in enumerate(pairs) if new is not None and old is not None]
            top = sorted(gaps, key=lambda item: -abs(item[1]))[:SHOWN]
            found[name] = [
                {"prompt": self._own.prompts[i], "completion": now.texts[i], "change": round(gap, 6)}
                for i, gap in top
                if gap
            ]
        return found

    def _rows(self, sampled: Sampled) -> list[dict[str, Any]]:
        assert self._own is not None
        rows = []
        for i in range(min(SHOWN, len(sampled.texts))):
            scores = {name: _none(values[i]) for name, values in (sampled.policy | sampled.measures).items()}
            row: dict[str, Any] = {"prompt": self._own.prompts[i], "completion": sampled.texts[i], "scores": scores}
            if self.monitors:
                row["tokens"] = {
                    "pieces": sampled.pieces[i],
                    "scores": {name: [round(s, 3) for s in lists[i]] for name, lists in sampled.token_scores.items()},
                }
            rows.append(row)
        return rows

    def _publish(self, logged: dict[str, float]) -> None:
        """Through the log of transformers' own `Trainer`: it reaches `log_history` and every tracker at this very step.

        TRL's `log` would first empty the metrics that TRL is still averaging. Logging also takes back the wish of others to
        log at this step, so that wish is put back.
        """
        wanted = self.trainer.control.should_log
        Trainer.log(self.trainer, logged)
        self.trainer.control.should_log = wanted

    def _note(self) -> str:
        """What else a start belongs to: the labelled examples, the prompts, the monitors."""
        said = {
            "labelled": self._labelled.examples.fingerprint if self._labelled is not None else None,
            "prompts": [self._own.prompts, self._own.max_new_tokens, self._own.seed]
            if self._own is not None
            else None,
            "measures": sorted(self.config.measures or {}),
            "monitors": [(m.name, m.digest()) for m in self.monitors],
            "sae": self._sae.digest() if self._sae is not None else None,
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def _start_file(self) -> Path:
        """Beside the run log and named after it: several runs may log into one folder."""
        return self._log.path.with_name(f"{self._log.path.stem}_{START_FILE.removeprefix('interp_')}")

    def _save_start(self) -> None:
        assert self._start is not None
        if not self._log.writable:
            return
        extra: dict[str, torch.Tensor] = {}
        for name, reading in self._start.readings.items():
            extra |= {f"labelled/{key}": value for key, value in reading.tensors(name).items()}
        if self._start.sampled is not None:
            extra |= self._start.sampled.tensors()
        self.battery.save(self._start.snapshot, self._start_file, extra, self._note())

    def _load_start(self, path: Path) -> _Start | None:
        found = self.battery.load(path, self._note())
        if found is None:
            return None
        snapshot, extra = found
        labelled = {key.removeprefix("labelled/"): value for key, value in extra.items()}
        readings = {m.name: Reading.from_tensors(m.name, labelled) for m in self.monitors} if self._labelled else {}
        return _Start(snapshot, readings, Sampled.from_tensors(extra) if self._own is not None else None)


def _kept_step(args: Any, state: Any) -> int | None:
    """Step of the checkpoint that `load_best_model_at_end` has loaded; None where the last weights stay."""
    best = getattr(state, "best_model_checkpoint", None)
    if not getattr(args, "load_best_model_at_end", False) or not best:
        return None
    step = str(best).rpartition("-")[2]
    return int(step) if step.isdigit() else getattr(state, "best_global_step", None)


def _flat(event: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a `drift` event under the names of the trainer's log."""
    found = {
        f"interp/drift/{point}/{key}": value
        for point, part in event["hook_points"].items()
        for key, value in part.items()
    }
    found |= {f"interp/drift/{key}": value for key, value in event["output"].items()}
    for name, part in event["monitors"].items():
        found |= {
            f"interp/{name}/drift_{key}": v for key, v in part.items() if isinstance(v, float) and key != "pressure"
        }
    own = event.get("own_text", {})
    for name, part in own.get("monitors", {}).items():
        found |= {
            f"interp/{name}/own_{key}": part[key] for key in ("policy", "text", "drift") if part.get(key) is not None
        }
    for name, part in own.get("measures", {}).items():
        if part["mean"] is not None:
            found[f"interp/measure/{name}/own_mean"] = part["mean"]
    sae = event.get("sae", {})
    found |= {f"interp/drift/sae/{key}": sae[key] for key in ("fvu", "l0") if key in sae}
    for key in ("clipped", "empty", "repetition", "reference_perplexity", "fvu"):
        if key in own and math.isfinite(own[key]):
            found[f"interp/own_text/{key}"] = own[key]
    return found


def _loaded(sae: str | Path | SparseAutoencoder | None, model: Any) -> SparseAutoencoder | None:
    if sae is None:
        return None
    if not isinstance(sae, SparseAutoencoder):
        sae = load_sae(sae, model=model)
    sae.check_model(model)
    if sae.spec.output_point is not None:
        raise ValueError(
            f"`sae` is a transcoder from `{sae.spec.hook_point}` to `{sae.spec.output_point}` – expected an autoencoder of one "
            "place. Its latents can be monitors: `probe fit --kind sae_latents`."
        )
    return sae


def _shifts(path: str | Path) -> dict[str, float]:
    """The last movement of every monitor in a run log."""
    events = [event for event in read_run_log(path) if event["event"] == "drift" and event.get("monitors")]
    if not events:
        raise ValueError(
            f"`baseline` `{path}` has no `drift` event with monitors – expected the run log of a run without the term."
        )
    return {name: values["shift"] for name, values in events[-1]["monitors"].items() if "shift" in values}


def _none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _link(source: Path, target: Path) -> None:
    """A checkpoint again under another name, by hard links: no space, and it outlives the rotation of checkpoints."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=_link_or_copy)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
