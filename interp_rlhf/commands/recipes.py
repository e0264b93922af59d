"""`interp-rlhf recipes`: copy the launch scripts and configurations that come with the package.

In: parsed arguments. Out: files, and the next command on the terminal.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ..concepts.card import locate

if TYPE_CHECKING:
    import argparse


def recipes_copy(arguments: argparse.Namespace) -> int:
    """`interp-rlhf recipes copy`."""
    target = Path(arguments.folder) / "recipes"
    files = copy_recipes(target, arguments.force)
    if arguments.json:
        print(json.dumps({"folder": str(target), "files": files}))
        return 0
    print(f"{len(files)} files in {target}; {target / 'README.md'} says what each recipe asks and what to look at")
    print(f"next: cd {shlex.quote(str(target.parent))} && accelerate launch --config_file recipes/accelerate_configs/cpu.yaml "
          "recipes/dpo.py --config recipes/keep_a_concept/dpo/config_anchor.yaml")  # fmt: skip
    return 0


def copy_recipes(target: Path, force: bool = False) -> list[str]:
    """Copy all recipes into a folder; returns their paths inside it.

    Raises:
        `ValueError`: the folder holds files that differ from the package's, and `force` is not set. Nothing is copied then.
    """
    source = locate("recipes/README.md").parent
    files = sorted(f for f in source.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    copies = {file: target / file.relative_to(source) for file in files}
    changed = [str(copy) for file, copy in copies.items() if copy.exists() and copy.read_bytes() != file.read_bytes()]
    if changed and not force:
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in changed)} – expected no file that differs from the package's: "
            "nothing was copied. Choose another folder, or pass --force to overwrite."
        )
    for file, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return [str(file.relative_to(source)) for file in files]
