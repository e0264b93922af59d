"""`read()`: batched scoring of texts or token batches by a model, stopping at the deepest hook point.

In: a model, a token batch (or texts and a tokenizer), readouts. Out: scores per token, aligned with the batch that came
in. Padding never reaches the scores: rows are stripped of it, sorted by length and padded anew on the right, so that
position ids are right on every architecture.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..messages import as_list
from .batch import ConceptScores, TokenBatch, tokenize_examples
from .counted import end_of_turn_ids
from .hook_points import (
    INPUT,
    backbone,
    decoder_layers,
    device_of,
    on_activation,
    unwrap,
    without_engine,
)
from .noise import rope_from_the_start, rope_reach, runs_here
from .ranks import most_of_all_ranks
from .sharding import is_sharded, readable
from .tap import group_by_hook_point, reading, run_readouts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from .tap import TokenReadout

logger = logging.getLogger(__name__)

# Sees the rows of a batch, their token positions and the activation (rows, T, D) at one hook point.
Sink = Callable[[str, torch.Tensor, torch.Tensor], None]
# Sees token positions and their logits (rows, L, V): those of the last L positions of a bucket.
LogitSink = Callable[[torch.Tensor, torch.Tensor], None]


# Initializations of LoRA that change the base model's own weights.
CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Parts of a parameter's name by which PEFT marks what belongs to an adapter, beside each tuner's own prefix.
_OF_ADAPTERS = ("modules_to_save.", "trainable_tokens_", "original_module.")

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
    _forward(model, batch, list(groups), _scoring(batch, groups, scores), batch_tokens, progress)
    return _concept_scores(batch, readouts, scores, reader)


def _scoring(batch: TokenBatch, groups: Mapping[str, Any], scores: dict[str, torch.Tensor]) -> Sink:
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


def _concept_scores(
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


# Name of what is pooled to its hook point and its weights (B, T).
Pooled = Mapping[Any, tuple[str, torch.Tensor]]


def read_pooled(
    model: nn.Module,
    batch: TokenBatch,
    pooled: Pooled,
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
    found: dict[Any, torch.Tensor] = {}
    points = list(dict.fromkeys(point for point, _ in pooled.values()))
    _forward(model, batch, points, _pooling(batch, pooled, found), batch_tokens, progress)
    return found


def _pooling(batch: TokenBatch, pooled: Pooled, found: dict[Any, torch.Tensor]) -> Sink:
    """A sink that adds up activations by their weights."""
    width = batch.input_ids.shape[1]
    flat = {name: weights.float().flatten() for name, (_, weights) in pooled.items()}

    def sink(hook_point: str, places: torch.Tensor, activation: torch.Tensor) -> None:
        rows = places.max(dim=1).values // width
        for name, (point, _) in pooled.items():
            if point != hook_point:
                continue
            if name not in found:
                found[name] = torch.zeros(len(batch), activation.shape[-1])
            weights = flat[name][places.clamp(min=0)].masked_fill(places < 0, 0).to(activation.device)
            found[name][rows] = torch.einsum("btd,bt->bd", activation.detach().float(), weights).cpu()

    return sink


def read_with_likelihood(
    model: nn.Module,
    batch: TokenBatch,
    readouts: Sequence[TokenReadout],
    pooled: Pooled,
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
    keep, add = _scoring(batch, groups, scores), _pooling(batch, pooled, sums)
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
            found = logits[row, here.to(logits.device)].float()
            said = found.gather(1, ids[tokens, None].to(found.device))[:, 0]
            log_probs[tokens] = (said - found.logsumexp(-1)).cpu()

    points = list(dict.fromkeys([*groups, *(point for point, _ in pooled.values())]))
    _forward(model, batch, points, sink, batch_tokens, progress, predictions)
    return _concept_scores(batch, readouts, scores, reader), sums, log_probs.view(batch.input_ids.shape)


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
    found, sink = _collect(batch.completion_mask if tokens is None else tokens)
    _forward(model, batch, list(dict.fromkeys(as_list(hook_points))), sink, batch_tokens, None)
    return found


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
    found, sink = _collect(batch.completion_mask)
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
            found = logits[row, here.to(logits.device)].float().log_softmax(-1).cpu()
            tokens = line[1:][here]
            log_probs[target[tokens]] = found.gather(1, ids[tokens, None])[:, 0]
            for place, prediction in zip(wanted[target[tokens]].tolist(), found, strict=True):
                if place >= 0:
                    rows[place] = prediction.clone()

    _forward(model, batch, list(dict.fromkeys(as_list(hook_points))), sink, batch_tokens, None, predictions)
    return found, log_probs, torch.stack([rows[i] for i in range(len(kept))])


def _collect(tokens: torch.Tensor) -> tuple[dict[str, torch.Tensor], Sink]:
    """A sink that keeps the activations of some tokens in the order of the batch, and where it keeps them."""
    counted = tokens.flatten()
    target = counted.cumsum(0) - 1  # row in the result of each counted token
    found: dict[str, torch.Tensor] = {}

    def sink(hook_point: str, places: torch.Tensor, activation: torch.Tensor) -> None:
        if hook_point not in found:
            found[hook_point] = torch.zeros(int(counted.sum()), activation.shape[-1])
        wanted = (places >= 0) & counted[places.clamp(min=0)]
        found[hook_point][target[places[wanted]]] = activation.detach().float().cpu()[wanted]

    return found, sink


def read_inputs(
    model: nn.Module, inputs: Mapping[str, Any], readouts: Sequence[TokenReadout]
) -> dict[str, torch.Tensor]:
    """Scores of a batch in the very form in which a trainer feeds it, packed rows and all, by one forward that stops at the
    deepest hook point, unless parameters are sharded (see `read`).

    Args:
        model (`nn.Module`): a causal LM, read as its adapters stand.
        inputs (`dict`): the backbone's own keyword arguments: `input_ids` and, as the trainer has them, `attention_mask`,
            `position_ids`, lengths of packed sequences.
        readouts (`Sequence[TokenReadout]`): what to read.

    Returns:
        `dict[str, torch.FloatTensor]`: scores (B, T, K) by the readout's name, float32, on the model's device.
    """
    groups = group_by_hook_point(readouts)
    sharded = is_sharded(model)
    core = unwrap(model) if sharded else backbone(model)
    waiting = set(groups)
    scores: dict[str, torch.Tensor] = {}

    def hook(point: str) -> Callable[[torch.Tensor], None]:
        def run(activation: torch.Tensor) -> None:
            run_readouts(groups[point], activation, scores)
            waiting.discard(point)
            if not waiting and not sharded:
                raise _Done

        return run

    handles = [on_activation(model, point, hook(point)) for point in groups]
    try:
        prepared = readable(model, predictions=False) if sharded else nullcontext()
        with prepared, reading(), measuring(core), torch.no_grad():
            (model if sharded else core)(**{**inputs, "use_cache": False})
    except _Done:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if waiting:
        raise _did_not_fire(waiting, core)
    return scores


def stream_point(model: nn.Module) -> str:
    """Hook point of the residual stream before the first layer: what that layer is given.

    The module that gives it out where there is one (the embedding in Llama, the dropout after it in GPT-2), found by running the
    model on three tokens; else the first layer's input: some models scale or normalize the embedding outside of any module.
    """
    base, first = unwrap(model), decoder_layers(model)[0]
    if not runs_here(base):
        return f"{first}{INPUT}"
    blocks = first.rpartition(".")[0]
    names = [name for name, _ in base.named_modules() if name and not f"{name}.".startswith(f"{blocks}.")]
    before = [name for name in names if not blocks.startswith(f"{name}.") and name != blocks]
    given: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: given.__setitem__(name, output)

    def stop(activation: torch.Tensor) -> None:
        given[""] = activation
        raise _Done

    modules = dict(base.named_modules())
    handles = [modules[name].register_forward_hook(keep(name)) for name in before]
    handles.append(on_activation(base, f"{first}{INPUT}", stop))
    ids = torch.arange(3, 6, device=device_of(base))[None]
    try:
        with reading(), measuring(backbone(base)), torch.no_grad():
            backbone(base)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except _Done:
        pass
    finally:
        for handle in handles:
            handle.remove()
    same = [name for name, output in given.items() if name and _equal(output, given[""])]
    return same[-1] if same else f"{first}{INPUT}"


def _equal(output: Any, activation: torch.Tensor) -> bool:
    return (
        isinstance(output, torch.Tensor) and output.shape == activation.shape and bool(torch.equal(output, activation))
    )


@contextmanager
def adapters_off_in(model: nn.Module) -> Iterator[nn.Module]:
    """The model below its adapters, whatever they are; as it is where it has none."""
    peft_model = without_engine(model)
    with peft_model.disable_adapter() if hasattr(peft_model, "disable_adapter") else nullcontext():
        yield model


@contextmanager
def reference_pass(model: nn.Module, reference: nn.Module | None = None) -> Iterator[nn.Module]:
    """The frozen reference: `reference` where one is given, else the model with its adapters off.

    An adapter named `ref` is taken instead of no adapter, as TRL does.

    Raises:
        `ValueError`: a model without adapters and no reference.
    """
    if reference is not None:
        yield reference
        return
    peft_model = without_engine(model)
    if not hasattr(peft_model, "disable_adapter"):
        raise ValueError(
            f"`{type(peft_model).__name__}` has no adapters to switch off and no reference model was given – expected "
            "one of the two. Train with PEFT, or pass the reference model."
        )
    if "ref" not in peft_model.peft_config:
        with peft_model.disable_adapter():
            yield model
        return
    active, together = peft_model.active_adapter, list(peft_model.base_model.active_adapters)
    peft_model.set_adapter("ref")
    try:
        yield model
    finally:
        peft_model.set_adapter(active)
        if together != [active]:  # several at once, which only the tuner knows of
            peft_model.base_model.set_adapter(together)


def require_reference_below(model: nn.Module) -> None:
    """Raises `ValueError` where a PEFT policy without its adapters, or with TRL's copy of them, is not what training begins with.

    Something below the adapters is trained, their initialization changed the base, or TRL copied one of several.
    """
    peft_model = without_engine(model)
    together = list(getattr(peft_model.base_model, "active_adapters", []))
    if "ref" in peft_model.peft_config and len(together) > 1:
        raise ValueError(
            f"The policy has the active adapters {', '.join(f'`{name}`' for name in together)} – expected one: TRL copies one of "
            "them as the reference (`ref`), which is not what training begins with. Merge the others into the base first "
            "(`merge_and_unload`), or pass `reference=` to `attach`."
        )
    moving = trained_below_adapters(model)
    changed = [
        name for name, config in peft_model.peft_config.items()
        if str(getattr(config, "init_lora_weights", "")).startswith(CHANGING)
    ]  # fmt: skip
    if changed:
        how = peft_model.peft_config[changed[0]].init_lora_weights
        raise ValueError(
            f"The adapter `{changed[0]}` was initialized by `{how}`, which takes a part of the base model's weights into the "
            "adapter – "
            "expected the default: with adapters off the base is another model than the one that was loaded. Set "
            "`init_lora_weights=True`, or pass `reference=` to `attach`."
        )
    if moving:
        raise ValueError(
            f"`{moving[0]}` and {len(moving) - 1} other parameters of the base model are trained along with the adapter – "
            "expected a "
            "frozen base: with adapters off it is the reference, and it would move. Set `bias='none'` in the adapter's "
            "configuration and freeze the base, or pass `reference=` to `attach`."
        )


def trained_below_adapters(model: nn.Module) -> list[str]:
    """Trainable parameters of a PEFT model that no adapter owns, so that they act with adapters off too."""
    peft_model = without_engine(model)
    prefix = getattr(getattr(peft_model, "base_model", None), "prefix", "") or ""
    marks = (*_OF_ADAPTERS, *([prefix] if prefix else []))
    return [
        name for name, parameter in peft_model.named_parameters() if parameter.requires_grad and not any(m in name for m in marks)
    ]  # fmt: skip


def _forward(
    model: nn.Module,
    batch: TokenBatch,
    hook_points: Sequence[str],
    sink: Sink,
    batch_tokens: int,
    progress: str | None,
    predictions: LogitSink | None = None,
) -> None:
    """Runs the backbone over the batch in length buckets and hands every hook point's activation to `sink`.

    With `predictions` the whole model runs, and the logits from which the counted tokens are predicted go there (of all
    positions, where the model cannot choose). So it does, from the wrapper that is given, where its
    parameters are sharded: then on all ranks together, the same number of times, and without stopping early.
    """
    _check(model, batch)
    sharded = is_sharded(model)
    whole = sharded or predictions is not None
    core = unwrap(model) if whole else backbone(model)
    run = model if sharded else core
    trimmed = (
        predictions is not None and not sharded and "logits_to_keep" in inspect.signature(core.forward).parameters
    )
    counted = batch.completion_mask.flatten()
    waiting: set[str] = set()
    places = torch.empty(0)
    idle = False  # a rank that has no rows left runs along

    def hook(point: str) -> Callable[[torch.Tensor], None]:
        def fired(activation: torch.Tensor) -> None:
            if idle:
                return
            if activation.shape[:2] != places.shape:
                raise ValueError(
                    f"The activation at `{point}` has shape {tuple(activation.shape)} for {tuple(places.shape)} tokens – "
                    "expected one vector per token. Read at a decoder layer."
                )
            sink(point, places, activation)
            waiting.discard(point)
            if not waiting and not whole:
                raise _Done

        return fired

    handles = [on_activation(model, point, hook(point)) for point in hook_points]
    device = device_of(model)
    reach = rope_reach(model)
    buckets = _buckets(batch, batch_tokens, reach)
    prepared = readable(model, predictions is not None) if sharded else nullcontext()
    rope = rope_from_the_start(model) if reach is not None else nullcontext(lambda: None)
    bar = tqdm(
        total=int(batch.attention_mask.sum()), desc=progress, unit="token", disable=progress is None, leave=False
    )
    try:
        with bar, prepared, reading(), measuring(core), torch.no_grad(), rope as forget:
            for bucket in _for_all_ranks(buckets, device) if sharded else buckets:
                idle = bucket is None
                input_ids, attention_mask, places = bucket or _NO_ROWS
                waiting = set(hook_points)
                forget()
                try:
                    output = run(
                        input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False,
                        **({"logits_to_keep": _from_the_first(counted, places)} if trimmed else {}),
                    )  # fmt: skip
                except _Done:
                    pass
                else:
                    if idle:
                        continue
                    if waiting or not whole:
                        raise _did_not_fire(waiting, core)
                    if predictions is not None:
                        predictions(places[:, places.shape[1] - output.logits.shape[1] :], output.logits)
                bar.update(int(attention_mask.sum()))
    finally:
        for handle in handles:
            handle.remove()


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


def _did_not_fire(points: set[str], core: nn.Module) -> RuntimeError:
    return RuntimeError(
        f"Hook point {', '.join(f'`{point}`' for point in sorted(points))} did not fire in a forward of "
        f"`{type(core).__name__}` – expected a module that runs in every pass, such as a decoder layer."
    )


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


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Without dropout, so that a reading repeats and draws no random numbers; every module's flag is put back as it was.

    The trainer's own model object keeps its flag: TRL reads its mode from it, and only the backbone is touched.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def require_positions(model: nn.Module, batch: TokenBatch) -> None:
    """Raises `ValueError` for rows that are longer than a model's learned positions; warns where positions are rotary."""
    config = unwrap(model).config.get_text_config()
    longest = int(batch.attention_mask.sum(1).max()) if batch.attention_mask.numel() else 0
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or longest <= limit or rope_reach(model) is not None:
        return
    if getattr(config, "rope_parameters", None) is None:
        raise ValueError(
            f"A row has {longest} tokens – expected at most {limit}, the model's learned positions. Cut it."
        )
    logger.warning(
        "A row has %d tokens and the model was trained on %d positions: what it makes of the rest says little. Cut it.",
        longest, limit,
    )  # fmt: skip


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
