"""`attribution_patching`: where in a model a contrast acts, by attribution and by exact patching next to it.

In: a model, contrast pairs, what to measure. Out: a `Patching`: attributions of every site, and of some sites the exact
effects. It must not know how they are shown.

Source: attribution patching (Nanda 2023; Syed et al., arXiv 2310.10348), and integrated gradients (Sundararajan et al., arXiv
1703.01365) on the line between two activations, as in Marks et al. (arXiv 2403.19647). Deviation: sites are chosen on one part of
the pairs and reported on the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from ..activations.batch import TokenBatch
from ..activations.components import ATTENTION_OUT, COMPONENTS, HEADS, MLP_OUT, RESIDUAL, component_points, head_count
from ..activations.hook_points import hidden_size, unwrap
from ..activations.noise import require_positions, runs_here
from ..messages import as_list
from .contrast_pairs import tokenize_pairs
from .patch_metrics import as_metric
from .patch_sites import GROUPS, from_the_end, sites_of
from .patching_passes import Sides, attribute_pair, exact_effects
from .statistics import spearman

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..concepts.readout import Readout
    from .contrast_pairs import TokenPair
    from .patch_metrics import LogitFunction, PatchMetric
    from .patch_sites import Site

RECALL_AT = 5  # sites
Maps = dict[str, np.ndarray]


@dataclass(frozen=True)
class PatchedSite:
    """A site that was patched exactly.

    Attributes:
        site (`Site`): where.
        top (`bool`): it is among the `top` of the choosing pairs; otherwise it was drawn at random.
        chosen (`float`): its attribution on the choosing pairs.
        attribution (`float`), exact (`float`): estimated and exact effect on the evidence pairs: the metric of the corrupt run
            with the clean activation here, less that of the corrupt run. Means over pairs.
    """

    site: Site
    top: bool
    chosen: float
    attribution: float
    exact: float


@dataclass(frozen=True)
class GroupEffects:
    """Exact effects of sites that are ranked together, and how well attribution foresaw them.

    Attributes:
        group (`str`): `outputs` (attention and MLP), `heads` or `residual`.
        candidates (`int`): sites of the group.
        sites (`list[PatchedSite]`): those that were patched, the largest exact effect first.
        spearman (`float`, *optional*): rank correlation of attribution and exact effect over these sites, in [−1, 1].
        spearman_random (`float`, *optional*): the same over the sites that were drawn at random from all candidates.
        recall (`float`, *optional*): share of the `recall_at` sites of largest exact effect that are among the `recall_at` of
            largest attribution; both by absolute value, among the sites that were patched.
        recall_at (`int`): that number.
        recall_by_chance (`float`): what a random order would have.
    """

    group: str
    candidates: int
    sites: list[PatchedSite]
    spearman: float | None
    spearman_random: float | None
    recall: float | None
    recall_at: int
    recall_by_chance: float

    def to_json(self) -> dict[str, Any]:
        """The effects as a JSON object."""
        sites = [
            {
                **one.site.to_json(), "top": one.top, "chosen": one.chosen, "attribution": one.attribution, "exact": one.exact,
            } for one in self.sites
        ]  # fmt: skip
        return {**vars(self), "sites": sites}


@dataclass(frozen=True)
class Patching:
    """Where a contrast acts.

    Attributes:
        metric (`str`): what was measured, in words.
        steps (`int`): gradients per pair.
        tuned (`bool`): activations of a tuned model were put into its base; otherwise those of the clean prompt into the
            corrupt one.
        hook_points (`dict[str, list[str]]`): component to hook points, one per block.
        positions (`list[str]`): positions of the maps, counted from the end, with the token where all prompts share it.
        left_out (`int`): positions of all prompts that have no partner in the other prompt of their pair.
        choosing, evidence (`list[int]`): numbers of the pairs that chose the sites, and of those that the evidence is on. Both
            are all pairs where nothing was split.
        clean, corrupt (`list[float]`): metric of each pair's two runs.
        chosen (`dict[str, np.ndarray]`): component to mean attribution on the choosing pairs, of shape (blocks, positions); of
            heads (blocks, heads, positions).
        attribution (`dict[str, np.ndarray]`): the same on the evidence pairs.
        exact (`list[GroupEffects]`): exact effects, by group of sites.
    """

    metric: str
    steps: int
    tuned: bool
    hook_points: dict[str, list[str]]
    positions: list[str]
    left_out: int
    choosing: list[int]
    evidence: list[int]
    clean: list[float]
    corrupt: list[float]
    chosen: Maps
    attribution: Maps
    exact: list[GroupEffects]

    def top(self, components: Sequence[str], count: int, chosen: bool = True) -> list[tuple[Site, float]]:
        """The sites of largest absolute attribution over all positions, on the choosing pairs or on the evidence pairs."""
        maps = self.chosen if chosen else self.attribution
        present = [name for name in components if name in maps]
        heads = maps[HEADS].shape[1] if HEADS in maps else 0
        sites = sites_of(self.hook_points, present, heads, len(self.positions), whole=True)
        return sorted(((site, site.value(maps)) for site in sites), key=lambda one: -abs(one[1]))[:count]

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object; arrays are nested lists."""
        maps = {
            name: {key: array.tolist() for key, array in getattr(self, name).items()}
            for name in ("chosen", "attribution")
        }
        return {**vars(self), **maps, "exact": [one.to_json() for one in self.exact]}


@dataclass(frozen=True)
class _Plan:
    """The arguments of `attribution_patching` that are numbers or names, checked."""

    components: list[str]
    steps: int
    align: bool
    top: int
    random: int | None
    split: int | None
    seed: int
    per_position: bool
    progress: bool

    def __post_init__(self) -> None:
        unknown = sorted(set(self.components) - set(COMPONENTS))
        if unknown or not self.components:
            known = ", ".join(f"`{name}`" for name in COMPONENTS)
            raise ValueError(f"`components` is {self.components} – expected some of {known}.")
        for name, least in (("steps", 1), ("top", 0), ("random", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` is {value} – expected at least {least}.")


def attribution_patching(
    model: Any,
    tokenizer: Any,
    pairs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    components: Sequence[str] = (ATTENTION_OUT, MLP_OUT),
    metric: Readout | LogitFunction | None = None,
    tuned: Any = None,
    steps: int = 1,
    align: bool = False,
    top: int = 10,
    random: int | None = 20,
    split: int | None = 0,
    seed: int = 0,
    per_position: bool = False,
    progress: bool = False,
) -> Patching:
    """Where in a model a contrast acts: the effect of every site by attribution, and of some sites exactly.

    Effect of a site: metric of the corrupt run with this site's activation of the clean run, less metric of the corrupt run.
    All are estimated from one clean forward, one corrupt forward and one backward per pair, and some are measured, a run each.
    The model is left as it was: flags, hooks, random state, gradients and `requires_grad` of its parameters.

    Args:
        model (`nn.Module`), tokenizer: a causal LM in one piece, plain or with PEFT adapters.
        pairs (`list[dict]`): with `clean` and `corrupt` (texts or messages), `followed` and `violated` (texts of two answers).
        components (`Sequence[str]`): some of `residual`, `attention`, `mlp` and `heads`, see `component_points`.
        metric (`Readout` or `Callable`, *optional*): log-odds of a readout over the prompt, or a function of logits (B, T, V)
            that returns (B,), in place of log p(followed) − log p(violated). It needs no answers.
        tuned (`nn.Module`, *optional*): its activations on the clean prompt are put into `model` on the same prompt. `model`
            itself, if it has adapters, is compared with the model below them.
        steps (`int`, defaults to 1): gradients per pair, see `attribute_pair`.
        align (`bool`): match prompts of unequal length by their common beginning and end.
        top (`int`), random (`int`, *optional*): sites of each group to measure: those of largest attribution on the choosing
            pairs, and some drawn at random. None draws all.
        split (`int`, *optional*): seed by which half of the pairs choose and the others are the evidence. None: all do both.
        seed (`int`): seed of the random sites.
        per_position (`bool`): measure one position at a time. The residual stream always is, unless two models are compared.

    Raises:
        `ValueError`: pairs of another form or of unequal length, an unknown component, models that do not belong together.

    Example:
        >>> from interp_rlhf import attribution_patching
        >>> pairs = [{"clean": f"{w} sun is", "corrupt": f"{w} rain is", "followed": " good", "violated": " bad"} for w in "ab"]
        >>> attribution_patching(model, tokenizer, pairs, top=2, random=3).attribution["mlp"].shape[0]  # blocks
        3
    """
    plan = _Plan(as_list(components), steps, align, top, random, split, seed, per_position, progress)
    _require_models(model, tuned)
    return _carry_out(Sides(model, tuned), as_metric(metric, model), tokenizer, pairs, plan)


def _carry_out(
    sides: Sides,
    metric: PatchMetric,
    tokenizer: Any,
    pairs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    plan: _Plan,
) -> Patching:
    model, tuned = sides.model, sides.tuned
    tokens = tokenize_pairs(pairs, tokenizer, answers=metric.answers, align=plan.align, one_prompt=tuned is not None)
    for one in (model, tuned):
        _require_readable(one, tokens)
    choosing, evidence = _split_pairs(tokens, plan.split)
    points = {name: component_points(model, name) for name in COMPONENTS if name in plan.components}
    heads = head_count(model) if HEADS in points else 1
    every = tqdm(tokens, desc="Pairs", disable=not plan.progress, leave=False)
    effects = [attribute_pair(sides, metric, pair, points, heads, plan.steps) for pair in every]
    width = max(len(pair.pieces) for pair in tokens)
    chosen, attribution = (
        {name: from_the_end([effects[i].maps[name] for i in part], width) for name in points}
        for part in (choosing, evidence)
    )
    patching = Patching(
        metric.name, plan.steps, tuned is not None, points, _position_names(tokens, width), sum(pair.left_out for pair in tokens),
        choosing, evidence, [one.clean for one in effects], [one.corrupt for one in effects], chosen, attribution, [],
    )  # fmt: skip
    if plan.top == 0 and plan.random == 0:
        return patching
    of_groups = _sites_to_patch(patching, heads, plan)
    values = _patch_all(sides, metric, [tokens[i] for i in evidence], of_groups, heads, plan.progress)
    exact = [_group_effects(name, of_groups[name], values[name], patching) for name in of_groups]
    return replace(patching, exact=exact)


def _require_models(model: Any, tuned: Any) -> None:
    for name, one in (("model", model), ("tuned", tuned)):
        if one is not None and not runs_here(one):
            raise ValueError(
                f"`{name}` is in pieces or on the meta device – expected a model in one piece. Load it on one device for this."
            )
        if any(getattr(config, "is_prompt_learning", False) for config in getattr(one, "peft_config", {}).values()):
            raise ValueError(
                f"`{name}` has a prompt-learning adapter – expected LoRA or another one without virtual tokens, which are not "
                "fed through here."
            )
    if tuned is None:
        return
    if unwrap(tuned) is unwrap(model) and not hasattr(tuned, "disable_adapter"):
        raise ValueError("`tuned` is `model` itself, without adapters – expected a model that differs from it.")
    shapes = [(len(component_points(one, RESIDUAL)), hidden_size(one)) for one in (model, tuned)]
    if shapes[0] != shapes[1] or component_points(model, RESIDUAL) != component_points(tuned, RESIDUAL):
        raise ValueError(
            f"`model` has {shapes[0][0]} blocks of width {shapes[0][1]} and `tuned` {shapes[1][0]} of width {shapes[1][1]} – "
            "expected one architecture. Pass a model that was made from `model`."
        )


def _require_readable(model: Any, tokens: Sequence[TokenPair]) -> None:
    """Raises `ValueError` for prompts that a model cannot read: unknown token ids, or more tokens than it has positions."""
    if model is None:
        return
    known = int(unwrap(model).get_input_embeddings().weight.shape[0])
    for number, pair in enumerate(tokens, 1):
        for rows in (pair.clean, pair.corrupt):
            highest = max(int(rows.input_ids.max()), *(max(answer) for answer in rows.answers), 0)
            if highest >= known:
                raise ValueError(
                    f"Pair {number} has the token id {highest} – expected ids below the model's vocabulary of {known}. Use the "
                    "model's own tokenizer."
                )
            require_positions(model, TokenBatch(rows.input_ids, rows.attention_mask, rows.attention_mask))


def _split_pairs(tokens: Sequence[TokenPair], split: int | None) -> tuple[list[int], list[int]]:
    """Indices of the choosing pairs and of the evidence pairs. Pairs with one clean prompt stay together."""
    every = list(range(len(tokens)))
    if split is None:
        return every, every
    groups = list(dict.fromkeys(pair.group for pair in tokens))
    if len(groups) < 2:
        raise ValueError(
            f"The {len(tokens)} pairs have one clean prompt – expected at least two: one part chooses the sites, the other gives "
            "the evidence. Add pairs, or pass `split=None` (`--no-split`) to use all pairs for both."
        )
    order = np.random.default_rng(split).permutation(len(groups))
    first = {groups[i] for i in order[: len(groups) // 2]}
    return [i for i in every if tokens[i].group in first], [i for i in every if tokens[i].group not in first]


def _position_names(tokens: Sequence[TokenPair], width: int) -> list[str]:
    names = []
    for place in range(-width, 0):
        pieces = {pair.pieces[place] for pair in tokens if -place <= len(pair.pieces)}
        names.append(f"{place} {pieces.pop().strip()}".rstrip() if len(pieces) == 1 else str(place))
    return names


@dataclass(frozen=True)
class _Candidates:
    """Sites of a group: all, those of largest attribution on the choosing pairs, and those drawn at random."""

    every: list[Site]
    best: list[Site]
    drawn: list[Site]

    @property
    def patched(self) -> list[Site]:
        return list(dict.fromkeys([*self.best, *self.drawn]))


def _sites_to_patch(patching: Patching, heads: int, plan: _Plan) -> dict[str, _Candidates]:
    candidates = {}
    for group, own in GROUPS.items():
        present = [name for name in own if name in patching.hook_points]
        if not present:
            continue
        whole = not plan.per_position and (group != RESIDUAL or patching.tuned)
        every = sites_of(patching.hook_points, present, heads, len(patching.positions), whole)
        ranked = sorted(every, key=lambda site: -abs(site.value(patching.chosen)))
        count = len(every) if plan.random is None else min(plan.random, len(every))
        drawn = np.random.default_rng(plan.seed).permutation(len(every))[:count]
        candidates[group] = _Candidates(every, ranked[: plan.top], [every[i] for i in sorted(drawn.tolist())])
    return candidates


def _patch_all(
    sides: Sides,
    metric: PatchMetric,
    pairs: Sequence[TokenPair],
    of_groups: Mapping[str, _Candidates],
    heads: int,
    progress: bool,
) -> dict[str, dict[Site, float]]:
    """By group, the mean exact effect of each site that is to be patched."""
    wanted = {group: candidates.patched for group, candidates in of_groups.items()}
    sums = {group: np.zeros(len(sites)) for group, sites in wanted.items()}
    with tqdm(total=len(pairs) * len(wanted), desc="Exact patching", disable=not progress, leave=False) as bar:
        for pair in pairs:
            for group, sites in wanted.items():
                sums[group] += exact_effects(sides, metric, pair, sites, heads) / len(pairs)
                bar.update()
    return {group: dict(zip(sites, sums[group].tolist(), strict=True)) for group, sites in wanted.items()}


def _group_effects(
    group: str, candidates: _Candidates, exact: Mapping[Site, float], patching: Patching
) -> GroupEffects:
    best, at_random = set(candidates.best), set(candidates.drawn)
    sites = [
        PatchedSite(site, site in best, site.value(patching.chosen), site.value(patching.attribution), effect)
        for site, effect in sorted(exact.items(), key=lambda one: -abs(one[1]))
    ]
    estimated, real = (np.array([getattr(one, name) for one in sites]) for name in ("attribution", "exact"))
    drawn = np.array([one.site in at_random for one in sites], dtype=bool)
    at = min(RECALL_AT, len(sites))
    largest = [set(np.argsort(-np.abs(values), kind="stable")[:at].tolist()) for values in (estimated, real)]
    return GroupEffects(
        group, len(candidates.every), sites, spearman(estimated, real), spearman(estimated[drawn], real[drawn]),
        len(largest[0] & largest[1]) / at if at else None, at, at / len(sites) if sites else 0.0,
    )  # fmt: skip
