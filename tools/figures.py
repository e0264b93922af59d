"""What is counted in a package, one function per figure.

In: the modules of the package. Out: a `Figure` with its offenders, each as `path:line what`. It must not know git or the
command line.
"""

from __future__ import annotations

import ast
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from import_graph import chains, cycles, graph_of, imports_in_functions, targets
from names import assigned_names, far_uses
from private_names import private_reads
from source_tree import Function

if TYPE_CHECKING:
    from source_tree import Module

FUNCTION_LINES, FILE_LINES, DEPTH, PARAMETERS = 60, 450, 8, 10


@dataclass(frozen=True)
class Figure:
    """A count with a limit, if it has one, and what was counted."""

    key: str
    title: str
    value: float
    offenders: list[str] = field(default_factory=list)
    limit: int | None = None

    @property
    def within(self) -> bool:
        return self.limit is None or self.value <= self.limit


def counted(key: str, title: str, offenders: list[str], limit: int | None = None) -> Figure:
    """A figure that is the number of its offenders, which are sorted by file and line."""
    return Figure(key, title, len(offenders), sorted(offenders, key=_place), limit)


def _place(offender: str) -> tuple[str, int]:
    path, line = offender.split()[0].split(":")
    return path, int(line)


def figures_of(modules: list[Module]) -> list[Figure]:
    return [
        *sizes(modules),
        *long_functions(modules),
        long_files(modules),
        *import_figures(modules),
        isinstance_on_terms(modules),
        *private_figures(modules),
        *names_taken_twice(modules),
        without_example(modules),
        counted("variables", "`found`, `own`, `given` more than 2 lines on", far_uses(modules)),
        *lazy_imports(modules),
        many_parameters(modules),
        *broad_excepts(modules),
    ]


def length(function: Function) -> int:
    """Lines of a function with its docstring, decorators left out."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def _functions(modules: list[Module]) -> list[tuple[Module, str, Function]]:
    return [(module, name, function) for module in modules for name, function in module.functions()]


def sizes(modules: list[Module]) -> list[Figure]:
    files = {module.path: module.lines for module in modules}
    functions = {f"{m.path}:{f.lineno} {name}": length(f) for m, name, f in _functions(modules)}
    made = [Figure("files", "files", len(files)), Figure("lines", "lines", sum(files.values()))]
    for what, lengths in (("file", files), ("function", functions)):
        longest = max(lengths, key=lambda name: lengths[name], default="")
        median = statistics.median(lengths.values()) if lengths else 0
        made += [
            Figure(f"{what}_median", f"median {what}, lines", median),
            Figure(f"{what}_max", f"longest {what}, lines", lengths.get(longest, 0), [longest] if longest else []),
        ]
    return made


def long_functions(modules: list[Module]) -> list[Figure]:
    long = [(module, name, f) for module, name, f in _functions(modules) if length(f) > FUNCTION_LINES]
    parsers = [item for item in long if item[0].room == "cli" and _adds_arguments(item[2])]
    said = {kind: [m.at(f, f"{name}: {length(f)} lines") for m, name, f in items] for kind, items in (
        ("functions", [item for item in long if item not in parsers]), ("parsers", parsers),
    )}  # fmt: skip
    return [
        counted("functions", f"functions over {FUNCTION_LINES} lines", said["functions"], 0),
        counted("parsers", f"argument parsers in cli over {FUNCTION_LINES} lines", said["parsers"]),
    ]


def _adds_arguments(function: Function) -> bool:
    return any(isinstance(node, ast.Attribute) and node.attr == "add_argument" for node in ast.walk(function))


def long_files(modules: list[Module]) -> Figure:
    long = [f"{module.path}:1 {module.lines} lines" for module in modules if module.lines > FILE_LINES]
    return counted("long_files", f"files over {FILE_LINES} lines", long, 0)


def import_figures(modules: list[Module]) -> list[Figure]:
    graph, paths = graph_of(modules), {module.name: module.path for module in modules}
    longest = chains(graph)
    deepest = max(map(len, longest.values()), default=0)
    said = [
        f"{paths[name]}:1 {len(chain)}: {' > '.join(chain)}"
        for name, chain in sorted(longest.items(), key=lambda item: (-len(item[1]), item[0]))
        if len(chain) > DEPTH or len(chain) == deepest
    ]
    rings = [f"{paths[ring[0]]}:1 {' <> '.join(ring)}" for ring in cycles(graph)]
    return [
        Figure("depth", "import depth, modules", deepest, said, DEPTH),
        counted("cycles", "import cycles", rings, 0),
    ]


def term_classes(modules: list[Module]) -> set[str]:
    """The base of the loss terms and every class below it, by name: in `training/terms/`, or in `training/regularizers.py`."""
    classes = {
        node.name: {ast.unparse(base).split(".")[-1].split("[")[0] for base in node.bases}
        for module in modules
        if is_home_of_terms(module)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
    }
    terms = {"Regularizer"} & set(classes)
    if any(module.path.startswith("training/terms/") for module in modules):
        terms |= {"Term"} & set(classes)
    while more := {name for name, bases in classes.items() if bases & terms} - terms:
        terms |= more
    return terms


def is_home_of_terms(module: Module) -> bool:
    return module.path.startswith("training/terms/") or module.path == "training/regularizers.py"


def isinstance_on_terms(modules: list[Module]) -> Figure:
    terms = term_classes(modules)
    asked = [
        module.at(node, ast.unparse(node))
        for module in modules
        if not is_home_of_terms(module)
        for node in ast.walk(module.tree)
        if _asks_for_class(node, terms)
    ]
    return counted("isinstance", "`isinstance` on term classes outside them", asked, 0)


def _asks_for_class(node: ast.AST, classes: set[str]) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass"):
        return bool(_last_names(node.args[-1]) & classes)
    if isinstance(node, ast.Compare) and ast.unparse(node.left).startswith("type("):
        return any(_last_names(other) & classes for other in node.comparators)
    return isinstance(node, ast.MatchClass) and bool(_last_names(node.cls) & classes)


def _last_names(node: ast.AST) -> set[str]:
    """The names in an expression, without what stands before a dot."""
    plain = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return plain | {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}


def private_figures(modules: list[Module]) -> list[Figure]:
    theirs, ours = private_reads(modules)
    return [
        counted("private", "private names of other libraries", theirs, 0),
        counted("own_private", "our private names read in another file", ours, 0),
    ]


def names_taken_twice(modules: list[Module]) -> list[Figure]:
    """Names that two modules define. The module that comes last in the flow of data, by its imports, is the offender."""
    homes: dict[str, list[str]] = defaultdict(list)
    depth = {name: len(chain) for name, chain in chains(graph_of(modules)).items()}
    for module in sorted(modules, key=lambda module: (depth[module.name], module.path)):
        for name, line in assigned_names(module.tree).items():
            homes[name].append(f"{module.path}:{line}")
    twice = {name: places for name, places in homes.items() if len(places) > 1}
    said = {name: f"{places[-1]} {name}, also {', '.join(places[:-1])}" for name, places in twice.items()}
    return [
        counted("twice", "public module-level names defined twice", _starting(said, private=False), 0),
        counted("private_twice", "private module-level names defined twice", _starting(said, private=True), 0),
    ]


def _starting(said: dict[str, str], private: bool) -> list[str]:
    return [words for name, words in said.items() if name.startswith("_") == private]


def exported_names(modules: list[Module]) -> list[str]:
    """What `__all__` of the package lists."""
    for module in modules:
        for node in module.tree.body:
            if not module.name and isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                return list(ast.literal_eval(node.value))
    return []


def without_example(modules: list[Module]) -> Figure:
    """Exported classes and functions of whose docstring, or that of `__init__`, no line has `>>>`."""
    homes: dict[str, list[tuple[Module, ast.AST]]] = defaultdict(list)
    for module in modules:
        for node in module.tree.body:
            if isinstance(node, Function | ast.ClassDef):
                homes[node.name].append((module, node))
    missing = []
    for name in exported_names(modules):
        places = homes.get(name, [])
        if not any(_has_example(node) for _, node in places):
            missing.append(
                places[-1][0].at(places[-1][1], name) if places else f"__init__.py:1 {name} is defined nowhere"
            )
    return counted("examples", "exported names without an example", missing, 0)


def _has_example(node: ast.AST) -> bool:
    made = [child for child in ast.iter_child_nodes(node) if isinstance(child, Function) and child.name == "__init__"]
    return any(">>>" in (ast.get_docstring(part) or "") for part in (node, *made))  # type: ignore[arg-type]


def lazy_imports(modules: list[Module]) -> list[Figure]:
    names = {module.name for module in modules}
    every = [(module, node) for module in modules for node in imports_in_functions(module)]
    own = [(module, node) for module, node in every if targets(module, node, names)]
    return [
        counted("lazy", "imports in functions", [m.at(node, ast.unparse(node)) for m, node in every]),
        counted("own_lazy", "… of our own modules", [m.at(node, ast.unparse(node)) for m, node in own]),
    ]


def many_parameters(modules: list[Module]) -> Figure:
    many = []
    for module, name, function in _functions(modules):
        a = function.args
        named = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if p]
        number = len([parameter for parameter in named if parameter not in ("self", "cls")])
        if number > PARAMETERS:
            many.append(module.at(function, f"{name}: {number} parameters"))
    return counted("parameters", f"functions with more than {PARAMETERS} parameters", many)


def broad_excepts(modules: list[Module]) -> list[Figure]:
    """Handlers of everything; and those after which nothing is raised, neither there nor later from what they kept."""
    broad = {
        id(node): (module, node, _raised(scope))
        for module in modules
        for scope in (module.tree, *(function for _, function in module.functions()))
        for node in ast.walk(scope)
        if isinstance(node, ast.ExceptHandler) and _is_broad(node)
    }
    said = [(module.at(node, _caught(node)), _raises(node, raised)) for module, node, raised in broad.values()]
    return [
        counted("excepts", "broad excepts", [words for words, _ in said]),
        counted(
            "hiding_excepts", "… after which nothing is raised", [words for words, raises in said if not raises], 0
        ),
    ]


def _is_broad(node: ast.ExceptHandler) -> bool:
    return node.type is None or bool(_last_names(node.type) & {"Exception", "BaseException"})


def _raised(scope: ast.AST) -> set[str]:
    """The variables that a function raises."""
    raised = [node.exc for node in ast.walk(scope) if isinstance(node, ast.Raise)]
    return {error.id for error in raised if isinstance(error, ast.Name)}


def _raises(node: ast.ExceptHandler, raised: set[str]) -> bool:
    kept = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    return bool(kept & raised) or any(isinstance(part, ast.Raise) for part in ast.walk(node))


def _caught(node: ast.ExceptHandler) -> str:
    return f"except {ast.unparse(node.type)}" if node.type else "except"
