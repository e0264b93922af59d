"""The drift callback: when a run is evaluated, whether training goes on, and which checkpoint was the last good one.

In: a built trainer, of TRL or of transformers. Out: metrics through the trainer's log, and `drift`, `samples` and `verdict`
events in the run log. It reads the policy between two steps and leaves it as it was: training flags, random state, and TRL's
own metrics.

With several processes, all of them read together. Rank 0 alone compares, judges and writes; the others take over what it decides:
when to evaluate again, to save, to stop.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback

from ..activations.ranks import from_rank_zero
from ..concepts.causal_table import causal_table
from ..runlog.events import DriftEvent, SamplesEvent, TableEvent, VerdictEvent
from ..runlog.log import read_events
from ..runlog.recorder import record
from ..sae.files import load_sae
from ..validation.causal import causal_check_again
from ..validation.causal_settings import CausalSettings
from .config import DriftConfig
from .evaluation import evaluation_of, metrics_in_words
from .last_good import LAST_GOOD, link_folder, link_or_copy, step_of_last_good
from .logged import trainer_metrics
from .own_text import per_prompt, sample_entries
from .shifts import shifts_of_run
from .start import START_FILE, start_file
from .verdicts import evidence_of, judge

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from ..sae.autoencoder import SparseAutoencoder
    from .battery import Battery
    from .evaluation import RawReading
    from .start import Observation
    from .verdicts import Verdict

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Decision:
    """What rank 0 decides after an evaluation, for all ranks."""

    logged: dict[str, float]
    next: int
    good: int | None
    verdict: Verdict


class DriftCallback(TrainerCallback):
    """Measures how far the policy has moved from where it started, inside and in its text, and judges it.

    Logged under `interp/drift/<hook point>/` are `cosine`, `relative_norm`, `cka`, `procrustes`, `shift_rank`, `first_tokens`,
    `norm_outliers` and the metrics that you register (see `drift.metrics`). Under `interp/drift/` are `kl`, `perplexity`,
    `sae/fvu`, `sae/l0`, `alarm` (1 if the verdict is an alarm) and `overhead_seconds`; under `interp/<monitor>/`, `drift_…`.
    The verdict is in the run log and in the report.

    Args:
        trainer (`transformers.Trainer`): already built.
        texts (`Sequence`, *optional*): as in `DriftConfig`.
        monitors (`Sequence`): cards or readouts, read frozen on the policy.
        pressure (`dict[str, int]`, *optional*): monitors that training pushes, +1 up or −1 down. `attach` sets it.
        holdouts (`dict[str, int]`, *optional*): monitors of what a reward pays for, fitted separately, and the direction, +1 or
            −1, in which they follow an honest reward. `attach` sets it.
        reference (`nn.Module`, *optional*): the frozen reference for the policy's own text. By default that of the trainer, with
            PEFT the base model.
        run_log (`str` or `Path`, *optional*): `interp.jsonl` in the trainer's output folder by default.
        config (`DriftConfig`, *optional*), **settings: the fields of `DriftConfig`, as one object or by name.

    Attributes:
        rechecks (`list[Callable]`): called before each evaluation; `attach` sets it. They check that the reference still reads
            as it did.
        batches (`Callable`, *optional*): the training batches that moved each monitor most since the last call, as
            `runlog.events.BatchEntry` in JSON form; `attach` sets it.

    Raises:
        `ValueError`: monitors, hook points, texts or prompts that do not fit the model.

    Example:
        >>> from interp_rlhf import DriftCallback
        >>> callback = DriftCallback(sft_trainer, texts=["The ferry leaves at six."] * 4, every=10)
        >>> sft_trainer.add_callback(callback)
        >>> callback.config.every
        10
        >>> callback.battery.hook_points
        ['model.layers.0', 'model.layers.1', 'model.layers.2']
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
        sae = _autoencoder(self.config.sae, trainer.model)
        self.evaluation = evaluation_of(trainer, self.config, monitors, pressure, holdouts, reference, sae)
        self._baseline = shifts_of_run(self.config.baseline, "`baseline`") if self.config.baseline is not None else {}
        self._log = record(trainer, run_log)
        self.rechecks: list[Callable[[], None]] = []
        self.batches: Callable[[], dict[str, Any]] | None = None
        # On rank 0 only; None on all others, which never compare.
        self._start: Observation | None = None
        self._first: DriftEvent | None = None
        self._scores_before: Mapping[str, list[float | None]] | None = None
        self._spent = 0.0
        # Of each rank's own clock. Only that of rank 0 decides.
        self._clock = 0.0
        # The same on all ranks.
        self._last_step = -1
        self._next = 0
        self._good: int | None = None
        self._began = 0

    @property
    def battery(self) -> Battery:
        """The fixed texts."""
        return self.evaluation.battery

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = self._first = self._scores_before = self._good = None
        self._clock, self._spent, self._began = time.monotonic(), 0.0, state.global_step
        if state.global_step > 0:
            known = from_rank_zero(lambda: self._resume(state.global_step))
            if known is not None:
                self._last_step, self._next, self._good = known
                return
        self.evaluate(state.global_step, control, "before")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The last step is evaluated here and not in `on_train_end`, when trackers are already closed.
        if state.global_step >= self._next or control.should_training_stop:
            self.evaluate(state.global_step, control, "after" if control.should_training_stop else "train")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = _kept_step(args, state)
        if kept is not None:  # the weights of the best checkpoint were loaded: they are the result, so they are read
            if kept != self._last_step:
                self.evaluate(kept, control, "kept", publish=False)
        elif state.global_step != self._last_step:  # training stopped without a last `on_step_end`
            self.evaluate(state.global_step, control, "after", publish=False)
        if self.config.causal_prompts is not None:
            step = state.global_step if kept is None else kept
            for table in from_rank_zero(self._causal_tables):
                self._log.append(table, step)

    def _causal_tables(self) -> list[TableEvent]:
        """The causal check of every monitor on the trained policy. Rank 0 makes it; the others wait."""
        trainer: Any = self.trainer
        findings = causal_check_again(
            self.evaluation.monitors, trainer.accelerator.unwrap_model(trainer.model), self.evaluation.tokenizer,
            {
                "prompts": self.config.causal_prompts, "measure": self.config.causal_measure,
                "chat": self.evaluation.chat,
                "settings": CausalSettings(seed=self.config.seed),
            },
        )  # fmt: skip
        return [TableEvent(**causal_table(name, one, "after training")) for name, one in findings.items()]

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the start into the checkpoint, which may be moved away from the run, and keep the checkpoint if it is good."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        source = start_file(self._log.path)
        good = self._stops and self._good == state.global_step
        if good:  # every rank writes its part of a checkpoint
            self.trainer.accelerator.wait_for_everyone()
        if not self._log.writable or not checkpoint.is_dir():
            return
        if source.exists():
            (checkpoint / START_FILE).unlink(missing_ok=True)
            link_or_copy(str(source), str(checkpoint / START_FILE))
        if good:
            link_folder(checkpoint, Path(args.output_dir) / LAST_GOOD)

    def evaluate(self, step: int, control: Any, when: str, publish: bool = True) -> None:
        """Evaluate the policy now. All ranks must call it together.

        Args:
            step (`int`): optimizer step to which the result belongs.
            control (`TrainerControl`): told to save or to stop, where `on_verdict` is `stop`.
            when (`str`): `before`, `train`, `kept` or `after`, for the samples in the log.
            publish (`bool`, defaults to `True`): whether trackers get the metrics. The run log always does.
        """
        started = time.monotonic()
        model: Any = self.trainer.model_wrapped
        for recheck in self.rechecks:
            recheck()
        snapshot = self.battery.read(model)
        if from_rank_zero(lambda: self._start is None or snapshot.finite):
            raw = self.evaluation.read(model, snapshot)
            decision = from_rank_zero(lambda: self._compared(step, control, started, when, raw))
        else:
            decision = from_rank_zero(lambda: self._written(step, control, started, self.evaluation.broken(), {}))
        self._last_step, self._next, self._good = step, decision.next, decision.good
        if publish:
            self._publish(decision.logged)
        self._act(decision.verdict, step, control)

    def _compared(self, step: int, control: Any, started: float, when: str, raw: RawReading) -> _Decision:
        """Compare with the start, judge, and write both down. On rank 0."""
        now = self.evaluation.observe(raw, self._start)
        if self._start is None:
            self._start = now
            if self._log.writable:
                self.evaluation.save(now, start_file(self._log.path))
        event = self.evaluation.compare(self._start, now, self._scores_before)
        if now.sampled is not None:
            self._scores_before = per_prompt(now.sampled)
        batches = self.batches() if self.batches is not None else {}
        about = metrics_in_words() if self._first is None else {}
        event = dataclasses.replace(event, batches=batches or None, about=about)
        decision = self._written(step, control, started, event, trainer_metrics(event))
        if now.sampled is not None and self.evaluation.own_text is not None:
            rows = sample_entries(self.evaluation.own_text.prompts, now.sampled)
            self._log.append(SamplesEvent(when=when, rows=rows), step)
        return decision

    def _written(
        self, step: int, control: Any, started: float, event: DriftEvent, logged: dict[str, float]
    ) -> _Decision:
        if event.finite:
            self._first = self._first or event
            history, since = self.trainer.state.log_history, max(self._last_step, 0)
            verdict = judge(evidence_of(event, self._first, history, since, self._baseline))
        else:
            verdict = judge(evidence_of(event))
        seconds = time.monotonic() - started
        self._spent += seconds
        self._log.append(dataclasses.replace(event, overhead_seconds=round(seconds, 4)), step)
        self._log.append(
            VerdictEvent(verdict=verdict.name, because=verdict.because, next=verdict.next, alarm=verdict.alarm), step
        )
        good = self._good
        if self._stops and step > 0 and not verdict.alarm and not control.should_training_stop:
            good = step
        logged |= {"interp/drift/alarm": float(verdict.alarm), "interp/drift/overhead_seconds": round(seconds, 4)}
        return _Decision(logged, self._scheduled(step, seconds), good, verdict)

    def _scheduled(self, step: int, seconds: float = 0.0) -> int:
        """Step of the next evaluation, after one that took some seconds."""
        every = self.config.every
        regular = (step // every + 1) * every
        trained = time.monotonic() - self._clock - self._spent
        steps = step - self._began
        if self.config.max_overhead is None or steps <= 0 or not seconds or trained <= 0:
            return regular
        # As many steps as one more evaluation needs to stay within the budget.
        needed = (self._spent + seconds) / self.config.max_overhead / (trained / steps) - steps
        return max(regular, step + math.ceil(needed / every) * every)

    @property
    def _stops(self) -> bool:
        return self.config.on_verdict == "stop"

    def _act(self, verdict: Verdict, step: int, control: Any) -> None:
        if verdict.alarm:
            logger.warning("Step %d: %s. %s. Next: %s", step, verdict.name, "; ".join(verdict.because), verdict.next)
        if not self._stops or step == 0:
            return
        if not verdict.alarm:
            control.should_save = control.should_save or self._good == step
            return
        if not control.should_training_stop:  # at the last step the trainer saves as it planned to
            control.should_save = False
        control.should_training_stop = True
        folder = Path(str(self.trainer.args.output_dir)) / LAST_GOOD
        good = f"`{folder}`, of step {self._good}" if self._good else "none yet"
        logger.warning("Training stops here. Checkpoint of the last evaluation without an alarm: %s.", good)

    def _publish(self, logged: dict[str, float]) -> None:
        """Log through transformers' own `Trainer`, so that `log_history` and every tracker get the numbers at this step.

        TRL's `log` would also log and empty the metrics that TRL is still averaging. Logging clears `should_log`, which others
        may have set, so its value is restored.
        """
        wanted = self.trainer.control.should_log
        Trainer.log(self.trainer, logged)
        self.trainer.control.should_log = wanted

    def _resume(self, step: int) -> tuple[int, int, int | None] | None:
        """Load the start of a resumed run: steps of the last and next evaluation, and the last without an alarm. On rank 0."""
        checkpoint = Path(str(self.trainer.args.output_dir)) / f"checkpoint-{step}"
        for path in (checkpoint / START_FILE, start_file(self._log.path)):
            self._start = self._start or self.evaluation.load(path)
        if self._start is None:
            logger.warning(
                "Resumed at step %d without `%s` of the same texts, hook points and monitors in `%s` or `%s`: drift is now "
                "measured from here.",
                step, START_FILE, checkpoint, self._log.path.parent,
            )  # fmt: skip
            return None
        # The run was evaluated before it was saved, so nothing is missing at this step.
        last = step
        if self._log.path.exists():
            events = [e for e in read_events(self._log.path) if isinstance(e, DriftEvent) and (e.step or 0) <= step]
            if events:
                self._first, last = events[0], int(events[-1].step or 0)
                self._scores_before = events[-1].own_text.scores if events[-1].own_text is not None else None
        good = step_of_last_good(Path(str(self.trainer.args.output_dir)))
        return last, self._scheduled(step), good if good is not None and good <= step else None


def _kept_step(args: Any, state: Any) -> int | None:
    """Step of the checkpoint that `load_best_model_at_end` loaded; None if the last weights stay."""
    best = getattr(state, "best_model_checkpoint", None)
    if not getattr(args, "load_best_model_at_end", False) or not best:
        return None
    step = str(best).rpartition("-")[2]
    return int(step) if step.isdigit() else getattr(state, "best_global_step", None)


def _autoencoder(sae: str | Path | SparseAutoencoder | None, model: Any) -> SparseAutoencoder | None:
    if sae is None:
        return None
    loaded = load_sae(sae, model=model) if isinstance(sae, str | Path) else sae
    loaded.check_model(model)
    if loaded.spec.output_point is not None:
        raise ValueError(
            f"`sae` is a transcoder from `{loaded.spec.hook_point}` to `{loaded.spec.output_point}` – expected an autoencoder of "
            "one place. Its latents can be monitors: `probe fit --kind sae_latents`."
        )
    return loaded
