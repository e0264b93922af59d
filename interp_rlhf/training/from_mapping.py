"""Objects of what a recipe says: a mapping with `kind` and the options of that kind.

In: a mapping as YAML gives it. Out: an object, or an error that says what was expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

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
    options = yaml_numbers(dict(given))
    kind = options.pop("kind", None)
    if kind not in kinds:
        raise ValueError(
            f"`kind` of a {what} is {kind!r} – expected one of {', '.join(f'`{k}`' for k in sorted(kinds))}."
            + _nearest(str(kind), kinds)
        )
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
