"""Modules that a user's recipe or command names. Importing them registers terms, poolings, measures, formats and metrics.

In: names of modules. Out: nothing; the modules are imported. It must not know what they register.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any


def import_modules(names: Any, where: str) -> None:
    """Import modules in the order in which they are listed.

    Args:
        names (`list[str]`): importable names, such as `my_package.my_terms`.
        where (`str`): how the user wrote the list, for errors: `interp.modules`.

    Raises:
        `ValueError`: not a list of names, or Python finds no such module. An error inside a module is raised as it is.

    Example:
        >>> from interp_rlhf.extensions import import_modules
        >>> import_modules(["json"], "interp.modules")
        >>> import_modules("json", "interp.modules")
        Traceback (most recent call last):
        ValueError: `interp.modules` is 'json' – expected a list of module names, such as `[my_package.my_terms]`.
    """
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"`{where}` is {names!r} – expected a list of module names, such as `[my_package.my_terms]`.")
    for name in names:
        _import(name, where)


def _import(name: str, where: str) -> None:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(
            f"`{where}` names `{name}` – expected a module name, such as `my_package.my_terms`: no path, and no `.py`."
        )
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and one of its own imports is missing
        searched = ", ".join(f"`{folder or '.'}`" for folder in sys.path[:2])
        raise ValueError(
            f"`{where}` names `{name}`, and Python finds no module `{error.name}` – expected an installed module, or one in "
            f"{searched}. Install it, put the file there, or set `PYTHONPATH`."
        ) from None
