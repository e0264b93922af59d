"""Sources of the reference's scores of a training batch: four classes with one interface.

In: the readouts that terms need on the reference. Out: their scores (B, T, K) of a batch. It must not know terms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from tqdm.auto import tqdm

from ...activations.counted import input_ids
from ...activations.hook_points import has_adapters
from ...activations.read import read, read_inputs
from ...activations.reference_pass import reference_pass
from ...activations.tap import Tap
from ..trl import precompute_engine
from .readouts import Keyed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch import nn

    from ...activations.batch import TokenBatch
    from ...activations.noise import Causes
    from ...activations.recheck import Recheck
    from ...activations.tap import Pass, TokenReadout
    from ...concepts.readout import Readout

# Prefix of the reference's scores in a rollout batch.
REFERENCE_KEY = "interp_reference/"
# Keys of a batch that the backbone does not take.
NOT_FOR_THE_MODEL = {"labels", "completion_mask", "label", "ref_chosen_logps", "ref_rejected_logps", "ref_logps"}


class ReferenceScores(ABC):
    """The reference's scores of the batches of one trainer.

    Args:
        trainer (`Trainer`): a built trainer of TRL.
        reference (`nn.Module`, *optional*): the frozen reference, if it is a separate model; with PEFT it is the policy with its
            adapters off.

    Attributes:
        keys (`dict[TokenReadout, str]`): the readouts, each with a unique name.
        keyed (`list[Keyed]`): the same readouts under these names.
        own_forwards (`int`): number of our own forwards.
    """

    # True if the trainer itself runs the reference on tokens that a tap can see.
    trainer_runs_it: ClassVar[bool] = False

    def __init__(self, trainer: Any, reference: nn.Module | None):
        self.trainer, self.reference = trainer, reference
        self.keys: dict[TokenReadout, str] = {}
        self.keyed: list[Keyed] = []
        self.own_forwards = 0

    def choose(self, readouts: Sequence[TokenReadout]) -> None:
        """Set the readouts."""
        self.keys = {readout: f"{i}:{readout.name}" for i, readout in enumerate(dict.fromkeys(readouts))}
        self.keyed = [Keyed(key, readout) for readout, key in self.keys.items()]

    def watched(self, monitors: Sequence[Readout]) -> list[Readout]:
        """Monitors that can also be read on the reference without an extra pass."""
        return []

    def on_policy_tap(self) -> list[Keyed]:
        """Readouts for a tap on the policy's model, if the reference is that model with its adapters off."""
        return self.keyed if self.trainer_runs_it and self.reference is None else []

    def tap(self) -> Tap | None:
        """A tap on the reference, if it is a separate model that the trainer runs."""
        if self.trainer_runs_it and self.reference is not None and self.keyed:
            return Tap(self.reference, self.keyed, is_reference=True)
        return None

    def precompute(self, causes: Causes) -> None:  # noqa: B027, one class has something to do
        """Called once by `attach`, before training."""

    def before_pass(self, inputs: Mapping[str, Any], needed: bool) -> None:  # noqa: B027, one class has something to do
        """Called before the trainer computes its loss on a batch.

        Args:
            inputs (`dict`): the batch.
            needed (`bool`): True if a term with a weight above 0 needs the scores.
        """

    @abstractmethod
    def of(self, inputs: Mapping[str, Any], passes: Sequence[Pass]) -> Mapping[str, torch.Tensor]:
        """Scores of a batch by key.

        Args:
            inputs (`dict`): the batch.
            passes (`Sequence[Pass]`): the passes that the taps recorded while the trainer computed its loss on the batch.
        """

    def forget(self) -> None:  # noqa: B027, two classes have something to do
        """Forget the batch."""

    def log_probs(self, inputs: Mapping[str, Any], take: Callable[[], list[Pass]]) -> torch.Tensor:
        """The reference's log-probs (2P,) of a batch of pairs, before the trainer computes its loss on it.

        Args:
            inputs (`dict`): the batch.
            take (`Callable`): returns the passes that the taps have recorded.
        """
        raise AssertionError(f"{type(self).__name__} has no pairs")

    def by_readout(self, scores: Mapping[str, torch.Tensor]) -> dict[TokenReadout, torch.Tensor]:
        """The same scores, by readout."""
        return {readout: scores[key] for readout, key in self.keys.items() if key in scores}

    def model(self) -> AbstractContextManager[nn.Module]:
        """The reference, ready to run."""
        return reference_pass(self.trainer.model_wrapped, self.reference)

    def row_again(self, row: TokenBatch, recheck: Recheck, before: Callable[[Any], None]) -> dict[str, Any] | None:
        """One row of a batch, read on the reference before the trainer's pass; None if the trainer's pass reads nothing.

        Args:
            row (`TokenBatch`): the row.
            recheck (`Recheck`): also reads the first row of the run again.
            before (`Callable`): called with the reference first.
        """
        return None

    def still(self, recheck: Recheck) -> None:
        """Check that the reference still gives its first scores. All ranks call it together.

        Raises:
            `ValueError`: the scores have changed.
        """
        if self.keyed:
            with self.model() as model, self.trainer.accelerator.autocast():
                recheck.still(model)


class RolloutScores(ReferenceScores):
    """Scores from the reference pass that the trainer makes on rollouts. They travel with the batch."""

    trainer_runs_it = True

    def of(self, inputs: Mapping[str, Any], passes: Sequence[Pass]) -> Mapping[str, torch.Tensor]:
        return {key: inputs[REFERENCE_KEY + key] for key in self.keys.values() if REFERENCE_KEY + key in inputs}

    def of_rollout(self, output: Mapping[str, Any], passes: Sequence[Pass]) -> dict[str, torch.Tensor]:
        """Scores of a whole rollout batch, from the passes that the trainer made on it.

        Raises:
            `RuntimeError`: these passes do not hold the tokens of the batch.
        """
        passes = [one for one in passes if one.kind == "reference"]
        ids = input_ids(output)
        if not passes or not torch.equal(torch.cat([ids_of(one) for one in passes]), ids):
            raise RuntimeError(
                "The reference's passes over this rollout batch were not found – expected TRL to compute the reference's "
                f"log-probs on its {len(ids)} completions, as it does with `beta` above 0. Found {len(passes)} passes."
            )
        return {key: torch.cat([one.scores[key] for one in passes]) for key in self.keys.values()}

    def travelling(self, scores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The scores under their keys in a rollout batch."""
        return {REFERENCE_KEY + key: values for key, values in scores.items()}


class LossPassScores(ReferenceScores):
    """Scores from the reference pass that the trainer makes in its loss."""

    trainer_runs_it = True

    def __init__(self, trainer: Any, reference: nn.Module | None):
        super().__init__(trainer, reference)
        # If the log-probs are computed before the loss, the trainer makes no second reference pass.
        self._early: dict[str, torch.Tensor] = {}

    def watched(self, monitors: Sequence[Readout]) -> list[Readout]:
        return list(monitors)

    def of(self, inputs: Mapping[str, Any], passes: Sequence[Pass]) -> Mapping[str, torch.Tensor]:
        ids = input_ids(inputs)
        for one in passes:
            if (
                one.kind == "reference"
                and one.input_ids is not None
                and torch.equal(one.input_ids.to(ids.device), ids)
            ):
                return one.scores
        return self._early

    def forget(self) -> None:
        self._early = {}

    def log_probs(self, inputs: Mapping[str, Any], take: Callable[[], list[Pass]]) -> torch.Tensor:
        trainer = self.trainer
        log_probs = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, inputs))
        ids = input_ids(inputs)
        for one in take():
            if one.kind == "reference" and torch.equal(ids_of(one), ids):
                self._early = one.scores
        return log_probs

    def row_again(self, row: TokenBatch, recheck: Recheck, before: Callable[[Any], None]) -> dict[str, Any] | None:
        if not self.keyed:
            return None
        with self.model() as model:
            before(model)
            scores = read(model, row, self.keyed, reader="reference")
            recheck(model, row)
        return {name: one.scores[one.mask] for name, one in scores.items()}


class PrecomputedScores(ReferenceScores):
    """Scores that are computed once at `attach`, for every row of the data sets (`precompute_ref_log_probs=True`)."""

    def __init__(self, trainer: Any, reference: nn.Module | None):
        super().__init__(trainer, reference)
        # Token ids of a row: its scores (T, K) by key.
        self.rows: dict[bytes, dict[str, torch.Tensor]] | None = None

    def precompute(self, causes: Causes) -> None:
        if not self.keyed:
            return
        trainer = self.trainer
        if self.reference is None and not has_adapters(trainer.model) and trainer.state.global_step > 0:
            raise ValueError(
                f"`precompute_ref_log_probs` is True and the trainer has made {trainer.state.global_step} steps – expected a "
                "fresh one: there is no reference model any more, and the trained policy would be taken for it. Attach before "
                "training, or pass `reference=`."
            )
        held_out = (
            trainer.eval_dataset if isinstance(trainer.eval_dataset, Mapping) else {"eval": trainer.eval_dataset}
        )
        self.rows = {}
        with self.model() as model, trainer.accelerator.autocast():
            for name, dataset in {"train": trainer.train_dataset, **held_out}.items():
                if dataset is not None:
                    self._read_all(model, name, dataset, causes)

    def _read_all(self, model: nn.Module, name: str, dataset: Any, causes: Causes) -> None:
        assert self.rows is not None
        trainer, size = self.trainer, self.trainer.args.per_device_train_batch_size
        for start in tqdm(range(0, len(dataset), size), desc=f"Reference scores ({name})", leave=False):
            batch = trainer.data_collator([dataset[i] for i in range(start, min(start + size, len(dataset)))])
            ids = batch["input_ids"].to(trainer.accelerator.device)
            mask = batch["attention_mask"].to(ids.device).bool()
            if causes.reach is not None and ids.shape[1] >= causes.reach:
                raise ValueError(
                    f"`precompute_ref_log_probs` is True and a row of `{name}` has {ids.shape[1]} tokens – expected fewer than "
                    f"{causes.reach}: from there on, rotary positions depend on the longest row of a batch, and the reference is "
                    "read in other batches than the policy. Set `precompute_ref_log_probs=False`, or a smaller `max_length`."
                )
            scores = read_inputs(model, {"input_ids": ids, "attention_mask": mask.long()}, self.keyed)
            for row in range(len(ids)):
                of_row = {key: values[row][mask[row]].cpu() for key, values in scores.items()}
                self.rows[_row_key(ids[row][mask[row]])] = of_row

    def of(self, inputs: Mapping[str, Any], passes: Sequence[Pass]) -> Mapping[str, torch.Tensor]:
        if not self.keyed:
            return {}
        assert self.rows is not None, "`precompute` comes at `attach`"
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        scores: dict[str, torch.Tensor] = {}
        for row in range(len(ids)):
            key = _row_key(ids[row][mask[row]])
            if key not in self.rows:
                raise RuntimeError(
                    "A row of this batch has no reference scores – expected every row to be among those of `train_dataset` and "
                    "`eval_dataset` at `attach`. Attach after the data is final, or set `precompute_ref_log_probs=False`."
                )
            for name, values in self.rows[key].items():
                if name not in scores:
                    scores[name] = torch.zeros(*ids.shape, values.shape[-1], device=ids.device)
                scores[name][row][mask[row]] = values.to(ids.device)
        return scores

    def log_probs(self, inputs: Mapping[str, Any], take: Callable[[], list[Pass]]) -> torch.Tensor:
        return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])

    def model(self) -> AbstractContextManager[nn.Module]:
        policy = self._policy()
        if self.reference is None and not has_adapters(self.trainer.model):
            return nullcontext(policy)  # before training the policy is its own reference
        return reference_pass(policy, self.reference)

    def _policy(self) -> nn.Module:
        """The policy, ready to run. Before training, DeepSpeed has an engine only for TRL's own precomputation."""
        trainer = self.trainer
        if self.reference is not None or not trainer.is_deepspeed_enabled:
            return trainer.model_wrapped
        return precompute_engine(trainer)

    def still(self, recheck: Recheck) -> None:
        """Does nothing: the reference does not run again."""


class OwnPassScores(ReferenceScores):
    """Scores from our own pass, for a trainer that has no reference (SFT)."""

    def __init__(self, trainer: Any, reference: nn.Module | None):
        super().__init__(trainer, reference)
        self._scores: dict[str, torch.Tensor] = {}

    def before_pass(self, inputs: Mapping[str, Any], needed: bool) -> None:
        if not needed:
            return
        self.own_forwards += 1
        for_the_model = {key: value for key, value in inputs.items() if key not in NOT_FOR_THE_MODEL}
        with self.model() as model, self.trainer.accelerator.autocast():
            self._scores = read_inputs(model, for_the_model, self.keyed)

    def of(self, inputs: Mapping[str, Any], passes: Sequence[Pass]) -> Mapping[str, torch.Tensor]:
        return self._scores

    def forget(self) -> None:
        self._scores = {}


# Classes by the result of `reference.reference_source`.
SCORES: dict[str, type[ReferenceScores]] = {
    "rollout": RolloutScores,
    "pass": LossPassScores,
    "precomputed": PrecomputedScores,
    "own": OwnPassScores,
}


def ids_of(one: Pass) -> torch.Tensor:
    """Token ids of a pass.

    Raises:
        `RuntimeError`: the input of the pass was embeddings.
    """
    if one.input_ids is None:
        raise RuntimeError(
            "A pass was fed embeddings – expected token ids: without them no score can be matched to its token."
        )
    return one.input_ids


def _row_key(ids: torch.Tensor) -> bytes:
    return bytes(ids.cpu().to(torch.int64).numpy().tobytes())
