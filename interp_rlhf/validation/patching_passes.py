"""The passes of patching: activations of a run, gradients with respect to them, and runs in which they are replaced.

In: a model, a metric, a pair of prompts, sites. Out: one number per site. Models are left as they were: flags, hooks, random
state, gradients of parameters. It must not know how sites are chosen, nor what is reported.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..activations.components import HEADS
from ..activations.hook_points import INPUT, embedding_point, is_tuner_layer, output_hook, resolve, unwrap
from ..activations.noise import rope_from_the_start
from ..activations.own_passes import measuring, reading
from ..activations.sharding import switch_adapters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn

    from .contrast_pairs import PromptRows, TokenPair
    from .patch_metrics import PatchMetric
    from .patch_sites import Site

    See = Callable[[torch.Tensor], torch.Tensor | None]

BATCH_TOKENS = 1024  # per forward of exact patching: more is no faster on a CPU
Activations = dict[str, torch.Tensor]  # hook point → activation (N, D) at the N places of a pair


@dataclass(frozen=True)
class Sides:
    """The model that is patched, and the one whose activations are put in: the same one, unless two models are compared.

    Attributes:
        model (`nn.Module`): the model of the corrupt runs.
        tuned (`nn.Module`, *optional*): the model of the clean runs. If it is `model` itself, its adapters are off in corrupt
            runs.
    """

    model: nn.Module
    tuned: nn.Module | None = None

    @contextmanager
    def clean(self) -> Iterator[nn.Module]:
        """The model of clean runs, ready to run."""
        model = self.model if self.tuned is None else self.tuned
        with _own_passes(model):
            yield model

    @contextmanager
    def corrupt(self) -> Iterator[nn.Module]:
        """The model of corrupt runs, ready to run."""
        one = self.tuned is not None and unwrap(self.tuned) is unwrap(self.model)
        layers = [module for module in unwrap(self.model).modules() if is_tuner_layer(module)] if one else []
        on = [layer for layer in layers if not layer.disable_adapters]
        switch_adapters(on, enabled=False)
        try:
            with _own_passes(self.model):
                yield self.model
        finally:
            switch_adapters(on, enabled=True)


@contextmanager
def _own_passes(model: nn.Module) -> Iterator[None]:
    # Gradients are on from here: `inference_mode(False)` switches them on.
    with reading(), measuring(unwrap(model)), torch.inference_mode(False), rope_from_the_start(model) as forget:
        forget()
        yield


@dataclass(frozen=True)
class PairEffects:
    """What attribution says of one pair.

    Attributes:
        clean, corrupt (`float`): the metric of both runs.
        maps (`dict[str, np.ndarray]`): component to attributions of shape (blocks, places), of heads (blocks, heads, places).
    """

    clean: float
    corrupt: float
    maps: dict[str, np.ndarray]


def attribute_pair(
    sides: Sides, metric: PatchMetric, pair: TokenPair, points: Mapping[str, Sequence[str]], heads: int, steps: int
) -> PairEffects:
    """Gradient times difference of activations at every site: one clean forward, and one corrupt forward with its backward.

    With more than one step the gradient at a hook point is the mean over so many points on the straight line between its
    corrupt and its clean activation, at the middles of equal parts (integrated gradients). The sum over all positions of a
    hook point then tends to the exact effect of patching them all. It costs `steps` forwards and backwards per hook point.
    """
    every = [point for of_component in points.values() for point in of_component]
    with sides.clean() as model, torch.no_grad():
        clean_metric, clean = _observe(model, metric, pair.clean, every, pair.places[0])
    with sides.corrupt() as model:
        if pair.same and sides.tuned is None:  # the same run: the difference is 0, and not only nearly
            zeros = dict.fromkeys(every, np.zeros((len(pair.places[0]), 1)))
            return PairEffects(clean_metric, clean_metric, _maps(points, zeros, heads, zeros))
        corrupt_metric, corrupt, gradients = _gradients(model, metric, pair, every)
        clean = {point: activation.to(corrupt[point]) for point, activation in clean.items()}
        if steps > 1:
            for point in every:
                gradients[point] = _on_the_line(model, metric, pair, point, corrupt[point], clean[point], steps)
    differences = {point: (clean[point].double() - corrupt[point].double()).cpu().numpy() for point in every}
    slopes = {point: gradients[point].double().cpu().numpy() for point in every}
    return PairEffects(clean_metric, corrupt_metric, _maps(points, slopes, heads, differences))


def _maps(
    points: Mapping[str, Sequence[str]],
    slopes: Mapping[str, np.ndarray],
    heads: int,
    differences: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Slope times difference, summed over the width of each site."""
    maps = {}
    for component, own in points.items():
        products = [slopes[point] * differences[point] for point in own]  # (N, D) each
        if component == HEADS:
            width = max(1, products[0].shape[1] // heads)
            products = [
                np.broadcast_to(one, (len(one), heads * width)).reshape(len(one), heads, width) for one in products
            ]
            maps[component] = np.stack([one.sum(-1).T for one in products])
        else:
            maps[component] = np.stack([one.sum(-1) for one in products])
    return maps


def exact_effects(sides: Sides, metric: PatchMetric, pair: TokenPair, sites: Sequence[Site], heads: int) -> np.ndarray:
    """Change of the metric (sites,) by the clean activation in the place of the corrupt one, at one site at a time.

    Several sites share a forward, each in its own copy of the prompt, next to one copy that is not changed. A site at which both
    runs have the same activation is not run: its effect is 0.
    """
    points = list(dict.fromkeys(site.hook_point for site in sites))
    effects = np.zeros(len(sites))
    if pair.same and sides.tuned is None:
        return effects
    with sides.clean() as model, torch.no_grad():
        _, clean = _observe(model, metric, pair.clean, points, pair.places[0])
    with sides.corrupt() as model, torch.no_grad():
        _, corrupt = _observe(model, metric, pair.corrupt, points, pair.places[1])
        clean = {point: activation.to(corrupt[point]) for point, activation in clean.items()}
        patches = [_patch_of(site, clean, corrupt, pair.places[1], heads) for site in sites]
        run = [i for i, patch in enumerate(patches) if patch is not None]
        many = max(1, BATCH_TOKENS // pair.corrupt.input_ids.numel() - 1)
        for start in range(0, len(run), many):
            chunk = run[start : start + many]
            values = _patched(model, metric, pair.corrupt, [patches[i] for i in chunk])
            effects[chunk] = (values[1:] - values[0]).double().cpu().numpy()
    return effects


@dataclass(frozen=True)
class _Patch:
    """An activation (n, d) to put in at some positions of the corrupt prompt, and in some columns."""

    hook_point: str
    positions: list[int]
    columns: slice
    value: torch.Tensor


def _patch_of(
    site: Site, clean: Activations, corrupt: Activations, places: Sequence[int], heads: int
) -> _Patch | None:
    """The patch of a site; None where it would change nothing."""
    new, old = clean[site.hook_point], corrupt[site.hook_point]
    if site.position is not None and -site.position > len(places):
        return None
    rows = (
        slice(None) if site.position is None else slice(len(places) + site.position, len(places) + site.position + 1)
    )
    width = new.shape[1] // heads
    columns = slice(None) if site.head is None else slice(site.head * width, (site.head + 1) * width)
    if torch.equal(new[rows, columns], old[rows, columns]):
        return None
    return _Patch(site.hook_point, list(places[rows]), columns, new[rows, columns])


def _patched(
    model: nn.Module, metric: PatchMetric, rows: PromptRows, patches: Sequence[_Patch | None]
) -> torch.Tensor:
    """The metric without a patch, and with each of them."""
    answers, width = rows.input_ids.shape
    copies = len(patches) + 1

    def put(point: str) -> See:
        def see(activation: torch.Tensor) -> torch.Tensor:
            changed = activation.reshape(copies * answers, width, -1).clone()
            for copy, patch in enumerate(patches, 1):
                if patch is not None and patch.hook_point == point:
                    for row in range(copy * answers, (copy + 1) * answers):
                        part = changed[row]
                        part[patch.positions, patch.columns] = patch.value.to(changed)
            return changed.view_as(activation)

        return see

    points = {patch.hook_point for patch in patches if patch is not None}
    with _hooks(model, {point: put(point) for point in points}):
        return metric(model, rows, copies)


def _observe(
    model: nn.Module, metric: PatchMetric, rows: PromptRows, points: Sequence[str], places: Sequence[int]
) -> tuple[float, Activations]:
    """The metric of a run, and the activations at the places of a pair."""
    found: Activations = {}

    def keep(point: str) -> See:
        return lambda activation: found.__setitem__(point, activation)

    with _hooks(model, {point: keep(point) for point in points}):
        value = float(metric(model, rows, 1))
    return value, {point: _first_row(found[point], rows)[list(places)] for point in points}


def _gradients(
    model: nn.Module, metric: PatchMetric, pair: TokenPair, points: Sequence[str]
) -> tuple[float, Activations, Activations]:
    """The metric of a corrupt run, its activations, and the metric's gradients with respect to them.

    The embedding is a leaf of the graph, so that a frozen model has gradients too; those of parameters are not computed.
    """
    rows, places = pair.corrupt, list(pair.places[1])
    leaf = embedding_point(model)
    seen: dict[str, torch.Tensor] = {}

    def see_at(point: str) -> See:
        def see(activation: torch.Tensor) -> torch.Tensor | None:
            seen[point] = activation.detach().requires_grad_() if point == leaf else activation
            return seen[point] if point == leaf else None

        return see

    with _hooks(model, {point: see_at(point) for point in {leaf, *points}}):
        value = metric(model, rows, 1)
    if not value.requires_grad:
        raise ValueError(
            f"{metric.name} has no gradient with respect to the activations – expected a number that is computed from them. "
            "Return it without `detach` or `item`."
        )
    found = torch.autograd.grad(value.sum(), [seen[point] for point in points], allow_unused=True)
    gradients = {}
    for point, gradient in zip(points, found, strict=True):
        whole = torch.zeros_like(seen[point]) if gradient is None else gradient
        # The rows of a prompt's answers have the prompt's activations in common: one change changes them in all rows.
        gradients[point] = whole.detach().float().reshape(*rows.input_ids.shape, -1).sum(0)[places]
    return float(value.detach()), {point: _first_row(seen[point], rows)[places] for point in points}, gradients


def _on_the_line(
    model: nn.Module,
    metric: PatchMetric,
    pair: TokenPair,
    point: str,
    start: torch.Tensor,
    end: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """Mean gradient (N, D) of the metric with respect to the activation at one hook point, on the line from `start` to `end`."""
    total = torch.zeros_like(start, dtype=torch.float32)
    if torch.equal(start, end):
        return total
    answers, width = pair.corrupt.input_ids.shape
    places = torch.tensor(pair.places[1], device=start.device)
    many = max(1, BATCH_TOKENS // (answers * width))
    for first in range(0, steps, many):
        shares = [(step + 0.5) / steps for step in range(first, min(first + many, steps))]
        line = torch.stack([start + share * (end - start) for share in shares]).requires_grad_()  # (copies, N, D)

        def put(activation: torch.Tensor, line: torch.Tensor = line) -> torch.Tensor:
            rows = activation.detach().reshape(len(line) * answers, width, -1)
            changed = rows.index_copy(1, places, line.repeat_interleave(answers, 0).to(rows.dtype))
            return changed.reshape(activation.shape)

        with _hooks(model, {point: put}):
            value = metric(model, pair.corrupt, len(shares)).sum()
        (gradient,) = torch.autograd.grad(value, [line], allow_unused=True)
        total += 0 if gradient is None else gradient.detach().float().sum(0)
    return total / steps


def _first_row(activation: torch.Tensor, rows: PromptRows) -> torch.Tensor:
    """Activation (T, D) of the first row; OPT gives some modules all tokens in one row."""
    return activation.detach().reshape(*rows.input_ids.shape, -1)[0]


@contextmanager
def _hooks(model: nn.Module, see: Mapping[str, See]) -> Iterator[None]:
    """Shows the activation at each hook point to a function in every pass; what it returns takes its place.

    Nothing is added to the model, also not where the hook point is a module's input.
    """
    modules = dict(unwrap(model).named_modules())
    with ExitStack() as stack:
        for point, function in see.items():
            if point.endswith(INPUT) and point not in modules:
                handle = modules[point.removesuffix(INPUT)].register_forward_pre_hook(_before_module(function))
            else:
                # `resolve` lists all modules for each point; it is left to say which point there is not.
                module = modules[point] if point in modules else resolve(model, point)
                handle = module.register_forward_hook(output_hook(function))
            stack.callback(handle.remove)
        yield


def _before_module(function: See) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        changed = function(args[0])
        return None if changed is None else (changed, *args[1:])

    return hook
