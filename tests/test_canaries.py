"""Is it the frozen reference? Wrong ones are caught, right ones are not, and what is taken from a trainer's pass is a reading."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, labelled_rows, make_card, make_model, make_readout, sentences, with_lora
from training import lora_config, make_trainer, randomize_adapters
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig, OlmoConfig, TrainerCallback

from interp_rlhf import (
    ConceptAnchor,
    ConceptReward,
    DriftConfig,
    DriftPenalty,
    Readout,
    Subspace,
    attach,
    read,
)
from interp_rlhf.activations import (
    Canaries,
    agreement,
    causes,
    identity,
    make_canaries,
    resolve,
)
from interp_rlhf.concepts.card import load_card
from interp_rlhf.concepts.examples import make_examples
from interp_rlhf.concepts.fitting import fit_probe

LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, tokenizer):
    """A checkpoint as they are released, in numbers of bfloat16, and a card that was fitted on it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model("llama", tokenizer).to(torch.bfloat16).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = make_card(tmp_path_factory.mktemp("card"), load(folder), tokenizer)
    return folder, card


def load(folder, dtype=torch.float32, **more):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more).eval()


def grpo(fitted, tokenizer, out, model=None, lora=None, reference=None, drift=None, callbacks=(), extra=(), **changes):
    """Two steps of a trainer that is paid for the card."""
    folder, card = fitted
    settings = {"beta": 0.0, "max_steps": 1, "learning_rate": 0.0, **changes}
    trainer = make_trainer(
        "GRPO", str(folder) if model is None else model, tokenizer, out, lora=lora,
        reward_funcs=[ConceptReward.from_card(card), *extra], **settings,
    )  # fmt: skip
    for callback in callbacks:
        trainer.add_callback(callback(trainer))
    attached = attach(trainer, reference=reference, drift=drift)
    trainer.train()
    return trainer, attached


# Twelve and more ways to hand over a wrong reference: each gives the keywords of `grpo`.


def merged(folder, tokenizer):
    return {"reference": with_lora(load(folder), seed=3).merge_and_unload()}


def trained_a_little(folder, tokenizer):
    model = load(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    batch = tokenizer(sentences(8), padding=True, return_tensors="pt", return_token_type_ids=False)
    for _ in range(100):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"reference": model}


def another_seed(folder, tokenizer):
    return {"reference": make_model("llama", tokenizer, seed=7)}


def other_positions(folder, tokenizer):
    model = load(folder)
    config = copy.deepcopy(model.config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
    other = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    other.load_state_dict(model.state_dict())
    return {"reference": other}


def base_changed_by_pissa(folder, tokenizer):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa")
    return {"model": get_peft_model(load(folder), config)}


def biases_trained_along(folder, tokenizer):
    base = make_model("qwen2", tokenizer)
    return {"model": get_peft_model(base, lora_config(bias="all"))}


def permuted_vocabulary(folder, tokenizer):
    model = load(folder)
    order = torch.arange(model.config.vocab_size)
    order[50:] = order[50:].roll(1)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[order])
    return {"reference": model}


def one_matrix_rescaled(folder, tokenizer):
    model = load(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.02)
    return {"reference": model}


def layers_swapped(folder, tokenizer):
    model = load(folder)
    model.model.layers[0], model.model.layers[1] = model.model.layers[1], model.model.layers[0]
    return {"reference": model}


def a_head_switched_off(folder, tokenizer):
    model = load(folder)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, :8] = 0
    return {"reference": model}


def steered_by_a_forgotten_hook(folder, tokenizer):
    model = load(folder)
    push = torch.randn(32, generator=torch.Generator().manual_seed(1)) * 0.05
    model.model.layers[0].register_forward_hook(
        lambda m, a, out: (out[0] + push, *out[1:]) if isinstance(out, tuple) else out + push
    )
    return {"reference": model}


def four_bits_saved_as_floats(folder, tokenizer):
    model = load(folder)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.dim() == 2:
                scale = parameter.abs().amax(1, keepdim=True) / 7
                parameter.copy_((parameter / scale).round() * scale)
    return {"reference": model}


def the_policy_itself(folder, tokenizer):
    model = load(folder)
    return {"model": model, "reference": model}


def attention_scaled(folder, tokenizer):
    model = load(folder)
    for layer in model.model.layers:
        layer.self_attn.scaling *= 1.05
    return {"reference": model}


WRONG = [
    merged, trained_a_little, another_seed, other_positions, base_changed_by_pissa, biases_trained_along, permuted_vocabulary,
    one_matrix_rescaled, layers_swapped, a_head_switched_off, steered_by_a_forgotten_hook, four_bits_saved_as_floats,
    the_policy_itself, attention_scaled,
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda way: way.__name__)
def test_a_wrong_reference_is_caught_at_attach_or_at_the_first_rollout(wrong, fitted, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"is not that one|frozen base|separate weights|initialized by `pissa`"):
        grpo(fitted, tokenizer, tmp_path, **wrong(fitted[0], tokenizer))


def test_an_initialization_that_changes_the_base_is_refused_without_a_card_too(fitted, tokenizer, tmp_path):
    folder, _ = fitted
    readout = make_readout(load(folder))
    for kind in ("GRPO", "DPO", "SFT"):
        more = {"reward_funcs": [ConceptReward(readout)]} if kind == "GRPO" else {}
        model = base_changed_by_pissa(folder, tokenizer)["model"]
        trainer = make_trainer(kind, model, tokenizer, tmp_path / kind, **more)
        terms = [] if kind == "GRPO" else [ConceptAnchor(readout=readout, weight=1.0)]
        with pytest.raises(ValueError, match="was initialized by `pissa`"):
            attach(trainer, regularizers=terms)


class Moves(TrainerCallback):
    """Trains the reference behind everybody's back."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        with torch.no_grad():
            self.trainer.ref_model.model.layers[0].mlp.down_proj.weight.add_(0.05)


def test_a_reference_that_moves_is_caught_at_the_next_drift_evaluation(fitted, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="the reference has moved"):
        grpo(fitted, tokenizer, tmp_path, beta=0.1, max_steps=3, drift=DriftConfig(every=2), callbacks=[Moves])


# Twelve right ones.


def test_the_same_checkpoint_is_read_whatever_its_form(fitted, tokenizer, tmp_path):
    folder, _ = fitted
    load(folder).save_pretrained(tmp_path / "again", max_shard_size="40KB")
    right = {
        "by its path": {},
        "given, loaded again": {"reference": load(folder)},
        "given, as it was loaded for training": {"reference": load(folder).train()},
        "in bfloat16": {"reference": load(folder, torch.bfloat16)},
        "in float16": {"reference": load(folder, torch.float16)},
        "saved again in pieces": {"reference": load(tmp_path / "again")},
        "another attention kernel": {"reference": load(folder, attn_implementation="eager")},
        "another batch size": {"per_device_train_batch_size": 8},
        "the trainer's own": {"beta": 0.1},
        "a new LoRA": {"lora": {}, "beta": 0.1},
        "LoRA with its own initialization, all linear layers": {"lora": {"target_modules": "all-linear"}},
        "mixed precision": {"bf16": True, "reference": None},
        "checkpointing off": {"gradient_checkpointing": False, "lora": {}},
        "a copy": {"reference": copy.deepcopy(load(folder))},
    }
    for name, changes in right.items():
        _, attached = grpo(fitted, tokenizer, tmp_path / name.replace(" ", "_"), **changes)
        assert attached.rollout.taken + attached.rollout.own_forwards >= 1, name


def test_an_adapter_that_changes_the_policy_and_a_resumed_run_are_read_on_the_same_base(fitted, tokenizer, tmp_path):
    folder, card = fitted
    settings = {
        "beta": 0.1,
        "lora": {},
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 1e-2,
    }

    def build():
        return make_trainer(
            "GRPO", str(folder), tokenizer, tmp_path, reward_funcs=[ConceptReward.from_card(card)], **settings
        )

    trainer = build()
    randomize_adapters(trainer)
    attach(trainer)
    trainer.train()
    trainer = build()
    randomize_adapters(trainer, 1)
    attached = attach(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert attached.rollout.taken >= 1


def test_a_policy_that_goes_on_from_a_trained_adapter_is_read_on_its_start_with_a_warning(
    fitted, tokenizer, tmp_path, caplog
):
    """TRL keeps a copy named `ref`: the evidence of cards is about the base without it, and `attach` says so."""
    policy = with_lora(load(fitted[0]), seed=3).train()
    trainer, attached = grpo(fitted, tokenizer, tmp_path, model=policy, beta=0.1, max_steps=2)
    assert "ref" in trainer.model.peft_config
    assert "their evidence is about another model than this one" in caplog.text
    assert attached.rollout.taken == 2


def test_less_precise_and_another_model_are_told_apart_with_the_numbers(fitted, tokenizer):
    folder, card = fitted
    readout = Readout.from_card(str(card))
    kept = Canaries.of(readout.header.canaries)
    assert kept.numbers == "16 bits"
    assert len(kept.scores) == sum(len(line) - 1 for line in kept.ids)
    same = agreement(load(folder), kept, readout.hook_point, readout.read_directions)
    assert same.error < 1e-5
    half = agreement(load(folder, torch.bfloat16), kept, readout.hook_point, readout.read_directions)
    assert 1e-4 < half.error < 0.05
    assert half.agrees
    assert half.precision == "16 bits"
    coarse = load(folder)
    with torch.no_grad():
        for parameter in coarse.parameters():
            parameter.copy_(parameter + 0.2 * parameter.std() * torch.randn_like(parameter))
    less = agreement(coarse.to(torch.bfloat16), kept, readout.hook_point, readout.read_directions)
    assert not less.agrees
    assert (
        "may be the same model, less precise (weights of type torch.bfloat16)" in str(less) or less.correlation < 0.9
    )
    other = agreement(make_model("llama", tokenizer, seed=7), kept, readout.hook_point, readout.read_directions)
    assert str(other).endswith("It is another model")
    with pytest.raises(ValueError, match=r"off by \d.* of their standard deviation \(correlation"):
        readout.check_model(make_model("llama", tokenizer, seed=7))


def test_the_digest_does_not_see_what_canaries_see(fitted, tokenizer):
    """The quick first look: norm weights. Models whose norms have no weights share one digest."""
    folder, card = fitted
    model = trained_a_little(folder, tokenizer)["reference"]
    assert identity(model, LAYER) == identity(load(folder), LAYER)
    with pytest.raises(ValueError, match="with the same norm weights"):
        Readout.from_card(str(card)).check_model(model)
    olmo = OlmoConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        pad_token_id=1, eos_token_id=0,
    )  # fmt: skip
    one, other = (AutoModelForCausalLM.from_config(olmo, dtype=torch.float32).eval() for _ in range(2))
    assert identity(one, LAYER) == identity(other, LAYER)
    readout = make_readout(one)
    kept = make_canaries(one, tokenizer, LAYER, readout.read_directions)
    assert agreement(one, kept, LAYER, readout.read_directions).error < 1e-5
    assert not agreement(other, kept, LAYER, readout.read_directions).agrees


def test_an_artifact_without_canaries_is_a_monitor_and_the_command_adds_them(fitted, tokenizer, tmp_path, caplog):
    import shutil

    from interp_rlhf.cli import main
    from interp_rlhf.concepts.artifact import load_artifact
    from interp_rlhf.concepts.publish import publish

    folder, _ = fitted
    examples = make_examples(labelled_rows(24, seed=1))
    fit = fit_probe(load(folder), tokenizer, examples, [LAYER], model_id="tiny")
    old = copy.copy(fit.artifact.header)
    object.__setattr__(old, "canaries", {})
    object.__setattr__(fit.artifact, "header", old)
    path = publish(fit, tmp_path, name="warmth", concept="Speaks warmly.")
    readout = Readout.from_card(str(path))
    assert f"interp-rlhf probe canaries {path}" in caplog.text
    readout.check_model(load(folder))  # by the digest, as before
    assert main(["probe", "canaries", str(path), "--model", str(folder)]) == 0
    new = tmp_path / "reward.v2.yaml"
    card = load_card(new).card
    assert (card.version, card.evidence) == (2, None)
    made = load_artifact(tmp_path / card.readout.artifact.path)
    assert torch.equal(made.weight, fit.artifact.weight)
    Readout.from_card(str(new)).check_model(load(folder))
    assert main(["probe", "canaries", str(path), "--model", str(folder)]) == 2  # v2 is there and stays
    assert main(["probe", "canaries", str(new), "--model", str(folder)]) == 2
    shutil.rmtree(tmp_path)


# Noise, padding and positions: what is taken from a trainer's pass.


def rewards_by_hand(folder, tokenizer, trainer, reward):
    frozen = load(folder)
    for asked, ids, found in reward.seen:
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
        own = ids[: next((i for i, token in enumerate(ids) if token == 0), len(ids))]
        if not own:
            assert found is None
            continue
        states = []
        handle = resolve(frozen, reward.readout.hook_point).register_forward_hook(
            lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out)  # noqa: B023
        )
        with torch.no_grad():
            frozen(torch.tensor([[*prompt, *own]]), use_cache=False)
        handle.remove()
        scores = states[0][0] @ reward.readout.weight + reward.readout.bias
        assert found == pytest.approx(float(scores[len(prompt) :].mean()), abs=1e-4)


class Spy(ConceptReward):
    def __call__(self, completion_ids, **more):
        found = super().__call__(completion_ids, **more)
        self.seen = [*getattr(self, "seen", []), *zip(more["prompts"], completion_ids, found, strict=True)]
        return found


def noisy_models(tokenizer):
    common = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 1, "eos_token_id": 0, "bos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    mixtral = AutoModelForCausalLM.from_config(
        MixtralConfig(**common, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.1),
        dtype=torch.float32,
    )
    with torch.no_grad():
        for parameter in mixtral.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    mixtral.generation_config.eos_token_id = 0
    mixtral.generation_config.pad_token_id = 1
    return {
        "NEFTune": (make_model("llama", tokenizer), {"neftune_noise_alpha": 5.0}),
        "router jitter": (mixtral, {}),
        "attention dropout": (make_model("llama", tokenizer, attention_dropout=0.3), {}),
        "learned positions": (make_model("gpt2", tokenizer), {}),
    }


def test_a_pass_with_noise_or_padding_is_not_taken_for_a_reading(tokenizer, tmp_path):
    for name, (model, changes) in noisy_models(tokenizer).items():
        folder = tmp_path / name.replace(" ", "_")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        reward = Spy(make_readout(model))
        target = {"target_modules": ["c_attn"], "fan_in_fan_out": True} if name == "learned positions" else {}
        trainer = make_trainer(
            "GRPO", str(folder), tokenizer, folder / "out", lora=target, reward_funcs=[reward], max_steps=2, learning_rate=1e-2,
            **changes,
        )  # fmt: skip
        attached = attach(trainer)
        trainer.train()
        known = attached.rollout.causes["reference"]
        assert known.noise or known.padding, name
        assert attached.rollout.taken == 0, name
        rewards_by_hand(folder, tokenizer, trainer, reward)


def test_noise_that_nobody_knew_of_stops_the_run_and_is_named(fitted, tokenizer, tmp_path):
    """A hook that is added after `attach` and draws noise in training mode: the row that is read again tells."""
    folder, card = fitted
    trainer = make_trainer(
        "GRPO", str(folder), tokenizer, tmp_path, lora={}, reward_funcs=[ConceptReward.from_card(card)]
    )
    attach(trainer)

    def noise(module, args, output):
        return output + 0.3 * torch.randn_like(output) if module.training else output

    trainer.model.get_base_model().get_input_embeddings().register_forward_hook(noise)
    with pytest.raises(
        ValueError, match=r"Scores of `warmth` on the reference are off by .* Cause: .*in training mode"
    ):
        trainer.train()


def test_terms_start_at_zero_or_are_refused(tokenizer, tmp_path):
    for name, (model, changes) in noisy_models(tokenizer).items():
        folder = tmp_path / name.replace(" ", "_")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for kind in ("SFT", "DPO"):
            target = {"target_modules": ["c_attn"], "fan_in_fan_out": True} if name == "learned positions" else {}
            trainer = make_trainer(
                kind, str(folder), tokenizer, folder / "out", lora=target, max_steps=1, learning_rate=0.0, **changes
            )
            point = "transformer.h.1" if name == "learned positions" else LAYER
            terms = [
                ConceptAnchor(readout=make_readout(model), weight=1.0),
                DriftPenalty(hook_point=point, weight=1.0, name="whole"),
            ]
            if causes(trainer.model, trainer.args).noise:
                with pytest.raises(ValueError, match=r"The training mode draws .* a model that has not moved"):
                    attach(trainer, regularizers=terms)
                continue
            attach(trainer, regularizers=terms)
            trainer.train()
            logs = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
            assert logs["interp/anchor_concept/squared_gap"] == pytest.approx(0, abs=1e-9)
            assert logs["interp/whole/relative_square"] == pytest.approx(0, abs=1e-9)


def test_dropout_that_trl_has_switched_off_is_no_cause(tokenizer, tmp_path):
    """DPO turns `nn.Dropout` off; the rates stay in the config. What the model does is looked at, not what it says."""
    folder = tmp_path / "gpt2"
    make_model("gpt2", tokenizer, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trainer = make_trainer("DPO", str(folder), tokenizer, tmp_path / "out")
    assert trainer.model.config.resid_pdrop == 0.1
    assert causes(trainer.model, trainer.args).noise == ()
    assert causes(make_model("gpt2", tokenizer, resid_pdrop=0.1), None).noise


def test_the_reference_is_what_training_begins_with_not_what_lies_at_its_path(tokenizer, tmp_path):
    folder = tmp_path / "base"
    make_model("llama", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    policy = with_lora(load(folder)).merge_and_unload().requires_grad_(True)
    assert policy.config._name_or_path == str(folder)
    trainer = make_trainer("SFT", policy, tokenizer, tmp_path / "sft", max_steps=1, learning_rate=0.0)
    attach(trainer, regularizers=[ConceptAnchor(readout=make_readout(policy), weight=1.0)])
    trainer.train()
    logs = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert logs["interp/anchor_concept/squared_gap"] == 0.0
    trainer = make_trainer(
        "GRPO", policy, tokenizer, tmp_path / "grpo", beta=0.0, reward_funcs=[ConceptReward(make_readout(policy))]
    )
    reference = attach(trainer).rollout.reference
    for mine, theirs in zip(reference.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()


def test_a_policy_in_two_precisions_is_copied_as_it_is(tokenizer, tmp_path):
    folder = tmp_path / "half"
    make_model("llama", tokenizer, tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reward = ConceptReward(make_readout(make_model("llama", tokenizer), name="both_ways"), reader="both")
    trainer = make_trainer(
        "GRPO", str(folder), tokenizer, tmp_path / "out", reward_funcs=[reward], beta=0.0, max_steps=1, learning_rate=0.0,
        model_init_kwargs={"dtype": "bfloat16"}, cast_lm_head_to_fp32=True,
    )  # fmt: skip
    attach(trainer)
    trainer.train()
    assert [log["interp/both_ways/drift"] for log in trainer.state.log_history if "interp/both_ways/drift" in log] == [
        0.0
    ]


def test_a_reference_that_would_not_be_used_is_refused(tokenizer, fitted, tmp_path):
    folder, _ = fitted
    terms = [ConceptAnchor(readout=make_readout(load(folder)), weight=1.0)]
    trainer = make_trainer("DPO", str(folder), tokenizer, tmp_path)
    with pytest.raises(ValueError, match="its own loss runs"):
        attach(trainer, regularizers=terms, reference=make_model("llama", tokenizer, seed=7))
    trainer = make_trainer(
        "DPO", str(folder), tokenizer, tmp_path, precompute_ref_log_probs=True, max_steps=1, learning_rate=0.0
    )
    trainer.train()
    with pytest.raises(ValueError, match="Attach before training, or pass `reference=`"):
        attach(trainer, regularizers=terms)
    attach(trainer, regularizers=terms, reference=load(folder))  # what the message says


def test_tokens_that_a_template_brought_are_in_the_reference_too(tokenizer, fitted, tmp_path):
    from tiny import make_tokenizer

    folder, _ = fitted
    other = make_tokenizer()
    other.add_special_tokens({"additional_special_tokens": ["<|from|>", "<|says|>"]})
    other.chat_template = (
        "{% for m in messages %}<|from|>{{ m['role'] }}<|says|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|from|>assistant<|says|>{% endif %}"
    )
    other.save_pretrained(tmp_path / "template")
    own = AutoTokenizer.from_pretrained(folder)  # TRL adds the tokens to it
    trainer = make_trainer(
        "SFT",
        str(folder),
        own,
        tmp_path / "out",
        chat_template_path=str(tmp_path / "template"),
        max_steps=1,
        learning_rate=0.0,
    )
    attach(trainer, regularizers=[ConceptAnchor(readout=make_readout(load(folder)), weight=1.0)])
    trainer.train()
    logs = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert logs["interp/anchor_concept/squared_gap"] == 0.0


def rope(kind, tokenizer):
    base = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 1, "eos_token_id": 0, "bos_token_id": None,
    }  # fmt: skip
    if kind == "dynamic":
        parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
        config = LlamaConfig(**base, max_position_embeddings=32, rope_parameters=parameters)
    else:
        from transformers import Phi3Config

        parameters = {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.5, 3.0, 8.0, 30.0],
            "original_max_position_embeddings": 32, "partial_rotary_factor": 1.0,
        }  # fmt: skip
        config = Phi3Config(
            **base, max_position_embeddings=512, original_max_position_embeddings=32, rope_parameters=parameters
        )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 0, 1
    return model


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_row_does_not_feel_how_long_the_others_are(kind, tokenizer, tmp_path):
    """RoPE that looks at the longest row of a batch, or remembers it: each row reads as on a fresh model."""
    texts = [
        *sentences(3, seed=1, low=5, high=8),
        " ".join(sentences(6, seed=5, low=7, high=8)),
        " ".join(sentences(14, seed=2)),
    ]
    readout = make_readout(rope(kind, tokenizer))
    alone = [
        readout.score(read(rope(kind, tokenizer), [text], [readout], tokenizer=tokenizer)["concept"])[0]
        for text in texts
    ]
    model = rope(kind, tokenizer)
    for order in (texts, texts[::-1]):
        together = readout.score(read(model, order, [readout], tokenizer=tokenizer)["concept"])
        assert together == pytest.approx(alone if order is texts else alone[::-1], abs=1e-5)
    assert readout.score(read(model, texts[:1], [readout], tokenizer=tokenizer)["concept"])[0] == pytest.approx(
        alone[0], abs=1e-5
    )
    # Rollouts: a batch whose padded width passes the limit is read again, row by row of one length.
    folder = tmp_path / kind
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reward = Spy(readout)
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts[:4]]
    targets = {"target_modules": ["qkv_proj"]} if kind == "longrope" else {}
    trainer = make_trainer(
        "GRPO", str(folder), tokenizer, tmp_path / "out", lora=targets, rows=rows, reward_funcs=[reward], max_steps=2,
        per_device_train_batch_size=8,
    )  # fmt: skip
    attached = attach(trainer)
    trainer.train()
    assert attached.rollout.own_forwards == 2
    rewards_by_hand(folder, tokenizer, trainer, reward)


def test_reading_leaves_dynamic_positions_as_the_trainer_had_them(tokenizer):
    model = rope("dynamic", tokenizer)
    long = torch.randint(5, 200, (1, 60))
    with torch.no_grad():
        before = model(long).logits
        read(model, ["what is it"], [make_readout(model)], tokenizer=tokenizer)
        short = torch.randint(5, 200, (1, 40))
        after = model(short).logits
        other = rope("dynamic", tokenizer)
        other(long)
        assert torch.equal(after, other(short).logits)
    assert torch.isfinite(before).all()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_canaries_of_every_family_agree_with_themselves(family, tokenizer):
    model = make_model(family, tokenizer)
    readout = make_readout(model)
    kept = make_canaries(model, tokenizer, readout.hook_point, readout.read_directions)
    again = Canaries.of(kept.entry())
    assert again is not None
    assert agreement(model, again, readout.hook_point, readout.read_directions).error < 1e-5


def test_an_autoencoder_of_another_model_is_refused_and_of_a_trained_one_is_told(tokenizer, tmp_path, caplog):
    from interp_rlhf.sae.files import load_sae
    from interp_rlhf.sae.train import train_sae
    from interp_rlhf.sae.training_settings import SaeTraining

    model = make_model("llama", tokenizer)
    settings = SaeTraining(LAYER, latents=64, k=4, epochs=2, batch_tokens=128, buffer=1024, context=32)
    train_sae(
        model, tokenizer, sentences(120, seed=3), settings, tmp_path / "run", progress=False, model_id="tiny-llama"
    )
    folder = tmp_path / "run" / "sae"
    load_sae(folder, model=model)
    assert "was trained on" not in caplog.text
    with pytest.raises(ValueError, match="The autoencoder was trained on `tiny-llama`"):
        load_sae(folder, model=make_model("gpt2", tokenizer))
    with pytest.raises(ValueError, match="It is another model"):
        load_sae(folder, model=make_model("llama", tokenizer, seed=7))
    written = Subspace.from_readouts(load_sae(folder).latents([3, 5]))  # what latents write is about that model too
    written.check_model(model)
    with pytest.raises(ValueError, match="was made on another model"):
        written.check_model(make_model("llama", tokenizer, seed=7))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.05)
    load_sae(folder, model=model)
    assert "It is another model: a related one" in caplog.text


def test_an_abstention_beside_other_functions_is_its_groups_mean(tokenizer, fitted, tmp_path):
    """TRL adds up 0 for it; the group's mean is what it would have got by luck."""
    folder, card = fitted
    lines = [[7, 8, 9, 0], [0]]  # the second says nothing: the concept abstains
    seen = []

    class Watched(ConceptReward):
        def __call__(self, completion_ids, **more):
            found = super().__call__(completion_ids, **more)
            seen.append(found)
            return found

    def other(completion_ids, **more):
        return [1.0] * len(completion_ids)

    reward = Watched(Readout.from_card(str(card)))
    trainer = make_trainer(
        "GRPO", str(folder), tokenizer, tmp_path, lora={}, reward_funcs=[reward, other], max_steps=1, learning_rate=0.0
    )
    attach(trainer)
    trainer._generate_single_turn = lambda prompt_ids, *a, **k: (
        [list(lines[i % 2]) for i in range(len(prompt_ids))],
        None,
    )
    trainer.train()
    logs = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert seen[0][1] is None
    # Both of a group get the same total, so that no advantage is made of saying nothing.
    assert logs["frac_reward_zero_std"] == 1.0


def test_what_trl_leaves_out_is_left_out_of_correlations_too():
    from interp_rlhf.validation.statistics import correlation

    rewards = torch.tensor([[3.0], [3.2], [2.9], [3.1], [float("nan")], [float("nan")], [3.0], [3.05]])
    total = rewards.nansum(1).masked_fill(torch.isnan(rewards).all(1), torch.nan).numpy()
    length = [20.0, 21, 19, 22, 1, 1, 24, 18]
    kept = [i for i in range(8) if i not in (4, 5)]
    import numpy as np

    assert correlation(total, np.array(length)) == pytest.approx(
        float(np.corrcoef(total[kept], np.array(length)[kept])[0, 1])
    )


# What another reader of this code found.


def opt(tokenizer, **changes):
    from transformers import OPTConfig

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=128, dropout=0.0, attention_dropout=0.0, pad_token_id=1, eos_token_id=0,
        bos_token_id=0, **changes,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def test_noise_that_one_pass_misses_is_known_from_its_rate(tokenizer):
    model = opt(tokenizer, layerdrop=0.01)
    assert all("layerdrop" in causes(model.train()).noise[0] for _ in range(3))
    model.model.decoder.layerdrop = 0.0  # switched off: the rate stays in the config
    assert causes(model).noise == ()
    assert causes(opt(tokenizer, layerdrop=0.0)).noise == ()


def test_dropout_of_every_adapter_is_told(tokenizer):
    from peft import LoHaConfig, LoKrConfig, VeraConfig

    more = {"target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM"}
    for config in (
        VeraConfig(r=8, vera_dropout=0.5, **more),
        LoKrConfig(r=4, rank_dropout=0.5, **more),
        LoHaConfig(r=4, module_dropout=0.5, **more),
        LoraConfig(r=4, lora_dropout=0.5, **more),
    ):
        found = causes(get_peft_model(make_model("llama", tokenizer), config))
        assert "0.5" in found.adapters[0], config
        assert found.noise == (), config
    assert causes(get_peft_model(make_model("llama", tokenizer), LoKrConfig(r=4, **more))).adapters == ()


def pruned(tokenizer):
    model = make_model("llama", tokenizer)
    del model.model.layers[0]
    return model


def scaled(tokenizer):
    model = make_model("llama", tokenizer)
    for layer in model.model.layers:
        layer.self_attn.scaling *= 1.5
    return model


def test_a_policy_that_is_not_what_its_config_says_is_not_copied(tokenizer, tmp_path):
    for build, said in (
        (pruned, r"`model.layers.2.*Pass `reference=`"),
        (scaled, r"activations are off by .*reference=`"),
    ):
        model = build(tokenizer)
        trainer = make_trainer("SFT", model, tokenizer, tmp_path / build.__name__, max_steps=1)
        with pytest.raises(ValueError, match=said):
            attach(
                trainer,
                regularizers=[ConceptAnchor(readout=make_readout(make_model("llama", tokenizer)), weight=1.0)],
            )


def test_a_head_that_was_untied_is_copied_untied(tokenizer):
    from interp_rlhf.training.reference import frozen_copy

    model = make_model("llama", tokenizer, tie_word_embeddings=True)
    copied = frozen_copy(model)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.3)
    copied = frozen_copy(model)
    assert torch.equal(copied.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(copied.lm_head.weight, copied.model.embed_tokens.weight)


def two_adapters(folder):
    model = with_lora(load(folder), seed=3)
    model.add_adapter("sft", lora_config())
    model.base_model.set_adapter(["default", "sft"])
    return model.train()


def test_one_of_several_adapters_is_no_reference(fitted, tokenizer, tmp_path):
    from interp_rlhf.activations import reference_pass

    folder, _ = fitted
    trainer = make_trainer("DPO", two_adapters(folder), tokenizer, tmp_path)
    trainer.model.base_model.set_adapter(["default", "sft"])
    with pytest.raises(ValueError, match=r"active adapters `default`, `sft` – expected one"):
        attach(trainer, regularizers=[ConceptAnchor(readout=make_readout(load(folder)), weight=1.0)])
    with reference_pass(trainer.model):
        assert trainer.model.base_model.active_adapters == ["ref"]
    assert trainer.model.base_model.active_adapters == ["default", "sft"]


def test_a_monitor_of_another_model_is_refused_when_all_weights_are_trained(fitted, tokenizer, tmp_path, caplog):
    folder, card = fitted
    readout = Readout.from_card(str(card))
    stranger = make_model("llama", tokenizer, seed=7)
    stranger.save_pretrained(tmp_path / "stranger")
    trainer = make_trainer("SFT", str(tmp_path / "stranger"), tokenizer, tmp_path / "out")
    with pytest.raises(ValueError, match="It is another model"):
        attach(trainer, monitors=[readout])
    assert not caplog.text
    readout.check_model(stranger, exact=False, trained=True)
    assert "Its scores on this model are about another model" in caplog.text
    caplog.clear()
    readout.check_model(one_matrix_rescaled(folder, tokenizer)["reference"], exact=False)
    assert "a related one" in caplog.text
    caplog.clear()
    readout.check_model(load(folder), exact=False)
    assert not caplog.text


def test_own_text_is_not_read_on_a_base_that_moves(tokenizer, tmp_path):
    from interp_rlhf import DriftCallback

    for changes in ({"bias": "all"}, {"init_lora_weights": "pissa"}):
        model = get_peft_model(make_model("qwen2", tokenizer), lora_config(**changes))
        trainer = make_trainer("SFT", model, tokenizer, tmp_path / next(iter(changes)))
        DriftCallback(trainer)
        with pytest.raises(ValueError, match=r"frozen base|initialized by `pissa`"):
            DriftCallback(trainer, prompts=["what is it"])


def test_only_what_is_really_coarse_widens_what_is_allowed(fitted, tokenizer):
    folder, card = fitted
    readout = Readout.from_card(str(card))
    head = one_matrix_rescaled(folder, tokenizer)["reference"]
    head.lm_head.bfloat16()
    left_over = one_matrix_rescaled(folder, tokenizer)["reference"]
    left_over.config.quantization_config = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    adapter = get_peft_model(one_matrix_rescaled(folder, tokenizer)["reference"], lora_config())
    for name, parameter in adapter.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    for model in (head, left_over, adapter):
        with pytest.raises(ValueError, match="allowed in float32"):
            readout.check_model(model, exact=model is not adapter)


def test_canaries_of_a_model_in_16_bits_are_of_the_checkpoint_in_float32_too(fitted, tokenizer):
    folder, _ = fitted
    directions = make_readout(load(folder)).weight[None]
    for made in (torch.float32, torch.bfloat16, torch.float16):
        kept = make_canaries(load(folder, made), tokenizer, LAYER, directions)
        assert kept.made_in == ("float32" if made == torch.float32 else "16 bits")
        again = Canaries.of(kept.entry())
        assert again.made_in == kept.made_in
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert agreement(load(folder, dtype), again, LAYER, directions).agrees
        assert not agreement(make_model("llama", tokenizer, seed=7), again, LAYER, directions).agrees
    assert Canaries.of({k: v for k, v in kept.entry().items() if k != "made_in"}).made_in == "float32"


def test_canaries_are_read_on_an_offloaded_model(fitted, tmp_path):
    from accelerate import disk_offload

    model = load(fitted[0])
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    kept = Canaries.of(Readout.from_card(str(fitted[1])).header.canaries)
    readout = Readout.from_card(str(fitted[1]))
    assert agreement(model, kept, readout.hook_point, readout.read_directions).agrees
    readout.check_model(model)
    wrong = one_matrix_rescaled(fitted[0], None)["reference"]
    disk_offload(wrong, tmp_path / "wrong", execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="with the same norm weights"):
        readout.check_model(wrong)


def test_the_input_of_what_is_given_ids_is_no_hook_point(tokenizer):
    model = make_model("llama", tokenizer)
    with pytest.raises(ValueError, match="expected a module that is given activations"):
        read(model, ["what is it"], [Readout("x", "model.input", torch.ones(32))], tokenizer=tokenizer)


def test_an_adapter_of_a_reward_model_is_refused_by_name(fitted, tmp_path):
    from transformers import AutoModelForSequenceClassification

    from interp_rlhf.activations.loading import load_model

    base = AutoModelForSequenceClassification.from_pretrained(fitted[0], num_labels=1, dtype=torch.float32)
    get_peft_model(base, lora_config(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter of the task `SEQ_CLS` – expected one of a language model"):
        load_model(tmp_path)


def test_principal_components_of_another_model_are_refused_and_of_a_trained_one_are_told(fitted, tokenizer, caplog):

    folder, _ = fitted
    made = Subspace.from_pca(load(folder), tokenizer, sentences(24), LAYER, rank=3)
    for subspace in (made, made.random(0)):
        subspace.check_model(load(folder))
        subspace.check_model(with_lora(load(folder), seed=3))  # the base is the one
        with pytest.raises(ValueError, match="Its components mean nothing here"):
            subspace.check_model(make_model("llama", tokenizer, seed=7))
    assert not caplog.text
    made.check_model(one_matrix_rescaled(folder, tokenizer)["reference"])
    assert "a related one" in caplog.text
