"""What the launch scripts in `recipes/` share: the `interp:` section of their YAML, data, model and resumption.

In: the results of TRL's strict parser. Out: arguments for TRL's trainers and for `attach`. It must not become a second
configuration system: everything else in a recipe belongs to TRL.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .concepts.card import locate
from .concepts.examples import SPOKEN, read_prompts, read_rows
from .drift.config import DriftConfig, whole_number
from .embedded import place_of
from .extensions import import_modules
from .messages import as_list
from .registry import did_you_mean
from .training.from_mapping import yaml_numbers
from .training.rewards import ConceptReward
from .validation.measures import MEASURES

_LIST_KEYS = ("regularizers", "interventions", "monitors", "rewards", "measures")
_SECTION_KEYS = ("modules", *_LIST_KEYS, "drift", "arm", "run_log", "samples_every")
_REWARD_KEYS = ("path", "sham", "seed", "dense", "shaping", "require_causal")
_WORD_COLUMNS = ("text", *SPOKEN)  # their cells are words, even if all of them look like numbers


@dataclass
class InterpArguments:
    """The `interp:` section of a recipe.

    Args:
        interp (`dict`): lists `regularizers`, `interventions`, `monitors`, `rewards` (cards, for rollouts) and `measures`
            (registered names, such as `vader`); a mapping `drift` with fields of `DriftConfig`, where `prompts` is a file with
            that column and `measures` are names; `arm`, `run_log` and `samples_every` as in `attach`; and `modules`, a list of
            module names. These modules are imported first, so the other keys may say what they register. Nothing else in a
            recipe runs code. Python finds installed modules and those in the script's folder.

    Raises:
        `ValueError`: an unknown key, a value of another shape, or a module that Python does not find.
    """

    interp: str | None = field(
        default=None,
        metadata={
            "help": "Section of the YAML (or JSON on the command line) with regularizers, interventions, monitors, rewards,"
            " measures, drift, arm, run_log, samples_every, as in interp_rlhf.attach, and modules: names of modules to import "
            "first."
        },
    )

    def __post_init__(self) -> None:
        section: Any = json.loads(self.interp) if isinstance(self.interp, str) else self.interp
        self.section: dict[str, Any] = _checked_section({} if section is None else section)

    def attach_keywords(self) -> dict[str, Any]:
        """Keywords of `attach`, with measures made and prompts read."""
        keywords = {key: value for key, value in self.section.items() if key not in ("modules", "rewards", "drift")}
        if "measures" in keywords:
            keywords["measures"] = _made_measures(keywords["measures"])
        if "drift" in self.section:
            drift = dict(self.section["drift"])
            if "measures" in drift:
                drift["measures"] = _made_measures(drift["measures"])
            if isinstance(drift.get("prompts"), str):
                drift["prompts"] = read_prompts(locate(drift["prompts"]))
            keywords["drift"] = DriftConfig(**drift)
        return keywords

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


def _made_measures(names: Any) -> dict[str, Any]:
    names = as_list(names)
    if not all(isinstance(name, str) and name in MEASURES for name in names):
        raise ValueError(
            f"`measures` is {names!r} – expected a list of {', '.join(f'`{name}`' for name in MEASURES)}. Register another one "
            "with `register_measure`, and list its module under `interp.modules`."
        )
    return {name: MEASURES[name]() for name in names}


def _checked_section(mapping: Any) -> dict[str, Any]:
    """The section with single values made lists and numbers read; its modules are imported first.

    Raises:
        `ValueError`: an unknown key, or a value of another shape.
    """
    if not isinstance(mapping, Mapping):
        raise ValueError(
            f"`interp` is {mapping!r} – expected a mapping with {', '.join(f'`{key}`' for key in _SECTION_KEYS)}."
        )
    import_modules([] if mapping.get("modules") is None else mapping["modules"], "interp.modules")
    _refuse_unknown("interp", mapping, _SECTION_KEYS)
    section = {key: as_list(value) if key in _LIST_KEYS else value for key, value in mapping.items()}
    _check_cards(section)
    drift = section.get("drift", {})
    if not isinstance(drift, Mapping):
        raise ValueError(f"`interp.drift` is {drift!r} – expected a mapping such as `{{every: 50}}`.")
    _refuse_unknown("interp.drift", drift, [f.name for f in dataclasses.fields(DriftConfig)])
    section = yaml_numbers(section)
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


def _check_cards(section: Mapping[str, Any]) -> None:
    """Raises `ValueError` where `monitors` or `rewards` hold something other than cards."""
    for key, kinds in (("monitors", str | Path), ("rewards", str | Path | Mapping)):
        if not all(isinstance(card, kinds) for card in section.get(key, [])):
            raise ValueError(
                f"`interp.{key}` is {section[key]!r} – expected a list of cards, such as `[path/to/card.yaml]`."
            )
    for card in section.get("rewards", []):
        if isinstance(card, Mapping):
            _refuse_unknown("interp.rewards", card, _REWARD_KEYS)
            if not isinstance(card.get("path"), str | Path):
                raise ValueError(f"`interp.rewards` has {dict(card)!r} – expected the `path` of a card in each.")


def _refuse_unknown(where: str, mapping: Mapping[str, Any], known: Any) -> None:
    unknown = sorted(str(key) for key in mapping if key not in known)
    if unknown:
        raise ValueError(
            f"{', '.join(f'`{where}.{key}`' for key in unknown)} – expected {', '.join(f'`{key}`' for key in sorted(known))}."
            + did_you_mean(unknown[0], known)
        )


def datasets_of(script: Any) -> dict[str, Any]:
    """The data sets that TRL's `ScriptArguments` name.

    Args:
        script (`ScriptArguments`): its `dataset_name` is a file (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`), in the working
            directory or among the shipped recipes, or any name that `datasets.load_dataset` takes.

    Returns:
        `dict`: `train_dataset`, and `eval_dataset` if the test split exists.

    Raises:
        `FileNotFoundError`: no such file.
        `ValueError`: a file without rows, or a split that does not exist.
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
            columns = {
                key: values if key in _WORD_COLUMNS else _typed_column(values) for key, values in columns.items()
            }
        loaded = {"train": Dataset.from_dict(columns)}
    else:
        loaded = load_dataset(name, name=script.dataset_config, streaming=script.dataset_streaming)
    if script.dataset_train_split not in loaded:
        raise ValueError(
            f"`dataset_train_split` is `{script.dataset_train_split}` – expected one of the splits of `{name}`: "
            f"{', '.join(f'`{split}`' for split in sorted(loaded))}."
        )
    datasets = {"train_dataset": loaded[script.dataset_train_split]}
    if script.dataset_test_split in loaded:
        datasets["eval_dataset"] = loaded[script.dataset_test_split]
    return datasets


def _typed_column(values: list[Any]) -> list[Any]:
    """A column of a CSV file as booleans or numbers if all its cells are; otherwise unchanged."""
    cells = [value for value in values if value is not None]
    if not cells or not all(isinstance(value, str) for value in cells):
        return values
    if {value.lower() for value in cells} <= {"true", "false"}:
        return [None if value is None else value.lower() == "true" for value in values]
    for kind in (int, float):
        try:
            return [None if value is None else kind(value) for value in values]
        except ValueError:
            continue
    return values


def model_of(model: Any, args: Any) -> str:
    """The model that TRL's `ModelConfig` names; its revision, precision and attention go into `args.model_init_kwargs`.

    Args:
        model (`ModelConfig`): `model_name_or_path` is a path, a Hub id, or `SmolLM2-135M-Instruct`, the embedded model.
        args: the trainer's configuration; it is changed.

    Returns:
        `str`: path or Hub id.
    """
    args.model_init_kwargs = {
        "revision": model.model_revision, "attn_implementation": model.attn_implementation, "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }  # fmt: skip
    return place_of(str(model.model_name_or_path))


def resume_of(args: Any) -> bool | str | None:
    """The argument for `trainer.train`. `--resume_from_checkpoint true` means the last complete checkpoint."""
    checkpoint = args.resume_from_checkpoint
    return {"true": True, "false": None}.get(str(checkpoint).lower(), checkpoint)
