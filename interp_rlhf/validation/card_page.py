"""The page of a shared card: Markdown with the metadata that the Hub reads.

In: a card, and where it is shared. Out: the text of `README.md`. It says what the evidence says, and what it does not. It must
not know how the files get there.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

from ..concepts.causal_table import causal_table
from ..concepts.named_evidence import controls_of, estimates_of, findings_of
from .gate import gate

if TYPE_CHECKING:
    from ..concepts.card import Card, Findings, LoadedCard

PAGE = "README.md"
METADATA_KEY = "interp_rlhf"


def card_page(loaded: LoadedCard, repo_id: str) -> str:
    """Text of `README.md`."""
    card = loaded.card
    header = yaml.safe_dump(_page_metadata(loaded), sort_keys=False, allow_unicode=True)
    blocks = [
        f"---\n{header}---",
        f"# {card.name}, version {card.version}",
        _plain(card.concept),
        f"A {card.readout.kind.replace('_', ' ')} that reads activations of {_code(card.model.id)} at "
        f"{_code(card.readout.hook_point)}, with `{card.readout.pooling}` pooling. Role: {card.role}, weight {card.weight:g}.",
        "## How to use it",
        _usage(loaded, repo_id),
        "## Evidence",
        *_evidence(card),
        "## Limits",
        "\n".join(f"- {limit}" for limit in limits_of(card)),
        "## Hashes",
        "`SHA256SUMS` lists the SHA-256 of each file; `interp-rlhf card pull` checks them. They show that the files belong "
        "together, not who made them: pin the commit.",
        _markdown_table(
            ["what", "digest"],
            [
                ["card", f"`sha256:{loaded.sha256}`"], ["artifact", f"`sha256:{card.readout.artifact.sha256}`"],
                ["model", f"`{card.model.identity}`"], ["readout", f"`{card.readout_digest}`"],
            ],
        ),
    ]  # fmt: skip
    return "\n\n".join(blocks) + "\n"


def named_card(page: str) -> str | None:
    """The card that a page is about, by its file name. None if the page names none."""
    found = re.match(r"---\n(.*?)\n---\n", page, re.S)
    try:
        metadata: Any = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return None
    about = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    name = about.get("card") if isinstance(about, dict) else None
    return name if isinstance(name, str) else None


def limits_of(card: Card) -> list[str]:
    """What nobody may conclude from a card, as sentences."""
    limits = [
        "A probe is a claim, and its evidence is about the data that it was checked on. Other topics, languages, lengths and "
        "styles were not tested.",
        f"It was made on {_code(card.model.id)}. On other models, also tuned copies, it was not tested.",
        "A policy that is trained on a probe learns what the probe reads, which need not be the concept. A holdout monitor shows "
        "when the two part.",
    ]
    evidence = card.evidence
    if evidence is None:
        return [*limits, "It has no evidence: it may be a monitor only."]
    if evidence.completions is None:
        limits.append("It was not checked on the model's own completions.")
    adds = evidence.held_out.adds
    if adds is None or adds.auroc.low is None or adds.auroc.low <= 0:
        limits.append(
            "The evidence does not show that the probe adds to the words, the prompt and the model's likelihood."
        )
    if card.causal is None:
        limits.append("Whether the model uses this direction was not tested: the card has no causal check.")
    elif card.causal.verdict != "causal":
        limits.append(f"Its causal check says *{card.causal.verdict}*: {'; '.join(card.causal.reasons)}.")
    return limits


def _page_metadata(loaded: LoadedCard) -> dict[str, Any]:
    card = loaded.card
    metadata: dict[str, Any] = {
        "library_name": "interp-rlhf",
        "tags": ["interp-rlhf", "interpretability", "rlhf", card.readout.kind.replace("_", "-"), card.role],
    }
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", card.model.id):  # the Hub refuses what is no id
        metadata["base_model"] = card.model.id
    about = {"card": loaded.path.name, "name": card.name, "version": card.version, "role": card.role}
    return metadata | {METADATA_KEY: about}


def _usage(loaded: LoadedCard, repo_id: str) -> str:
    path = f"cards/{loaded.path.name}"
    names, used = "attach, pull_card", f'attach(trainer, monitors=["{path}"])  # a built trainer of TRL'
    if loaded.card.role != "monitor":
        names, used = (
            "ConceptReward, pull_card",
            f'reward = ConceptReward.from_card("{path}")  # for `reward_funcs` of a trainer',
        )
    return (
        "`pull` resolves `main` to a commit, checks all files and writes the commit into "
        f"`cards/{loaded.path.stem}.lock.json`. Pass that commit from then on.\n\n"
        f"```bash\npip install interp-rlhf\ninterp-rlhf card pull {repo_id} --revision main --out cards\n"
        f"interp-rlhf card show {path}\n```\n\n"
        f"```python\nfrom interp_rlhf import {names}\n\n"
        f'pull_card("{repo_id}", "cards", revision="main")\n{used}\n```'
    )


def _evidence(card: Card) -> list[str]:
    reasons = gate(card)
    verdict = "may be a reward" if not reasons else "may be a monitor only: " + "; ".join(reasons)
    blocks = [f"The gate: {verdict}."]
    if card.evidence is None:
        return blocks
    for title, findings in findings_of(card.evidence).items():
        blocks += [f"### On {title}" if findings is not card.evidence.held_out else "### On held-out examples"]
        blocks += _findings_blocks(findings)
    versions = ", ".join(f"{name} {version}" for name, version in card.evidence.versions.items())
    if card.causal is not None:
        table = causal_table(card.name, card.causal)
        rows = [[_plain("" if cell is None else str(cell)) for cell in row] for row in table["rows"]]
        blocks += [f"### {table['title']}", table["note"], _markdown_table(table["columns"], rows)]
    return [*blocks, f"Written by {_code(card.evidence.command)}, seed {card.evidence.seed}, with {_plain(versions)}."]


def _findings_blocks(findings: Findings) -> list[str]:
    rows = [
        [_plain(name), f"{estimate.auroc:.3f}", _interval(estimate.low, estimate.high)]
        for name, estimate in estimates_of(findings).items()
    ]
    rows += [
        [f"{name} (control)", f"{control.mean:.3f}", f"95th percentile {control.p95:.3f} of {control.repeats}"]
        for name, control in controls_of(findings).items()
    ]
    blocks = [
        f"{findings.examples} examples, {findings.positives} positive, {findings.near_duplicates} nearly rows of the fit.",
        _markdown_table(["reads", "AUROC", "95 % interval"], rows),
    ]
    adds, calibration = findings.adds, findings.calibration
    if adds is not None:
        blocks.append(
            f"The probe adds AUROC {adds.auroc.value:+.3f} {_interval(adds.auroc.low, adds.auroc.high, '+')} to "
            f"{adds.auroc_without:.3f} of all baselines together, and saves {adds.log_loss.value:+.3f} "
            f"{_interval(adds.log_loss.low, adds.log_loss.high, '+')} nats of {adds.log_loss_without:.3f}."
        )
    if calibration is not None:
        slope = "the labels are separated" if calibration.slope is None else f"slope {calibration.slope:.2f}"
        blocks.append(
            f"Calibration: {slope}, Brier score {calibration.brier:.3f}, log-loss {calibration.log_loss:.3f}."
        )
    return blocks


def _interval(low: float | None, high: float | None, sign: str = "") -> str:
    return "(too few prompts)" if low is None or high is None else f"[{low:{sign}.3f}, {high:{sign}.3f}]"


def _markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str) -> str:
    return f"`{' '.join(text.replace('`', ' ').split())}`"


def _plain(text: str) -> str:
    """Text of a card that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", " ".join(text.split()))
