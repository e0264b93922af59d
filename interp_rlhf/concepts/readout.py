"""Readouts: a probe, a direction or latents at a hook point, with their pooling and their transform.

In: an activation (B, T, D). Out: scores per token (B, T, 1), and from those one score per completion.
"""

from __future__ import annotations

import hashlib
import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..activations.canaries import Canaries, agreement
from ..activations.hook_points import has_adapters, hidden_size, is_offloaded, resolve
from ..activations.identity import identity, structure
from ..activations.noise import runs_here
from ..activations.read import adapters_off_in
from .artifact import calibration_of, load_artifact
from .card import LoadedCard, load_card
from .pooling import ATTENTION, pool

if TYPE_CHECKING:
    from ..activations.batch import ConceptScores
    from ..activations.canaries import Agreement
    from .artifact import Artifact, Header
    from .card import Card, Transform
    from .latents import Latents

logger = logging.getLogger(__name__)

# A policy may have been trained far from what its monitor was made on, which is told; of a model below this correlation with its
# canaries it says nothing: of another seed it is about 0, with 1 added to norm weights 0.85.
STRANGER = 0.5


@dataclass(frozen=True, eq=False)
class Readout:
    """Scores of one concept.

    Attributes:
        name (`str`): the card's name; scores and metrics are kept by it.
        hook_point (`str`): where it reads.
        weight (`torch.FloatTensor` of shape (D,)), bias (`float`): the score of a token is ⟨h, weight⟩ + bias; with `latents`
            ⟨latents(h), weight⟩ + bias, the weight of shape (K,).
        pooling (`str`): see `pooling.pool`.
        scale (`float`), offset (`float`): the calibration of that pooling: scale · pooled + offset is a log-odds.
        transform (`Transform`, *optional*): standardization and clipping of the pooled score.
        include_end_of_turn (`bool`): whether end-of-turn tokens at the end of a completion count.
        header (`Header`, *optional*): the artifact's own description, checked against models.
        latents (`Latents`, *optional*): latents of a sparse autoencoder, K of them.
        made_of (`Readout`, *optional*): the artifact's own readout, whose canaries hold, where this one reads other directions.
        query (`torch.FloatTensor` of the weight's shape, *optional*): of the pooling `attention`: each token's score is followed
            by its logit ⟨h, query⟩ + query_bias.
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
                "expected one with `attention` and with no other. Fit it for the pooling it is used under."
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
            `ValueError`: the artifact is another one than the card says.
        """
        loaded = load_card(card) if not isinstance(card, LoadedCard) else card
        spec = loaded.card.readout
        artifact = load_artifact(loaded.artifact_path, spec.artifact.sha256)
        _require_agreement(loaded.card, artifact.header, loaded.path)
        readout = cls.from_artifact(artifact, loaded.card.name, spec.pooling, loaded.card.transform)
        if readout.canaries is None:
            logger.warning(
                "The artifact of `%s` has no canaries, by which a model shows that it is the one that was fitted on: it can "
                "watch, and "
                "not be a reward. Add them with `interp-rlhf probe canaries %s`.", loaded.path, loaded.path,
            )  # fmt: skip
        return replace(readout, include_end_of_turn=spec.include_end_of_turn)

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        """Scores (B, T, 1) of an activation (B, T, D), float32; with a query (B, T, 2), the logit last."""
        weight = self.weight.detach().to(activation.device)  # a readout never gets a gradient
        read = activation if self.latents is None else self.latents(activation)
        score = (read @ weight + self.bias).unsqueeze(-1)
        if self.query is None:
            return score
        logit = read @ self.query.detach().to(activation.device) + self.query_bias
        return torch.cat([score, logit.unsqueeze(-1)], dim=-1)

    @property
    def columns(self) -> int:
        """Numbers that it gives per token: its score, and with a query its logit."""
        return 1 if self.query is None else 2

    @property
    def width(self) -> int:
        """D."""
        return len(self.weight) if self.latents is None else self.latents.width

    @property
    def direction(self) -> torch.Tensor:
        """Direction (D,) that stands for the concept: a probe's weight, and what its latents write, weighed."""
        weight = self.weight.detach().float().cpu()
        return weight if self.latents is None else weight @ self.latents.written.cpu()

    @property
    def directions(self) -> torch.Tensor:
        """Directions (R, D) that span it: its weight, or what each of its latents writes."""
        return self.direction[None] if self.latents is None else self.latents.written.cpu()

    @property
    def read_directions(self) -> torch.Tensor:
        """Directions (R, D) along which it reads: its weight and its query, or the encoder rows of its latents; what canaries are
        read with."""
        if self.latents is not None:
            return self.latents.chosen.cpu()
        rows = [self.weight] if self.query is None else [self.weight, self.query]
        return torch.stack([row.detach().float().cpu() for row in rows])

    @property
    def canaries(self) -> Canaries | None:
        """Canaries of its artifact; None where it has none."""
        return Canaries.of(self.header.canaries) if self.header is not None else None

    def digest(self) -> str:
        """SHA-256 of its weights."""
        tensors = [self.weight] if self.latents is None else [self.weight, *self.latents.tensors().values()]
        tensors += [] if self.query is None else [self.query, torch.tensor(self.query_bias)]
        found = hashlib.sha256()
        for tensor in tensors:
            found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def score(self, scores: ConceptScores) -> list[float | None]:
        """One score per completion: pooled, calibrated, transformed. `None` where no token counts.

        Raises:
            `ValueError`: a counted token's score is NaN or infinite.
        """
        scores.require_finite()
        pooled = self.pooled(scores.scores, scores.mask)
        counted = scores.mask.any(1).tolist()
        if not torch.isfinite(pooled[scores.mask.any(1)]).all():
            raise ValueError(
                f"Readout `{self.name}` pools finite token scores to {pooled.tolist()} – expected finite numbers. Its scale, "
                "its transform or the scores are too large for float32."
            )
        return [value if counts else None for value, counts in zip(pooled.tolist(), counted, strict=True)]

    def pooled(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pooled, calibrated and transformed scores (B,) of what it gives per token; NaN where no token counts."""
        return self.calibrated(pool(scores, mask, self.pooling)[:, 0])

    def calibrated(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores as log-odds, transformed as the card says."""
        scores = self.scale * scores + self.offset
        return scores if self.transform is None else self.transform(scores)

    def check_model(self, model: Any, exact: bool = True, trained: bool = False) -> None:
        """Refuse a model that this readout was not made on.

        Args:
            model (`nn.Module`): the model that will be read.
            exact (`bool`, defaults to `True`): check that it is the very model too, by the artifact's canaries: right for the
                reference model, wrong for a policy whose own weights are trained. With adapters these are frozen, and what is
                below the adapters is checked all the same. Without adapters, one that was trained further is told.
                Where an engine has taken the model apart, `check_canaries` comes later.
            trained (`bool`, defaults to `False`): the model's own weights have been trained, however far: where it is not exact,
                any that has the architecture is allowed with a warning.

        Raises:
            `ValueError`: no such hook point, another width, another architecture, or another model.
        """
        resolve(model, self.hook_point)
        if (width := hidden_size(model)) != self.width:
            raise ValueError(
                f"Readout `{self.name}` has width {self.width} – the model's is {width}. It was made on "
                f"`{self.header.model_id if self.header else 'another model'}`: fit one on this model."
            )
        if self.header is None:
            return
        if (found := structure(model)) != self.header.structure:
            differing = {
                k: (found.get(k), self.header.structure.get(k)) for k in found.keys() | self.header.structure.keys()
            }
            shown = "; ".join(f"`{k}` {a} instead of {b}" for k, (a, b) in sorted(differing.items()) if a != b)
            raise ValueError(
                f"Readout `{self.name}` was made on `{self.header.model_id}` – the model that would be read has another "
                f"architecture: {shown}. Fit and check a probe on this model."
            )
        if not exact and not has_adapters(model):
            self._check_related(model, trained)
            return
        if self.canaries is not None and (runs_here(model) or is_offloaded(model)):
            with nullcontext(model) if exact else adapters_off_in(model) as bare:
                self.check_canaries(bare)
        elif (own := identity(model, self.hook_point)) != self.header.identity:
            raise ValueError(
                f"Readout `{self.name}` was made on `{self.header.model_id}` with identity {self.header.identity} – the "
                f"model that would be read has {own} at `{self.hook_point}`. A probe is a claim about one model: fit "
                "and check it on this one."
            )

    def _check_related(self, model: Any, trained: bool) -> None:
        """Raises `ValueError` for a policy that is no relative of the model that it was made on; warns of a related one."""
        if self.canaries is None or self.header is None or not runs_here(model):
            return
        found = self._agreement(model, self.canaries)
        if found.agrees:
            return
        if found.correlation < STRANGER and not trained:
            raise ValueError(
                f"Readout `{self.name}` was made on `{self.header.model_id}` and the policy does not begin with that one: "
                f"{found}. Its scores mean nothing here – expected the model that it was fitted on, or one that was made from "
                "it. Fit and check a probe on this one (`interp-rlhf probe fit`)."
            )
        logger.warning(
            "Readout `%s` was made on `%s`: %s. What it says of this model is about another one.",
            self.name, self.header.model_id, found,
        )  # fmt: skip

    def _agreement(self, model: Any, canaries: Canaries) -> Agreement:
        return agreement(model, canaries, self.hook_point, (self.made_of or self).read_directions)

    def check_canaries(self, model: Any) -> None:
        """Read the artifact's canaries on a model that is said to be the one it was made on; by all ranks together.

        Raises:
            `ValueError`: it is another one, or the same with coarser numbers than its readings can bear; the message has the
            numbers.
        """
        if self.canaries is None or self.header is None:
            return
        found = self._agreement(model, self.canaries)
        if not found.agrees:
            same = identity(model, self.hook_point) == self.header.identity
            raise ValueError(
                f"Readout `{self.name}` was made on `{self.header.model_id}` and the model that would be read is not that "
                f"one: {found}"
                f"{', with the same norm weights' if same else ''}. A probe is a claim about one model – expected the frozen "
                "one that "
                "it was fitted on. Pass that as the reference, or fit and check a probe on this one (`interp-rlhf probe fit`)."
            )
        if found.precision in ("8 bits", "4 bits"):
            logger.warning("Readout `%s` reads the same model, less precise (%s): %s.", self.name, found.coarse, found)


def same_artifact(one: Readout, other: Readout) -> bool:
    """Whether two readouts are one claim: the same hook point and weight, whatever their names, pooling, query and scale.

    Readouts of latents are one where they have a latent in common.
    """
    if one.hook_point != other.hook_point or (one.latents is None) != (other.latents is None):
        return False
    if one.latents is None or other.latents is None:
        return torch.equal(one.weight.detach().cpu(), other.weight.detach().cpu())
    rows, others = one.latents.chosen.cpu(), other.latents.chosen.cpu()
    return rows.shape[1] == others.shape[1] and bool((rows[:, None] == others[None]).all(-1).any())


def _require_agreement(card: Card, header: Header, path: Any) -> None:
    claims = {
        "readout.kind": (card.readout.kind, header.kind),
        "readout.hook_point": (card.readout.hook_point, header.hook_point),
        "readout.include_end_of_turn": (card.readout.include_end_of_turn, header.include_end_of_turn),
        "model.identity": (card.model.identity, header.identity),
    }
    wrong = [
        f"`{key}` is `{said}` – the artifact says `{true}`" for key, (said, true) in claims.items() if said != true
    ]
    if wrong:
        raise ValueError(f"`{path}` does not describe its artifact: {'; '.join(wrong)}. Correct the card or the path.")
