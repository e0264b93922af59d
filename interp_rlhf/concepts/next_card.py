"""The next version of a card, or the first card of an artifact, without a fit.

In: a card or an artifact, and what shall be different. Out: a new card file. A file that exists is never edited: a released card
stays as it is. Evidence is kept as long as the card reads the same. It must not know models.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifact import calibration_of, load_artifact
from .card import ArtifactRef, Card, ModelRef, ReadoutSpec, dump_card, load_card, require_name
from .card_differences import card_differences
from .card_files import files_of, place, require_placeable, require_plain
from .claims import artifact_of
from .pooling import require_pooling
from .publish import DEFAULT_POOLING

if TYPE_CHECKING:
    from .card import LoadedCard, Transform
    from .publish import Role


@dataclass(frozen=True)
class CardChanges:
    """Values of a new card that differ from the old one's. None: the same."""

    name: str | None = None
    concept: str | None = None
    role: Role | None = None
    version: int | None = None
    weight: float | None = None
    pooling: str | None = None
    transform: Transform | None = None
    holdouts: list[str] | None = None


def next_card(source: str | Path, out: str | Path | None, changes: CardChanges) -> Path:
    """Write `<out>/<role>.v<version>.yaml`. Returns its path.

    Args:
        source (`str` or `Path`): a card, or an artifact (`.safetensors`).
        out (`str` or `Path`, *optional*): folder of the new card. Another folder than the source's gets copies of the artifact
            and of the holdout cards.

    Raises:
        `FileNotFoundError`: no such card or artifact.
        `ValueError`: a value that no card can have, a pooling that the artifact is not calibrated for, a file that exists.
    """
    _require_values(changes)
    old: LoadedCard | None
    if Path(source).suffix == ".safetensors":
        old, origin = None, Path(source)
        card = _card_of_artifact(origin, changes)
    else:
        old = load_card(source)
        origin = old.path
        if changes == CardChanges(version=changes.version):
            raise ValueError(f"`{source}` would be copied as it is – expected a change, such as `--weight 0.5`.")
        card = _with_changes(old.card, changes)
        if out is None and origin != Path(source):
            raise ValueError(f"`{source}` comes with interp_rlhf – expected `--out`, the folder of the new card.")
        calibration_of(artifact_of(old).header, card.readout.pooling, card.name)
    folder = origin.parent if out is None else Path(out)
    path = folder / f"{card.role}.v{card.version}.yaml"
    if path.exists():
        raise ValueError(
            f"`{path}` exists – expected a new version: a released card is never edited. Pass another `--version` than "
            f"{card.version}, or another `--out`."
        )
    files = _files_with(card, origin)
    text = f"# {_said(card, origin, old)}\n{dump_card(card)}"
    files[path.name] = text.encode()
    require_placeable(files, folder)
    place(files, folder)
    return path


def _require_values(changes: CardChanges) -> None:
    if changes.pooling is not None:
        try:
            require_pooling(changes.pooling)
        except ValueError as error:
            raise ValueError(f"`--pooling {changes.pooling}` – {error}.") from None
    if changes.name is not None:
        require_name(changes.name)
    if changes.version is not None and changes.version < 1:
        raise ValueError(f"`--version {changes.version}` – expected at least 1.")
    if changes.weight is not None and not 0 < changes.weight < math.inf:
        raise ValueError(f"`--weight {changes.weight}` – expected a finite number above 0.")


def _with_changes(old: Card, changes: CardChanges) -> Card:
    given: dict[str, Any] = {
        key: value for key in ("name", "concept", "role", "weight", "transform", "holdouts")
        if (value := getattr(changes, key)) is not None
    }  # fmt: skip
    if changes.pooling is not None:
        spec = {**old.readout.model_dump(), "pooling": changes.pooling}
        given["readout"] = ReadoutSpec.model_validate(spec)
    version = old.version + 1 if changes.version is None else changes.version
    new = old.model_copy(update={**given, "version": version})
    if new.evidence is not None and new.evidence.readout != new.readout_digest:
        new = new.model_copy(update={"evidence": None})
    if new.causal is not None and new.causal.readout != new.readout_digest:
        new = new.model_copy(update={"causal": None})
    return new


def _card_of_artifact(path: Path, changes: CardChanges) -> Card:
    header = load_artifact(path).header
    role = changes.role or "reward"
    stem = re.sub(r"\.v\d+$", "", path.stem)
    name = changes.name or stem
    require_name(name)
    pooling = changes.pooling or (DEFAULT_POOLING[role] if header.pooling == "mean" else header.pooling)
    calibration_of(header, pooling, name)
    artifact = ArtifactRef(path=path.name, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    return Card(
        schema=1, name=name, version=changes.version or 1, role=role, concept=changes.concept or name,
        model=ModelRef(id=header.model_id, identity=header.identity),
        readout=ReadoutSpec.model_validate(
            {
                "kind": header.kind, "hook_point": header.hook_point, "artifact": artifact, "pooling": pooling,
                "include_end_of_turn": header.include_end_of_turn,
            }
        ),
        weight=changes.weight or 1.0, transform=changes.transform, holdouts=changes.holdouts or [],
    )  # fmt: skip


def _files_with(card: Card, origin: Path) -> dict[str, bytes]:
    """The artifact, and the holdout cards with theirs: a new card in another folder takes them along."""
    require_plain(card.readout.artifact.path, origin)
    files = {card.readout.artifact.path: (origin.parent / card.readout.artifact.path).read_bytes()}
    for holdout in card.holdouts:
        require_plain(holdout, "--holdout")
        files |= files_of(load_card(origin.parent / holdout))
    return files


def _said(card: Card, origin: Path, old: LoadedCard | None) -> str:
    """The first line of the file: what it was made from, and what is different."""
    if old is None:
        return f"The first card of {origin.name}. It has no evidence: run `interp-rlhf probe check` on it."
    changed = ", ".join(
        difference.key for difference in card_differences(old.card, card) if not difference.key.startswith("evidence")
    )
    kept = "The evidence is kept: it reads the same." if card.evidence is not None else "It has no evidence yet."
    return f"Made from {origin.name}; different: {changed}. {kept}"
