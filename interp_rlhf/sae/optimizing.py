"""The steps of a training: TopK (Gao et al. 2024, arXiv 2406.04093) and BatchTopK (Bussmann et al. 2024, arXiv 2412.06410).

In: a source of activations, settings. Out: weights, step by step, and at the end a `SparseAutoencoder`. It must not know models,
texts, logs or files.

Inputs are divided by their mean norm over √D (the `expected_average_only_in` of sae-lens). At the end the division is folded into
the weights. The loss is the unexplained fraction of the batch's variance, plus the auxiliary loss of Gao et al.: the share of
the error that remains when long-silent latents reconstruct it. Deviations from the papers:
1. There are `aux_k` = 2k auxiliary latents, not half the width: each costs as much as one of the k.
2. A latent counts as silent after one pass over the corpus by default, not after ten million tokens: corpora here are small.
3. BatchTopK's threshold is the moving average of the smallest kept entry, as in sae-lens. It is exported as JumpReLU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .autoencoder import SaeSpec, SparseAutoencoder
from .quality import variance_unexplained
from .sparse import keep_largest, keep_rows
from .stream import ShuffleBuffer

if TYPE_CHECKING:
    from .sparse import Entries
    from .stream import Source
    from .training_settings import SaeTraining

_PARAMETERS = ("encoder", "encoder_bias", "decoder", "decoder_bias")


class Training:
    """The state of a training: weights, optimizer, stream and silent latents.

    Args:
        source (`Source`): activations of the corpus.
        config (`SaeTraining`): settings.
        saved (`tuple`, *optional*): tensors and state of a checkpoint.
    """

    def __init__(
        self, source: Source, config: SaeTraining, saved: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None
    ):
        self.config = config
        size = min(config.buffer, source.tokens)
        self.buffer = ShuffleBuffer(source, size, config.batch_tokens, config.seed)
        self.total = config.tokens if config.tokens is not None else round((config.epochs or 0) * source.tokens)
        self.steps = self.total // config.batch_tokens
        self.dead_after = config.dead_after or source.tokens
        self.aux_k = 2 * config.k if config.aux_k is None else config.aux_k
        self.step = 0
        self.seconds = 0.0
        self.threshold: float | None = None
        self.last: dict[str, float] = {}
        if saved is None:
            self._start()
        else:
            self._restore(*saved)
        self.optimizer = torch.optim.Adam([self.weights[name] for name in _PARAMETERS], fused=True)
        if saved is not None:
            self._restore_optimizer(saved[0])

    def _start(self) -> None:
        config = self.config
        held = self.buffer.held()
        self.scale = float(held.shape[1] ** 0.5 / held.norm(dim=1).double().mean())
        center = held.double().mean(0).float() * self.scale
        random = torch.Generator().manual_seed(config.seed)
        rows = _unit(torch.randn(config.latents, held.shape[1], generator=random))
        self.weights = {
            "encoder": rows.clone(), "encoder_bias": torch.zeros(config.latents), "decoder": rows, "decoder_bias": center,
        }  # fmt: skip
        self.silent = torch.zeros(config.latents, dtype=torch.long)  # tokens since each was on
        for weight in self.weights.values():
            weight.requires_grad_()

    def take_step(self) -> dict[str, torch.Tensor]:
        """Take one optimizer step. Returns the measurements on its batch before the step."""
        activation = self.buffer.next() * self.scale
        weights = self.weights
        centred = activation - weights["decoder_bias"].detach()
        with torch.no_grad():
            before = torch.addmm(weights["encoder_bias"], centred, weights["encoder"].T)  # (N, S)
        entries = self._entries(before)
        values = self._values(entries, before, centred)
        error = entries.decode(values, weights["decoder"]) + weights["decoder_bias"] - activation
        fvu = variance_unexplained(error, activation)
        dead = self.silent > self.dead_after
        loss = fvu
        if self.aux_k and bool(dead.any()):
            loss = loss + self.config.aux_weight * self._auxiliary(dead, before, centred, -error.detach())
        self.optimizer.zero_grad()
        loss.backward()
        self._descend()
        kept = values.detach()
        on = kept > 0
        self.silent += len(activation)
        self.silent[entries.columns[on]] = 0
        if self.config.architecture == "batchtopk" and bool(on.any()):
            smallest = float(kept[on].min())
            self.threshold = smallest if self.threshold is None else 0.99 * self.threshold + 0.01 * smallest
        self.step += 1
        return {"fvu": fvu.detach(), "l0": on.sum() / len(activation), "dead_fraction": dead.float().mean()}

    def _entries(self, before: torch.Tensor) -> Entries:
        config = self.config
        if config.architecture == "topk":
            return keep_rows(before.topk(config.k, dim=-1, sorted=False).indices, config.latents)
        hint = 0.0 if self.threshold is None else 0.8 * self.threshold
        return keep_largest(before, len(before) * config.k, hint)

    def _values(self, entries: Entries, before: torch.Tensor, centred: torch.Tensor) -> torch.Tensor:
        weights = self.weights
        return entries.pick(
            before, weights["encoder"], weights["encoder_bias"], weights["decoder_bias"], centred
        ).relu()

    def _auxiliary(
        self, dead: torch.Tensor, before: torch.Tensor, centred: torch.Tensor, missing: torch.Tensor
    ) -> torch.Tensor:
        """Share of the error that silent latents leave: ‖missing − theirs‖² / ‖missing‖²."""
        silent = dead.nonzero().squeeze(1)
        chosen = before[:, silent].topk(min(self.aux_k, len(silent)), dim=-1, sorted=False).indices
        entries = keep_rows(silent[chosen], self.config.latents)
        theirs = entries.decode(self._values(entries, before, centred), self.weights["decoder"])
        return (missing - theirs).pow(2).sum() / missing.pow(2).sum()

    @torch.no_grad()
    def _descend(self) -> None:
        config = self.config
        rows = self.weights["decoder"]
        assert rows.grad is not None
        # Rows have length 1. The part of the gradient that would change the length is removed.
        rows.grad -= (rows.grad * rows).sum(1, keepdim=True) * rows
        rising = min(1.0, (self.step + 1) / max(1.0, config.warm_up * self.steps))
        falling = min(1.0, (self.steps - self.step) / max(1.0, config.decay * self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * min(rising, falling)
        self.optimizer.step()
        rows.copy_(_unit(rows))

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and JSON values from which a training goes on as if it had not been stopped."""
        held, position = self.buffer.state()
        tensors = {name: self.weights[name].detach() for name in _PARAMETERS}
        for name in _PARAMETERS:
            for key, value in self.optimizer.state[self.weights[name]].items():
                tensors[f"adam.{name}.{key}"] = value
        tensors |= {"silent": self.silent} | {f"buffer.{key}": value for key, value in held.items()}
        return tensors, {
            "step": self.step, "stream": position, "scale": self.scale, "threshold": self.threshold, "seconds": self.seconds,
        }  # fmt: skip

    def _restore(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        self.weights = {name: tensors[name].requires_grad_() for name in _PARAMETERS}
        self.silent = tensors["silent"]
        self.step, self.scale, self.threshold = state["step"], state["scale"], state["threshold"]
        self.seconds = state["seconds"]
        self.buffer.restore({key: tensors[f"buffer.{key}"] for key in ("held", "random")}, state["stream"])

    def _restore_optimizer(self, tensors: dict[str, torch.Tensor]) -> None:
        for name in _PARAMETERS:
            kept = {key: tensors[f"adam.{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[self.weights[name]] = kept

    def finished(self, model_id: str = "") -> SparseAutoencoder:
        """The autoencoder with the current weights, in the scale of the activations."""
        weights = {name: weight.detach().clone() for name, weight in self.weights.items()}
        # Latents and reconstructions are in units of the scaled input. Since rows have length 1, only the biases change.
        for name in ("encoder_bias", "decoder_bias"):
            weights[name] /= self.scale
        config = self.config
        if config.architecture == "topk":
            spec = SaeSpec("topk", config.hook_point, config.k, model_id=model_id)
            return SparseAutoencoder(spec, center=weights["decoder_bias"], **weights)
        spec = SaeSpec("jumprelu", config.hook_point, model_id=model_id)
        threshold = torch.full((config.latents,), (self.threshold or 0.0) / self.scale)
        return SparseAutoencoder(spec, center=weights["decoder_bias"], threshold=threshold, **weights)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-8)
