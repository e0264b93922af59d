"""Names that are assigned: at module level, and the three variables that say nothing.

In: parsed modules. Out: module-level names with their lines, and the far uses of `found`, `own` and `given`.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from import_graph import is_type_checking
from source_tree import Function

if TYPE_CHECKING:
    from collections.abc import Iterator

    from source_tree import Module

EMPTY_WORDS, NEAR = ("found", "own", "given"), 2
OpensScope = Function | ast.Lambda | ast.ClassDef | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


def assigned_names(tree: ast.Module) -> dict[str, int]:
    """Classes, functions and variables at module level with the line of the first definition.

    Left out: `logger`, and names with two underscores, whose meaning Python fixes.
    """
    names: dict[str, int] = {}
    for node in _statements(tree):
        for name in _defined(node):
            if name != "logger" and not (name.startswith("__") and name.endswith("__")):
                names.setdefault(name, node.lineno)
    return names


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Statements at module level, those under `if`, `try` and `with` included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        if isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler) and not is_type_checking(child):
            yield from _statements(child)


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, Function | ast.ClassDef):
        return [node.name]
    targets = (
        node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    )
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]


@dataclass
class Scope:
    """What a function or comprehension binds: each name with the lines where it is set. `outer` is searched next."""

    outer: Scope | None = None
    lines: dict[str, list[int]] = field(default_factory=dict)

    def set(self, name: str, line: int) -> None:
        if name in EMPTY_WORDS:
            self.lines.setdefault(name, []).append(line)

    def holder(self, name: str) -> Scope | None:
        return self if name in self.lines else self.outer and self.outer.holder(name)


def far_uses(modules: list[Module]) -> list[str]:
    """Assignments of `found`, `own` or `given` that are read more than two lines further down, or only further up."""
    said = []
    for module in modules:
        far: dict[tuple[int, str], int] = {}
        _visit(module.tree, Scope(), far)
        said += [f"{module.path}:{line} {name}, used in line {use}" for (line, name), use in sorted(far.items())]
    return said


def _visit(node: ast.AST, scope: Scope, far: dict[tuple[int, str], int]) -> None:
    """Collects far uses in the scope that `node` opens, then in the scopes inside it."""
    inside = list(_in_scope(node))
    _bind(node, inside, scope)
    for part in inside:
        if isinstance(part, OpensScope):
            _visit(part, Scope(scope), far)
        elif isinstance(part, ast.Name) and (isinstance(part.ctx, ast.Load) or _is_augmented(part, inside)):
            _note(part, scope, far)


def _in_scope(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below `node` that share its scope; a node that opens another scope comes, but not what is in it."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, OpensScope):
            yield from _in_scope(child)


def _bind(node: ast.AST, inside: list[ast.AST], scope: Scope) -> None:
    statements = {id(part): s for s in inside if isinstance(s, ast.Assign | ast.AnnAssign) for part in ast.walk(s)}
    for part in inside:
        if isinstance(part, ast.arg):
            scope.set(part.arg, part.lineno)
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            scope.set(part.id, getattr(statements.get(id(part), part), "end_lineno", part.lineno))


def _is_augmented(name: ast.Name, inside: list[ast.AST]) -> bool:
    return any(isinstance(part, ast.AugAssign) and part.target is name for part in inside)


def _note(use: ast.Name, scope: Scope, far: dict[tuple[int, str], int]) -> None:
    holder = scope.holder(use.id)
    if holder is None:
        return
    lines = holder.lines[use.id]
    augmented = isinstance(use.ctx, ast.Store)
    before = [line for line in lines if line < use.lineno or (line == use.lineno and not augmented)]
    line = max(before, default=min(lines))
    if abs(use.lineno - line) > NEAR:
        far.setdefault((line, use.id), use.lineno)
