"""Reward cards: versioned YAML with the readout, its hook point, its pooling and the evidence.

In: a path. Out: a checked `Card`, or one error with all problems. It must not know models, and imports neither torch nor TRL.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from .causal_findings import CausalFindings
from .pooling import require_pooling
from .strict import Difference, Digest, Sha256, Strict


class ModelRef(Strict):
    id: str
    identity: Digest


class ArtifactRef(Strict):
    path: str
    sha256: Sha256


class ReadoutSpec(Strict):
    kind: Literal["probe", "direction", "sae_latents"]
    hook_point: str
    artifact: ArtifactRef
    pooling: Annotated[str, AfterValidator(require_pooling)]
    include_end_of_turn: bool = False


class Transform(Strict):
    """(score − mean) / std, then clipped."""

    mean: float = 0.0
    std: Annotated[float, Field(gt=0)] = 1.0
    clip: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Transform:
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise ValueError(f"`clip` is {self.clip} – expected [lower, upper]")
        return self

    def __call__(self, scores: Any) -> Any:
        scores = (scores - self.mean) / self.std
        return scores if self.clip is None else scores.clip(*self.clip)


class Estimate(Strict):
    """An AUROC with the 95 % interval of a bootstrap over prompts; no bounds where there are too few prompts to resample."""

    auroc: float
    low: float | None = None
    high: float | None = None


class Adds(Strict):
    """What the probe adds to all baselines together, cross-validated by prompt: with the probe minus without it.

    `log_loss` is the log-loss that the probe saves, in nats per row: above 0 it helps.
    """

    auroc: Difference
    log_loss: Difference
    auroc_without: float
    auroc_with: float
    log_loss_without: float
    log_loss_with: float


class Calibration(Strict):
    """How well a score is a log-odds. A calibrated score has slope 1 and intercept 0, with both labels weighing alike. A slope
    below 1 means too sure. Slope and intercept are None if the scores separate the labels perfectly. Log-loss is in nats."""

    slope: float | None = None
    intercept: float | None = None
    brier: float
    log_loss: float


class PromptFindings(Strict):
    """What the prompt alone says, and whether the score depends on the answer or on the prompt.

    Attributes:
        tfidf, tfidf_with_completion, probe: AUROC of the prompt's words, of prompt and completion together, and of a probe at the
            prompt's last token.
        within: AUROC of the card's probe among answers to one prompt, over prompts that have both labels.
        answer_share: share of the score's variance between answers to one prompt. Near 0 the score is a function of the prompt.
        other_answers: AUROC that the score keeps if each prompt has another prompt's answer.
    """

    tfidf: Estimate
    tfidf_with_completion: Estimate
    probe: Estimate
    within: Estimate | None = None
    prompts_with_both_labels: int = 0
    answer_share: Difference | None = None
    other_answers: Estimate | None = None


class Control(Strict):
    """AUROCs of a control that was drawn `repeats` times: their mean and 95th percentile."""

    mean: float
    p95: float
    repeats: int


class SaeFindings(Strict):
    """How well a sparse autoencoder reconstructs the activations of some text, without first tokens and norm outliers."""

    explained_variance: float
    l0: float
    dead_fraction: float
    latents: int
    tokens: int


class GroupFindings(Strict):
    """Results on the examples of one group (column `group`).

    Attributes:
        prompts: number of prompts.
        probe: AUROC within the group; None if it lacks a label.
        true_positive_rate, false_positive_rate: share of the positive and of the negative examples with log-odds above 0; None
            without such examples.
    """

    name: str
    examples: int
    positives: int
    prompts: int
    probe: Estimate | None = None
    true_positive_rate: float | None = None
    false_positive_rate: float | None = None
    calibration: Calibration | None = None


class Findings(Strict):
    """Results of a probe and of its controls on one set of examples. Evidence from before 0.3 lacks fields with a default."""

    data: Digest
    examples: int
    positives: int
    near_duplicates: int = 0
    adds: Adds | None = None
    probe: Estimate
    calibration: Calibration | None = None
    permutation: Control
    random_direction: Control
    tfidf: Estimate
    length: Estimate
    punctuation: Estimate
    embedding: Estimate
    likelihood: dict[str, Estimate] = Field(default_factory=dict)
    prompt: PromptFindings | None = None
    measures: dict[str, Estimate] = Field(default_factory=dict)
    random_dictionary: Control | None = None
    sae: SaeFindings | None = None
    by_group: list[GroupFindings] | None = None


class Evidence(Strict):
    """Written by `interp-rlhf probe check`, never by hand."""

    readout: Digest
    held_out: Findings
    completions: Findings | None = None
    seed: int
    command: str
    versions: dict[str, str]


NAME = r"^[a-z0-9][a-z0-9_-]*$"


def require_name(name: str) -> None:
    """Raises `ValueError` for a name that a card cannot have."""
    if not re.fullmatch(NAME, name):
        near = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_") or "warmth"
        raise ValueError(f"`name` is `{name}` – expected lower-case letters, digits, `-` and `_`: `{near}`, say.")


class Card(Strict):
    """A reward card, schema 1."""

    schema_version: Literal[1] = Field(alias="schema")
    name: Annotated[str, Field(pattern=NAME)]
    version: Annotated[int, Field(ge=1)]
    role: Literal["reward", "penalty", "monitor"]
    concept: str
    model: ModelRef
    readout: ReadoutSpec
    reader: Literal["reference", "policy", "both"] = "reference"
    transform: Transform | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    holdouts: list[str] = Field(default_factory=list)
    evidence: Evidence | None = None
    causal: CausalFindings | None = None

    @property
    def readout_digest(self) -> str:
        """Digest that evidence belongs to: of artifact, hook point, pooling, counted tokens and model."""
        spec = self.readout.model_dump_json(exclude={"artifact": {"path"}})
        return f"sha256:{hashlib.sha256((spec + self.model.identity).encode()).hexdigest()}"


@dataclass(frozen=True)
class LoadedCard:
    """A card, its path and the SHA-256 of its file. The digest goes into run log and report."""

    card: Card
    path: Path
    sha256: str

    @property
    def artifact_path(self) -> Path:
        return self.path.parent / self.card.readout.artifact.path


def load_card(path: str | Path) -> LoadedCard:
    """Card of a YAML file, checked strictly.

    Args:
        path (`str` or `Path`): a file, or the path of a shipped card (`reward/warmth/reward.v3.yaml`). That path is the same in
            a checkout, an editable install and a wheel.

    Returns:
        `LoadedCard`: the card, its path and its digest.

    Raises:
        `FileNotFoundError`: no such file.
        `ValueError`: every unknown, missing or doubled key and every wrong value, in one message.

    Example:
        >>> from interp_rlhf import load_card
        >>> loaded = load_card("warmth.yaml")
        >>> loaded.card.role, loaded.card.readout.pooling, loaded.card.readout.hook_point
        ('reward', 'mean', 'model.layers.1')
    """
    file = locate(path)
    data = file.read_bytes()
    try:
        loader = _Loader(data)
        content = loader.get_single_data()
    except (yaml.YAMLError, ValueError) as error:  # `ValueError`: a date or number that YAML cannot parse
        said = " ".join(str(error).split())
        raise ValueError(f"`{file}` is not YAML: {said} – expected a reward card in UTF-8. Correct it.") from None
    problems = loader.doubled
    if not isinstance(content, dict):
        problems.append(f"the file holds {type(content).__name__} – expected a mapping with the keys of a card")
        content = {}
    try:
        card = Card.model_validate(content)
    except ValidationError as error:
        problems += [_problem(item) for item in error.errors()] if content else []
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in sorted(problems))
        raise ValueError(f"`{file}` is not a valid reward card, {len(problems)} problem(s):\n{listed}")
    return LoadedCard(card, file, hashlib.sha256(data).hexdigest())


def locate(path: str | Path) -> Path:
    """File of a path: the path itself, or a file that this package ships.

    Raises:
        `FileNotFoundError`: there is neither.
    """
    path = Path(path)
    package = Path(__file__).resolve().parent.parent
    for place in (path, package / "_shipped" / path, package.parent / path):
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"`{path}` does not exist, neither from `{Path.cwd()}` nor among the files that interp_rlhf ships – expected a "
        "reward card. Write one with `interp-rlhf probe fit`."
    )


def dump_card(card: Card) -> str:
    """Card as YAML, keys in the order of the schema."""
    content = card.model_dump(by_alias=True, exclude_none=True, exclude={"holdouts"} if not card.holdouts else None)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)


def with_evidence(text: str, evidence: Evidence) -> str:
    """Text of a card with its evidence replaced. Everything else stays to the letter, comments too.

    A card in another style than that of `dump_card` (JSON, indented, with an end mark) is dumped again as a whole.
    """
    return _with_block(text, "evidence", evidence)


def with_causal(text: str, causal: CausalFindings) -> str:
    """Text of a card with its causal findings replaced. Everything else stays, see `with_evidence`."""
    return _with_block(text, "causal", causal)


def _with_block(text: str, key: str, value: Strict) -> str:
    expected = Card.model_validate(_Loader(text).get_single_data()).model_copy(update={key: value})
    new = _spliced(text, key, value)
    try:
        loader = _Loader(new)
        same = Card.model_validate(loader.get_single_data()) == expected and not loader.doubled
    except (yaml.YAMLError, ValidationError):
        same = False
    return new if same else dump_card(expected)


def _spliced(text: str, key: str, value: Strict) -> str:
    kept: list[str] = []
    inside = False
    for line in text.splitlines():
        if line and not line[0].isspace() and not line.startswith("#"):
            inside = line.startswith(f"{key}:")
        if not inside:
            kept.append(line)
    content = {key: value.model_dump(exclude_none=True)}
    return "\n".join(kept).rstrip() + "\n" + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)


class _Loader(yaml.SafeLoader):
    """Safe YAML that remembers doubled keys instead of keeping the last one silently."""

    def __init__(self, stream: Any):
        super().__init__(stream)
        self.doubled: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                self.doubled.append(f"`{key}`: given twice, the second time in line {key_node.start_mark.line + 1}")
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-3 as a word, since it has no point. JSON and people write numbers like that.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _problem(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "card"
    if error["type"] == "missing":
        return f"`{where}`: missing"
    if error["type"] == "extra_forbidden":
        return f"`{where}`: unknown key"
    given = error.get("input")
    shown = "" if isinstance(given, dict | list) else f"{given!r} – "
    message = error["msg"].removeprefix("Value error, ")
    return f"`{where}`: {shown}{message[0].lower()}{message[1:]}"
