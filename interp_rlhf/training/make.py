"""Creates regularizers and interventions from objects, from mappings as in a recipe, or from cards.

In: arguments of `attach`, or entries of a recipe. Out: terms and interventions. Only this module loads their files. It must not
know trainers.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..concepts.card import load_card
from ..concepts.readout import Readout
from ..concepts.subspace import Subspace
from ..messages import as_list
from ..validation.gate import require_passed
from . import terms
from .from_mapping import from_mapping
from .interventions import INTERVENTIONS, ConceptAblation, PreventativeSteering
from .terms.anchor import ConceptAnchor
from .terms.registry import TERMS
from .terms.term import is_term

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..concepts.latents import Latents
    from .interventions import TrainingIntervention
    from .terms.term import Term

# Each file registers its term, so a new file needs no further line here.
for _module in pkgutil.iter_modules(terms.__path__, f"{terms.__name__}."):
    import_module(_module.name)


class CardFiles:
    """Loads the files that options name.

    Args:
        model (`nn.Module`, *optional*): the policy. Hook names in an autoencoder's file are resolved on it.
    """

    def __init__(self, model: Any = None):
        self.model = model

    def readout(self, card: str | Path, needs_evidence: bool = False) -> Readout:
        """Readout of a card.

        Raises:
            `ValueError`: the artifact is not the card's, or evidence is needed and does not pass the gate.
        """
        loaded = load_card(card)
        if needs_evidence:
            require_passed(loaded.card, loaded.path)
        return Readout.from_card(loaded)

    def subspace(self, cards: str | Path | Sequence[str | Path]) -> Subspace:
        """Subspace spanned by the readouts of some cards."""
        return Subspace.from_readouts([self.readout(card) for card in as_list(cards)])

    def latents(self, sae: str, indices: Sequence[int] | None = None, **where: Any) -> Latents:
        """Latents of a sparse autoencoder: some by index, or all.

        Args:
            sae (`str`): a file, folder or Hub id; `where` is passed to `load_sae`.
            indices (`Sequence[int]`, *optional*): indices of the latents.
        """
        from ..sae.files import load_sae

        return load_sae(sae, model=self.model, **where).latents(indices)


def make_regularizer(asked: Any, model: Any = None) -> Term:
    """Create a term from a user's argument.

    Args:
        asked: a term; a mapping with `kind` and the kind's options, as in a recipe; or a card's path, which means a
            `ConceptAnchor` on it with the card's weight.
        model (`nn.Module`, *optional*): the policy.

    Raises:
        `ValueError`: a kind or an option is unknown, or the card is not allowed for this use.
    """
    if is_term(asked):
        return asked
    if isinstance(asked, Path) or (isinstance(asked, str) and asked not in TERMS):
        card = load_card(asked)
        return ConceptAnchor(readout=Readout.from_card(card), weight=card.card.weight)
    made: Term = from_mapping(asked, TERMS, "regularizer", CardFiles(model))
    return made


def make_intervention(asked: Any) -> TrainingIntervention:
    """Create an intervention from an object, or from a mapping with `kind`, `card` or `cards`, and options.

    Raises:
        `ValueError`: a kind or an option is unknown.
    """
    if isinstance(asked, ConceptAblation | PreventativeSteering):
        return asked
    made: TrainingIntervention = from_mapping(asked, INTERVENTIONS, "intervention", CardFiles())
    return made
