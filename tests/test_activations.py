"""Hook points, identity, `read()` and the tap, on five families of models, plain and with LoRA."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import make_model, make_readout, sentences, with_lora

from interp_rlhf.activations import (
    ConceptScores,
    Tap,
    TokenBatch,
    decoder_layers,
    embedding_point,
    identity,
    read,
    read_activations,
    read_means,
    reference_pass,
    resolve,
    tokenize_examples,
    unwrap,
)
from interp_rlhf.activations.hook_points import output_tensor
from interp_rlhf.concepts.readout import Readout


@pytest.fixture(params=["plain", "lora"])
def model(request, load, family):
    loaded = load(family)
    return with_lora(loaded) if request.param == "lora" else loaded


def batch_of(tokenizer, count=6, seed=0):
    rows = [
        {"prompt": p, "completion": c} for p, c in zip(sentences(count, seed), sentences(count, seed + 1), strict=True)
    ]
    return tokenize_examples(rows, tokenizer)


def padded(batch: TokenBatch, left: list[int], right: int) -> TokenBatch:
    """The same rows with `left[i]` and at least `right` pad tokens around them."""
    width = int(batch.attention_mask.sum(1).max()) + max(left) + right
    ids = torch.full((len(batch), width), 1)
    attention, completion = (
        torch.zeros(len(batch), width, dtype=torch.bool),
        torch.zeros(len(batch), width, dtype=torch.bool),
    )
    for i, start in enumerate(left):
        n = int(batch.attention_mask[i].sum())
        ids[i, start : start + n] = batch.input_ids[i, :n]
        attention[i, start : start + n] = True
        completion[i, start : start + n] = batch.completion_mask[i, :n]
    return TokenBatch(ids, attention, completion)


def counted(scores: ConceptScores) -> torch.Tensor:
    return scores.scores[scores.mask]


def truth(model, batch, readout):
    """Scores row by row, without any padding, through transformers' own hidden states."""
    layer = decoder_layers(model).index(readout.hook_point)
    found = []
    for row in range(len(batch)):
        n = int(batch.attention_mask[row].sum())
        with torch.no_grad():
            # hidden_states[0] is the embedding, hidden_states[i + 1] the output of layer i (but for the last layer).
            states = unwrap(model)(batch.input_ids[row : row + 1, :n], output_hidden_states=True).hidden_states[
                layer + 1
            ]
        found.append(readout(states)[0][batch.completion_mask[row, :n]])
    return torch.cat(found)


def test_read_gives_the_layers_own_activations(model, tokenizer):
    batch, readout = batch_of(tokenizer), make_readout(model, layer=1)
    scores = read(model, batch, [readout])["concept"]
    torch.testing.assert_close(counted(scores), truth(model, batch, readout), atol=1e-5, rtol=1e-5)


def test_scores_do_not_depend_on_padding_order_or_batch(model, tokenizer):
    batch, readout = batch_of(tokenizer), make_readout(model)
    expected = counted(read(model, batch, [readout])["concept"])
    for left, right in (([0] * 6, 9), ([5, 0, 3, 8, 1, 2], 0), ([7] * 6, 4)):
        found = read(model, padded(batch, left, right), [readout], batch_tokens=40)["concept"]
        torch.testing.assert_close(counted(found), expected, atol=1e-5, rtol=1e-5)
    order = [4, 0, 5, 2, 1, 3]
    shuffled = TokenBatch(batch.input_ids[order], batch.attention_mask[order], batch.completion_mask[order])
    whole, apart = (
        read(model, batch, [readout])["concept"],
        read(model, shuffled, [readout], batch_tokens=1)["concept"],
    )
    torch.testing.assert_close(apart.scores, whole.scores[order], atol=1e-5, rtol=1e-5)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_padding_of_any_rows_gives_the_same_scores(tokenizer, data):
    model = make_model("gpt2", tokenizer)  # learned positions: the family that padding hurts
    rows = data.draw(st.lists(st.lists(st.integers(5, 200), min_size=2, max_size=12), min_size=1, max_size=5))
    batch = TokenBatch.from_ids([row[:1] for row in rows], [row[1:] for row in rows])
    left = data.draw(st.lists(st.integers(0, 9), min_size=len(rows), max_size=len(rows)))
    readout = make_readout(model)
    expected = counted(read(model, batch, [readout])["concept"])
    found = counted(
        read(model, padded(batch, left, data.draw(st.integers(0, 5))), [readout], batch_tokens=16)["concept"]
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_means_and_activations_agree_with_scores(model, tokenizer):
    batch, readout = batch_of(tokenizer), make_readout(model)
    point = readout.hook_point
    scores = read(model, batch, [readout])["concept"]
    means = read_means(model, batch, [point])[point] @ readout.weight + readout.bias
    by_hand = torch.stack([scores.scores[i, scores.mask[i], 0].mean() for i in range(len(batch))])
    torch.testing.assert_close(means, by_hand, atol=1e-4, rtol=1e-4)
    activations = read_activations(model, batch, [point], batch_tokens=20)[point]
    torch.testing.assert_close(readout(activations), counted(scores), atol=1e-5, rtol=1e-5)


def test_reading_stops_at_the_deepest_hook_point(load, tokenizer):
    model = load("llama")
    ran = []
    for name in decoder_layers(model):
        resolve(model, name).register_forward_hook(lambda *_, name=name: ran.append(name))
    model.lm_head.register_forward_hook(lambda *_: ran.append("lm_head"))
    read(model, batch_of(tokenizer), [make_readout(model, layer=0), make_readout(model, name="second", layer=1)])
    assert ran == decoder_layers(model)[:2]  # neither the third layer nor the head


def test_the_model_is_left_as_it_was(load, tokenizer):
    model = load("gpt2", attn_pdrop=0.1, resid_pdrop=0.1)
    model.train()
    model.transformer.h[0].eval()
    flags = {name: module.training for name, module in model.named_modules()}
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    readout = make_readout(model)
    first, second = (read(model, batch_of(tokenizer), [readout])["concept"].scores for _ in range(2))
    assert torch.equal(first, second)  # no dropout
    assert torch.equal(state, torch.random.get_rng_state())
    assert flags == {name: module.training for name, module in model.named_modules()}
    assert hooks == sum(len(module._forward_hooks) for module in model.modules())


def test_hooks_are_gone_after_an_exception(load, tokenizer):
    model = load("llama")

    class Broken:
        name, hook_point = "broken", "model.layers.1"

        def __call__(self, activation):
            raise KeyError("a readout's own mistake")

    with pytest.raises(KeyError, match="own mistake"):
        read(model, batch_of(tokenizer), [Broken()])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert read(model, batch_of(tokenizer), [make_readout(model)])["concept"].mask.any()


def test_hook_points_are_the_same_plain_peft_and_prepared(load, family):
    from accelerate import Accelerator

    plain = load(family)
    points = decoder_layers(plain)
    assert len(points) == 3
    layer = resolve(plain, points[1])
    adapted = with_lora(plain)
    assert resolve(adapted, points[1]) is layer
    prepared = Accelerator(cpu=True).prepare_model(adapted)
    assert resolve(prepared, points[1]) is layer
    assert resolve(torch.compile(adapted, backend="eager"), points[1]) is layer
    assert embedding_point(prepared) == embedding_point(plain)


def test_a_misspelt_hook_point_names_its_nearest(load):
    with pytest.raises(ValueError, match=r"`model.layer.1` – expected.*`model.layers.1`.*`model.layers.2`"):
        resolve(load("llama"), "model.layer.1")


def test_identity_survives_adapters_and_precision_and_nothing_else(load, tokenizer, family):
    model = load(family)
    first, last = decoder_layers(model)[0], decoder_layers(model)[-1]
    known = identity(model, last)
    assert identity(model, first) != known
    assert identity(load(family).to(torch.bfloat16), last) == known
    assert identity(with_lora(model), last) == known
    other = make_model(family, tokenizer, seed=1)
    assert identity(other, last) != known
    norm = next(p for n, p in load(family).named_parameters() if p.dim() == 1 and ("norm" in n or "ln_" in n))
    assert norm.dim() == 1
    tuned = load(family)
    next(p for n, p in tuned.named_parameters() if p.dim() == 1 and ("norm" in n or "ln_" in n)).data[0] += 0.5
    assert identity(tuned, last) != known


def test_text_completions_are_tokenized_once_and_their_ids_taken_as_they_are(tokenizer):
    prompt = [{"role": "user", "content": "help me"}]
    odd = [*tokenizer("wa")["input_ids"], *tokenizer("rm")["input_ids"]]  # not how the tokenizer would split `warm`
    assert odd != tokenizer("warm")["input_ids"]
    batch = tokenize_examples(
        [{"prompt": prompt, "completion": "warm", "completion_ids": [*odd, tokenizer.eos_token_id]}], tokenizer
    )
    start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])
    assert batch.input_ids[0, start:].tolist() == [*odd, tokenizer.eos_token_id]
    assert batch.completion_mask[0].nonzero().squeeze(1).tolist() == list(
        range(start, start + len(odd))
    )  # not the end


def test_messages_and_prompt_with_completion_are_the_same_tokens(tokenizer):
    asked, said = {"role": "user", "content": "help"}, {"role": "assistant", "content": "warm day"}
    forms = [
        {"messages": [asked, said]},
        {"prompt": [asked], "completion": [said]},
        {"prompt": [asked], "completion": "warm day"},
    ]
    batch = tokenize_examples(forms, tokenizer)
    assert torch.equal(batch.input_ids[0], batch.input_ids[1])
    assert torch.equal(batch.input_ids[0], batch.input_ids[2])
    assert tokenizer.decode(batch.input_ids[0][batch.completion_mask[0]]) == "warm day"
    with pytest.raises(ValueError, match=r"Example 0: it has `messages` that do not end with the assistant"):
        tokenize_examples([{"messages": [asked]}], tokenizer)
    with pytest.raises(ValueError, match=r"Example 1 has the keys \['answer'\]"):
        tokenize_examples(["text", {"answer": "x"}], tokenizer)


def test_the_tap_tells_policy_reference_and_generation_apart(load, tokenizer):
    model = with_lora(load("llama"))
    batch, readout = batch_of(tokenizer), make_readout(model)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}
    with Tap(model, [readout], ("policy_no_grad", "reference")) as tap:
        model(**inputs, use_cache=False)  # with gradient: seen, not recorded
        with torch.no_grad():
            model(**inputs, use_cache=False)
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
            with model.disable_adapter():
                model(**inputs, use_cache=False)
        read(model, batch, [readout])  # ours: not recorded
        kinds = [found.kind for found in tap.take()]
        tap.require_fired()
    assert kinds == ["policy_no_grad", "reference"]
    assert not any(module._forward_hooks for module in model.modules())


def test_the_taps_scores_are_those_of_read(model, tokenizer):
    batch, readout = batch_of(tokenizer), make_readout(model)
    expected = counted(read(model, batch, [readout])["concept"])
    with Tap(model, [readout], ("policy_no_grad",)) as tap, torch.no_grad():
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False)
        (found,) = tap.take()
    assert torch.equal(found.input_ids, batch.input_ids)
    torch.testing.assert_close(found.scores["concept"][batch.completion_mask], expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_named_ref_is_the_reference(load, tokenizer):
    from peft import LoraConfig

    model = with_lora(load("llama"))
    model.add_adapter("ref", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    batch, readout = batch_of(tokenizer), make_readout(model)
    model.set_adapter("ref")
    expected = read(model, batch, [readout])["concept"].scores
    model.set_adapter("default")
    with Tap(model, [readout]) as tap, reference_pass(model) as reference, torch.no_grad():
        found = read(reference, batch, [readout])["concept"].scores
        model(input_ids=batch.input_ids, use_cache=False)
        assert [p.kind for p in tap.take()] == ["reference"]
    assert torch.equal(found, expected)
    assert model.active_adapter == "default"


def test_a_hook_point_that_never_fires_stops_the_run(load, tokenizer):
    model = load("llama")
    compiled = torch.compile(model, backend="eager")
    batch = batch_of(tokenizer)
    compiled(batch.input_ids)  # compiled before the hooks were added
    with Tap(compiled, [make_readout(model)]) as tap:
        compiled(batch.input_ids)
        with pytest.raises(RuntimeError, match=r"`model.layers.1` saw no policy pass.*`torch_compile`"):
            tap.require_fired()


def test_a_hook_point_of_quantized_numbers_is_refused(load, tokenizer):
    model = load("llama")
    inner = model.model.layers[1].mlp
    inner.register_forward_hook(lambda module, args, output: (output * 16).to(torch.int8))
    batch = batch_of(tokenizer)
    with pytest.raises(ValueError, match=r"activation is of type `torch.int8` – expected .*Read at a decoder layer"):
        read(model, batch, [Readout("inside", "model.layers.1.mlp", torch.ones(32))])
    assert read(model, batch, [make_readout(model)])["concept"].problem() is None


def test_readouts_are_computed_in_float32_under_autocast(load, tokenizer):
    model, batch = load("llama"), batch_of(tokenizer)
    readout, seen = make_readout(model), []
    model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output_tensor(output)))
    with Tap(model, [readout], ["policy_no_grad"]) as tap, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        (found,) = tap.take()
        rough = readout(seen[0].float())
    exact = readout(seen[0].float())
    assert float((rough.float() - exact).abs().max()) > 1e-3
    torch.testing.assert_close(found.scores["concept"], exact, atol=1e-6, rtol=0)


def test_bad_input_is_refused_with_what_to_do(load, tokenizer):
    model = load("gpt2")
    readout = make_readout(model)
    with pytest.raises(ValueError, match="no `tokenizer`"):
        read(model, ["text"], [readout])
    with pytest.raises(ValueError, match="vocabulary of"):
        read(model, TokenBatch.from_ids([[1]], [[10**6]]), [readout])
    with pytest.raises(ValueError, match=r"300 tokens – expected at most 256"):
        read(model, TokenBatch.from_ids([[1]], [[5] * 299]), [readout])
    with pytest.raises(ValueError, match="Two readouts are named `concept`"):
        read(model, batch_of(tokenizer), [readout, make_readout(model, layer=0)])
    with pytest.raises(RuntimeError, match="`lm_head` did not fire"):
        read(model, batch_of(tokenizer), [Readout("head", "lm_head", torch.zeros(3))])


def test_a_nan_activation_raises_and_names_the_token(load, tokenizer):
    model = load("llama")
    model.model.embed_tokens.weight.data[tokenizer("warm")["input_ids"][0]] = torch.nan
    readout = make_readout(model)
    scores = read(model, [{"prompt": "a", "completion": "warm"}], [readout], tokenizer=tokenizer)["concept"]
    with pytest.raises(ValueError, match=r"Readout `concept` gives \[nan\] at row 0, token 1"):
        readout.score(scores)
