"""`tools/measure.py` on small made-up packages, whose figures are counted by hand in each test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMITS = (
    "cycles", "isinstance", "private", "own_private", "hiding_excepts", "functions", "long_files", "depth", "twice",
    "private_twice", "examples",
)  # fmt: skip


def run(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "measure.py", *map(str, arguments)], capture_output=True, text=True
    )


def indented(code):
    return "".join(f"    {line}\n" for line in code.splitlines())


def write(root, files):
    for path, text in {"__init__.py": "", **files}.items():
        place = root / "interp_rlhf" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)


def measure(root, files):
    """The figures of a package that consists of `files`, and a function that lists a figure's offenders."""
    write(root, files)
    figures = json.loads(run("--root", root, "--json").stdout)
    values = {key: figure["value"] for key, figure in figures.items()}
    return values, lambda key: run("--root", root, "--list", key).stdout.splitlines()


def function(name, lines):
    """A function of so many lines, docstring included."""
    return f'def {name}():\n    """Says something."""\n' + "    x = 1\n" * (lines - 2)


def test_files_lines_and_lengths_are_counted_with_docstrings(tmp_path):
    # a.py: 3 + 5 lines, b.py: 1 line, __init__.py: 0. Functions of 3 and 5 lines.
    files = {"a.py": function("f", 3) + function("g", 5), "b.py": "x = 1\n"}
    values, _ = measure(tmp_path, files)
    assert (values["files"], values["lines"]) == (3, 9)
    assert (values["file_median"], values["file_max"]) == (1, 8)
    assert (values["function_median"], values["function_max"]) == (4, 5)


def test_only_a_function_of_more_than_sixty_lines_is_long_and_parsers_are_named_apart(tmp_path):
    parser = function("add_read", 61).replace("    x = 1\n", "    parser.add_argument()\n", 1)
    rooms = function("just", 60) + "class A:\n" + indented(function("long", 61))
    files = {"rooms.py": rooms, "cli.py": parser + function("not_a_parser", 61)}
    values, offenders = measure(tmp_path, files)
    assert values["functions"] == 2
    assert offenders("functions") == ["cli.py:62 not_a_parser: 61 lines", "rooms.py:62 A.long: 61 lines"]
    assert offenders("parsers") == ["cli.py:1 add_read: 61 lines"]


def test_only_a_file_of_more_than_450_lines_is_long(tmp_path):
    values, offenders = measure(tmp_path, {"a.py": "x = 1\n" * 450, "b.py": "x = 1\n" * 451})
    assert values["long_files"] == 1
    assert offenders("long_files") == ["b.py:1 451 lines"]


def test_depth_counts_the_modules_of_the_longest_chain_that_runs_on_import(tmp_path):
    """`top > a.one > a.two > low` is a chain of four. Imports of types and in functions would make it five and six."""
    lazy = "def f():\n    from . import top\n"
    types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a.one import x\nelse:\n    from .low import y\n"
    files = {
        "top.py": "from .a.one import x\n",
        "a/__init__.py": "",
        "a/one.py": "from . import two\n",
        "a/two.py": "try:\n    import interp_rlhf.low\nexcept ImportError:\n    raise\n",
        "low.py": lazy,
        "types.py": types,
        "facade.py": "import json\nfrom .a import one as other\n",
    }
    values, offenders = measure(tmp_path, files)
    assert values["depth"] == 4
    assert offenders("depth") == [
        "facade.py:1 4: facade > a.one > a.two > low", "top.py:1 4: top > a.one > a.two > low",
    ]  # fmt: skip
    assert values["cycles"] == 0
    assert (values["lazy"], values["own_lazy"]) == (1, 1)
    assert offenders("own_lazy") == ["low.py:2 from . import top"]


def test_a_cycle_is_found_once_and_a_cycle_of_types_is_none(tmp_path):
    files = {
        "a.py": "from .b import x\n",
        "b.py": "from .c import x\n",
        "c.py": "from interp_rlhf.a import x\n",
        "d.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .e import x\n",
        "e.py": "from .d import x\n",
    }
    values, offenders = measure(tmp_path, files)
    assert values["cycles"] == 1
    assert offenders("cycles") == ["a.py:1 a <> b <> c"]


TERMS = "class Term: ...\nclass Loss(Term): ...\nclass Anchor(Loss): ...\nclass Batch: ...\n"
ASKING = """
isinstance(x, Anchor)
isinstance(x, (int, terms.Loss))
isinstance(x, Batch | int)
type(x) is Term
issubclass(x, Anchor | int)
"""


@pytest.mark.parametrize(
    ("home", "terms"),
    [("training/terms/term.py", TERMS), ("training/regularizers.py", TERMS.replace("Term", "Regularizer"))],
)
def test_isinstance_on_a_term_counts_outside_the_home_of_terms(tmp_path, home, terms):
    """Of the five questions, that about `Batch` is about no term."""
    asking = ASKING if "terms" in home else ASKING.replace("Term", "Regularizer")
    values, offenders = measure(tmp_path, {home: terms + asking, "training/loss.py": asking})
    assert values["isinstance"] == 4
    assert [line.split()[0] for line in offenders("isinstance")] == [
        f"training/loss.py:{line}" for line in (2, 3, 5, 6)
    ]


def test_a_term_in_another_file_of_the_room_counts_by_its_base(tmp_path):
    files = {
        "training/terms/term.py": "class Term: ...\n",
        "training/terms/anchor.py": "class Anchor(term.Term): ...\n",
        "a.py": "match x:\n    case Anchor():\n        pass\n",
    }
    assert measure(tmp_path, files)[0]["isinstance"] == 1


PRIVATE = """
import argparse
from trl.trainer import _helper
class Ours:
    _field: int = 0
    def __init__(self):
        self._set, self._other = 1, 2
        object.__setattr__(self, "_frozen", 1)
    def _method(self):
        trainer._metrics
        getattr(trainer, "_logs", None)
        self._tokenizer
        self._set, self._other, self._frozen, self._field, self._method()
        named._replace(x=1), thing.__dict__, argparse._SubParsersAction
"""


def test_private_names_of_other_libraries_count_outside_their_two_files(tmp_path):
    """Four: an imported name, `_metrics`, `_logs` by its name and `_tokenizer`, which only a base class can have set."""
    values, offenders = measure(
        tmp_path,
        {"a.py": PRIVATE, "training/trl.py": "trainer._metrics\n", "activations/sharding.py": "model._modules\n"},
    )
    assert values["private"] == 4
    assert offenders("private") == [
        "a.py:3 from trl.trainer import _helper", "a.py:10 trainer._metrics",
        "a.py:11 getattr(trainer, '_logs', None)", "a.py:12 self._tokenizer",
    ]  # fmt: skip
    assert values["own_private"] == 0


def test_our_private_names_count_where_another_file_reads_them(tmp_path):
    files = {
        "a.py": PRIVATE,
        "b.py": "ours._set\nfrom .a import _hidden\n_hidden = 1\n",
        "c.py": "x._method()\nx._frozen\n",
    }
    values, offenders = measure(tmp_path, files)
    assert values["own_private"] == 3
    assert offenders("own_private") == ["b.py:1 ours._set", "c.py:1 x._method", "c.py:2 x._frozen"]


def test_a_module_level_name_counts_once_however_many_modules_define_it(tmp_path):
    """`KINDS` stands in three modules, `_load` in two; `logger`, dunders, imports and names in functions do not count."""
    files = {
        "a.py": "KINDS = 1\nlogger = 1\n__all__ = []\nclass Rollout: ...\ndef _load():\n    inner = 1\n",
        "b.py": "from .a import Rollout\nKINDS: int = 1\nlogger = 2\n__all__ = []\nif True:\n    def _load(): ...\n",
        "c.py": "from .b import Rollout\nONE, KINDS = 1, 2\ndef inner(): ...\n",
    }
    values, offenders = measure(tmp_path, files)
    assert (values["twice"], values["private_twice"]) == (1, 1)
    assert offenders("twice") == ["c.py:2 KINDS, also a.py:1, b.py:2"]
    assert offenders("private_twice") == ["b.py:6 _load, also a.py:5"]


def test_an_exported_name_needs_an_example_in_its_docstring_or_that_of_its_constructor(tmp_path):
    example = '    """Does it.\n\n    >>> f()\n    """\n'
    files = {
        "__init__.py": '__all__ = ["with_one", "without", "Made", "Missing"]\n',
        "a.py": f"def with_one():\n{example}def without(): ...\n",
        "b.py": "class Made:\n    def __init__(self):\n"
        + "\n".join("    " + line for line in example.splitlines())
        + "\n",
    }
    values, offenders = measure(tmp_path, files)
    assert values["examples"] == 2
    assert offenders("examples") == ["__init__.py:1 Missing is defined nowhere", "a.py:6 without"]


VARIABLES = """
def near():
    found = 1
    x = 1
    return found
def far(own):
    found = (
        1,
    )
    x = 1
    y = 1
    return found + own
def closure():
    given = 1
    def inner():
        return 2
    return lambda: given
def comprehension():
    return [
        own
        for own in range(3)
        if own
    ]
def loop():
    found = 0
    for x in range(3):
        found += x
    x = 1
    return found
"""


def test_the_empty_words_may_be_used_in_the_next_two_lines_only(tmp_path):
    """Far are `own` (the parameter, line 6, used in 12), `found` (set in 7 to 9, used in 12) and `given` (14, 17)."""
    values, offenders = measure(tmp_path, {"a.py": VARIABLES})
    assert values["variables"] == 3
    assert offenders("variables") == [
        "a.py:6 own, used in line 12", "a.py:9 found, used in line 12", "a.py:14 given, used in line 17",
    ]  # fmt: skip


def test_ten_parameters_are_not_too_many_and_self_is_not_counted(tmp_path):
    ten = ", ".join(f"p{i}" for i in range(8)) + ", *args, key=1"
    code = f"class A:\n    def ten(self, {ten}): ...\n    def eleven(self, {ten}, **options): ...\n"
    values, offenders = measure(tmp_path, {"a.py": code})
    assert values["parameters"] == 1
    assert offenders("parameters") == ["a.py:3 A.eleven: 11 parameters"]


EXCEPTS = """
try: pass
except: pass
try: pass
except (ValueError, Exception): raise
def kept():
    try: pass
    except BaseException as error: failed = error
    raise failed
def told():
    try: pass
    except ValueError: pass
"""


def test_a_broad_except_hides_unless_something_is_raised(tmp_path):
    """Three are broad: the first hides, the second raises, the third keeps the error and raises it later."""
    values, offenders = measure(tmp_path, {"a.py": EXCEPTS})
    assert (values["excepts"], values["hiding_excepts"]) == (3, 1)
    assert offenders("hiding_excepts") == ["a.py:3 except"]


def test_a_revision_is_measured_from_git_and_stands_next_to_the_working_tree(tmp_path):
    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        subprocess.run(command, check=True, capture_output=True)

    write(tmp_path, {"a.py": "x = 1\n" * 451})
    git("init")
    git("add", ".")
    git("commit", "-m", "Begin")
    write(tmp_path, {"a.py": "x = 1\n" * 450, "b.py": ""})
    both = json.loads(run("--root", tmp_path, "--before", "HEAD", "--json").stdout)
    assert both["long_files"] == {"before": 1, "value": 0, "limit": 0}
    assert both["files"] == {"before": 2, "value": 3, "limit": None}
    assert "| files over 450 lines (`long_files`) | 1 | 0 | 0 |" in run("--root", tmp_path, "--before", "HEAD").stdout
    assert "**1**" in run("--root", tmp_path, "--rev", "HEAD").stdout
    assert run("--root", tmp_path, "--rev", "HEAD", "--check").returncode == 1
    assert run("--root", tmp_path, "--check").returncode == 0
    assert "`nowhere`" in run("--root", tmp_path, "--rev", "nowhere").stderr
    assert "expected one of `cycles`" in run("--root", tmp_path, "--list", "no").stderr


@pytest.fixture(scope="module")
def figures():
    return json.loads(run("--json").stdout)


@pytest.mark.parametrize("key", LIMITS)
def test_the_package_keeps_to_its_limits(figures, key):
    assert figures[key]["value"] <= figures[key]["limit"]
    assert set(LIMITS) == {name for name, figure in figures.items() if figure["limit"] is not None}
