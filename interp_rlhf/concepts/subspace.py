"""Subspaces of the residual stream: an orthonormal basis at a hook point.

In: probes, directions, latents, or texts. Out: a `Subspace` that they or their activations span. It must not know how a training
uses it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..activations.batch import tokenize_examples
from ..activations.canaries import RELATED, agreement, make_canaries
from ..activations.collect import read_activations
from ..activations.counted import end_of_turn_ids
from ..activations.hook_points import has_adapters
from ..activations.noise import runs_here
from ..activations.outliers import norm_outliers
from ..activations.reference_pass import adapters_off_in
from ..messages import as_list
from .claims import require_related, require_width
from .latents import Latents

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..activations.batch import TokenBatch
    from ..activations.canaries import Canaries
    from .readout import Readout


@dataclass(frozen=True, eq=False)
class Subspace:
    """An orthonormal basis of R dimensions at a hook point.

    Attributes:
        hook_point (`str`): module path of the activation that it lives in.
        basis (`torch.FloatTensor` of shape (R, D)): orthonormal rows, float32.
        sources (`tuple[Readout, ...]`): readouts that span it. Each is a claim about one model, and that model is checked.
        claim (`tuple[Canaries, torch.Tensor]`, *optional*): canaries of the model whose activations span it, and the
            directions (R, D) along which the canaries were read.

    Example:
        >>> from interp_rlhf import Subspace
        >>> subspace = Subspace.from_pca(model, tokenizer, ["a warm day", "a cold night"], "model.layers.1", rank=2)
        >>> subspace.basis.shape
        torch.Size([2, 32])
        >>> subspace.ablate(subspace.basis).abs().max().item() < 1e-5  # nothing of the subspace is left
        True
    """

    hook_point: str
    basis: torch.Tensor
    sources: tuple[Readout, ...] = ()
    claim: tuple[Canaries, torch.Tensor] | None = None

    def check_model(self, model: Any) -> None:
        """Refuse a model on which the subspace was not made.

        A subspace of principal components carries canaries. A related model, such as one that was trained further, is allowed
        with a warning.

        Raises:
            `ValueError`: a model without the hook point, of another width, or another model.
        """
        require_width(
            model, f"The subspace at `{self.hook_point}` has", self.hook_point, self.basis.shape[1],
            "It was made on another model: make one on this model.",
        )  # fmt: skip
        if self.claim is None or not runs_here(model):
            return
        canaries, directions = self.claim
        agrees = agreement(
            model, canaries, self.hook_point, directions
        )  # the adapters may have been on when it was made
        if not agrees.agrees and has_adapters(model):
            with adapters_off_in(model) as bare:
                below = agreement(bare, canaries, self.hook_point, directions)
            agrees = max(agrees, below, key=lambda one: one.correlation)
        require_related(
            agrees,
            RELATED,
            f"The subspace at `{self.hook_point}` was made on another model: {agrees}. Its components mean nothing here – "
            "expected the model whose activations they were made of, or one that was made from it. Make one on this model.",
            f"The subspace at `{self.hook_point}` was made on another model: {agrees}.",
        )

    @classmethod
    def spanned_by(cls, hook_point: str, vectors: torch.Tensor) -> Subspace:
        """Subspace that vectors (N, D) span. A vector that depends on the others adds nothing.

        Raises:
            `ValueError`: the vectors have another shape, are not finite, or are all 0.
        """
        if vectors.dim() != 2 or not torch.isfinite(vectors).all():
            raise ValueError(f"`vectors` have shape {tuple(vectors.shape)} – expected finite numbers of shape (N, D).")
        norms = vectors.double().norm(dim=1, keepdim=True)
        if not (norms > 0).any():
            raise ValueError("All `vectors` are 0 – expected at least one that is not.")
        kept = norms[:, 0] > 0
        unit = vectors.double()[kept] / norms[kept]  # so that a long vector does not hide a short one
        _, sizes, basis = torch.linalg.svd(unit, full_matrices=False)
        return cls(hook_point, basis[sizes > 1e-6 * sizes[0]].float().contiguous())

    @classmethod
    def from_readouts(cls, readouts: Readout | Latents | Sequence[Readout | Latents]) -> Subspace:
        """Subspace of the weights of probes and directions, and of the decoder rows of latents.

        Raises:
            `ValueError`: there is no readout, or the readouts are at different hook points.
        """
        readouts = as_list(readouts)
        points = sorted({readout.hook_point for readout in readouts})
        if len(points) != 1:
            raise ValueError(
                f"The readouts are at {', '.join(f'`{point}`' for point in points) or 'no hook point'} – expected one hook "
                "point: a subspace lives in one activation. Make one subspace per hook point."
            )
        rows = [r.written if isinstance(r, Latents) else r.directions for r in readouts]
        made = cls.spanned_by(points[0], torch.cat([row.float().cpu() for row in rows]))
        claims = [r.claim for r in readouts if isinstance(r, Latents) and r.claim is not None]
        return replace(
            made, sources=tuple(r for r in readouts if not isinstance(r, Latents)), claim=claims[0] if claims else None
        )

    @classmethod
    def from_pca(
        cls, model: Any, tokenizer: Any, examples: Sequence[Any], hook_point: str, rank: int, progress: bool = False
    ) -> Subspace:
        """Subspace of the principal components of a model's activations on the counted tokens of examples.

        The mean is removed. Tokens with outlying norms are left out.

        Args:
            model (`nn.Module`), tokenizer: the model to read, with its adapters as they are.
            examples (`list`): texts or examples, see `tokenize_examples`.
            hook_point (`str`): module path of the activation.
            rank (`int`): R, the number of components.
            progress (`bool`, defaults to `False`): has no effect, since the reading is short.

        Raises:
            `ValueError`: the examples have too few counted tokens for this rank.
        """
        batch: TokenBatch = tokenize_examples(examples, tokenizer, end_of_turn_ids=end_of_turn_ids(model, tokenizer))
        activations = read_activations(model, batch, [hook_point])[hook_point]  # (N, D)
        activations = activations[~norm_outliers(activations)]
        highest = min(len(activations) - 1, activations.shape[1])
        if not 0 < rank <= highest:
            raise ValueError(
                f"`rank` is {rank} – expected 1 to {highest}: the examples have {len(activations)} counted tokens of width "
                f"{activations.shape[1]}. Pass more examples or a lower rank."
            )
        centered = activations.double() - activations.double().mean(0)
        _, _, components = torch.linalg.svd(centered, full_matrices=False)
        basis = components[:rank].float().contiguous()
        return cls(hook_point, basis, claim=(make_canaries(model, tokenizer, hook_point, basis), basis))

    def random(self, seed: int) -> Subspace:
        """The control: a random subspace of the same rank, orthogonal to this one, drawn from `seed`.

        Raises:
            `ValueError`: the rank is more than half of the width, so no such subspace exists.
        """
        rank, width = self.basis.shape
        if 2 * rank > width:
            raise ValueError(
                f"The subspace has rank {rank} of {width} – expected at most {width // 2}: no orthogonal subspace of its rank "
                "exists. Take one of a lower rank."
            )
        drawn = torch.randn(rank, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        basis = self.basis.double().cpu()
        drawn -= drawn @ basis.T @ basis
        return Subspace(self.hook_point, torch.linalg.qr(drawn.T)[0].T.float().contiguous(), self.sources, self.claim)

    def coordinates(self, activation: torch.Tensor) -> torch.Tensor:
        """Coordinates (..., R) of an activation (..., D)."""
        return activation @ self.basis.detach().to(activation).T

    def ablate(self, activation: torch.Tensor) -> torch.Tensor:
        """The activation without its component in the subspace: h − Qᵀ Q h.

        It is computed in float32 for every precision of the model: in bfloat16, part of the component would remain.
        """
        with torch.autocast(activation.device.type, enabled=False):
            basis = self.basis.detach().to(activation.device)
            exact = activation.float()
            return (exact - (exact @ basis.T) @ basis).to(activation.dtype)
