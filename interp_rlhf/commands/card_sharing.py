"""`interp-rlhf card push` and `card pull`.

In: parsed arguments. Out: text on the terminal. The work is in `validation.sharing`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..concepts.card import load_card
from ..validation.gate import gate
from ..validation.sharing import pull_card, push_card

if TYPE_CHECKING:
    import argparse


def card_push(arguments: argparse.Namespace) -> int:
    """`interp-rlhf card push`."""
    pushed = push_card(
        arguments.card, arguments.repo_id, private=arguments.private, revision=arguments.revision,
        message=arguments.message, dry_run=arguments.dry_run,
    )  # fmt: skip
    if arguments.json:
        print(json.dumps(asdict(pushed)))
        return 0
    for name, digest in pushed.files.items():
        print(f"{digest}  {name}")
    if pushed.revision is None:
        print(f"written to {arguments.dry_run}; nothing was sent")
        return 0
    print(f"revision: {pushed.revision}")
    print(f"next: interp-rlhf card pull {pushed.repo_id} --revision {pushed.revision}")
    return 0


def card_pull(arguments: argparse.Namespace) -> int:
    """`interp-rlhf card pull`."""
    pulled = pull_card(
        arguments.source, arguments.out, revision=arguments.revision, card=arguments.card, force=arguments.force
    )
    reasons = gate(load_card(pulled.path).card)
    if arguments.json:
        print(json.dumps({**asdict(pulled), "path": str(pulled.path), "passed": not reasons, "reasons": reasons}))
        return 0
    for name, digest in pulled.files.items():
        print(f"{digest}  {name}" + ("" if name in pulled.written else "  (was here)"))
    print(f"revision: {pulled.revision or 'none, a folder'}")
    print(
        f"card: {pulled.path}, "
        + ("may be a reward" if not reasons else f"may be a monitor only: {'; '.join(reasons)}")
    )
    print(f"next: interp-rlhf card show {pulled.path}")
    return 0
