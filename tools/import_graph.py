"""Which module imports which while it is being imported, the longest chain of that, and the cycles.

In: the modules of a package. Out: a graph, chains and cycles. It must not know limits.

A module that is imported by its dotted name does not count as an import of the packages above it: their `__init__` files are
nearly empty. It does count where a name is taken from the package itself.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from source_tree import PACKAGE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from source_tree import Module

Import = ast.Import | ast.ImportFrom


def is_type_checking(node: ast.AST) -> bool:
    """True for `if TYPE_CHECKING:`, whose body never runs."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_when_loaded(node: ast.AST) -> Iterator[Import]:
    """The imports that run when the module is imported: outside functions and outside `TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Import):
            yield child
        elif is_type_checking(child):
            for branch in child.orelse:  # type: ignore[attr-defined]
                yield from imports_when_loaded(ast.Module([branch], []))
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports_when_loaded(child)


def imports_in_functions(module: Module) -> list[Import]:
    """The imports that run only when a function is called."""
    nodes = {id(node): node for _, function in module.functions() for node in ast.walk(function)}
    return [node for node in nodes.values() if isinstance(node, Import)]


def targets(module: Module, node: Import, names: Iterable[str]) -> set[str]:
    """The modules of the package, from `names`, that an import statement loads."""
    if isinstance(node, ast.Import):
        dotted = [alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE]
        return {name.removeprefix(PACKAGE).removeprefix(".") for name in dotted}
    base = _base(module, node)
    if base is None:
        return set()
    submodules = {f"{base}.{alias.name}".removeprefix(".") for alias in node.names}
    return {name if name in names else base for name in submodules} & set(names)


def _base(module: Module, node: ast.ImportFrom) -> str | None:
    """Dotted name, within the package, of what stands after `from`; `None` for another library."""
    said = node.module or ""
    if not node.level:
        inside = said.split(".")[0] == PACKAGE
        return said.removeprefix(PACKAGE).removeprefix(".") if inside else None
    package = module.path.split("/")[:-1]
    kept = package[: len(package) - node.level + 1]
    return ".".join([*kept, *filter(None, [said])])


def graph_of(modules: list[Module]) -> dict[str, set[str]]:
    names = {module.name for module in modules}
    edges: dict[str, set[str]] = {}
    for module in modules:
        loaded = [targets(module, node, names) for node in imports_when_loaded(module.tree)]
        edges[module.name] = set().union(*loaded) - {module.name}
    return edges


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of two and more modules that all import one another, directly or through others."""
    reach = {name: _reachable(graph, name) for name in graph}
    groups = {frozenset({name, *(other for other in reach[name] if name in reach[other])}) for name in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    open_ends = [start]
    while open_ends:
        for name in graph[open_ends.pop()] - seen:
            seen.add(name)
            open_ends.append(name)
    return seen


def chains(graph: dict[str, set[str]]) -> dict[str, list[str]]:
    """The longest chain of imports from each module, the module first. No chain runs around a cycle."""
    longest: dict[str, list[str]] = {}

    def chain(name: str, above: tuple[str, ...]) -> list[str]:
        if name not in longest:
            below = [chain(other, (*above, name)) for other in sorted(graph[name]) if other not in (*above, name)]
            longest[name] = [name, *max(below, key=len, default=[])]
        return longest[name]

    return {name: chain(name, ()) for name in graph}
