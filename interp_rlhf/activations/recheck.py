"""What was taken from a trainer's pass is read again, now and then, alone and unpadded: the reading proves itself.

In: a row, what was taken of it, and the model. Out: nothing, or an error that names the cause. Where a model is sharded, all
ranks call it together, and all of them stop. It must not know rewards or losses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .noise import causes
from .precision import precision_of
from .ranks import raise_on_all_ranks
from .read import read

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from .batch import TokenBatch
    from .tap import TokenReadout

# Rollouts, or optimizer steps, between two checks; there is always one at the first.
EVERY = 50
# Root mean square of the difference, in standard deviations of the batch's scores. In float32 a row alone and in a batch agree to
# 1e-5; in 16 bits SmolLM2's scores differ by 0.01 to 0.03 between a padded batch and a row alone.
RECHECK_TOLERANCE = {"float32": 2e-3, "16 bits": 0.15, "8 bits": 0.15, "4 bits": 0.15}


class Recheck:
    """Checks one row of what was taken, and that the first row that was read still reads the same.

    Args:
        readouts (`Sequence[TokenReadout]`): what is read.
        frozen (`bool`): whether the model must not move: a reference.
        what (`str`): whose pass it is, for errors.
    """

    def __init__(self, readouts: Sequence[TokenReadout], frozen: bool, what: str):
        self.readouts = list(readouts)
        self.frozen, self.what = frozen, what
        self._first: tuple[TokenBatch, dict[str, torch.Tensor]] | None = None

    def __call__(
        self,
        model: nn.Module,
        row: TokenBatch,
        taken: dict[str, torch.Tensor] | None = None,
        spread: dict[str, torch.Tensor] | None = None,
        args: Any = None,
    ) -> None:
        """Read a row again; of a frozen model also the first row that was ever read.

        Args:
            model (`nn.Module`): as the pass saw it: the reference, or the policy.
            row (`TokenBatch`): one row; its tokens that count are compared.
            taken (`dict[str, torch.Tensor]`, *optional*): readout name to scores (N, K) of those tokens; None where nothing was
                taken, and only the first row is read again.
            spread (`dict[str, torch.Tensor]`, *optional*): readout name to standard deviations (K,) of the whole batch's scores.
            args (`TrainingArguments`, *optional*): of the trainer, for the cause.

        Raises:
            `ValueError`: they differ.
        """
        again = None
        if taken is not None or (self.frozen and self._first is None):
            again = self._read(model, row)
        if taken is not None and again is not None:
            self.require(model, taken, again, spread, args)
        if self.frozen and self._first is not None:
            self.still(model)
        elif self.frozen and again is not None:
            self._first = row, again

    def require(
        self,
        model: nn.Module,
        taken: dict[str, torch.Tensor],
        again: dict[str, torch.Tensor],
        spread: dict[str, torch.Tensor] | None,
        args: Any = None,
    ) -> None:
        """Compare the values taken from a row with those of the row read alone; see `__call__`."""
        difference = self._differs(model, taken, again, spread)
        problem = None
        if difference is not None:
            problem = f"{difference} when they are read again, alone and in evaluation mode{self._end(model, _why(model, args))}"
        raise_on_all_ranks(problem)

    def still(self, model: nn.Module) -> None:
        """Read the first row again: a reference must not move. By all ranks together.

        Raises:
            `ValueError`: it does not read as it did.
        """
        problem = None
        if self._first is not None:
            row, before = self._first
            difference = self._differs(model, before, self._read(model, row), None)
            if difference is not None:
                cause = "the reference has moved: something trains it, or has loaded other weights into it"
                problem = f"{difference} when the first row of the run is read again{self._end(model, cause)}"
        raise_on_all_ranks(problem)

    def _read(self, model: nn.Module, row: TokenBatch) -> dict[str, torch.Tensor]:
        readings = read(model, row, self.readouts, reader=self.what)
        return {name: scores.scores[scores.mask] for name, scores in readings.items()}

    def _differs(
        self,
        model: nn.Module,
        one: dict[str, torch.Tensor],
        other: dict[str, torch.Tensor],
        spread: dict[str, torch.Tensor] | None,
    ) -> str | None:
        allowed = RECHECK_TOLERANCE[precision_of(model)]
        for name, values in one.items():
            if name not in other or len(values) < 2:
                continue
            values, again = values.double().cpu(), other[name].double().cpu()
            scale = values.std(0, correction=0) if spread is None else spread[name].double().cpu()
            # A score that hardly varies has no scale but its own size.
            both = torch.isfinite(values) | torch.isfinite(
                again
            )  # what is no number on both sides is told by who uses it
            gap = torch.where(both, values - again, 0.0) / scale.nan_to_num(1.0).clamp(
                min=1e-3 * float(values.nan_to_num().abs().mean()) + 1e-9
            )
            error = float(gap.pow(2).mean().sqrt())
            if not error <= allowed:
                what = name.rpartition(":")[2]
                return f"Scores of `{what}` on the {self.what} are off by {error:.3g} of their standard deviation"
        return None

    def _end(self, model: nn.Module, cause: str) -> str:
        precision = precision_of(model)
        return (
            f" – expected at most {RECHECK_TOLERANCE[precision]:g} in {precision}. Cause: {cause}. What was read since "
            "the last check cannot be relied on: mend it and start the run again."
        )


def _why(model: nn.Module, args: Any) -> str:
    known = causes(model, args)
    named = [*known.noise, *known.adapters, *known.padding]
    if known.reach is not None:
        named.append(f"rotary positions that depend on the longest row of the batch, from {known.reach} tokens on")
    return "; ".join(named) or (
        "none of the known ones (noise hooks, dropout, router jitter, padding, a moved reference). Look for hooks on the "
        "model and for what it does in training mode only"
    )
