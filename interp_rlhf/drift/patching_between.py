"""Which block carries what a training did: activations of the tuned model, put into its base.

In: two checkpoints, contrast pairs. Out: a record for the `drift` event. It must not know how it is shown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..activations.loading import adapter_base, load_model
from ..runlog.log import jsonable
from ..runlog.patching_records import PatchingEntry
from ..validation.patching import attribution_patching

if TYPE_CHECKING:
    from collections.abc import Sequence


def tuned_model(before: str, after: str) -> Any:
    """The second model of two checkpoints. An adapter gets its own copy of the base."""
    return load_model(after, before if adapter_base(before) is None else None)


def patching_between(
    before: str, after: str, tokenizer: Any, pairs: Sequence[Any], seed: int = 0, progress: bool = True
) -> PatchingEntry:
    """Attribution and exact patching between two checkpoints. Both models are in memory.

    Args:
        before (`str`), after (`str`): as in `compare_checkpoints`.
        pairs (`list[dict]`): with `clean`, `followed` and `violated`; both models read the clean prompt.
        seed (`int`, defaults to 0): seed of the split and of the random sites.

    Raises:
        `ValueError`: pairs of another form.
    """
    base = load_model(before)
    found = attribution_patching(
        base, tokenizer, pairs, components=("residual", "attention", "mlp"), tuned=tuned_model(before, after), split=seed,
        seed=seed, progress=progress,
    )  # fmt: skip
    return PatchingEntry.from_json(jsonable(found.to_json()))
