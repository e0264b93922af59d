"""The numbers of a `drift` event under the names of the trainer's log.

In: a `drift` event. Out: names like `interp/drift/<hook point>/<metric>`, with their numbers. It must not know trainers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runlog.events import DriftEvent, OwnTextEntry, Record

# Numbers of the own text that trackers get. An autoencoder's FVU is among them.
SHARES = ("clipped", "empty", "repetition", "reference_perplexity", "fvu")


def trainer_metrics(event: DriftEvent) -> dict[str, Any]:
    """Metric name to number, as trackers show them."""
    logged: dict[str, Any] = {
        f"interp/drift/{point}/{key}": value
        for point, part in event.hook_points.items()
        for key, value in part.items()
    }
    logged |= {f"interp/drift/{key}": value for key, value in event.output.items()}
    for name, monitor in event.monitors.items():
        logged |= {f"interp/{name}/drift_{key}": value for key, value in _floats(monitor).items()}
    if event.own_text is not None:
        logged |= _of_own_text(event.own_text)
    if event.sae is not None:
        logged |= {"interp/drift/sae/fvu": event.sae.fvu, "interp/drift/sae/l0": event.sae.l0}
    return logged


def _of_own_text(own_text: OwnTextEntry) -> dict[str, float]:
    logged: dict[str, float] = {}
    for name, entry in own_text.monitors.items():
        logged |= {f"interp/{name}/own_{key}": value for key, value in _floats(entry).items()}
    for name, measure in own_text.measures.items():
        if measure.mean is not None:
            logged[f"interp/measure/{name}/own_mean"] = measure.mean
    shares = {key: getattr(own_text, key) for key in SHARES}
    return logged | {
        f"interp/own_text/{key}": value for key, value in shares.items() if value is not None and math.isfinite(value)
    }


def _floats(record: Record) -> dict[str, float]:
    """The fields of a record that are floats: no counts, no signs, no intervals."""
    return {key: value for key, value in record.to_json().items() if isinstance(value, float)}
