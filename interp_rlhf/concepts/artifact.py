"""Artifacts on disk: one safetensors file with the weights of a concept and a JSON header that describes them.

In: an `Artifact`, or the path of its file. Out: the file, or the `Artifact`. A file is written whole or not at all, and never
holds a pickle. It must not know cards or models.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .latents import Latents
from .pooling import ATTENTION

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER_KEY = "interp_rlhf"


@dataclass(frozen=True)
class Header:
    """An artifact's description of itself.

    Attributes:
        kind (`str`): `probe`, `direction` or `sae_latents`.
        method (`str`): `logistic_regression` or `difference_of_means`.
        hook_point (`str`): module path of the activation that it reads.
        width (`int`): D.
        model_id (`str`), identity (`str`): the model it was made on, see `activations.identity`.
        structure (`dict`): the architecture of that model. A tuned copy has the same.
        label_names (`tuple[str, str]`): names of label 0 and label 1.
        data (`str`): fingerprint of the examples it was fitted on.
        examples (`int`): number of those examples.
        seed (`int`): seed of the fit.
        calibration (`dict[str, tuple[float, float]]`): pooling to (scale, offset), which make a pooled score a log-odds. Found on
            scores out of fold.
        include_end_of_turn (`bool`): end-of-turn tokens counted in the fit.
        versions (`dict[str, str]`): versions of the libraries that made the fit.
        canaries (`dict`): token sequences and the scores on them, see `activations.canaries`. Artifacts of versions before 0.2
            have none.
        sae (`dict`): for `sae_latents`: indices of the latents, S, k, normalization, and the source of the autoencoder.
        pooling (`str`): the pooling that it was fitted for.
        regularization (`float`, *optional*), sharpness (`float`, *optional*): choices of the cross-validation: inverse strength
            of the L2 penalty and, for `attention`, the standard deviation of the query's logits. None in artifacts of versions
            before 0.3.
    """

    kind: str
    method: str
    hook_point: str
    width: int
    model_id: str
    identity: str
    structure: dict[str, Any]
    label_names: tuple[str, str]
    data: str
    examples: int
    seed: int
    calibration: dict[str, tuple[float, float]]
    include_end_of_turn: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    canaries: dict[str, Any] = field(default_factory=dict)
    sae: dict[str, Any] = field(default_factory=dict)
    pooling: str = "mean"
    regularization: float | None = None
    sharpness: float | None = None


def calibration_of(header: Header, pooling: str, name: str) -> tuple[float, float]:
    """Scale and offset that make a score of this pooling a log-odds.

    Raises:
        `ValueError`: the artifact is not calibrated for this pooling.
    """
    if pooling not in header.calibration:
        raise ValueError(
            f"`pooling` of `{name}` is `{pooling}` – the artifact is calibrated for "
            f"{', '.join(f'`{known}`' for known in sorted(header.calibration)) or 'none'}. Under another pooling its scores did "
            "not separate the labels out of fold, or that pooling needs its own fit (`probe fit --pooling`), or was registered "
            "after the fit. Choose one of these, fit it again, or fit on other data."
        )
    return header.calibration[pooling]


def strength_of(header: Header) -> float | None:
    """Regularization of a fit, for controls that need the same one. None for a difference of means, which has none."""
    if header.method == "difference_of_means":
        return None
    if header.regularization is None:
        return 1.0 if header.kind == "sae_latents" else 0.001  # the values in versions before 0.3
    return header.regularization


@dataclass(frozen=True, eq=False)
class Artifact:
    """Weights of one concept: the score of a token is ⟨h, weight⟩ + bias, or ⟨latents(h), weight⟩ + bias.

    Attributes:
        weight (`torch.FloatTensor` of shape (D,), or (K,) of latents): float32.
        bias (`float`): 0 for a direction.
        header (`Header`): its description.
        latents (`Latents`, *optional*): for `sae_latents`: the K latents that the weight weighs.
        query (`torch.FloatTensor` of the weight's shape, *optional*): for a fit for `attention`: a token's logit is
            ⟨h, query⟩ + query_bias, and the sink's logit is 0. Then bias is −⟨μ, weight⟩, so that the sink's score is 0 too.
    """

    weight: torch.Tensor
    bias: float
    header: Header
    latents: Latents | None = None
    query: torch.Tensor | None = None
    query_bias: float = 0.0

    def save(self, path: str | Path) -> str:
        """Write the file whole or not at all. Returns its SHA-256."""
        from safetensors.torch import save

        tensors = {"weight": self.weight.contiguous(), "bias": torch.tensor([self.bias])}
        if self.query is not None:
            tensors |= {"query": self.query.contiguous(), "query_bias": torch.tensor([self.query_bias])}
        if self.latents is not None:
            tensors |= {f"sae.{name}": tensor.contiguous().cpu() for name, tensor in self.latents.tensors().items()}
        data = save(tensors, metadata={HEADER_KEY: json.dumps(asdict(self.header), sort_keys=True)})
        write_atomically(path, data)
        return hashlib.sha256(data).hexdigest()


def read_directions(weight: torch.Tensor, latents: Latents | None, query: torch.Tensor | None) -> torch.Tensor:
    """Directions (R, D) along which an artifact reads: its weight and its query, or the encoder rows of its latents."""
    if latents is not None:
        return latents.chosen.cpu()
    rows = [weight] if query is None else [weight, query]
    return torch.stack([row.detach().float().cpu() for row in rows])


def load_artifact(path: str | Path, sha256: str | None = None) -> Artifact:
    """Artifact of a file.

    Args:
        path (`str` or `Path`): the safetensors file.
        sha256 (`str`, *optional*): digest that the card names and the file must have.

    Raises:
        `FileNotFoundError`: no such file.
        `ValueError`: the file is truncated, is not an artifact, has another digest, or has weights that are not finite.
    """
    from safetensors import SafetensorError

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"`{path}` does not exist – expected an artifact written by `interp-rlhf probe fit`.")
    data = path.read_bytes()
    try:
        tensors = load_tensors(data)
    except SafetensorError as error:
        raise ValueError(
            f"`{path}` ({len(data)} bytes) is not a whole safetensors file ({error}) – expected an artifact. It may be "
            "truncated: copy it again or fit it again."
        ) from None
    digest = hashlib.sha256(data).hexdigest()
    if sha256 is not None and digest != sha256:
        raise ValueError(
            f"`{path}` has SHA-256 {digest} – the card expects {sha256}. The artifact was changed or swapped after the "
            "card was written: restore it, or fit and check again."
        )
    header = _header_of(data, path)
    wanted = {"weight", "bias", *(("query", "query_bias") if header.pooling == ATTENTION else ())}
    if missing := sorted(wanted - set(tensors)):
        raise ValueError(
            f"`{path}` lacks {', '.join(f'`{name}`' for name in missing)} – expected an artifact fitted for "
            f"`{header.pooling}`. Fit it again."
        )
    weight, bias = tensors["weight"].float(), float(tensors["bias"].item())
    size = len(header.sae["latents"]) if header.kind == "sae_latents" else header.width
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    query = tensors["query"].float() if "query" in tensors else None
    shapes = {tuple(tensor.shape) for tensor in (weight, query) if tensor is not None}
    if shapes != {(size,)} or not finite or (query is None) != (header.pooling != ATTENTION):
        raise ValueError(
            f"`{path}`, fitted for `{header.pooling}`, has {'a' if query is not None else 'no'} query and a weight of shape "
            f"{tuple(weight.shape)}, all numbers finite: {finite} – expected ({size},) finite numbers, and a query for "
            "`attention` only. Fit it again."
        )
    query_bias = float(tensors["query_bias"].item()) if query is not None else 0.0
    return Artifact(weight, bias, header, _latents_of(tensors, header), query, query_bias)


def _latents_of(tensors: dict[str, torch.Tensor], header: Header) -> Latents | None:
    if header.kind != "sae_latents":
        return None
    weights: dict[str, Any] = {
        name.removeprefix("sae."): tensor for name, tensor in tensors.items() if name.startswith("sae.")
    }
    sae = header.sae
    return Latents(
        name="sae", hook_point=header.hook_point, k=sae["k"], grouped=sae["grouped"], normalization=sae["normalization"],
        **weights,
    )  # fmt: skip


def load_tensors(source: bytes | str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, or of its bytes, copied into memory that torch allocates.

    safetensors leaves tensors where they lie in the file, at addresses that need not be multiples of 64. There vector loops add
    up in another order: a run that continues from a file would differ in its last bits from one that was never saved.
    """
    from safetensors.torch import load, load_file

    tensors = load(source) if isinstance(source, bytes) else load_file(source)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file whole, or leave the old one: write a temporary file in the same folder, then rename it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)  # it is gone if the rename succeeded


@contextmanager
def folder_aside(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder next to its destination. The caller fills it and moves it there; if that fails, nothing of it stays."""
    made = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)  # it is gone if the caller moved it


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    from importlib.metadata import version

    names = ("interp-rlhf", "torch", "transformers", "trl", "scikit-learn")
    return {name: version(name) for name in names}


def _header_of(data: bytes, path: Path) -> Header:
    size = int.from_bytes(data[:8], "little")
    metadata: dict[str, Any] = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    if HEADER_KEY not in metadata:
        raise ValueError(
            f"`{path}` has no `{HEADER_KEY}` header – expected an artifact. Write one with `interp-rlhf probe fit`: another "
            "safetensors file does not do."
        )
    values = json.loads(metadata[HEADER_KEY])
    known = {item.name for item in fields(Header)}
    if unknown := sorted(set(values) - known):
        raise ValueError(
            f"`{path}` has unknown header keys {unknown} – written by a newer version? Upgrade interp-rlhf."
        )
    if missing := sorted(
        item.name
        for item in fields(Header)
        if item.default is MISSING and item.default_factory is MISSING and item.name not in values
    ):
        raise ValueError(f"`{path}` lacks the header keys {missing} – written by an older version. Fit it again.")
    values["label_names"] = tuple(values["label_names"])
    values["calibration"] = {key: tuple(pair) for key, pair in values["calibration"].items()}
    return Header(**values)
