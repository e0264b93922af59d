"""The current rollout batch, read once for every reward and monitor.

In: prompt and completion ids of a batch, and the passes that a tap recorded while TRL computed log-probs on it. Out: scores
per completion. Scores are taken from a recorded pass if its tokens are, row by row, exactly those of the batch, and if no known
cause makes the pass differ from a reading. Otherwise the model is read again. Now and then a row of the taken scores is read
again as a check. It must not know how rewards are weighted.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..activations.answers import counted_length, without_first
from ..activations.batch import ConceptScores, TokenBatch
from ..activations.counted import end_of_turn_ids
from ..activations.hook_points import unwrap
from ..activations.noise import causes, runs_here
from ..activations.ranks import from_rank_zero, raise_on_all_ranks
from ..activations.read import read
from ..activations.recheck import EVERY, Recheck
from ..activations.reference_pass import reference_pass
from ..activations.tap import Tap
from .reference import has_ref_adapter
from .trl import tokenizer_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from torch import nn

    from ..activations.tap import Pass
    from ..concepts.readout import Readout

Reader = Literal["reference", "policy"]


class Rollout:
    """Reads a trainer's rollout batches.

    Args:
        trainer (`GRPOTrainer` or `RLOOTrainer`): whose batches these are.
        readouts (`dict[str, list[Readout]]`): what to read on the `reference` and on the `policy`.
        reference (`nn.Module`, *optional*): the frozen reference, if it is a separate model. With PEFT it is the policy with
            its adapters off.

    Attributes:
        own_forwards (`int`): readings that needed extra forward passes, counted per batch and model.
        taken (`int`): readings that were taken from a pass that TRL made anyway.
        causes (`dict[str, Causes]`): of the `reference` and the `policy`: known reasons why a pass differs from a reading.
    """

    def __init__(self, trainer: Any, readouts: dict[Reader, list[Readout]], reference: nn.Module | None):
        self.trainer = trainer
        self.readouts = readouts
        self.reference = reference
        self.own_forwards = 0
        self.taken = 0
        self.completion_ids: Sequence[Sequence[int]] | None = None
        self._batch: TokenBatch | None = None
        self._scores: dict[Reader, dict[str, ConceptScores]] = {}
        self._end_of_turn_ids = end_of_turn_ids(
            trainer.model, tokenizer_of(trainer), getattr(trainer, "chat_template", None)
        )
        models: dict[Reader, Any] = {
            "policy": trainer.model,
            "reference": trainer.model if reference is None else reference,
        }
        self.causes = {
            reader: from_rank_zero(lambda model=model: causes(model, trainer.args))  # type: ignore[misc]
            for reader, model in models.items()
            if readouts[reader]
        }
        self._recheck = {
            reader: Recheck(readouts[reader], reader == "reference", reader) for reader in models if readouts[reader]
        }
        self._opened = 0
        # If True, an adapter runs in the reference pass too, with its dropout.
        self._reference_is_adapter = has_ref_adapter(trainer)
        # `attach` cannot read a model that an engine holds in pieces: its canaries are read in the first rollout.
        later = not runs_here(models["reference"]) and not self._reference_is_adapter
        self._pending = [readout for readout in readouts["reference"] if later and readout.canaries is not None]
        everything = list({id(readout): readout for part in readouts.values() for readout in part}.values())
        # On the policy: all hook points, so that a hook that never fires is noticed, and the passes whose scores can be taken.
        kinds = {"policy_no_grad": bool(readouts["policy"]), "reference": reference is None}
        self.policy_tap = Tap(trainer.model, everything, [kind for kind, wanted in kinds.items() if wanted])
        self._taps: dict[Reader, Tap] = {"policy": self.policy_tap, "reference": self.policy_tap}
        if reference is not None:
            self._taps["reference"] = Tap(reference, readouts["reference"], ("reference",), is_reference=True)
        self._passes: dict[Reader, list[Pass]] = {"policy": [], "reference": []}

    def remove(self) -> None:
        """Take the hooks off both models."""
        for tap in self._taps.values():
            tap.remove()

    def start(self) -> None:
        """A new generation begins: forget the passes recorded before it."""
        for tap in self._taps.values():
            tap.clear()

    def open(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> None:
        """Set the batch for which TRL is about to call the reward functions."""
        self.completion_ids = completion_ids
        self._batch = TokenBatch.from_ids(prompt_ids, completion_ids, self._end_of_turn_ids)
        self._scores = {}
        self._opened += 1
        recorded = [recorded for tap in set(self._taps.values()) for recorded in tap.take()]
        self._passes = {
            "reference": [p for p in recorded if p.kind == "reference"],
            "policy": [p for p in recorded if p.kind == "policy_no_grad"],
        }

    def close(self) -> None:
        """Forget the batch."""
        self.completion_ids = self._batch = None
        self._scores = {}
        self._passes = {"policy": [], "reference": []}

    @property
    def attention_mask(self) -> torch.Tensor:
        """Attention mask (B, T) of the open batch: prompts and completions, right-padded."""
        assert self._batch is not None, "no batch is open"
        return self._batch.attention_mask

    def values(self, readout: Readout, reader: Reader) -> list[float | None]:
        """One score per completion of the open batch; `None` if no token counts."""
        return readout.score(self.scores(readout, reader))

    def scores(self, readout: Readout, reader: Reader) -> ConceptScores:
        """Scores per token of the open batch."""
        assert self._batch is not None, "no batch is open"
        if reader not in self._scores:
            self._scores[reader] = self._read(self._batch, reader)
        scores = self._scores[reader][readout.name]
        if readout.include_end_of_turn:
            assert self.completion_ids is not None
            counts = [counted_length(ids, self._end_of_turn_ids, True) for ids in self.completion_ids]
            starts = self._batch.attention_mask.sum(1) - torch.tensor(
                [len(ids) for ids in self.completion_ids]
            )  # (B,)
            positions = torch.arange(self._batch.input_ids.shape[1])
            mask = (positions >= starts[:, None]) & (positions < (starts + torch.tensor(counts))[:, None])
            return replace(scores, mask=without_first(mask, self._batch.attention_mask))
        return scores

    def _read(self, batch: TokenBatch, reader: Reader) -> dict[str, ConceptScores]:
        """Scores of the batch; all ranks call it together, and all raise if one of them has a score that is not finite."""
        scores = self._taken_or_read(batch, reader)
        raise_on_all_ranks(next((p for one in scores.values() if (p := one.problem()) is not None), None))
        return scores

    def _taken_or_read(self, batch: TokenBatch, reader: Reader) -> dict[str, ConceptScores]:
        readouts = self.readouts[reader]
        taken = self._take(batch, reader)
        if self._all_ranks(taken is not None):
            assert taken is not None
            self.taken += 1
            if self._opened % EVERY == 1 % EVERY:
                self.check(reader, batch, taken)
            return taken
        self.own_forwards += 1
        if reader == "reference" and self._opened % EVERY == 1 % EVERY:
            self.check(reader, batch, None)
        with self._model(reader) as model, self.trainer.accelerator.autocast():
            return read(model, batch, readouts, reader=reader)

    def _model(self, reader: Reader) -> AbstractContextManager[Any]:
        if reader == "reference":
            return reference_pass(self.trainer.model_wrapped, self.reference)
        return nullcontext(self.trainer.model_wrapped)

    def check(self, reader: Reader, batch: TokenBatch, taken: dict[str, ConceptScores] | None) -> None:
        """Read one row of a batch again, alone; by all ranks together.

        The first time it is the row with most padding; later each row in turn.

        Raises:
            `ValueError`: the row reads differently from what was taken, or the reference reads differently than before.
        """
        lengths = batch.attention_mask.sum(1)
        place = int(lengths.argmin()) if self._opened == 1 else self._opened // EVERY % len(batch)
        one = batch.part(slice(place, place + 1))
        every = one.attention_mask.clone()  # the prompt too: a completion may hold nothing that counts
        row = TokenBatch(one.input_ids[every][None], every[every][None], every[every][None])
        scores, spread = None, None
        if taken is not None:
            scores = {name: whole.scores[place][one.attention_mask[0]][1:] for name, whole in taken.items()}
            spread = {name: f.scores[batch.attention_mask].double().std(0, correction=0) for name, f in taken.items()}
        with self._model(reader) as model, self.trainer.accelerator.autocast():
            if reader == "reference":
                for readout in self._pending:
                    readout.check_canaries(model)
                self._pending = []
            self._recheck[reader](model, row, scores, spread, self.trainer.args)

    def recheck(self) -> None:
        """Check that the reference still reads as before. All ranks call it together.

        Raises:
            `ValueError`: it reads differently.
        """
        if "reference" in self._recheck:
            with self._model("reference") as model, self.trainer.accelerator.autocast():
                self._recheck["reference"].still(model)

    def _take(self, batch: TokenBatch, reader: Reader) -> dict[str, ConceptScores] | None:
        """Scores of the recorded passes, if these ran over exactly the batch's tokens at the right positions; None otherwise."""
        passes = self._passes[reader]
        if not passes or any(p.input_ids is None or p.attention_mask is None for p in passes):
            return None
        masks = [p.attention_mask.bool() for p in passes if p.attention_mask is not None]
        lengths = torch.cat([mask.sum(1) for mask in masks]).cpu()
        if not torch.equal(lengths, batch.attention_mask.sum(1)):
            return None
        tokens = torch.cat(
            [p.input_ids[mask] for p, mask in zip(passes, masks, strict=True) if p.input_ids is not None]
        )
        if not torch.equal(tokens.cpu(), batch.input_ids[batch.attention_mask]):
            return None
        model = self.reference if reader == "reference" and self.reference is not None else self.trainer.model
        known = self.causes[reader]
        noisy = known.noise or ((reader == "policy" or self._reference_is_adapter) and known.adapters)
        if noisy and unwrap(model).training:
            return None
        if known.padding and any(bool((~mask[:, 0]).any()) for mask in masks):
            return None
        if known.reach is not None and max(mask.shape[1] for mask in masks) >= known.reach:
            return None
        taken = {}
        for readout in self.readouts[reader]:
            if any(readout.name not in p.scores for p in passes):
                return None
            flat = torch.cat([p.scores[readout.name][mask] for p, mask in zip(passes, masks, strict=True)]).cpu()
            scores = torch.zeros(*batch.input_ids.shape, flat.shape[-1])
            scores[batch.attention_mask] = flat  # both run over the rows' tokens in order
            taken[readout.name] = ConceptScores(scores, batch.completion_mask, batch.input_ids, readout.name, reader)
        return taken

    def _all_ranks(self, here: bool) -> bool:
        """True if it is True on every rank: with a sharded model either all ranks run a forward or none does."""
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return here
        flags = accelerator.gather(torch.tensor([int(here)], device=accelerator.device))
        return bool(flags.all())
