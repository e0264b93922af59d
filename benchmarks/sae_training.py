"""Training against sae-lens' own trainer: the same activations in the same order, TopK, batch, learning rate and schedule.

Both take as many tokens as sae-lens is through with in about the minutes given, in alternating chunks of steps in one process;
the time of a chunk holds all that each trainer does for a step, reading its batch included. FVU is of the held-out activations,
both autoencoders read from their files by this package (whose outputs equal sae-lens' own, `tests/test_sae_interop.py`).
What is not the same: each has its own start, auxiliary loss and handling of decoder norms.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from timing import Row, measure
from tqdm.auto import tqdm

from interp_rlhf.sae.cache import CachedActivations
from interp_rlhf.sae.cutting import FORWARD_TOKENS
from interp_rlhf.sae.files import load_sae, save_sae
from interp_rlhf.sae.held_out import held_out
from interp_rlhf.sae.optimizing import Training
from interp_rlhf.sae.stream import ShuffleBuffer
from interp_rlhf.sae.training_settings import SaeTraining

CHUNK = 20  # steps
LATENTS, K = 2304, 32
SETTINGS = {"latents": LATENTS, "k": K, "learning_rate": 3e-3, "warm_up": 0.02, "decay": 0.2, "batch_tokens": 2048}


def sae_lens_trainer(config: SaeTraining, source: CachedActivations, tokens: int, width: int) -> Any:
    """sae-lens' `SAETrainer` with the settings of ours, and the batches of ours as its data provider."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    steps = tokens // config.batch_tokens
    torch.manual_seed(config.seed)
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=width, d_sae=config.latents, k=config.k, dtype="float32", device="cpu", apply_b_dec_to_input=True,
            normalize_activations="expected_average_only_in", metadata=SAEMetadata(hook_name=config.hook_point),
        )
    )  # fmt: skip
    buffer = ShuffleBuffer(source, min(config.buffer, source.tokens), config.batch_tokens, config.seed)

    def batches() -> Any:
        while True:
            yield buffer.next()

    settings = SAETrainerConfig(
        total_training_samples=steps * config.batch_tokens, train_batch_size_samples=config.batch_tokens,
        lr=config.learning_rate, lr_end=0.0, lr_warm_up_steps=round(config.warm_up * steps),
        lr_decay_steps=round(config.decay * steps), dead_feature_window=source.tokens // config.batch_tokens,
        n_batches_for_norm_estimate=48, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer = SAETrainer(settings, sae, batches())
    trainer.activation_scaler.estimate_scaling_factor(
        width, trainer.data_provider, settings.n_batches_for_norm_estimate
    )
    return trainer


def their_chunk(trainer: Any, steps: int) -> None:
    """What `SAETrainer.fit` does in a loop (6.54), without its progress bar."""
    for _ in range(steps):
        trainer.maybe_reset_sparsity()
        trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1


def training_rows(cache: Path, minutes: float, seed: int) -> list[Row]:
    """Tokens per second and held-out FVU."""
    held_out_at = sorted(path for path in cache.glob("held-out-*") if path.is_dir())
    if not (cache / "cache.json").exists() or not held_out_at:
        raise SystemExit(
            f"`{cache}` – expected the folder that `interp-rlhf sae train --eval FILE --cache FOLDER` fills: activations, and "
            "those of the held-out text."
        )
    hook_point = json.loads((cache / "cache.json").read_text())["hook_point"]
    source = CachedActivations(cache, FORWARD_TOKENS, seed)
    width = next(source.in_order()).shape[1]

    def config(tokens: int) -> SaeTraining:
        return SaeTraining(hook_point=hook_point, tokens=tokens, seed=seed, checkpoint_every=0, **SETTINGS)  # type: ignore[arg-type]

    trial = sae_lens_trainer(config(10**6), source, 10**6, width)
    their_chunk(trial, CHUNK)
    began = time.perf_counter()
    their_chunk(trial, CHUNK)
    speed = CHUNK * SETTINGS["batch_tokens"] / (time.perf_counter() - began)
    tokens = int(speed * 60 * minutes)
    ours, theirs = Training(source, config(tokens), None), sae_lens_trainer(config(tokens), source, tokens, width)

    def our_chunk(steps: int) -> None:
        for _ in range(steps):
            ours.take_step()

    times = []
    for chunk in tqdm(range(-(-ours.steps // CHUNK)), desc="both trainings", leave=False):
        steps = min(CHUNK, ours.steps - ours.step)
        if chunk % 2:
            first = measure(lambda n=steps: our_chunk(n))
            times.append((measure(lambda n=steps: their_chunk(theirs, n)), first))
        else:
            first = measure(lambda n=steps: their_chunk(theirs, n))
            times.append((first, measure(lambda n=steps: our_chunk(n))))
    theirs.sae.fold_activation_norm_scaling_factor(theirs.activation_scaler.scaling_factor)
    with tempfile.TemporaryDirectory() as place:
        save_sae(ours.finished(), Path(place) / "ours")
        theirs.sae.save_inference_model(f"{place}/theirs")
        blocks = CachedActivations(held_out_at[0], FORWARD_TOKENS, 0).in_order
        found = [held_out(load_sae(f"{place}/{name}"), blocks, K) for name in ("ours", "theirs")]
    fvu = [1 - each.explained_variance for each in found]
    dead = [each.dead_fraction for each in found]
    total = [sum(pair[side].wall for pair in times) / 60 for side in (1, 0)]
    about = f"{ours.steps * config(tokens).batch_tokens:,} tokens each, {total[0]:.1f} minutes of ours, {total[1]:.1f} of theirs"
    return [
        Row("training_vs_sae_lens", [a.cpu / b.cpu for a, b in times], "≥ 1.0", about),
        Row("training_vs_sae_lens_wall", [a.wall / b.wall for a, b in times]),
        Row("training_fvu", [fvu[0]], "", f"held out; dead {dead[0]:.1%}"),
        Row("training_fvu_sae_lens", [fvu[1]], "", f"held out; dead {dead[1]:.1%}"),
        Row("training_fvu_minus_sae_lens", [fvu[0] - fvu[1]], "≤ 0.02"),
    ]
