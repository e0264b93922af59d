"""What the demo shows: the evidence on the terminal, samples and tables in the run log.

In: the summary, and answers with scores. Out: lines and events. It must not know how they were measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runlog.log import RunLog


def print_evidence(evidence: dict[str, Any]) -> None:
    """Print what the probe adds, and its AUROC next to the baselines and controls."""
    probe, tfidf, vader, adds = (
        evidence["probe"], evidence["tfidf"], evidence["measures"]["vader"], evidence["adds"]
    )  # fmt: skip
    auroc, loss = adds["auroc"], adds["log_loss"]
    print(
        f"what the probe adds to all baselines together: AUROC {auroc['value']:+.3f} [{auroc['low']:+.3f}, "
        f"{auroc['high']:+.3f}] to {adds['auroc_without']:.3f}, {loss['value']:+.3f} [{loss['low']:+.3f}, "
        f"{loss['high']:+.3f}] nats saved of {adds['log_loss_without']:.3f}"
    )
    print(
        f"probe at {evidence['hook_point']}: AUROC {probe['auroc']:.3f} [{probe['low']:.3f}, {probe['high']:.3f}] on "
        f"{evidence['examples']} other answers; 95th percentile of permuted labels {evidence['permutation']['p95']:.3f}, of "
        f"random directions {evidence['random_direction']['p95']:.3f}; TF-IDF {tfidf['auroc']:.3f}, embedding "
        f"{evidence['embedding']['auroc']:.3f}, VADER {vader['auroc']:.3f}"
    )


def log_samples(log: RunLog, before: list[dict[str, Any]], after: list[dict[str, Any]], step: int) -> None:
    """Append twelve answers with their scores, before and after training."""
    for when, rows, at in (("before", before, 0), ("after", after, step)):
        shown = [
            {"prompt": row["prompt"][-1]["content"], "completion": row["completion"], "scores": row["scores"]}
            for row in rows[:12]
        ]
        log.append("samples", at, when=when, rows=shown)


def log_tables(log: RunLog, summary: dict[str, Any]) -> None:
    """Append the two tables of the report: the evidence for the probe, and the gains on held-out prompts."""
    _log_evidence(log, summary["probe"])
    _log_gains(log, summary)


def _log_evidence(log: RunLog, probe: dict[str, Any]) -> None:
    gates = [[name, probe[name]["mean"], None, probe[name]["p95"]] for name in ("permutation", "random_direction")]
    adds = probe["adds"]["auroc"]
    estimates = {
        "the probe adds to all baselines together (difference)": {"auroc": adds["value"], **adds},
        **{key: probe[key] for key in ("probe", "tfidf", "embedding", "length", "punctuation")},
        **{f"likelihood, {how}": estimate for how, estimate in probe["likelihood"].items()},
        **{f"prompt, {what}": probe["prompt"][what] for what in ("tfidf", "probe")},
        **probe["measures"],
    }
    log.append(
        "table",
        title="Evidence for the probe",
        columns=["what", "AUROC", "95 % low", "95 % high (controls: 95th percentile)"],
        rows=[[name, e["auroc"], e["low"], e["high"]] for name, e in estimates.items()] + gates,
        note=f"{probe['examples']} answers to prompts that share neither topic nor template with the fit, read at "
        f"{probe['hook_point']}. The probe must lie above both controls; text baselines and VADER do not gate.",
    )


def _log_gains(log: RunLog, summary: dict[str, Any]) -> None:
    rows = []
    for key in ("probe_score", "monitor_score", "vader", "tokens"):
        for arm, result in [*summary["arms"].items(), ("probe − sham", summary["probe_minus_sham"])]:
            gain = result[f"{key}_gain"]
            rows.append([key, arm, gain.get("before"), gain.get("after"), gain["mean"], gain["low"], gain["high"]])
    log.append(
        "table",
        title="Held-out prompts, before and after",
        columns=["measure", "arm", "before", "after", "gain", "95 % low", "95 % high"],
        rows=rows,
        note="Paired by prompt; intervals from a bootstrap over prompts, one training seed. Scores are read on the frozen "
        "base model. VADER is independent of the reward; the monitor was fitted on other data at another block.",
    )
