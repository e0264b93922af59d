"""What a changed model does: the answers that it writes, measured by an independent measure, or its margin between given answers.

In: a model, prompts or pairs, and jobs: a prompt's number and a change of its row. Out: a value per job, and what guards say
about the text. It must not know probes, doses or verdicts, and nothing here reads a score of a readout.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..activations.batch import TokenBatch, tokenize_examples, tokenize_prompt
from ..activations.changes import Change, changed
from ..activations.collect import read_activations, read_predictions
from ..activations.counted import end_of_turn_ids
from ..activations.generating import completions_of, left_padded, pad_token, repetition
from ..activations.hook_points import unwrap, without_engine
from ..activations.own_passes import measuring, reading
from ..activations.sharding import device_of
from .jobs import Behaviour, Done, Guards, Job
from .measures import values_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# A text is repeated if more than this share of its 4-grams occurred before.
REPEATED = 0.5
# Tokens of a batch that is scored at once, padding included: its logits are held whole.
_MARGIN_TOKENS = 1024


class AnswerBehaviour(Behaviour):
    """The greedy answers to prompts, measured by an independent measure of their text.

    Args:
        prompts (`Sequence`): plain or conversational.
        measure (`Callable`): from a text to a finite number.
        name (`str`): name of the measure.
    """

    def __init__(
        self, model: Any, tokenizer: Any, hook_point: str, prompts: Sequence[Any], measure: Callable[[str], float],
        name: str, *, max_new_tokens: int, batch_rows: int, chat: Mapping[str, Any], progress: bool,
    ):  # fmt: skip
        super().__init__(model, hook_point, batch_rows, progress)
        self.measure, self._measure, self._tokenizer, self._tokens = name, measure, tokenizer, max_new_tokens
        self._ids = [tokenize_prompt(prompt, tokenizer, **chat) for prompt in prompts]
        if empty := [i for i, ids in enumerate(self._ids) if not ids]:
            raise ValueError(f"Prompt {empty[0]} has no tokens – expected some text in each. Remove it.")
        self.prompts = len(self._ids)
        self._ends, self._pad = end_of_turn_ids(model, tokenizer, chat.get("chat_template")), pad_token(tokenizer)

    def length(self, prompt: int) -> int:
        return len(self._ids[prompt])

    def run_batch(self, jobs: Sequence[Job]) -> list[Done]:
        prompts = [self._ids[job.prompt] for job in jobs]
        with _under(self.model, self.hook_point, jobs, left_padded(prompts, self._pad)[1]):
            completions = completions_of(
                without_engine(self.model), prompts, pad=self._pad, ends=self._ends, max_new_tokens=self._tokens
            )
        texts = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
        values = values_of(self.measure, self._measure, texts)
        if bad := [text for text, value in zip(texts, values, strict=True) if not math.isfinite(value)]:
            raise ValueError(
                f"The measure `{self.measure}` gives no finite number for {bad[0][:60]!r} – expected one for every text, an "
                "empty one too: an answer without a number cannot be compared with the same prompt's other answers."
            )
        return [Done(value, text, tuple(ids)) for value, text, ids in zip(values, texts, completions, strict=True)]

    def guards(self, jobs: Sequence[Job], finished: Sequence[Done]) -> Guards:
        batch = self.batch_of(jobs, finished)
        surprises = []
        if batch.completion_mask.any():
            _, log_probs, _ = read_predictions(self.model, batch, [self.hook_point], torch.zeros(1, dtype=torch.long))
            parts = log_probs.split(batch.completion_mask.sum(1).tolist())
            surprises = [-float(part.mean()) for part in parts if len(part)]
        return Guards(
            float(np.exp(np.median(surprises))) if surprises else math.inf,
            float(np.mean([not done.text.strip() for done in finished])),
            float(np.mean([repetition(done.ids) > REPEATED for done in finished])),
        )

    def activations(self) -> list[torch.Tensor]:
        jobs = [Job(i) for i in range(self.prompts)]
        batch = self.batch_of(jobs, self.unchanged())
        if not batch.completion_mask.any():
            raise ValueError(
                "The model answers no prompt with any text – expected answers that can be steered. Ask otherwise."
            )
        found = read_activations(self.model, batch, self.hook_point)[self.hook_point]
        return list(found.split(batch.completion_mask.sum(1).tolist()))

    def batch_of(self, jobs: Sequence[Job], finished: Sequence[Done]) -> TokenBatch:
        """Prompts with the answers that they got."""
        return TokenBatch.from_ids(
            [self._ids[job.prompt] for job in jobs], [done.ids for done in finished], self._ends
        )


class MarginBehaviour(Behaviour):
    """Margin of the completion that follows a concept over one that violates it: log p(followed) − log p(violated), in nats.

    For concepts of which no measure of text exists.

    Args:
        pairs (`Sequence[dict]`): rows with `prompt`, `followed` and `violated`.
    """

    measure = "log-prob of the followed minus the violated completion"

    def __init__(
        self, model: Any, tokenizer: Any, hook_point: str, pairs: Sequence[Mapping[str, Any]], *, batch_rows: int,
        chat: Mapping[str, Any], progress: bool,
    ):  # fmt: skip
        super().__init__(model, hook_point, batch_rows, progress)
        ends = end_of_turn_ids(model, tokenizer, chat.get("chat_template"))
        self.prompts = len(pairs)
        rows = [
            {"prompt": pair["prompt"], "completion": pair[side]} for pair in pairs for side in ("followed", "violated")
        ]
        # Rows 2 i and 2 i + 1 are the two sides of pair i.
        self._batch = tokenize_examples(rows, tokenizer, end_of_turn_ids=ends, **chat)
        if not self._batch.completion_mask.any(1).all():
            row = int((~self._batch.completion_mask.any(1)).nonzero()[0])
            raise ValueError(
                f"The {('followed', 'violated')[row % 2]} completion of pair {row // 2} has no tokens – expected some text."
            )
        self._lengths = self._batch.attention_mask.sum(1).tolist()

    def length(self, prompt: int) -> int:
        return max(self._lengths[2 * prompt], self._lengths[2 * prompt + 1])

    @torch.no_grad()
    def run_batch(self, jobs: Sequence[Job]) -> list[Done]:
        longest = max(self.length(job.prompt) for job in jobs)
        size = max(1, _MARGIN_TOKENS // (2 * longest))
        return [done for start in range(0, len(jobs), size) for done in self._scored(jobs[start : start + size])]

    def _scored(self, jobs: Sequence[Job]) -> list[Done]:
        rows = [2 * job.prompt + side for job in jobs for side in (0, 1)]
        width = max(self._lengths[row] for row in rows)
        ids, mask = (part[rows, :width] for part in (self._batch.input_ids, self._batch.attention_mask))
        counted = self._batch.completion_mask[rows, :width]
        device = device_of(self.model)
        both = [job for job in jobs for _ in (0, 1)]
        core: Any = unwrap(self.model)
        with reading(), measuring(core), _under(self.model, self.hook_point, both, mask):
            logits = core(input_ids=ids.to(device), attention_mask=mask.long().to(device), use_cache=False).logits
        log_probs = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None].to(device))[..., 0].cpu()
        weights = counted[:, 1:].float()
        sums, counts = (log_probs * weights).sum(1).double(), weights.sum(1).double()
        return [
            Done(
                float(sums[2 * i] - sums[2 * i + 1]),
                surprise=float(-(sums[2 * i] + sums[2 * i + 1]) / (counts[2 * i] + counts[2 * i + 1])),
            )
            for i in range(len(jobs))
        ]  # fmt: skip

    def guards(self, jobs: Sequence[Job], finished: Sequence[Done]) -> Guards:
        return Guards(float(np.exp(np.median([done.surprise for done in finished]))))

    def activations(self) -> list[torch.Tensor]:
        found = read_activations(self.model, self._batch, self.hook_point)[self.hook_point]
        counts = self._batch.completion_mask.sum(1).tolist()
        parts = found.split(counts)
        return [torch.cat(parts[2 * i : 2 * i + 2]) for i in range(self.prompts)]


def _under(model: Any, hook_point: str, jobs: Sequence[Job], mask: torch.Tensor) -> Any:
    """Context in which each job's change is made in its row."""
    width = next((len(job.change.step) for job in jobs if job.change is not None), 0)
    if not width:
        return nullcontext()
    none = Change.steering(torch.zeros(width))
    return changed(model, hook_point, [job.change or none for job in jobs], mask)
