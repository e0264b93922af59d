"""The policy's own text: what it answers to fixed prompts, read on itself and on the frozen reference.

In: prompts, readouts, measures, a built trainer. Out: a `Sampled` per evaluation, from which change is split into *what the text
does* and *representation drift*. It must not know logs or verdicts.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..activations.batch import TokenBatch, tokenize_prompt
from ..activations.collect import read_predictions
from ..activations.counted import counted_length
from ..activations.own_passes import measuring, reading
from ..activations.ranks import from_rank_zero
from ..activations.reference_pass import reference_pass
from ..activations.sharding import is_sharded, readable
from ..validation.measures import values_of
from ..validation.statistics import MIN_PROMPTS, mean_interval
from .battery import perplexity
from .latent_drift import unexplained
from .monitors import scores_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..concepts.readout import Readout
    from ..sae.autoencoder import SparseAutoencoder

_NGRAM = 4


@dataclass(frozen=True)
class Sampled:
    """One evaluation's completions, row by row in the order of the prompts, and how they read.

    Attributes:
        texts (`list[str]`), pieces (`list[list[str]]`): completions, whole and token by token (those that count).
        policy, text (`dict[str, np.ndarray]`): readout to scores (R,) read on the policy, and on the frozen reference: what
            the text does by itself. NaN for an empty completion; `text` is empty where there is no reference.
        token_scores (`dict[str, list[list[float]]]`): readout to scores per token on the policy.
        measures (`dict[str, np.ndarray]`): measure to values (R,).
        clipped, empty (`float`): shares of completions that reached the limit, and that hold nothing.
        repetition (`float`): share of a completion's 4-grams of tokens that occurred before in it, on average.
        reference_perplexity (`float`): of the completions under the reference; NaN without one.
        fvu (`float`): of a sparse autoencoder on the policy's own tokens; NaN without one.
    """

    texts: list[str]
    pieces: list[list[str]]
    policy: dict[str, np.ndarray]
    text: dict[str, np.ndarray]
    token_scores: dict[str, list[list[float]]]
    measures: dict[str, np.ndarray]
    clipped: float
    empty: float
    repetition: float
    reference_perplexity: float
    fvu: float = math.nan

    def tensors(self) -> dict[str, torch.Tensor]:
        """For a file: what later evaluations are compared with. The texts themselves stay in the run log."""
        parts = {"policy": self.policy, "text": self.text, "measures": self.measures}
        found = {f"own/{key}/{name}": torch.from_numpy(v) for key, part in parts.items() for name, v in part.items()}
        return found | {
            "own/shares": torch.tensor(
                [self.clipped, self.empty, self.repetition, self.reference_perplexity, self.fvu], dtype=torch.float64
            )
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Sampled:
        """What `tensors` gave, without texts."""
        parts: dict[str, dict[str, np.ndarray]] = {"policy": {}, "text": {}, "measures": {}}
        for key, value in tensors.items():
            if key.startswith("own/") and key != "own/shares":
                _, part, name = key.split("/", 2)
                parts[part][name] = value.numpy()
        shares = tensors["own/shares"].tolist()
        return cls([], [], parts["policy"], parts["text"], {}, parts["measures"], *shares)


class OwnText:
    """Samples the policy on fixed prompts, with the same random numbers each time.

    Args:
        trainer (`transformers.Trainer`): built.
        prompts (`Sequence`): plain or conversational; at least 8 for a verdict.
        readouts (`Sequence[Readout]`): read on every completion.
        measures (`dict[str, Callable]`): independent measures: a text to a float.
        reference (`nn.Module`, *optional*): the frozen reference; with PEFT it is the policy without adapters.
        max_new_tokens (`int`, defaults to 32), temperature (`float`, defaults to 0.7), seed (`int`, defaults to 0).
        chat (`dict`): `chat_template` and `chat_template_kwargs` as the trainer has them.
        sae (`SparseAutoencoder`, *optional*): its FVU on the completions' tokens is measured.
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
                f"`prompts` has {len(self.prompts)} prompts, empty: {empty} – expected some text in each."
            )

    def sample(self) -> Sampled:
        """Completions of the policy as it is now, and their readings: by all ranks together, on the text of rank 0."""
        own = self._generate()
        completions = from_rank_zero(lambda: own)
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
            clipped=float(np.mean([len(own) == self.max_new_tokens for own in counted])),
            empty=float(np.mean([not t.strip() for t in texts])),
            repetition=float(np.mean([repetition(ids) for ids in counted])),
            reference_perplexity=surprise,
            fvu=fvu,
        )  # fmt: skip

    @property
    def has_reference(self) -> bool:
        """Whether the frozen reference can be read."""
        from ..activations.hook_points import has_adapters

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

    @torch.no_grad()
    def _generate(self) -> list[list[int]]:
        trainer = self.trainer
        width = max(map(len, self._prompt_ids))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        ids = torch.full((len(self._prompt_ids), width), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(self._prompt_ids):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = trainer.accelerator.device
        devices = [device] if device.type == "cuda" else []
        model = trainer.accelerator.unwrap_model(trainer.model)
        # Where weights are in pieces, ranks write in step, each token by a pass of all of them.
        prepared = readable(trainer.model_wrapped) if is_sharded(model) else nullcontext()
        with prepared, reading(), measuring(model), torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            output = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), do_sample=True, temperature=self.temperature, top_k=0,
                top_p=1.0, repetition_penalty=1.0, max_new_tokens=self.max_new_tokens, pad_token_id=pad,
                eos_token_id=sorted(self._ends),
            )  # fmt: skip
        found = []
        for line in output[:, width:].tolist():
            end = next((i for i, token in enumerate(line) if token in self._ends), None)
            found.append(line if end is None else line[: end + 1])
        return found


def repetition(ids: Sequence[int]) -> float:
    """Share of 4-grams that occurred before; 0 below five tokens."""
    grams = [tuple(ids[i : i + _NGRAM]) for i in range(len(ids) - _NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def summarize(now: Sampled, start: Sampled, seed: int = 0) -> dict[str, Any]:
    """What an evaluation's text says beside the first one.

    Returns:
        `dict`: per readout under `monitors` the means `policy`, `text` (ψ of the text on the reference) and `drift` = text −
        policy, and the changes since the start `policy_change`, `text_change`, each [value, low, high], paired by prompt, in
        standard deviations of the start's own scores; per measure its `mean` and `change` likewise; then the shares of `Sampled`.
    """
    found: dict[str, Any] = {"prompts": len(now.texts), "monitors": {}, "measures": {}}
    for name, scores in now.policy.items():
        one: dict[str, Any] = {"policy": _mean(scores), "policy_change": _change(scores, start.policy[name], seed)}
        if name in now.text:
            one["text"] = _mean(now.text[name])
            if one["text"] is not None and one["policy"] is not None:
                one["drift"] = one["text"] - one["policy"]
            one["text_change"] = _change(now.text[name], start.text[name], seed)
        found["monitors"][name] = one
    for name, values in now.measures.items():
        found["measures"][name] = {"mean": _mean(values), "change": _change(values, start.measures[name], seed)}
    for name in ("clipped", "empty", "repetition", "reference_perplexity"):
        found[name] = getattr(now, name)
    if math.isfinite(now.fvu):
        found |= {"fvu": now.fvu, "fvu_before": start.fvu}
    return found


def per_prompt(sampled: Sampled) -> dict[str, list[float | None]]:
    """Readout to each prompt's score on the policy, None where the answer is empty."""
    return {
        name: [round(value, 6) if math.isfinite(value) else None for value in scores.tolist()]
        for name, scores in sampled.policy.items()
    }


def _mean(values: np.ndarray) -> float | None:
    kept = values[np.isfinite(values)]
    return float(kept.mean()) if len(kept) else None


def _change(now: np.ndarray, start: np.ndarray, seed: int) -> list[float] | None:
    both = np.isfinite(now) & np.isfinite(start)
    if both.sum() < MIN_PROMPTS:
        return None
    # In standard deviations of the start; of both where the start's values were all alike.
    scale = float(start[both].std()) or float(np.concatenate([start[both], now[both]]).std()) or 1.0
    return [value / scale for value in mean_interval((now - start)[both], seed)]
