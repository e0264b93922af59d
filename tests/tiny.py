"""Builders of tiny models, tokenizers, readouts and cards, shared by the tests."""

from __future__ import annotations

import hashlib
import random

import torch

VOCABULARY = (
    "the a warm kind good cold bad rude day night help thanks sorry please you are my friend not never always rain sun "
    "house tree walk talk think write read one two three four five what is it that hope care and or but so"
)
WORDS = VOCABULARY.split()
TEMPLATE = (
    "{% if style is defined %}<|system|>{{ style }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# Templates as real models have them, shortened to what they write around turns, with the special tokens that they need: first the
# end-of-sequence token, then padding. Gemma's turn ends with a token that is not its end of sequence.
STYLES = {
    "plain": (TEMPLATE, ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]),
    "chatml": (  # SmolLM2, Qwen 2.5
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ["<|im_end|>", "<|pad|>", "<|im_start|>"],
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ["<eos>", "<pad>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ["<|eot_id|>", "<|pad|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
    ),
    "qwen3": (  # an empty think block before the last answer, which the prompt has only where thinking is switched off
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        ["<|im_end|>", "<|pad|>", "<|im_start|>", "<think>", "</think>"],
    ),
}


def sentences(count: int, seed: int = 0, low: int = 3, high: int = 12) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(low, high))) for _ in range(count)]


def make_tokenizer(style="plain"):
    """A byte-level BPE trained on a few hundred sentences, with a chat template of `STYLES`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    template, special = STYLES[style]
    begin = {"bos_token": special[2]} if style in ("gemma", "llama3") else {}
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sentences(400), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=special[0], pad_token=special[1], chat_template=template, padding_side="left",
        extra_special_tokens=special[2:], **begin,
    )  # fmt: skip


def _llama(vocab, **changes):
    from transformers import LlamaConfig

    return LlamaConfig(**{**_common(vocab), "num_key_value_heads": 2, **changes})


def _qwen2(vocab, **changes):
    from transformers import Qwen2Config

    return Qwen2Config(**{**_common(vocab), "num_key_value_heads": 2, **changes})


def _gpt2(vocab, **changes):
    from transformers import GPT2Config

    size = {"vocab_size": vocab, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
    calm = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**{**size, **calm, "bos_token_id": 0, "eos_token_id": 0, **changes})


def _gemma(vocab, **changes):
    from transformers import Gemma2Config

    sizes = {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 16}
    return Gemma2Config(**{**_common(vocab), **sizes, **changes})


def _moe(vocab, **changes):
    from transformers import Qwen3MoeConfig

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
    return Qwen3MoeConfig(**{**_common(vocab), "num_key_value_heads": 2, **experts, **changes})


def _common(vocab):
    return {
        "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1,
    }  # fmt: skip


FAMILIES = {"llama": _llama, "gpt2": _gpt2, "qwen2": _qwen2, "gemma": _gemma, "moe": _moe}


def make_model(family, tokenizer, seed: int = 0, **changes):
    """A tiny model whose weights are large enough for activations to differ between tokens and layers."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](len(tokenizer), **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
            elif "norm" in name or "ln_" in name:
                parameter.add_(torch.rand_like(parameter) * 0.2)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def with_lora(model, seed: int = 0, **changes):
    """LoRA on every linear layer of the blocks, with both factors random: an adapter that changes activations."""
    from peft import LoraConfig, get_peft_model

    targets = ["c_attn", "c_fc"] if model.config.model_type == "gpt2" else ["q_proj", "v_proj"]
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **changes))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    return wrapped.eval()


def make_readout(model, name="concept", layer=1, seed=0, **changes):
    """A readout with random weights at a decoder layer."""
    from interp_rlhf.activations import decoder_layers, hidden_size
    from interp_rlhf.concepts.readout import Readout

    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(hidden_size(model), generator=generator) / 4
    if changes.get("pooling") == "attention":
        changes = {"query": torch.randn(hidden_size(model), generator=generator) / 4, "query_bias": 0.5, **changes}
    return Readout(name, decoder_layers(model)[layer], weight, bias=0.25, **changes)


def labelled_rows(count: int, seed: int = 0, conversational: bool = True):
    """Contrast rows whose label is in their words: warm against cold."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        prompt = f"please {' '.join(rng.choices(WORDS, k=4))} {index}"
        for label, words in ((1, ["warm", "kind", "hope", "care"]), (0, ["cold", "rude", "bad", "never"])):
            answer = " ".join(rng.choices(WORDS, k=1) + rng.choices(words, k=6) + rng.choices(WORDS, k=1))
            asked = [{"role": "user", "content": prompt}] if conversational else prompt
            rows.append({"prompt": asked, "completion": answer, "label": label})
    return rows


_CARDS: dict = {}  # what has been fitted and checked already: a run of the tests asks for few different cards many times


def make_card(folder, model, tokenizer, role="reward", name="warmth", pooling="mean", evidence=True, **fields):
    """Fits, checks and writes a card on made-up contrast data; returns its path."""
    weights = hashlib.sha256()
    for parameter in model.parameters():
        weights.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    about = (str(model.config), tokenizer.chat_template, role, name, pooling, evidence, sorted(fields.items()))
    key = weights.hexdigest() + repr(about)
    if key not in _CARDS:
        _write_card(folder, model, tokenizer, role, name, pooling, evidence, dict(fields))
        _CARDS[key] = [(folder / f"{name}.{kind}").read_bytes() for kind in ("safetensors", "yaml")]
    for kind, content in zip(("safetensors", "yaml"), _CARDS[key], strict=True):
        (folder / f"{name}.{kind}").write_bytes(content)
    return folder / f"{name}.yaml"


def _write_card(folder, model, tokenizer, role, name, pooling, evidence, fields):
    from interp_rlhf.activations import decoder_layers
    from interp_rlhf.concepts.card import (
        ArtifactRef,
        Card,
        ModelRef,
        ReadoutSpec,
        dump_card,
        load_card,
        with_evidence,
    )
    from interp_rlhf.concepts.examples import make_examples
    from interp_rlhf.concepts.fitting import fit_probe
    from interp_rlhf.validation.check import check_card

    train, test = make_examples(labelled_rows(24, seed=1)), make_examples(labelled_rows(40, seed=2))
    layer, regularization = fields.pop("layer", 1), fields.pop("regularization", None)
    fit = fit_probe(
        model, tokenizer, train, [decoder_layers(model)[layer]], model_id="tiny", regularization=regularization
    )
    sha256 = fit.artifact.save(folder / f"{name}.safetensors")
    header = fit.artifact.header
    card = Card(
        schema=1, name=name, version=1, role=role, concept="Speaks warmly.",
        model=ModelRef(id="tiny", identity=header.identity),
        readout=ReadoutSpec(
            kind="probe", hook_point=header.hook_point, artifact=ArtifactRef(path=f"{name}.safetensors", sha256=sha256),
            pooling=pooling,
        ),
        **fields,
    )  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(dump_card(card))
    if evidence:
        found = check_card(load_card(path), model, tokenizer, train, test)
        path.write_text(with_evidence(path.read_text(), found))
