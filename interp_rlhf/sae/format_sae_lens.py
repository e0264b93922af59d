"""The format of sae-lens 6: `cfg.json` and `sae_weights.safetensors`, read and written.

In: a `RawFile`. Out: `Contents`. For writing: a `SparseAutoencoder` goes in, a config and tensors come out. It must not know
where files come from. Source: sae-lens 6.54.12, `sae_lens/saes`. The format keeps BatchTopK and Matryoshka autoencoders as
JumpReLU.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any, cast

from .formats import register_sae_format
from .raw_file import Contents

if TYPE_CHECKING:
    import torch

    from ..concepts.latents import Normalization
    from .autoencoder import Architecture, SaeSpec, SparseAutoencoder
    from .raw_file import RawFile, Shape

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# Version of the format that is written. Readers take a file without it for one from before version 6.
VERSION = "6.54.12"
ARCHITECTURES: dict[str, Architecture] = {
    "standard": "standard", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated", "transcoder": "standard",
    "skip_transcoder": "standard", "jumprelu_transcoder": "jumprelu", "jumprelu_skip_transcoder": "jumprelu",
}  # fmt: skip
NORMALIZATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
_CHECKPOINTS = ("batchtopk", "matryoshka_batchtopk")
_SCALER = "activation_scaler.json"


@register_sae_format("sae_lens", title="sae-lens", weights=WEIGHTS, config=CONFIG)
def read_sae_lens(raw: RawFile) -> Contents:
    """Contents of a file of sae-lens.

    Raises:
        `ValueError`: the file is from before version 6. Everything else is noted in `raw.problems`.
    """
    _refuse_older(raw)
    named = _architecture(raw)
    transcoder, skip = "transcoder" in named, "skip" in named
    centred = raw.flag("apply_b_dec_to_input", not transcoder)
    if transcoder and centred:
        raw.problems.append(f"`apply_b_dec_to_input` is true – `{named}` has a `b_dec` of another activation")
    k = raw.number("k") if named == "topk" else None
    rescaled = named == "topk" and raw.flag("rescale_acts_by_decoder_norm", False)
    if "log_threshold" in raw.tensors:  # early training checkpoints have this one
        raw.tensors["threshold"] = raw.tensors.pop("log_threshold").exp()
    file = raw.take(_shapes(raw, named, transcoder, skip)) if named in ARCHITECTURES else {}
    if k is not None and isinstance(size := raw.config.get("d_sae"), int) and k > size:
        raw.problems.append(f"`k` is {k} – expected at most {size}, the number of latents")
    metadata: dict[str, Any] = raw.config.get("metadata") or {}
    _warn_of_processing(metadata)
    return Contents(
        architecture=ARCHITECTURES.get(named, "standard"), k=k, normalization=_normalization(raw), transcoder=transcoder,
        tensors={} if raw.problems else _our_tensors(file, centred, rescaled),
        reads=metadata.get("hf_hook_name") or metadata.get("hook_name"),
        predicts=metadata.get("hf_hook_name_out") or metadata.get("hook_name_out"),
        model_id=str(metadata.get("model_name") or ""), metadata=metadata,
    )  # fmt: skip


def write_sae_lens(sae: SparseAutoencoder, metadata: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors that sae-lens loads as the same autoencoder.

    Raises:
        `ValueError`: the format has no such autoencoder.
    """
    spec = sae.spec
    named = _their_architecture(sae)
    tensors, centred = _file_tensors(sae)
    config = {
        "architecture": named, "d_in": sae.width, "d_sae": sae.size, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": centred, "normalize_activations": spec.normalization, "reshape_activations": "none",
        "metadata": {**metadata, **_metadata(spec)},
    }  # fmt: skip
    if spec.k is not None:
        config |= {"k": spec.k, "rescale_acts_by_decoder_norm": False}
    if spec.output_point is not None:
        config["d_out"] = sae.decoder.shape[1]
    return config, tensors


def _refuse_older(raw: RawFile) -> None:
    metadata = raw.config.get("metadata")
    inside = metadata.get("sae_lens_version") if isinstance(metadata, dict) else None
    version = raw.config.get("sae_lens_version") or inside
    major = str(version).partition(".")[0]
    if isinstance(metadata, dict) and major.isdigit() and int(major) >= 6:
        return
    raise ValueError(
        f"`{raw.origin}` was written by {f'sae-lens {version}' if version else 'an unknown version of sae-lens'} – expected 6 or "
        "later (`metadata.sae_lens_version` in `cfg.json`). Convert it with sae-lens: `sae = SAE.load_from_disk(OLD); "
        "sae.cfg.metadata.sae_lens_version = sae_lens.__version__; sae.save_model(NEW)`."
    )


def _architecture(raw: RawFile) -> str:
    named = str(raw.config.get("architecture"))
    if named in _CHECKPOINTS:
        raw.problems.append(
            f"`architecture` is `{named}` – a checkpoint of training. Save it for inference with sae-lens: "
            "`TrainingSAE.load_from_disk(OLD).save_inference_model(NEW)`"
        )
    else:
        raw.choice("architecture", tuple(ARCHITECTURES))
    return named


def _normalization(raw: RawFile) -> Normalization:
    value = raw.config.get("normalize_activations", "none")
    if value == "covariance_whitening":
        raw.problems.append(
            "`normalize_activations` is `covariance_whitening` – the weights expect whitened activations, and the file does not "
            "say how. Take the final file of the training, where that is folded into the weights"
        )
        return "none"
    raw.choice("normalize_activations", NORMALIZATIONS, "none")
    if value == "expected_average_only_in":
        if (raw.folder / _SCALER).exists():
            raw.problems.append(
                f"`normalize_activations` is `{value}` and the folder has `{_SCALER}` – a checkpoint of training whose weights "
                "expect scaled activations. Fold it with sae-lens: `sae = SAE.load_from_disk(OLD); "
                f"sae.fold_activation_norm_scaling_factor(SCALING_FACTOR); sae.save_model(NEW)`, with the factor in `{_SCALER}`"
            )
        else:
            logger.warning(
                "`%s` says `%s`: read as sae-lens reads it, without any scale. Right only if the weights contain that scale.",
                raw.origin, value,
            )  # fmt: skip
        return "none"
    return cast("Normalization", value)


def _warn_of_processing(metadata: dict[str, Any]) -> None:
    processed = metadata.get("model_from_pretrained_kwargs")
    options = processed if isinstance(processed, dict) else {}
    if on := [key for key in ("center_writing_weights", "fold_ln") if options.get(key)]:
        logger.warning(
            "Trained on a model that TransformerLens had changed (%s): its activations are not those of the Hugging Face model.",
            ", ".join(on),
        )


def _shapes(raw: RawFile, named: str, transcoder: bool, skip: bool) -> dict[str, Shape]:
    width, size = raw.number("d_in"), raw.number("d_sae")
    out = raw.number("d_out") if transcoder else width
    shapes: dict[str, Shape] = {"W_enc": (width, size), "W_dec": (size, out), "b_dec": (out,)}
    if named == "gated":
        return shapes | dict.fromkeys(("b_gate", "b_mag", "r_mag"), (size,))
    shapes["b_enc"] = (size,)
    if "jumprelu" in named:
        shapes["threshold"] = (size,)
    if skip:
        shapes["W_skip"] = (out, width)
    return shapes


def _our_tensors(file: dict[str, torch.Tensor], centred: bool, rescaled: bool) -> dict[str, torch.Tensor]:
    encoder, decoder = file["W_enc"].T, file["W_dec"]
    bias = file["b_gate"] if "b_gate" in file else file["b_enc"]
    if rescaled:  # latents are in units of the decoder's norm, which is 1 if it was folded before
        norm = decoder.norm(dim=1)
        encoder, bias, decoder = encoder * norm[:, None], bias * norm, decoder / norm.clamp(min=1e-8)[:, None]
    tensors = {"encoder": encoder, "encoder_bias": bias, "decoder": decoder, "decoder_bias": file["b_dec"]}
    if centred:
        tensors["center"] = file["b_dec"]
    if "r_mag" in file:
        tensors |= {"gate_scale": file["r_mag"].exp(), "gate_bias": file["b_mag"]}
    same = {"threshold": "threshold", "skip": "W_skip"}
    return tensors | {ours: file[theirs] for ours, theirs in same.items() if theirs in file}


def _their_architecture(sae: SparseAutoencoder) -> str:
    spec, skip = sae.spec, sae.skip is not None
    transcoder = spec.output_point is not None
    named: str = spec.architecture
    if transcoder:
        middle = "skip_" if skip else ""
        names = {"standard": f"{middle}transcoder", "jumprelu": f"jumprelu_{middle}transcoder"}
        named = names.get(named, f"{named} transcoder")
    elif skip:
        named = f"{named} with a skip path"
    if named not in ARCHITECTURES:
        raise ValueError(
            f"The autoencoder is a `{named}`, which sae-lens' format does not have – expected one of "
            f"{', '.join(f'`{name}`' for name in sorted(ARCHITECTURES))}."
        )
    if spec.normalization != "none" and spec.restore == transcoder:
        raise ValueError(
            f"`restore` is {spec.restore} – in sae-lens' format an autoencoder takes its output back to the activation's scale, "
            "and a transcoder does not."
        )
    return named


def _file_tensors(sae: SparseAutoencoder) -> tuple[dict[str, torch.Tensor], bool]:
    """Tensors by their names in the file, and True if `b_dec` is subtracted from the input. Biases absorb another centre."""
    center = sae.center
    centred = center is not None and sae.spec.output_point is None and center.equal(sae.decoder_bias)
    shift = sae.encoder_bias.new_zeros(sae.size) if center is None or centred else sae.encoder @ center
    bias = sae.encoder_bias - shift
    tensors = {"W_enc": sae.encoder.T, "W_dec": sae.decoder, "b_dec": sae.decoder_bias}
    if sae.gate_scale is not None and sae.gate_bias is not None:
        if not (sae.gate_scale > 0).all():
            raise ValueError(
                "`gate_scale` has values of 0 or less – expected positive ones: the format keeps their logarithm."
            )
        tensors |= {"b_gate": bias, "r_mag": sae.gate_scale.log(), "b_mag": sae.gate_bias - sae.gate_scale * shift}
    else:
        tensors["b_enc"] = bias
    same = {"threshold": sae.threshold, "W_skip": sae.skip}
    tensors |= {name: tensor for name, tensor in same.items() if tensor is not None}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, centred


def _metadata(spec: SaeSpec) -> dict[str, Any]:
    named = _transformer_lens_name(spec.hook_point)
    metadata = {
        "sae_lens_version": VERSION, "model_name": spec.model_id, "hook_name": named or spec.hook_point,
        "hf_hook_name": spec.hook_point,
    }  # fmt: skip
    if named is None:  # this tells sae-lens that hook names are module paths
        metadata["model_class_name"] = "AutoModelForCausalLM"
    if spec.output_point is not None:
        output = spec.output_point
        metadata |= {"hook_name_out": (named and _transformer_lens_name(output)) or output, "hf_hook_name_out": output}
    return metadata


def _transformer_lens_name(hook_point: str) -> str | None:
    """TransformerLens' name for the output of a decoder layer; None for other modules."""
    layer = re.fullmatch(r"[\w.]+\.(?:layers|h)\.(\d+)", hook_point)
    return None if layer is None else f"blocks.{layer[1]}.hook_resid_post"
