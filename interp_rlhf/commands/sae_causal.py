"""`interp-rlhf sae causal`: the causal check of single latents, and of the set of them.

In: parsed arguments. Out: lines on the terminal; with `--out`, JSON and plots. The check is in `validation.causal`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..concepts.artifact import write_atomically
from ..concepts.causal_plot import plot_causal
from ..concepts.readout import Readout
from ..embedded import load_or_embedded
from ..sae.files import load_sae
from ..validation.causal import causal_check
from .causal import causal_inputs, directions_at
from .causal_lines import causal_lines
from .options import autoencoder_place, latent_numbers, typed_command

if TYPE_CHECKING:
    import argparse

    from ..concepts.causal_findings import CausalFindings
    from ..sae.autoencoder import SparseAutoencoder


def sae_causal(arguments: argparse.Namespace) -> int:
    """`interp-rlhf sae causal`."""
    chosen = latent_numbers(arguments.latents) or []
    asked = causal_inputs(arguments)
    out = Path(arguments.out) if arguments.out is not None else None
    if out is not None and (out / "causal.json").exists():
        raise ValueError(f"`{out}` holds a causal check already – expected a new folder. Pass another `--out`.")
    model, tokenizer, _ = load_or_embedded(arguments.model)
    sae = load_sae(arguments.sae, model=model, **autoencoder_place(arguments))
    sae.check_model(model)
    findings: dict[str, CausalFindings] = {}
    for readout in latent_readouts(sae, chosen):
        foreign = directions_at(readout.hook_point, asked["foreign"])
        findings[readout.name] = causal_check(
            readout, model, tokenizer, command=typed_command(), progress=True, **{**asked, "foreign": foreign}
        )
        if out is not None:  # written as they come: what is done stays if the next one stops
            out.mkdir(parents=True, exist_ok=True)
            content = {name: one.model_dump() for name, one in findings.items()}
            write_atomically(out / "causal.json", (json.dumps(content, indent=1) + "\n").encode())
            plot_causal(findings[readout.name], out / f"{readout.name}.svg", readout.name)
    if arguments.json:
        print(json.dumps({name: one.model_dump() for name, one in findings.items()}))
    else:
        for name, one in findings.items():
            print(f"\n{name}" + "\n".join(causal_lines(one)))
    return int(arguments.require_causal and any(one.verdict != "causal" for one in findings.values()))


def latent_readouts(sae: SparseAutoencoder, chosen: list[int]) -> list[Readout]:
    """A readout of each latent, and one of all together if there are several: the sum of what they write.

    Raises:
        `ValueError`: no latent, or an autoencoder that writes elsewhere than it reads.
    """
    if not chosen:
        raise ValueError(
            "`--latents` names none – expected some, such as 12,80. `interp-rlhf sae find` suggests some."
        )
    if sae.spec.output_point is not None:
        raise ValueError(
            f"The autoencoder is a transcoder from `{sae.spec.hook_point}` to `{sae.spec.output_point}` – expected one that "
            "writes where it reads: one place is steered."
        )
    sets = [[index] for index in chosen] + ([chosen] if len(chosen) > 1 else [])
    return [
        Readout(
            f"latent-{part[0]}" if len(part) == 1 else "set", sae.spec.hook_point, torch.ones(len(part)),
            latents=sae.latents(part),
        )
        for part in sets
    ]  # fmt: skip
