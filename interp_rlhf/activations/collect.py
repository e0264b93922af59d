"""Activations and predictions of a token batch, collected by passes of our own: pooled per row, or of every counted token.

In: a model, a token batch, hook points. Out: tensors on the CPU in float32. It must not know what they are for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..messages import as_list
from .read import concept_scores, run_batch, scoring
from .tap import group_by_hook_point

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from .batch import ConceptScores, TokenBatch
    from .read import Sink
    from .tap import TokenReadout

# Name of what is pooled to its hook point and its weights (B, T).
ToPool = Mapping[Any, tuple[str, torch.Tensor]]


def read_means(
    model: nn.Module,
    batch: TokenBatch,
    hook_points: str | Sequence[str],
    *,
    batch_tokens: int = 4096,
    progress: str | None = None,
) -> dict[str, torch.Tensor]:
    """Mean activation over the tokens that count, per row: what a mean-pooled probe is fitted on.

    Returns:
        `dict[str, torch.FloatTensor]`: hook point to means (B, D), float32; a row without counted tokens is 0.
    """
    weights = token_weights(batch, "mean")
    points = dict.fromkeys(as_list(hook_points))
    return read_pooled(
        model, batch, {point: (point, weights) for point in points}, batch_tokens=batch_tokens, progress=progress
    )


def token_weights(batch: TokenBatch, which: str) -> torch.Tensor:
    """Weights (B, T) by which activations are pooled: the `mean` over the tokens that count, the `last` of them, or the token
    `before` them, which is a prompt's last; all 0 in a row where there is none."""
    mask = batch.completion_mask
    if which == "mean":
        return mask / mask.sum(1, keepdim=True).clamp(min=1)
    seen = mask.cumsum(1)
    if which == "last":
        return (mask & (seen == seen[:, -1:])).float()
    real = batch.attention_mask & (seen == 0) & mask.any(1, keepdim=True)
    return (real & (real.cumsum(1) == real.sum(1, keepdim=True))).float()


def read_pooled(
    model: nn.Module,
    batch: TokenBatch,
    pooled: ToPool,
    *,
    batch_tokens: int = 4096,
    progress: str | None = None,
) -> dict[Any, torch.Tensor]:
    """Weighted sums of activations per row, any number of them by one forward that stops at the deepest hook point.

    Args:
        pooled (`dict[Any, tuple[str, torch.FloatTensor]]`): name to hook point and weights (B, T), see `token_weights`.

    Returns:
        `dict[Any, torch.FloatTensor]`: name to activations (B, D), float32; a row without weights is 0.
    """
    activations: dict[Any, torch.Tensor] = {}
    points = list(dict.fromkeys(point for point, _ in pooled.values()))
    run_batch(model, batch, points, _pooling(batch, pooled, activations), batch_tokens, progress)
    return activations


def _pooling(batch: TokenBatch, pooled: ToPool, activations: dict[Any, torch.Tensor]) -> Sink:
    """A sink that adds up activations by their weights."""
    width = batch.input_ids.shape[1]
    flat = {name: weights.float().flatten() for name, (_, weights) in pooled.items()}

    def sink(hook_point: str, places: torch.Tensor, activation: torch.Tensor) -> None:
        rows = places.max(dim=1).values // width
        for name, (point, _) in pooled.items():
            if point != hook_point:
                continue
            if name not in activations:
                activations[name] = torch.zeros(len(batch), activation.shape[-1])
            weights = flat[name][places.clamp(min=0)].masked_fill(places < 0, 0).to(activation.device)
            activations[name][rows] = torch.einsum("btd,bt->bd", activation.detach().float(), weights).cpu()

    return sink


def read_with_likelihood(
    model: nn.Module,
    batch: TokenBatch,
    readouts: Sequence[TokenReadout],
    pooled: ToPool,
    *,
    batch_tokens: int = 4096,
    reader: str = "policy",
    progress: str | None = None,
) -> tuple[dict[str, ConceptScores], dict[Any, torch.Tensor], torch.Tensor]:
    """Scores as by `read`, pooled activations as by `read_pooled`, and the log-prob (B, T) of every counted token given what
    precedes it, 0 elsewhere: all by one whole forward."""
    groups = group_by_hook_point(readouts)
    scores: dict[str, torch.Tensor] = {}
    sums: dict[Any, torch.Tensor] = {}
    keep, add = scoring(batch, groups, scores), _pooling(batch, pooled, sums)
    log_probs = torch.zeros(batch.input_ids.numel())
    ids, counted = batch.input_ids.flatten(), batch.completion_mask.flatten()

    def sink(hook_point: str, places: torch.Tensor, activation: torch.Tensor) -> None:
        if hook_point in groups:
            keep(hook_point, places, activation)
        add(hook_point, places, activation)

    def predictions(places: torch.Tensor, logits: torch.Tensor) -> None:
        for row, line in enumerate(places):
            line = line[line >= 0]
            here = counted[line[1:]].nonzero().squeeze(1)  # predicted by the position before
            tokens = line[1:][here]
            row_logits = logits[row, here.to(logits.device)].float()
            said = row_logits.gather(1, ids[tokens, None].to(row_logits.device))[:, 0]
            log_probs[tokens] = (said - row_logits.logsumexp(-1)).cpu()

    points = list(dict.fromkeys([*groups, *(point for point, _ in pooled.values())]))
    run_batch(model, batch, points, sink, batch_tokens, progress, predictions)
    return concept_scores(batch, readouts, scores, reader), sums, log_probs.view(batch.input_ids.shape)


def read_activations(
    model: nn.Module,
    batch: TokenBatch,
    hook_points: str | Sequence[str],
    *,
    tokens: torch.Tensor | None = None,
    batch_tokens: int = 4096,
) -> dict[str, torch.Tensor]:
    """Activations of the tokens that count, in the order of the batch: for fixed texts, of which there are few.

    Args:
        tokens (`torch.BoolTensor` of shape (B, T), *optional*): of these tokens, in place of those that count.

    Returns:
        `dict[str, torch.FloatTensor]`: hook point to activations (N, D), float32, N the number of counted tokens.
    """
    activations, sink = _collecting(batch.completion_mask if tokens is None else tokens)
    run_batch(model, batch, list(dict.fromkeys(as_list(hook_points))), sink, batch_tokens, None)
    return activations


def read_predictions(
    model: nn.Module,
    batch: TokenBatch,
    hook_points: str | Sequence[str],
    kept: torch.Tensor,
    *,
    batch_tokens: int = 512,
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Activations as by `read_activations`, and what the model predicts, all by one whole forward.

    Args:
        kept (`torch.LongTensor` of shape (K,)): which of the N counted tokens to keep the whole prediction of.

    Returns:
        Activations by hook point; the log-prob (N,) of each counted token given what precedes it, NaN for the first token of a
        row; log-probs (K, V), float32, of the distributions that predict the kept tokens.
    """
    activations, sink = _collecting(batch.completion_mask)
    counted = batch.completion_mask.flatten()
    target = counted.cumsum(0) - 1
    log_probs = torch.full((int(counted.sum()),), torch.nan)
    wanted = torch.full((len(log_probs),), -1, dtype=torch.long)
    wanted[kept] = torch.arange(len(kept))
    rows: dict[int, torch.Tensor] = {}

    def predictions(places: torch.Tensor, logits: torch.Tensor) -> None:
        ids = batch.input_ids.flatten()
        for row, line in enumerate(places):
            line = line[line >= 0]
            here = counted[line[1:]].nonzero().squeeze(1)  # predicted by the position before
            if not len(here):
                continue
            log_softmax = logits[row, here.to(logits.device)].float().log_softmax(-1).cpu()
            tokens = line[1:][here]
            log_probs[target[tokens]] = log_softmax.gather(1, ids[tokens, None])[:, 0]
            for place, prediction in zip(wanted[target[tokens]].tolist(), log_softmax, strict=True):
                if place >= 0:
                    rows[place] = prediction.clone()

    run_batch(model, batch, list(dict.fromkeys(as_list(hook_points))), sink, batch_tokens, None, predictions)
    return activations, log_probs, torch.stack([rows[i] for i in range(len(kept))])


def _collecting(tokens: torch.Tensor) -> tuple[dict[str, torch.Tensor], Sink]:
    """A sink that keeps the activations of some tokens in the order of the batch, and where it keeps them."""
    counted = tokens.flatten()
    target = counted.cumsum(0) - 1  # row in the result of each counted token
    activations: dict[str, torch.Tensor] = {}

    def sink(hook_point: str, places: torch.Tensor, activation: torch.Tensor) -> None:
        if hook_point not in activations:
            activations[hook_point] = torch.zeros(int(counted.sum()), activation.shape[-1])
        wanted = (places >= 0) & counted[places.clamp(min=0)]
        activations[hook_point][target[places[wanted]]] = activation.detach().float().cpu()[wanted]

    return activations, sink
