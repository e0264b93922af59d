"""SAE files as the real sae-lens and sparsify write them, each with the library's own latents and reconstruction.

Comes in: an empty folder. Goes out: a `Case`, a folder with weights and config plus what the library computes from it
for one input. Nothing here knows our reader. sae-lens 6.54 and eai-sparsify 1.3 are imported inside the functions, so
that the module imports where they are not installed. All weights are random, seeded by the name of the case, and no
parameter is zero or one where that would hide a mistake: biases, thresholds and skip weights are non-zero, decoder rows
differ in norm, tokens differ in mean and scale.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

D_IN, D_OUT, D_SAE, K = 12, 9, 40, 7
HEADS = (3, 4)  # n_heads × d_head = D_IN, for the input of `hook_z` SAEs
SCALING_FACTOR = 0.37  # what sae-lens estimates as √d_in / mean ‖x‖ during training and folds at its end

NORMALIZATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")


@dataclass(frozen=True)
class Case:
    """One SAE on disk and what its own library makes of one input.

    `latents` is dense (2, 5, S). `reconstruction` is the library's `forward(x)`: in the units of the raw output, with
    the skip connection where there is one.
    """

    folder: Path
    x: Tensor  # (2, 5, D_IN), for `hook_z` SAEs (2, 5, n_heads, d_head)
    latents: Tensor
    reconstruction: Tensor


def sae_lens_reads(folder: Path):
    """The inference SAE that sae-lens loads from `cfg.json` and `sae_weights.safetensors`."""
    from sae_lens import SAE

    return SAE.load_from_disk(folder)


def sparsify_reads(folder: Path):
    """The `SparseCoder` that sparsify loads from `cfg.json` and `sae.safetensors`."""
    # Its Triton decoder has no CPU path, and it is chosen at import wherever Triton is installed.
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    from sparsify import SparseCoder

    return SparseCoder.load_from_disk(folder)


def gemma_scope_reads(folder: Path):
    """The SAE that sae-lens's Gemma Scope loaders make of a local `params.npz` or `params.safetensors`.

    The loaders only know the Hugging Face hub and take width and model width from its names; here the download is
    replaced by the local file and the two sizes come from the weights. The conversion is the library's.
    """
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from safetensors.torch import load_file

    def local(*_, filename: str | None = None, **__):
        return str(folder / (filename or "config.json"))  # only the config is asked for by position

    def convert(path, device, cfg_overrides):
        if (folder / "params.npz").exists():
            load, repository = loaders.gemma_2_sae_huggingface_loader, "google/gemma-scope-2b-pt-res"
            sizes = {"d_in": D_IN, "d_sae": D_SAE}
        else:
            load, repository = loaders.gemma_3_sae_huggingface_loader, "google/gemma-scope-2-1b-pt"
            sizes = None
        name = "/".join(folder.parts[-3:])
        config, weights, _ = load(repository, name, device=device, cfg_overrides=sizes)
        return config, weights

    def shapes(*_):
        return {key: list(value.shape) for key, value in load_file(folder / "params.safetensors").items()}

    with (
        mock.patch.object(loaders, "hf_hub_download", local),
        mock.patch.object(loaders, "get_safetensors_tensor_shapes", shapes),
    ):
        return SAE.load_from_disk(folder, converter=convert)


@torch.no_grad()
def sae_lens_outputs(sae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents (2, 5, S) and reconstruction of a sae-lens SAE."""
    latents = sae.encode(x)
    return latents.clone(), sae(x)


@torch.no_grad()
def sparsify_outputs(coder: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense latents (2, 5, S) and reconstruction of a sparsify coder, which takes no more than two dimensions."""
    flat = x.flatten(0, -2)  # (B·T, D)
    top = coder.encode(flat)
    latents = torch.zeros(len(flat), coder.num_latents).scatter_(-1, top.top_indices, top.top_acts)
    # With `multi_topk`, `forward` returns the reconstruction from 4·k latents, a by-product of its training loss.
    with mock.patch.object(coder.cfg, "multi_topk", False):
        reconstruction = coder(flat).sae_out
    return latents.unflatten(0, x.shape[:-1]), reconstruction.unflatten(0, x.shape[:-1])


def _seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _input(generator: torch.Generator) -> Tensor:
    """(2, 5, D_IN), tokens with different means and scales, so that every normalization does something."""
    scale = torch.rand(2, 5, 1, generator=generator) * 2 + 0.5
    shift = torch.randn(2, 5, 1, generator=generator) * 0.7
    return torch.randn(2, 5, D_IN, generator=generator) * scale + shift


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    if name == "W_dec":  # rows of norm 0.5 to 2
        norms = torch.rand(shape[0], 1, generator=generator) * 1.5 + 0.5
        return values / values.norm(dim=-1, keepdim=True) * norms
    if name == "threshold":
        return torch.rand(shape, generator=generator) * 0.9 + 0.1
    return values * (0.4 if values.ndim == 2 else 0.3)


@torch.no_grad()
def _randomize(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter anew, in place, in the order of the names: independent of the library's own seeds."""
    for name, parameter in sorted(module.named_parameters()):
        parameter.copy_(_draw(name, parameter.shape, generator))


# --- sae-lens ---


def sae_lens_sae(architecture: str, generator: torch.Generator, *, training: bool = False, **options):
    """A sae-lens SAE of one architecture with random weights; `options` go to its config."""
    from sae_lens.registry import get_sae_class, get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata

    sae_class, config_class = (get_sae_training_class if training else get_sae_class)(architecture)
    hook_name = "blocks.1.attn.hook_z" if "reshape_activations" in options else "blocks.1.hook_resid_post"
    metadata = {"model_name": "tiny", "hook_name": hook_name, "prepend_bos": True, "context_size": 64}
    if "transcoder" in architecture:
        metadata |= {"hook_name": "blocks.1.hook_mlp_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    with warnings.catch_warnings():  # matching pursuit and Matryoshka warn of defaults
        warnings.simplefilter("ignore")
        config = config_class(d_in=D_IN, d_sae=D_SAE, metadata=SAEMetadata(**metadata), **options)
        sae = sae_class(config)
    _randomize(sae, generator)
    if hasattr(sae, "topk_threshold"):  # BatchTopK: the one threshold learnt for all latents
        sae.topk_threshold.fill_(0.8)
    return sae


def _sae_lens_case(
    name: str,
    folder: Path,
    architecture: str,
    *,
    training: bool = False,
    save: str = "save_model",
    fold: bool = False,
    whiten: bool = False,
    negative_threshold: bool = False,
    **options,
) -> Case:
    generator = _seeded(name)
    sae = sae_lens_sae(architecture, generator, training=training, **options)
    x = _input(generator)
    if "reshape_activations" in options:
        x = x.unflatten(-1, HEADS)
    if negative_threshold:
        sae.threshold.data -= 0.6
    if fold:  # as the trainer does after its last step
        sae.fold_activation_norm_scaling_factor(SCALING_FACTOR)
    if whiten:
        matrix = torch.eye(D_IN) + torch.randn(D_IN, D_IN, generator=generator) * 0.1
        sae.fold_activation_whitening(torch.randn(D_IN, generator=generator), matrix, torch.linalg.inv(matrix))
    getattr(sae, save)(folder)
    return Case(folder, x, *sae_lens_outputs(sae_lens_reads(folder), x))


def _sae_lens_options() -> dict[str, dict[str, Any]]:
    """Name → arguments of `_sae_lens_case`."""
    cases: dict[str, dict[str, Any]] = {}

    def add(name: str, architecture: str, **options):
        cases[f"sae_lens-{name}"] = {"architecture": architecture, **options}

    def variants(normalizations=NORMALIZATIONS):
        for normalization in normalizations:
            for centred in (True, False):
                suffix = f"{normalization}-{'b_dec' if centred else 'no_b_dec'}"
                yield suffix, {"normalize_activations": normalization, "apply_b_dec_to_input": centred}

    # Inference SAEs, saved by `save_model`.
    for suffix, options in variants():
        add(f"standard-{suffix}", "standard", **options)
        add(f"topk-{suffix}", "topk", k=K, **options)
        add(f"topk_rescaled-{suffix}", "topk", k=K, rescale_acts_by_decoder_norm=True, **options)
        add(f"jumprelu-{suffix}", "jumprelu", **options)
        add(f"gated-{suffix}", "gated", **options)
    # 33 of 40 latents: among the top k are negative pre-activations, which the ReLU behind the selection zeroes.
    add("topk-k_beyond_positives", "topk", k=33)
    # Below zero the ReLU decides, not the threshold.
    add("jumprelu-negative_threshold", "jumprelu", negative_threshold=True)
    for dtype in ("float64", "bfloat16"):
        add(f"standard-{dtype}", "standard", dtype=dtype)
    for architecture, more in (("standard", {}), ("topk", {"k": K}), ("jumprelu", {}), ("gated", {})):
        add(f"{architecture}-hook_z", architecture, reshape_activations="hook_z", **more)
        add(f"{architecture}-hook_z-layer_norm", architecture, reshape_activations="hook_z",
            normalize_activations="layer_norm", **more)  # fmt: skip

    # Transcoders: never `apply_b_dec_to_input`, normalized on the way in only.
    for architecture in TRANSCODERS:
        add(f"{architecture}-square", architecture, d_out=D_IN, apply_b_dec_to_input=False)
        for normalization in NORMALIZATIONS:
            add(f"{architecture}-{normalization}", architecture, d_out=D_OUT, apply_b_dec_to_input=False,
                normalize_activations=normalization)  # fmt: skip

    # Training SAEs: a checkpoint (`save_model`: training config, nothing folded) and the final file
    # (`save_inference_model`: TopK folds decoder norms, the BatchTopK family becomes JumpReLU).
    trained = (
        ("standard", "standard", {}),
        ("topk_rescaled", "topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
        ("topk", "topk", {"k": K, "rescale_acts_by_decoder_norm": False}),
        ("jumprelu", "jumprelu", {}),
        ("gated", "gated", {}),
        ("batchtopk_rescaled", "batchtopk", {"k": K, "rescale_acts_by_decoder_norm": True}),
        ("batchtopk", "batchtopk", {"k": K, "rescale_acts_by_decoder_norm": False}),
        ("matryoshka_batchtopk_rescaled", "matryoshka_batchtopk",
         {"k": K, "rescale_acts_by_decoder_norm": True, "matryoshka_widths": [10, D_SAE]}),
        ("matryoshka_batchtopk", "matryoshka_batchtopk",
         {"k": K, "rescale_acts_by_decoder_norm": False, "matryoshka_widths": [10, D_SAE]}),
    )  # fmt: skip
    for name, architecture, more in trained:
        for suffix, options in variants(("none", "constant_norm_rescale", "layer_norm")):
            final = {"training": True, "save": "save_inference_model", **more, **options}
            add(f"trained-{name}-{suffix}", architecture, **final)
        # Folded at the end of training: the file says "none".
        add(f"trained-{name}-folded", architecture, training=True, save="save_inference_model", fold=True,
            normalize_activations="expected_average_only_in", **more)  # fmt: skip
        if "batchtopk" not in architecture:  # checkpoints of those are in REFUSED
            for suffix, options in variants(("none", "layer_norm")):
                add(f"checkpoint-{name}-{suffix}", architecture, training=True, **more, **options)
    for architecture in ("standard", "gated"):
        for centred in (True, False):
            add(f"trained-{architecture}-whitened-{'b_dec' if centred else 'no_b_dec'}", architecture, training=True,
                save="save_inference_model", whiten=True, normalize_activations="covariance_whitening",
                apply_b_dec_to_input=centred)  # fmt: skip
    # The threshold stays float32 in a checkpoint whose other weights are bfloat16.
    add("checkpoint-jumprelu-bfloat16", "jumprelu", training=True, dtype="bfloat16")
    return cases


# --- Gemma Scope: files that no library writes, read by sae-lens's loaders ---


def _gemma_weights(generator: torch.Generator, d_out: int) -> dict[str, Tensor]:
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "threshold": (D_SAE,)}
    shapes |= {"W_dec": (D_SAE, d_out), "b_dec": (d_out,)}
    return {name: _draw(name, torch.Size(shape), generator) for name, shape in shapes.items()}


def _gemma_scope_case(name: str, root: Path, *, alias: bool = False) -> Case:
    """Gemma Scope 1: `params.npz`; `alias` gives the lower-case `w_enc`, `w_dec` of some releases."""
    import numpy

    generator = _seeded(name)
    weights = _gemma_weights(generator, D_IN)
    if alias:
        weights = {name.replace("W_", "w_"): value for name, value in weights.items()}
    folder = root / "layer_1" / "width_16k" / "average_l0_41"
    folder.mkdir(parents=True)
    numpy.savez(folder / "params.npz", **{name: value.numpy() for name, value in weights.items()})
    x = _input(generator)
    return Case(folder, x, *sae_lens_outputs(gemma_scope_reads(folder), x))


def _gemma_scope_2_case(name: str, root: Path, *, kind: str = "resid_post", affine: bool = False) -> Case:
    """Gemma Scope 2: `params.safetensors` with lower-case names and `config.json` with Hugging Face hook points."""
    from safetensors.torch import save_file

    generator = _seeded(name)
    d_out = D_OUT if kind == "transcoder" else D_IN
    weights = {name.replace("W_", "w_"): value for name, value in _gemma_weights(generator, d_out).items()}
    config: dict[str, Any] = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt"}
    if kind == "transcoder":
        config |= {
            "hf_hook_point_in": "model.layers.1.pre_feedforward_layernorm.output",
            "hf_hook_point_out": "model.layers.1.post_feedforward_layernorm.output",
            "affine_connection": affine,
        }
    else:
        config |= {"hf_hook_point_in": "model.layers.1.output"}
    if affine:  # stored (D_in, D_out), unlike sae-lens's own `W_skip`
        weights["affine_skip_connection"] = _draw("W_skip", torch.Size((D_IN, d_out)), generator)
    folder = root / kind / f"layer_1_width_16k_l0_medium{'_affine' if affine else ''}"
    folder.mkdir(parents=True)
    save_file(weights, folder / "params.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    x = _input(generator)
    return Case(folder, x, *sae_lens_outputs(gemma_scope_reads(folder), x))


# --- sparsify ---


def _sparsify_case(
    name: str, root: Path, *, strip: tuple[str, ...] = (), hookpoint: str = "layers.1", **options
) -> Case:
    """One hook point's folder; `strip` removes fields from `cfg.json` that files of older versions do not have."""
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    from sparsify import SparseCoder, SparseCoderConfig

    generator = _seeded(name)
    config = SparseCoderConfig(**{"num_latents": D_SAE, "k": K, **options})
    coder = SparseCoder(D_IN, config)
    _randomize(coder, generator)
    if config.normalize_decoder:  # what its trainer does before every step
        coder.set_decoder_norm_to_unit_norm()
    folder = root / hookpoint
    coder.save_to_disk(folder)
    if strip:
        fields = json.loads((folder / "cfg.json").read_text())
        (folder / "cfg.json").write_text(json.dumps({key: fields[key] for key in fields if key not in strip}))
    x = _input(generator)
    return Case(folder, x, *sparsify_outputs(sparsify_reads(folder), x))


_SPARSIFY: dict[str, dict[str, Any]] = {
    "sparsify-topk": {},
    "sparsify-topk-free_decoder": {"normalize_decoder": False},
    "sparsify-topk-multi_topk": {"multi_topk": True},
    # More than half of the latents: the top k hold zeros.
    "sparsify-topk-k_beyond_positives": {"k": 33},
    "sparsify-topk-expansion": {"num_latents": 0, "expansion_factor": 3},
    "sparsify-groupmax": {"activation": "groupmax", "k": 8},  # 8 groups of 5 neighbouring latents
    "sparsify-transcode": {"transcode": True, "hookpoint": "layers.1.mlp"},
    "sparsify-skip": {"skip_connection": True},
    "sparsify-transcode-skip": {"transcode": True, "skip_connection": True, "hookpoint": "layers.1.mlp"},
    "sparsify-transcode-skip-groupmax": {
        "transcode": True, "skip_connection": True, "activation": "groupmax", "k": 8, "normalize_decoder": False,
    },
    # Files of earlier versions: no `activation` (TopK is meant), no `transcode`, no `skip_connection`.
    "sparsify-older_config": {"strip": ("activation", "transcode", "skip_connection", "multi_topk")},
}  # fmt: skip


CASES: dict[str, Callable[[Path], Case]] = {
    **{name: partial(_sae_lens_case, name, **options) for name, options in _sae_lens_options().items()},
    "gemma_scope": partial(_gemma_scope_case, "gemma_scope"),
    "gemma_scope-lower_case": partial(_gemma_scope_case, "gemma_scope-lower_case", alias=True),
    "gemma_scope_2": partial(_gemma_scope_2_case, "gemma_scope_2"),
    "gemma_scope_2-transcoder": partial(_gemma_scope_2_case, "gemma_scope_2-transcoder", kind="transcoder"),
    "gemma_scope_2-transcoder-affine": partial(
        _gemma_scope_2_case, "gemma_scope_2-transcoder-affine", kind="transcoder", affine=True
    ),
    **{name: partial(_sparsify_case, name, **options) for name, options in _SPARSIFY.items()},
}


# --- files that a reader must refuse: folder → folder with the file, no outputs ---


def _edit_config(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    path = folder / "cfg.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return folder


def _pre_6(folder: Path, *, topk: bool) -> Path:
    """A flat config of sae-lens 3 to 5, written by hand: no `metadata`, the activation function as a string."""
    sae_lens_sae("standard", _seeded("pre_6")).save_model(folder)
    flat = {
        "d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "device": "cpu", "model_name": "tiny",
        "hook_point": "blocks.1.hook_resid_post", "hook_point_layer": 1, "hook_point_head_index": None,
        "activation_fn_str": "topk" if topk else "relu", "activation_fn_kwargs": {"k": K} if topk else {},
        "apply_b_dec_to_input": True, "normalize_activations": "none", "prepend_bos": True, "context_size": 64,
        "finetuning_scaling_factor": False, "sae_lens_training_version": "3.14.0",
    }  # fmt: skip
    return _edit_config(folder, lambda _: flat)


def _without_version(folder: Path) -> Path:
    """Today's config without `metadata.sae_lens_version`: sae-lens takes it for a file from before version 6."""

    def drop(config):
        del config["metadata"]["sae_lens_version"]
        return config

    sae_lens_sae("standard", _seeded("without_version")).save_model(folder)
    return _edit_config(folder, drop)


def _unscaled_checkpoint(folder: Path) -> Path:
    """A checkpoint from the middle of training: the weights expect scaled input, the factor lies in another file.

    sae-lens's `SAE.load_from_disk` takes it without the factor and computes wrong latents.
    """
    from sae_lens.training.activation_scaler import ActivationScaler

    options = {"training": True, "normalize_activations": "expected_average_only_in"}
    sae_lens_sae("standard", _seeded("unscaled_checkpoint"), **options).save_model(folder)
    ActivationScaler(scaling_factor=SCALING_FACTOR).save(str(folder / "activation_scaler.json"))
    return folder


def _saved(folder: Path, architecture: str, **options) -> Path:
    sae_lens_sae(architecture, _seeded(architecture), **options).save_model(folder)
    return folder


REFUSED: dict[str, Callable[[Path], Path]] = {
    "pre_6": partial(_pre_6, topk=False),
    "pre_6-topk": partial(_pre_6, topk=True),
    "without_version": _without_version,
    "unscaled_checkpoint": _unscaled_checkpoint,
    # The weights expect whitened input, and nothing in the folder says how.
    "unfolded_whitening": partial(_saved, architecture="standard", normalize_activations="covariance_whitening"),
    # Checkpoints with a `topk_threshold` (float64, shape []) in place of `threshold`; sae-lens has no inference class.
    "batchtopk_checkpoint": partial(_saved, architecture="batchtopk", training=True, k=K),
    "matryoshka_checkpoint": partial(
        _saved, architecture="matryoshka_batchtopk", training=True, k=K, matryoshka_widths=[10, D_SAE]
    ),
    # Architectures whose latents are signed or need a search.
    "abstopk": partial(_saved, architecture="abstopk", k=K),
    "matching_pursuit": partial(_saved, architecture="matching_pursuit"),
}
