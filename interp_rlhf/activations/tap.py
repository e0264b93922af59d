"""The tap: readouts that run inside a trainer's own forward passes, where the activation is born.

In: a model, readouts, and which passes to record. Out: one `Pass` per forward, holding float32 scores with the token
ids that they were computed on. Activations do not leave, but for the policy's in a training pass, where they are in the graph
anyway and a regularizer asked for them. It must not know what a reward is, and it never runs the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from .hook_points import adapters_off, backbone, first_adapter_layer, on_activation, unwrap
from .own_passes import is_reading

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import nn

PassKind = Literal["policy", "policy_no_grad", "reference"]


class TokenReadout(Protocol):
    """What a tap and `read()` run on an activation."""

    @property
    def name(self) -> str: ...

    @property
    def hook_point(self) -> str: ...

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        """Scores (B, T, K) of an activation (B, T, D) in float32."""
        ...


@dataclass
class Pass:
    """One forward of the model.

    Attributes:
        kind (`str`): `policy` (with gradient), `policy_no_grad` (old log-probs, evaluation; never generation, whose
            steps use a cache) or `reference` (the reference model, or the policy with its adapters off or with the
            adapter named `ref`).
        input_ids (`torch.LongTensor` of shape (B, T)): None where the model was fed embeddings.
        attention_mask (`torch.Tensor` of shape (B, T)): None where the pass had none.
        scores (`dict[str, torch.FloatTensor]`): readout name to scores (B, T, K), float32, without gradient.
        activations (`dict[str, torch.Tensor]`): hook point to activation (B, T, D), as the model made it and, in a training
            pass, with its graph. Only of a policy's passes, and only where the tap keeps them.
        log_probs (`torch.Tensor` of shape (B, T − 1), *optional*): what TRL's fused head returned, with its graph; 0 where
            the loss does not count.
    """

    kind: PassKind
    input_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    scores: dict[str, torch.Tensor] = field(default_factory=dict)
    activations: dict[str, torch.Tensor] = field(default_factory=dict)
    log_probs: torch.Tensor | None = None


class Tap:
    """Hooks on a model's hook points that run readouts in the passes that are asked for, and cost nothing in others.

    Use it as a context manager, or call `remove()`.

    Args:
        model (`nn.Module`): the causal LM, wrapped or not.
        readouts (`Sequence[TokenReadout]`): what to run; names must differ.
        record (`Collection[str]`): kinds of pass whose scores are kept for `take()`.
        is_reference (`bool`, defaults to `False`): every pass of this model is a reference pass.
        keep (`Sequence[str]`): hook points whose activations are kept in the policy's passes, which are then recorded too.
        keep_log_probs (`bool`, defaults to `False`): keep what TRL's fused head returned in those passes.

    Attributes:
        open (`bool`): while it is False, passes leave nothing behind.
        keep_kind (`str`): kind of pass whose activations are kept: `policy`, or `policy_no_grad` in an evaluation.
    """

    def __init__(
        self,
        model: nn.Module,
        readouts: Sequence[TokenReadout],
        record: Collection[str] = ("reference",),
        is_reference: bool = False,
        keep: Sequence[str] = (),
        keep_log_probs: bool = False,
    ):
        self.hook_points = group_by_hook_point(readouts)
        self.hook_points.update({point: [] for point in keep if point not in self.hook_points})
        self.open = True
        self.keep_kind: PassKind = "policy"
        self._record = frozenset(record)
        self._keep = frozenset(keep)
        self._keep_log_probs = keep_log_probs
        self._is_reference = is_reference
        self._adapter_layer = first_adapter_layer(model)
        self._passes: list[Pass] = []
        self._current: Pass | None = None
        self._fired_now: set[str] = set()
        self._fired: set[str] = set()
        self._had_policy_pass = False
        core = backbone(model)
        self._handles = [core.register_forward_pre_hook(self._begin, with_kwargs=True)]
        self._handles += [on_activation(model, point, self._hook(point)) for point in self.hook_points]
        self._handles.append(core.register_forward_hook(self._end))
        self._last: Pass | None = None
        if keep_log_probs:
            self._handles.append(unwrap(model).register_forward_hook(self._returned))

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks off the model and forget what was recorded."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def clear(self) -> None:
        """Forget the recorded passes."""
        self._passes.clear()
        self._current = self._last = None

    def take(self) -> list[Pass]:
        """Recorded passes since the last call, oldest first; they are handed over, not kept."""
        passes, self._passes = self._passes, []
        self._last = None
        return passes

    def require_fired(self) -> None:
        """Call after the first policy pass: every hook point must have fired in it.

        Raises:
            `RuntimeError`: one did not, so that its readout would silently see nothing.
        """
        missing = sorted(set(self.hook_points) - self._fired)
        if missing:
            seen = "did not fire" if self._had_policy_pass else "saw no policy pass at all"
            raise RuntimeError(
                f"Hook point{'s' if len(missing) > 1 else ''} {', '.join(f'`{point}`' for point in missing)} {seen} in "
                "the first policy pass – expected a firing per pass. Either the model was compiled before the hooks "
                "were added (`torch_compile`: attach before the first forward, or turn it off), or a fused kernel "
                "replaces the module (turn it off, or read at a decoder layer)."
            )

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._current = None
        self._fired_now = set()
        self._last = None
        if is_reading() or not self.open:
            return
        kind = self._kind(kwargs)
        if kind is not None and (kind == "policy" or self._records(kind)):
            input_ids = kwargs.get("input_ids", args[0] if args else None)
            self._current = Pass(kind, input_ids, kwargs.get("attention_mask"))

    def _kind(self, kwargs: dict[str, Any]) -> PassKind | None:
        if self._is_reference or adapters_off(self._adapter_layer):
            return "reference"
        if torch.is_grad_enabled():
            return "policy"
        # Steps of generation keep a cache; scoring passes say that they do not.
        return "policy_no_grad" if kwargs.get("use_cache") is False else None

    def _records(self, kind: PassKind) -> bool:
        return kind in self._record or (kind == self.keep_kind and (bool(self._keep) or self._keep_log_probs))

    def _hook(self, hook_point: str) -> Any:
        def run(activation: torch.Tensor) -> None:
            current = self._current
            if current is None:
                return
            self._fired_now.add(hook_point)
            if current.kind in self._record:
                run_readouts(self.hook_points[hook_point], activation, current.scores)
            if current.kind == self.keep_kind and hook_point in self._keep:
                current.activations[hook_point] = activation

        return run

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        current, self._current = self._current, None
        if current is None:
            return
        if current.kind == "policy":
            self._had_policy_pass = True
            self._fired |= self._fired_now
        if self._records(current.kind):
            self._passes.append(current)
            self._last = current if current.kind == self.keep_kind else None

    def _returned(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._last is not None:
            self._last.log_probs = getattr(output, "log_probs", None)
            self._last = None


def group_by_hook_point(readouts: Sequence[TokenReadout]) -> dict[str, list[TokenReadout]]:
    """Readouts per hook point; refuses two of one name."""
    names = [readout.name for readout in readouts]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(
            f"Two readouts are named {', '.join(f'`{name}`' for name in doubled)} – expected names that differ, since "
            "metrics and scores are kept by name. Rename one card."
        )
    groups: dict[str, list[TokenReadout]] = {}
    for readout in readouts:
        groups.setdefault(readout.hook_point, []).append(readout)
    return groups


def run_readouts(readouts: Sequence[TokenReadout], activation: torch.Tensor, into: dict[str, torch.Tensor]) -> None:
    """Scores of one activation (B, T, D), computed in float32 at any precision of the model."""
    with torch.no_grad(), torch.autocast(activation.device.type, enabled=False):
        activation = activation.detach().float()
        for readout in readouts:
            into[readout.name] = readout(activation)  # (B, T, K)
