"""The evidence of a card, printed line by line.

In: findings of `probe check`. Out: lines on the terminal. It must not know how the findings were made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .console import shown_estimate

if TYPE_CHECKING:
    from ..concepts.card import Estimate, Findings


def print_findings(title: str, findings: Findings) -> None:
    """Print the gain from the probe, all AUROCs, the calibration and the controls of one data set."""
    near = f", {findings.near_duplicates} nearly rows of the fit" if findings.near_duplicates else ""
    print(f"\n{title}: {findings.examples} examples, {findings.positives} positive{near}")
    if findings.adds is None:
        print_line("the probe adds", "not enough prompts to say")
    else:
        adds = findings.adds
        print_line(
            "the probe adds",
            f"AUROC {shown_estimate(adds.auroc, '+')} to {adds.auroc_without:.3f} of all baselines, "
            f"saves {shown_estimate(adds.log_loss, '+')} nats of {adds.log_loss_without:.3f}",
        )
    _print_estimates(findings)
    _print_calibration(findings)
    _print_controls(findings)


def print_line(name: str, text: str) -> None:
    """Print a line of evidence: its name on the left, flush right."""
    print(f"{name:>28}  {text}")


def _print_estimates(findings: Findings) -> None:
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
    for name, estimate in (rows | findings.measures).items():
        if estimate is not None:
            print_line(name, f"AUROC {shown_estimate(estimate)}")
    if prompt is not None and prompt.answer_share is not None:
        print_line("of the answer", f"{shown_estimate(prompt.answer_share)} of the score's variance under one prompt")


def _print_calibration(findings: Findings) -> None:
    calibration = findings.calibration
    if calibration is None:
        return
    slope = "labels are separated"
    if calibration.slope is not None:
        slope = f"slope {calibration.slope:.2f}, intercept {calibration.intercept:+.2f}"
    print_line("calibration", f"{slope}, Brier score {calibration.brier:.3f}, log-loss {calibration.log_loss:.3f}")


def _print_controls(findings: Findings) -> None:
    controls = {
        "permuted labels": findings.permutation, "random directions": findings.random_direction,
        "random dictionaries": findings.random_dictionary,
    }  # fmt: skip
    for name, control in controls.items():
        if control is not None:
            print_line(name, f"AUROC {control.mean:.3f}, 95th percentile {control.p95:.3f} of {control.repeats}")
    sae = findings.sae
    if sae is not None:
        print_line(
            "autoencoder here",
            f"explained variance {sae.explained_variance:.3f}, L0 {sae.l0:.1f}, {sae.dead_fraction:.1%} of {sae.latents} "
            f"latents never on in {sae.tokens} tokens",
        )
