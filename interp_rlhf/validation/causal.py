"""The causal check: does a concept's direction do something in the text, beyond what any direction does?

In: a readout, its model, prompts with an independent measure (or pairs of completions). Out: `CausalFindings`. Nothing here is
measured by the readout that is steered. It must not know cards' files or the gate.

Source: interchange after Geiger et al. 2021 (arXiv 2106.02997). Deviation: a run's mean coordinate is swapped and its variation
over tokens stays, so that runs need not have one length.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from ..activations.sharding import is_sharded
from .behaviour import AnswerBehaviour, MarginBehaviour
from .causal_runs import CausalRuns
from .causal_settings import CausalSettings
from .directions import (
    ControlDirection,
    Spread,
    foreign_directions,
    other_recipe,
    random_directions,
    unit_direction,
)
from .measures import MEASURES
from .statistics import MIN_PROMPTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..concepts.causal_findings import CausalFindings
    from ..concepts.examples import Examples
    from ..concepts.readout import Readout
    from .jobs import Behaviour


logger = logging.getLogger(__name__)


def causal_check(
    readout: Readout, model: Any, tokenizer: Any, prompts: Sequence[Any] | None = None,
    measure: str | Callable[[str], float] | None = None, *, pairs: Sequence[Mapping[str, Any]] | None = None,
    examples: Examples | None = None, foreign: Mapping[str, torch.Tensor] | None = None,
    settings: CausalSettings | None = None, trained: bool = False, command: str = "", chat: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> CausalFindings:  # fmt: skip
    """Does steering along a readout's direction change the text, and does silencing it? Next to other directions.

    At the hook point, on every token but a row's first: *steer* adds α standard deviations along the direction, *silence*
    projects the coordinate out or sets it to its mean, and *interchange* swaps the mean coordinates of two prompts. An
    independent measure of the greedy answers says what changed.

    Args:
        readout (`Readout`): the concept. Its `direction` is steered.
        model (`nn.Module`), tokenizer: the model that the readout was made on, in one piece.
        prompts (`Sequence`), measure (`Callable` or `str`): at least 10 prompts, plain or conversational, and an independent
            measure of an answer's text, or its registered name. Higher = more of the concept.
        pairs (`Sequence[dict]`, *optional*): in place of both, for a concept without such a measure: rows with `prompt`,
            `followed` and `violated`. The value is log p(followed) − log p(violated), in nats.
        examples (`Examples`, *optional*): labelled examples, to fit the other recipe on.
        foreign (`dict[str, torch.Tensor]`, *optional*): directions (D,) of foreign concepts; built-in ones fill up to three.
        settings (`CausalSettings`, *optional*): doses, number of random directions, length of answers, seed.
        trained (`bool`, defaults to `False`): the model's own weights were trained after the readout was made.
        command (`str`), progress (`bool`): the command that the findings name; show progress bars.
        chat (`dict`, *optional*): `chat_template` and `chat_template_kwargs`, by which messages become text.

    Returns:
        `CausalFindings`: verdict and all numbers.

    Raises:
        `ValueError`: too few prompts, neither or both of `measure` and `pairs`, a measure that gives no number, a direction of
            another width, or no prompt on which the concept occurs.

    Example:
        >>> from interp_rlhf import causal_check
        >>> prompts = [f"please {word}" for word in "help thanks sorry day night rain sun house tree walk".split()]
        >>> findings = causal_check(readout, model, tokenizer, prompts, lambda text: float(text.count("a")))
        >>> findings.verdict in ("causal", "steers only", "silences only", "read-only", "insufficient evidence")
        True
    """
    rows = _asked(prompts, measure, pairs)
    settings, chat = settings or CausalSettings(), dict(chat or {})
    if is_sharded(model):
        raise ValueError(
            "The model's parameters are in pieces – expected a model in one piece. Load the checkpoint alone."
        )
    readout.check_model(model, exact=not trained, trained=trained)
    direction, point = unit_direction(readout), readout.hook_point
    how: dict[str, Any] = {"batch_rows": settings.batch_rows, "chat": chat, "progress": progress}
    behaviour = _behaviour_of(model, tokenizer, point, rows, measure, settings.max_new_tokens, how)
    runs = behaviour.activations()
    spread = Spread(torch.cat(runs))
    controls = _controls(readout, model, tokenizer, direction, spread, foreign or {}, settings)
    other = other_recipe(model, tokenizer, readout, examples, chat) if examples is not None else None
    means = [run.mean(0) if len(run) else spread.activations.mean(0) for run in runs]
    check = CausalRuns(behaviour, direction, spread, means, controls, other, tuple(settings.doses), settings.seed)
    return check.findings(settings.occurs, f"sha256:{readout.digest()}", command)


def causal_check_again(
    readouts: Sequence[Readout], model: Any, tokenizer: Any, asked: Mapping[str, Any]
) -> dict[str, CausalFindings]:
    """Causal findings of each readout on a trained model; none, with a warning, if its parameters are in pieces.

    Args:
        asked (`dict`): keywords of `causal_check`.
    """
    if is_sharded(model):
        logger.warning(
            "The causal check was left out: the policy's parameters are in pieces. Run `interp-rlhf drift compare BASE "
            "CHECKPOINT --monitor CARD --prompts FILE --causal-measure NAME …` on the saved checkpoint."
        )
        return {}
    return {readout.name: causal_check(readout, model, tokenizer, trained=True, **asked) for readout in readouts}


def _asked(prompts: Sequence[Any] | None, measure: Any, pairs: Sequence[Any] | None) -> list[Any]:
    """The prompts or the pairs.

    Raises:
        `ValueError`: both or neither are given, there are too few, or a pair lacks something.
    """
    if (pairs is None) == (measure is None) or (measure is None) != (prompts is None):
        given = ", ".join(
            f"`{name}` {'is' if value is None else 'is not'} None"
            for name, value in (("prompts", prompts), ("measure", measure), ("pairs", pairs))
        )
        raise ValueError(
            f"{given} – expected prompts and an independent measure of their answers, or pairs of completions, and not both."
        )
    rows = list(prompts if pairs is None else pairs)  # type: ignore[arg-type]
    if len(rows) < MIN_PROMPTS:
        raise ValueError(
            f"{len(rows)} {'prompts' if pairs is None else 'pairs'} – expected at least {MIN_PROMPTS}: fewer give no interval."
        )
    keys = {"prompt", "followed", "violated"}
    lacking = [i for i, row in enumerate(rows) if pairs is not None and keys - set(row)]
    if lacking:
        raise ValueError(
            f"Pair {lacking[0]} has the keys {sorted(rows[lacking[0]])} – expected {', '.join(sorted(keys))}."
        )
    return rows


def _behaviour_of(
    model: Any,
    tokenizer: Any,
    hook_point: str,
    rows: list[Any],
    measure: Any,
    max_new_tokens: int,
    how: dict[str, Any],
) -> Behaviour:
    """What is measured: answers by a measure, or by the one of this name; margins without a measure."""
    if measure is None:
        return MarginBehaviour(model, tokenizer, hook_point, rows, **how)
    name = measure if isinstance(measure, str) else getattr(measure, "__name__", "measure")
    function = MEASURES[measure]() if isinstance(measure, str) else measure
    return AnswerBehaviour(model, tokenizer, hook_point, rows, function, name, max_new_tokens=max_new_tokens, **how)


def _controls(
    readout: Readout, model: Any, tokenizer: Any, direction: torch.Tensor, spread: Spread,
    foreign: Mapping[str, torch.Tensor], settings: CausalSettings,
) -> list[ControlDirection]:  # fmt: skip
    return [
        *random_directions(len(direction), settings.random, settings.seed),
        ControlDirection("same variance", "same variance", spread.same_variance(direction, settings.seed)),
        *foreign_directions(model, tokenizer, readout.hook_point, direction, spread, foreign),
    ]
