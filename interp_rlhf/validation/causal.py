"""The causal check: does a concept's direction do something in the text, beyond what any direction does?

In: a readout, its model, prompts with an independent measure (or pairs of completions). Out: `CausalFindings`. Nothing here is
measured by the readout that is steered. It must not know cards' files or the gate.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..activations.sharding import is_sharded
from .behaviour import AnswerBehaviour, MarginBehaviour
from .causal_runs import CausalRuns
from .directions import ControlDirection, Spread, foreign_directions, other_recipe, random_directions
from .measures import MEASURES
from .statistics import MIN_PROMPTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..concepts.causal_findings import CausalFindings
    from ..concepts.examples import Examples
    from ..concepts.readout import Readout
    from .behaviour import Behaviour

# Doses in standard deviations of the activation along the direction.
DOSES = (-6.0, -4.0, -2.0, -1.0, 1.0, 2.0, 4.0, 6.0)
RANDOM = 10


def causal_check(
    readout: Readout, model: Any, tokenizer: Any, prompts: Sequence[Any] | None = None,
    measure: str | Callable[[str], float] | None = None, *, pairs: Sequence[Mapping[str, Any]] | None = None,
    examples: Examples | None = None, foreign: Mapping[str, torch.Tensor] | None = None, doses: Sequence[float] = DOSES,
    random: int = RANDOM, occurs: float | None = None, max_new_tokens: int = 24, batch_rows: int = 64, seed: int = 0,
    trained: bool = False, command: str = "", chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None, progress: bool = False,
) -> CausalFindings:  # fmt: skip
    """Does steering along a readout's direction change the text, and does silencing it? Next to directions without meaning.

    Four things are done to the activation at the readout's hook point, on every token but a row's first, while the model answers:

    1. *steer*: a step of α standard deviations along the direction is added, at each dose.
    2. *silence*: on prompts where the concept occurs, the coordinate is projected out, and set to its mean.
    3. *interchange*: the mean coordinates of two prompts, one high and one low in the measure, are swapped.
    4. the same with random directions of the same norm, a random one of the same variance, and directions of foreign concepts.

    What comes out is measured in the text, by a measure that knows nothing of the readout. Greedy answers are compared prompt by
    prompt.

    Source: dose-response and controls as in SIEVE and in the threads that METHODS names; interchange of one coordinate after
    Geiger et al. 2021 (arXiv 2106.02997). Deviations:
    1. Interchange swaps a run's mean coordinate and keeps how it varies over tokens, so that runs need not have one length.
    2. Effects are medians and shares of prompts, since the mean of a few large moves says little about the rest.

    Args:
        readout (`Readout`): the concept. Its `direction` is steered.
        model (`nn.Module`), tokenizer: the model that the readout was made on, in one piece.
        prompts (`Sequence`), measure (`Callable` or `str`): prompts, plain or conversational, at least 10, and an independent
            measure of an answer's text, or its registered name. Higher = more of the concept.
        pairs (`Sequence[dict]`, *optional*): for a concept without such a measure, in place of both: rows with `prompt`,
            `followed` and `violated`. The value is log p(followed) − log p(violated), in nats.
        examples (`Examples`, *optional*): labelled examples, on which the other recipe (difference of means or logistic
            regression) is fitted.
        foreign (`dict[str, torch.Tensor]`, *optional*): directions (D,) of foreign concepts at the same hook point. Built-in ones
            are added up to three.
        doses (`Sequence[float]`): doses α, without 0: at least four, on both sides.
        random (`int`, defaults to 10): number of random directions, at least 10.
        occurs (`float`, *optional*): value of the measure above which the concept occurs. By default the middle between the
            lowest and the highest value over all prompts and doses that count.
        max_new_tokens (`int`, defaults to 24): length of an answer.
        batch_rows (`int`, defaults to 64): answers that are generated at once.
        seed (`int`, defaults to 0): seed of directions and bootstraps.
        trained (`bool`, defaults to `False`): the model's own weights were trained after the readout was made.
        command (`str`): the command that the findings name.
        chat_template (`str`), chat_template_kwargs (`dict`, *optional*): how messages become text.
        progress (`bool`): show progress bars.

    Returns:
        `CausalFindings`: verdict and all numbers.

    Raises:
        `ValueError`: too few prompts, neither or both of `measure` and `pairs`, a measure that gives no number, a direction of
            another width, or no prompt on which the concept occurs.

    Example:
        >>> from interp_rlhf import causal_check
        >>> prompts = [f"please {word}" for word in "help thanks sorry day night rain sun house tree walk".split()]
        >>> findings = causal_check(readout, model, tokenizer, prompts, lambda text: float(text.count("a")), max_new_tokens=4)
        >>> findings.verdict in ("causal", "steers only", "silences only", "read-only", "insufficient evidence")
        True
    """
    _require_asked(prompts, measure, pairs, doses, random)
    if is_sharded(model):
        raise ValueError(
            "The model's parameters are in pieces – expected a model in one piece. Load the checkpoint by itself."
        )
    readout.check_model(model, exact=not trained, trained=trained)
    chat: dict[str, Any] = {"chat_template": chat_template, "chat_template_kwargs": chat_template_kwargs}
    direction = _direction_of(readout)
    how: dict[str, Any] = {"batch_rows": batch_rows, "chat": chat, "progress": progress}
    behaviour: Behaviour
    if pairs is not None:
        behaviour = MarginBehaviour(model, tokenizer, readout.hook_point, pairs, **how)
    else:
        behaviour = _answers_to(prompts, measure, readout.hook_point, model, tokenizer, max_new_tokens, how)
    runs = behaviour.activations()
    spread = Spread(torch.cat(runs))
    controls = [
        *random_directions(len(direction), random, seed),
        ControlDirection("same variance", "same variance", spread.same_variance(direction, seed)),
        *foreign_directions(model, tokenizer, readout.hook_point, direction, spread, foreign or {}),
    ]
    other = None if examples is None else other_recipe(
        model, tokenizer, readout.hook_point, examples, readout.header.method if readout.header else "", chat
    )  # fmt: skip
    check = CausalRuns(behaviour, direction, spread, _run_means(runs, spread), controls, other, tuple(doses), seed)
    return check.findings(occurs, _digest_of(readout), command)


def _require_asked(
    prompts: Sequence[Any] | None, measure: Any, pairs: Sequence[Any] | None, doses: Sequence[float], random: int
) -> None:
    if (pairs is None) == (measure is None) or (measure is None) != (prompts is None):
        raise ValueError(
            f"`prompts` {'is' if prompts is None else 'is not'} None, `measure` {'is' if measure is None else 'is not'} None and "
            f"`pairs` {'is' if pairs is None else 'is not'} None – expected prompts and an independent measure of their answers, "
            "or pairs of completions, and not both."
        )
    rows = list(prompts if pairs is None else pairs)  # type: ignore[arg-type]
    if len(rows) < MIN_PROMPTS:
        raise ValueError(
            f"{len(rows)} {'prompts' if pairs is None else 'pairs'} – expected at least {MIN_PROMPTS}: fewer give no interval."
        )
    lacking = [i for i, row in enumerate(rows) if pairs is not None and {"prompt", "followed", "violated"} - set(row)]
    if lacking:
        raise ValueError(
            f"Pair {lacking[0]} has the keys {sorted(rows[lacking[0]])} – expected prompt, followed and violated."
        )
    bad = [dose for dose in doses if not math.isfinite(dose) or dose == 0]
    if bad or len(set(doses)) < 4 or min(doses) > 0 or max(doses) < 0:
        raise ValueError(
            f"`doses` is {list(doses)} – expected at least four finite ones on both sides of 0, such as -4, -2, 2, 4. The dose 0 "
            "is always among them."
        )
    if random < RANDOM:
        raise ValueError(
            f"`random` is {random} – expected at least {RANDOM} random directions: fewer say little about chance."
        )


def _answers_to(
    prompts: Any, measure: Any, hook_point: str, model: Any, tokenizer: Any, max_new_tokens: int, how: dict[str, Any]
) -> AnswerBehaviour:
    """The behaviour that is measured in answers, by a measure or by the one of this name."""
    name = measure if isinstance(measure, str) else getattr(measure, "__name__", "measure")
    function = MEASURES[measure]() if isinstance(measure, str) else measure
    return AnswerBehaviour(model, tokenizer, hook_point, prompts, function, name, max_new_tokens=max_new_tokens, **how)


def _run_means(runs: Sequence[torch.Tensor], spread: Spread) -> list[torch.Tensor]:
    """Mean activation (D,) of each run; that of all runs where one is empty."""
    return [run.mean(0) if len(run) else spread.activations.mean(0) for run in runs]


def _direction_of(readout: Readout) -> torch.Tensor:
    direction = readout.direction.float()
    if not torch.isfinite(direction).all() or not float(direction.norm()) > 0:
        raise ValueError(
            f"Readout `{readout.name}` has a direction of norm {float(direction.norm())} – expected one that is finite and not 0."
        )
    return nn.functional.normalize(direction, dim=0)


def _digest_of(readout: Readout) -> str:
    """Digest of what was steered: direction and hook point. A card replaces it with its own."""
    return f"sha256:{readout.digest()}"
