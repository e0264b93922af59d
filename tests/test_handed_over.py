"""What people hand over: one thing for a list, files as they have them, models and trainers of every kind."""

from __future__ import annotations

import csv
import io
import json

import datasets
import pandas
import pytest
import torch
from datasets import Dataset
from tiny import make_model, make_readout, make_tokenizer, sentences
from training import make_trainer, rows_of
from transformers import AutoModelForCausalLM

from interp_rlhf import ConceptAnchor, DriftCallback, DriftConfig, attach, read
from interp_rlhf.activations import decoder_layers, identity, read_activations
from interp_rlhf.cli import main
from interp_rlhf.concepts.examples import load_examples, read_rows
from interp_rlhf.concepts.readout import Readout
from interp_rlhf.drift.compare import load_texts
from interp_rlhf.runlog.log import read_run_log

LAYER = "model.layers.1"


# One where a list is expected


def test_one_text_card_prompt_or_mapping_is_that_one(load, model_folder, tokenizer, tmp_path):
    model = load()
    readout = make_readout(model)

    def scores(given):
        return readout.score(read(model, given, [readout], tokenizer=tokenizer)["concept"])

    assert scores("warm rain") == pytest.approx(scores(["warm rain"]))
    row = {"prompt": "what is it", "completion": "warm rain"}
    assert scores(row) == pytest.approx(scores([row]))
    trainer = make_trainer("SFT", str(model_folder()), tokenizer, tmp_path)
    assert DriftCallback(trainer, prompts="How are you?").evaluation.own_text.prompts == ["How are you?"]
    talk = [{"role": "user", "content": "How are you?"}]
    assert DriftConfig(prompts=talk).prompts == [talk]
    assert len(DriftCallback(trainer, texts="The old road follows the river.").battery) == 1
    assert DriftCallback(trainer, hook_points=LAYER).battery.hook_points == [LAYER]
    with pytest.raises(FileNotFoundError, match=r"`card.yaml` does not exist"):
        attach(make_trainer("SFT", str(model_folder()), tokenizer, tmp_path), monitors="card.yaml")
    with pytest.raises(FileNotFoundError, match=r"`x.yaml` does not exist"):
        attach(
            make_trainer("SFT", str(model_folder()), tokenizer, tmp_path),
            regularizers={"kind": "concept_anchor", "card": "x.yaml", "weight": 1.0},
        )


def test_one_hook_point_readout_file_or_text_is_that_one_in_the_library_too(load, tokenizer, tmp_path):
    from tiny import labelled_rows, make_card

    from interp_rlhf import Subspace
    from interp_rlhf.activations import read_means, tokenize_examples
    from interp_rlhf.concepts.examples import make_examples
    from interp_rlhf.concepts.fitting import fit_probe
    from interp_rlhf.sae.stream import cut, load_corpus
    from interp_rlhf.training.make import make_intervention, make_regularizer

    model = load()
    readout = make_readout(model)
    batch = tokenize_examples(sentences(3), tokenizer)
    assert list(read_means(model, batch, LAYER)) == [LAYER]
    assert list(read(model, batch, readout)) == ["concept"]
    assert Subspace.from_readouts(readout).basis.shape == (1, 32)
    fit = fit_probe(model, tokenizer, make_examples(labelled_rows(6)), LAYER, model_id="tiny")
    assert fit.artifact.header.hook_point == LAYER
    (tmp_path / "a.txt").write_text("warm rain and sun")
    assert load_corpus(tmp_path / "a.txt") == load_corpus([str(tmp_path / "a.txt")]) == ["warm rain and sun"]
    assert torch.equal(cut("warm rain and sun", tokenizer, 16).ids, cut(["warm rain and sun"], tokenizer, 16).ids)
    card = str(make_card(tmp_path, model, tokenizer))
    assert len(make_regularizer({"kind": "drift_penalty", "cards": card, "weight": 1.0}).subspace.basis) == 1
    assert len(make_intervention({"kind": "concept_ablation", "cards": card}).subspace.basis) == 1


def test_empty_texts_have_no_score_and_crash_nothing(load, tokenizer):
    model = load()
    readout = make_readout(model)
    assert readout.score(read(model, ["", ""], [readout], tokenizer=tokenizer)["concept"]) == [None, None]
    assert readout.score(read(model, [], [readout], tokenizer=tokenizer)["concept"]) == []


def test_a_row_that_could_be_scored_in_two_ways_is_refused(load, tokenizer):
    model = load()
    with pytest.raises(ValueError, match="it must be clear which text is scored"):
        read(model, [{"prompt": "a", "completion": "b", "text": "c"}], [make_readout(model)], tokenizer=tokenizer)


# Files


ROWS = [{"text": f"{'warm kind hope' if i % 2 else 'cold rude bad'} {i}", "label": i % 2} for i in range(24)]
TALK = [
    {
        "messages": [{"role": "user", "content": f"please {i}"}, {"role": "assistant", "content": row["text"]}],
        "label": row["label"],
    }
    for i, row in enumerate(ROWS)
]


def written(path, rows, fields=("text", "label"), start=b"", delimiter=",", encoding="utf-8"):
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, extrasaction="ignore", delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(start + text.getvalue().encode(encoding))
    return path


def test_tables_as_people_have_them_give_the_same_examples(tmp_path):
    expected = load_examples(written(tmp_path / "plain.csv", ROWS)).fingerprint
    files = {
        "excel.csv": {"start": b"\xef\xbb\xbf", "fields": ("label", "text")},
        "semicolons.csv": {"delimiter": ";"},
        "tabs.tsv": {"delimiter": "\t"},
        "utf16.csv": {"encoding": "utf-16", "delimiter": "\t"},
    }
    for name, how in files.items():
        assert load_examples(written(tmp_path / name, ROWS, **how)).fingerprint == expected, name
    pandas.DataFrame(ROWS).to_parquet(tmp_path / "a.parquet")
    assert load_examples(tmp_path / "a.parquet").fingerprint == expected
    datasets.DatasetDict({"test": Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "only_test"))
    assert load_examples(tmp_path / "only_test").fingerprint == expected


def test_messages_in_tables_are_read_as_messages(tmp_path):
    as_text = [{**row, "messages": json.dumps(row["messages"])} for row in TALK]
    found = load_examples(written(tmp_path / "m.csv", as_text, ("messages", "label")))
    assert found.rows[0]["messages"] == TALK[0]["messages"]
    pandas.DataFrame(TALK).to_parquet(tmp_path / "m.parquet")
    assert load_examples(tmp_path / "m.parquet").fingerprint == found.fingerprint
    pairs = [
        {"prompt": json.dumps(row["messages"][:1]), "completion": row["messages"][1]["content"], "label": row["label"]}
        for row in TALK
    ]
    split = load_examples(written(tmp_path / "p.csv", pairs, ("prompt", "completion", "label")))
    assert split.rows[0]["prompt"] == TALK[0]["messages"][:1]
    odd = [{"prompt": '[{"a": 1}] is JSON', "completion": "x", "label": i % 2} for i in range(4)]
    assert (
        load_examples(written(tmp_path / "o.csv", odd, ("prompt", "completion", "label")))
        .rows[0]["prompt"]
        .endswith("JSON")
    )


@pytest.mark.parametrize(
    "case", ["long", "splits", "cells", "broken", "no_parquet", "role", "tool_call", "image", "text"]
)
def test_bad_input_ends_in_one_line_and_exit_code_2(case, model_folder, tmp_path, capsys):
    """And good input that looks bad does not."""
    name, said = tmp_path / "data.csv", None
    if case == "long":
        written(name, [{**row, "text": "warm " * 200 + row["text"]} if i == 3 else row for i, row in enumerate(ROWS)])
        (tmp_path / "data.csv").write_text(name.read_text().replace("warm warm", "w" * 150_000 + " warm", 1))
        assert len(read_rows(name)[3]["text"]) > 140_000
        return
    if case == "splits":
        name = tmp_path / "saved"
        datasets.DatasetDict({"a": Dataset.from_list(ROWS), "b": Dataset.from_list(ROWS)}).save_to_disk(str(name))
        said = "has the splits `a`, `b`"
    elif case == "cells":
        name.write_text("text,label\nwarm, kind,1\ncold,0\n")
        said = "row 2 has more cells than the header names"
    elif case == "broken":
        written(name, [{"messages": "[{role: user}]", "label": 1}], ("messages", "label"))
        said = "A cell of the column `messages` is not JSON"
    elif case == "no_parquet":
        name = tmp_path / "data.parquet"
        name.write_bytes(b"PAR1 and no more")
        said = "is not a whole Parquet file"
    else:
        name = tmp_path / "data.jsonl"
        answer = {
            "role": {"role": "user", "content": "x"},
            "tool_call": {"role": "assistant", "tool_calls": []},
            "image": {"role": "assistant", "content": [{"type": "image", "url": "x"}]},
            "text": None,
        }[case]
        rows = [
            {**row, "messages": [row["messages"][0], answer] if answer else "a string"} if i == 3 else row
            for i, row in enumerate(TALK)
        ]
        name.write_text("\n".join(map(json.dumps, rows)))
        said = {
            "role": "row 3: it has `messages` that do not end with the assistant",
            "tool_call": "row 3: the assistant's message has no `content` and calls tools",
            "image": "row 3: a message has a part of type `image`",
            "text": "row 3: 'a string' is not a conversation",
        }[case]
    code = main(
        ["probe", "fit", "--data", str(name), "--name", "c", "--out", str(tmp_path / "out"), "--model", str(model_folder()),
         "--hook-point", LAYER]
    )  # fmt: skip
    assert code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_content_in_parts_and_templates_without_a_system_role(model_folder, tmp_path, capsys):
    parts = [
        {**row, "messages": [row["messages"][0], {**row["messages"][1], "content": [{"type": "text", "text": ROWS[i]["text"]}]}]}
        for i, row in enumerate(TALK)
    ]  # fmt: skip
    (tmp_path / "parts.jsonl").write_text("\n".join(map(json.dumps, parts)))
    fit = ["probe", "fit", "--name", "c", "--model", str(model_folder()), "--hook-point", LAYER]
    assert main([*fit, "--data", str(tmp_path / "parts.jsonl"), "--out", str(tmp_path / "a")]) == 0
    strict = make_tokenizer("gemma")
    make_model("llama", strict).save_pretrained(tmp_path / "strict")
    strict.save_pretrained(tmp_path / "strict")
    asked = [{**row, "messages": [{"role": "system", "content": "be kind"}, *row["messages"]]} for row in TALK]
    (tmp_path / "system.jsonl").write_text("\n".join(map(json.dumps, asked)))
    fit[fit.index("--model") + 1] = str(tmp_path / "strict")
    assert main([*fit, "--data", str(tmp_path / "system.jsonl"), "--out", str(tmp_path / "b")]) == 2
    said = capsys.readouterr().err
    assert "Example 0: the chat template does not take a conversation of the roles system, user, assistant" not in said
    assert "System role not supported – expected one that it renders" in said


def test_a_name_that_no_card_can_have_is_refused_before_anything_is_read(tmp_path, capsys):
    assert main(["probe", "fit", "--data", "nowhere.jsonl", "--name", "Warm tone", "--out", str(tmp_path)]) == 2
    assert "`warm-tone`, say" in capsys.readouterr().err


def test_a_text_file_has_one_text_per_line_and_no_byte_order_mark(tmp_path):
    (tmp_path / "t.txt").write_bytes("\ufeffone line\u2028that goes on\x0cand on\r\nanother\n".encode())
    assert load_texts(str(tmp_path / "t.txt")) == ["one line\u2028that goes on\x0cand on", "another"]


# Numbers as YAML writes them


def test_numbers_of_yaml_are_numbers_and_words_are_words():
    from interp_rlhf.recipe import InterpArguments

    def arguments(section):
        import yaml

        return InterpArguments(interp=yaml.safe_load(section)).attach_keywords()

    found = arguments("drift: {every: 1e1, max_overhead: 2e-2}\nsamples_every: 5.0\narm: '1e5'")
    assert (found["drift"].every, found["drift"].max_overhead) == (10, 0.02)
    assert (found["samples_every"], found["arm"]) == (5, "1e5")
    weight = arguments("regularizers: {kind: concept_anchor, card: x.yaml, weight: 1e-3}")["regularizers"]
    assert weight == [{"kind": "concept_anchor", "card": "x.yaml", "weight": 0.001}]
    with pytest.raises(ValueError, match=r"`every` is 2.5 – expected a whole number"):
        arguments("drift: {every: 2.5}")
    with pytest.raises(ValueError, match=r"`interp.arm` is False – expected a word: YAML takes no, off"):
        arguments("arm: no")


def test_a_card_takes_numbers_without_a_point(load, tokenizer, tmp_path):
    from tiny import make_card

    from interp_rlhf.concepts.card import load_card

    path = make_card(tmp_path, load(), tokenizer)
    path.write_text(path.read_text().replace("weight: 1.0", "weight: 1e-3"))
    assert load_card(path).card.weight == 0.001


def test_a_measure_may_abstain_and_one_that_gives_no_number_is_named(model_folder, tokenizer, tmp_path):
    from interp_rlhf import ConceptReward

    def run(measure):
        trainer = make_trainer(
            "GRPO", str(model_folder()), tokenizer, tmp_path, lora={}, max_steps=1,
            reward_funcs=[ConceptReward(make_readout(make_model("llama", tokenizer)))],
        )  # fmt: skip
        attach(trainer, measures={"politeness": measure})
        trainer.train()
        return {key: value for entry in trainer.state.log_history for key, value in entry.items()}

    assert "interp/measure/politeness/mean" not in run(lambda text: None)
    with pytest.raises(ValueError, match=r"The measure `politeness` gives 'very'"):
        run(lambda text: "very")


# Models and trainers


def qwen_vl(tokenizer, depth=3):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    size = len(tokenizer)
    text = {
        "vocab_size": size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 1, "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": depth, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 14,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, image_token_id=size - 1, video_token_id=size - 2,
            vision_start_token_id=size - 3, vision_end_token_id=size - 4,
        )
    )  # fmt: skip


@pytest.mark.parametrize("depth", [2, 3])
def test_layers_are_those_of_the_text_decoder(depth, tokenizer):
    assert decoder_layers(qwen_vl(tokenizer, depth)) == [f"model.language_model.layers.{i}" for i in range(3)]


def test_a_multimodal_policy_gets_a_reference_of_its_own_class(tokenizer, tmp_path):
    qwen_vl(tokenizer).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    model = type(qwen_vl(tokenizer)).from_pretrained(tmp_path / "m", dtype=torch.float32)
    trainer = make_trainer("SFT", model, tokenizer, tmp_path / "out", max_steps=1, learning_rate=0.0)
    readout = Readout(
        "c", "model.language_model.layers.1", torch.randn(32, generator=torch.Generator().manual_seed(0))
    )
    attach(trainer, regularizers=[ConceptAnchor(readout=readout, weight=1.0)])
    trainer.train()
    logs = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert logs["interp/anchor_c/squared_gap"] == 0.0


def test_adapters_that_transformers_loaded_itself(model_folder, tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model

    folder = model_folder()
    get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    readout = make_readout(make_model("llama", tokenizer))
    for kind in ("DPO", "KTO", "SFT"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
        trainer = make_trainer(kind, model, tokenizer, tmp_path / kind, max_steps=1, learning_rate=0.0)
        attach(trainer, monitors=[readout])
        trainer.train()
        assert any("interp/concept/mean_score" in log for log in trainer.state.log_history)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    with pytest.raises(ValueError, match="adapters that transformers loaded itself"):
        attach(
            make_trainer("SFT", model, tokenizer, tmp_path / "x"),
            regularizers=[ConceptAnchor(readout=readout, weight=1.0)],
        )


def test_offloaded_models_are_read_as_any(tokenizer, tmp_path):
    from accelerate import cpu_offload, disk_offload

    device = torch.device("cpu")
    found = {}
    for name, place in {
        "here": lambda m: m,
        "cpu": lambda m: cpu_offload(m, execution_device=device),
        "disk": lambda m: disk_offload(m, str(tmp_path), execution_device=device),
    }.items():
        model = make_model("llama", tokenizer)
        readout = make_readout(model)
        place(model)
        scores = readout.score(read(model, sentences(3), [readout], tokenizer=tokenizer)["concept"])
        found[name] = (scores, identity(model, LAYER))
    assert found["cpu"] == found["disk"] == found["here"]


def test_what_the_first_layer_is_given_is_read_where_no_module_gives_it_out(tokenizer):
    from transformers import BloomConfig, GraniteConfig, RecurrentGemmaConfig

    from interp_rlhf.activations import TokenBatch
    from interp_rlhf.sae.hook_names import Layout, module_path

    size = len(tokenizer)
    common = {
        "vocab_size": size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    models = {
        "llama": make_model("llama", tokenizer), "gpt2": make_model("gpt2", tokenizer), "gemma": make_model("gemma", tokenizer),
        "bloom": AutoModelForCausalLM.from_config(BloomConfig(vocab_size=size, hidden_size=32, n_layer=3, n_head=4)),
        "granite": AutoModelForCausalLM.from_config(
            GraniteConfig(**common, num_key_value_heads=2, embedding_multiplier=12.0, pad_token_id=1)
        ),
        "recurrent": AutoModelForCausalLM.from_config(RecurrentGemmaConfig(**common, lru_width=32, attention_window_size=16)),
    }  # fmt: skip
    ids = torch.tensor([tokenizer(text="warm rain and kind sun")["input_ids"]])
    every = torch.ones_like(ids)
    for name, model in models.items():
        model.eval()
        seen = []
        handle = model.get_submodule(decoder_layers(model)[0]).register_forward_pre_hook(
            lambda m, a, k: seen.append((a[0] if a else k["hidden_states"]).detach().clone()),  # noqa: B023
            with_kwargs=True,
        )
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        handle.remove()
        point = module_path("blocks.0.hook_resid_pre", Layout.of_model(model))
        assert (point == f"{decoder_layers(model)[0]}.input") == (name in ("granite", "recurrent")), name
        ours = read_activations(model, TokenBatch(ids, every, every), [point])[point]
        torch.testing.assert_close(ours, seen[0][0, 1:], msg=name)
        state = set(model.state_dict())
        assert not any("input." in key and "layernorm" not in key for key in state), name


def test_a_decoder_without_countable_layers_works_at_named_hook_points(tokenizer, tmp_path):
    def build():
        model = make_model("llama", tokenizer)
        model.config.num_hidden_layers = 6  # modules: 3, as where a module counts for two layers
        return model

    with pytest.raises(ValueError, match="Name the hook points yourself"):
        DriftCallback(make_trainer("SFT", build(), tokenizer, tmp_path))
    DriftCallback(make_trainer("SFT", build(), tokenizer, tmp_path), hook_points=[LAYER])
    readout = make_readout(make_model("llama", tokenizer))
    attach(
        make_trainer("SFT", build(), tokenizer, tmp_path, lora={}),
        regularizers=[ConceptAnchor(readout=readout, weight=1.0)],
    )
    with pytest.raises(ValueError, match="no trainable parameter is at or below it"):
        attach(
            make_trainer(
                "SFT", build(), tokenizer, tmp_path, lora={"layers_to_transform": [2], "layers_pattern": "layers"}
            ),
            regularizers=[ConceptAnchor(readout=readout, weight=1.0)],
        )
    with pytest.raises(ValueError, match=r"`hook_point` is `model.layer.1` – expected a module path"):
        read(build(), ["x y"], [Readout("c", "model.layer.1", torch.ones(32))], tokenizer=tokenizer)


def test_a_stream_of_another_shape_is_refused_in_one_sentence(load, tokenizer):
    model = load()
    model.model.layers[1].register_forward_hook(lambda m, a, out: torch.stack([out, out]))
    model.model.layers[2].forward = lambda hidden_states, *a, **k: hidden_states[0]
    with pytest.raises(
        ValueError,
        match=r"The activation at `model.layers.1` has shape \(2, 1, .* – expected \(sequences, tokens, width\)",
    ):
        read(model, ["warm rain"], [make_readout(model)], tokenizer=tokenizer)


def reward_trainer(tokenizer, out):
    from transformers import AutoModelForSequenceClassification, LlamaConfig
    from trl import RewardConfig, RewardTrainer

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=1, eos_token_id=0, num_labels=1,
    )  # fmt: skip
    rows = [{"prompt": "what is it", "chosen": s, "rejected": s + " bad"} for s in sentences(4)]
    args = RewardConfig(
        str(out), max_steps=2, per_device_train_batch_size=2, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        disable_tqdm=True, learning_rate=1e-2, logging_steps=1,
    )  # fmt: skip
    return RewardTrainer(
        model=AutoModelForSequenceClassification.from_config(config), args=args, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip


def test_the_callback_watches_reward_models_without_predictions(tokenizer, tmp_path):
    trainer = reward_trainer(tokenizer, tmp_path)
    trainer.add_callback(DriftCallback(trainer, every=1))
    trainer.train()
    drift = [event for event in read_run_log(tmp_path / "interp.jsonl") if event["event"] == "drift"]
    assert [event["output"] for event in drift] == [{}] * 3
    assert drift[-1]["hook_points"][LAYER if LAYER in drift[-1]["hook_points"] else "model.layers.2"]["cosine"] < 1
    with pytest.raises(ValueError, match="has no language-model head – expected none: it answers nothing"):
        DriftCallback(trainer, prompts=["How are you?"])
    from interp_rlhf.report import write_report

    write_report([tmp_path / "interp.jsonl"], tmp_path / "report.html")


def test_the_callback_refuses_an_encoder_decoder_when_it_is_made(tokenizer, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, decoder_start_token_id=1
        )
    )
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none")
    trainer = Trainer(
        model=model, args=args, train_dataset=Dataset.from_list([{"input_ids": [5, 6]}]), processing_class=tokenizer
    )
    with pytest.raises(ValueError, match="is an encoder-decoder – expected a decoder-only model"):
        DriftCallback(trainer)


def test_texts_longer_than_learned_positions_are_refused_when_the_callback_is_made(tokenizer, model_folder, tmp_path):
    trainer = make_trainer("SFT", str(model_folder("gpt2")), tokenizer, tmp_path)
    with pytest.raises(ValueError, match="expected at most 256, the model's learned positions"):
        DriftCallback(trainer, texts=[" ".join(sentences(60))])


@pytest.mark.parametrize("early", [True, False], ids=["stopped early", "to the end"])
def test_the_last_evaluation_is_of_the_model_that_is_kept(early, model_folder, tokenizer, tmp_path):
    from transformers import EarlyStoppingCallback

    trainer = make_trainer(
        "SFT", str(model_folder()), tokenizer, tmp_path, rows=rows_of("SFT"), eval_rows=rows_of("SFT", 6, seed=9),
        max_steps=12 if early else 6, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False, learning_rate=0.05, seed=1,
    )  # fmt: skip
    if early:
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    callback = DriftCallback(trainer, every=100)
    trainer.add_callback(callback)
    trainer.train()
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert best < trainer.state.global_step
    last = [event for event in read_run_log(tmp_path / "interp.jsonl") if event["event"] == "drift"][-1]
    assert last["step"] == best
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    before, after = (callback.battery.read(model) for model in (start, kept))
    assert last["output"]["kl"] == pytest.approx(callback.battery.compare(before, after)[1]["kl"], rel=1e-4)


# drift compare


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tokenizer):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    place = tmp_path_factory.mktemp("checkpoints")

    def saved(model, name, own=tokenizer):
        model.save_pretrained(place / name)
        if own is not None:
            own.save_pretrained(place / name)
        return str(place / name)

    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    a, b = saved(make_model("llama", tokenizer), "a"), saved(make_model("llama", tokenizer, seed=7), "b")
    more = make_tokenizer()
    more.add_special_tokens({"additional_special_tokens": ["[NEW]"]})
    grown = AutoModelForCausalLM.from_pretrained(a)
    grown.resize_token_embeddings(len(more))
    return {
        "a": a, "b": b, "copy of a": saved(make_model("llama", tokenizer), "copy"),
        "adapter of a": saved(get_peft_model(AutoModelForCausalLM.from_pretrained(a), lora), "adapter_of_a", None),
        "adapter of b": saved(get_peft_model(AutoModelForCausalLM.from_pretrained(b), lora), "adapter_of_b", None),
        "reward model": saved(AutoModelForSequenceClassification.from_pretrained(a, num_labels=1), "reward"),
        "grown": saved(
            get_peft_model(
                grown,
                LoraConfig(
                    r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
                ),
            ),
            "grown", more,
        ),
        "bare": saved(make_model("llama", tokenizer), "bare", None),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (("a", "adapter of b"), "expected one base. On another base its weights mean nothing"),
        (("a", "reward model"), "is a `LlamaForSequenceClassification` – expected a language model"),
        (("a", "grown"), "has 1 tokens: `[NEW]`"),
        (("a", "adapter of a"), None),
        (("copy of a", "adapter of a"), None),
        (("adapter of a", "a"), None),
        (("adapter of b", "a"), None),
        (("adapter of a", "adapter of a"), None),
        (("a", "bare"), None),
        (("bare", "a"), None),
    ],
)
def test_compare_takes_what_belongs_together_and_names_what_does_not(pair, said, checkpoints, capsys):
    code = main(["drift", "compare", *(checkpoints[name] for name in pair), "--json"])
    out, err = capsys.readouterr()
    if said is not None:
        assert code == 2
        assert said in err
        return
    assert code == 0
    found = json.loads(out.splitlines()[-1])
    assert found["verdict"] == ("changed" if pair == ("adapter of b", "a") else "steady")


def test_ppo_gives_a_critic_of_its_own_the_width_that_its_trunk_gives_out(tokenizer, tmp_path):
    from transformers import OPTConfig

    from interp_rlhf import PPOConfig, PPOTrainer

    model = AutoModelForCausalLM.from_config(
        OPTConfig(
            vocab_size=len(tokenizer), hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4,
            word_embed_proj_dim=16,
            do_layer_norm_before=False, max_position_embeddings=128, pad_token_id=1, eos_token_id=0, bos_token_id=0,
        )
    )  # fmt: skip
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 0, 1
    trainer = PPOTrainer(
        model=model, reward_funcs=[lambda completions, **k: [1.0] * len(completions)],
        args=PPOConfig(
            str(tmp_path), per_device_train_batch_size=4, max_steps=1, num_ppo_epochs=1, max_completion_length=4, kl_coef=0.0,
            critic="model", use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": s} for s in sentences(8)]), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 1


# What was given in another form than is expected


def test_reward_metrics_are_of_the_totals_that_the_trainer_uses(model_folder, tokenizer, tmp_path):
    from interp_rlhf import ConceptReward

    class Abstaining(ConceptReward):
        def __call__(self, completion_ids, **kwargs):
            values = super().__call__(completion_ids=completion_ids, **kwargs)
            return [None if i == 0 else 10 + value for i, value in enumerate(values)]

    def other(completions, **kwargs):
        return [float(i % 3) for i in range(len(completions))]

    model = AutoModelForCausalLM.from_pretrained(model_folder())
    trainer = make_trainer(
        "GRPO", str(model_folder()), tokenizer, tmp_path, reward_funcs=[Abstaining(make_readout(model)), other],
        per_device_train_batch_size=8, num_generations=4, max_steps=1, logging_steps=1,
    )  # fmt: skip
    attach(trainer)
    real, given = trainer._calculate_rewards, []
    trainer._calculate_rewards = lambda *arguments: given.append(real(*arguments)) or given[-1]
    trainer.train()
    totals = given[0].sum(1).double().view(2, 4)  # without an abstention: it was filled in
    logged = [entry for entry in trainer.state.log_history if "interp/reward/within_group_share" in entry]
    expected = totals.var(1, unbiased=False).mean() / totals.var(unbiased=False)
    assert logged[0]["interp/reward/within_group_share"] == pytest.approx(float(expected), rel=1e-4)


def test_the_share_within_groups_counts_every_judged_row_once():
    from collections import defaultdict
    from types import SimpleNamespace

    from interp_rlhf.training.watch import RolloutWatch

    nan = float("nan")
    trainer = SimpleNamespace(
        reward_weights=torch.ones(1), model=SimpleNamespace(training=True), num_generations=8,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    watch = object.__new__(RolloutWatch)
    watch._trainer, watch._measures, watch._warned = trainer, {}, False
    watch._rollout = SimpleNamespace(completion_ids=[[0]] * 16)
    watch._about_reward(torch.tensor([0.0, 10.0, *[nan] * 6, *[0.0] * 8])[:, None], {})
    # Within: 2 · 25 = 50. In all: a 10 and nine 0, 81 + 9 · 1 = 90.
    assert trainer._metrics["train"]["interp/reward/within_group_share"] == [pytest.approx(50 / 90)]


@pytest.mark.parametrize(
    "form", ["json", "end mark", "indented", "null", "quoted null", "byte-order mark", "as written"]
)
def test_evidence_goes_into_a_card_of_any_form(form, load, tokenizer, tmp_path):
    import yaml
    from tiny import make_card

    from interp_rlhf.concepts.card import load_card, with_evidence

    path = make_card(tmp_path, load(), tokenizer)
    card = load_card(path).card
    plain = path.read_text()
    assert card.evidence is not None
    bare = plain[: plain.index("\nevidence:") + 1]
    text = {
        "json": json.dumps(yaml.safe_load(bare)),
        "end mark": bare + "...\n",
        "indented": "".join(f"  {line}\n" for line in bare.splitlines()),
        "null": "evidence: null\n" + bare,
        "quoted null": bare + '"evidence": null\n',
        "byte-order mark": "\ufeff" + bare,
        "as written": "# by hand\n" + bare,
    }[form]
    new = with_evidence(text, card.evidence)
    path.write_text(new)
    assert load_card(path).card == card
    assert ("# by hand" in new) == (form == "as written")


def test_messages_as_json_are_messages_in_every_file(tmp_path):
    prompts = [row["messages"][:1] for row in TALK]
    answers = [row["messages"][1]["content"] for row in TALK]
    labels = [row["label"] for row in TALK]
    table = pandas.DataFrame({"prompt": prompts, "completion": answers, "label": labels})
    for text in (json.dumps, lambda prompt: " " + json.dumps(prompt, indent=1), lambda prompt: json.dumps(prompt[0])):
        written_so = table.assign(prompt=table["prompt"].map(text))
        written_so.to_csv(tmp_path / "a.csv", index=False)
        written_so.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
        written_so.to_parquet(tmp_path / "a.parquet")
        for name in ("a.csv", "a.jsonl", "a.parquet"):
            assert load_examples(tmp_path / name).rows[0]["prompt"] == prompts[0], name
    table.to_csv(tmp_path / "repr.csv", index=False)
    with pytest.raises(
        ValueError, match=r"`prompt` holds messages that are not JSON: .* Write them with `json.dumps`"
    ):
        load_examples(tmp_path / "repr.csv")
    answer = '{"name": "Ann", "role": "admin"}'
    table.assign(prompt="who is it", completion=answer).to_json(tmp_path / "b.jsonl", orient="records", lines=True)
    assert load_examples(tmp_path / "b.jsonl").rows[0]["completion"] == answer


def test_tables_and_generators_in_memory_are_rows(load, tokenizer):
    from interp_rlhf.concepts.examples import make_examples

    expected = make_examples(ROWS).fingerprint
    for rows in (pandas.DataFrame(ROWS), (row for row in ROWS), Dataset.from_list(ROWS)):
        assert make_examples(rows).fingerprint == expected
    with pytest.raises(ValueError, match=r"is a DatasetDict with the keys `train` – expected rows"):
        make_examples(datasets.DatasetDict(train=Dataset.from_list(ROWS)))
    model = load()
    readout = make_readout(model)
    texts = [{"text": row["text"]} for row in ROWS[:3]]
    table, rows = (read(model, given, [readout], tokenizer=tokenizer) for given in (pandas.DataFrame(texts), texts))
    assert readout.score(table["concept"]) == pytest.approx(readout.score(rows["concept"]))


def test_labels_in_other_types_are_0_and_1_and_nan_is_none():
    import numpy

    from interp_rlhf.concepts.examples import make_examples

    expected = make_examples(ROWS).labels.tolist()

    def labels(kind, positive=None):
        return make_examples([{**row, "label": kind(row["label"])} for row in ROWS], positive=positive).labels.tolist()

    for kind in (bool, float, str, numpy.float32, numpy.bool_, torch.tensor, lambda label: f"{label}.0"):
        for positive in (None, 1, True, "1", "true"):
            assert labels(kind, positive) == expected
    with pytest.raises(ValueError, match=r"rows have no `label`"):
        labels(lambda label: "warm" if label else float("nan"), "warm")


@pytest.mark.parametrize("case", ["latin-1", "binary", "empty", "weights", "version", "weight", "exists"])
def test_broken_files_and_options_end_in_one_line(case, model_folder, load, tokenizer, tmp_path, capsys, monkeypatch):
    import shutil

    from tiny import make_card

    import interp_rlhf.commands.probe

    written(tmp_path / "data.csv", ROWS)
    data, model, more = tmp_path / "data.csv", tmp_path / "model", []
    shutil.copytree(model_folder(), model)
    if case in ("latin-1", "binary"):
        card = make_card(tmp_path, load(), tokenizer)
        card.write_bytes(
            card.read_text().replace("concept:", "concept: wärme ").encode("latin-1")
            if case == "latin-1"
            else bytes(range(256))
        )
        assert main(["probe", "check", str(card), "--fit-data", str(data), "--data", str(data)]) == 2
    else:
        if case == "empty":
            data = tmp_path / "empty.json"
            data.write_text("")
        elif case == "weights":
            whole = (model / "model.safetensors").read_bytes()
            (model / "model.safetensors").write_bytes(whole[:-100])
        elif case == "exists":
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "reward.v1.yaml").write_text("mine")
        else:
            more = [f"--{case}", {"version": "0", "weight": "nan"}[case]]
        if case != "weights":
            monkeypatch.setattr(
                interp_rlhf.commands.probe, "load_or_embedded", lambda name: pytest.fail("the model was loaded")
            )
        fit = [
            "probe",
            "fit",
            "--data",
            str(data),
            "--name",
            "c",
            "--out",
            str(tmp_path / "out"),
            "--model",
            str(model),
        ]
        assert main([*fit, "--hook-point", LAYER, *more]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "it/s" not in line]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")


def test_files_of_others_next_to_a_page_stay(tmp_path, capsys):
    from interp_rlhf.runlog.log import RunLog

    log = RunLog(tmp_path / "interp.jsonl")
    log.append("run", title="t", arm="a", model="m")
    log.append("end", seconds=1.0)
    (tmp_path / "README.md").write_text("# Mine")
    report = ["report", str(log.path), "--out"]
    assert main([*report, str(tmp_path / "README.html")]) == 2
    assert "README.md` would be replaced" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "# Mine"
    for _ in range(2):  # its own it replaces
        assert main([*report, str(tmp_path / "report.html")]) == 0
    (tmp_path / "u.events.jsonl").write_text('{"event": "run", "arm": "mine"}\n')
    inspect = ["sae", "inspect", "none", "--texts", str(tmp_path / "README.md"), "--out", str(tmp_path / "u.html")]
    assert main(inspect) == 2
    assert "u.events.jsonl` would be replaced" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("concept_anchor", {"weight": True}, "`weight` of a `ConceptAnchor` is True"),
        ("concept_anchor", {"weight": 1, "pooled": "false"}, "`pooled` of a `ConceptAnchor` is 'false'"),
        ("concept_anchor", {"weight": 1, "name": False}, "`name` of a `ConceptAnchor` is False"),
        ("concept_anchor", {"weight": 1, "random_direction": True}, "`random_direction` of a `ConceptAnchor` is True"),
        ("concept_anchor", {"weight": 1, "schedule": "warmup"}, "`schedule` is 'warmup'"),
        ("concept_anchor", {"weight": 1, "card": 5}, "`card` of a regularizer of kind `concept_anchor` is 5"),
        ("preventative_steering", {"alpha": True}, "`alpha` of a `PreventativeSteering` is True"),
    ],
)
def test_words_and_flags_are_no_numbers(kind, options, said, load, tokenizer, tmp_path):
    from tiny import make_card

    from interp_rlhf.training.make import make_intervention, make_regularizer

    make = make_intervention if kind == "preventative_steering" else make_regularizer
    with pytest.raises(ValueError, match=said):
        make({"kind": kind, "card": str(make_card(tmp_path, load(), tokenizer)), **options})


@pytest.mark.parametrize("wrong", [{"weight": float("nan")}, {"role": "monitor"}, {"reader": "nobody"}])
def test_a_concept_reward_refuses_what_it_cannot_be(wrong, load):
    from interp_rlhf import ConceptReward

    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` of `ConceptReward` is"):
        ConceptReward(make_readout(load()), **wrong)


def test_saves_that_are_exact_up_to_the_last_step_are_accepted():
    from types import SimpleNamespace

    from interp_rlhf.training.checkpoints import require_aligned_saves

    # 33 prompts, one per batch: an epoch of ⌈33 · 3 / 2⌉ = 50 steps, not a multiple of 3; inside of it every third is aligned.
    args = SimpleNamespace(
        save_strategy="steps", steps_per_generation=3, num_iterations=1, gradient_accumulation_steps=2,
        generation_batch_size=2, num_generations=2, max_steps=48,
    )  # fmt: skip
    require_aligned_saves(args, 3, 33)
    for steps, every in ((54, 3), (-1, 3), (48, 4)):
        args.max_steps = steps
        with pytest.raises(ValueError, match=r"expected a multiple of 50 steps"):
            require_aligned_saves(args, every, 33)


@pytest.mark.parametrize(
    ("file", "content"),
    [("model.safetensors.index.json", '{"weight'), ("model.safetensors.index.json", "[]"), ("trainer_state.json", "[]"),
     ("optimizer.pt", ""), ("scheduler.pt", "")],
)  # fmt: skip
def test_a_torn_checkpoint_is_passed_over(file, content, tmp_path):
    from safetensors.torch import save_file

    from interp_rlhf.training.checkpoints import last_complete_checkpoint

    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"a": torch.zeros(1)}, str(folder / "model.safetensors"))
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        for name in ("rng_state.pth", "scheduler.pt", "optimizer.pt"):
            (folder / name).write_text("x")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / file).write_text(content)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_recipes_read_tables_as_people_have_them(tmp_path):
    from types import SimpleNamespace

    from interp_rlhf.recipe import datasets_of
    from interp_rlhf.sae.stream import load_corpus

    def found(path, split="train"):
        script = SimpleNamespace(
            dataset_name=str(path), dataset_config=None, dataset_streaming=False, dataset_train_split=split,
            dataset_test_split="test",
        )  # fmt: skip
        return datasets_of(script)["train_dataset"]

    rows = [{"prompt": json.dumps(row["messages"][:1]), "completion": "7", "label": "True"} for row in TALK]
    fields = ("prompt", "completion", "label")
    for how in ({}, {"delimiter": ";"}, {"encoding": "utf-16", "delimiter": "\t"}):
        data = found(written(tmp_path / "a.csv", rows, fields, **how))
        assert data[0] == {"prompt": TALK[0]["messages"][:1], "completion": "7", "label": True}
    with pytest.raises(
        ValueError, match=r"`dataset_train_split` is `dev` – expected one of the splits of .*: `train`"
    ):
        found(tmp_path / "a.csv", "dev")
    for name in ("e.jsonl", "e.json", "e.csv"):
        (tmp_path / name).write_text("")
        with pytest.raises(ValueError, match="has no rows"):
            found(tmp_path / name)
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="is not a whole Parquet file"):
        found(tmp_path / "t.parquet")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwarm rain")
    assert load_corpus(tmp_path / "a.txt") == ["warm rain"]


def test_attach_checks_how_often_it_samples_and_takes_drift_as_a_mapping(model_folder, tokenizer, tmp_path):
    def trainer():
        return make_trainer("SFT", str(model_folder()), tokenizer, tmp_path)

    for wrong in (0, -1, "x", 2.5, None, True):
        with pytest.raises(ValueError, match=r"`samples_every` is"):
            attach(trainer(), samples_every=wrong)
    for wrong in (True, 5, {"evry": 1}):
        with pytest.raises(ValueError, match=r"`drift` is .* – expected a `DriftConfig`, or a mapping of its fields"):
            attach(trainer(), drift=wrong)
    with pytest.raises(ValueError, match=r"`every` is 0"):
        attach(trainer(), drift={"every": 0})
    attached = attach(trainer(), drift={"every": 7})
    assert any(isinstance(callback, DriftCallback) for callback in attached.trainer.callback_handler.callbacks)


def test_texts_and_prompts_of_a_drift_configuration_may_be_a_file(tmp_path):
    from interp_rlhf.drift.config import DriftConfig

    rows = [{"text": f"text {i}", "prompt": f"prompt {i}"} for i in range(8)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    found = DriftConfig(texts=str(path), prompts=path)
    assert found.texts == rows
    assert found.prompts == [row["prompt"] for row in rows]
    path.write_text(json.dumps({"text": "a"}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"has 1 rows, 1 of them without a `prompt`"):
        DriftConfig(prompts=path)
    with pytest.raises(FileNotFoundError):
        DriftConfig(texts=str(tmp_path / "absent.csv"))
