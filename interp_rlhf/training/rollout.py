"""The current rollout batch, read once for every reward and monitor.

In: prompt and completion ids of a batch, and the passes that a tap recorded while TRL computed log-probs on it. Out: scores
per completion. Scores are taken from a recorded pass only where its tokens are, row by row, exactly those of the batch;
otherwise the model is read anew. It must not know how rewards are weighted.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from ..activations import (
    ConceptScores,
    Pass,
    Tap,
    TokenBatch,
    end_of_turn_ids,
    raise_on_all_ranks,
    read,
    reference_pass,
    unwrap,
)
from ..concepts.readout import Readout

Reader = Literal["reference", "policy"]


class Rollout:
    """Reads a trainer's rollout batches.

    Args:
        trainer (`GRPOTrainer` or `RLOOTrainer`): whose batches these are.
        readouts (`dict[str, list[Readout]]`): what to read on the `reference` and on the `policy`.
        reference (`nn.Module`, *optional*): the frozen reference where it is a model of its own; with PEFT it is the
            policy with its adapters off.

    Attributes:
        own_forwards (`int`): readings that needed forward passes of our own, counted per batch and model.
        taken (`int`): readings that were taken from a pass that TRL made anyway.
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
        processing = trainer.processing_class
        self._end_of_turn_ids = end_of_turn_ids(trainer.model, getattr(processing, "tokenizer", processing))
        # Then an adapter runs in the reference pass too, with its dropout.
        self._reference_is_adapter = "ref" in getattr(
            trainer.accelerator.unwrap_model(trainer.model), "peft_config", {}
        )
        everything = list({id(readout): readout for part in readouts.values() for readout in part}.values())
        # On the policy: all hook points, so that one which never fires is noticed, and the passes that can be taken.
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
        """A new generation begins: nothing recorded before belongs to it."""
        for tap in self._taps.values():
            tap.clear()

    def open(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> None:
        """The batch that rewards are about to be asked for."""
        self.completion_ids = completion_ids
        self._batch = TokenBatch.from_ids(prompt_ids, completion_ids, self._end_of_turn_ids)
        self._scores = {}
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
        """Of the open batch, (B, T): prompts and completions, right-padded."""
        assert self._batch is not None, "no batch is open"
        return self._batch.attention_mask

    def values(self, readout: Readout, reader: Reader) -> list[float | None]:
        """One score per completion of the open batch; `None` where no token counts."""
        return readout.score(self.scores(readout, reader))

    def scores(self, readout: Readout, reader: Reader) -> ConceptScores:
        """Scores per token of the open batch."""
        assert self._batch is not None, "no batch is open"
        if reader not in self._scores:
            self._scores[reader] = self._read(self._batch, reader)
        scores = self._scores[reader][readout.name]
        if readout.include_end_of_turn:
            assert self.completion_ids is not None
            lengths = torch.tensor([len(ids) for ids in self.completion_ids])
            ends = self._batch.attention_mask.sum(1)  # (B,)
            positions = torch.arange(self._batch.input_ids.shape[1])
            mask = (positions < ends[:, None]) & (positions >= (ends - lengths)[:, None])
            return replace(scores, mask=mask)
        return scores

    def _read(self, batch: TokenBatch, reader: Reader) -> dict[str, ConceptScores]:
        """By all ranks together, and a score that is no number on one of them ends all."""
        found = self._taken_or_read(batch, reader)
        raise_on_all_ranks(next((p for scores in found.values() if (p := scores.problem()) is not None), None))
        return found

    def _taken_or_read(self, batch: TokenBatch, reader: Reader) -> dict[str, ConceptScores]:
        readouts = self.readouts[reader]
        found = self._take(batch, reader)
        if self._all_ranks(found is not None):
            assert found is not None
            self.taken += 1
            return found
        self.own_forwards += 1
        context: AbstractContextManager[Any] = (
            reference_pass(self.trainer.model_wrapped, self.reference)
            if reader == "reference"
            else nullcontext(self.trainer.model_wrapped)
        )
        with context as model, self.trainer.accelerator.autocast():
            return read(model, batch, readouts, reader=reader)

    def _take(self, batch: TokenBatch, reader: Reader) -> dict[str, ConceptScores] | None:
        """Scores of the recorded passes, if they ran over exactly the tokens of the batch at the right positions."""
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
        shifted = any(bool((~mask[:, 0]).any()) for mask in masks)
        if (shifted and not _is_rotary(model)) or _drops_out(
            model, adapters=reader == "policy" or self._reference_is_adapter
        ):
            return None
        found = {}
        for readout in self.readouts[reader]:
            if any(readout.name not in p.scores for p in passes):
                return None
            flat = torch.cat([p.scores[readout.name][mask] for p, mask in zip(passes, masks, strict=True)]).cpu()
            scores = torch.zeros(*batch.input_ids.shape, flat.shape[-1])
            scores[batch.attention_mask] = flat  # both run over the rows' tokens in order
            found[readout.name] = ConceptScores(scores, batch.completion_mask, batch.input_ids, readout.name, reader)
        return found

    def _all_ranks(self, here: bool) -> bool:
        """Whether it is so on every rank: under a sharded model either all ranks run a forward or none does."""
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return here
        flags = accelerator.gather(torch.tensor([int(here)], device=accelerator.device))
        return bool(flags.all())


def _is_rotary(model: Any) -> bool:
    """TRL passes no position ids, so left padding shifts learned positions; rotary ones only see differences."""
    return getattr(unwrap(model).config.get_text_config(), "rope_parameters", None) is not None


def _drops_out(model: Any, adapters: bool) -> bool:
    """Whether a pass in the present mode draws dropout; the adapters' own counts only where they are on."""
    base = unwrap(model)
    if not base.training:
        return False
    # Attention dropout is a number in the config; those of heads that a causal LM does not have mean nothing.
    rates = {key: rate for key, rate in vars(base.config.get_text_config()).items() if "drop" in key}
    if any(
        isinstance(rate, float) and rate > 0
        for key, rate in rates.items()
        if not key.startswith(("summary", "classifier"))
    ):
        return True
    return any(
        isinstance(module, nn.Dropout) and module.p > 0 and (adapters or "lora_" not in name)
        for name, module in base.named_modules()
    )
