"""Names with one underscore in front that are read where they do not belong.

In: parsed modules. Out: reads of other libraries' private names, and reads of our own outside the file that defines them.
A name counts as ours if any module of the package defines it. Methods of named tuples and dunders are public.
"""

from __future__ import annotations

import ast
import re
import sys
from typing import TYPE_CHECKING

from source_tree import PACKAGE, Function

if TYPE_CHECKING:
    from collections.abc import Iterator

    from source_tree import Module

# The two files that may name what other libraries keep private.
BORDERS = ("training/trl.py", "activations/sharding.py")
OF_NAMED_TUPLES = {"_replace", "_asdict", "_fields", "_make", "_field_defaults"}
BY_NAME = ("getattr", "setattr", "hasattr", "delattr")


def is_private(name: str) -> bool:
    return bool(re.match(r"_(?!_)\w", name)) and name not in OF_NAMED_TUPLES


def private_reads(modules: list[Module]) -> tuple[list[str], list[str]]:
    """Offenders among the names of other libraries, and among ours."""
    homes = {module.path: set(_defined(module.tree)) for module in modules}
    ours = set().union(*homes.values())
    theirs_read, ours_read = [], []
    for module in modules:
        for node, name, words in _reads(module.tree):
            if name not in ours and module.path not in BORDERS:
                theirs_read.append(module.at(node, words))
            elif name in ours and name not in homes[module.path]:
                ours_read.append(module.at(node, words))
    return theirs_read, ours_read


def _defined(tree: ast.Module) -> Iterator[str]:
    """Private functions, classes, methods, class fields, module variables and attributes of `self` or `cls`."""
    for node in ast.walk(tree):
        if isinstance(node, Function | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef | ast.Module):
            yield from (target.id for child in node.body for target in _targets(child) if isinstance(target, ast.Name))
        for target in _targets(node):
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) in ("self", "cls"):
                yield target.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "object.__setattr__":
            yield from (str(part.value) for part in node.args[1:2] if isinstance(part, ast.Constant))


def _targets(node: ast.AST) -> Iterator[ast.expr]:
    """What a statement sets, the parts of a tuple one by one."""
    if isinstance(node, ast.Assign):
        every = node.targets
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr | ast.For):
        every = [node.target]
    else:
        every = [item.optional_vars for item in node.items if item.optional_vars] if isinstance(node, ast.With) else []
    for target in every:
        parts = target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
        yield from (part.value if isinstance(part, ast.Starred) else part for part in parts)


def _reads(tree: ast.Module) -> Iterator[tuple[ast.AST, str, str]]:
    """Every private name that is read from something else: the node, the name, the code."""
    standard = _standard_modules(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) not in standard:
            yield node, node.attr, ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BY_NAME:
            named = [str(part.value) for part in node.args[1:2] if isinstance(part, ast.Constant)]
            yield from ((node, name, ast.unparse(node)) for name in named if is_private(name))
        elif isinstance(node, ast.ImportFrom) and not _is_standard(node.module or "", node.level):
            yield from ((node, a.name, ast.unparse(node)) for a in node.names if _is_private_import(node, a.name))


def _is_private_import(node: ast.ImportFrom, name: str) -> bool:
    return is_private(name) and f"{node.module}.{name}" != f"{PACKAGE}._shipped"


def _is_standard(module: str, level: int = 0) -> bool:
    return not level and module.split(".")[0] in sys.stdlib_module_names


def _standard_modules(tree: ast.Module) -> set[str]:
    """The names under which a file knows modules of the standard library, whose types have private names."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    return {alias.asname or alias.name for node in imports for alias in node.names if _is_standard(alias.name)}
