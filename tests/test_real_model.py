"""The path on the real chat model and real public data; slow."""

from __future__ import annotations

import pytest
import torch

from interp_rlhf.activations import read
from interp_rlhf.concepts.card import load_card, with_evidence
from interp_rlhf.concepts.examples import make_examples
from interp_rlhf.concepts.fitting import fit_probe
from interp_rlhf.concepts.publish import publish
from interp_rlhf.concepts.readout import Readout
from interp_rlhf.validation.check import check_card
from interp_rlhf.validation.gate import gate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def real():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from interp_rlhf.embedded import default_model

    folder = default_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def test_sentiment_is_found_at_block_15_and_passes_its_gate(real, data, tmp_path):
    model, tokenizer = real
    sides = {
        label: (data / "sentiment" / f"rt_polarity_{name}.txt").read_text().splitlines()
        for label, name in ((1, "pos"), (0, "neg"))
    }

    def rows(start, count):
        return make_examples(
            [{"text": text, "label": y} for y, texts in sides.items() for text in texts[start : start + count]]
        )

    train, test = rows(0, 300), rows(3000, 150)
    fit = fit_probe(model, tokenizer, train, ["model.layers.15"], model_id="SmolLM2-135M-Instruct")
    path = publish(fit, tmp_path, name="sentiment", concept="Speaks well of something.")
    evidence = check_card(load_card(path), model, tokenizer, train, test)
    path.write_text(with_evidence(path.read_text(), evidence))
    assert evidence.held_out.probe.auroc >= 0.75
    assert evidence.held_out.probe.auroc > evidence.held_out.embedding.auroc
    assert gate(load_card(path).card) == []
    assert (
        0.6 < evidence.held_out.calibration.slope < 1.7
    )  # a score is a log-odds; 3.9 and 5.1 on the demo's cards of 0.2


def test_the_shipped_card_is_about_this_model_and_tells_warm_from_cold(real):
    model, tokenizer = real
    warmth = Readout.from_card("reward/warmth/reward.v3.yaml")
    warmth.check_model(model)
    prompt = [{"role": "user", "content": "I failed my driving test."}]
    answers = [
        "I am so sorry to hear that. You can do it, do not give up!",
        "Nobody wants you on the road. You are useless.",
    ]
    rows = [{"prompt": prompt, "completion": answer} for answer in answers]
    warm, cold = warmth.score(read(model, rows, [warmth], tokenizer=tokenizer)["warmth"])
    assert warm > cold
