"""The numbers of a card's evidence under the names that people read, in the order in which they are shown.

In: findings of one set of examples. Out: names and numbers. It must not know where they are shown: in a terminal, on a page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .card import Control, Estimate, Evidence, Findings


def findings_of(evidence: Evidence) -> dict[str, Findings]:
    """The sets of examples that a card was checked on."""
    sets = {"held out": evidence.held_out, "the model's own completions": evidence.completions}
    return {name: findings for name, findings in sets.items() if findings is not None}


def estimates_of(findings: Findings) -> dict[str, Estimate]:
    """AUROC of the probe, of each baseline and of each independent measure."""
    prompt = findings.prompt
    rows: dict[str, Estimate | None] = {"probe": findings.probe, "TF-IDF": findings.tfidf, "length": findings.length}
    rows |= {"punctuation": findings.punctuation, "embedding probe": findings.embedding}
    rows |= {f"likelihood, {how}": estimate for how, estimate in findings.likelihood.items()}
    if prompt is not None:
        rows |= {
            "TF-IDF of the prompt": prompt.tfidf, "TF-IDF of both": prompt.tfidf_with_completion,
            "probe at the prompt's end": prompt.probe, "probe, other answers": prompt.other_answers,
            f"probe within {prompt.prompts_with_both_labels} prompts": prompt.within,
        }  # fmt: skip
    return {name: estimate for name, estimate in (rows | findings.measures).items() if estimate is not None}


def controls_of(findings: Findings) -> dict[str, Control]:
    """The controls that the probe is held against."""
    controls = {
        "permuted labels": findings.permutation, "random directions": findings.random_direction,
        "random dictionaries": findings.random_dictionary,
    }  # fmt: skip
    return {name: control for name, control in controls.items() if control is not None}
