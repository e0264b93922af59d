"""Against the real sae-lens and sparsify: their files in our reader, ours in theirs, the same numbers.

Slow: their import takes longer than all of the tests of `test_sae_files.py`. `tests/sae_files.py` makes the files.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from sae_files import CASES, REFUSED, sae_lens_outputs, sae_lens_reads

from interp_rlhf.sae.files import load_sae, save_sae

pytestmark = pytest.mark.slow
NORM, MLP = "model.layers.1.post_attention_layernorm", "model.layers.1.mlp"
# What the format of sae-lens does not have.
UNSAVED = ("groupmax", "sparsify-skip", "sparsify-transcode")


def needs(name: str) -> None:
    package = "sparsify" if name.startswith("sparsify") else "sae_lens"
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def make(name: str, folder: Path):
    """A case with outputs in float32 and with the heads of `hook_z` side by side, and the arguments that its file leaves open."""
    case = CASES[name](folder)
    x, latents, output = case.x, case.latents, case.reconstruction
    if "bfloat16" in name:  # it computes in bfloat16, we do not: compared in float32
        latents, output = sae_lens_outputs(sae_lens_reads(case.folder).to(dtype=torch.float32), x)
    given = {}
    if "hook_z" in name:
        x, output, given = x.flatten(-2), output.flatten(-2), {"hook_point": "the.heads"}
    elif name.startswith("sae_lens") and "transcoder" in name:
        given = {"hook_point": NORM}  # they say `hook_mlp_in`, which has two meanings
    elif name.startswith("gemma_scope") and not name.startswith("gemma_scope_2"):
        given = {"hook_point": "model.layers.1"}  # in the repository's name, which a folder does not have
    return case.folder, x, latents.float(), output.float(), given


def same(found, expected):
    """Equal up to 1e-5 of the largest number, and on for the same latents and tokens."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_their_files_give_their_numbers(tmp_path, name):
    needs(name)
    folder, x, latents, output, given = make(name, tmp_path)
    sae = load_sae(folder, **given)
    encoded = sae.encode(x)
    same(encoded, latents)
    assert torch.equal(encoded > 0, latents > 0)
    same(sae(x), output)
    past = 0.0 if sae.skip is None else x @ sae.skip.T
    same(sae.decode(encoded, like=x) + past, output)
    some = [7, 0, 31]
    same(sae.latents(some)(x), latents[..., some])


@pytest.mark.parametrize("name", [name for name in CASES if not any(part in name for part in UNSAVED)])
@torch.no_grad()
def test_our_files_give_our_numbers_in_sae_lens(tmp_path, name):
    needs(name)
    needs("sae_lens")
    folder, x, latents, output, given = make(name, tmp_path / "theirs")
    sae = load_sae(folder, **given)
    save_sae(sae, tmp_path / "ours", metadata={"interp_rlhf": {"identity": "abc"}})
    read = sae_lens_reads(tmp_path / "ours")
    found, reconstructed = sae_lens_outputs(read, x)
    same(found, latents)
    same(reconstructed, output)
    assert read.cfg.metadata.hf_hook_name == sae.spec.hook_point
    assert read.cfg.metadata.interp_rlhf == {"identity": "abc"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_they_would_read_wrong_or_not_at_all_is_refused(tmp_path, name):
    needs("sae_lens")
    with pytest.raises(ValueError, match=r"1 problem|expected 6 or later"):
        load_sae(REFUSED[name](tmp_path / "sae"))


@pytest.mark.parametrize(
    "name", ["pre_6", "pre_6-topk", "batchtopk_checkpoint", "matryoshka_checkpoint", "unscaled_checkpoint"]
)
@torch.no_grad()
def test_the_conversion_that_an_error_names_gives_a_file_that_is_read(tmp_path, name):
    needs("sae_lens")
    import sae_lens

    old, new = REFUSED[name](tmp_path / "old"), tmp_path / "new"
    with pytest.raises(ValueError) as caught:
        load_sae(old)
    code = str(caught.value).split("with sae-lens: `")[1].split("`")[0]
    names = {"SAE": sae_lens.SAE, "TrainingSAE": sae_lens.TrainingSAE, "sae_lens": sae_lens, "SCALING_FACTOR": 0.37}
    exec(code, names | {"OLD": old, "NEW": new})
    x = torch.randn(4, 12)
    sae, (latents, output) = load_sae(new), sae_lens_outputs(sae_lens_reads(new), x)
    same(sae.encode(x), latents)
    same(sae(x), output)
    assert sae.spec.hook_point == "model.layers.1"
