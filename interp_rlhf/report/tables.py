"""Events → tables: results that the run computed, and the latest evaluation of drift in numbers with intervals.

In: events. Out: tables, their texts already in words. It must not know HTML or Markdown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .runs import ResultTable
from .text import show, visible

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..runlog.events import DriftEvent, OwnTextEntry, SaeEntry, TableEvent


def logged_table(event: TableEvent) -> ResultTable:
    """A table as it was logged, with rows of equal length."""
    named = dict.fromkeys(name for row in event.rows if isinstance(row, dict) for name in row)
    columns = [show(name) for name in event.columns] or list(named)
    cells = [
        [row.get(name) for name in columns] if isinstance(row, dict) else row if isinstance(row, list) else []
        for row in event.rows
    ]
    width = max([len(columns), *map(len, cells)])
    return ResultTable(
        title=event.title or "Result",
        columns=columns + [""] * (width - len(columns)),
        rows=[row + [None] * (width - len(row)) for row in cells],
        note=event.note,
    )


def evaluation_tables(event: DriftEvent, step: int) -> Iterator[ResultTable]:
    """Monitors on labelled text, the policy's own text, and the latents that changed."""
    rows = _labelled_rows(event)
    if rows:
        columns = [
            "monitor",
            "read",
            "AUROC",
            "95 % interval",
            "change, interval",
            "false alarms, short to long texts",
        ]
        note = f"At step {step}. False alarms are at the threshold that gave 5 % at the start."
        yield ResultTable("Monitors on labelled text", columns, rows, note)
    if event.own_text is not None and (event.own_text.monitors or event.own_text.measures):
        yield _own_text_table(event.own_text, step)
    if event.sae is not None:
        yield _latents_table(event.sae, event.own_text, step)


def _labelled_rows(event: DriftEvent) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for name, monitor in event.monitors.items():
        for way in ("frozen", "restandardized", "refitted"):
            numbers = [getattr(monitor, f"{way}_{key}") for key in ("auroc", "interval", "change")]
            if numbers[0] is not None:
                rows.append([name, way, *numbers, monitor.false_alarms if way == "frozen" else None])
    return rows


def _own_text_table(own_text: OwnTextEntry, step: int) -> ResultTable:
    rows: list[list[Any]] = [
        [name, monitor.policy, monitor.text, monitor.policy_change, monitor.text_change]
        for name, monitor in own_text.monitors.items()
    ]
    rows += [[name, measure.mean, None, measure.change, None] for name, measure in own_text.measures.items()]
    shares = ", ".join(
        f"{key} {show(getattr(own_text, key))}" for key in ("clipped", "empty", "repetition", "reference_perplexity")
    )
    return ResultTable(
        "The policy's own text",
        ["what", "read on the policy", "on the reference", "change, interval", "by the text alone, interval"],
        rows,
        f"At step {step}, on {show(own_text.prompts)} prompts; changes in its standard deviations. {shares}.",
    )


def _latents_table(sae: SaeEntry, own_text: OwnTextEntry | None, step: int) -> ResultTable:
    """The latents that changed most. The note says how much of the activations the autoencoder still explains."""
    pairs: list[tuple[str, Any, str]] = [("variance unexplained", sae, "fvu"), ("latents on per token", sae, "l0")]
    if own_text is not None and own_text.fvu is not None:
        pairs.append(("variance unexplained on the policy's own text", own_text, "fvu"))
    changes = ", ".join(
        f"{words} {show(getattr(entry, f'{key}_before'))} → {show(getattr(entry, key))}" for words, entry, key in pairs
    )
    return ResultTable(
        "Latents that changed most",
        ["latent", "mean before", "mean now", "share of tokens before", "now"],
        [[row.latent, row.before, row.after, row.on_before, row.on_after] for row in sae.changed],
        f"At step {step} against the start, at {visible(sae.hook_point)}, on {show(sae.tokens)} tokens of the fixed texts: "
        f"{changes}. Where more is left unexplained than before, the latents say less about this model.",
    )
