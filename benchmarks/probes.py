"""How good probes are on labelled texts and on a concept planted in one token, and how long a sweep and evidence take.

Four parts, all by default; `--part` picks some. `--quick` takes made-up texts and a tiny random model.

sets     Forty labelled sets, SmolLM2-135M-Instruct after block 15, some hundred examples to fit on, 300 to test on. On the same
         mean-pooled activations: `LinearProbe` with its calibration, scikit-learn's `LogisticRegressionCV`, probelab's
         `Logistic`, and the probe of version 0.2. On the same texts: mean, last and attention pooling, and what the folds pick.
  auroc_minus_<other>         held-out AUROC, ours less theirs, mean over sets; higher is better
  log_loss_minus_<other>      held-out log-loss in nats, mean over sets; lower is better
  calibration_slope_<whose>   slope of the held-out labels on the log-odds, median over sets; 1 is right, less is overconfident
  fit_seconds_vs_<other>      CPU time of a fit, ours over theirs, median over sets
  auroc_<pooling>_minus_mean  held-out AUROC less that of mean pooling, mean over sets
  …_shared_data               the same of the sets of `../shared/data` alone, which nothing was tuned on
planted  Normal noise, 200 tokens a row; one token of each positive row is shifted by 8 standard deviations along one direction.
  planted_auroc_<pooling>_<D>  held-out AUROC, mean over seeds
  filler_change_<D>            mean absolute change of the attended score when 500 tokens of fresh noise are appended to each row,
                               over the standard deviation of the scores, mean over seeds
  repeated_filler_change_<D>   the same for one token of noise that is repeated 500 times, another one in each row
sweep    `fit_probe` over 10 hook points, 300 texts.
  sweep_vs_0_2                 its CPU time over that of the steps that version 0.2 took
  sweep_all_poolings_vs_0_2    the same with a choice of mean, last and attention pooling
evidence `check_card` on 300 answers, of a probe after block 20 that was fitted on 300 others.
  evidence_vs_0_2              its CPU time over that of the steps that version 0.2 took

scikit-learn's row is the better of raw and standardized activations, by the mean over sets of the measure that is compared.
Methods that weigh both labels alike (ours, 0.2's) get the log of the fit's label ratio added to their log-odds, because the
others know it. probelab is a comparator only (`pip install 'interp-rlhf[bench]'`); without it `not_run` says so. Sets come from
the wheel of `sae-probes`, which pip fetches into `runs/benchmarks/`, and from `../shared/data`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import synthetic
import torch
from probes_planted import run_planted
from probes_sets import run_sets
from probes_time import run_evidence, run_sweep
from quantities import Quantity
from timing import command, installed_version, machine, parser, prepare, print_what_was_measured
from transformers import AutoModelForCausalLM, AutoTokenizer

NOT_INSTALLED = "not installed (pip install 'interp-rlhf[bench]')"
NOISE = "normal noise, no model"
# Each takes model, tokenizer and arguments.
PARTS: dict[str, Callable[[Any, Any, Any], tuple[list[Quantity], dict[str, Any]]]] = {
    "sets": run_sets,
    "planted": lambda model, tokenizer, arguments: run_planted(arguments),
    "sweep": run_sweep,
    "evidence": run_evidence,
}


def report(part: str, quantities: Sequence[Quantity]) -> None:
    """Prints the table of one part."""
    print(f"\nprobes, {part}: mean or median [95 % bootstrap interval]; CPU time unless it says wall\n")
    width = max(len(one.name) for one in quantities)
    for one in quantities:
        figure = f"{one.value:7.4g} [{one.interval[0]:.4g}, {one.interval[1]:.4g}]"
        print(f"{one.name:<{width}}  {figure:<30} {one.target and f'target {one.target}':<14} {one.note}".rstrip())


def as_json(quantities: Sequence[Quantity], settings: dict[str, Any], arguments: Any) -> dict[str, Any]:
    """Figures and settings of some parts, in the form of the other benchmarks."""
    about = machine()
    versions = {
        name: version for name in ("scikit-learn", "numpy", "probelab") if (version := installed_version(name))
    }
    about["versions"] |= versions
    return {
        "benchmark": "probes",
        "ratios": {one.name: one.value for one in quantities},
        "pairs": arguments.pairs,
        "settings": {
            "seed": arguments.seed,
            "quick": arguments.quick,
            "command": command("probes"),
            "intervals": {one.name: one.interval for one in quantities},
            "targets": {one.name: one.target for one in quantities if one.target},
            "notes": {one.name: one.note for one in quantities if one.note},
            "not_run": {} if installed_version("probelab") else {"probelab": NOT_INSTALLED},
            **about,
            **settings,
        },
    }


def main() -> None:
    made = parser(__doc__, pairs=3)
    made.set_defaults(model="embedded")
    made.add_argument(
        "--part", action="append", choices=list(PARTS), help="only this part; may be given several times"
    )
    made.add_argument("--out", type=Path, help="JSON file; parts that did not run now stay in it as they are")
    arguments = made.parse_args()
    prepare(arguments)
    chosen = [part for part in PARTS if part in (arguments.part or PARTS)]
    model = tokenizer = None
    every: list[Quantity] = []
    with synthetic.subject(arguments, 1024) as (subject, _):
        if chosen != ["planted"]:
            tokenizer = (
                AutoTokenizer.from_pretrained(subject.folder) if subject.real else synthetic.make_byte_tokenizer()
            )
            model = AutoModelForCausalLM.from_pretrained(subject.folder, dtype=torch.float32).eval()
        parts: dict[str, Any] = {}
        for part in chosen:
            quantities, settings = PARTS[part](model, tokenizer, arguments)
            settings["model"] = NOISE if part == "planted" else subject.name
            report(part, quantities)
            every += quantities
            parts[part] = as_json(quantities, settings, arguments)
            if arguments.out:
                before = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
                arguments.out.write_text(json.dumps({**before, part: parts[part]}, indent=1) + "\n")
    whole = as_json(every, {"model": subject.name, "parts": chosen}, arguments)
    print_what_was_measured(whole["settings"])
    if arguments.json:
        print(json.dumps(whole))


if __name__ == "__main__":
    main()
