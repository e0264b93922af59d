"""SAE files: written by hand in each format with numbers derived here, saved and loaded again, and every kind of bad file."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import os
import re
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model, with_lora

from interp_rlhf.activations.hook_points import output_tensor, resolve
from interp_rlhf.sae.autoencoder import SaeSpec, SparseAutoencoder
from interp_rlhf.sae.files import load_sae, save_sae
from interp_rlhf.sae.formats import SAE_FORMATS, register_sae_format
from interp_rlhf.sae.hook_names import Layout, module_path
from interp_rlhf.sae.known_formats import format_titles, known_formats
from interp_rlhf.sae.raw_file import Contents

# D = 2, S = 3. For x = (3, 2): x W_enc + b_enc = (3, 2 − 1, 3 − 2 + 0.5) = (3, 1, 1.5).
# With b_dec = (1, −1) subtracted first, x' = (2, 3): (2, 3 − 1, 2 − 3 + 0.5) = (2, 2, −0.5).
X = torch.tensor([[3.0, 2.0]])
W_ENC = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, -1.0]])
B_ENC = torch.tensor([0.0, -1.0, 0.5])
W_DEC = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
B_DEC = torch.tensor([1.0, -1.0])
LINEAR = {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
# To the one number of another activation, with a path past the latents.
TO_ONE = LINEAR | {"W_dec": torch.tensor([[1.0], [2.0], [3.0]]), "b_dec": torch.tensor([-1.0])}
RESIDUAL = {"sae_lens_version": "6.54.12", "model_name": "tiny", "hook_name": "blocks.1.hook_resid_post"}
MLP = RESIDUAL | {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}


def sae_lens(folder: Path, architecture="standard", tensors=None, metadata=RESIDUAL, **fields):
    tensors = LINEAR if tensors is None else tensors
    config = {
        "architecture": architecture, "d_in": 2, "d_sae": 3, "dtype": "float32", "device": "cuda",
        "apply_b_dec_to_input": "transcoder" not in architecture, "normalize_activations": "none",
        "reshape_activations": "none", "metadata": metadata,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config | fields))
    return folder


def sparsify(folder: Path, tensors=None, **fields):
    given = tensors or {
        "encoder.weight": W_ENC.T.contiguous(), "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file(given, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": 2, "num_latents": 3, "k": 2} | fields))
    return folder


def close(found, expected):
    assert found.tolist() == [pytest.approx(expected, abs=1e-6)]


# --- what the files mean, by hand ---


@pytest.mark.parametrize(
    ("architecture", "tensors", "fields", "latents", "output"),
    [
        # 2·(1, 0) + 2·(0, 2) + (1, −1)
        ("standard", LINEAR, {}, [2, 2, 0], [3, 3]),
        # 3·(1, 0) + 1·(0, 2) + 1.5·(1, 1) + (1, −1)
        ("standard", LINEAR, {"apply_b_dec_to_input": False}, [3, 1, 1.5], [5.5, 2.5]),
        # 2 > 2 does not hold.
        ("jumprelu", LINEAR | {"threshold": torch.tensor([2.0, 1.5, 0.0])}, {}, [0, 2, 0], [1, 3]),
        ("jumprelu", LINEAR | {"log_threshold": torch.tensor([2.0, 1.5, 1.0]).log()}, {}, [0, 2, 0], [1, 3]),
        ("topk", LINEAR, {"k": 2}, [2, 2, 0], [3, 3]),
        # Times the decoder's norms 1, 2 and √2: (2, 4, −0.7), of which the largest is written as 4/2·(0, 2).
        ("topk", LINEAR, {"k": 1, "rescale_acts_by_decoder_norm": True}, [0, 4, 0], [1, 3]),
        # x' W_enc = (2, 3, −1). Gates −1, 3, −1; the magnitude of the open one is e^{ln 2}·3 − 1 = 5.
        (
            "gated",
            {"W_enc": W_ENC, "W_dec": W_DEC, "b_dec": B_DEC, "b_gate": torch.tensor([-3.0, 0.0, 0.0]),
             "b_mag": torch.tensor([0.0, -1.0, 0.0]), "r_mag": torch.tensor([0.0, 2.0, 1.0]).clamp(min=1).log()},
            {}, [0, 5, 0], [1, 9],
        ),
        # 3·1 + 1·2 + 1.5·3 − 1, and with the path past them + 3·1 + 2·10
        ("transcoder", TO_ONE, {"d_out": 1}, [3, 1, 1.5], [8.5]),
        ("skip_transcoder", TO_ONE | {"W_skip": torch.tensor([[1.0, 10.0]])}, {"d_out": 1}, [3, 1, 1.5], [31.5]),
        # 1 > 1 does not hold.
        ("jumprelu_transcoder", TO_ONE | {"threshold": torch.ones(3)}, {"d_out": 1}, [3, 0, 1.5], [6.5]),
        (
            "jumprelu_skip_transcoder",
            TO_ONE | {"threshold": torch.ones(3), "W_skip": torch.tensor([[1.0, 10.0]])},
            {"d_out": 1}, [3, 0, 1.5], [29.5],
        ),
    ],
)  # fmt: skip
def test_files_of_sae_lens_mean_what_their_formulas_say(tmp_path, architecture, tensors, fields, latents, output):
    metadata = MLP if "transcoder" in architecture else RESIDUAL
    sae = load_sae(sae_lens(tmp_path / "sae", architecture, tensors, metadata, **fields))
    close(sae.encode(X), latents)
    close(sae(X), output)


def test_normalized_files_are_taken_back_to_the_scale_of_the_activation_but_not_a_transcoder(tmp_path):
    # x' = (3, 4)·√2/5, whose only latent is its first number, 3√2/5; back by 5/√2: 3.
    first = {"W_enc": torch.tensor([[1.0], [0.0]]), "W_dec": torch.tensor([[1.0, 0.0]]), "b_enc": torch.zeros(1)}
    fields = {"d_sae": 1, "normalize_activations": "constant_norm_rescale", "apply_b_dec_to_input": False}
    tensors = first | {"b_dec": torch.zeros(2)}
    x = torch.tensor([[3.0, 4.0]])
    sae = load_sae(sae_lens(tmp_path / "sae", "standard", tensors, **fields))
    close(sae.encode(x), [3 * 2**0.5 / 5])
    close(sae(x), [3, 0])
    coder = load_sae(sae_lens(tmp_path / "coder", "transcoder", tensors, MLP, d_out=2, **fields))
    close(coder(x), [3 * 2**0.5 / 5, 0])


@pytest.mark.parametrize(
    ("fields", "latents", "output"),
    [
        ({}, [2, 2, 0], [3, 3]),
        ({"k": 1, "transcode": True}, [3, 0, 0], [4, -1]),  # b_dec is not subtracted: (3, 1, 1.5)
        ({"k": 3, "activation": "groupmax"}, [2, 2, 0], [3, 3]),  # each its own group
        ({"k": 1, "activation": "groupmax", "transcode": True}, [3, 0, 0], [4, -1]),
        # What is skipped past is x itself: + (3 + 2·10, 2)
        ({"skip_connection": True}, [2, 2, 0], [26, 5]),
    ],
)
def test_files_of_sparsify_mean_what_their_formulas_say(tmp_path, fields, latents, output):
    folder = sparsify(tmp_path / "layers.1.mlp", **fields)
    if "skip_connection" in fields:
        tensors = load_file(folder / "sae.safetensors") | {"W_skip": torch.tensor([[1.0, 10.0], [0.0, 1.0]])}
        sparsify(folder, tensors, **fields)
    sae = load_sae(folder)
    close(sae.encode(X), latents)
    close(sae(X), output)


def test_sparsify_counts_latents_by_the_expansion_factor_where_it_gives_no_number(tmp_path):
    tensors = {
        "encoder.weight": torch.eye(4)[:, :2].contiguous(), "encoder.bias": torch.zeros(4), "W_dec": torch.ones(4, 2),
        "b_dec": torch.zeros(2),
    }  # fmt: skip
    assert load_sae(sparsify(tmp_path / "layers.0", tensors, num_latents=0, expansion_factor=2)).size == 4
    with pytest.raises(ValueError, match=r"`W_dec` has shape \(4, 2\) – expected \(6, 2\)"):
        load_sae(sparsify(tmp_path / "layers.0", tensors, num_latents=0, expansion_factor=3))


def test_gemma_scope_is_read_with_both_spellings_and_knows_its_model_by_its_repository(tmp_path):
    arrays = {name: tensor.numpy() for name, tensor in LINEAR.items()} | {"threshold": numpy.array([2.5, 1.0, 0.0])}
    for lower in (False, True):
        folder = tmp_path / f"gemma-scope-2b-pt-res-{lower}" / "layer_12" / "width_16k" / "average_l0_41"
        folder.mkdir(parents=True)
        written = {name.lower() if lower else name: array for name, array in arrays.items()}
        numpy.savez(folder / "params.npz", **written)
        sae = load_sae(folder / "params.npz" if lower else folder)
        close(sae.encode(X), [3, 0, 1.5])  # b_dec is not subtracted; 1 > 1 does not hold
        close(sae(X), [5.5, 0.5])
        assert sae.spec.hook_point == "model.layers.12"
        assert sae.spec.model_id == "google/gemma-2-2b"
        assert sae.encoder.dtype == torch.float32


def test_gemma_scope_2_is_read_with_its_config_or_by_its_folders_names(tmp_path):
    tensors = {name.lower(): tensor for name, tensor in TO_ONE.items()} | {
        "threshold": torch.ones(3), "affine_skip_connection": torch.tensor([[1.0], [10.0]]),
    }  # fmt: skip
    folder = tmp_path / "transcoder" / "layer_1_width_16k_l0_small_affine"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "params.safetensors")
    for config in (None, {"hf_hook_point_in": "model.layers.7.output", "hf_hook_point_out": "model.layers.8.output"}):
        if config:
            (folder / "config.json").write_text(json.dumps(config | {"architecture": "jump_relu"}))
        sae = load_sae(folder)
        close(sae(X), [29.5])  # as the jumprelu_skip_transcoder above
        expected = ("model.layers.7", "model.layers.8") if config else (
            "model.layers.1.pre_feedforward_layernorm", "model.layers.1.post_feedforward_layernorm",
        )  # fmt: skip
        assert (sae.spec.hook_point, sae.spec.output_point) == expected


def test_every_precision_is_read_as_float32(tmp_path):
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        tensors = {name: tensor.to(dtype) for name, tensor in LINEAR.items()}
        sae = load_sae(sae_lens(tmp_path / str(dtype), tensors=tensors))
        assert {tensor.dtype for tensor in sae.buffers()} == {torch.float32}
        close(sae(X), [3, 3])


def test_the_source_says_where_it_came_from(tmp_path):
    folder = sae_lens(tmp_path / "sae")
    source = load_sae(folder).spec.source
    assert source["path"] == str(folder)
    assert source["format"] == "sae-lens"
    assert source["hook_name"] == "blocks.1.hook_resid_post"
    assert source["sha256"] == hashlib.sha256((folder / "sae_weights.safetensors").read_bytes()).hexdigest()


# --- saving ---


def random_sae(architecture, output_point=None, skip=False, **changes):
    torch.manual_seed(0)
    out = 3 if output_point else 5
    tensors = {
        "encoder": torch.randn(8, 5), "encoder_bias": torch.randn(8), "decoder": torch.randn(8, out),
        "decoder_bias": torch.randn(out), "threshold": torch.rand(8) if architecture == "jumprelu" else None,
        "skip": torch.randn(out, 5) if skip else None,
    }  # fmt: skip
    if architecture == "gated":
        tensors |= {"gate_scale": torch.rand(8) + 0.5, "gate_bias": torch.randn(8)}
    spec = SaeSpec(
        architecture, "model.layers.1", k=3 if architecture in ("topk", "groupmax") else None, output_point=output_point,
        restore=output_point is None, model_id="tiny",
    )  # fmt: skip
    center = changes.pop("center", None)
    center = tensors["decoder_bias"] if center == "decoder_bias" else center
    return SparseAutoencoder(dataclasses.replace(spec, **changes), **tensors, center=center)


MLP_OUT = "model.layers.1.mlp"


@pytest.mark.parametrize("normalization", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("standard", {}), ("standard", {"center": "decoder_bias"}), ("jumprelu", {"center": "decoder_bias"}),
        ("topk", {"center": "decoder_bias"}), ("gated", {"center": "decoder_bias"}),
        # The format has no centre but b_dec: another one goes into the biases.
        ("gated", {"center": torch.linspace(-1, 1, 5)}), ("topk", {"center": torch.linspace(-1, 1, 5)}),
        ("standard", {"output_point": MLP_OUT}), ("standard", {"output_point": MLP_OUT, "skip": True}),
        ("jumprelu", {"output_point": MLP_OUT}), ("jumprelu", {"output_point": MLP_OUT, "skip": True}),
    ],
)  # fmt: skip
def test_what_is_saved_is_loaded_as_the_same_autoencoder(tmp_path, architecture, changes, normalization):
    sae = random_sae(architecture, normalization=normalization, **changes)
    digest = save_sae(sae, tmp_path / "sae", metadata={"interp_rlhf": {"identity": "abc"}})
    again = load_sae(tmp_path / "sae")
    x = torch.randn(7, 5)
    torch.testing.assert_close(again.encode(x), sae.encode(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again(x), sae(x), rtol=1e-5, atol=1e-5)
    for name in ("architecture", "hook_point", "k", "normalization", "restore", "output_point", "model_id"):
        assert getattr(again.spec, name) == getattr(sae.spec, name)
    assert again.spec.source["sha256"] == digest
    assert again.spec.source["metadata"]["interp_rlhf"] == {"identity": "abc"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sae"]


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        ("groupmax", {"k": 4}, "is a `groupmax`, which sae-lens' format does not have"),
        ("topk", {"output_point": MLP_OUT}, "is a `topk transcoder`"),
        ("gated", {"output_point": MLP_OUT}, "is a `gated transcoder`"),
        ("standard", {"skip": True}, "is a `standard with a skip path`"),
        ("standard", {"normalization": "layer_norm", "restore": False}, "`restore` is False"),
    ],
)
def test_what_the_format_does_not_have_is_not_saved(tmp_path, architecture, changes, said):
    with pytest.raises(ValueError, match=said):
        save_sae(random_sae(architecture, **changes), tmp_path / "sae")
    assert not list(tmp_path.iterdir())


def test_an_autoencoder_is_overwritten_only_when_that_is_asked_for(tmp_path):
    folder = tmp_path / "sae"
    folder.mkdir()
    save_sae(random_sae("standard"), folder)  # an empty folder is free
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}  # for others to read, too
    with pytest.raises(FileExistsError, match="`replace=True`"):
        save_sae(random_sae("topk"), folder)
    assert load_sae(folder).spec.architecture == "standard"
    save_sae(random_sae("topk"), folder, replace=True)
    assert load_sae(folder).spec.architecture == "topk"
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds `notes.txt` – expected a separate folder"):
        save_sae(random_sae("standard"), folder, replace=True)
    assert (folder / "notes.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sae"]


@pytest.mark.parametrize("rename", [1, 2])
def test_a_crash_while_saving_leaves_the_old_autoencoder(tmp_path, monkeypatch, rename):
    folder = tmp_path / "sae"
    save_sae(random_sae("standard"), folder)
    real, calls = os.replace, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == rename:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(KeyboardInterrupt):
        save_sae(random_sae("topk"), folder, replace=True)
    monkeypatch.setattr(os, "replace", real)
    assert load_sae(folder).spec.architecture == "standard"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sae"]


def test_a_crash_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    def failing(*_):
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", failing)
    with pytest.raises(OSError, match="no space left"):
        save_sae(random_sae("standard"), tmp_path / "sae")
    assert not list(tmp_path.iterdir())


# --- bad files ---


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_a_truncated_file_is_refused(tmp_path, kind):
    if kind == "safetensors":
        path = sae_lens(tmp_path / "sae") / "sae_weights.safetensors"
    else:
        path = tmp_path / "params.npz"
        numpy.savez(path, **{name: tensor.numpy() for name, tensor in LINEAR.items()})
    data = path.read_bytes()
    for share in (0.0, 0.1, 0.5, 0.95):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ValueError, match=f"is not a whole {kind} file"):
            load_sae(path, hook_point="model.layers.1")


def test_a_pickled_array_is_refused_without_running_it(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    numpy.savez(tmp_path / "params.npz", W_enc=numpy.array([Bomb()], dtype=object))
    with pytest.raises(ValueError, match="pickled ones are never loaded"):
        load_sae(tmp_path / "params.npz", hook_point="model.layers.1")
    assert not (tmp_path / "ran").exists()


def test_all_problems_of_a_file_are_in_one_error(tmp_path):
    tensors = {
        "W_enc": W_ENC.T, "b_enc": torch.tensor([1, 2, 3]), "W_dec": W_DEC, "b_dec": torch.tensor([1.0, float("nan")]),
        "extra": torch.ones(1),
    }  # fmt: skip
    metadata = RESIDUAL | {"hook_name": "blocks.1.attn.hook_z"}
    folder = sae_lens(
        tmp_path / "sae", "jumprelu", tensors, metadata, normalize_activations="batch_norm", d_sae="three"
    )
    with pytest.raises(ValueError) as caught:
        load_sae(folder)
    said = str(caught.value)
    assert "8 problem(s)" in said
    for problem in (
        "`d_sae` is 'three' – expected a positive integer",
        "no tensor `threshold`",
        "tensor `extra` is unknown",
        "`W_enc` has shape (3, 2) – expected (2, any)",
        "`b_enc` holds torch.int64",
        "`b_dec` is not finite",
        "`normalize_activations` is `batch_norm`",
        "`blocks.1.attn.hook_z` is the heads before the output projection",
    ):
        assert problem in said, problem


@pytest.mark.parametrize("form", known_formats(), ids=lambda form: form.title)
def test_every_format_lists_all_problems_of_a_file_in_one_error(tmp_path, form):
    """Three tensors are wrong, and the file does not say its hook point. Each format names its tensors as it likes."""

    def save(tensors):
        if form.weights.endswith(".npz"):
            numpy.savez(tmp_path / form.weights, **{name: tensor.numpy() for name, tensor in tensors.items()})
        else:
            save_file(tensors, tmp_path / form.weights)

    save({"extra": torch.ones(1)})
    if form.config is not None:
        metadata = {"metadata": {"sae_lens_version": "6.54.12"}} if form.title == "sae-lens" else {}
        config = {"architecture": "standard", "d_in": 2, "d_sae": 3, "num_latents": 3, "k": 2} | metadata
        (tmp_path / form.config).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no tensor `") as without:
        load_sae(tmp_path)
    own_name = re.search(r"no tensor `([^`]+)`", str(without.value)).group(1)
    save({own_name: torch.full((3, 2), float("nan")), "extra": torch.ones(1)})
    with pytest.raises(ValueError, match=re.escape(f"`{tmp_path / form.weights}` ({form.title}) has ")) as caught:
        load_sae(tmp_path)
    said = str(caught.value)
    for problem in (
        "no tensor `",
        "tensor `extra` is unknown",
        f"`{own_name}` is not finite",
        "does not say its hook point",
    ):
        assert problem in said, problem


def test_a_format_that_a_user_registers_is_read_and_found_and_named_by_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(SAE_FORMATS, "_entries", dict(SAE_FORMATS))

    @register_sae_format("mine", title="my format", weights="mine.npz", config="mine.json", config_required=False)
    def read_mine(raw):
        tensors = raw.take({"rows": (None, 2), "bias": (None,)})
        rows = tensors["rows"]
        ours = {"encoder": rows, "encoder_bias": tensors["bias"], "decoder": rows, "decoder_bias": torch.zeros(2)}
        return Contents("standard", ours, reads=raw.config.get("hook", "layers.0"))

    numpy.savez(tmp_path / "mine.npz", rows=W_DEC.numpy(), bias=B_ENC.numpy())
    # (3, 2) on the rows (1, 0), (0, 2), (1, 1), plus the bias (0, −1, 0.5)
    for source in (tmp_path, tmp_path / "mine.npz"):
        sae = load_sae(source)
        close(sae.encode(X), [3, 3, 5.5])
        assert (sae.spec.hook_point, sae.spec.source["format"]) == ("model.layers.0", "my format")
    (tmp_path / "mine.json").write_text('{"hook": "layers.2"}')
    assert load_sae(tmp_path).spec.hook_point == "model.layers.2"
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"holds no autoencoder – expected .*`mine\.npz`"):
        load_sae(tmp_path / "other")
    assert "my format" in format_titles()
    register_sae_format("mine", title="my format", weights="mine.npz", config="mine.json", config_required=False)(
        read_mine
    )
    with pytest.raises(ValueError, match="`mine` is already registered"):
        register_sae_format("mine", weights="mine.npz")(lambda raw: None)
    with pytest.raises(ValueError, match=r"`params\.npz`, which is the file name of the format `gemma_scope`"):
        register_sae_format("another", weights="params.npz")(read_mine)
    with pytest.raises(ValueError, match=r"'ae\.pt' – expected a file name that ends in one of `\.npz`"):
        register_sae_format("another", weights="ae.pt")


def test_an_npz_file_of_another_name_is_not_taken_for_gemma_scope(tmp_path):
    arrays = {name: tensor.numpy() for name, tensor in LINEAR.items()} | {"threshold": numpy.ones(3)}
    numpy.savez(tmp_path / "features.npz", **arrays)
    with pytest.raises(ValueError, match=r"`.*features\.npz` is no file of a known format.*expected .*`params\.npz`"):
        load_sae(tmp_path / "features.npz", hook_point="model.layers.1")


@pytest.mark.parametrize(
    ("architecture", "fields", "said"),
    [
        ("abstopk", {}, "`architecture` is `abstopk` – expected one of `gated`, `jumprelu`"),
        ("batchtopk", {}, "save_inference_model"),
        ("standard", {"normalize_activations": "covariance_whitening"}, "the weights expect whitened activations"),
        ("standard", {"apply_b_dec_to_input": "yes"}, "`apply_b_dec_to_input` is 'yes' – expected true or false"),
        (
            "transcoder",
            {"d_out": 2, "apply_b_dec_to_input": True, "metadata": MLP},
            "has a `b_dec` of another activation",
        ),
        ("transcoder", {"d_out": 2}, "expected `output_point` to be passed"),
        ("topk", {"k": 4}, "`k` is 4 – expected at most 3"),
        ("topk", {}, "`k` is None – expected a positive integer"),
        ("standard", {"metadata": {"sae_lens_version": "6.1.0"}}, "expected `hook_point` to be passed"),
    ],
)
def test_a_file_of_sae_lens_that_cannot_be_read_right_is_refused(tmp_path, architecture, fields, said):
    folder = sae_lens(tmp_path / "sae", architecture, **fields)
    with pytest.raises(ValueError, match="1 problem") as caught:
        load_sae(folder)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"activation": "relu"}, "`activation` is `relu` – expected one of `groupmax`, `topk`"),
        ({"signed": True}, "`signed` is true"),
        ({"activation": "groupmax"}, "`k` is 2 – expected 1 to 3, and a divisor of it for `groupmax`"),
        ({"skip_connection": True}, "no tensor `W_skip`"),
    ],
)
def test_a_file_of_sparsify_that_cannot_be_read_right_is_refused(tmp_path, fields, said):
    with pytest.raises(ValueError, match="1 problem") as caught:
        load_sae(sparsify(tmp_path / "layers.1", **fields))
    assert said in str(caught.value)


@pytest.mark.parametrize("metadata", [None, {"hook_name": "blocks.1.hook_resid_post"}, {"sae_lens_version": "5.11.0"}])
def test_a_file_of_sae_lens_before_version_6_is_refused_with_its_conversion(tmp_path, metadata):
    folder = sae_lens(tmp_path / "sae")
    config = json.loads((folder / "cfg.json").read_text())
    del config["metadata"]
    flat = {"hook_point": "blocks.1.hook_resid_post", "activation_fn_str": "relu"}
    (folder / "cfg.json").write_text(json.dumps(config | (flat if metadata is None else {"metadata": metadata})))
    with pytest.raises(ValueError, match=r"expected 6 or later .*SAE\.load_from_disk\(OLD\).*save_model\(NEW\)"):
        load_sae(folder)


def test_a_checkpoint_whose_scale_lies_beside_it_is_refused_and_without_it_a_warning_is_given(tmp_path, caplog):
    folder = sae_lens(tmp_path / "sae", normalize_activations="expected_average_only_in")
    with caplog.at_level(logging.WARNING):
        close(load_sae(folder)(X), [3, 3])
    assert "without any scale" in caplog.text
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.37}')
    with pytest.raises(ValueError, match="fold_activation_norm_scaling_factor"):
        load_sae(folder)


def test_a_model_that_transformer_lens_had_changed_is_warned_of(tmp_path, caplog):
    changed = RESIDUAL | {"model_from_pretrained_kwargs": {"center_writing_weights": True, "fold_ln": False}}
    with caplog.at_level(logging.WARNING):
        load_sae(sae_lens(tmp_path / "sae", metadata=changed))
    assert "(center_writing_weights)" in caplog.text


# --- where files are ---


def test_a_folder_of_several_autoencoders_names_them(tmp_path):
    for layer in (10, 2, 1):
        sparsify(tmp_path / f"layers.{layer}")
    with pytest.raises(
        ValueError, match=r"expected `subfolder` to be one of `layers\.1`, `layers\.2`, `layers\.10`\."
    ):
        load_sae(tmp_path)
    with pytest.raises(ValueError, match=r"to be one of `layers\.1`"):
        load_sae(tmp_path, subfolder="layers.3")
    assert load_sae(tmp_path, subfolder="layers.2").spec.hook_point == "model.layers.2"


def test_what_is_no_autoencoder_is_said_to_be_none(tmp_path):
    with pytest.raises(ValueError, match=r"holds no autoencoder – expected `sae_weights\.safetensors`"):
        load_sae(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist – expected a folder, a file with weights or a Hub id"):
        load_sae(tmp_path / "nothing")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ValueError, match="is no file of a known format"):
        load_sae(tmp_path / "weights.bin")
    folder = sae_lens(tmp_path / "sae")
    (folder / "cfg.json").write_text('{"d_in": 2')
    with pytest.raises(ValueError, match=r"cfg\.json` is not JSON"):
        load_sae(folder)
    (folder / "cfg.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"cfg\.json` does not exist"):
        load_sae(folder)


def test_a_folder_of_sparsify_that_names_no_module_needs_a_hook_point(tmp_path):
    folder = sparsify(tmp_path / "mine")
    with pytest.raises(ValueError, match="expected `hook_point` to be passed"):
        load_sae(folder)
    assert load_sae(folder, hook_point="model.layers.2").spec.hook_point == "model.layers.2"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The Hub's cache with one repository of sparsify in it; offline, as all tests are."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--saes"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    snapshot = repository / "snapshots" / "c0ffee"
    for layer in (1, 2):
        sparsify(snapshot / f"layers.{layer}")
    (snapshot / "config.json").write_text('{"model": "HuggingFaceTB/SmolLM2-135M"}')


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_id_is_read_from_the_cache_and_its_commit_is_kept():
    sae = load_sae("some/saes", subfolder="layers.2")
    source = {key: sae.spec.source[key] for key in ("hub", "revision", "subfolder", "format", "hook_name")}
    assert source == {
        "hub": "some/saes", "revision": "c0ffee", "subfolder": "layers.2", "format": "sparsify", "hook_name": "layers.2",
    }  # fmt: skip
    assert sae.spec.model_id == "HuggingFaceTB/SmolLM2-135M"
    with pytest.raises(ValueError, match=r"`some/saes` holds no autoencoder itself – .* `layers\.1`, `layers\.2`"):
        load_sae("some/saes")


@pytest.mark.usefixtures("hub_cache")
def test_what_is_neither_here_nor_in_the_cache_is_said_in_one_error():
    with pytest.raises(OSError, match=r"`some/others` at revision `v2` is no folder here, is not in the Hub's cache"):
        load_sae("some/others", revision="v2")


# --- hook names ---


@pytest.fixture(scope="module")
def models(tokenizer):
    return {family: make_model(family, tokenizer) for family in ("llama", "gpt2", "gemma", "moe")}


def outputs(model, points):
    """Output of each module for one text."""
    seen = {}
    handles = [
        resolve(model, point).register_forward_hook(
            lambda _m, _i, out, point=point: seen.update({point: output_tensor(out)})
        )
        for point in points
    ]
    with torch.no_grad():
        model(input_ids=torch.arange(10, 20)[None])
    for handle in handles:
        handle.remove()
    return [seen[point] for point in points]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "moe"])
@pytest.mark.parametrize("layer", [0, 2])
def test_what_attention_and_mlp_put_out_adds_up_to_the_stream_behind_them(models, family, layer):
    names = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
    layout = Layout.of_model(models[family])
    points = [module_path(f"blocks.{layer}.{name}", layout) for name in names]
    before, attention, mlp, after = outputs(models[family], points)
    torch.testing.assert_close(before + attention + mlp, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "moe"])
def test_the_input_of_a_transcoder_is_what_the_mlp_is_given(models, family):
    layout = Layout.of_model(models[family])
    inside = module_path("blocks.1.mlp.hook_in", layout)
    assert module_path("layers.1.mlp.input" if family != "gpt2" else "h.1.mlp.input", layout) == inside
    given, gives = outputs(models[family], [inside, module_path("blocks.1.mlp.hook_out", layout)])
    with torch.no_grad():
        again = output_tensor(resolve(models[family], module_path("blocks.1.mlp.hook_out", layout))(given))
    torch.testing.assert_close(again, gives)


def test_names_become_the_modules_of_the_architecture_with_a_model_and_by_its_name_without():
    expected = {
        ("tiny", "blocks.15.hook_resid_post"): "model.layers.15",
        ("tiny", "blocks.15.hook_resid_pre"): "model.layers.14",
        ("tiny", "blocks.0.hook_resid_pre"): "model.embed_tokens",
        ("tiny", "blocks.3.hook_mlp_out"): "model.layers.3.mlp",
        ("tiny", "blocks.3.mlp.hook_in"): "model.layers.3.post_attention_layernorm",
        ("tiny", "layers.3"): "model.layers.3",
        ("tiny", "layers.3.mlp"): "model.layers.3.mlp",
        ("tiny", "layers.3.input"): "model.layers.2",
        ("tiny", "layers.3.self_attn.input"): "model.layers.3.input_layernorm",
        ("tiny", "embed_tokens"): "model.embed_tokens",
        ("tiny", "model.layers.3.output"): "model.layers.3",
        ("tiny", "gpt_neox.layers.3"): "gpt_neox.layers.3",
        ("gpt2-small", "blocks.3.hook_resid_post"): "transformer.h.3",
        ("gpt2-small", "blocks.0.hook_resid_pre"): "transformer.drop",  # behind the positions' embedding
        ("gpt2-small", "hook_embed"): "transformer.wte",
        ("gpt2-small", "blocks.3.mlp.hook_in"): "transformer.h.3.ln_2",
        ("gpt2-small", "h.3.mlp"): "transformer.h.3.mlp",
        ("gemma-2-2b", "blocks.3.hook_mlp_out"): "model.layers.3.post_feedforward_layernorm",
        ("gemma-2-2b", "blocks.3.hook_attn_out"): "model.layers.3.post_attention_layernorm",
        ("gemma-2-2b", "layers.3.mlp"): "model.layers.3.mlp",  # sparsify reads the module itself
        ("gemma-2-2b", "layers.3.mlp.input"): "model.layers.3.pre_feedforward_layernorm",
        ("gemma-2b", "blocks.3.hook_mlp_out"): "model.layers.3.mlp",  # the first Gemma has no norm behind it
    }
    assert {(model, name): module_path(name, Layout.of_name(model)) for model, name in expected} == expected


def test_a_name_is_found_in_the_model_at_hand_though_its_wrapping_differs(models):
    gpt2 = Layout.of_model(with_lora(copy.deepcopy(models["gpt2"])))
    assert module_path("blocks.2.hook_resid_post", gpt2) == "transformer.h.2"
    assert module_path("h.2.mlp", gpt2) == "transformer.h.2.mlp"
    llama = Layout.of_model(models["llama"])
    # As a model with images has it, whose text model lies deeper.
    assert module_path("model.language_model.layers.1.output", llama) == "model.layers.1"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("blocks.1.attn.hook_z", "the heads before the output projection"),
        ("blocks.1.hook_resid_mid", "added up inside the block"),
        ("blocks.1.hook_mlp_in", r"before the norm.*`model\.layers\.1\.post_attention_layernorm`"),
        ("blocks.1.ln2.hook_normalized", "before its weight is applied"),
        ("blocks.1.mlp.hook_post", "not the output of a known module"),
        ("ln_final.hook_scale", "not the output of a known module"),
        ("model.layers.1.self_attn.o_proj.input", "which no module gives out"),
        ("blocks.7.hook_resid_post", "of layer 7 – the model has layers 0 to 2"),
    ],
)
def test_a_name_of_no_modules_output_is_refused_with_its_reason(models, name, why):
    with pytest.raises(ValueError, match=why):
        module_path(name, Layout.of_model(models["llama"]))


def test_a_model_is_checked_for_hook_points_and_width(tmp_path, models):
    folder = sae_lens(tmp_path / "sae", metadata=RESIDUAL | {"hf_hook_name": "model.nowhere.output"})
    with pytest.raises(ValueError, match=r"1 problem.*\n.*`hook_point` is `model\.nowhere`"):
        load_sae(folder, model=models["llama"])
    with pytest.raises(ValueError, match="width 2"):
        load_sae(folder, model=models["llama"], hook_point="model.layers.1")
    wide = random_sae("standard")
    tensors = {"encoder": torch.randn(4, 32), "encoder_bias": torch.zeros(4), "decoder": torch.randn(4, 32)}
    fits = SparseAutoencoder(wide.spec, **tensors, decoder_bias=torch.zeros(32))
    save_sae(fits, tmp_path / "fits")
    assert load_sae(tmp_path / "fits", model=models["llama"]).spec.hook_point == "model.layers.1"
    # The same layer of another architecture.
    assert load_sae(tmp_path / "fits", model=models["gpt2"]).spec.hook_point == "transformer.h.1"
