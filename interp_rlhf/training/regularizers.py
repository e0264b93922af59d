"""Regularizers: differentiable terms on the policy's own training pass, and shifts of a preference margin.

In: activations of the counted tokens with their graph, and what was read on the reference. Out: values per sequence or per
pair, already weighted, with the metrics that explain them. They must not know which trainer they are in, nor how batches are
cut: `loss_terms` reduces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from pydantic import ValidationError
from torch.nn.functional import logsigmoid, softplus
from torch.utils.checkpoint import checkpoint

from ..concepts.card import load_card
from ..concepts.latents import Latents, block_size
from ..concepts.readout import Readout
from ..concepts.subspace import Subspace
from ..messages import as_list
from ..validation.gate import require_passed
from .from_mapping import check_options, from_mapping
from .schedule import Schedule

if TYPE_CHECKING:
    from ..activations.counted import Counted
    from ..activations.tap import TokenReadout

# Loss types of `DPOTrainer` whose value depends on β · (chosen − rejected score) alone (METHODS: EA-DPO), and those that divide
# each score by its completion's length first.
MARGIN_LOSSES = ("discopop", "exo_pair", "hinge", "robust", "sigmoid")
LENGTH_NORMALIZED_LOSSES = ("ipo", "sigmoid_norm")


class Pairs(NamedTuple):
    """What a preference trainer knows of a batch of P pairs, rows chosen first.

    Attributes:
        log_probs (`torch.Tensor` of shape (2P,)): of the policy, summed over completion tokens, with their graph.
        reference (`torch.Tensor` of shape (2P,)): of the reference.
        lengths (`torch.Tensor` of shape (2P,)): completion tokens as TRL's length-normalized losses count them.
        beta (`float`), loss_types (`list[tuple[str, float]]`): of the trainer, with the weights of the latter.
    """

    log_probs: torch.Tensor
    reference: torch.Tensor
    lengths: torch.Tensor
    beta: float
    loss_types: list[tuple[str, float]]


class Term(NamedTuple):
    """Values (U,) that are added to the loss as their mean, one per sequence or per pair, and metrics by name, one per unit."""

    values: torch.Tensor
    metrics: dict[str, torch.Tensor]


class Batch(Protocol):
    """What a regularizer sees of a training batch."""

    pairs: Pairs | None

    def tokens(self, include_end_of_turn: bool) -> Counted:
        """The counted tokens, N of them."""

    def policy(self, hook_point: str, tokens: Counted) -> torch.Tensor:
        """Activations (N, D) of the policy, float32, with their graph."""

    def reference(self, readout: TokenReadout, tokens: Counted) -> torch.Tensor:
        """Scores (N, K) of a readout on the reference, float32, without gradient."""


@dataclass(frozen=True)
class Whole:
    """Readout that keeps the activation as it is, for terms that compare all of it."""

    hook_point: str

    @property
    def name(self) -> str:
        return f"activation@{self.hook_point}"

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        return activation


@dataclass(frozen=True, eq=False)
class Projection:
    """Readout of an activation's coordinates in a subspace and of its squared norm: (..., R + 1)."""

    name: str
    subspace: Subspace

    @property
    def hook_point(self) -> str:
        return self.subspace.hook_point

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.subspace.coordinates(activation), activation.pow(2).sum(-1, keepdim=True)], dim=-1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Regularizer:
    """What all regularizers have.

    Attributes:
        weight (`float`): λ. At 0 a run is bit for bit that of plain TRL.
        schedule (`Schedule`): how λ moves over the run; constant by default.
        name (`str`): metrics are logged under `interp/<name>/`; by default the kind and the concept.
    """

    weight: float
    schedule: Schedule = field(default_factory=Schedule)
    name: str = ""

    # Whether values are per pair of a preference trainer, and trainers that it works in.
    per_pair: ClassVar[bool] = False
    trainers: ClassVar[tuple[str, ...]] = ("DPO", "GRPO", "KTO", "RLOO", "SFT")

    def __post_init__(self) -> None:
        check_options(self)
        if self.weight != self.weight or abs(self.weight) == float("inf"):
            raise ValueError(f"`weight` of a `{type(self).__name__}` is {self.weight!r} – expected a finite number.")
        if self.weight < 0 and not isinstance(self, ExplainAway):
            raise ValueError(
                f"`weight` of a `{type(self).__name__}` is {self.weight} – expected 0 or more: a negative one would reward "
                "the distance that it is there to hold."
            )

    @property
    def policy_point(self) -> str | None:
        """Hook point whose activation it needs from the policy's training pass."""
        raise AssertionError("every regularizer says it")

    @property
    def references(self) -> list[TokenReadout]:
        """Readouts that it needs on the reference."""
        raise AssertionError("every regularizer says it")

    @property
    def cards_readouts(self) -> list[Readout]:
        """Readouts that are claims about one model, checked against it."""
        return []

    @property
    def include_end_of_turn(self) -> bool:
        """Whether end-of-turn tokens count in it: as its readout says, or all that close an answer where it reads none."""
        return bool(getattr(getattr(self, "readout", None), "include_end_of_turn", True))

    def compute(self, batch: Batch, weight: float) -> Term:
        """Its values on a batch at the present weight."""
        raise AssertionError("every regularizer says it")


@dataclass(frozen=True, eq=False, kw_only=True)
class ConceptAnchor(Regularizer):
    """Holds a concept's score near the reference's: λ (⟨h_θ, r⟩ − ⟨h_0, r⟩)².

    Source: ProCon (arXiv 2509.06795), which anchors the projection on the refusal direction during fine-tuning. Deviations:
    1. r is any probe or direction, as fitted and calibrated, so that the difference is in log-odds whatever its norm.
    2. Each counted token's difference, then the mean over a sequence's tokens, then over sequences, so that long sequences do
       not weigh more; `pooled=True` squares the difference of pooled scores instead.
    3. The schedule is the caller's; theirs is strong early (`Schedule(kind="decay")`).
    4. A card's `transform` is left out, since it may clip.
    5. Of a readout with the pooling `attention` it is each token's score; with `pooled=True` where it looks is held too.

    Args:
        readout (`Readout`): the concept.
        pooled (`bool`, defaults to `False`): anchor a sequence's pooled score.
        random_direction (`int`, *optional*): the control: a seed, from which a direction of the same norm is drawn that takes
            the concept's place.
    """

    readout: Readout
    pooled: bool = False
    random_direction: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _without_transform(self)
        _named(self, f"anchor_{self.readout.name}")

    @property
    def policy_point(self) -> str:
        return self.readout.hook_point

    @property
    def references(self) -> list[TokenReadout]:
        return [self.readout]

    @property
    def cards_readouts(self) -> list[Readout]:
        return [self.readout]

    def compute(self, batch: Batch, weight: float) -> Term:
        tokens = batch.tokens(self.include_end_of_turn)
        now = self.readout(batch.policy(self.policy_point, tokens))  # (N, 1)
        start = batch.reference(self.readout, tokens)
        if self.pooled:
            gap = _pooled(self.readout, now, tokens) - _pooled(self.readout, start, tokens)  # (M,)
            gap = gap.masked_fill(~tokens.any, 0)
            values = gap.pow(2)
        else:
            each = self.readout.scale * (now - start)[:, 0]
            gap, values = tokens.means(each), tokens.means(each.pow(2))
        return Term(weight * values, {"squared_gap": values, "drift": gap})


@dataclass(frozen=True, eq=False, kw_only=True)
class DriftPenalty(Regularizer):
    """Holds the activation near the reference's: λ ‖P (h_θ − h_0)‖² / ‖h_0‖² per token, on the whole stream or in a subspace.

    Feature distillation in the residual stream, made relative so that layers of different norm weigh alike.

    Args:
        hook_point (`str`, *optional*): where, for the whole stream.
        subspace (`Subspace`, *optional*): P is the projection on it. On GRPO and RLOO there must be one: their reference pass
            comes before batches are shuffled, and only scores travel with them.
    """

    hook_point: str | None = None
    subspace: Subspace | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.hook_point is None) == (self.subspace is None):
            raise ValueError(
                f"`DriftPenalty` was given `hook_point={self.hook_point!r}` and "
                f"{'a' if self.subspace is not None else 'no'} `subspace` – expected just one: a subspace knows its hook point."
            )
        _named(self, f"drift_{self.policy_point.replace('.', '_')}")
        if self.subspace is not None:
            object.__setattr__(self, "_reference", Projection(self.name, self.subspace))
        else:
            object.__setattr__(self, "_reference", Whole(self.policy_point))

    @property
    def cards_readouts(self) -> list[Readout]:
        return list(self.subspace.sources) if self.subspace is not None else []

    @property
    def policy_point(self) -> str:
        point = self.hook_point if self.subspace is None else self.subspace.hook_point
        assert point is not None
        return point

    @property
    def references(self) -> list[TokenReadout]:
        return [self._reference]  # type: ignore[attr-defined]

    def compute(self, batch: Batch, weight: float) -> Term:
        tokens = batch.tokens(self.include_end_of_turn)
        now = batch.policy(self.policy_point, tokens)  # (N, D)
        start = batch.reference(self.references[0], tokens)
        if self.subspace is None:
            square, norm = (now - start).pow(2).sum(-1), start.pow(2).sum(-1)
        else:
            square = (self.subspace.coordinates(now) - start[:, :-1]).pow(2).sum(-1)
            norm = start[:, -1]
        values = tokens.means(square / norm.clamp(min=torch.finfo(norm.dtype).tiny))
        return Term(weight * values, {"relative_square": values})


@dataclass(frozen=True, eq=False, kw_only=True)
class FeatureConstraint(Regularizer):
    """Feature-level constrained preference optimization: δ is taken off the margin inside DPO's sigmoid.

    −log σ(z − δ), δ = α (β D(y_l) − sg[β D(y_w)]), D(x, y) = (1/k) Σ_{i ∈ I_k} (c̄_θ,i − c̄_0,i)², c̄ the mean-pooled latents and
    I_k the k largest of the policy's together with the k largest of the reference's.

    Source: FPO (arXiv 2411.07618, equations 8 to 10); α is `weight`. Deviations:
    1. z is the trainer's own margin: that of `sigmoid_norm` is FPO's, `sigmoid` is allowed too.
    2. c̄ is the mean over the answer's tokens, the end-of-turn token among them.
    3. With a probe in the place of latents there is one feature: D is the squared gap of mean scores. A card of latents gives
       its latents, not their weighed sum.
    4. α may follow a schedule.
    5. It is part of DPO's own loss, so that micro-batches of unequal size weigh as they do there: each by its mean.

    Args:
        readout (`Latents` or `Readout`): the features.
        k (`int`, defaults to 32): of latents; at most as many as there are.
        stop_gradient (`bool`, defaults to `True`): none through D(y_w).
    """

    readout: Latents | Readout
    k: int = 32
    stop_gradient: bool = True
    weight: float = 0.5

    per_pair: ClassVar[bool] = True
    trainers: ClassVar[tuple[str, ...]] = ("DPO",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise ValueError(f"`k` is {self.k} – expected a number of latents, at least 1.")
        _named(self, f"features_{self.readout.name}")
        features: Latents | Readout = self.readout
        if isinstance(features, Readout) and features.latents is not None:
            features = replace(features.latents, name=f"{features.name}_latents")
        elif isinstance(features, Readout) and features.query is not None:
            features = replace(features, query=None, pooling="mean")
        object.__setattr__(self, "_features", features)
        wide = isinstance(features, Latents) and features.size > features.width
        # The narrower of the two travels from the reference pass: latents, or the activation that they come from.
        object.__setattr__(self, "_reference", Whole(self.policy_point) if wide else features)

    @property
    def policy_point(self) -> str:
        return self.readout.hook_point

    @property
    def references(self) -> list[TokenReadout]:
        return [self._reference]  # type: ignore[attr-defined]

    @property
    def cards_readouts(self) -> list[Readout]:
        return [self.readout] if isinstance(self.readout, Readout) else []

    def compute(self, batch: Batch, weight: float) -> Term:
        assert batch.pairs is not None
        tokens = batch.tokens(self.include_end_of_turn)
        features: Latents | Readout = self._features  # type: ignore[attr-defined]
        now = _means_of(features, batch.policy(self.policy_point, tokens), tokens)  # (2P, S)
        with torch.no_grad():
            start = batch.reference(self.references[0], tokens)
            whole = isinstance(self.references[0], Whole)
            start = _means_of(features, start, tokens) if whole else tokens.means(start)
        distance = self._distance(now, start)  # (2P,)
        chosen, rejected = distance.chunk(2)
        beta = batch.pairs.beta
        kept = chosen.detach() if self.stop_gradient else chosen
        delta = weight * beta * (rejected - kept)  # (P,)
        values = torch.zeros_like(delta)
        for loss_type, share in batch.pairs.loss_types:
            z = margin(batch.pairs, loss_type)
            # What TRL's loss becomes, less what it is.
            values = values + share * (logsigmoid(z) - logsigmoid(z - delta))
        metrics = {"delta": delta, "distance_chosen": chosen, "distance_rejected": rejected}
        return Term(values, {key: value.detach() for key, value in metrics.items()})

    def _distance(self, now: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        k = min(self.k, now.shape[1])
        chosen = torch.zeros_like(now, dtype=torch.bool)
        for features in (now.detach(), start):
            chosen.scatter_(1, features.topk(k, dim=1).indices, True)
        return ((now - start).pow(2) * chosen).sum(1) / k


@dataclass(frozen=True, eq=False, kw_only=True)
class ExplainAway(Regularizer):
    """EA-DPO: a concept explains part of a preference away, or, with a negative λ, amplifies it.

    −log σ(β D_θ + λ ΔA), ΔA = A(x, y⁺) − A(x, y⁻) on the reference: what the concept's score already explains of the preference
    is not left for the policy to learn. It is plain DPO whose reference log-prob of y is lower by (λ/β) A(x, y), and that is how
    it is done; it adds no term. TRL's `rewards/*` then contain the shift; those without it are logged under `interp/<name>/`.

    Source: Goodfire (arXiv 2606.12360). Deviations:
    1. A is a probe's calibrated, pooled and transformed score, or a latent's.
    2. For `ipo` and `sigmoid_norm`, which divide by the length, the shift is multiplied by it first.
    3. A pair with a completion that has no counted token is left as plain DPO has it.

    Args:
        readout (`Readout`): the concept.
    """

    readout: Readout
    per_pair: ClassVar[bool] = True
    trainers: ClassVar[tuple[str, ...]] = ("DPO",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _named(self, f"explain_{self.readout.name}")

    @property
    def policy_point(self) -> None:
        return None

    @property
    def references(self) -> list[TokenReadout]:
        return [self.readout]

    @property
    def cards_readouts(self) -> list[Readout]:
        return [self.readout]

    def scores(self, batch: Batch) -> torch.Tensor:
        """A (2P,) of every completion; 0 for both of a pair in which one has no counted token."""
        tokens = batch.tokens(self.readout.include_end_of_turn)
        found = _pooled(self.readout, batch.reference(self.readout, tokens), tokens)
        there = tokens.any.view(2, -1).all(0).repeat(2)
        return found.masked_fill(~there, 0)

    def shift(
        self, scores: torch.Tensor, lengths: torch.Tensor, beta: float, loss_type: str, weight: float
    ) -> torch.Tensor:
        """What is taken off the reference's log-probs (2P,)."""
        shift = weight / beta * scores
        return shift * lengths if loss_type in LENGTH_NORMALIZED_LOSSES else shift


@dataclass(frozen=True, eq=False, kw_only=True)
class ConceptPenalty(Regularizer):
    """Trains against a concept's score directly: λ softplus(± s), s the log-odds of the policy's own activations.

    **This is the term that is gamed.** Its gradient runs through the probe, and the shortest way down is to move the activation
    off the probe's direction, not to change the text: in one DPO replication the term fell from 3.22 to 0.007 within 20 steps
    while a refitted probe still told the texts apart (METHODS, section 2; the Obfuscation Atlas, arXiv 2602.15515, advises
    against it altogether). It is here to study just that, so it asks for `allow_differentiable_probe=True` and for a monitor with
    another artifact beside it.

    Args:
        readout (`Readout`): the concept; its calibrated and pooled score is a log-odds. A card's `transform` is left out.
        encourage (`bool`, defaults to `False`): pay for the concept instead of against it.
        allow_differentiable_probe (`bool`): say that you have read this.
        random_direction (`int`, *optional*): the control: a seed, from which a direction of the same norm is drawn that takes the
            concept's place.
    """

    readout: Readout
    encourage: bool = False
    allow_differentiable_probe: bool = False
    random_direction: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _without_transform(self)
        _named(self, f"penalty_{self.readout.name}")
        if self.allow_differentiable_probe is not True:
            raise ValueError(
                f"`ConceptPenalty` on `{self.readout.name}` was given "
                f"`allow_differentiable_probe={self.allow_differentiable_probe!r}` "
                "– expected True. The gradient through a probe teaches the model to move its activations off the probe, not to "
                "write other text: the score falls within some steps, and the behaviour stays. Use the score as a reward on "
                "rollouts (`ConceptReward`) or hold it with a `ConceptAnchor`; to study the effect, pass the flag and a holdout "
                "monitor."
            )

    @property
    def policy_point(self) -> str:
        return self.readout.hook_point

    @property
    def references(self) -> list[TokenReadout]:
        return []

    @property
    def cards_readouts(self) -> list[Readout]:
        return [self.readout]

    def compute(self, batch: Batch, weight: float) -> Term:
        tokens = batch.tokens(self.readout.include_end_of_turn)
        scores = _pooled(self.readout, self.readout(batch.policy(self.policy_point, tokens)), tokens)  # (M,)
        scores = torch.where(tokens.any, scores, torch.zeros_like(scores))
        values = softplus(-scores if self.encourage else scores) * tokens.any
        return Term(weight * values, {"penalty": values, "score": scores})


KINDS: dict[str, type[Regularizer]] = {
    "concept_anchor": ConceptAnchor,
    "concept_penalty": ConceptPenalty,
    "drift_penalty": DriftPenalty,
    "explain_away": ExplainAway,
    "feature_constraint": FeatureConstraint,
}


def margin(pairs: Pairs, loss_type: str) -> torch.Tensor:
    """z (P,): what `DPOTrainer` puts into the sigmoid of this loss type, with reverse KL."""
    scores = pairs.log_probs - pairs.reference
    if loss_type in LENGTH_NORMALIZED_LOSSES:
        scores = scores / pairs.lengths.clamp(min=1)
    chosen, rejected = scores.chunk(2)
    return pairs.beta * (chosen - rejected)


def random_like(readout: Readout, seed: int) -> Readout:
    """A control readout: a random direction of the same norm in the place of each one that it reads, drawn from `seed`."""
    name = f"{readout.name}_random{seed}"
    generator = torch.Generator().manual_seed(seed)
    if readout.latents is not None:
        own = readout.latents.chosen.cpu()
        drawn = torch.randn(own.shape, generator=generator)
        rows = drawn * (own.norm(dim=1) / drawn.norm(dim=1))[:, None]
        return replace(readout, latents=readout.latents.with_rows(rows), transform=None, name=name, made_of=readout)

    def like(own: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(own.shape, generator=generator)
        return drawn / drawn.norm() * own.detach().cpu().float().norm()

    weight = like(readout.weight)
    query = None if readout.query is None else like(readout.query)
    return replace(
        readout, weight=weight, query=query, bias=0.0, offset=0.0, transform=None, name=name, made_of=readout
    )


def _without_transform(term: ConceptAnchor | ConceptPenalty) -> None:
    """The readout that is trained through: the control in its place where one is asked for, and never a card's transform: where
    that clips, it has no gradient, and just the sequences with the highest scores would be left alone."""
    readout = replace(term.readout, transform=None)
    if term.random_direction is not None:
        readout = random_like(readout, term.random_direction)
    object.__setattr__(term, "readout", readout)


def make_regularizer(given: Any, model: Any = None) -> Regularizer:
    """Regularizer of what a user wrote.

    Args:
        given: an object; a mapping with `kind`, `card` (for `drift_penalty`, `cards` or `hook_point`; for `feature_constraint`
            also `sae`, a file, folder or Hub id of a sparse autoencoder, with `revision`, `subfolder`, `hook_point` and
            `latents`, all by default) and the kind's options, as in a recipe; or a card's path, which means a `ConceptAnchor` on
            it with the card's weight.
        model (`nn.Module`, *optional*): the policy: hook names in the autoencoder's file are resolved on it.

    Raises:
        `ValueError`: an unknown kind, an unknown option, a card that may not be used so.
    """
    if isinstance(given, Regularizer):
        return given
    if isinstance(given, Path) or (isinstance(given, str) and given not in KINDS):
        card = load_card(given)
        return ConceptAnchor(readout=Readout.from_card(card), weight=card.card.weight)
    made: Regularizer = from_mapping(given, KINDS, "regularizer", partial(_load, model))
    return made


def _schedule(given: Any) -> Schedule:
    """Schedule of a mapping as YAML gives it, where 1e2 steps are a float.

    Raises:
        `ValueError`: an unknown key or a wrong value.
    """
    if isinstance(given, Mapping):
        steps = given.get("steps")
        given = dict(given)
        if isinstance(steps, float) and steps > 1 and steps.is_integer():
            given["steps"] = int(steps)
    try:
        return Schedule.model_validate(given)
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors())
        raise ValueError(
            f"`schedule` is {given!r} ({said}) – expected such as `{{kind: warmup, steps: 100, floor: 0.0}}`."
        ) from None


def _load(model: Any, kind: str, options: dict[str, Any]) -> None:
    if "schedule" in options and not isinstance(options["schedule"], Schedule):
        options["schedule"] = _schedule(options["schedule"])
    if kind == "drift_penalty" and "cards" in options:
        cards = as_list(options.pop("cards"))
        options["subspace"] = Subspace.from_readouts([Readout.from_card(load_card(card)) for card in cards])
    elif kind == "feature_constraint" and "sae" in options:
        from ..sae.files import load_sae

        where = {key: options.pop(key) for key in ("revision", "subfolder", "hook_point") if key in options}
        sae = load_sae(options.pop("sae"), model=model, **where)
        options["readout"] = sae.latents(options.pop("latents", None))
    elif kind != "drift_penalty" and "card" in options:
        card = load_card(options.pop("card"))
        if kind in ("concept_penalty", "explain_away"):  # the score decides what is learned: a claim needs evidence
            require_passed(card.card, card.path)
        options["readout"] = Readout.from_card(card)


def _means_of(features: Latents | Readout, activation: torch.Tensor, tokens: Counted) -> torch.Tensor:
    """Mean features (M, S) of every sequence, of activations (N, D); no more than a block of (N, S) is held for the gradient.

    Latents of more tokens than a block has are read block by block, and once more in the backward pass.
    """
    if not isinstance(features, Latents) or len(activation) <= (size := block_size(len(features.encoder))):
        return tokens.means(features(activation))

    def added(rows: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
        latents = features(rows)
        return latents.new_zeros(tokens.sequences, features.size).index_add(0, sequence, latents)

    total = activation.new_zeros(tokens.sequences, features.size, dtype=torch.float32)
    for rows, sequence in zip(activation.split(size), tokens.sequence.split(size), strict=True):
        total = total + checkpoint(added, rows, sequence, use_reentrant=False, preserve_rng_state=False)
    return total / tokens.counts.clamp(min=1)[:, None]


def _pooled(readout: Readout, scores: torch.Tensor, tokens: Counted) -> torch.Tensor:
    rows, mask = tokens.rows(scores)
    return readout.pooled(rows, mask)


def _named(regularizer: Regularizer, name: str) -> None:
    if not regularizer.name:
        object.__setattr__(regularizer, "name", name)
