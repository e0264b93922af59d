"""Causal findings, written into their card.

In: a card and findings. Out: the card's file with the findings, and a plot next to it. It must not know how they were measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .artifact import write_atomically
from .card import with_causal
from .causal_plot import plot_causal

if TYPE_CHECKING:
    from .card import LoadedCard
    from .causal_findings import CausalFindings


def write_causal(card: LoadedCard, findings: CausalFindings) -> CausalFindings:
    """Write findings into a card, under the digest of its readout, and a plot next to it. The card's other content stays.

    Returns:
        `CausalFindings`: the findings as they are in the card.
    """
    findings = findings.model_copy(update={"readout": card.card.readout_digest})
    write_atomically(card.path, with_causal(card.path.read_text(encoding="utf-8"), findings).encode())
    plot_causal(findings, card.path.with_suffix(".causal.svg"), card.card.name)
    return findings
