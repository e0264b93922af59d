"""From a fit to files: the artifact and the card that describes it.

In: a `Fit`, and what only a person can say: name, concept, role. Out: the card's path. An existing file is never overwritten: a
released card is not edited, the next version is added. It must not know how a probe is fitted.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..activations.canaries import make_canaries
from .artifact import calibration_of, read_directions, write_atomically
from .card import (
    ArtifactRef,
    Card,
    ModelRef,
    ReadoutSpec,
    dump_card,
    require_name,
)
from .claims import artifact_of, require_architecture, require_identity, require_width

if TYPE_CHECKING:
    from .artifact import Artifact
    from .card import (
        LoadedCard,
        Transform,
    )
    from .fitting import Fit

Role = Literal["reward", "penalty", "monitor"]
DEFAULT_POOLING = {"reward": "mean", "penalty": "ema_max", "monitor": "ema_max"}


def publish(
    fit: Fit,
    folder: str | Path,
    *,
    name: str,
    concept: str,
    role: Role = "reward",
    version: int = 1,
    pooling: str | None = None,
    weight: float = 1.0,
    transform: Transform | None = None,
    holdouts: list[str] | None = None,
) -> Path:
    """Write `<folder>/<name>.v<version>.safetensors` and `<folder>/<role>.v<version>.yaml`. Returns the path of the card.

    Args:
        fit (`Fit`): the result of `fit_probe`.
        pooling (`str`, *optional*): a fit for `last` or `attention` keeps that pooling by default. A fit for `mean` gets `mean`
            for a reward, and `ema_max` for penalties and monitors.

    Raises:
        `ValueError`: one of the files exists, or the artifact is not calibrated for this pooling.
    """
    card_path, artifact_path = require_new(folder, name=name, role=role, version=version, weight=weight)
    header = fit.artifact.header
    pooling = pooling or (DEFAULT_POOLING[role] if header.pooling == "mean" else header.pooling)
    if not header.calibration:
        raise ValueError(
            f"The fit for `{header.pooling}` at `{header.hook_point}` does not separate the labels on prompts that it has not "
            f"seen, under any pooling ({header.examples} examples) – expected scores out of fold above chance. Fit on more or "
            "other examples, at other hook points (`--sweep`), or for another pooling."
        )
    calibration_of(header, pooling, name)
    card = Card(
        schema=1,
        name=name,
        version=version,
        role=role,
        concept=concept,
        model=ModelRef(id=header.model_id, identity=header.identity),
        readout=ReadoutSpec.model_validate(
            {
                "kind": header.kind,
                "hook_point": header.hook_point,
                "artifact": ArtifactRef(path=artifact_path.name, sha256=hashlib.sha256(b"").hexdigest()),
                "pooling": pooling,
                "include_end_of_turn": header.include_end_of_turn,
            }
        ),
        weight=weight,
        transform=transform,
        holdouts=holdouts or [],
    )
    sha256 = fit.artifact.save(artifact_path)
    reference = ArtifactRef(path=artifact_path.name, sha256=sha256)
    card = card.model_copy(update={"readout": card.readout.model_copy(update={"artifact": reference})})
    write_atomically(card_path, dump_card(card).encode())
    return card_path


def require_new(
    folder: str | Path, *, name: str, role: Role = "reward", version: int = 1, weight: float = 1.0
) -> tuple[Path, Path]:
    """Paths of a new card and its artifact. Call it before a long fit.

    Raises:
        `ValueError`: a name, version or weight that no card can have, or one of the files exists.
    """
    require_name(name)
    if version < 1:
        raise ValueError(f"`version` is {version} – expected at least 1.")
    if not 0 < weight < math.inf:
        raise ValueError(f"`weight` is {weight} – expected a finite number above 0.")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`{folder}` is a file – expected a folder for the card and the artifact.")
    card_path, artifact_path = folder / f"{role}.v{version}.yaml", folder / f"{name}.v{version}.safetensors"
    for path in (card_path, artifact_path):
        if path.exists():
            raise ValueError(
                f"`{path}` exists – expected a new version: a released card is never edited. Pass version {version + 1} "
                "(`--version`) or another folder."
            )
    return card_path, artifact_path


def with_canaries(card: LoadedCard, model: Any, tokenizer: Any) -> Path:
    """Write the next version of a card and of its artifact, with canaries that are read on its model.

    The new card has no evidence: the old evidence names another artifact. Returns the path of the new card.

    Raises:
        `ValueError`: the artifact has canaries, the model is another one, or a file of the next version exists.
    """
    old = artifact_of(card)
    if old.header.canaries:
        raise ValueError(
            f"The artifact of `{card.path}` has canaries already – expected none. There is nothing to do."
        )
    _require_model(model, card.card.name, old)
    canaries = make_canaries(
        model, tokenizer, old.header.hook_point, read_directions(old.weight, old.latents, old.query)
    )
    version = card.card.version + 1
    name = re.sub(r"\.v\d+(?=\.)", "", card.artifact_path.name).removesuffix(".safetensors")
    card_path = card.path.with_name(f"{card.card.role}.v{version}.yaml")
    artifact_path = card.path.with_name(f"{name}.v{version}.safetensors")
    for path in (card_path, artifact_path):
        if path.exists():
            raise ValueError(
                f"`{path}` exists – expected a new version: a released card is never edited. Remove or rename it."
            )
    sha256 = replace(old, header=replace(old.header, canaries=canaries.entry())).save(artifact_path)
    reference = ArtifactRef(path=artifact_path.name, sha256=sha256)
    made = card.card.model_copy(
        update={
            "version": version, "evidence": None, "holdouts": [_next(card.path.parent, name) for name in card.card.holdouts],
            "readout": card.card.readout.model_copy(update={"artifact": reference}),
        }
    )  # fmt: skip
    write_atomically(card_path, dump_card(made).encode())
    return card_path


def _next(folder: Path, name: str) -> str:
    """The next version of a card in the same folder, if there is one."""
    later = re.sub(r"\.v(\d+)\.yaml$", lambda version: f".v{int(version[1]) + 1}.yaml", name)
    return later if (folder / later).exists() else name


def _require_model(model: Any, name: str, artifact: Artifact) -> None:
    """Raises `ValueError` for another model than the one that an artifact without canaries was made on."""
    header = artifact.header
    require_width(
        model, f"Readout `{name}` has", header.hook_point, header.width,
        f"It was made on `{header.model_id}`: fit one on this model.",
    )  # fmt: skip
    require_architecture(model, name, header)
    require_identity(model, name, header)
