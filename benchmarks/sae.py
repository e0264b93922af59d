"""Sparse autoencoders: latents by column, full encodes against sae-lens and sparsify, blocked TopK memory, and training.

Weights are random float32, the same in every contestant; all must give the same latents to 1e-5 of the largest before anything is
timed. A ratio is the other's time over ours, so 2 means that ours is twice as fast.

  columns_vs_full_encode       8 latents of a 576 → 36,864 JumpReLU autoencoder by column, against encoding all of them
  full_encode_vs_sae_lens      all latents of that autoencoder, against sae-lens' `JumpReLUSAE.encode`
  full_encode_vs_sparsify      all latents of a 576 → 36,864 TopK autoencoder (k = 32), against sparsify's `SparseCoder.encode`
  columns_topk_vs_full_encode  8 of these TopK latents, which need all the others, against our encoding of all
  blocked_topk_memory          peak memory of reading 8 of these TopK latents over that of the (B, T, S) tensor; ≤ 0.15
  training_vs_sae_lens         with `--train MINUTES --cache FOLDER`: tokens per second of our trainer over those of sae-lens' own
  training_fvu_minus_sae_lens  FVU on held-out activations after as many tokens, ours less theirs (`sae_training.py`)

sae-lens and sparsify are comparators only (`pip install 'interp-rlhf[interop]'`); without them their rows say so.
"""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import Row, alternate, finish, parser, prepare, rows_of

from interp_rlhf.sae.autoencoder import SaeSpec, SparseAutoencoder

WIDTH, SIZE, K = 576, 36_864, 32
BATCH, TOKENS = 8, 64
MEMORY_TOKENS = 256
CHOSEN = list(range(0, SIZE, SIZE // 8))
NOT_INSTALLED = "not installed (pip install 'interp-rlhf[interop]')"


def random_sae(architecture: str, seed: int) -> SparseAutoencoder:
    """An autoencoder with random weights, of the given architecture."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    encoder = normal(SIZE, WIDTH) / math.sqrt(WIDTH)
    rest = {"threshold": normal(SIZE).abs()} if architecture == "jumprelu" else {}
    spec = SaeSpec(architecture, "model.layers.0", K if architecture == "topk" else None)  # type: ignore[arg-type]
    return SparseAutoencoder(
        spec, encoder=encoder, encoder_bias=0.1 * normal(SIZE), decoder=encoder, decoder_bias=normal(WIDTH),
        center=0.1 * normal(WIDTH), **rest,
    )  # fmt: skip


def sae_lens_encode(sae: SparseAutoencoder) -> Callable[[torch.Tensor], torch.Tensor]:
    """`JumpReLUSAE.encode` of sae-lens with our weights."""
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

    theirs = JumpReLUSAE(JumpReLUSAEConfig(d_in=WIDTH, d_sae=SIZE, apply_b_dec_to_input=False, device="cpu"))
    # Ours takes the centre off through the bias, so that theirs is given the bias that comes of it.
    theirs.load_state_dict({
        "W_enc": sae.encoder.T.contiguous(), "b_enc": sae.encoder_bias - sae.encoder @ sae.center, "W_dec": sae.decoder,
        "b_dec": sae.decoder_bias, "threshold": sae.threshold,
    })  # fmt: skip
    return theirs.encode


def sparsify_encode(sae: SparseAutoencoder) -> Callable[[torch.Tensor], Any]:
    """`SparseCoder.encode` of sparsify with our weights: (top_acts, top_indices, pre_acts)."""
    from sparsify import SparseCoder, SparseCoderConfig

    theirs = SparseCoder(WIDTH, SparseCoderConfig(num_latents=SIZE, k=K), device="cpu")
    theirs.load_state_dict({
        "encoder.weight": sae.encoder, "encoder.bias": sae.encoder_bias, "W_dec": sae.decoder, "b_dec": sae.center,
    })  # fmt: skip
    return theirs.encode


def require_equal(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """A fast wrong answer is no contestant."""
    worst = float((found - expected).abs().max() / expected.abs().max())
    if not worst <= 1e-5:
        raise SystemExit(f"`{name}` differs by {worst:.2g} of the largest latent – expected the same to 1e-5.")


@torch.no_grad()
def timed_rows(pairs: int, seed: int) -> list[Row]:
    """Rows about time."""
    activation = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed + 1))
    jump, top = random_sae("jumprelu", seed), random_sae("topk", seed)
    rows = []
    for name, sae, target in (("columns_vs_full_encode", jump, "≥ 100"), ("columns_topk_vs_full_encode", top, "")):
        columns = sae.latents(CHOSEN)
        require_equal(name, columns(activation), sae.encode(activation)[..., CHOSEN])
        # One call of the columns is too short for the clock of CPU time.
        repeats = 200 if target else 1

        def repeated(columns: Any = columns, repeats: int = repeats) -> None:
            for _ in range(repeats):
                columns(activation)

        samples = alternate(lambda sae=sae: sae.encode(activation), repeated, pairs, name)
        rows += [
            Row(name, [full.cpu / few.cpu * repeats for full, few in samples], target),
            Row(f"{name}_wall", [full.wall / few.wall * repeats for full, few in samples]),
        ]
    try:
        theirs = sae_lens_encode(jump)
        require_equal("sae-lens", theirs(activation), jump.encode(activation))
        samples = alternate(lambda: theirs(activation), lambda: jump.encode(activation), pairs, "sae-lens")
        rows += rows_of("full_encode_vs_sae_lens", samples, "≥ 1.0")
    except ImportError:
        rows.append(Row("full_encode_vs_sae_lens", [], "≥ 1.0", NOT_INSTALLED))
    try:
        coder = sparsify_encode(top)
        flat = activation.view(-1, WIDTH)
        acts, indices, _ = coder(flat)
        dense = torch.zeros(len(flat), SIZE).scatter_(1, indices, acts)
        require_equal("sparsify", dense, top.encode(flat))
        samples = alternate(lambda: coder(flat), lambda: top.latents().top(flat), pairs, "sparsify")
        rows += rows_of("full_encode_vs_sparsify", samples, "≥ 1.0", "values and indices of the k that are on")
    except ImportError:
        rows.append(Row("full_encode_vs_sparsify", [], "≥ 1.0", NOT_INSTALLED))
    return rows


def memory_row(seed: int) -> Row:
    """Highest resident memory while 8 TopK latents are read, over what it was before, against the (B, T, S) tensor."""
    code = f"import sys; sys.path.insert(0, {str(sys.path[0])!r}); import sae; print(sae.memory({seed}))"
    # With a fixed threshold glibc gives every tensor back when it is freed: what is resident is in use.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    return Row("blocked_topk_memory", [float(found.stdout.split()[-1])], "≤ 0.15", f"{BATCH} × {MEMORY_TOKENS} tokens")


@torch.no_grad()
def memory(seed: int) -> float:
    """In a separate process: highest resident memory during one reading above what was resident before it, after a first
    reading of one token."""
    torch.set_num_threads(1)
    latents = random_sae("topk", seed).latents(CHOSEN)
    activation = torch.randn(BATCH, MEMORY_TOKENS, WIDTH)
    latents(activation[:1, :1])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = _resident("VmRSS")
    latents(activation)
    return (_resident("VmHWM") - before) / (BATCH * MEMORY_TOKENS * SIZE * 4)


def _resident(field: str) -> int:
    """Bytes, from the process's own status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def main() -> None:
    made = parser(__doc__, pairs=7)
    made.add_argument("--train", type=float, metavar="MINUTES", help="only train, about so long with each trainer")
    made.add_argument("--cache", type=Path, help="what `interp-rlhf sae train --eval FILE --cache FOLDER` filled")
    arguments = made.parse_args()
    if (arguments.train is None) != (arguments.cache is None):
        made.error("expected `--train` and `--cache` together")
    prepare(arguments)
    settings: dict[str, Any]
    if arguments.train is not None:
        from sae_training import SETTINGS, training_rows

        rows = training_rows(arguments.cache, arguments.train, arguments.seed)
        settings = {"model": "activations of SmolLM2-135M-Instruct", **SETTINGS}
        arguments.pairs = len(rows[0].values)
    else:
        rows = [*timed_rows(arguments.pairs, arguments.seed), memory_row(arguments.seed)]
        settings = {
            "model": f"random autoencoders of {WIDTH} → {SIZE:,} latents, float32", "width": WIDTH, "latents": SIZE, "k": K,
            "tokens": BATCH * TOKENS, "memory_tokens": BATCH * MEMORY_TOKENS,
        }  # fmt: skip
    finish("sae", rows, arguments, settings)


if __name__ == "__main__":
    main()
