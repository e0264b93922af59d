"""`DriftConfig`: what an evaluation of drift reads, and how often.

In: settings of a user or a recipe. Out: the same, checked, with data files read. It must not know trainers, models or logs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from ..concepts.examples import read_prompts, read_rows
from ..messages import as_list, as_prompts
from ..validation.measures import MEASURES
from ..validation.statistics import MIN_PROMPTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..concepts.examples import Examples
    from ..sae.autoencoder import SparseAutoencoder

DATA_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class DriftConfig:
    """What `attach(trainer, drift=…)` evaluates, and how often.

    Attributes:
        every (`int`, defaults to 50): optimizer steps between two evaluations. There is also one at the start and one at the end.
        texts (`Sequence`, *optional*): texts or examples (see `tokenize_examples`), or a data file of them. By default 24 neutral
            texts that come with the package. At most 2,048 tokens are used. The first token of each text is left out, and so are
            tokens whose norm is an outlier.
        hook_points (`Sequence[str]`, *optional*): where to measure. By default four decoder layers spread over the depth. The
            hook points of the monitors are added.
        labelled (`str`, `Path` or `Examples`, *optional*): labelled examples (20 or more) on which monitors are read frozen,
            re-standardized and refitted. Without them, monitors are read frozen on `texts`.
        prompts (`Sequence`, *optional*): prompts (8 or more), or a data file of them, that the policy answers at every
            evaluation. With a frozen reference (`reference_model`, or PEFT), its answers tell a change of the text from a change
            of the representation.
        max_new_tokens (`int`, defaults to 32): length limit of those answers.
        measures (`dict[str, Callable]`, *optional*): independent measures of the answers. Each maps a text to a float and
            measures what the training should improve.
        on_verdict (`str`, defaults to `"log"`): `log` or `stop`. With `stop`, an alarm (`verdicts.ALARMS`) ends training, and
            `last_good/` in the output folder is the checkpoint of the last evaluation without an alarm.
        max_overhead (`float`, *optional*): share of the training time that evaluations may take, such as 0.02. Evaluations
            become rarer than `every` if they would take more.
        baseline (`str` or `Path`, *optional*): run log of a run without the term. The movement of each monitor there is
            subtracted.
        causal_prompts (`Sequence`, *optional*), causal_measure (`str` or `Callable`): 10 or more prompts, or a data file of them,
            and a measure as in `causal_check`. After training, every monitor's causal check is made on the policy. Its result is
            in the run log and the report.
        sae (`str`, `Path` or `SparseAutoencoder`, *optional*): a sparse autoencoder (see `load_sae`). Evaluations log the latents
            that changed most, and the variance that the autoencoder leaves unexplained on `texts` and on the policy's own tokens.
        seed (`int`, defaults to 0): seed of sampling, folds and bootstraps.

    Raises:
        `ValueError`: a setting outside its range, or `measures` without `prompts`.

    Example:
        >>> from interp_rlhf import DriftConfig
        >>> config = DriftConfig(every=25, prompts=["How are you?", "What is new?"], on_verdict="stop")
        >>> config.every
        25
        >>> DriftConfig(every=0)
        Traceback (most recent call last):
        ValueError: `every` is 0 – expected at least 1 optimizer step.
    """

    every: int = 50
    texts: Sequence[Any] | None = None
    hook_points: Sequence[str] | None = None
    labelled: str | Path | Examples | None = None
    prompts: Sequence[Any] | None = None
    max_new_tokens: int = 32
    measures: Mapping[str, Callable[[str], float]] | None = None
    on_verdict: Literal["log", "stop"] = "log"
    max_overhead: float | None = None
    baseline: str | Path | None = None
    causal_prompts: Sequence[Any] | None = None
    causal_measure: str | Callable[[str], float] | None = None
    sae: str | Path | SparseAutoencoder | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        def change(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("every", "max_new_tokens", "seed"):
            change(name, whole_number(name, getattr(self, name)))
        if _is_data_file(self.texts):
            change("texts", read_rows(self.texts))
        for name in ("prompts", "causal_prompts"):
            if _is_data_file(asked := getattr(self, name)):
                change(name, read_prompts(asked))
        for name in ("texts", "hook_points"):
            if getattr(self, name) is not None:
                change(name, as_list(getattr(self, name)))
        for name in ("prompts", "causal_prompts"):
            if getattr(self, name) is not None:
                change(name, as_prompts(getattr(self, name)))
        self._check()

    def _check(self) -> None:
        share = self.max_overhead
        if self.every < 1:
            raise ValueError(f"`every` is {self.every} – expected at least 1 optimizer step.")
        if self.on_verdict not in ("log", "stop"):
            raise ValueError(f"`on_verdict` is {self.on_verdict!r} – expected `log` or `stop`.")
        if share is not None and not (isinstance(share, int | float) and 0 < share < 1):
            raise ValueError(f"`max_overhead` is {share!r} – expected a share of the training time, such as 0.02.")
        if self.measures and not self.prompts:
            raise ValueError(
                "`measures` was given without `prompts` – expected prompts, whose answers are measured. Add some."
            )
        if (self.causal_prompts is None) != (self.causal_measure is None):
            raise ValueError(
                f"`causal_prompts` is {self.causal_prompts!r} and `causal_measure` {self.causal_measure!r} – expected both or "
                "neither: the check measures the answers to prompts."
            )
        if self.causal_prompts is not None and len(self.causal_prompts) < MIN_PROMPTS:
            raise ValueError(f"{len(self.causal_prompts)} `causal_prompts` – expected at least {MIN_PROMPTS}.")
        if isinstance(self.causal_measure, str) and self.causal_measure not in MEASURES:
            raise ValueError(
                f"`causal_measure` is {self.causal_measure!r} – expected one of {', '.join(f'`{name}`' for name in MEASURES)}, "
                "or a function of a text."
            )


def whole_number(name: str, value: Any) -> int:
    """A whole number as an `int`; YAML may have made a float of it.

    Raises:
        `ValueError`: not a whole number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError(f"`{name}` is {value!r} – expected a whole number.")
    return int(value)


def _is_data_file(value: Any) -> TypeGuard[str | Path]:
    """True if a value is the path of a data file. (A single text is also a string, and no file.)"""
    return isinstance(value, str | Path) and Path(value).suffix.lower() in DATA_FILES
