"""The policy's own text: its answers to fixed prompts, read on itself and on the frozen reference.

In: prompts, readouts, measures, a built trainer. Out: a `Sampled` per evaluation. Two of them tell a change of the text from a
drift of the representation. It must not know log files or verdicts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..activations.answers import counted_length
from ..activations.batch import TokenBatch, tokenize_prompt
from ..activations.collect import read_predictions
from ..activations.generating import completions_of, pad_token, repetition
from ..activations.hook_points import has_adapters
from ..activations.ranks import from_rank_zero
from ..activations.reference_pass import reference_pass
from ..activations.sharding import is_sharded, readable
from ..runlog.events import MovedEntry, OwnMeasureEntry, OwnMonitorEntry, OwnTextEntry, SampleEntry, TokensEntry
from ..validation.measures import values_of
from ..validation.statistics import MIN_PROMPTS, mean_interval
from .latent_drift import unexplained
from .metrics import perplexity
from .observed import Sampled
from .scores import scores_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..concepts.readout import Readout
    from ..sae.autoencoder import SparseAutoencoder

SHOWN = 5  # samples, and prompts that moved a monitor most, per evaluation


class OwnText:
    """Samples the policy on fixed prompts, with the same random numbers each time.

    Args:
        trainer (`transformers.Trainer`): built.
        prompts (`Sequence`): plain or conversational. A verdict needs at least 8.
        readouts (`Sequence[Readout]`): read on every completion.
        measures (`dict[str, Callable]`): independent measures; each maps a text to a float.
        reference (`nn.Module`, *optional*): the frozen reference. With PEFT it is the policy without adapters.
        end_of_turn_ids (`set[int]`): tokens that end a completion.
        max_new_tokens (`int`, defaults to 32), temperature (`float`, defaults to 0.7), seed (`int`, defaults to 0).
        chat (`dict`): `chat_template` and `chat_template_kwargs` as the trainer has them.
        sae (`SparseAutoencoder`, *optional*): measured by its FVU on the completions' tokens.

    Raises:
        `ValueError`: no prompt, or one without text.
    """

    def __init__(
        self,
        trainer: Any,
        prompts: Sequence[Any],
        readouts: Sequence[Readout],
        measures: Mapping[str, Callable[[str], float]],
        reference: Any,
        end_of_turn_ids: set[int],
        max_new_tokens: int = 32,
        temperature: float = 0.7,
        seed: int = 0,
        chat: Mapping[str, Any] | None = None,
        sae: SparseAutoencoder | None = None,
    ):
        processing: Any = trainer.processing_class
        self.trainer, self.readouts, self.measures, self.reference = trainer, list(readouts), dict(measures), reference
        self.tokenizer = getattr(processing, "tokenizer", processing)
        self.prompts = list(prompts)
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self._ends, self.sae = end_of_turn_ids, sae
        self._prompt_ids = [tokenize_prompt(prompt, self.tokenizer, **dict(chat or {})) for prompt in self.prompts]
        empty = [i for i, ids in enumerate(self._prompt_ids) if not ids]
        if empty or not self.prompts:
            raise ValueError(
                f"`prompts` has {len(self.prompts)} prompts, empty: {empty} – expected some text in each. Remove the empty ones."
            )

    def sample(self) -> Sampled:
        """Completions of the policy as it is now, and their readings.

        All ranks must call it together. They all read the completions of rank 0.
        """
        generated = self._generate()
        completions = from_rank_zero(lambda: generated)
        batch = TokenBatch.from_ids(self._prompt_ids, completions, self._ends)
        model = self.trainer.model_wrapped
        policy, token_scores, _, fvu = self._read(model, batch, self.sae)
        text: dict[str, np.ndarray] = {}
        surprise = math.nan
        if self.has_reference:
            with reference_pass(model, self.reference) as frozen:
                text, _, log_probs, _ = self._read(frozen, batch)
            surprise = perplexity(log_probs) if len(log_probs) else math.nan
        counted = [ids[: counted_length(ids, self._ends)] for ids in completions]
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
        measured = from_rank_zero(
            lambda: {name: np.array(values_of(name, measure, texts)) for name, measure in self.measures.items()}
        )
        return Sampled(
            texts,
            [[self.tokenizer.decode([token]) for token in ids] for ids in counted],
            policy,
            text,
            token_scores,
            measured,
            clipped=float(np.mean([len(ids) == self.max_new_tokens for ids in counted])),
            empty=float(np.mean([not t.strip() for t in texts])),
            repetition=float(np.mean([repetition(ids) for ids in counted])),
            reference_perplexity=surprise,
            fvu=fvu,
        )  # fmt: skip

    @property
    def has_reference(self) -> bool:
        """True if the frozen reference can be read."""
        return self.reference is not None or has_adapters(self.trainer.model)

    def _read(
        self, model: Any, batch: TokenBatch, sae: SparseAutoencoder | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, list[list[float]]], torch.Tensor, float]:
        if not batch.completion_mask.any():
            empty = np.full(len(batch), np.nan)
            return (
                {r.name: empty for r in self.readouts},
                {r.name: [[]] * len(batch) for r in self.readouts},
                torch.empty(0),
                math.nan,
            )
        points = [readout.hook_point for readout in self.readouts]
        points += [sae.spec.hook_point] if sae is not None else []
        activations, log_probs, _ = read_predictions(model, batch, points, torch.zeros(1, dtype=torch.long))
        lengths = batch.completion_mask.sum(1).tolist()
        scores, per_token = {}, {}
        for readout in self.readouts:
            values = activations[readout.hook_point]
            scores[readout.name] = scores_of(readout, batch, values)
            per_token[readout.name] = [part.tolist() for part in readout(values)[:, 0].split(lengths)]
        fvu = unexplained(sae, activations[sae.spec.hook_point]) if sae is not None else math.nan
        return scores, per_token, log_probs, fvu

    def _generate(self) -> list[list[int]]:
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        # With sharded weights, every token takes a forward of all ranks together.
        prepared = readable(trainer.model_wrapped) if is_sharded(model) else None
        return completions_of(
            model, self._prompt_ids, pad=pad_token(self.tokenizer), ends=self._ends, max_new_tokens=self.max_new_tokens,
            temperature=self.temperature, seed=self.seed, prepared=prepared, device=trainer.accelerator.device,
        )  # fmt: skip


def own_text_entry(now: Sampled, start: Sampled, seed: int = 0) -> OwnTextEntry:
    """What an evaluation's text says, compared with the first one. Changes are paired by prompt."""
    monitors = {}
    for name, scores in now.policy.items():
        policy = _mean_or_none(scores)
        change = _change(scores, start.policy[name], seed)
        if name not in now.text:
            monitors[name] = OwnMonitorEntry(policy=policy, policy_change=change)
            continue
        text = _mean_or_none(now.text[name])
        monitors[name] = OwnMonitorEntry(
            policy=policy, policy_change=change, text=text, drift=None if text is None or policy is None else text - policy,
            text_change=_change(now.text[name], start.text[name], seed),
        )  # fmt: skip
    measures = {
        name: OwnMeasureEntry(mean=_mean_or_none(values), change=_change(values, start.measures[name], seed))
        for name, values in now.measures.items()
    }
    sae: dict[str, Any] = {"fvu": now.fvu, "fvu_before": start.fvu} if math.isfinite(now.fvu) else {}
    return OwnTextEntry(
        prompts=len(now.texts), monitors=monitors, measures=measures, clipped=now.clipped, empty=now.empty,
        repetition=now.repetition, reference_perplexity=now.reference_perplexity, scores=per_prompt(now), **sae,
    )  # fmt: skip


def per_prompt(sampled: Sampled) -> dict[str, list[float | None]]:
    """Readout to each prompt's score on the policy; None for an empty answer."""
    return {
        name: [round(value, 6) if math.isfinite(value) else None for value in scores.tolist()]
        for name, scores in sampled.policy.items()
    }


def moved_most(
    prompts: Sequence[Any], now: Sampled, before: Mapping[str, Sequence[float | None]]
) -> dict[str, list[MovedEntry]]:
    """Per monitor the answers whose scores changed most, the largest change first.

    Args:
        before (`dict`): readout to each prompt's score at the evaluation before.
    """
    moved = {}
    for name, scores in per_prompt(now).items():
        pairs = zip(scores, before[name], strict=True)
        gaps = [(i, new - old) for i, (new, old) in enumerate(pairs) if new is not None and old is not None]
        top = sorted(gaps, key=lambda item: -abs(item[1]))[:SHOWN]
        moved[name] = [
            MovedEntry(prompt=prompts[i], completion=now.texts[i], change=round(gap, 6)) for i, gap in top if gap
        ]
    return moved


def sample_entries(prompts: Sequence[Any], sampled: Sampled) -> list[SampleEntry]:
    """The first answers with their scores, token by token where there are monitors."""
    rows = []
    for i in range(min(SHOWN, len(sampled.texts))):
        scores = {
            name: float(values[i]) if math.isfinite(values[i]) else None
            for name, values in (sampled.policy | sampled.measures).items()
        }
        of_tokens: dict[str, list[float | None]] = {
            name: [round(score, 3) for score in lists[i]] for name, lists in sampled.token_scores.items()
        }
        tokens = TokensEntry(pieces=sampled.pieces[i], scores=of_tokens) if sampled.token_scores else None
        rows.append(SampleEntry(prompt=prompts[i], completion=sampled.texts[i], scores=scores, tokens=tokens))
    return rows


def _mean_or_none(values: np.ndarray) -> float | None:
    kept = values[np.isfinite(values)]
    return float(kept.mean()) if len(kept) else None


def _change(now: np.ndarray, start: np.ndarray, seed: int) -> list[float | None] | None:
    both = np.isfinite(now) & np.isfinite(start)
    if both.sum() < MIN_PROMPTS:
        return None
    # In standard deviations of the start, or of both sides if the start's values were all alike.
    scale = float(start[both].std()) or float(np.concatenate([start[both], now[both]]).std()) or 1.0
    return [value / scale for value in mean_interval((now - start)[both], seed)]
