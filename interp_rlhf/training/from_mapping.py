"""Creates objects from a recipe's mappings: `kind`, and the options of that kind.

In: a mapping from YAML. Out: an object, or an error that says what was expected. It must not know kinds.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from ..messages import as_list
from ..registry import did_you_mean

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
# Options whose value is a word, even if it looks like a number.
WORDS = ("arm", "card", "cards", "kind", "name", "run_log", "sae", "subfolder", "revision", "texts", "prompts")


def from_mapping(asked: Any, kinds: Mapping[str, Any], what: str, files: Any) -> Any:
    """Create an object of one of several kinds.

    Args:
        asked (`dict`): `kind`, and options of that kind.
        kinds (`dict[str, type]`): dataclasses by kind, each with a class method `from_options(options, files)`.
        what (`str`): name of the group of kinds, for errors.
        files (`CardFiles`): loads the files that options name.

    Raises:
        `ValueError`: `asked` is no mapping, a kind or an option is unknown, or an option is missing.
    """
    if isinstance(asked, str) and asked in kinds:
        raise ValueError(f"`{asked}` is a kind of {what} – expected a mapping `{{kind: {asked}, card: …}}`.")
    if not isinstance(asked, Mapping):
        names = ", ".join(f"`{kind.__name__}`" for kind in kinds.values())
        raise ValueError(f"{asked!r} is no {what} – expected one of {names}, or a mapping with `kind`.")
    options = {str(key): value for key, value in yaml_numbers(asked).items()}
    kind = options.pop("kind", None)
    if kind not in kinds:
        raise ValueError(
            f"`kind` of a {what} is {kind!r} – expected one of {', '.join(f'`{k}`' for k in sorted(kinds))}."
            + did_you_mean(str(kind), kinds)
        )
    for key in ("card", "cards"):
        paths = as_list(options.get(key)) if key == "cards" else [options[key]] if key in options else []
        if wrong := [path for path in paths if not isinstance(path, str | os.PathLike)]:
            raise ValueError(f"`{key}` of a {what} of kind `{kind}` is {wrong[0]!r} – expected the path of a card.")
    return kinds[kind].from_options(options, files)


def from_fields(made: type[Any], options: Mapping[str, Any], what: str, kind: str) -> Any:
    """Create an object of a dataclass from the values of its fields.

    Args:
        made (`type`): the dataclass.
        options (`dict`): values of its fields.
        what (`str`), kind (`str`): names of the group and of the kind, for errors.

    Raises:
        `ValueError`: an option is unknown or missing.
    """
    fields = {field.name: field for field in dataclasses.fields(made) if field.init}
    unknown = sorted(set(options) - set(fields))
    if unknown:
        # A file cannot hold these objects, so the error names the option that stands for them.
        in_files = {"readout": "card", "subspace": "cards"}
        known = sorted(in_files.get(key, key) for key in fields)
        raise ValueError(
            f"{', '.join(f'`{key}`' for key in unknown)} – expected options of `{kind}`: "
            f"{', '.join(f'`{key}`' for key in known)}.{did_you_mean(unknown[0], known)}"
        )
    needed = [
        key
        for key, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    absent = [key for key in needed if key not in options]
    if absent:
        files = " (of a `card`)" if "readout" in absent else " (of `cards`)" if "subspace" in absent else ""
        raise ValueError(
            f"A {what} of kind `{kind}` has no {', '.join(f'`{key}`' for key in absent)} – expected it{files}."
        )
    return made(**options)


def check_options(made: Any) -> None:
    """Refuse field values of the wrong type: words for numbers or flags, flags for numbers, and anything else for words.

    Raises:
        `ValueError`: the first such field.
    """
    for field in dataclasses.fields(made):
        value, kind = getattr(made, field.name), str(field.type)
        said = f"`{field.name}` of a `{type(made).__name__}` is {value!r}"
        if kind == "bool" and not isinstance(value, bool):
            raise ValueError(f"{said} – expected true or false, without quotes in YAML.")
        if kind in ("str", "str | None") and not isinstance(value, str) and not (value is None and "None" in kind):
            raise ValueError(f"{said} – expected a word. Put it in quotes: YAML takes no and yes for false and true.")
        if kind in ("int", "float", "int | None") and not (value is None and "None" in kind):
            if isinstance(value, bool) or not isinstance(value, int | float):
                what = "a finite number" if kind == "float" else "a whole number"
                raise ValueError(f"{said} – expected {what}, without quotes in YAML.")
            if kind != "float" and not float(value).is_integer():
                raise ValueError(f"{said} – expected a whole number.")
            if kind != "float":  # YAML takes 1e1 for a float
                object.__setattr__(made, field.name, int(value))


def yaml_numbers(value: Any) -> Any:
    """The same value with words such as `1e-3` turned into numbers. YAML 1.1 reads them as words."""
    if isinstance(value, Mapping):
        return {key: item if key in WORDS else yaml_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [yaml_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
