"""Attribution patching and exact patching: hand-set weights, every family, and models that are left as they were."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import FAMILIES, labelled_rows, make_model, make_readout, with_lora
from torch import nn

from interp_rlhf import attribution_patching
from interp_rlhf.activations.components import component_points, head_count
from interp_rlhf.activations.hook_points import decoder_layers
from interp_rlhf.cli import main
from interp_rlhf.concepts.card import load_card
from interp_rlhf.concepts.examples import write_jsonl
from interp_rlhf.report import write_report
from interp_rlhf.runlog.log import RunLog, read_events

EVERY = ["residual", "attention", "mlp", "heads"]


def pairs(count=4):
    words = ["warm", "cold", "rude", "never", "hope", "tree"][:count]
    return [
        {
            "clean": f"the good {w} day is", "corrupt": f"the bad {w} day is", "followed": " kind", "violated": " rude",
        } for w in words
    ]  # fmt: skip


def one_token(tokenizer, text):
    (token,) = tokenizer(text, add_special_tokens=False)["input_ids"]
    return token


# A toy without any bend: attention gives twice the stream of the token before, the MLP three times its input.


class _Before(nn.Module):
    def __init__(self):
        super().__init__()
        self.o_proj = nn.Linear(2, 2, bias=False)
        self.o_proj.weight.data = 2 * torch.eye(2)

    def forward(self, stream):
        return self.o_proj(torch.cat([torch.zeros_like(stream[:, :1]), stream[:, :-1]], 1))


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = _Before(), nn.Linear(2, 2, bias=False)
        self.mlp.weight.data = 3 * torch.eye(2)

    def forward(self, stream):
        stream = stream + self.self_attn(stream)
        return stream + self.mlp(stream)


class _Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(
            num_hidden_layers=2, num_attention_heads=2, hidden_size=2, is_encoder_decoder=False
        )
        self.config.get_text_config = lambda: self.config
        self.embed = nn.Embedding(4, 2)
        self.embed.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])  # a, b, c, d
        self.layers = nn.ModuleList([_Block(), _Block()])
        self.requires_grad_(False)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        stream = self.embed(input_ids)
        for layer in self.layers:
            stream = layer(stream)
        # Token a has the logit stream[0], token b stream[1].
        return SimpleNamespace(logits=torch.cat([stream, torch.zeros_like(stream)], -1))


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "d": 3}, unk_token="d"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="d", pad_token="d")


def test_on_a_linear_model_attribution_is_the_exact_effect_and_sums_to_the_whole():
    """A block makes 4 (x[t] + 2 x[t−1]) of the stream x; the metric is (1, −1) · x of the last token after two blocks.

    Clean `a c`: streams (1, 0), (1, 1), then (4, 0), (12, 4), then (…), (80, 16): metric 64; corrupt `b c` is its mirror
    image, −64. So the whole is 128. Gradients (times (1, −1)) after block 0: 8 at the first token, 4 at the last; after block
    1: 0 and 1. Residual, block 0: (4, −4) · 8 = 64 and (8, −8) · 4 = 64; block 1: 0 and 128. Attention gives 0 at the first
    token; at the last, block 0: (2, −2) · 16 = 64, block 1: (8, −8) · 4 = 64, half of it per head. MLP, block 0: (3, −3) · 8 =
    48 and (6, −6) · 4 = 48; block 1: 0 and (48, −48) · 1 = 96.
    """
    pair = {"clean": "a c", "corrupt": "b c", "followed": " a", "violated": " b"}
    found = attribution_patching(_Toy(), word_tokenizer(), pair, components=EVERY, random=None, split=None)
    assert (found.clean, found.corrupt) == ([64.0], [-64.0])
    expected = {
        "residual": [[64, 64], [0, 128]], "attention": [[0, 64], [0, 64]], "mlp": [[48, 48], [0, 96]],
        "heads": [[[0, 32], [0, 32]], [[0, 32], [0, 32]]],
    }  # fmt: skip
    assert {name: array.tolist() for name, array in found.attribution.items()} == expected
    assert found.attribution["residual"].sum(1).tolist() == [128.0, 128.0]
    assert found.positions == ["-2 a/b", "-1 c"]
    for group in found.exact:
        assert len(group.sites) == group.candidates
        assert all(one.exact == one.attribution for one in group.sites)
    swapped = {**pair, "clean": "b c", "corrupt": "a c"}
    other = attribution_patching(_Toy(), word_tokenizer(), swapped, top=0, random=0, split=None)
    assert other.attribution["mlp"].tolist() == (-np.array(expected["mlp"])).tolist()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_exact_patching_is_what_a_hook_by_hand_gives_and_attribution_is_the_slope(family, tokenizer):
    model = make_model(family, tokenizer)
    found = attribution_patching(
        model, tokenizer, pairs(1), components=EVERY, random=None, split=None, per_position=True
    )
    row = pairs(1)[0]
    ids = {side: tokenizer(row[side], return_tensors="pt")["input_ids"] for side in ("clean", "corrupt")}
    tokens = [one_token(tokenizer, row[side]) for side in ("followed", "violated")]

    def margin(logits):
        return float(logits[0, -1, tokens[0]] - logits[0, -1, tokens[1]])

    def run(side, change=None, point=None):
        kept = []

        def hook(module, args, output):
            tensor = output[0] if isinstance(output, tuple) else output
            kept.append(tensor.detach().clone())
            if change is not None:
                new = change(tensor.clone())
                return (new, *output[1:]) if isinstance(output, tuple) else new
            return None

        handle = model.get_submodule(point).register_forward_hook(hook) if point else None
        with torch.no_grad():
            value = margin(model(ids[side]).logits)
        if handle:
            handle.remove()
        return value, kept

    by_site = {str(one.site): one for group in found.exact for one in group.sites}
    for component in ("residual", "attention", "mlp"):
        point = component_points(model, component)[1]
        clean = run("clean", point=point)[1][0]
        base = run("corrupt")[0]

        def put(tensor, share=1.0, clean=clean):
            tensor[:, -1] = tensor[:, -1] + share * (clean[:, -1] - tensor[:, -1])
            return tensor

        one = by_site[f"{point} at -1"]
        assert one.exact == pytest.approx(run("corrupt", put, point)[0] - base, abs=1e-4)
        slope = (
            run("corrupt", lambda t: put(t, 0.01), point)[0] - run("corrupt", lambda t: put(t, -0.01), point)[0]
        ) / 0.02
        assert one.attribution == pytest.approx(slope, abs=0.05 * abs(slope) + 1e-2)
    # The output projections of these families have no bias, or one that both runs share.
    assert np.allclose(found.attribution["heads"].sum(1), found.attribution["attention"], atol=1e-4)


def test_with_many_steps_the_sum_over_positions_is_the_exact_effect(tokenizer):
    model = make_model("llama", tokenizer)
    found = attribution_patching(model, tokenizer, pairs(2), steps=64, random=None)
    for one in found.exact[0].sites:
        assert one.attribution == pytest.approx(one.exact, abs=2e-3)
    assert found.exact[0].spearman == pytest.approx(1)
    assert found.exact[0].recall == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_identical_prompts_give_exactly_zero_in_a_model_left_in_training_mode(family, tokenizer):
    noise = (
        {"attention_dropout": 0.3} if family == "llama" else {"resid_pdrop": 0.3, "attn_pdrop": 0.3, "embd_pdrop": 0.3}
    )
    model = make_model(family, tokenizer, **noise).train()
    modes = {name: module.training for name, module in model.named_modules()}
    modules, state = list(modes), torch.get_rng_state()
    model.lm_head.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    same = [{**row, "corrupt": row["clean"]} for row in pairs(2)]
    found = attribution_patching(model, tokenizer, same, components=EVERY, random=None)
    assert not any(array.any() for array in found.attribution.values())
    assert all(one.exact == 0 for group in found.exact for one in group.sites)
    # Contrast pairs: before the first token that differs both runs are the same, and the rest is the same twice.
    first, second = (attribution_patching(model, tokenizer, pairs(2), components=EVERY, random=None) for _ in range(2))
    assert not first.attribution["residual"][:, :2].any()
    assert first.to_json() == second.to_json()
    assert first.attribution["residual"][:-1, 2:].all()
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name, _ in model.named_modules()] == modules
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gradients_are_there_under_no_grad_and_in_a_frozen_model(tokenizer):
    model = make_model("llama", tokenizer)
    expected = attribution_patching(model, tokenizer, pairs(2), top=0, random=0).to_json()
    with torch.no_grad():
        assert attribution_patching(model, tokenizer, pairs(2), top=0, random=0).to_json() == expected
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert attribution_patching(model, tokenizer, pairs(2), top=0, random=0).to_json() == expected
    model.requires_grad_(False)
    assert attribution_patching(model, tokenizer, pairs(2), top=0, random=0).to_json() == expected


def test_answers_of_several_tokens_are_summed_log_probabilities(tokenizer):
    model = make_model("qwen2", tokenizer)
    rows = [{**row, "followed": " kind friend", "violated": " never rude day"} for row in pairs(2)]
    found = attribution_patching(model, tokenizer, rows, components=["residual", "heads"], random=None, split=None)

    def log_prob(prompt, answer):
        ids = tokenizer(prompt + answer, return_tensors="pt")["input_ids"]
        start = len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            log_probs = model(ids).logits[0].log_softmax(-1)
        return sum(float(log_probs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))

    for i, row in enumerate(rows):
        for side in ("clean", "corrupt"):
            value = log_prob(row[side], row["followed"]) - log_prob(row[side], row["violated"])
            assert getattr(found, side)[i] == pytest.approx(value, abs=1e-4)
    fine = attribution_patching(model, tokenizer, rows, steps=48, random=None, split=None)
    assert all(one.attribution == pytest.approx(one.exact, abs=5e-3) for one in fine.exact[0].sites)


def test_prompts_of_unequal_length_are_refused_by_number_or_aligned(tokenizer):
    model = make_model("gpt2", tokenizer)
    rows = pairs(2)
    rows[1] = {**rows[1], "corrupt": "the bad bad bad cold day is"}
    with pytest.raises(
        ValueError, match=r"Pair 2: `clean` has \d+ tokens and `corrupt` \d+ – expected prompts of equal length"
    ):
        attribution_patching(model, tokenizer, rows)
    found = attribution_patching(model, tokenizer, rows, align=True, random=None, split=None)
    lengths = [len(tokenizer(rows[1][side])["input_ids"]) for side in ("clean", "corrupt")]
    # `the`, then `good` against `bad bad bad`, then the rest.
    assert found.left_out == lengths[1] - (lengths[0] - len(tokenizer(" good")["input_ids"]))
    assert np.isfinite(found.attribution["mlp"]).all()
    alone = attribution_patching(model, tokenizer, rows[1], align=True, steps=48, random=None, split=None)
    assert all(one.attribution == pytest.approx(one.exact, abs=5e-3) for one in alone.exact[0].sites)


def test_adapters_count_and_their_parameters_get_no_gradient(tokenizer):
    model = with_lora(make_model("llama", tokenizer))
    found = attribution_patching(model, tokenizer, pairs(2), components=EVERY, top=0, random=0)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert trainable
    assert all(p.grad is None for p in trainable)
    assert found.hook_points["heads"][0] == "model.layers.0.self_attn.o_proj.input"
    with model.disable_adapter():
        bare = attribution_patching(model, tokenizer, pairs(2), top=0, random=0)
    plain = attribution_patching(make_model("llama", tokenizer), tokenizer, pairs(2), top=0, random=0)
    assert np.allclose(bare.attribution["mlp"], plain.attribution["mlp"], atol=1e-5)
    assert not np.allclose(found.attribution["mlp"], plain.attribution["mlp"], atol=1e-2)


def test_between_a_base_and_its_tuned_model_the_last_block_carries_everything(tokenizer):
    """Final norm and head are shared: with the tuned stream after the last block, the base says what the tuned model says."""
    base, tuned = make_model("llama", tokenizer), with_lora(make_model("llama", tokenizer))
    rows = [{key: row[key] for key in ("clean", "followed", "violated")} for row in pairs(3)]
    found = attribution_patching(base, tokenizer, rows, tuned=tuned, components=["residual", "mlp"], random=None)
    assert found.tuned
    (residual,) = (group for group in found.exact if group.group == "residual")
    last = next(one for one in residual.sites if one.site.block == 2)
    gap = np.mean([found.clean[i] - found.corrupt[i] for i in found.evidence])
    assert abs(gap) > 0.05
    assert last.exact == pytest.approx(gap, abs=1e-4)
    again = attribution_patching(tuned, tokenizer, rows, tuned=tuned, components=["residual", "mlp"], random=None)
    assert np.allclose(again.attribution["residual"], found.attribution["residual"], atol=1e-5)
    assert not any(layer.disable_adapters for layer in tuned.modules() if hasattr(layer, "lora_A"))
    tuned.requires_grad_(False)
    attribution_patching(tuned, tokenizer, rows, tuned=tuned, top=0, random=0)
    assert not any(p.requires_grad for p in tuned.parameters())
    same = attribution_patching(base, tokenizer, rows, tuned=make_model("llama", tokenizer), random=None)
    assert not same.attribution["mlp"].any()
    with pytest.raises(ValueError, match="`tuned` is `model` itself"):
        attribution_patching(base, tokenizer, rows, tuned=base)
    with pytest.raises(ValueError, match="expected one architecture"):
        attribution_patching(base, tokenizer, rows, tuned=make_model("llama", tokenizer, num_hidden_layers=2))


def test_a_readout_or_a_function_of_the_logits_takes_the_place_of_the_margin(tokenizer):
    model = make_model("llama", tokenizer)
    rows = [{key: row[key] for key in ("clean", "corrupt")} for row in pairs(2)]
    readout = make_readout(model, layer=1)
    found = attribution_patching(model, tokenizer, rows, metric=readout, components=["residual", "mlp"], random=None)
    assert not found.attribution["mlp"][2].any()  # comes after the readout
    # A mean of ⟨h, w⟩ is linear in the stream that it reads.
    at_readout = [one for group in found.exact for one in group.sites if one.site.hook_point == "model.layers.1"]
    assert at_readout
    assert all(one.exact == pytest.approx(one.attribution, abs=1e-4) for one in at_readout)
    kind, rude = one_token(tokenizer, " kind"), one_token(tokenizer, " rude")
    margin = attribution_patching(model, tokenizer, pairs(2), top=0, random=0)
    by_hand = attribution_patching(
        model, tokenizer, rows, metric=lambda logits: logits[:, -1, kind] - logits[:, -1, rude], top=0, random=0
    )
    assert np.allclose(by_hand.attribution["mlp"], margin.attribution["mlp"], atol=1e-5)
    with pytest.raises(
        ValueError, match=r"`metric` returned \(\) for logits of shape .* expected a tensor of shape \(1,\)"
    ):
        attribution_patching(model, tokenizer, rows, metric=lambda logits: logits.sum())
    with pytest.raises(ValueError, match="has no gradient"):
        attribution_patching(model, tokenizer, rows, metric=lambda logits: logits[:, -1, 0].detach())


def test_messages_are_rendered_and_pairs_of_one_prompt_stay_together(tokenizer):
    model = make_model("llama", tokenizer)
    rows = [
        {
            key: [{"role": "user", "content": value}] if key in ("clean", "corrupt") else value.strip()
            for key, value in row.items()
        } for row in pairs(3)
    ]  # fmt: skip
    rows.append({**rows[0], "violated": "cold"})
    found = attribution_patching(model, tokenizer, rows, top=0, random=0)
    assert found.positions[-1].endswith("<|assistant|>")
    assert {0, 3} <= set(found.choosing) or {0, 3} <= set(found.evidence)
    assert sorted(found.choosing + found.evidence) == [0, 1, 2, 3]
    other = attribution_patching(model, tokenizer, rows, top=0, random=0, split=1)
    assert other.to_json() != found.to_json()
    with pytest.raises(ValueError, match="expected at least two"):
        attribution_patching(model, tokenizer, rows[0])


OTHER_FAMILIES = {
    "opt": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32}, "model.decoder.layers.0.fc2", "out_proj"),
    "gpt_neox": ("GPTNeoXConfig", {"intermediate_size": 64}, "gpt_neox.layers.0.mlp", "dense"),
    "phi": ("PhiConfig", {"intermediate_size": 64}, "model.layers.0.mlp", "dense"),
    "qwen3": (
        "Qwen3Config",
        {"intermediate_size": 64, "head_dim": 8, "num_key_value_heads": 2},
        "model.layers.0.mlp",
        "o_proj",
    ),
}


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_attention_and_mlp_are_found_in_other_families(name, tokenizer):
    import transformers

    config, sizes, mlp, projection = OTHER_FAMILIES[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
        eos_token_id=0, pad_token_id=1, bos_token_id=None, **sizes,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(made).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    assert component_points(model, "mlp")[0] == mlp
    assert component_points(model, "heads")[0].endswith(f".{projection}.input")
    found = attribution_patching(model, tokenizer, pairs(2), components=EVERY, steps=32, random=None, split=None)
    assert np.allclose(found.attribution["heads"].sum(1), found.attribution["attention"], atol=2e-2)
    outputs = next(group for group in found.exact if group.group == "outputs")
    assert all(one.attribution == pytest.approx(one.exact, abs=1e-2) for one in outputs.sites)


def test_bad_arguments_are_named(tokenizer):
    model = make_model("llama", tokenizer)
    for changes, message in (
        ({"components": ["attention", "norm"]}, "expected some of `residual`, `attention`, `mlp`, `heads`"),
        ({"steps": 0}, "`steps` is 0 – expected at least 1"),
        ({"random": -1}, "`random` is -1"),
        ({"metric": 3}, "`metric` is a `int`"),
    ):
        with pytest.raises(ValueError, match=message):
            attribution_patching(model, tokenizer, pairs(2), **changes)
    for row, message in (
        ([], "`pairs` is empty"),
        ([{"clean": "a day"}], "Pair 1: it has .* expected `corrupt`"),
        ([{"clean": "a day", "corrupt": "a day"}], "Pair 1: it has .* expected `followed`"),
        ([{**pairs(1)[0], "violated": " kind"}], "Pair 1: `followed` and `violated` are both"),
        (["a day"], "Pair 1: it has str"),
    ):
        with pytest.raises(ValueError, match=message):
            attribution_patching(model, tokenizer, row)
    model.model.layers[1].self_attn, model.model.layers[1].mixed = nn.Identity(), model.model.layers[1].self_attn
    with pytest.raises(
        ValueError, match=r"`model.layers.1` has the modules .*`mixed`.* expected attention among them"
    ):
        component_points(model, "attention")
    short = make_model("gpt2", tokenizer, n_positions=4)
    with pytest.raises(ValueError, match="expected at most 4, the model's learned positions"):
        attribution_patching(short, tokenizer, pairs(2))
    small = make_model("gpt2", tokenizer, vocab_size=200)
    with pytest.raises(ValueError, match=r"Pair 1 has the token id .* vocabulary of 200"):
        attribution_patching(small, tokenizer, pairs(2))
    assert head_count(model) == 4
    assert len(decoder_layers(model)) == 3


def test_the_result_goes_through_json(tokenizer):
    found = attribution_patching(
        make_model("llama", tokenizer), tokenizer, pairs(2), components=EVERY, top=2, random=2
    )
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["hook_points"]["mlp"] == [f"model.layers.{i}.mlp" for i in range(3)]
    assert np.array(told["attribution"]["heads"]).shape == (3, 4, len(found.positions))
    site = told["exact"][0]["sites"][0]
    assert {"component", "block", "hook_point", "top", "chosen", "attribution", "exact"} <= site.keys()


# The command line.


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, pairs())) + "\n")
    return path


@pytest.fixture
def adapter_folder(tmp_path, model_folder, load):
    model = with_lora(load())
    model.peft_config["default"].base_model_name_or_path = str(model_folder())
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_locate_writes_result_log_and_page_and_prints_what_the_function_gives(
    pairs_file, model_folder, tmp_path, capsys, load, tokenizer
):
    out = tmp_path / "out"
    command = ["locate", "--pairs", pairs_file, "--model", model_folder(), "--heads", "--top", 3, "--random", 2]
    command = [*map(str, command), "--out", str(out), "--json"]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = attribution_patching(load(), tokenizer, pairs(), components=EVERY, top=3, random=2)
    written = json.loads((out / "locate.json").read_text())
    for told in (printed, written):
        assert {key: told[key] for key in found.to_json()} == json.loads(json.dumps(found.to_json()))
    (event,) = (one for one in read_events(out / "interp.jsonl") if one.event == "patching")
    assert event.attribution == found.to_json()["attribution"]
    assert event.exact[0].sites[0].hook_point == found.exact[0].sites[0].site.hook_point
    page = (out / "report.html").read_text()
    assert page.count("<svg viewBox") >= 4
    assert "Where it acts" in page
    plots = sorted(path.name for path in (out / "report_plots").iterdir())
    assert [name[14:] for name in plots] == ["residual-stream.svg", "attention-out.svg", "mlp-out.svg", "heads.svg"]
    assert f"| {found.exact[0].sites[0].site.hook_point}".replace("_", "\\_") in (out / "report.md").read_text()
    before = (out / "locate.json").read_bytes()
    assert main(command) == 0  # its own files may be replaced
    assert (out / "locate.json").read_bytes() == before


def test_locate_refuses_bad_input_in_one_line_and_leaves_other_files_alone(pairs_file, model_folder, tmp_path, capsys):
    model = str(model_folder())
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"clean": "a day", "corrupt": "a day is here", "followed": " kind", "violated": " rude"}\n')
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "locate.json").write_text('{"mine": 1}')
    for arguments, message in (
        (["--pairs", tmp_path / "none.jsonl"], "does not exist"),
        (["--pairs", broken, "--no-split"], "Pair 1: `clean` has"),
        (["--pairs", broken, "--no-split", "--align", "--random", "some"], "`--random some`"),
        (["--pairs", pairs_file, "--components", "norms"], "`components` is ['norms']"),
        (["--pairs", pairs_file, "--out", taken], "would be replaced"),
        (["--pairs", pairs_file, "--out", pairs_file], "a file – expected a folder"),
        (["--pairs", pairs_file, "--readout", tmp_path / "none.yaml"], "none.yaml"),
        (["--pairs", pairs_file, "--tuned", tmp_path / "nothing"], "not there"),
    ):
        assert main(["locate", "--model", model, *map(str, arguments)]) == 2, message
        said = capsys.readouterr().err
        assert message in said
        assert "Traceback" not in said
    assert (taken / "locate.json").read_text() == '{"mine": 1}'
    assert [path.name for path in taken.iterdir()] == ["locate.json"]
    assert main(["locate", "--model", model, "--pairs", str(broken), "--no-split", "--align"]) == 0
    assert "have no partner" in capsys.readouterr().out


def test_locate_and_drift_compare_put_a_tuned_model_into_its_base(
    pairs_file, model_folder, adapter_folder, tmp_path, capsys, load, tokenizer
):
    model, adapter = str(model_folder()), str(adapter_folder)
    found = attribution_patching(
        load(), tokenizer, pairs(), tuned=with_lora(load()), components=["residual", "mlp"], top=3
    )
    command = ["--model", model, "--tuned", adapter, "--components", "residual,mlp", "--top", "3", "--json"]
    assert main(["locate", "--pairs", str(pairs_file), *command]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["tuned"]
    assert np.allclose(told["attribution"]["mlp"], found.attribution["mlp"], atol=1e-5)
    compare = ["drift", "compare", model, adapter, "--patch", str(pairs_file)]
    assert main([*compare, "--json"]) == 0
    event = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert np.allclose(event["patching"]["attribution"]["mlp"], found.attribution["mlp"], atol=1e-5)
    assert main(compare) == 0
    assert "the tuned model's activations in its base" in capsys.readouterr().out
    log = RunLog(tmp_path / "drift" / "interp.jsonl")
    log.append("run", 0, title="Drift", arm="compare", model=model)
    log.append(
        "drift",
        0,
        **{key: value for key, value in event.items() if key not in ("verdict", "because", "next", "crossed")},
    )
    write_report(log.path, tmp_path / "drift.html")
    assert "What the training changed" in (tmp_path / "drift.html").read_text()


def test_probe_fit_reads_where_the_contrast_acts_and_reports_both_places(
    pairs_file, model_folder, tmp_path, capsys, load, tokenizer
):
    write_jsonl(labelled_rows(24, seed=1), tmp_path / "fit.jsonl")
    command = [
        "probe",
        "fit",
        "--data",
        tmp_path / "fit.jsonl",
        "--name",
        "warmth",
        "--model",
        model_folder(),
        "--sweep",
        1,
    ]
    command = [*map(str, command), "--out", str(tmp_path / "cards")]
    assert main([*command, "--at", "attributed"]) == 2
    assert "expected `--at attributed` with `--pairs`" in capsys.readouterr().err
    assert main([*command, "--at", "attributed", "--pairs", str(pairs_file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = attribution_patching(load(), tokenizer, pairs(), top=0, random=0)
    by_layer = np.abs(found.chosen["attention"].sum(1) + found.chosen["mlp"].sum(1))[:-1]
    assert told["hook_point"] == told["attributed"]["hook_point"] == f"model.layers.{int(by_layer.argmax())}"
    curve = {point["hook_point"]: point["auroc"] for point in told["sweep"]}
    assert told["attributed"]["auroc"] == curve[told["hook_point"]]
    assert told["decoded_best"]["auroc"] == max(curve.values())
    assert load_card(told["card"]).card.readout.hook_point == told["hook_point"]


def test_a_broken_event_of_patching_is_shown_without_its_map(tmp_path):
    log = RunLog(tmp_path / "interp.jsonl")
    log.append("run", 0, title="Locate", arm="locate", model="tiny")
    log.append(
        "patching", metric="m", attribution={"mlp": [[1, 2], [3]], "heads": [1], "attention": [[1.0, None]]},
        hook_points={"mlp": ["a", "b"], "attention": ["<script>"]}, positions=["-2", "-1"], evidence=[7], clean=["x"],
        exact=[{"group": "outputs", "sites": [{"hook_point": "a"}, 3]}],
    )  # fmt: skip
    write_report(log.path, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script>" not in page.split("<main")[1].split("<script>")[0]
    assert "&lt;script&gt;" in page
    assert [path.name for path in (tmp_path / "page_plots").iterdir()] == ["patching-1-01-attention-out.svg"]


def test_the_figures_of_the_page_are_the_committed_ones():
    root = Path(__file__).resolve().parent.parent
    parts = json.loads((root / "benchmarks" / "locate.json").read_text())
    page, readme = (root / "docs" / "locate.md").read_text(), (root / "benchmarks" / "README.md").read_text()
    ratios = parts["quality"]["ratios"]
    ratios |= parts["others"]["ratios"]
    for concept in ("sentiment", "number", "language", "capital", "gender"):
        one, along = ratios[f"spearman_{concept}"], ratios[f"spearman_{concept}_3_steps"]
        recalls = [ratios[f"recall_at_5_{concept}{suffix}"] for suffix in ("", "_3_steps")]
        assert f"| {one:.2f} | {along:.4f} | {recalls[0]:.1f} | {recalls[1]:.1f} |" in page
        assert along >= 0.9
        assert recalls[1] >= 0.8
        effects = parts["quality"]["settings"]["effects"] | parts["others"]["settings"]["effects"]
        assert len(effects[concept]["sites"]) == 60
    first_mlp = next(
        row for row in parts["quality"]["settings"]["effects"]["number"]["sites"] if row[0] == "model.layers.0.mlp"
    )
    exact, one, along = (f"{value:+.2f}".replace("-", "−") for value in first_mlp[1:])
    assert f"its exact effect is {exact} and one gradient says {one}" in page
    assert f"not its size ({along})" in page
    for part, name, target in (
        ("cost", "attribution_vs_forwards_of_the_pair", 4), ("peer", "attribution_vs_transformer_lens", 1),
    ):  # fmt: skip
        value, (low, high) = parts[part]["ratios"][name], parts[part]["settings"]["intervals"][name]
        assert value <= target
        assert f"{value:.2f} [{low:.2f}, {high:.2f}]" in page
        assert f"**{value:.2f}** [{low:.2f}, {high:.2f}]" in readme
    difference = parts["peer"]["ratios"]["difference_from_transformer_lens"]
    assert difference <= 1e-4
    assert f"differ by at most {difference:.0e} of" in page
