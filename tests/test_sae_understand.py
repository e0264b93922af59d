"""What latents are: hand-built dictionaries at the token embedding, where a latent's value follows from the token alone."""

from __future__ import annotations

import json
import random

import pytest
import torch
from test_report import Page
from tiny import WORDS, labelled_rows, make_model, sentences

from interp_rlhf.activations import (
    embedding_point,
    read_activations,
    read_means,
    tokenize_examples,
)
from interp_rlhf.cli import main
from interp_rlhf.concepts.examples import make_examples, write_jsonl
from interp_rlhf.concepts.readout import Readout
from interp_rlhf.report import write_report
from interp_rlhf.runlog.log import RunLog, read_run_log
from interp_rlhf.sae.autoencoder import SaeSpec, SparseAutoencoder
from interp_rlhf.sae.contexts import gather_contexts, survey
from interp_rlhf.sae.effects import cosines, final_gain
from interp_rlhf.sae.reading import ReadingOptions, counted_batch, pool_latents
from interp_rlhf.validation.finding import find_latents
from interp_rlhf.validation.inspecting import best_threshold, inspect_latents
from interp_rlhf.validation.split import split_examples

NAMED = [" warm", " cold", " rain"]  # latents 0, 1, 2; latent 3 is never on
TEXTS = [
    "what rain warm day",  # counted: rain warm day; the first token of a context does not count
    "think warm cold sun warm",  # counted: warm cold sun warm
    "good kind sun",  # counted: kind sun
    "you warm rain warm rain",  # counted: warm rain warm rain
]
# 13 counted tokens. warm: 1 + 2 + 0 + 2 = 5; cold: 1; rain: 1 + 2 = 3.
COUNTED, ON = 13, {0: 5, 1: 1, 2: 3, 3: 0}


def token(tokenizer, word):
    (found,) = tokenizer(word)["input_ids"]
    return found


@pytest.fixture(scope="module")
def model(tokenizer):
    """Tied, orthonormal embeddings of the named tokens: each latent answers to its own token only."""
    model = make_model("llama", tokenizer, hidden_size=64, tie_word_embeddings=True)
    rows = model.get_input_embeddings().weight
    with torch.no_grad():
        basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))[0]
        named = [token(tokenizer, word) for word in NAMED]
        rows -= rows @ basis[: len(NAMED)].T @ basis[: len(NAMED)]
        rows[named] = basis[: len(NAMED)]
    return model


def named_sae(model, tokenizer, architecture="standard", **tensors):
    """Latent i is ReLU(⟨h, e_i⟩ − 0.5): 0.5 on its token, 0 on every other, whose component along e_i is 0."""
    rows = model.get_input_embeddings().weight[[token(tokenizer, word) for word in NAMED]].detach()
    rows = torch.cat([rows, torch.zeros(1, rows.shape[1])])
    k = 2 if architecture == "topk" else None
    return SparseAutoencoder(
        SaeSpec(architecture, embedding_point(model), k), encoder=rows, encoder_bias=torch.full((4,), -0.5),
        decoder=rows.clone(), decoder_bias=torch.zeros(rows.shape[1]), **tensors,
    )  # fmt: skip


def test_the_highest_contexts_are_around_the_latents_own_token(model, tokenizer):
    found = inspect_latents(model, tokenizer, named_sae(model, tokenizer), TEXTS, latents=[0, 1, 2], contexts=4)
    for page, word in zip(found.pages, NAMED, strict=True):
        assert page.contexts.top
        for window in page.contexts.top:
            assert window.pieces[window.peak] == word
            assert window.token_ids == tokenizer(TEXTS[window.text])["input_ids"]  # shorter than a window: all of it
            assert "".join(window.pieces) == TEXTS[window.text]
            assert window.position == window.peak
            assert window.value == pytest.approx(0.5, abs=1e-5)
            assert window.activations[0] is None
            for piece, value in list(zip(window.pieces, window.activations, strict=True))[1:]:
                assert value == pytest.approx(0.5 if piece == word else 0.0, abs=1e-5)
    # Equal activations stand in the order of the texts, one window per context, around the first of equal peaks.
    assert [(w.text, w.position) for w in found.pages[0].contexts.top] == [(0, 2), (1, 1), (3, 1)]


def test_density_is_the_counted_share(model, tokenizer):
    sae = named_sae(model, tokenizer)
    found = inspect_latents(model, tokenizer, sae, TEXTS, latents=[0, 1, 2, 3])
    assert (found.whole.texts, found.whole.contexts, found.whole.tokens) == (4, 4, COUNTED)
    for page in found.pages:
        on = ON[page.index]
        assert page.contexts.density == pytest.approx(on / COUNTED)
        assert sum(page.contexts.histogram["counts"]) == on
        assert page.contexts.mean == pytest.approx(0.5 if on else 0.0, abs=1e-5)
    assert found.pages[3].contexts.top == []
    assert found.whole.l0 == pytest.approx(sum(ON.values()) / COUNTED)
    assert found.whole.dead == 1 / 4


def test_negative_windows_are_off_throughout_and_near_misses_come_closest(model, tokenizer):
    how, sae = ReadingOptions(window=1), named_sae(model, tokenizer)
    sae.encoder[0] += 0.4 * sae.encoder[2]  # ` rain` comes to −0.1, every other token but ` warm` to −0.5
    texts = ["you rain the sun the kind warm the", "day hope care night good", "sun night talk rain rain"]
    (page,) = inspect_latents(model, tokenizer, sae, texts, latents=[0], how=how).pages
    for window in (*page.contexts.near, *page.contexts.off):
        assert all(value is None or value == 0 for value in window.activations)
        assert " warm" not in window.pieces
        assert len(window.pieces) <= 3
    assert [window.text for window in page.contexts.near] == [0, 2, 1]
    assert [window.pieces[window.peak] for window in page.contexts.near][:2] == [" rain", " rain"]
    assert [window.value for window in page.contexts.near] == pytest.approx([-0.1, -0.1, -0.5], abs=1e-4)
    again = inspect_latents(model, tokenizer, sae, texts, latents=[0], how=how).pages[0]
    assert again.contexts.off == page.contexts.off


def test_fvu_and_l0_are_those_of_the_counted_tokens_at_once(model, tokenizer):
    sae = named_sae(model, tokenizer)
    batch = tokenize_examples(TEXTS, tokenizer)
    batch.completion_mask[:, 0] = False
    activations = read_activations(model, batch, [sae.spec.hook_point])[sae.spec.hook_point]
    found = survey(model, tokenizer, sae, TEXTS, ReadingOptions(batch_tokens=5))
    assert found.fvu == pytest.approx(sae.fvu(activations), rel=1e-6)
    assert found.l0 == pytest.approx(sae.l0(activations))


def test_a_latent_that_writes_a_tokens_unembedding_promotes_that_token(model, tokenizer):
    sae = named_sae(model, tokenizer)
    found = inspect_latents(model, tokenizer, sae, TEXTS, latents=[0, 1, 2])
    for page, word in zip(found.pages, NAMED, strict=True):
        assert page.promoted[0].piece == word
        assert len(page.promoted) == len(page.suppressed) == 10
    # The model's own norm and head on the decoder row alone: its root mean square is 1/8 (a unit vector of width 64), by which
    # the norm divides.
    row = sae.decoder[0]
    logits = model.lm_head(model.model.norm(row)).detach() / 8
    wanted = logits - logits.mean()
    assert found.pages[0].promoted[0].effect == pytest.approx(float(wanted.max()), rel=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "moe"])
def test_the_gain_of_the_final_norm_is_measured_on_every_family(kind, load):
    model = load(kind)
    norm = model.transformer.ln_f if kind == "gpt2" else model.model.norm
    gain, centred = final_gain(model)
    assert torch.allclose(gain, norm.weight + (1 if kind == "gemma" else 0), atol=1e-4)
    assert centred == (kind == "gpt2")


def test_cosines_are_of_the_decoder_row_and_only_at_the_hook_point_it_writes_to(model, tokenizer):
    sae = named_sae(model, tokenizer)
    along = Readout("along", sae.spec.hook_point, 3 * sae.decoder[1])
    between = Readout("between", sae.spec.hook_point, sae.decoder[0] - sae.decoder[2])
    found = cosines(sae, [0, 1, 2, 3], [along, between])
    half = 0.5**0.5
    expected = [(0, half), (1, 0), (0, -half), (0, 0)]
    for row, (one, other) in zip(found, expected, strict=True):
        assert row == {"along": pytest.approx(one, abs=1e-5), "between": pytest.approx(other, abs=1e-5)}
    elsewhere = Readout("elsewhere", "model.layers.1", torch.ones(64))
    with pytest.raises(
        ValueError, match=r"`elsewhere` at `model.layers.1` – expected readouts at `model.embed_tokens`"
    ):
        inspect_latents(model, tokenizer, sae, TEXTS, latents=[0], readouts=[elsewhere])


def random_sae(model, architecture="jumprelu", seed=0, size=48, point="model.layers.1", **spec):
    drawn = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    tensors = {"threshold": torch.full((size,), 0.2)} if architecture == "jumprelu" else {}
    if architecture == "gated":
        tensors = {name: torch.rand(size, generator=drawn) for name in ("gate_scale", "gate_bias")}
    return SparseAutoencoder(
        SaeSpec(architecture, point, 6 if architecture in ("topk", "groupmax") else None, **spec),
        encoder=torch.randn(size, width, generator=drawn), encoder_bias=torch.randn(size, generator=drawn) - 4,
        decoder=torch.randn(size, width, generator=drawn) / 8, decoder_bias=torch.zeros(width),
        center=torch.randn(width, generator=drawn) / 10, **tensors,
    )  # fmt: skip


ARCHITECTURES = ["standard", "jumprelu", "gated", "topk", "groupmax"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_columns_read_alone_are_those_of_all_latents(model, tokenizer, architecture):
    sae, texts, indices = random_sae(model, architecture), sentences(30, seed=4), [7, 3, 40]
    (alone, none), (_, whole) = (
        gather_contexts(model, tokenizer, sae, texts, indices, ReadingOptions(), whole=whole)
        for whole in (False, True)
    )
    assert none is None
    batch = tokenize_examples(texts, tokenizer)
    batch.completion_mask[:, 0] = False
    dense = sae.encode(read_activations(model, batch, [sae.spec.hook_point])[sae.spec.hook_point])
    for found, index in zip(alone, indices, strict=True):
        column = dense[:, index]
        assert found.index == index
        assert found.density == pytest.approx(float((column > 0).double().mean()))
        assert found.density == pytest.approx(float(whole.density[index]))
        assert found.maximum == pytest.approx(float(column.max()), rel=1e-4)
        if found.top:
            assert found.top[0].value == found.maximum


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_inspection_does_not_depend_on_the_size_of_batches(model, tokenizer, architecture):
    sae, texts = random_sae(model, architecture), sentences(60, seed=5, low=2, high=30)
    found = [
        inspect_latents(
            model, tokenizer, sae, texts, top=5, contexts=4,
            how=ReadingOptions(context_length=12, window=4, batch_tokens=tokens),
        ).event()
        for tokens in (13, 4096)
    ]  # fmt: skip
    one, other = (event["latents"] for event in found)
    for a, b in zip(one, other, strict=True):
        for kind in ("top", "near", "off"):
            assert [(w["text"], w["position"]) for w in a[kind]] == [(w["text"], w["position"]) for w in b[kind]]
        assert (a["index"], a["density"]) == (b["index"], b["density"])
        assert sum(a["histogram"]["counts"]) == sum(b["histogram"]["counts"])
        assert a["histogram"]["edges"] == b["histogram"]["edges"]
    assert found[0]["fvu"] == pytest.approx(found[1]["fvu"], rel=1e-4)


def test_histogram_bins_double_without_losing_a_count(model, tokenizer):
    """The same values in one block and in many: bins that were joined hold what bins made large from the start do."""
    sae, texts = random_sae(model), sentences(60, seed=6)
    (small,), _ = gather_contexts(model, tokenizer, sae, texts, [3], ReadingOptions(batch_tokens=8))
    batch = tokenize_examples(texts, tokenizer)
    batch.completion_mask[:, 0] = False
    column = sae.latents([3])(read_activations(model, batch, [sae.spec.hook_point])[sae.spec.hook_point])[:, 0]
    edges = torch.tensor(small.histogram["edges"])
    assert 17 <= len(edges) - 1 <= 32
    counts = torch.histogram(column[column > 0], edges).hist
    assert (counts - torch.tensor(small.histogram["counts"])).abs().sum() <= 2  # values within rounding of an edge
    assert sum(small.histogram["counts"]) == int((column > 0).sum())


def test_a_long_text_is_cut_and_its_positions_are_those_in_the_text(model, tokenizer):
    text = " ".join(["you"] * 30 + ["warm"] + ["you"] * 30)
    where = tokenizer(text)["input_ids"].index(token(tokenizer, " warm"))
    how = ReadingOptions(context_length=8, window=2)
    found = inspect_latents(model, tokenizer, named_sae(model, tokenizer), [text], latents=[0], how=how)
    (window,) = found.pages[0].contexts.top
    assert (window.text, window.position) == (0, where)
    assert window.pieces[window.peak] == " warm"
    assert found.whole.contexts == 8  # 61 tokens in eights
    assert found.whole.tokens == 61 - 8


def test_a_token_of_outstanding_norm_counts_nowhere(tokenizer):
    model = make_model("llama", tokenizer, hidden_size=64, tie_word_embeddings=True)
    with torch.no_grad():
        model.get_input_embeddings().weight[token(tokenizer, " tree")] *= 100
    sae = random_sae(model, "standard", point=embedding_point(model))
    texts = ["you rain the tree sun", "five day kind good tree", "one talk hope care day"]
    found = inspect_latents(model, tokenizer, sae, texts, latents=[3, 5])
    assert (found.whole.tokens, found.whole.outliers) == (10, 2)
    for page in found.pages:
        for window in page.contexts.top:
            for piece, value in zip(window.pieces, window.activations, strict=True):
                assert (value is None) == (piece == " tree" or piece == window.pieces[0])
    (read,), _ = pool_latents(model, counted_batch(model, tokenizer, texts), [sae.latents([3, 5])])
    for i, page in enumerate(found.pages):
        assert float(read.maxima[:, i].max()) == pytest.approx(page.contexts.maximum, rel=1e-5)


def test_latents_are_chosen_by_what_they_write_or_at_random_among_those_that_are_on(model, tokenizer):
    sae = named_sae(model, tokenizer)
    # Mean activations 5/13, 1/13, 3/13 of 0.5, with decoder rows of norm 1: warm, rain, cold.
    assert [page.index for page in inspect_latents(model, tokenizer, sae, TEXTS).pages[:3]] == [0, 2, 1]
    sae.decoder[1] *= 10  # 10/13 now
    found = inspect_latents(model, tokenizer, sae, TEXTS, top=2)
    assert [page.index for page in found.pages] == [1, 0]
    assert found.pages[0].written == pytest.approx(0.5 * 10 / COUNTED, rel=1e-4)
    drawn = inspect_latents(model, tokenizer, sae, TEXTS, latents="random", top=9, seed=3)
    assert [page.index for page in drawn.pages] == [0, 1, 2]
    assert "among the 3" in drawn.chosen


def test_whatever_cannot_work_is_refused_in_words(model, tokenizer):
    sae = named_sae(model, tokenizer)
    with pytest.raises(ValueError, match=r"Latents \[4\] – expected indices from 0 to 3"):
        inspect_latents(model, tokenizer, sae, TEXTS, latents=[4])
    with pytest.raises(ValueError, match="`latents` is 'best' – expected"):
        inspect_latents(model, tokenizer, sae, TEXTS, latents="best")
    with pytest.raises(ValueError, match="0 tokens count in these texts"):
        inspect_latents(model, tokenizer, sae, ["you"], latents=[0])
    with pytest.raises(ValueError, match="`contexts` is 0 – expected at least 1 window"):
        gather_contexts(
            None, tokenizer, sae, TEXTS, [0], ReadingOptions(), contexts=0
        )  # before the model, which is none, reads
    with pytest.raises(ValueError, match="without `latents`"):
        inspect_latents(model, tokenizer, sae, TEXTS, whole=False)
    with pytest.raises(ValueError, match="0 latents are on anywhere in 2 tokens"):
        inspect_latents(model, tokenizer, sae, ["good kind sun"])


def test_best_threshold_lies_in_the_middle_of_the_gap_with_the_highest_f1():
    import numpy as np

    # Above 2.0: 2 hits of 2, 3 positive, F1 4/5. Above 0.5: 3 hits of 4, F1 6/7. Above 0 nothing more is hit.
    values, labels = np.array([3.0, 3.0, 1.0, 1.0, 0.0]), np.array([1, 1, 1, 0, 0])
    assert best_threshold(values, labels) == 0.5
    assert best_threshold(np.zeros(4), np.array([1, 0, 1, 0])) is None


def rows_of(words, rng):
    """Texts of eight words, with one of the given words at a random place after the first."""
    filler = [word for word in WORDS if word not in ("warm", "cold", "rain", "rude", "sorry")]
    made = []
    for word in words:
        text = rng.choices(filler, k=8)
        if word:
            text[rng.randrange(1, 8)] = word
        made.append(" ".join(text))
    return made


def test_precision_and_recall_are_counted_on_the_half_that_did_not_choose(model, tokenizer):
    # On: in 40 of 50 positives and 10 of 50 negatives. The threshold is 0.25 on whichever half, so on the other half
    # precision is hits / (hits + false) and recall hits / positives, counted here in its texts.
    rng = random.Random(0)
    positives = rows_of(["warm"] * 40 + [None] * 10, rng)
    negatives = rows_of(["warm"] * 10 + [None] * 40, rng)
    rows = [{"text": text, "label": int(i < 50)} for i, text in enumerate(positives + negatives)]
    examples = make_examples(rows)
    found = inspect_latents(
        model, tokenizer, named_sae(model, tokenizer), TEXTS, latents=[0, 3], labelled=examples, seed=1
    )
    _, rest = split_examples(examples, 1)
    said = [" warm" in text for text in rest.texts]
    hits = sum(1 for warm, label in zip(said, rest.labels, strict=True) if warm and label)
    page, dead = (page.detection for page in found.pages)
    assert (page.examples, page.positives) == (50, 25)
    assert page.threshold == pytest.approx(0.25, abs=1e-5)
    assert page.precision == pytest.approx(hits / sum(said))
    assert page.recall == pytest.approx(hits / 25)
    assert (dead.threshold, dead.precision, dead.recall, dead.auroc[0]) == (None, None, 0.0, 0.5)


def test_a_split_parts_prompts_and_keeps_both_labels():
    examples = make_examples(labelled_rows(15))
    fit, rest = split_examples(examples, seed=2, held_out=1 / 3)
    assert (len(fit), len(rest)) == (20, 10)  # a prompt has one answer of each label
    assert not set(fit.groups) & set(rest.groups)
    assert split_examples(examples, 2, 1 / 3)[1].rows == rest.rows
    assert split_examples(examples, 3, 1 / 3)[1].rows != rest.rows
    with pytest.raises(ValueError, match="do not make two parts"):
        split_examples(make_examples([{"text": "a", "label": 0}, {"text": "b", "label": 1}]), 0)


def test_pooled_latents_are_the_mean_and_the_maximum_over_counted_tokens(model, tokenizer):
    batch = counted_batch(model, tokenizer, TEXTS)
    sae = named_sae(model, tokenizer)
    (found, alone), activations = pool_latents(model, batch, [sae.latents(), sae.latents([2, 0])], rows=3)
    means, maxima, l0 = found.means, found.maxima, found.l0
    # warm is on 1 of 3, 2 of 4, 0 of 2 and 2 of 4 counted tokens.
    assert torch.allclose(means[:, 0], 0.5 * torch.tensor([1 / 3, 2 / 4, 0.0, 2 / 4]), atol=1e-5)
    assert torch.allclose(maxima[:, 0], 0.5 * torch.tensor([1.0, 1.0, 0.0, 1.0]), atol=1e-5)
    assert l0 == pytest.approx(9 / COUNTED)
    assert torch.allclose(alone.means, means[:, [2, 0]], atol=1e-6)
    wanted = read_means(model, batch, [sae.spec.hook_point])[sae.spec.hook_point]
    assert torch.allclose(activations, wanted, atol=1e-6)
    with pytest.raises(ValueError, match="Example 1 has no token that counts after its first"):
        counted_batch(model, tokenizer, ["you are", "you"])


@pytest.fixture(scope="module")
def contrast():
    """Warm or not, beside other words, so that only one latent tells; 60 of each."""
    rng = random.Random(1)
    other = [rng.choice(["cold", "rain", None]) for _ in range(60)]
    return rows_of(["warm"] * 60, rng), rows_of(other, rng)


def planted_sae(model, tokenizer, size=40, index=11):
    """A TopK dictionary of random rows, but for one: the embedding of ` warm`."""
    sae = random_sae(model, "topk", size=size, point=embedding_point(model))
    sae.encoder[index] = 4 * model.get_input_embeddings().weight[token(tokenizer, " warm")].detach()
    sae.encoder_bias[:] = 0
    sae.encoder_bias[index] = -1
    return sae


def test_find_ranks_the_planted_latent_first_and_a_random_dictionary_below_it(model, tokenizer, contrast):
    sae = planted_sae(model, tokenizer)
    rows = [{"text": text, "label": label} for label, texts in zip((1, 0), contrast, strict=True) for text in texts]
    found = find_latents(model, tokenizer, sae, make_examples(rows), top=5)
    best = found.latents[0]
    assert (best.index, best.sign, best.fit_auroc) == (11, 1, 1.0)
    assert best.held_out == (1.0, 1.0, 1.0)
    assert len(found.latents) == 5
    assert all(one.fit_auroc <= 1.0 for one in found.latents)
    assert len(found.random) == 3
    assert all(auroc < 0.95 for auroc, *_ in found.random)
    assert found.less_random[1] > 0  # the whole interval
    assert found.examples == (60, 60)
    assert found.l0 <= 6
    assert found.tfidf[0] > 0.95
    again = find_latents(model, tokenizer, sae, make_examples(rows), top=5)
    assert again == found


def test_find_reports_chance_where_labels_say_nothing(model, tokenizer, contrast):
    """The best of 40 latents fits random labels; on examples that the choice did not see, nothing is left of it."""
    texts = sorted({text for own in contrast for text in own})
    gaps = []
    for seed in range(4):
        labels = [i % 2 for i in range(len(texts))]
        random.Random(seed).shuffle(labels)
        rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
        best = find_latents(model, tokenizer, random_sae(model, "topk"), make_examples(rows), dictionaries=1).latents[
            0
        ]
        gaps.append((best.fit_auroc, best.held_out[0]))
    fit, held_out = (sum(side) / len(gaps) for side in zip(*gaps, strict=True))
    assert fit > 0.58, gaps
    assert abs(held_out - 0.5) < 0.08, gaps


def test_no_windows_are_refused_before_anything_is_read(model, tokenizer):
    with pytest.raises(ValueError, match="`contexts` is 0 – expected at least 1"):
        inspect_latents(model, tokenizer, named_sae(model, tokenizer), TEXTS, contexts=0)


def test_find_gives_a_latent_of_the_other_label_its_sign(model, tokenizer, contrast):
    rows = [{"text": text, "label": label} for label, texts in zip((0, 1), contrast, strict=True) for text in texts]
    best = find_latents(model, tokenizer, planted_sae(model, tokenizer), make_examples(rows), dictionaries=1).latents[
        0
    ]
    assert (best.index, best.sign, best.fit_auroc, best.held_out[0]) == (11, -1, 1.0, 1.0)


def test_find_refuses_held_out_examples_that_it_chose_on(model, tokenizer, contrast):
    rows = [{"text": text, "label": label} for label, texts in zip((0, 1), contrast, strict=True) for text in texts]
    examples = make_examples(rows)
    with pytest.raises(ValueError, match="120 rows of the held-out examples are among the fit's"):
        find_latents(model, tokenizer, planted_sae(model, tokenizer), examples, examples)


def test_a_transcoder_is_measured_by_what_it_predicts(model, tokenizer):
    sae = random_sae(
        model, "standard", output_point="model.layers.1.mlp", point="model.layers.1.post_attention_layernorm"
    )
    found = survey(model, tokenizer, sae, TEXTS, ReadingOptions())
    batch = tokenize_examples(TEXTS, tokenizer)
    batch.completion_mask[:, 0] = False
    both = read_activations(model, batch, [sae.spec.hook_point, sae.spec.output_point])
    assert found.fvu == pytest.approx(sae.fvu(both[sae.spec.hook_point], both[sae.spec.output_point]), rel=1e-5)


HOSTILE = "<script>document.title='taken'</script> & </p>"


def hostile_event():
    window = {
        "text": 0, "position": 1, "pieces": ["<b>", HOSTILE, "\n"], "token_ids": [1, 2, 3], "activations": [None, 2.0, 0.5],
        "peak": 1, "value": 2.0,
    }  # fmt: skip
    page = {
        "index": 7, "label": HOSTILE, "density": 0.25, "mean": 1.25, "maximum": 2.0, "written": 0.3, "top": [window],
        "near": [{**window, "activations": [None, 0.0, 0.0], "value": -0.125}], "off": [],
        "histogram": {"edges": [0.0, 1.0, 2.0], "counts": [3, 1]},
        "promoted": [{"token": 5, "piece": HOSTILE, "effect": 0.75}], "suppressed": [], "cosines": {HOSTILE: 0.5},
        "detection": {
            "threshold": 1.0, "precision": 0.8, "recall": 0.625, "auroc": [0.9, 0.85, 0.95], "positives": 8, "examples": 16},
    }  # fmt: skip
    return {
        "sae": {"architecture": "topk", "latents": 4096, "hook_point": "model.layers.3", "source": {HOSTILE: HOSTILE}},
        "chosen": "as given", "concept": HOSTILE, "texts": 2, "contexts": 2, "tokens": 40, "fvu": 0.25, "l0": 31.5, "dead": 0.125,
        "latents": [page],
    }  # fmt: skip


def test_a_page_says_what_the_event_says_and_shows_text_as_text(tmp_path):
    log = RunLog(tmp_path / "interp.jsonl")
    log.append("run", title="Latents", arm="sae inspect", model="tiny")
    log.append("latents", **hostile_event())
    log.append("end", seconds=2)
    write_report(tmp_path, tmp_path / "report.html")
    page, text = Page(tmp_path / "report.html"), (tmp_path / "report.md").read_text()
    assert page.tags.count("script") == 1
    assert not {"b", "img"} & set(page.tags)
    assert page.text.count(HOSTILE) >= 6
    for words in ("topk, 4,096 latents at model.layers.3", "explained variance 0.75", "L0 31.5", "dead 12.5 %", "density 25 %",
                  "0.9 [0.85, 0.95]", "16, 8 positive", "read, not trained", "finished after 2", "Near misses"):  # fmt: skip
        assert words in page.text, words
    for words in ("steps done", "Clipped", "Entropy and clipped ratio"):  # of a training
        assert words not in page.text
    assert ("title", "2") in page.attributes
    assert ("class", "a4 peak") in page.attributes
    alt = "Histogram of the 4 activations of latent 7 that are not zero, from 0 to 2 in 2 bins. The fullest, 0 to 1, holds 3."
    assert ("aria-label", alt) in page.attributes
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert ("href", "#latent-1-0") in page.attributes
    assert "latent-1-0" in ids
    assert "<script>" not in text
    assert "#### Latent 7: " in text
    found = json.loads((tmp_path / "report.json").read_text())["runs"][0]["latents"][0]
    assert found["latents"][0]["contexts"]["top"][0]["activations"] == [None, 2.0, 0.5]


def test_a_training_run_that_logged_latents_shows_both(tmp_path):
    log = RunLog(tmp_path / "interp.jsonl")
    log.append("run", title="Warmth", arm="warmth", model="tiny", trainer="GRPOTrainer")
    log.append("metric", step=4, metrics={"reward": 1.0})
    log.append("latents", step=4, **hostile_event())
    write_report(tmp_path, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    for words in ("GRPOTrainer", "4 steps done", "Latent 7", "Entropy and clipped ratio", "A label is a guess"):
        assert words in page.text


@pytest.mark.parametrize(
    ("values", "levels"),
    [([1e300, 1e-300, 1e-310], [4, 4, 1]), ([1.7e308, 8e307, 1.0], [4, 2, 1]), ([4.0, 2.0, 1.0], [4, 2, 1])],
)
def test_extreme_activations_do_not_lose_the_page(tmp_path, values, levels):
    """Marks are quarters of the maximum; in the first case the maximum said is 1e-300, below the first value."""
    event = hostile_event()
    page = event["latents"][0]
    page["maximum"] = min(values[0], 1e-300 if values[0] == 1e300 else values[0])
    page["top"][0]["activations"] = values
    page["histogram"] = {"edges": [0.0, 5e-324, values[0]], "counts": [3, 1]}
    RunLog(tmp_path / "interp.jsonl").append("latents", **event)
    write_report(tmp_path, tmp_path / "report.html")
    found = Page(tmp_path / "report.html")
    marks = [value.split()[0] for name, value in found.attributes if name == "class" and (value or "")[:2] in
             ("a1", "a2", "a3", "a4")]  # fmt: skip
    assert marks[:4] == ["a1", "a2", "a3", "a4"]  # the legend
    assert marks[4:7] == [f"a{level}" for level in levels]
    assert "nan" not in (tmp_path / "report.html").read_text().split("<svg", 1)[1].split("</svg>", 1)[0]


def test_torn_events_of_latents_do_not_stop_the_report(tmp_path):
    log = RunLog(tmp_path / "interp.jsonl")
    log.append("latents")
    log.append(
        "latents", sae=3, latents=[None, 4, {}, {"top": [{"pieces": ["a"], "activations": []}, {}], "histogram": 2}]
    )
    log.append(
        "latents", latents=[{"index": "x", "histogram": {"edges": [1, 1], "counts": [2]}, "detection": {}, "top": 1}]
    )
    log.append("latents_found")
    log.append("latents_found", concept=["a"], latents=[{}, None], probe=[0.5], random=[[0.5, None, "x"], 3], sae=[])
    write_report(tmp_path, tmp_path / "report.html")
    assert "It is on nowhere in these texts." in Page(tmp_path / "report.html").text


def saved(sae, folder):
    from interp_rlhf.sae.files import save_sae

    save_sae(sae, folder)
    return str(folder)


@pytest.fixture
def files(tmp_path, model, tokenizer, contrast):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    (tmp_path / "warm.txt").write_text("\n".join(contrast[0]))
    write_jsonl([{"text": text} for text in contrast[1]], tmp_path / "other.jsonl")
    return tmp_path, ["--model", str(tmp_path / "model")]


def test_inspect_writes_its_page_and_its_log(files, model, tokenizer, capsys):
    folder, options = files
    sae = saved(named_sae(model, tokenizer), folder / "sae")
    rows = [
        {"text": text, "label": int(" warm" in text)} for text in TEXTS * 1 + ["the sun is good", "rain never helps"]
    ]
    write_jsonl(rows, folder / "labelled.jsonl")
    out = folder / "page" / "inspect.html"
    command = ["sae", "inspect", sae, "--texts", str(folder / "texts.txt"), *options, "--out", str(out)]
    assert main([*command, "--latents", "0,2", "--labelled", str(folder / "labelled.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert f"4 texts, {COUNTED} tokens: FVU" in printed
    assert "38.5 %" in printed  # 5 of 13
    assert "' warm'" in printed
    assert "Latent 0" in Page(out).text
    events = read_run_log(folder / "page" / "inspect.events.jsonl")
    assert [event["event"] for event in events] == ["run", "latents", "end"]
    assert main([*command, "--top", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [page["index"] for page in found["latents"]] == [0, 2]
    assert found["tokens"] == COUNTED
    assert len(read_run_log(folder / "page" / "inspect.events.jsonl")) == 3  # written anew
    assert main([*command[:-1], "page.txt"]) == 2
    assert "`--out` is `page.txt` – expected an HTML file" in capsys.readouterr().err
    assert main([*command, "--latents", "4"]) == 2
    assert "Latents [4] – expected indices from 0 to 3" in capsys.readouterr().err


def test_find_prints_the_latents_beside_their_controls(files, model, tokenizer, capsys):
    folder, options = files
    sae = saved(planted_sae(model, tokenizer), folder / "sae")
    command = [
        "sae",
        "find",
        sae,
        "--positive",
        str(folder / "warm.txt"),
        "--negative",
        str(folder / "other.jsonl"),
        *options,
    ]
    assert main([*command, "--top", "3", "--out", str(folder / "find.html")]) == 0
    printed = capsys.readouterr().out
    first = next(line for line in printed.splitlines() if "latent 11 " in line)
    assert first.split()[:4] == ["latent", "11", "warm", "1.000"]
    for words in ("dense probe", "TF-IDF", "random dictionary 3"):
        assert words in printed
    page = Page(folder / "find.html")
    assert "Latents for warm against other" in page.text
    assert "latent 11 warm 1 1 1 1 –" in page.text
    assert main([*command, "--json", "--top", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["latents"] == [
        {"index": 11, "sign": 1, "fit_auroc": 1.0, "held_out": [1.0, 1.0, 1.0]}
    ]
