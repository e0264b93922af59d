"""Registries: names that a recipe or a command can say, and what each of them stands for.

In: a name and an object. Out: the object by its name, or an error that lists the names. One registry per extension point; each
room owns its own and publishes its `register_…` function. Nothing here imports another module of the package.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error about a name: ` Did you mean `…`?` with the nearest known name, or nothing if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean `{near[0]}`?" if near else ""


class Registry(Mapping[str, T], Generic[T]):
    """Objects of one sort by name, in the order in which they were registered.

    Args:
        what (`str`): what an entry is, for errors: "a pooling".

    Example:
        >>> poolings = Registry("a pooling")
        >>> @poolings.register("first")
        ... def first(scores, mask):
        ...     return scores[:, 0]
        >>> sorted(poolings)
        ['first']
    """

    def __init__(self, what: str):
        self.what = what
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters an object under a name.

        Args:
            name (`str`): a lower-case identifier, as it is written in YAML.

        Raises:
            `ValueError`: another object has this name, or the name is not an identifier. To enter the same object again (a module
                that is imported twice under two names) is allowed.
        """
        if not name.isidentifier() or name != name.lower():
            raise ValueError(
                f"The name of {self.what} is {name!r} – expected a lower-case identifier, such as `my_own`."
            )

        def enter(entry: T) -> T:
            known = self._entries.get(name)
            if known is not None and _origin(known) != _origin(entry):
                raise ValueError(
                    f"`{name}` is already registered as {self.what}, by {_place(known)} – expected a new name."
                )
            self._entries[name] = entry
            return entry

        return enter

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise KeyError(
                f"{name!r} is not {self.what} – expected one of {', '.join(f'`{known}`' for known in sorted(self._entries))}."
                + did_you_mean(str(name), self._entries)
            )
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _place(entry: object) -> str:
    """Where an object comes from, for errors."""
    return f"`{getattr(entry, '__module__', '?')}.{getattr(entry, '__qualname__', repr(entry))}`"


def _origin(entry: object) -> tuple[object, object]:
    """File and name of an object: the same for two imports of one module."""
    code = getattr(entry, "__code__", None)
    return (
        getattr(code, "co_filename", None) or getattr(entry, "__module__", None),
        getattr(entry, "__qualname__", entry),
    )
