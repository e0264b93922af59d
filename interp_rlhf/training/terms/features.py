"""`feature_constraint`: subtracts a distance of features from the margin inside DPO's sigmoid.

In: latents or a probe. Out: per pair, the change of DPO's loss. It must not know how the trainer reduces its own loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from ...concepts.latents import Latents, block_size
from .pairs import margin, refuse_losses
from .readouts import Whole
from .registry import register_term
from .term import LossTerm, TermValues

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from ...activations.counted import Counted
    from ...activations.tap import TokenReadout
    from ...concepts.readout import Readout
    from ..make import CardFiles
    from .batch import TermBatch
    from .term import TermContext


@register_term("feature_constraint")
@dataclass(frozen=True, eq=False, kw_only=True)
class FeatureConstraint(LossTerm):
    """Feature-level constrained preference optimization: δ is subtracted from the margin inside DPO's sigmoid.

    −log σ(z − δ), δ = α (β D(y_l) − sg[β D(y_w)]), D(x, y) = (1/k) Σ_{i ∈ I_k} (c̄_θ,i − c̄_0,i)². c̄ are the mean-pooled latents.
    I_k holds the k largest of the policy's together with the k largest of the reference's.

    Source: FPO (arXiv 2411.07618, equations 8 to 10); α is `weight`. Deviations:
    1. z is the trainer's own margin. The paper uses that of `sigmoid_norm`; `sigmoid` is allowed too.
    2. c̄ is the mean over the answer's tokens, the end-of-turn token included.
    3. A probe gives one feature: D is the squared gap of mean scores. A card of latents gives its latents, not their weighted
       sum.
    4. α may follow a schedule.
    5. The term is part of DPO's own loss, so micro-batches of unequal size are weighted as in that loss: each by its mean.

    Args:
        readout (`Latents` or `Readout`): the features; in a recipe, a `card`, or `sae` (a file, folder or Hub id of a sparse
            autoencoder) with `revision`, `subfolder`, `hook_point` and `latents` (all by default).
        k (`int`, defaults to 32): number of latents in I_k per model; at most as many as there are.
        stop_gradient (`bool`, defaults to `True`): no gradient through D(y_w).
        weight (`float`, defaults to 0.5), schedule (`Schedule`), name (`str`): as for every term.

    Raises:
        `ValueError`: a value of the wrong type, `k` below 1, or a negative weight.

    Example:
        >>> from interp_rlhf import FeatureConstraint, attach
        >>> attachment = attach(dpo_trainer, regularizers=[FeatureConstraint(readout=readout, weight=0.5)])
        >>> attachment.terms.terms[0].name
        'features_concept'
    """

    readout: Latents | Readout
    k: int = 32
    stop_gradient: bool = True
    weight: float = 0.5

    per_pair: ClassVar[bool] = True
    trainers: ClassVar[tuple[str, ...]] = ("DPO",)

    def prepare(self) -> None:
        if self.k < 1:
            raise ValueError(f"`k` is {self.k} – expected a number of latents, at least 1.")

    @property
    def default_name(self) -> str:
        return f"features_{self.readout.name}"

    @property
    def policy_point(self) -> str:
        return self.readout.hook_point

    @cached_property
    def _features(self) -> Latents | Readout:
        """The compared features: latents instead of their weighted sum, and a probe's scores without attention."""
        if isinstance(self.readout, Latents):
            return self.readout
        if self.readout.latents is not None:
            return replace(self.readout.latents, name=f"{self.readout.name}_latents")
        return self.readout if self.readout.query is None else replace(self.readout, query=None, pooling="mean")

    @cached_property
    def _on_reference(self) -> TokenReadout:
        """Readout on the reference: the latents, or their activation if that is narrower."""
        features = self._features
        wide = isinstance(features, Latents) and features.size > features.width
        return Whole(self.policy_point) if wide else features

    @property
    def reference_readouts(self) -> Sequence[TokenReadout]:
        return [self._on_reference]

    @property
    def claims(self) -> Sequence[Readout]:
        return [] if isinstance(self.readout, Latents) else [self.readout]

    @property
    def include_end_of_turn(self) -> bool:
        return True if isinstance(self.readout, Latents) else bool(self.readout.include_end_of_turn)

    def pushes(self) -> dict[Readout, int]:
        return {}

    @classmethod
    def from_options(cls, options: dict[str, Any], files: CardFiles) -> Self:
        options = dict(options)
        if "sae" in options and "card" in options:
            raise ValueError(
                f"`sae` and `card` are both given for a regularizer of kind `{cls.kind}` – expected one of the two: the features "
                "are the autoencoder's latents or the card's."
            )
        if "sae" in options:
            where = {key: options.pop(key) for key in ("revision", "subfolder", "hook_point") if key in options}
            options["readout"] = files.latents(options.pop("sae"), options.pop("latents", None), **where)
        return super().from_options(options, files)

    def refuse(self, context: TermContext) -> None:
        settings = {"f_divergence_type": "reverse_kl", "ld_alpha": None, "use_liger_kernel": False}
        refuse_losses(context, self.name, ("sigmoid", "sigmoid_norm"), {**settings, "use_weighting": False})
        if isinstance(self.readout, Latents):
            self.readout.check_model(context.trainer.model)

    def compute(self, batch: TermBatch, weight: float) -> TermValues:
        assert batch.pairs is not None
        tokens = batch.tokens(self.include_end_of_turn)
        features = self._features
        now = _means_of(features, batch.policy(self.policy_point, tokens), tokens)  # (2P, S)
        with torch.no_grad():
            start = batch.reference(self._on_reference, tokens)
            whole = isinstance(self._on_reference, Whole)
            start = _means_of(features, start, tokens) if whole else tokens.means(start)
        distance = self._distance(now, start)  # (2P,)
        chosen, rejected = distance.chunk(2)
        beta = batch.pairs.beta
        kept = chosen.detach() if self.stop_gradient else chosen
        delta = weight * beta * (rejected - kept)  # (P,)
        values = torch.zeros_like(delta)
        for loss_type, share in batch.pairs.loss_types:
            z = margin(batch.pairs, loss_type)
            # TRL's loss with δ, minus TRL's loss without it.
            values = values + share * (logsigmoid(z) - logsigmoid(z - delta))
        metrics = {"delta": delta, "distance_chosen": chosen, "distance_rejected": rejected}
        return TermValues(values, {key: value.detach() for key, value in metrics.items()})

    def _distance(self, now: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        k = min(self.k, now.shape[1])
        chosen = torch.zeros_like(now, dtype=torch.bool)
        for features in (now.detach(), start):
            chosen.scatter_(1, features.topk(k, dim=1).indices, True)
        return ((now - start).pow(2) * chosen).sum(1) / k


def _means_of(features: Latents | Readout, activation: torch.Tensor, tokens: Counted) -> torch.Tensor:
    """Mean features (M, S) of every sequence, from activations (N, D). At most a block of (N, S) is held for the gradient.

    If there are more tokens than a block holds, latents are computed block by block, and again in the backward pass.
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
