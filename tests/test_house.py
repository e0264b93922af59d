"""The rooms: which way imports go, what stays light, what travels in the wheel."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "interp_rlhf"
# In the order in which data flows: a room imports only rooms above it. The report stands apart: it reads the run log.
ROOMS = [
    "registry",
    "extensions",
    "runlog",
    "messages",
    "activations",
    "concepts",
    "sae",
    "validation",
    "drift",
    "training",
    "attachment",
    "trainers",
    "report",
    "embedded",
    "demo",
    "recipe",
    "commands",
    "cli",
]
ALLOWED = {room: set(ROOMS[:i]) | {room} for i, room in enumerate(ROOMS)}
ALLOWED["report"] = {"report", "runlog"}
ALLOWED["cli"] = {"cli", "commands", "concepts", "sae", "validation", "extensions", "__init__"}


def imports_of(path: Path) -> set[tuple[str, str]]:
    """(room or outside package, line) of every import of a module, also inside functions."""
    package = ["interp_rlhf", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, str(node.lineno)) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module or "").split(".")]
            names = [".".join(filter(None, [*module, alias.name])) for alias in node.names]
            found |= {(name, str(node.lineno)) for name in names}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room.startswith("__"):
        return
    for name, line in imports_of(path):
        parts = name.split(".")
        if parts[0] == "interp_rlhf":
            target = parts[1] if len(parts) > 1 and parts[1] in ROOMS else "__init__"
            assert target in ALLOWED[room] | {"__init__"}, f"{path.name}:{line}: {room} imports {target}"
        if parts[0] == "trl":
            assert room in {"training", "attachment", "trainers", "demo"}, f"{path.name}:{line} imports TRL"


def modules_after(code: str) -> set[str]:
    command = [sys.executable, "-c", f"import sys\n{code}\nprint(*sorted(m for m in sys.modules if '.' not in m))"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split())


def test_what_must_be_light_imports_neither_torch_nor_trl():
    heavy = {"torch", "trl", "transformers"}
    for code in (
        "import interp_rlhf",
        "import interp_rlhf.cli",
        "import interp_rlhf.report",
        "import interp_rlhf.concepts.card, interp_rlhf.validation.gate",
        "import interp_rlhf.runlog",
    ):
        assert not modules_after(code) & heavy, code


def test_help_takes_less_than_half_a_cpu_second():
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "interp_rlhf", "--help"], check=True, capture_output=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_the_public_names_resolve_and_are_listed():
    import interp_rlhf

    assert sorted(interp_rlhf._HOMES) == sorted(interp_rlhf.__all__)
    for name in interp_rlhf.__all__:
        assert callable(getattr(interp_rlhf, name)), name
    import interp_rlhf.attachment

    assert interp_rlhf.attach is interp_rlhf.attachment.attach
    with pytest.raises(AttributeError, match="has no attribute `attatch`"):
        interp_rlhf.attatch  # noqa: B018


def test_versions_agree_between_project_constraints_and_package():
    import tomllib
    from importlib.metadata import version

    import interp_rlhf

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == interp_rlhf.__version__
    assert project["version"] == yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets"):
        assert version(name).split("+")[0] == pinned[name]
    assert "trl>=1.16,<1.17" in project["dependencies"]


def test_every_shipped_card_loads_and_passes_the_gate_of_its_role():
    from interp_rlhf.concepts.card import load_card
    from interp_rlhf.concepts.readout import Readout
    from interp_rlhf.validation.gate import gate

    cards = sorted((ROOT / "reward").rglob("*.v*.yaml"))
    assert cards
    for path in cards:
        card = load_card(path).card
        Readout.from_card(str(path))
        for holdout in card.holdouts:
            assert (path.parent / holdout).exists()
        if card.role != "monitor":
            assert gate(card) == []


def test_no_registry_host_is_named_and_nothing_is_left_to_do():
    hosts = re.compile(r"pypi\.org|pythonhosted|registry\.npmjs|deb\.debian")
    unfinished = re.compile(r"\b(TODO|FIXME|XXX)\b|NotImplementedError|pickle\.load\b|trust_remote_code=True")
    for path in [
        *PACKAGE.rglob("*.py"),
        *(ROOT / "recipes").rglob("*"),
        ROOT / "Makefile",
        ROOT / ".ci" / "run",
        ROOT / "README.md",
    ]:
        if path.is_file() and path.suffix != ".pyc":
            assert not hosts.search(path.read_text()), path
            assert not unfinished.search(path.read_text()), path


def test_every_slow_test_has_a_command_and_ci_runs_all_of_them_but_one():
    from conftest import _COMMANDS

    makefile, ci = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
    files = [path.name for path in (ROOT / "tests").glob("test_*.py") if "pytest.mark." + "slow" in path.read_text()]
    assert sorted(files) == sorted(_COMMANDS)
    for name, command in _COMMANDS.items():
        recipe = makefile.split(f"\n{command.removeprefix('make ')}: .venv")[1].split("\n\n")[0]
        assert f"tests/{name}" in recipe, name
        assert (f"\n{command}\n" in ci) == (command != "make test-evidence"), command
