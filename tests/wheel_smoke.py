"""Run everything that the documents show, from the place where interp_rlhf is installed: not from the checkout.

Usage: python wheel_smoke.py README.md docs/command_line.md …, in an empty folder. The documents run in the order given. Python
blocks run as they stand, one process each. Of the shell blocks the `interp-rlhf` commands run, with the demo in its quick form.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    import interp_rlhf
    from interp_rlhf.concepts.card import locate

    package = Path(interp_rlhf.__file__).resolve().parent
    assert "site-packages" in package.parts, f"{package} is not an installed wheel"
    assert locate("reward/warmth/reward.v3.yaml").is_relative_to(package)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    passed = 0
    text = "\n".join(Path(document).read_text() for document in sys.argv[1:])
    blocks = re.findall(r"```(python|bash)\n(.*?)```", text, re.DOTALL)
    for language, block in blocks:
        for command in commands_of(language, block):
            started = time.monotonic()
            print(f"$ {shlex.join(command)[:150]}", flush=True)
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode != 0:
                print(done.stdout[-3000:], done.stderr[-3000:], sep="\n")
                raise SystemExit(f"exit code {done.returncode}")
            passed += 1
            print(f"  ok after {time.monotonic() - started:.0f} s", flush=True)
    assert passed >= 10, f"the documents show {passed} things – expected at least ten"
    summary = json.loads(Path("runs/demo/summary.json").read_text())
    extra = {arm: found["extra_forward_passes_for_the_reward"] for arm, found in summary["arms"].items()}
    assert extra == {"probe": 0, "sham": 0}, extra
    print(
        json.dumps(
            {"seconds": summary["seconds"], "probe_minus_sham": summary["probe_minus_sham"]["probe_score_gain"]}
        )
    )
    print(f"{passed} passed, 0 failed")


def commands_of(language: str, block: str) -> list[list[str]]:
    if language == "python":
        return [[sys.executable, "-c", block]]
    lines = block.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("interp-rlhf ")]
    return [[*line, "--quick"] if line[1] == "demo" else line for line in words]


if __name__ == "__main__":
    main()
