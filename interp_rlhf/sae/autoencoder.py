"""Sparse autoencoders and transcoders with frozen weights.

In: an activation (..., D). Out: latents, a reconstruction and its quality. It must not know file formats, nor the model whose
activations it reads: it is never a submodule of one.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn.functional import embedding_bag
from torch.utils.checkpoint import checkpoint

from ..activations.canaries import RELATED, Canaries, agreement
from ..activations.identity import identity
from ..activations.noise import runs_here
from ..activations.reference_pass import adapters_off_in
from ..concepts.latents import Latents, blocks, normalize
from .quality import LatentSums, variance_unexplained

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..concepts.latents import Normalization

logger = logging.getLogger(__name__)

Architecture = Literal["gated", "groupmax", "jumprelu", "standard", "topk"]
TENSORS = (
    "encoder", "encoder_bias", "decoder", "decoder_bias", "center", "threshold", "gate_scale", "gate_bias", "skip",
)  # fmt: skip


@dataclass(frozen=True)
class SaeSpec:
    """Description of a sparse autoencoder: everything except its weights.

    Attributes:
        architecture (`str`): `standard` (ReLU), `jumprelu`, `gated`, `topk` or `groupmax`.
        hook_point (`str`): module path whose output is encoded.
        k (`int`, *optional*): latents that are on per token, for `topk` and `groupmax`.
        normalization (`str`, defaults to `"none"`): normalization of the activation, see `Latents`.
        restore (`bool`, defaults to `True`): True if the output is scaled back to the activation's scale. False for a
            transcoder, whose output is another activation.
        output_point (`str`, *optional*): module path whose output a transcoder predicts; None for an autoencoder.
        model_id (`str`): the model that it was trained on, as its file says.
        source (`dict`): its origin: path or Hub id, revision, digest, format and hook name.
    """

    architecture: Architecture
    hook_point: str
    k: int | None = None
    normalization: Normalization = "none"
    restore: bool = True
    output_point: str | None = None
    model_id: str = ""
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def training(self) -> dict[str, Any]:
        """Settings of its training, as its file has them; empty if another library trained it."""
        found = (self.source.get("metadata") or {}).get("training")
        return found if isinstance(found, dict) else {}

    @property
    def exact_columns(self) -> bool:
        """True if a latent depends on no other latent. Reading k of them then touches k rows."""
        return self.k is None


class SparseAutoencoder(nn.Module):
    """A frozen sparse autoencoder or transcoder.

    Args:
        spec (`SaeSpec`): its description.
        encoder (`torch.Tensor` of shape (S, D)), encoder_bias (`torch.Tensor` of shape (S,)): weights of the encoder. For
            `gated`, those of the gate.
        decoder (`torch.Tensor` of shape (S, D_out)), decoder_bias (`torch.Tensor` of shape (D_out,)): weights of the decoder.
        center (`torch.Tensor` of shape (D,), *optional*): subtracted from the input.
        threshold (`torch.Tensor` of shape (S,), *optional*): thresholds of `jumprelu`.
        gate_scale, gate_bias (`torch.Tensor` of shape (S,), *optional*): for `gated`, see `Latents`.
        skip (`torch.Tensor` of shape (D_out, D), *optional*): a transcoder's linear path past its latents.

    Raises:
        `ValueError`: shapes do not fit together, or the architecture does not have a tensor. One error lists all problems.
    """

    def __init__(self, spec: SaeSpec, **tensors: torch.Tensor | None):
        super().__init__()
        self.spec = spec
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        problems = _problems(spec, present)
        if problems:
            listed = "\n".join(f"  - {problem}" for problem in problems)
            raise ValueError(f"The sparse autoencoder has {len(problems)} problem(s):\n{listed}")
        for name in TENSORS:
            tensor = present.get(name)
            self.register_buffer(name, None if tensor is None else tensor.detach().float().contiguous())
        self._all: tuple[torch.Tensor, Latents] | None = None

    encoder: torch.Tensor
    encoder_bias: torch.Tensor
    decoder: torch.Tensor
    decoder_bias: torch.Tensor
    center: torch.Tensor | None
    threshold: torch.Tensor | None
    gate_scale: torch.Tensor | None
    gate_bias: torch.Tensor | None
    skip: torch.Tensor | None

    @property
    def size(self) -> int:
        """S, the number of latents."""
        return len(self.encoder)

    @property
    def width(self) -> int:
        """D, the width of the activation."""
        return self.encoder.shape[1]

    @property
    def _canaries(self) -> Canaries | None:
        return Canaries.of((self.spec.source.get("metadata") or {}).get("canaries") or {})

    def description(self) -> dict[str, Any]:
        """Description of this autoencoder for an artifact of its latents, as plain values."""
        spec = self.spec
        return {
            "size": self.size, "architecture": spec.architecture, "k": spec.k, "grouped": spec.architecture == "groupmax",
            "normalization": spec.normalization, "source": spec.source,
        }  # fmt: skip

    def latents(self, indices: int | Sequence[int] | None = None, name: str = "sae") -> Latents:
        """Some of its latents as a readout, all by default. The readout of all latents shares the weights.

        Raises:
            `ValueError`: an index out of range.
        """
        if self._all is None or self._all[0] is not self.encoder:  # moved to another device since
            latents = Latents(
                "sae", self.spec.hook_point, self.encoder, self.encoder_bias, self.center, self.threshold, self.gate_scale,
                self.gate_bias, self.spec.k, self.spec.architecture == "groupmax", self.spec.normalization, None,
                self.decoder if self.spec.output_point is None else None,  # a transcoder writes at another hook point
                None if self._canaries is None else (self._canaries, self.encoder),
            )  # fmt: skip
            self._all = (self.encoder, latents)
        latents = self._all[1]
        if isinstance(indices, int):
            indices = [indices]
        if indices is not None:
            return latents.choose(indices, name)
        return latents if name == latents.name else replace(latents, name=name)

    def encode(self, activation: torch.Tensor) -> torch.Tensor:
        """All latents (..., S) of an activation (..., D), dense, float32."""
        return self.latents()(activation)

    def decode(self, latents: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
        """Reconstruction (..., D_out) of latents (..., S), without a transcoder's skip path.

        Args:
            like (`torch.Tensor` of shape (..., D), *optional*): the encoded activation. The normalizations that remove
                its scale need it.

        Raises:
            `ValueError`: the normalization needs `like`, and it is None.
        """
        return self._restore(latents @ self.decoder + self.decoder_bias, like)

    def forward(self, activation: torch.Tensor) -> torch.Tensor:
        """Reconstruction (..., D_out) of an activation (..., D), in blocks of tokens. (..., S) is never held."""
        flat = activation.float().reshape(-1, self.width)
        # A gradient through ReLU, JumpReLU or gates needs the latents. The backward pass encodes them again, block by block.
        again = self.spec.k is None and torch.is_grad_enabled() and flat.requires_grad
        parts = [
            checkpoint(self._reconstruct, part, use_reentrant=False, preserve_rng_state=False)
            if again
            else self._reconstruct(part)
            for part in blocks(flat, self.size)
        ]
        found = torch.cat(parts) if parts else flat.new_zeros(0, self.decoder.shape[1])
        return found.view(*activation.shape[:-1], self.decoder.shape[1])

    @torch.no_grad()
    def fvu(self, activation: torch.Tensor, target: torch.Tensor | None = None) -> float:
        """Fraction of variance unexplained over all tokens, see `variance_unexplained`. Lower = better.

        Args:
            activation (`torch.Tensor` of shape (..., D)): at least two tokens.
            target (`torch.Tensor` of shape (..., D_out), *optional*): the activation that a transcoder should predict; the
                encoded activation by default.
        """
        wanted = activation if target is None else target
        wanted = wanted.double().reshape(-1, wanted.shape[-1])
        return float(variance_unexplained(wanted - self(activation).double().reshape(wanted.shape), wanted))

    @torch.no_grad()
    def l0(self, activation: torch.Tensor) -> float:
        """Mean number of latents that are on per token of an activation (..., D)."""
        sums = LatentSums(self.size)
        for part in blocks(activation.reshape(-1, self.width), self.size):
            sums.add(self.encode(part))
        return sums.l0

    def digest(self) -> str:
        """SHA-256 of the weights."""
        digest = hashlib.sha256()
        for _, tensor in sorted(self.named_buffers()):
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def check_model(self, model: Any) -> None:
        """Refuse a model that it was not trained on.

        An autoencoder of this package carries canaries. A related model, such as one that was trained further, is allowed with a
        warning. The unexplained variance on that model then shows how useful the autoencoder is.

        Raises:
            `ValueError`: the model lacks the hook point, has another width, or is an unrelated model.
        """
        self.latents().check_model(model)
        training = self.spec.training
        canaries = self._canaries
        name = self.spec.model_id or "another model"
        if canaries is None or not runs_here(model):
            if training and training.get("model") != identity(model, self.spec.hook_point):
                logger.warning(
                    "The autoencoder was trained on `%s`, and this model has other norm weights: look at the variance that it "
                    "leaves "
                    "unexplained here.", name,
                )  # fmt: skip
            return
        with adapters_off_in(model) as bare:
            verdict = agreement(bare, canaries, self.spec.hook_point, self.encoder)
        if verdict.agrees:
            return
        if verdict.correlation < RELATED:
            raise ValueError(
                f"The autoencoder was trained on `{name}` at `{training.get('hook_point', self.spec.hook_point)}` and this "
                "model at "
                f"`{self.spec.hook_point}` is not that one: {verdict}. Its latents mean nothing here – expected the model that "
                "it was trained on, or one that was made from it. Train one on this model (`interp-rlhf sae train`)."
            )
        logger.warning(
            "The autoencoder was trained on `%s`: %s. Look at the variance that it leaves unexplained here.",
            name,
            verdict,
        )

    def _reconstruct(self, flat: torch.Tensor) -> torch.Tensor:
        readout = self.latents()
        if self.spec.k is None:
            found = readout(flat) @ self.decoder + self.decoder_bias
        else:
            values, indices = readout.top(flat)
            found = embedding_bag(indices, self.decoder, per_sample_weights=values, mode="sum") + self.decoder_bias
        found = self._restore(found, flat)
        return found if self.skip is None else found + flat @ self.skip.T

    def _restore(self, output: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
        if self.spec.normalization == "none" or not self.spec.restore:
            return output
        if like is None:
            raise ValueError(
                f"`decode` was given no `like` – expected the activation that was encoded: `{self.spec.normalization}` took its "
                "scale away. Pass it, or call the autoencoder itself."
            )
        _, scale, mean = normalize(like, self.spec.normalization)
        return output if scale is None else output * scale + mean


def describe(sae: SparseAutoencoder) -> dict[str, Any]:
    """Description of an autoencoder for people, as plain values."""
    spec = sae.spec
    return {
        "architecture": spec.architecture, "latents": sae.size, "hook_point": spec.hook_point, "output_point": spec.output_point,
        "k": spec.k, "model": spec.model_id, "source": spec.source,
    }  # fmt: skip


def random_dictionary(sae: SparseAutoencoder, seed: int, k: int | None = None) -> SparseAutoencoder:
    """The control: an autoencoder of the same shape whose decoder is random and frozen, and whose encoder is its transpose.

    Rows are unit vectors drawn from `seed`. It is a TopK autoencoder with the same k, or with `k` if the architecture has no k.
    A result that a random dictionary also reaches did not need the training of the autoencoder (arXiv 2602.14111).

    Args:
        k (`int`, *optional*): latents that are on per token, for an autoencoder that has no k. Pass its L0.

    Raises:
        `ValueError`: neither the autoencoder nor the caller has a k.
    """
    count = sae.spec.k or k
    if count is None:
        raise ValueError(f"`k` is None – expected the L0 of the {sae.spec.architecture} autoencoder, which has no k.")
    rows = torch.randn(sae.size, sae.width, generator=torch.Generator().manual_seed(seed))
    rows = rows / rows.norm(dim=1, keepdim=True)
    spec = SaeSpec(
        "topk", sae.spec.hook_point, min(max(1, round(count)), sae.size), sae.spec.normalization, sae.spec.restore,
        model_id=sae.spec.model_id, source={"random_dictionary": seed},
    )  # fmt: skip
    center = sae.center
    if center is None:  # an autoencoder's decoder bias is about the mean of its (normalized) activations
        center = torch.zeros(sae.width) if sae.spec.output_point else sae.decoder_bias
    return SparseAutoencoder(
        spec, encoder=rows, encoder_bias=torch.zeros(sae.size), decoder=rows, decoder_bias=center, center=center
    )


def _problems(spec: SaeSpec, tensors: dict[str, torch.Tensor]) -> list[str]:
    needed = {"encoder", "encoder_bias", "decoder", "decoder_bias"}
    needed |= {"jumprelu": {"threshold"}, "gated": {"gate_scale", "gate_bias"}}.get(spec.architecture, set())
    allowed = needed | {"center", "skip"}
    problems = [f"no `{name}`" for name in sorted(needed - set(tensors))]
    problems += [f"`{n}` – `{spec.architecture}` has none" for n in sorted(set(tensors) - allowed)]
    if (spec.k is not None) != (spec.architecture in ("topk", "groupmax")):
        problems.append(f"`k` is {spec.k} – expected a number for `topk` and `groupmax`, and none for the others")
    if problems:
        return problems
    encoder, decoder = tensors["encoder"], tensors["decoder"]
    if encoder.dim() != 2 or decoder.dim() != 2 or len(encoder) != len(decoder):
        shapes = f"`encoder` has shape {tuple(encoder.shape)} and `decoder` {tuple(decoder.shape)}"
        return [f"{shapes} – expected (S, D) and (S, D_out)"]
    (size, width), out = encoder.shape, decoder.shape[1]
    expected: dict[str, tuple[int, ...]] = {
        "encoder_bias": (size,), "decoder_bias": (out,), "center": (width,), "threshold": (size,), "gate_scale": (size,),
        "gate_bias": (size,), "skip": (out, width),
    }  # fmt: skip
    for name, shape in expected.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            problems.append(f"`{name}` has shape {tuple(tensors[name].shape)} – expected {shape}")
    problems += [f"`{name}` is not finite" for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if spec.output_point is None and out != width:
        problems.append(f"`decoder` has width {out} – expected {width}: only a transcoder gives another activation")
    if spec.k is not None and not 0 < spec.k <= size:
        problems.append(f"`k` is {spec.k} – expected 1 to {size}")
    return problems
