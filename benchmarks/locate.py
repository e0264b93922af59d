"""Attribution patching against exact patching, against forwards, and against TransformerLens.

`quality`: outputs of attention and MLP of every block, patched exactly at all positions, for three concepts. Rank correlation of
attribution with the exact effect, and how many of the five largest effects are among the five largest attributions, both for the
plain gradient and for gradients along the way (`--steps`). `cost`: one attribution of a pair over a forward of its two prompts.
`peer`: the same attribution (heads and MLP out, by position) over TransformerLens' `attribution_patch` on its bridge without
weight processing, and the largest difference of the results over the largest of theirs. It needs `transformer-lens`: `make
bench-locate`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import synthetic
import torch
from contrasts import CONTRASTS, TARGETED
from contrasts import Row as Pair
from timing import Row, alternate, finish, parser, prepare, rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from interp_rlhf import attribution_patching

VOCABULARY = 4096  # of `--quick`
PARTS = ("quality", "cost", "peer")
NOT_INSTALLED = (
    "transformer-lens is not installed here; `make bench-locate` runs this part in an environment that has it"
)


def made_up() -> dict[str, list[Pair]]:
    """Pairs in the vocabulary of a random model."""
    words = {"clean": "w5 w{} w9 w11", "corrupt": "w6 w{} w9 w11", "followed": " w20", "violated": " w21"}
    return {"made_up": [{key: text.format(30 + i) for key, text in words.items()} for i in range(3)]}


def quality(
    model: Any, tokenizer: Any, contrasts: dict[str, list[Pair]], steps: int
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of every concept, and its effects by site."""
    rows, effects = [], {}
    for name, pairs in contrasts.items():
        plain = attribution_patching(model, tokenizer, pairs, random=None, split=None, progress=True)
        along = attribution_patching(model, tokenizer, pairs, steps=steps, top=0, random=0, split=None, progress=True)
        sites = plain.exact[0].sites
        exact = np.array([one.exact for one in sites])
        estimates = {
            "": np.array([one.attribution for one in sites]),
            f"_{steps}_steps": np.array([one.site.value(along.attribution) for one in sites]),
        }
        for suffix, estimate in estimates.items():
            rows.append(
                Row(f"spearman_{name}{suffix}", [rank_correlation(estimate, exact)], "≥ 0.9", f"{len(sites)} sites")
            )
            rows.append(
                Row(f"recall_at_5_{name}{suffix}", [recall(estimate, exact, 5)], "≥ 0.8", f"{len(pairs)} pairs")
            )
        effects[name] = {
            "clean": float(np.mean(plain.clean)), "corrupt": float(np.mean(plain.corrupt)),
            "sites": [
                [str(one.site), *(round(float(value), 5) for value in (one.exact, *(e[i] for e in estimates.values())))]
                for i, one in enumerate(sites)
            ],
        }  # fmt: skip
    return rows, effects


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def recall(estimate: np.ndarray, exact: np.ndarray, count: int) -> float:
    largest = [set(np.argsort(-np.abs(values), kind="stable")[:count].tolist()) for values in (estimate, exact)]
    return len(largest[0] & largest[1]) / count


def cost(model: Any, tokenizer: Any, pairs: list[Pair], repeats: int) -> list[Row]:
    """One attribution of a pair over one forward of its clean and of its corrupt prompt."""
    pair = pairs[0]
    ids = [tokenizer(pair[side], return_tensors="pt")["input_ids"] for side in ("clean", "corrupt")]

    def forwards() -> None:
        with torch.no_grad():
            for one in ids:
                model(one, use_cache=False)

    def ours() -> None:
        attribution_patching(model, tokenizer, pair, top=0, random=0, split=None)

    return rows_of("attribution_vs_forwards_of_the_pair", alternate(ours, forwards, repeats, "cost"), "≤ 4")


def peer(folder: Path, model: Any, tokenizer: Any, pairs: list[Pair], repeats: int) -> list[Row]:
    """Ours over TransformerLens', on the same pair and the same weights, and how far the results are apart."""
    names = ("attribution_vs_transformer_lens", "difference_from_transformer_lens")
    try:
        from transformer_lens.model_bridge import TransformerBridge
        from transformer_lens.tools.analysis.attribution_patching import attribution_patch
    except ImportError:
        return [Row(name, [], target, NOT_INSTALLED) for name, target in zip(names, ("≤ 1", "≤ 1e-4"), strict=True)]
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
    bridge.eval()
    pair = pairs[0]
    clean, corrupt = (tokenizer(pair[side], return_tensors="pt")["input_ids"] for side in ("clean", "corrupt"))
    followed, violated = (
        tokenizer(pair[side], add_special_tokens=False)["input_ids"][-1] for side in ("followed", "violated")
    )

    def margin(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, followed] - logits[0, -1, violated]

    def theirs() -> Any:
        return attribution_patch(bridge, clean, corrupt, margin)

    def ours() -> Any:
        return attribution_patching(model, tokenizer, pair, components=("heads", "mlp"), top=0, random=0, split=None)

    found = ours().attribution
    scores = theirs().node_scores
    gaps = []
    for node, score in scores.items():
        if node.kind != "embed":
            own = found["mlp"][node.layer] if node.kind == "mlp_out" else found["heads"][node.layer, node.head]
            gaps.append(abs(float(own[node.position]) - score))
    largest = max(abs(score) for node, score in scores.items() if node.kind != "embed")
    difference = Row(names[1], [max(gaps) / largest], "≤ 1e-4", f"{len(gaps)} heads and MLPs by position")
    return [*rows_of(names[0], alternate(ours, theirs, repeats, "peer"), "≤ 1"), difference]


def main() -> None:
    made = parser(__doc__, pairs=9)
    made.add_argument("--part", action="append", choices=PARTS, help="what to measure; may be repeated (default: all)")
    made.add_argument(
        "--concept", action="append", choices=sorted(CONTRASTS), help="which; may be repeated (default: three)"
    )
    made.add_argument("--steps", type=int, default=3, help="gradients along the way (default: %(default)s)")
    made.set_defaults(model="embedded")
    arguments = made.parse_args()
    prepare(arguments)
    parts = arguments.part or PARTS
    rows: list[Row] = []
    more: dict[str, Any] = {}
    with synthetic.subject(arguments, VOCABULARY) as (subject, _):
        tokenizer = AutoTokenizer.from_pretrained(subject.folder)
        model = AutoModelForCausalLM.from_pretrained(subject.folder, dtype=torch.float32).eval()
        named = {name: CONTRASTS[name] for name in arguments.concept or TARGETED}
        contrasts = named if subject.real else made_up()
        first = next(iter(contrasts.values()))
        if "cost" in parts:
            rows += cost(model, tokenizer, first, arguments.pairs)
        if "peer" in parts:
            rows += peer(subject.folder, model, tokenizer, first, arguments.pairs)
        if "quality" in parts:
            found, effects = quality(model, tokenizer, contrasts, arguments.steps)
            rows += found
            more = {"columns": ["site", "exact", "attribution", f"{arguments.steps} steps"], "effects": effects}
    finish(
        "locate",
        rows,
        arguments,
        {"model": subject.name, "pairs_of_prompts": {k: len(v) for k, v in contrasts.items()}, **more},
    )


if __name__ == "__main__":
    main()
