"""The registry of terms: the kinds of regularizer that a recipe can name.

In: a kind and a class. Out: the class by its kind. It must not know any term: each file of a term registers its own class.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, TypeVar

from ...registry import Registry
from .term import LossTerm, Term

if TYPE_CHECKING:
    from collections.abc import Callable

SomeTerm = TypeVar("SomeTerm", bound=Term)

TERMS: Registry[type[Term]] = Registry("a kind of regularizer")


def register_term(kind: str) -> Callable[[type[SomeTerm]], type[SomeTerm]]:
    """Class decorator that makes your term available to `attach` and to recipes, under `kind`.

    The class subclasses `LossTerm` or `MarginShift` and is a dataclass: its fields are the options of the kind. A recipe names a
    `card`, and the term gets its readout. `OneConcept` supplies the properties of a term on one readout.

    Args:
        kind (`str`): a lower-case identifier, as a recipe writes it after `kind:`.

    Returns:
        `Callable`: the decorator, which returns the class.

    Raises:
        `ValueError`: another term has this kind; the class is not a complete term, or not a dataclass.

    Example:
        >>> from dataclasses import dataclass
        >>> from interp_rlhf import attach, register_term
        >>> from interp_rlhf.training.terms.term import LossTerm, OneConcept, TermValues
        >>> @register_term("score_below_zero")
        ... @dataclass(frozen=True, eq=False, kw_only=True)
        ... class ScoreBelowZero(OneConcept, LossTerm):
        ...     def compute(self, batch, weight):
        ...         tokens = batch.tokens(self.include_end_of_turn)
        ...         scores = tokens.means(self.readout(batch.policy(self.policy_point, tokens))[:, 0])
        ...         return TermValues(weight * scores.relu(), {"score": scores})
        ...     def pushes(self):
        ...         return {self.readout: -1}
        >>> term = {"kind": "score_below_zero", "card": "warmth.yaml", "weight": 0.1}
        >>> attach(dpo_trainer, regularizers=[term]).terms.terms[0].name
        'score_below_zero_warmth'
    """

    def enter(term: type[SomeTerm]) -> type[SomeTerm]:
        if not isinstance(term, type) or not issubclass(term, Term):
            raise ValueError(
                f"`{kind}` is registered for {term!r} – expected a subclass of `LossTerm` or `MarginShift` "
                "(`interp_rlhf.training.terms.term`)."
            )
        if inspect.isabstract(term):
            missing = ", ".join(f"`{name}`" for name in sorted(term.__abstractmethods__))
            raise ValueError(f"`{term.__name__}` does not define {missing} – expected it. Define it in the class.")
        if "__dataclass_params__" not in vars(term):
            raise ValueError(
                f"`{term.__name__}` is not a dataclass – expected one, since its fields are its options. Write "
                "`@dataclass(frozen=True, eq=False, kw_only=True)` below `@register_term`."
            )
        if term.shift_reference is not LossTerm.shift_reference and not term.per_pair:
            raise ValueError(
                f"`{term.__name__}` shifts the reference and its `per_pair` is False – expected True: only terms on pairs can "
                "shift it. Set `per_pair: ClassVar[bool] = True`, or subclass `MarginShift`."
            )
        TERMS.register(kind)(term)
        term.kind = kind
        return term

    return enter
