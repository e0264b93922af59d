"""`read()`: batched scoring of texts or token batches by a model, stopping at the deepest hook point.

In: a model, a token batch (or texts and a tokenizer), readouts. Out: scores per token, aligned with the batch that came
in. Padding never reaches the scores: rows are stripped of it, sorted by length and padded again on the right, so that
position ids are right on every architecture.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..messages import as_list
from .batch import ConceptScores, TokenBatch, tokenize_examples
from .counted import end_of_turn_ids
from .hook_points import backbone, on_activation, unwrap
from .noise import require_positions, rope_from_the_start, rope_reach
from .own_passes import measuring, reading
from .ranks import most_of_all_ranks
from .sharding import device_of, is_sharded, readable
from .tap import group_by_hook_point, run_readouts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from .tap import TokenReadout

# Sees the rows of a batch, their token positions and the activation (rows, T, D) at one hook point.
Sink = Callable[[str, torch.Tensor, torch.Tensor], None]
# Sees token positions and their logits (rows, L, V): those of the last L positions of a bucket.
LogitSink = Callable[[torch.Tensor, torch.Tensor], None]


# A bucket of a batch: ids, attention mask, and where each token came from.
Bucket = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _Done(Exception):
    """The deepest hook point has fired; nothing above it is needed."""


def read(
    model: nn.Module,
    batch: TokenBatch | str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
    readouts: TokenReadout | Sequence[TokenReadout],
    *,
    tokenizer: Any = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    batch_tokens: int = 4096,
    reader: str = "policy",
    progress: str | None = None,
) -> dict[str, ConceptScores]:
    """Scores of every token, by one forward per length bucket and nothing above the deepest hook point.

    The model is left as it was: training flags, hooks and random state. Where an engine has sharded its parameters (ZeRO-3,
    FSDP2), pass it as the engine wrapped it (`trainer.model_wrapped`) and call this on all ranks together, each with rows of its
    own or none: its whole backbone runs then, the same number of times everywhere.

    Args:
        model (`nn.Module`): a causal LM, wrapped or not, read as its adapters stand.
        batch (`TokenBatch`, or a `list` of texts or examples): see `tokenize_examples` for the forms.
        readouts (`Sequence[TokenReadout]`): what to read; all of them cost one forward.
        tokenizer, chat_template, chat_template_kwargs: for texts and examples only.
        batch_tokens (`int`, defaults to 4096): tokens per forward, padding included.
        reader (`str`): name that the scores carry.
        progress (`str`, *optional*): label of a progress bar; none is shown without it.

    Returns:
        `dict[str, ConceptScores]`: scores (B, T, K) by the readout's name, in the order and with the padding of the
        batch that came in.

    Raises:
        `ValueError`: texts without a tokenizer, no such hook point, a prompt-learning adapter, token ids out of range.
        `RuntimeError`: a hook point that did not fire.

    Example:

    ```python
    >>> from interp_rlhf import read

    >>> scores = read(model, ["A letter came late.", "Nobody came."], readout, tokenizer=tokenizer)
    >>> len(readout.score(scores[readout.name]))  # one number per text
    2

    ```
    """
    if not isinstance(batch, TokenBatch):
        if tokenizer is None:
            raise ValueError(
                "`read` was given texts and no `tokenizer` – expected the model's own. Pass `tokenizer=`."
            )
        ends = end_of_turn_ids(model, tokenizer, chat_template)
        batch = tokenize_examples(batch, tokenizer, chat_template, chat_template_kwargs, ends)
    readouts = as_list(readouts)
    groups = group_by_hook_point(readouts)
    scores: dict[str, torch.Tensor] = {}
    run_batch(model, batch, list(groups), scoring(batch, groups, scores), batch_tokens, progress)
    return concept_scores(batch, readouts, scores, reader)


def scoring(batch: TokenBatch, groups: Mapping[str, Any], scores: dict[str, torch.Tensor]) -> Sink:
    """A sink that keeps what readouts give on every token, flat."""

    def sink(hook_point: str, places: torch.Tensor, activation: torch.Tensor) -> None:
        found: dict[str, torch.Tensor] = {}
        run_readouts(groups[hook_point], activation, found)
        for name, values in found.items():
            if name not in scores:
                scores[name] = torch.zeros(batch.input_ids.numel(), values.shape[-1])
            real = places >= 0
            scores[name][places[real]] = values.cpu()[real]

    return sink


def concept_scores(
    batch: TokenBatch, readouts: Sequence[TokenReadout], scores: Mapping[str, torch.Tensor], reader: str
) -> dict[str, ConceptScores]:
    shape = batch.input_ids.shape
    # What no row has been read for has as many columns as its readout says it gives.
    return {
        readout.name: ConceptScores(
            scores[readout.name].view(*shape, -1)
            if readout.name in scores
            else torch.zeros(*shape, getattr(readout, "columns", 1)),
            batch.completion_mask, batch.input_ids, readout.name, reader,
        )
        for readout in readouts
    }  # fmt: skip


def read_inputs(
    model: nn.Module, inputs: Mapping[str, Any], readouts: Sequence[TokenReadout]
) -> dict[str, torch.Tensor]:
    """Scores of a batch exactly as a trainer feeds it, packed rows included.

    One forward computes them. It stops at the deepest hook point, unless parameters are sharded (see `read`).

    Args:
        model (`nn.Module`): a causal LM, read as its adapters stand.
        inputs (`dict`): the backbone's own keyword arguments: `input_ids` and, as the trainer has them, `attention_mask`,
            `position_ids`, lengths of packed sequences.
        readouts (`Sequence[TokenReadout]`): what to read.

    Returns:
        `dict[str, torch.FloatTensor]`: scores (B, T, K) by the readout's name, float32, on the model's device.
    """
    groups = group_by_hook_point(readouts)
    scores: dict[str, torch.Tensor] = {}

    def see(hook_point: str, activation: torch.Tensor) -> None:
        run_readouts(groups[hook_point], activation, scores)

    with _passes(model, list(groups), see) as run:
        run(inputs)
    return scores


@contextmanager
def _passes(
    model: nn.Module, hook_points: Sequence[str], see: Callable[[str, torch.Tensor], None], predictions: bool = False
) -> Iterator[Callable[[Mapping[str, Any]], Any]]:
    """Gives a function that runs the model on one batch of inputs, without gradient, dropout or taps.

    Every activation at a hook point goes to `see`. The function returns the model's output, or None if the pass stopped at the
    deepest hook point. It does not stop early with `predictions`, nor where parameters are sharded: then the model runs as its
    engine wrapped it, on all ranks together.

    Raises:
        `RuntimeError`, in a pass: a hook point did not fire.
    """
    sharded = is_sharded(model)
    whole = sharded or predictions
    core = unwrap(model) if whole else backbone(model)
    called = model if sharded else core
    waiting: set[str] = set()

    def hook(point: str) -> Callable[[torch.Tensor], None]:
        def fired(activation: torch.Tensor) -> None:
            see(point, activation)
            waiting.discard(point)
            if not waiting and not whole:
                raise _Done

        return fired

    def run(inputs: Mapping[str, Any]) -> Any:
        waiting.update(hook_points)
        try:
            output = called(**{**inputs, "use_cache": False})
        except _Done:
            return None
        if waiting:
            raise RuntimeError(
                f"Hook point {', '.join(f'`{point}`' for point in sorted(waiting))} did not fire in a forward of "
                f"`{type(core).__name__}` – expected a module that runs in every pass, such as a decoder layer."
            )
        return output

    handles = [on_activation(model, point, hook(point)) for point in hook_points]
    prepared = readable(model, None if predictions else core) if sharded else nullcontext()
    try:
        with prepared, reading(), measuring(core), torch.no_grad():
            yield run
    finally:
        for handle in handles:
            handle.remove()


def run_batch(
    model: nn.Module,
    batch: TokenBatch,
    hook_points: Sequence[str],
    sink: Sink,
    batch_tokens: int,
    progress: str | None,
    predictions: LogitSink | None = None,
) -> None:
    """Runs the backbone over the batch in length buckets and hands every hook point's activation to `sink`.

    With `predictions` the whole model runs. The logits that predict the counted tokens go to `predictions`, or those of all
    positions, if the model has no `logits_to_keep`. If parameters are sharded, the whole model runs too: on all ranks together,
    the same number of times on each.
    """
    _check(model, batch)
    sharded = is_sharded(model)
    trimmed = predictions is not None and not sharded and _can_trim_logits(model)
    counted = batch.completion_mask.flatten()
    places: torch.Tensor | None = None  # None on a rank that has no rows left and runs along

    def see(point: str, activation: torch.Tensor) -> None:
        if places is None:
            return
        if activation.shape[:2] != places.shape:
            raise ValueError(
                f"The activation at `{point}` has shape {tuple(activation.shape)} for {tuple(places.shape)} tokens – "
                "expected one vector per token. Read at a decoder layer."
            )
        sink(point, places, activation)

    device, reach = device_of(model), rope_reach(model)
    buckets = _buckets(batch, batch_tokens, reach)
    rope = rope_from_the_start(model) if reach is not None else nullcontext(lambda: None)
    tokens = int(batch.attention_mask.sum())
    bar = tqdm(total=tokens, desc=progress, unit="token", disable=progress is None, leave=False)
    with bar, _passes(model, hook_points, see, predictions is not None) as run, rope as forget:
        for bucket in _for_all_ranks(buckets, device) if sharded else buckets:
            input_ids, attention_mask, here = bucket or _NO_ROWS
            places = None if bucket is None else here
            inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
            forget()
            output = run({**inputs, "logits_to_keep": _from_the_first(counted, here)} if trimmed else inputs)
            if bucket is None:
                continue
            if predictions is not None:
                predictions(here[:, here.shape[1] - output.logits.shape[1] :], output.logits)
            bar.update(int(attention_mask.sum()))


def _can_trim_logits(model: nn.Module) -> bool:
    """True if the model computes logits of the last positions only, when it is asked to."""
    return "logits_to_keep" in inspect.signature(unwrap(model).forward).parameters


def _from_the_first(counted: torch.Tensor, places: torch.Tensor) -> int:
    """How many positions from the end on predict all the tokens that count, in a bucket of right-padded rows."""
    counts = ((places >= 0) & counted[places.clamp(min=0)]).any(0)
    return places.shape[1] - max(0, int(counts.int().argmax()) - 1) if bool(counts.any()) else 1


# What a rank without rows runs, so that the others get its part of the parameters.
_NO_ROWS: Bucket = (torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.long), torch.full((1, 1), -1))


def _for_all_ranks(buckets: Iterator[Bucket], device: torch.device) -> list[Bucket | None]:
    """As many buckets as the rank with the most of them has; None where this one has no more."""
    mine: list[Bucket | None] = list(buckets)
    return mine + [None] * (most_of_all_ranks(len(mine), device) - len(mine))


def _buckets(
    batch: TokenBatch, batch_tokens: int, reach: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Right-padded (input_ids, attention_mask, places) of rows of like length, longest first.

    Rows of `reach` tokens or more share a bucket with rows of their own length only. `places` (b, t) says where in the
    flattened batch each token came from, -1 on padding.
    """
    width = batch.input_ids.shape[1]
    lengths = batch.attention_mask.sum(1)
    order = [row for row in lengths.argsort(descending=True, stable=True).tolist() if lengths[row] > 0]
    while order:
        longest = int(lengths[order[0]])
        count = max(1, batch_tokens // longest)
        if reach is not None and longest >= reach:
            count = min(count, sum(int(lengths[row]) == longest for row in order))
        rows, order = order[:count], order[count:]
        places = torch.full((len(rows), longest), -1, dtype=torch.long)
        for i, row in enumerate(rows):
            positions = batch.attention_mask[row].nonzero().squeeze(1)
            places[i, : len(positions)] = positions + row * width
        real = places >= 0
        input_ids = batch.input_ids.flatten()[places.clamp(min=0)].masked_fill(~real, 0)
        yield input_ids, real.long(), places


def _check(model: nn.Module, batch: TokenBatch) -> None:
    base = unwrap(model)
    config = base.config.get_text_config()
    if any(getattr(c, "is_prompt_learning", False) for c in getattr(model, "peft_config", {}).values()):
        raise ValueError(
            "The model has a prompt-learning adapter – expected LoRA or another one without virtual tokens: they are "
            "not fed through `read`."
        )
    if batch.input_ids.numel() and int(batch.input_ids.max()) >= config.vocab_size:
        raise ValueError(
            f"Token id {int(batch.input_ids.max())} – expected ids below the model's vocabulary of {config.vocab_size}. "
            "Use the model's own tokenizer."
        )
    require_positions(model, batch)
