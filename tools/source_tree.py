"""The Python files of a package, parsed, from the working tree or from a git revision.

In: the root of a repository and, if wanted, a revision. Out: one `Module` per file. It must not know what is counted.
"""

from __future__ import annotations

import ast
import io
import subprocess
import tarfile
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
PACKAGE = "interp_rlhf"


@dataclass(frozen=True)
class Module:
    """One file: `path` relative to the package, such as `training/ppo/trainer.py`, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def name(self) -> str:
        """Dotted name within the package: `training.ppo.trainer`. The package's own `__init__` has the empty name."""
        parts = self.path.removesuffix(".py").split("/")
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def room(self) -> str:
        return self.path.split("/")[0].removesuffix(".py")

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    def functions(self) -> Iterator[tuple[str, Function]]:
        """Every function and method with its qualified name, nested ones included."""
        yield from _functions(self.tree, "")

    def at(self, node: ast.AST, words: str) -> str:
        """An offender's line: where it stands and what it is."""
        return f"{self.path}:{node.lineno} {words}"  # type: ignore[attr-defined]


def _functions(node: ast.AST, outer: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef):
            name = f"{outer}{child.name}"
            if isinstance(child, Function):
                yield name, child
            yield from _functions(child, f"{name}.")
        else:
            yield from _functions(child, outer)


def working_tree(root: Path) -> list[Module]:
    folder = root / PACKAGE
    return [Module(path.relative_to(folder).as_posix(), path.read_text()) for path in sorted(folder.rglob("*.py"))]


def revision(root: Path, name: str) -> list[Module]:
    """The package as it was at the git revision `name`. Raises `ValueError` if git does not know the revision."""
    command = ["git", "-C", str(root), "archive", name, PACKAGE]
    run = subprocess.run(command, capture_output=True)
    if run.returncode:
        raise ValueError(f"git revision `{name}`: {run.stderr.decode().strip()} – expected a commit, tag or branch")
    with tarfile.open(fileobj=io.BytesIO(run.stdout)) as archive:
        files = [(member.name, archive.extractfile(member)) for member in archive.getmembers() if member.isfile()]
        return [
            Module(path.removeprefix(f"{PACKAGE}/"), file.read().decode())
            for path, file in sorted(files, key=lambda item: item[0])
            if file and path.endswith(".py")
        ]
