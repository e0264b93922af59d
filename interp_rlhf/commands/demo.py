"""`interp-rlhf demo`: the whole story on the embedded model.

In: parsed arguments. Out: the summary on the terminal. The story itself is in the room `demo`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse


def demo(arguments: argparse.Namespace) -> int:
    """`interp-rlhf demo`."""
    if arguments.steps is not None and arguments.steps < 1:
        raise ValueError(f"`--steps` is {arguments.steps} – expected at least 1.")
    # TRL takes seconds to import, so a wrong `--steps` is refused before that.
    from ..demo.story import DemoSettings, quick_settings, run_demo

    settings = DemoSettings(seed=arguments.seed)
    if arguments.quick:
        settings = quick_settings(settings)
    if arguments.steps is not None:
        settings = replace(settings, steps=arguments.steps)
    summary = run_demo(arguments.out, settings, arguments.model, arguments.quick)
    if arguments.json:
        print(json.dumps(summary))
    else:
        _print_summary(summary, arguments.out)
    return 0


def _print_summary(summary: dict[str, Any], out: str) -> None:
    print()
    for arm, numbers in summary["arms"].items():
        gains = ", ".join(
            _shown_gain(key, numbers[f"{key}_gain"]) for key in ("probe_score", "monitor_score", "vader")
        )
        print(
            f"{arm:>5}: {gains}; KL {numbers['last_step']['kl']:.2f}, "
            f"{numbers['extra_forward_passes_for_the_reward']} extra passes"
        )
    print(f"probe − sham: {_shown_gain('probe_score', summary['probe_minus_sham']['probe_score_gain'])}")
    print(f"\n{out}/summary.json and {out}/report.html after {summary['seconds'] / 60:.1f} minutes")


def _shown_gain(name: str, gain: dict[str, Any]) -> str:
    return f"{name} {gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"
