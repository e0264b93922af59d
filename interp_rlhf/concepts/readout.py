"""Readouts: a probe, a direction or latents at a hook point, with pooling and transform.

In: an activation (B, T, D). Out: scores per token (B, T, 1), and one score per completion. It must not know trainers.
"""

from __future__ import annotations

import hashlib
import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..activations.canaries import Canaries, agreement
from ..activations.hook_points import has_adapters
from ..activations.identity import identity
from ..activations.noise import runs_here
from ..activations.reference_pass import adapters_off_in
from ..activations.sharding import is_offloaded
from .artifact import calibration_of, read_directions
from .card import LoadedCard, load_card
from .claims import artifact_of, require_architecture, require_identity, require_related, require_width
from .pooling import ATTENTION, pool

if TYPE_CHECKING:
    from ..activations.batch import ConceptScores
    from ..activations.canaries import Agreement
    from .artifact import Artifact, Header
    from .card import Transform
    from .latents import Latents

logger = logging.getLogger(__name__)

# A monitor's policy may have been trained far from the model that the monitor was made on. That gives a warning. Below this
# correlation with the canaries a score means nothing: another seed gives about 0, adding 1 to the norm weights gives 0.85.
STRANGER = 0.5


@dataclass(frozen=True, eq=False)
class Readout:
    """Scores of one concept.

    Attributes:
        name (`str`): the card's name. It is the key of scores and metrics.
        hook_point (`str`): module path of the activation that it reads.
        weight (`torch.FloatTensor` of shape (D,)), bias (`float`): the score of a token is ⟨h, weight⟩ + bias. With `latents` the
            score is ⟨latents(h), weight⟩ + bias, and the weight has shape (K,).
        pooling (`str`): see `pooling.pool`.
        scale (`float`), offset (`float`): the calibration of that pooling: scale · pooled + offset is a log-odds.
        transform (`Transform`, *optional*): standardization and clipping of the pooled score.
        include_end_of_turn (`bool`): count end-of-turn tokens at the end of a completion.
        header (`Header`, *optional*): the artifact's description of itself. Models are checked against it.
        latents (`Latents`, *optional*): K latents of a sparse autoencoder.
        made_of (`Readout`, *optional*): the artifact's own readout, if this one reads other directions. It owns the canaries.
        query (`torch.FloatTensor` of the weight's shape, *optional*): under the pooling `attention`, each token's score is
            followed by its logit ⟨h, query⟩ + query_bias.

    Example:
        >>> from interp_rlhf import Readout, read
        >>> readout = Readout.from_card("warmth.yaml")
        >>> readout.check_model(model)  # raises if the probe was fitted on another model
        >>> answers = [{"prompt": "please", "completion": word} for word in ("warm kind care", "cold rude never")]
        >>> warm, cold = readout.score(read(model, answers, readout, tokenizer=tokenizer)["warmth"])
        >>> warm > 0 > cold  # log-odds that an answer is warm
        True
    """

    name: str
    hook_point: str
    weight: torch.Tensor
    bias: float = 0.0
    pooling: str = "mean"
    scale: float = 1.0
    offset: float = 0.0
    transform: Transform | None = None
    include_end_of_turn: bool = False
    header: Header | None = None
    latents: Latents | None = None
    made_of: Readout | None = None
    query: torch.Tensor | None = None
    query_bias: float = 0.0

    def __post_init__(self) -> None:
        if (self.query is None) != (self.pooling != ATTENTION):
            raise ValueError(
                f"Readout `{self.name}` has the pooling `{self.pooling}` with{'' if self.query is not None else 'out'} a query – "
                "expected a query under `attention` and under no other pooling. Fit it for the pooling that it is used under."
            )

    @classmethod
    def from_artifact(cls, artifact: Artifact, name: str, pooling: str, transform: Transform | None = None) -> Readout:
        """Readout of an artifact.

        Raises:
            `ValueError`: the artifact was not calibrated for this pooling.
        """
        header = artifact.header
        scale, offset = calibration_of(header, pooling, name)
        return cls(
            name, header.hook_point, artifact.weight, artifact.bias, pooling, scale, offset, transform,
            header.include_end_of_turn, header, artifact.latents, query=artifact.query, query_bias=artifact.query_bias,
        )  # fmt: skip

    @classmethod
    def from_card(cls, card: LoadedCard | str) -> Readout:
        """Readout of a reward card, its artifact checked against the card.

        Raises:
            `ValueError`: the card describes another artifact.
        """
        loaded = load_card(card) if not isinstance(card, LoadedCard) else card
        spec, artifact = loaded.card.readout, artifact_of(loaded)
        readout = cls.from_artifact(artifact, loaded.card.name, spec.pooling, loaded.card.transform)
        if readout.canaries is None:
            logger.warning(
                "The artifact of `%s` has no canaries, which would show that a model is the one it was fitted on. So it can be "
                "a monitor and not a reward. Add canaries with `interp-rlhf probe canaries %s`.", loaded.path, loaded.path,
            )  # fmt: skip
        return replace(readout, include_end_of_turn=spec.include_end_of_turn)

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        """Scores (B, T, 1) of an activation (B, T, D), float32. With a query the shape is (B, T, 2), with the logit last."""
        weight = self.weight.detach().to(activation.device)  # a readout never gets a gradient
        read = activation if self.latents is None else self.latents(activation)
        score = (read @ weight + self.bias).unsqueeze(-1)
        if self.query is None:
            return score
        logit = read @ self.query.detach().to(activation.device) + self.query_bias
        return torch.cat([score, logit.unsqueeze(-1)], dim=-1)

    @property
    def columns(self) -> int:
        """Numbers per token: 1 for the score, 2 with a query, whose logit is the second."""
        return 1 if self.query is None else 2

    @property
    def width(self) -> int:
        """D, the model width."""
        return len(self.weight) if self.latents is None else self.latents.width

    @property
    def direction(self) -> torch.Tensor:
        """Direction (D,) of the concept: a probe's weight, or the weighted sum of the directions that its latents write."""
        weight = self.weight.detach().float().cpu()
        return weight if self.latents is None else weight @ self.latents.written.cpu()

    @property
    def directions(self) -> torch.Tensor:
        """Directions (R, D) that span the concept: the weight, or the direction that each latent writes."""
        return self.direction[None] if self.latents is None else self.latents.written.cpu()

    @property
    def read_directions(self) -> torch.Tensor:
        """Directions (R, D) along which it reads. Canaries are read along them, see `artifact.read_directions`."""
        return read_directions(self.weight, self.latents, self.query)

    @property
    def canaries(self) -> Canaries | None:
        """Canaries of its artifact; None if the artifact has none."""
        return Canaries.of(self.header.canaries) if self.header is not None else None

    def digest(self) -> str:
        """SHA-256 of its weights."""
        tensors = [self.weight] if self.latents is None else [self.weight, *self.latents.tensors().values()]
        tensors += [] if self.query is None else [self.query, torch.tensor(self.query_bias)]
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def score(self, scores: ConceptScores) -> list[float | None]:
        """One score per completion: pooled, calibrated, transformed. `None` for a completion without a counted token.

        Raises:
            `ValueError`: a counted token's score is NaN or infinite.
        """
        scores.require_finite()
        pooled = self.pooled(scores.scores, scores.mask)
        counted = scores.mask.any(1).tolist()
        if not torch.isfinite(pooled[scores.mask.any(1)]).all():
            raise ValueError(
                f"Readout `{self.name}` pools finite token scores to {pooled.tolist()} – expected finite numbers. The scale, the "
                "transform or the scores are too large for float32. Correct the card's `transform`, or fit again."
            )
        return [value if counts else None for value, counts in zip(pooled.tolist(), counted, strict=True)]

    def pooled(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pooled, calibrated and transformed scores (B,) of its scores per token; NaN in rows without a counted token."""
        return self.calibrated(pool(scores, mask, self.pooling)[:, 0])

    def calibrated(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores as log-odds, standardized and clipped by the card's transform."""
        scores = self.scale * scores + self.offset
        return scores if self.transform is None else self.transform(scores)

    def check_model(self, model: Any, exact: bool = True, trained: bool = False) -> None:
        """Refuse a model on which this readout was not made.

        Args:
            model (`nn.Module`): the model that will be read.
            exact (`bool`, defaults to `True`): also require the very same model, by the artifact's canaries. That is right for
                the reference model. It is wrong for a policy whose own weights are trained. A policy with adapters has frozen
                base weights: the model below the adapters is checked even if `exact` is False. A policy without adapters that
                was trained further gives a warning. If an engine has sharded the model, `check_canaries` comes later.
            trained (`bool`, defaults to `False`): the model's own weights have been trained, perhaps for long. Then, if `exact`
                is False, any model of the architecture is allowed with a warning.

        Raises:
            `ValueError`: no such hook point, another width, another architecture, or another model.
        """
        made_on = self.header.model_id if self.header else "another model"
        require_width(
            model, f"Readout `{self.name}` has", self.hook_point, self.width,
            f"It was made on `{made_on}`: fit one on this model.",
        )  # fmt: skip
        if self.header is None:
            return
        require_architecture(model, self.name, self.header)
        if not exact and not has_adapters(model):
            self._check_related(model, trained)
        elif self.canaries is not None and (runs_here(model) or is_offloaded(model)):
            with nullcontext(model) if exact else adapters_off_in(model) as bare:
                self.check_canaries(bare)
        else:
            require_identity(model, self.name, self.header)

    def _check_related(self, model: Any, trained: bool) -> None:
        """Refuse a policy that is unrelated to the readout's model. Warn about a related one."""
        if self.canaries is None or self.header is None or not runs_here(model):
            return
        agrees = self._agreement(model, self.canaries)
        require_related(
            agrees,
            -math.inf if trained else STRANGER,
            f"Readout `{self.name}` was made on `{self.header.model_id}` and the policy does not begin with that one: {agrees}. "
            "Its scores mean nothing here – expected the model that it was fitted on, or one that was made from it. Fit and "
            "check a probe on this one (`interp-rlhf probe fit`).",
            f"Readout `{self.name}` was made on `{self.header.model_id}`: {agrees}. Its scores on this model are about another "
            "model.",
        )

    def _agreement(self, model: Any, canaries: Canaries) -> Agreement:
        return agreement(model, canaries, self.hook_point, (self.made_of or self).read_directions)

    def check_canaries(self, model: Any) -> None:
        """Check that a model is the readout's own by reading the canaries. All ranks call this together.

        Raises:
            `ValueError`: another model, or the same model at too low a precision. The message has the numbers.
        """
        if self.canaries is None or self.header is None:
            return
        agrees = self._agreement(model, self.canaries)
        if not agrees.agrees:
            same = identity(model, self.hook_point) == self.header.identity
            raise ValueError(
                f"Readout `{self.name}` was made on `{self.header.model_id}` and the model that would be read is not that one: "
                f"{agrees}{', with the same norm weights' if same else ''}. A probe is a claim about one model – expected the "
                "frozen model that it was fitted on. Pass that one as the reference, or fit and check a probe on this one "
                "(`interp-rlhf probe fit`)."
            )
        if agrees.precision in ("8 bits", "4 bits"):
            logger.warning(
                "Readout `%s` reads the same model, less precise (%s): %s.", self.name, agrees.coarse, agrees
            )


def same_artifact(one: Readout, other: Readout) -> bool:
    """True if two readouts make one claim: the same hook point and weight. Names, pooling, query and scale may differ.

    Readouts of latents make one claim if they share a latent.
    """
    if one.hook_point != other.hook_point or (one.latents is None) != (other.latents is None):
        return False
    if one.latents is None or other.latents is None:
        return torch.equal(one.weight.detach().cpu(), other.weight.detach().cpu())
    rows, others = one.latents.chosen.cpu(), other.latents.chosen.cpu()
    return rows.shape[1] == others.shape[1] and bool((rows[:, None] == others[None]).all(-1).any())
