"""Records: dataclasses that are written to JSON and read back from lines that may be old, foreign or broken.

In: a record, or a JSON object. Out: the JSON object, or the record. A value of another type than its field declares counts as
missing, so code that holds a record need not check types. It must not know which records there are.
"""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

# Stands for a value of another type than declared.
_WRONG: Any = object()


def fact(about: str, default: Any = None, *, unit: str = "", since: int = 1, optional: bool = False) -> Any:
    """A documented field of a record.

    Args:
        about (`str`): what the field holds, for the documentation.
        default: what it holds in a line without it. `list` and `dict` stand for an empty one.
        unit (`str`): unit and range, for the documentation.
        since (`int`, defaults to 1): version of the run log in which the field appeared.
        optional (`bool`, defaults to `False`): the field is not written while it has its default.
    """
    described = {"about": about, "unit": unit, "since": since, "optional": optional}
    if default in (list, dict):
        return field(default_factory=default, metadata=described)
    return field(default=default, metadata=described)


@dataclass(frozen=True, kw_only=True)
class Record:
    """Base of all records.

    Attributes:
        other (`dict[str, Any]`): keys that this version does not know. They are kept and written again.
    """

    other: dict[str, Any] = fact("keys that the record does not declare", dict, optional=True)

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object, keys in the order of the fields, unknown keys last."""
        written = {}
        for one in own_fields(type(self)):
            value = getattr(self, one.name)
            if not (one.metadata["optional"] and value == _default_of(one)):
                written[one.name] = _json_value(value)
        return written | self.other

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> Self:
        """The record of a JSON object."""
        hints = _hints(cls)  # type: ignore[arg-type]
        names = {one.name for one in own_fields(cls)}
        typed = {key: value for key in names & line.keys() if (value := _typed(hints[key], line[key])) is not _WRONG}
        return cls(**typed, other={key: value for key, value in line.items() if key not in names})

    @classmethod
    def from_other(cls, value: Any) -> Any:
        """The record of a value that is not a JSON object. By default there is none."""
        return _WRONG


def own_fields(cls: type[Record]) -> list[Any]:
    """The fields of a record class that are keys of its JSON object, in their order."""
    return [one for one in fields(cls) if one.name != "other"]


@cache
def _hints(cls: type[Record]) -> dict[str, Any]:
    return get_type_hints(cls)


def _default_of(one: Any) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def _json_value(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    return value


def _typed(hint: Any, value: Any) -> Any:
    """A JSON value as the type that a field declares, or `_WRONG`."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    nullable = NoneType in options
    if nullable and (value is None or (isinstance(value, float) and not math.isfinite(value))):
        return None
    (kind,) = (option for option in options if option is not NoneType)
    outer, inner = get_origin(kind) or kind, get_args(kind)
    if outer is Any:
        return value
    if outer is list:
        return _typed_list(inner[0], value)
    if outer is dict:
        return _typed_dict(inner[1], value)
    if issubclass(outer, Record):
        return outer.from_json(value) if isinstance(value, dict) else outer.from_other(value)
    return _typed_scalar(outer, value)


def _typed_list(inner: Any, value: Any) -> Any:
    """A list whose wrong items become `None` if the type allows it (places keep their meaning), and are dropped otherwise."""
    if not isinstance(value, list | tuple):
        return _WRONG
    items = [_typed(inner, item) for item in value]
    if NoneType in get_args(inner):
        return [None if item is _WRONG else item for item in items]
    return [item for item in items if item is not _WRONG]


def _typed_dict(inner: Any, value: Any) -> Any:
    """A mapping without its wrong items."""
    if not isinstance(value, dict):
        return _WRONG
    typed = {str(key): _typed(inner, item) for key, item in value.items()}
    return {key: item for key, item in typed.items() if item is not _WRONG}


def _typed_scalar(kind: type, value: Any) -> Any:
    if kind is bool:
        return value if isinstance(value, bool) else _WRONG
    if kind is str:
        return value if isinstance(value, str) else _WRONG if value is None else json.dumps(value, default=str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _WRONG
    try:
        number = float(value)
    except OverflowError:
        return _WRONG
    if not math.isfinite(number):
        return _WRONG
    return int(value) if kind is int else number
