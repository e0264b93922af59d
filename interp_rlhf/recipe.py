"""What the launch scripts in `recipes/` share: the `interp:` section of their YAML, data, model and resumption.

In: what TRL's strict parser read. Out: arguments for TRL's trainers and for `attach`. No second configuration system: everything
else in a recipe is TRL's own.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .concepts.card import locate
from .concepts.examples import SPOKEN, read_prompts, read_rows
from .drift.config import DriftConfig, whole_number
from .messages import as_list
from .training.from_mapping import yaml_numbers
from .training.rewards import ConceptReward
from .validation import measures

EMBEDDED = "SmolLM2-135M-Instruct"
LISTS = ("regularizers", "interventions", "monitors", "rewards", "measures")
MEASURES = ("vader",)
TEXTS = ("text", *SPOKEN)  # columns whose cells are words, whatever they look like
KEYS = (*LISTS, "drift", "arm", "run_log", "samples_every")


@dataclass
class InterpArguments:
    """The `interp:` section of a recipe.

    Args:
        interp (`dict`): plain lists `regularizers`, `interventions`, `monitors`, `rewards` (cards, for rollouts) and `measures`
            (names: `vader`), a mapping `drift` (fields of `DriftConfig`, its `prompts` a file with such a column, its
            `measures` names), and `arm`, `run_log`, `samples_every` as in `attach`.

    Raises:
        `ValueError`: an unknown key, or a value of another shape.
    """

    interp: str | None = field(
        default=None,
        metadata={
            "help": "Section of the YAML (or JSON on the command line) with regularizers, interventions, monitors, rewards, "
            "measures, drift, arm, run_log, samples_every: what interp_rlhf.attach takes."
        },
    )

    def __post_init__(self) -> None:
        given: Any = json.loads(self.interp) if isinstance(self.interp, str) else self.interp
        self.section: dict[str, Any] = _section({} if given is None else given)

    def attach_keywords(self) -> dict[str, Any]:
        """Keywords of `attach`."""
        found = {key: value for key, value in self.section.items() if key not in ("rewards", "drift")}
        if "measures" in found:
            found["measures"] = _measures(found["measures"])
        if "drift" in self.section:
            drift = dict(self.section["drift"])
            if "measures" in drift:
                drift["measures"] = _measures(drift["measures"])
            if isinstance(drift.get("prompts"), str):
                drift["prompts"] = read_prompts(locate(drift["prompts"]))
            found["drift"] = DriftConfig(**drift)
        return found

    def rewards(self) -> list[ConceptReward]:
        """Reward functions of the cards under `rewards`.

        Raises:
            `ValueError`: there are none.
        """
        cards = self.section.get("rewards", [])
        if not cards:
            raise ValueError(
                "`interp.rewards` names no card – expected at least one: rollouts are trained on rewards. Add "
                "`rewards: [reward/warmth/reward.v3.yaml]`."
            )
        return [
            ConceptReward.from_card(**card) if isinstance(card, Mapping) else ConceptReward.from_card(card)
            for card in cards
        ]


def _measures(names: Any) -> dict[str, Any]:
    names = as_list(names)
    if not all(isinstance(name, str) for name in names) or not set(names) <= set(MEASURES):
        raise ValueError(
            f"`measures` is {names!r} – expected a list of {', '.join(f'`{name}`' for name in MEASURES)}. Others are "
            "functions: pass them to `attach` in a script of your own."
        )
    return {name: getattr(measures, name)() for name in names}


def _section(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"`interp` is {given!r} – expected a mapping with {', '.join(f'`{key}`' for key in KEYS)}.")
    _refuse_unknown("interp", given, KEYS)
    given = {key: as_list(value) if key in LISTS else value for key, value in given.items()}
    for key in ("monitors", "rewards"):
        wrong = [card for card in given.get(key, []) if not isinstance(card, str | Path | Mapping)]
        if wrong or (key == "monitors" and any(isinstance(card, Mapping) for card in given.get(key, []))):
            raise ValueError(
                f"`interp.{key}` is {given[key]!r} – expected a list of cards, such as `[path/to/card.yaml]`."
            )
    for card in given.get("rewards", []):
        if isinstance(card, Mapping):
            _refuse_unknown("interp.rewards", card, ("path", "sham", "seed", "dense", "shaping"))
            if not isinstance(card.get("path"), str | Path):
                raise ValueError(f"`interp.rewards` has {dict(card)!r} – expected the `path` of a card in each.")
    drift = given.get("drift", {})
    if not isinstance(drift, Mapping):
        raise ValueError(f"`interp.drift` is {drift!r} – expected a mapping such as `{{every: 50}}`.")
    _refuse_unknown("interp.drift", drift, [f.name for f in dataclasses.fields(DriftConfig)])
    section: dict[str, Any] = yaml_numbers(given)
    for key in ("arm", "run_log"):
        if not isinstance(section.get(key, ""), str | Path):
            raise ValueError(
                f"`interp.{key}` is {section[key]!r} – expected a word: YAML takes no, off, yes and on for false and true. "
                "Put it in quotes."
            )
    if "samples_every" in section:
        section["samples_every"] = whole_number("samples_every", section["samples_every"])
        if section["samples_every"] < 1:
            raise ValueError(f"`interp.samples_every` is {section['samples_every']} – expected at least 1.")
    return section


def _refuse_unknown(where: str, given: Mapping[str, Any], known: Any) -> None:
    unknown = sorted(str(key) for key in given if key not in known)
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise ValueError(
            f"{', '.join(f'`{where}.{key}`' for key in unknown)} – expected {', '.join(f'`{key}`' for key in sorted(known))}."
            + (f" Did you mean `{near[0]}`?" if near else "")
        )


def datasets_of(script: Any) -> dict[str, Any]:
    """`train_dataset` and, where there is one, `eval_dataset` of TRL's `ScriptArguments`.

    Raises:
        `FileNotFoundError`: no such file.
        `ValueError`: a file without rows, or a split that is not there.

    `dataset_name` is a file (`.jsonl`, `.json`, `.csv`, `.parquet`), from here or among the shipped recipes, or what
    `datasets.load_dataset` takes.
    """
    from datasets import Dataset, load_dataset

    name = str(script.dataset_name)
    loaded: Any
    if Path(name).suffix.lower() in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
        rows = read_rows(locate(name))
        if not rows:
            raise ValueError(f"`{name}` has no rows – expected at least one to train on.")
        columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
        if Path(name).suffix.lower() in (".csv", ".tsv"):
            columns = {key: values if key in TEXTS else _typed(values) for key, values in columns.items()}
        loaded = {"train": Dataset.from_dict(columns)}
    else:
        loaded = load_dataset(name, name=script.dataset_config, streaming=script.dataset_streaming)
    if script.dataset_train_split not in loaded:
        raise ValueError(
            f"`dataset_train_split` is `{script.dataset_train_split}` – expected one of the splits of `{name}`: "
            f"{', '.join(f'`{split}`' for split in sorted(loaded))}."
        )
    found = {"train_dataset": loaded[script.dataset_train_split]}
    if script.dataset_test_split in loaded:
        found["eval_dataset"] = loaded[script.dataset_test_split]
    return found


def _typed(values: list[Any]) -> list[Any]:
    """A column of a CSV file, as booleans or numbers where all its cells are such."""
    given = [value for value in values if value is not None]
    if not given or not all(isinstance(value, str) for value in given):
        return values
    if {value.lower() for value in given} <= {"true", "false"}:
        return [None if value is None else value.lower() == "true" for value in values]
    for kind in (int, float):
        try:
            return [None if value is None else kind(value) for value in values]
        except ValueError:
            continue
    return values


def model_of(model: Any, args: Any) -> str:
    """Path or Hub id of TRL's `ModelConfig`, whose precision and attention go into `args`; `SmolLM2-135M-Instruct` is the
    embedded one."""
    args.model_init_kwargs = {
        "revision": model.model_revision, "attn_implementation": model.attn_implementation, "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }  # fmt: skip
    if model.model_name_or_path == EMBEDDED:
        from .embedded import default_model

        return str(default_model())
    return str(model.model_name_or_path)


def resume_of(args: Any) -> bool | str | None:
    """What `trainer.train` is to resume from: `--resume_from_checkpoint true` is the last complete checkpoint."""
    given = args.resume_from_checkpoint
    return {"true": True, "false": None}.get(str(given).lower(), given)
