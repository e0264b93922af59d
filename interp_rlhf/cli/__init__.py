"""The command line: parsers and help texts. The work is in `commands`.

In: words that a user types. Out: the exit code of a command. It must not import torch, so that `interp-rlhf --help` is quick.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .. import __version__
from ..extensions import import_modules
from .card_parsers import add_card
from .locate_parsers import add_locate
from .probe_parsers import add_drift, add_probe
from .sae_parsers import add_sae
from .shared import MODEL_HELP

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `interp-rlhf`; returns the exit code.

    0: done. 1: a card failed its gate, or a limit is crossed. 2: bad input. 130: interrupted.
    """
    arguments = build_parser().parse_args(argv)
    from safetensors import SafetensorError

    module, name = arguments.run
    try:
        if getattr(arguments, "modules", None):
            sys.path.insert(0, os.getcwd())  # as `python -m` does
            import_modules(arguments.modules, "--module")
        if getattr(arguments, "json", False):
            _keep_stdout_for_json()
        # Only the file of this command is loaded.
        return int(getattr(import_module(f"..commands.{module}", __package__), name)(arguments))
    except (ValueError, FileNotFoundError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SafetensorError as error:
        print(
            f"error: a weights file (`.safetensors`) is broken ({error}) – expected a whole one. Copy it again.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted; the files written so far are kept", file=sys.stderr)
        return 130


def _keep_stdout_for_json() -> None:
    """Import DeepSpeed, if it is installed, with its log on stderr: transformers imports it, and it then logs to stdout."""
    if find_spec("deepspeed") is not None:
        with redirect_stdout(sys.stderr):
            import_module("deepspeed")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="interp-rlhf",
        description="Interpretability inside RLHF training: probes as rewards, regularizers and monitors in TRL's trainers.",
        epilog="Start with `interp-rlhf demo`: the whole story on a real 135M chat model, on a CPU.",
    )
    parser.add_argument("--version", action="version", version=f"interp-rlhf {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(commands)
    add_probe(commands)
    add_card(commands)
    add_locate(commands)
    add_drift(commands)
    add_sae(commands)
    _add_report(commands)
    _add_recipes(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="the whole story on a real chat model, about fifteen minutes on two CPU cores",
        description="Warmth: the model makes contrast data, a probe is fitted and checked, GRPO is run with the probe as its "
        "reward and again with the scores shuffled. Both are compared on held-out prompts by the probe, a holdout monitor and "
        "VADER. Writes data, cards, run logs, summary.json and report.html.",
    )
    demo.add_argument(
        "--quick", action="store_true", help="about four minutes; its figures are too small to mean much"
    )
    demo.add_argument("--steps", type=int, help="optimizer steps of each arm (default: 12, quick: 2)")
    demo.add_argument("--seed", type=int, default=0, help="seed of everything (default: 0)")
    demo.add_argument("--model", help=MODEL_HELP + "; it needs a chat template with system prompts")
    demo.add_argument(
        "--out", default="runs/demo", help="folder to write to; must not hold a finished demo (default: %(default)s)"
    )
    demo.add_argument("--json", action="store_true", help="print the summary as JSON")
    demo.set_defaults(run=("demo", "demo"))


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = commands.add_parser(
        "report",
        help="run logs to one HTML page and one Markdown page",
        description="Turns run logs into a self-contained HTML page and a Markdown page with plots. It works during a run "
        "and after a crash. Several runs are shown side by side.",
        epilog="example: interp-rlhf report runs/demo --out runs/demo/report.html",
    )
    report.add_argument("runs", nargs="+", help="run logs (interp.jsonl), or folders that hold some")
    report.add_argument(
        "--out", default="report.html", help="the HTML file; report.md goes next to it (default: %(default)s)"
    )
    report.add_argument("--title", help="title of the page")
    report.add_argument(
        "--model-card",
        metavar="FILE",
        help="put a section with the verdicts into this Markdown file, such as TRL's README.md",
    )
    report.set_defaults(run=("report", "report"))


def _add_recipes(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    recipes = commands.add_parser("recipes", help="launch scripts and configurations").add_subparsers(
        title="commands", required=True, metavar="COMMAND"
    )
    copy = recipes.add_parser(
        "copy",
        help="copy the recipes that come with the package into a folder",
        description="Copies scripts, YAML, data and accelerate configurations into DIR/recipes. Edit and launch them there."
        " The cards that they name are found in the package.",
        epilog="example: interp-rlhf recipes copy . && accelerate launch --config_file recipes/accelerate_configs/cpu.yaml "
        "recipes/dpo.py --config recipes/keep_a_concept/dpo/config_anchor.yaml",
    )
    copy.add_argument("folder", metavar="DIR", help="folder in which `recipes/` is made")
    copy.add_argument("--force", action="store_true", help="overwrite files that differ")
    copy.add_argument("--json", action="store_true", help="print the files as JSON")
    copy.set_defaults(run=("recipes", "recipes_copy"))
