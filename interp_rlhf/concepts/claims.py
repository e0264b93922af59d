"""Claims: a card says which artifact it describes, and an artifact says which model it was made on. Are they right?

In: a card, an artifact's header, a model. Out: nothing, or an error that says what differs. It must not know how scores are
computed.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..activations.hook_points import hidden_size, resolve
from ..activations.identity import identity, structure
from .artifact import load_artifact

if TYPE_CHECKING:
    from ..activations.canaries import Agreement
    from .artifact import Artifact, Header
    from .card import LoadedCard

logger = logging.getLogger(__name__)


def artifact_of(loaded: LoadedCard) -> Artifact:
    """The artifact of a card.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: the card describes another artifact.
    """
    card = loaded.card
    artifact = load_artifact(loaded.artifact_path, card.readout.artifact.sha256)
    header = artifact.header
    claims = {
        "readout.kind": (card.readout.kind, header.kind),
        "readout.hook_point": (card.readout.hook_point, header.hook_point),
        "readout.include_end_of_turn": (card.readout.include_end_of_turn, header.include_end_of_turn),
        "model.identity": (card.model.identity, header.identity),
    }
    wrong = [
        f"`{key}` is `{said}` – the artifact says `{true}`" for key, (said, true) in claims.items() if said != true
    ]
    if wrong:
        raise ValueError(
            f"`{loaded.path}` does not describe its artifact: {'; '.join(wrong)}. Correct the card or the path."
        )
    return artifact


def require_width(model: Any, what: str, hook_point: str, width: int, advice: str) -> None:
    """Refuse a model without the hook point or of another width.

    Args:
        what (`str`): what reads the model, as the subject of the message, such as "The subspace has".
        advice (`str`): the end of the message.

    Raises:
        `ValueError`: no such hook point, or another width.
    """
    resolve(model, hook_point)
    if (actual := hidden_size(model)) != width:
        raise ValueError(f"{what} width {width} – the model's is {actual}. {advice}")


def require_architecture(model: Any, name: str, header: Header) -> None:
    """Refuse a model of another architecture than the one that an artifact was made on.

    Raises:
        `ValueError`: the architectures differ.
    """
    actual, expected = structure(model), header.structure
    if actual == expected:
        return
    pairs = {key: (actual.get(key), expected.get(key)) for key in actual.keys() | expected.keys()}
    shown = "; ".join(f"`{key}` {now} instead of {then}" for key, (now, then) in sorted(pairs.items()) if now != then)
    raise ValueError(
        f"Readout `{name}` was made on `{header.model_id}` – this model has another architecture: {shown}. Fit and check a probe "
        "on this model."
    )


def require_identity(model: Any, name: str, header: Header) -> None:
    """Refuse a model whose norm weights are not those of the model that an artifact was made on.

    Raises:
        `ValueError`: they differ.
    """
    actual = identity(model, header.hook_point)
    if actual != header.identity:
        raise ValueError(
            f"Readout `{name}` was made on `{header.model_id}` with identity {header.identity} – this model has {actual} at "
            f"`{header.hook_point}`. A probe is a claim about one model: fit and check one on this model."
        )


def require_related(agreement: Agreement, least: float, stranger: str, relative: str) -> None:
    """Accept the model that canaries were made on, warn of a model that was made from it, refuse any other.

    Args:
        agreement (`Agreement`): how the model agrees with the canaries.
        least (`float`): correlation with the canaries below which the model is a stranger.
        stranger (`str`): error for a stranger.
        relative (`str`): warning for a relative.

    Raises:
        `ValueError`: the model is a stranger.
    """
    if agreement.agrees:
        return
    if agreement.correlation < least:
        raise ValueError(stranger)
    logger.warning("%s", relative)
