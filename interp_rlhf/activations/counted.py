"""Which tokens count: one rule for fitting, checking, `read()`, rewards, monitors, terms, drift, subspaces and autoencoders.

In: token ids, and what a chat template writes around an answer. Out: a mask. The rule:

1. The first token of a row never counts. It draws attention with any content (attention sink), so its activation says nothing of
   the text.
2. In a completion nothing counts from the end-of-turn token that closes it on, whatever follows (`include_end_of_turn` counts
   that one token too).
3. What the template writes is not the answer: role markers, a line break after the turn, an empty think block.
4. In a plain text all tokens but the special ones count. Where it holds turns of an assistant in the template's own marks, only
   those turns count; where it holds other marks of it alone, the conversation was cut before an answer, and nothing counts.
5. A row without a counted token is in no denominator.

Tokens with an outlying norm (`outliers`) are left out where a statistic runs over many tokens: drift metrics, principal
components, autoencoders. A score of one row keeps them: whether a token counts must not depend on the other rows. It must not
know trainers, nor what is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .answers import find_answers
from .chat_marks import ChatMarks
from .hook_points import unwrap

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence


def end_of_turn_ids(model: Any, tokenizer: Any, chat_template: str | None = None) -> set[int]:
    """Ids that end a completion: the end-of-sequence tokens of the tokenizer and of the model's generation config, as in TRL, and
    the token by which the chat template closes a turn.

    Fitting, checking, watching and rewarding all leave out just these.
    """
    config = getattr(unwrap(model), "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    return set(ChatMarks.of(tokenizer, chat_template, ends=[token for token in listed if token is not None]).ends)


@dataclass(frozen=True)
class Counted:
    """Counted tokens of a training batch, N of them in M sequences, through which every term reduces: the mean over sequences of
    the mean over that sequence's counted tokens.

    One path for all trainers, so that padding, packing, accumulation and ranks cannot move a term.

    Attributes:
        mask (`torch.BoolTensor` of shape (B, T)): True on them.
        sequence (`torch.LongTensor` of shape (N,)): which sequence each belongs to, 0 to M − 1, in order of the batch.
        sequences (`int`): M. A row of the batch is one sequence, unless it is packed, or holds several turns of an assistant.
        template (`torch.BoolTensor` of shape (B, T)): tokens that the template wrote between an assistant's header and its
            answer.
        starts (`torch.BoolTensor` of shape (B, T)): where a text begins.
        opens (`torch.BoolTensor` of shape (B, T)): where a turn of the assistant begins.
    """

    mask: torch.Tensor
    sequence: torch.Tensor
    sequences: int
    template: torch.Tensor
    starts: torch.Tensor
    opens: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        """How many tokens of each sequence count, (M,)."""
        return torch.bincount(self.sequence, minlength=self.sequences)

    def means(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over each sequence's counted tokens, (M, ...), of values (N, ...); 0 where none counts."""
        sums = values.new_zeros((self.sequences, *values.shape[1:])).index_add(0, self.sequence, values)
        return sums / self.counts.clamp(min=1).view(-1, *[1] * (values.dim() - 1))

    def rows(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (N, K) laid out as one row per sequence, (M, L, K), and the mask (M, L) of those that are there."""
        counts = self.counts
        longest = int(counts.max()) if self.sequences else 0
        mask = torch.arange(longest, device=values.device) < counts[:, None]
        return values.new_zeros((*mask.shape, *values.shape[1:])).masked_scatter(
            mask.view(*mask.shape, *[1] * (values.dim() - 1)).expand(*mask.shape, *values.shape[1:]), values
        ), mask

    @property
    def any(self) -> torch.Tensor:
        """Which sequences have a counted token, (M,)."""
        return self.counts > 0

    def texts(
        self, ids: torch.Tensor, template: bool = False, dropped: Sequence[int] = ()
    ) -> tuple[list[list[int]], list[list[bool]]]:
        """Ids and counts of each sequence as a row of its own, as `read()` would see it: without padding, without the template's
        tokens before the answer, and up to the last token that counts. Empty where none does.

        Args:
            ids (`torch.LongTensor` of shape (B, T)): of the batch.
            template (`bool`, defaults to `False`): leave the template's tokens in, as the trainer's own pass sees them.
            dropped (`Sequence[int]`): what the generation prompt has and a rendered row has not; see `ChatMarks`.
        """
        places = self.mask.nonzero().tolist()
        owners = self.sequence.tolist()
        last: dict[int, tuple[int, int]] = {}
        places_of: dict[int, set[int]] = {}
        for (row, place), sequence in zip(places, owners, strict=True):
            last[sequence] = (row, place)
            places_of.setdefault(sequence, set()).add(place)
        rows: list[list[int]] = [[] for _ in range(self.sequences)]
        counts: list[list[bool]] = [[] for _ in range(self.sequences)]
        for sequence, (row, end) in last.items():
            first = int(self.starts[row, : end + 1].nonzero()[-1])
            kept = [p for p in range(first, end + 1) if template or not self.template[row, p]]
            rows[sequence] = ids[row, kept].tolist()
            counts[sequence] = [place in places_of[sequence] for place in kept]
            if dropped and not template:  # before the turn that is scored; earlier ones are as the template has them
                answer = min(places_of[sequence])
                opened: list[int] = self.opens[row, first : answer + 1].nonzero()[:, 0].tolist()
                if opened:
                    at = sum(p < first + opened[-1] for p in kept)
                    rows[sequence][at:at] = list(dropped)
                    counts[sequence][at:at] = [False] * len(dropped)
        return rows, counts


def input_ids(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Ids (B, T) that the policy's training pass runs over."""
    if "prompt_ids" in inputs:  # GRPO and RLOO
        return torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    ids: torch.Tensor = inputs["input_ids"]
    return ids


def counted(
    inputs: Mapping[str, Any], marks: ChatMarks | Collection[int] = (), include_end_of_turn: bool = False
) -> Counted:
    """Counted tokens of a trainer's batch: those of the answers among the ones that its own loss counts.

    Args:
        inputs (`dict`): what `compute_loss` gets.
        marks (`ChatMarks`): of the trainer's tokenizer and template; or only the ids that end a turn.
        include_end_of_turn (`bool`, defaults to `False`): count the end-of-turn token that closes an answer too.
    """
    if not isinstance(marks, ChatMarks):
        marks = ChatMarks(ends=frozenset(marks))
    ids = input_ids(inputs)
    position_ids = None
    if "prompt_ids" in inputs:
        mask = inputs["completion_mask"].bool()
        if inputs.get("tool_mask") is not None:
            mask = mask & inputs["tool_mask"].bool()
        mask = torch.cat([torch.zeros_like(inputs["prompt_ids"], dtype=torch.bool), mask], dim=1)
        real = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1).bool()
        # All tokens that a policy wrote are its answer, even template marks among them.
        marks = ChatMarks(ends=marks.ends, special=marks.special)
    else:
        mask = inputs["labels"] != -100 if "labels" in inputs else inputs["completion_mask"].bool()
        # Packed or padding-free batches are one long row, and come with positions instead of an attention mask.
        if "attention_mask" not in inputs:
            position_ids = inputs.get("position_ids")
        real = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(mask)
    starts = real & (real.cumsum(1) == 1) if position_ids is None else position_ids == 0
    answers = find_answers(ids, mask & real, starts, marks, include_end_of_turn, texts="labels" in inputs)
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    sequences = len(ids)
    if "labels" in inputs:
        # A pack holds several texts, and a conversation several turns: each that has a counted token is a sequence.
        texts = starts.flatten().cumsum(0).view_as(ids)
        keys = texts * (int(answers.turn.max()) + 1) + answers.turn
        present = keys[answers.mask].unique()
        rows = torch.searchsorted(present, keys.contiguous())
        sequences = len(present)
    return Counted(answers.mask, rows[answers.mask], sequences, answers.template, starts, answers.opens)
