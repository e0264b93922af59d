"""Objects of what a recipe says: a mapping with `kind` and the options of that kind.

In: a mapping as YAML gives it. Out: an object, or an error that says what was expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..messages import as_list

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
# Options whose value is a word, whatever it looks like.
WORDS = ("arm", "card", "cards", "kind", "name", "run_log", "sae", "subfolder", "revision", "texts", "prompts")


def from_mapping(given: Any, kinds: Mapping[str, Any], what: str, load: Callable[[str, dict[str, Any]], None]) -> Any:
    """Object of one of several kinds.

    Args:
        given (`dict`): `kind`, and options of that kind.
        kinds (`dict[str, type]`): dataclasses by kind.
        what (`str`): what they are, for errors.
        load (`Callable`): turns options that are files into what they hold, in place.

    Raises:
        `ValueError`: no mapping, an unknown kind, an unknown or missing option.
    """
    if isinstance(given, str) and given in kinds:
        raise ValueError(f"`{given}` is a kind of {what} – expected a mapping `{{kind: {given}, card: …}}`.")
    if not isinstance(given, Mapping):
        names = ", ".join(f"`{kind.__name__}`" for kind in kinds.values())
        raise ValueError(f"{given!r} is no {what} – expected one of {names}, or a mapping with `kind`.")
    options = {str(key): value for key, value in yaml_numbers(given).items()}
    kind = options.pop("kind", None)
    if kind not in kinds:
        raise ValueError(
            f"`kind` of a {what} is {kind!r} – expected one of {', '.join(f'`{k}`' for k in sorted(kinds))}."
            + _nearest(str(kind), kinds)
        )
    for key in ("card", "cards"):
        given_here = as_list(options.get(key)) if key == "cards" else [options[key]] if key in options else []
        if wrong := [file for file in given_here if not isinstance(file, str | os.PathLike)]:
            raise ValueError(f"`{key}` of a {what} of kind `{kind}` is {wrong[0]!r} – expected the path of a card.")
    load(kind, options)
    fields = {field.name: field for field in dataclasses.fields(kinds[kind]) if field.init}
    unknown = sorted(set(options) - set(fields))
    if unknown:
        # A file cannot hold these objects, so what is said in their place is named.
        said = {"readout": "card", "subspace": "cards"}
        known = sorted(said.get(key, key) for key in fields)
        raise ValueError(
            f"{', '.join(f'`{key}`' for key in unknown)} – expected options of `{kind}`: "
            f"{', '.join(f'`{key}`' for key in known)}.{_nearest(unknown[0], known)}"
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
    return kinds[kind](**options)


def check_options(made: Any) -> None:
    """Refuse a word where an object's field is a number or a flag, and a flag where it is a number.

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


def yaml_numbers(given: Any) -> Any:
    """The same with numbers in the place of words such as `1e-3`, which YAML 1.1 does not take for one."""
    if isinstance(given, Mapping):
        return {key: value if key in WORDS else yaml_numbers(value) for key, value in given.items()}
    if isinstance(given, list | tuple):
        return [yaml_numbers(value) for value in given]
    return float(given) if isinstance(given, str) and _NUMBER.fullmatch(given) else given


def _nearest(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean `{near[0]}`?" if near else ""
