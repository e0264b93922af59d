"""Subspaces of the residual stream: an orthonormal basis at a hook point.

In: probes, directions, latents, or texts whose activations span it. Out: a `Subspace`. It must not know whether it will be
held, measured or ablated.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..activations.batch import tokenize_examples
from ..activations.canaries import RELATED, agreement, make_canaries
from ..activations.counted import end_of_turn_ids
from ..activations.hook_points import has_adapters, hidden_size, resolve
from ..activations.noise import runs_here
from ..activations.outliers import norm_outliers
from ..activations.read import adapters_off_in, read_activations
from ..messages import as_list
from .latents import Latents
from .readout import Readout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..activations.batch import TokenBatch
    from ..activations.canaries import Canaries

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Subspace:
    """An orthonormal basis of R dimensions at a hook point.

    Attributes:
        hook_point (`str`): where it lives.
        basis (`torch.FloatTensor` of shape (R, D)): orthonormal rows, float32.
        sources (`tuple[Readout, ...]`): readouts that span it: claims about one model, checked against it.
        claim (`tuple[Canaries, torch.Tensor]`, *optional*): canaries of the model whose activations it was made of, and the
            directions (R, D) that they were read along.
    """

    hook_point: str
    basis: torch.Tensor
    sources: tuple[Readout, ...] = ()
    claim: tuple[Canaries, torch.Tensor] | None = None

    def check_model(self, model: Any) -> None:
        """Refuse a model that it was not made on.

        One of principal components carries canaries. On a related model, one that was trained further, it is allowed with a
        warning.

        Raises:
            `ValueError`: a model without the hook point, of another width, or another model.
        """
        resolve(model, self.hook_point)
        if (width := hidden_size(model)) != self.basis.shape[1]:
            raise ValueError(
                f"The subspace at `{self.hook_point}` has width {self.basis.shape[1]} – the model's is {width}: it was made on "
                "another one. Make one on this model."
            )
        if self.claim is None or not runs_here(model):
            return
        canaries, directions = self.claim
        found = agreement(model, canaries, self.hook_point, directions)  # it was made as the adapters stood
        if not found.agrees and has_adapters(model):
            with adapters_off_in(model) as bare:
                below = agreement(bare, canaries, self.hook_point, directions)
            found = max(found, below, key=lambda one: one.correlation)
        if found.correlation < RELATED:
            raise ValueError(
                f"The subspace at `{self.hook_point}` was made on another model: {found}. Its components mean nothing here – "
                "expected the model whose activations they are of, or one that was made from it. Make one on this model."
            )
        if not found.agrees:
            logger.warning("The subspace at `%s` was made on another model: %s.", self.hook_point, found)

    @classmethod
    def spanned_by(cls, hook_point: str, vectors: torch.Tensor) -> Subspace:
        """Subspace that some vectors (N, D) span; vectors that depend on the others add nothing.

        Raises:
            `ValueError`: vectors of another shape, not finite, or all of them 0.
        """
        if vectors.dim() != 2 or not torch.isfinite(vectors).all():
            raise ValueError(f"`vectors` have shape {tuple(vectors.shape)} – expected finite numbers of shape (N, D).")
        norms = vectors.double().norm(dim=1, keepdim=True)
        if not (norms > 0).any():
            raise ValueError("All `vectors` are 0 – expected at least one that is not.")
        unit = (
            vectors.double()[norms[:, 0] > 0] / norms[norms[:, 0] > 0]
        )  # so that a long vector does not hide a short one
        _, sizes, basis = torch.linalg.svd(unit, full_matrices=False)
        return cls(hook_point, basis[sizes > 1e-6 * sizes[0]].float().contiguous())

    @classmethod
    def from_readouts(cls, readouts: Readout | Latents | Sequence[Readout | Latents]) -> Subspace:
        """Subspace of the weights of probes and directions, and of what latents write: their decoder rows.

        Raises:
            `ValueError`: none, or readouts at different hook points.
        """
        readouts = as_list(readouts)
        points = sorted({readout.hook_point for readout in readouts})
        if len(points) != 1:
            raise ValueError(
                f"The readouts are at {', '.join(f'`{point}`' for point in points) or 'no hook point'} – expected one hook "
                "point: a subspace lives in one activation. Make one per hook point."
            )
        rows = [r.written if isinstance(r, Latents) else r.directions for r in readouts]
        made = cls.spanned_by(points[0], torch.cat([row.float().cpu() for row in rows]))
        claims = [r.claim for r in readouts if isinstance(r, Latents) and r.claim is not None]
        return replace(
            made, sources=tuple(r for r in readouts if isinstance(r, Readout)), claim=claims[0] if claims else None
        )

    @classmethod
    def from_pca(
        cls, model: Any, tokenizer: Any, examples: Sequence[Any], hook_point: str, rank: int, progress: bool = False
    ) -> Subspace:
        """The principal components of a model's activations on examples' counted tokens, mean removed; tokens whose norm
        stands out are left out.

        Args:
            model (`nn.Module`), tokenizer: the model that is read, as its adapters stand.
            examples (`list`): texts or examples, see `tokenize_examples`.
            hook_point (`str`): where to read.
            rank (`int`): R, the number of components.

        Raises:
            `ValueError`: a rank that the examples do not have.
        """
        batch: TokenBatch = tokenize_examples(examples, tokenizer, end_of_turn_ids=end_of_turn_ids(model, tokenizer))
        found = read_activations(model, batch, [hook_point])[hook_point]  # (N, D)
        found = found[~norm_outliers(found)]
        if not 0 < rank <= min(len(found) - 1, found.shape[1]):
            raise ValueError(
                f"`rank` is {rank} – expected 1 to {min(len(found) - 1, found.shape[1])}: there are {len(found)} counted "
                f"tokens of width {found.shape[1]}."
            )
        centered = found.double() - found.double().mean(0)
        _, _, components = torch.linalg.svd(centered, full_matrices=False)
        basis = components[:rank].float().contiguous()
        return cls(hook_point, basis, claim=(make_canaries(model, tokenizer, hook_point, basis), basis))

    def random(self, seed: int) -> Subspace:
        """The control: a random subspace of the same rank, orthogonal to this one, drawn from `seed`.

        Raises:
            `ValueError`: there is no room for one.
        """
        rank, width = self.basis.shape
        if 2 * rank > width:
            raise ValueError(
                f"The subspace has rank {rank} of {width} – expected at most {width // 2}: no orthogonal one of its rank exists."
            )
        drawn = torch.randn(rank, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        own = self.basis.double().cpu()
        drawn -= drawn @ own.T @ own
        return Subspace(self.hook_point, torch.linalg.qr(drawn.T)[0].T.float().contiguous(), self.sources, self.claim)

    def coordinates(self, activation: torch.Tensor) -> torch.Tensor:
        """Coordinates (..., R) of an activation (..., D)."""
        return activation @ self.basis.detach().to(activation).T

    def ablate(self, activation: torch.Tensor) -> torch.Tensor:
        """The activation without its component in the subspace: h − Qᵀ Q h.

        Computed in float32 whatever the model's precision: in bfloat16 a part of the component would stay.
        """
        with torch.autocast(activation.device.type, enabled=False):
            basis = self.basis.detach().to(activation.device)
            exact = activation.float()
            return (exact - (exact @ basis.T) @ basis).to(activation.dtype)
