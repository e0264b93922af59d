"""Which tokens count: one rule on every road, over templates as real models have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import STYLES, WORDS, make_model, make_readout, make_tokenizer, sentences
from training import logged, lora_config, make_trainer, randomize_adapters, rows_of

from interp_rlhf import (
    ConceptAnchor,
    ConceptReward,
    PPOConfig,
    PPOTrainer,
    attach,
    read,
)
from interp_rlhf.activations import (
    ChatMarks,
    TokenBatch,
    counted,
    end_of_turn_ids,
    tokenize_examples,
)
from interp_rlhf.activations.answers import counted_in_text
from interp_rlhf.concepts.pooling import EMA_SPAN
from interp_rlhf.concepts.subspace import Subspace
from interp_rlhf.training.dense import per_token

POOLINGS = ("mean", "last", "max", "ema_max", "attention")


@pytest.fixture(scope="module")
def styles(tmp_path_factory):
    """Style to (tokenizer, folder with a tiny Llama)."""
    made = {}
    for style in STYLES:
        tokenizer, folder = make_tokenizer(style), tmp_path_factory.mktemp(style)
        make_model("llama", tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[style] = tokenizer, folder
    return made


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def pooled_by_hand(scores: list[float], pooling: str) -> float:
    """Of one completion's counted tokens, written out."""
    if pooling == "mean":
        return sum(scores) / len(scores)
    if pooling == "last":
        return scores[-1]
    if pooling == "max":
        return max(scores)
    alpha, levels = 2 / (EMA_SPAN + 1), []
    for t in range(len(scores)):
        weights = [alpha * (1 - alpha) ** (t - k) for k in range(t + 1)]
        levels.append(sum(w * s for w, s in zip(weights, scores, strict=False)) / sum(weights))
    return max(levels[EMA_SPAN - 1 :]) if len(levels) >= EMA_SPAN else levels[-1]


def by_hand(model, readout, prompt_ids, answer_ids) -> float:
    """One unpadded row, a plain forward in evaluation mode: the answer's tokens, but for the row's first one."""
    training = model.training
    model.eval()
    with torch.no_grad():
        states = model(
            torch.tensor([[*prompt_ids, *answer_ids]]), output_hidden_states=True, use_cache=False
        ).hidden_states
    model.train(training)
    own = states[2][0].double()[max(1, len(prompt_ids)) :]  # the output of layer 1
    tokens = own @ readout.weight.double() + readout.bias
    if readout.query is not None:
        weights = (own @ readout.query.double() + readout.query_bias).exp()
        return float(weights @ tokens / (1 + weights.sum()))
    return pooled_by_hand(tokens.tolist(), readout.pooling)


def prompt_of(tokenizer, messages, **kwargs):
    return list(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, **kwargs)[
            "input_ids"
        ]
    )


def text_ids(tokenizer, text):
    return tokenizer(text=text, add_special_tokens=False)["input_ids"]


class Spy(ConceptReward):
    """Keeps what it was asked and what it said."""

    def __call__(self, completion_ids, **more):
        found = super().__call__(completion_ids, **more)
        self.seen = [*getattr(self, "seen", []), *zip(more["prompts"], completion_ids, found, strict=True)]
        return found


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    style=st.sampled_from(sorted(STYLES)),
    kind=st.sampled_from(["DPO", "KTO", "SFT", "GRPO", "RLOO", "PPO"]),
    lora=st.booleans(),
    dropout=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_every_logged_score_is_that_of_one_unpadded_row_by_hand(
    styles, tmp_path_factory, style, kind, lora, dropout, seed
):
    """All poolings at once; with dropout in the adapter the trainer's own pass is no reading, and is not taken for one."""
    tokenizer, folder = styles[style]
    frozen = load(folder)
    readouts = [make_readout(frozen, pooling, pooling=pooling) for pooling in POOLINGS]
    out = tmp_path_factory.mktemp("run")
    adapter = {"lora_dropout": 0.3 if dropout else 0.0} if lora else None
    if kind in ("GRPO", "RLOO", "PPO"):
        rollouts_by_hand(kind, tokenizer, folder, frozen, readouts, out, adapter, seed)
        return
    rows = rows_of(kind, 4, seed)
    trainer = make_trainer(
        kind, str(folder), tokenizer, out, lora=adapter, rows=rows, max_steps=1, learning_rate=0.0, per_device_train_batch_size=4,
    )  # fmt: skip
    if lora:
        randomize_adapters(trainer, seed)
    attach(trainer, monitors=readouts)
    trainer.train()
    logs = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    answers = [
        (row["prompt"], row[key][0]["content"]) for row in rows for key in ("chosen", "rejected", "completion") if key in row
    ]  # fmt: skip
    for readout in readouts:
        scores = [
            by_hand(trainer.model, readout, prompt_of(tokenizer, asked), text_ids(tokenizer, said)) for asked, said in answers
        ]  # fmt: skip
        right = sum(scores) / len(scores)
        assert logs[f"interp/{readout.name}/mean_score"] == pytest.approx(right, abs=1e-5, rel=1e-5)
        with torch.no_grad():
            found = read(
                trainer.model,
                [{"prompt": asked, "completion": said} for asked, said in answers],
                [readout],
                tokenizer=tokenizer,
            )
        assert readout.score(found[readout.name]) == pytest.approx(scores, abs=1e-5, rel=1e-5)


def rollouts_by_hand(kind, tokenizer, folder, frozen, readouts, out, adapter, seed):
    rewards = [Spy(readout) for readout in readouts]
    rows = rows_of("GRPO", 4, seed)
    if kind == "PPO":
        from datasets import Dataset

        args = PPOConfig(
            str(out), per_device_train_batch_size=4, max_steps=1, num_ppo_epochs=1, num_mini_batches=1, max_completion_length=6,
            kl_coef=0.1, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, seed=3,
            learning_rate=0.0,
        )  # fmt: skip
        trainer = PPOTrainer(
            model=str(folder), reward_funcs=rewards, args=args, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, peft_config=lora_config(**adapter) if adapter is not None else None,
        )  # fmt: skip
    else:
        trainer = make_trainer(
            kind, str(folder), tokenizer, out, lora=adapter, rows=rows, max_steps=1, learning_rate=0.0, reward_funcs=rewards,
        )  # fmt: skip
    if adapter is not None:
        randomize_adapters(trainer, seed)
    ends = end_of_turn_ids(frozen, tokenizer)
    attach(trainer)
    trainer.train()
    for reward in rewards:
        for asked, ids, found in reward.seen:
            own = ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]
            right = by_hand(frozen, reward.readout, prompt_of(tokenizer, asked), own) if own else None
            assert found == (None if right is None else pytest.approx(right, abs=1e-5, rel=1e-5))


@pytest.mark.parametrize("style", sorted(STYLES))
def test_what_a_template_writes_around_an_answer_is_found(style, styles):
    tokenizer, _ = styles[style]
    marks = ChatMarks.of(tokenizer)
    close = {
        "plain": "<|end|>",
        "chatml": "<|im_end|>",
        "gemma": "<end_of_turn>",
        "llama3": "<|eot_id|>",
        "qwen3": "<|im_end|>",
    }
    assert marks.ends == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(close[style])}
    assert tokenizer.decode(marks.prefix) == ("<think>\n\n</think>\n\n" if style == "qwen3" else "")
    header = {
        "plain": "<|assistant|>", "gemma": "<start_of_turn>model\n",
        "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    }  # fmt: skip
    assert tokenizer.decode(marks.header) == header.get(style, "<|im_start|>assistant\n")
    switched_off = ChatMarks.of(tokenizer, None, {"enable_thinking": False})
    assert switched_off.prefix == ()  # then it is in the prompt


def templates_of_trl(training=False):
    """Of the model families that TRL knows, as it ships them; Cohere 2's preamble alone is longer than a tiny row."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    return [
        p
        for p in sorted(folder.glob("*.jinja"))
        if p.stem.endswith("_training") == training and "cohere2" not in p.stem
    ]


def with_template(path):
    """A tokenizer with a template and the special tokens that stand in it."""
    import re

    tokenizer = make_tokenizer("gemma")
    tokenizer.chat_template = path.read_text()
    forms = (
        r"<\|[^<>|\s]{2,40}\|>", "</?[a-z_]{3,20}>", r"<\|[a-z]+>", r"<[a-z]+\|>", "<｜[^<>]{2,40}｜>", r"\[/?[A-Z_]{3,20}\]",
        "<[a-z]+_of_[a-z]+>",
    )  # fmt: skip
    special = {*re.findall("|".join(forms), tokenizer.chat_template), "<bos>", "<start_of_turn>", "<end_of_turn>"}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(special)})
    if ChatMarks.of(tokenizer).parts:
        pytest.skip("a vision model's template: content in parts, which TRL makes for its processor only")
    return tokenizer


@pytest.mark.parametrize("path", templates_of_trl(), ids=lambda path: path.stem)
def test_templates_that_trl_ships_count_the_answer_alone(path, tmp_path):
    """Think blocks, channels, line breaks, generation prompts that the training row lacks: DPO's monitors against by hand."""
    tokenizer = with_template(path)
    make_model("llama", tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    frozen, rows = load(tmp_path), rows_of("DPO", 2, 5)
    readouts = [make_readout(frozen, pooling, pooling=pooling) for pooling in ("mean", "last")]
    trainer = make_trainer(
        "DPO",
        str(tmp_path),
        tokenizer,
        tmp_path / "out",
        rows=rows,
        max_steps=1,
        learning_rate=0.0,
        per_device_train_batch_size=2,
    )
    attach(trainer, monitors=readouts)
    trainer.train()
    logs = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    for readout in readouts:
        right = [
            by_hand(frozen, readout, prompt_of(tokenizer, row["prompt"]), text_ids(tokenizer, row[key][0]["content"]))
            for row in rows
            for key in ("chosen", "rejected")
        ]
        assert logs[f"interp/{readout.name}/mean_score"] == pytest.approx(sum(right) / len(right), abs=1e-5)


@pytest.mark.parametrize("path", templates_of_trl(training=True), ids=lambda path: path.stem)
def test_the_assistants_turns_of_a_conversation_are_found_whatever_part_of_it_is_trained_on(path, tmp_path):
    """TRL's own templates for `assistant_only_loss` mark other tokens than the answer too: headers, line breaks, channels."""
    tokenizer = with_template(path)
    make_model("llama", tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    talk = [
        {"role": "user", "content": "what is it"}, {"role": "assistant", "content": "warm rain"},
        {"role": "user", "content": "cold bad"}, {"role": "assistant", "content": "good day"},
    ]  # fmt: skip
    for only in (True, False):
        trainer = make_trainer(
            "SFT", str(tmp_path), tokenizer, tmp_path / "out", rows=[{"messages": talk}] * 2, max_steps=1,
            assistant_only_loss=only, max_length=None,
        )  # fmt: skip
        batch = trainer.data_collator([trainer.train_dataset[0]])
        rows, counts = counted(batch, ChatMarks.of(tokenizer)).texts(batch["input_ids"])
        said = [
            tokenizer.decode([i for i, c in zip(r, n, strict=True) if c]) for r, n in zip(rows, counts, strict=True)
        ]
        assert said == ["warm rain", "good day"], only


@pytest.mark.parametrize("style", sorted(STYLES))
def test_turns_of_a_conversation_are_kept_apart(style, styles, tmp_path):
    """SFT on `messages` trains on every token; a monitor scores the assistant's turns, each one a sequence."""
    tokenizer, folder = styles[style]
    talk = [
        {"role": "user", "content": "what is it"}, {"role": "assistant", "content": "warm rain and sun"},
        {"role": "user", "content": "cold bad rude"}, {"role": "assistant", "content": "good day"},
    ]  # fmt: skip
    trainer = make_trainer(
        "SFT",
        str(folder),
        tokenizer,
        tmp_path,
        rows=[{"messages": talk}] * 2,
        max_steps=1,
        per_device_train_batch_size=2,
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    found = counted(batch, ChatMarks.of(tokenizer))
    assert found.sequences == 4
    lengths = [len(text_ids(tokenizer, turn["content"])) for turn in talk if turn["role"] == "assistant"]
    assert found.counts.tolist() == lengths * 2
    rows, counts = found.texts(batch["input_ids"])
    said = [
        tokenizer.decode([token for token, c in zip(r, n, strict=True) if c])
        for r, n in zip(rows, counts, strict=True)
    ]
    assert [text.strip() for text in said] == ["warm rain and sun", "good day"] * 2


def test_a_multi_turn_completion_is_refused_by_read_and_in_preference_trainers(styles, tmp_path):
    tokenizer, folder = styles["chatml"]
    completion = [
        {"role": "assistant", "content": "warm rain"}, {"role": "user", "content": "cold bad"},
        {"role": "assistant", "content": "good day"},
    ]  # fmt: skip
    prompt = [{"role": "user", "content": "what is it"}]
    with pytest.raises(
        ValueError, match=r"Example 0: the completion has messages of `assistant`, `user`, `assistant` – expected one"
    ):
        tokenize_examples([{"prompt": prompt, "completion": completion}], tokenizer)
    rows = [{"prompt": prompt, "chosen": completion, "rejected": completion[:1]}] * 4
    trainer = make_trainer("DPO", str(folder), tokenizer, tmp_path, rows=rows)
    with pytest.raises(ValueError, match=r"4 of 8 completions hold several turns of the assistant"):
        attach(trainer, monitors=[make_readout(trainer.model)])


def test_the_first_token_of_a_row_never_counts_on_any_road(styles, tmp_path):
    tokenizer, folder = styles["plain"]
    model = load(folder)
    batch = tokenize_examples(["warm rain and sun"], tokenizer)
    expected = [False, *[True] * (len(text_ids(tokenizer, "warm rain and sun")) - 1)]
    assert batch.completion_mask[0].tolist() == expected
    given_anyway = TokenBatch(batch.input_ids, batch.attention_mask, torch.ones_like(batch.attention_mask))
    assert given_anyway.completion_mask[0].tolist() == expected
    left = TokenBatch(torch.tensor([[1, 1, 7, 8]]), torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 1, 1]]))
    assert left.completion_mask[0].tolist() == [False, False, False, True]
    # The whole prompt is cut away: DPO's completion begins at position 0.
    rows = [{"prompt": "what", "chosen": " ".join(WORDS[:12]), "rejected": " ".join(WORDS[12:24])}] * 2
    trainer = make_trainer(
        "DPO", str(folder), tokenizer, tmp_path, rows=rows, max_length=6, truncation_mode="keep_end"
    )
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    assert inputs["completion_mask"][:, 0].all()
    assert not counted(inputs, ChatMarks.of(tokenizer)).mask[:, 0].any()
    # Φ(s_0) of a prompt of one token is of a token that does not count.
    readout = make_readout(model)
    one = TokenBatch.from_ids([[7]], [[8, 9]])
    scores = read(model, one, [readout])["concept"]
    potentials = per_token(readout, scores, one.attention_mask, [2], "potential")[0]
    assert potentials == [0.0, *scores.scores[0, 1:, 0].tolist()]


def test_principal_components_know_neither_first_tokens_nor_outliers(styles):
    from interp_rlhf.activations import read_activations

    tokenizer, folder = styles["plain"]
    model = load(folder)
    texts = [" ".join(WORDS[i : i + 6]) for i in range(0, 36, 3)]
    batch = tokenize_examples(texts, tokenizer)
    found = read_activations(model, batch, ["model.layers.1"])["model.layers.1"].double()
    norms = found.norm(dim=1)
    found = found[norms <= 6 * norms.median()]
    right = torch.linalg.svd(found - found.mean(0), full_matrices=False)[2][:3]
    ours = Subspace.from_pca(model, tokenizer, texts, "model.layers.1", 3).basis.double()
    assert torch.allclose((ours @ right.T).abs(), torch.eye(3, dtype=torch.float64), atol=1e-4)
    assert len(norms) == sum(len(text_ids(tokenizer, t)) - 1 for t in texts)


def test_in_a_text_only_the_assistants_turns_count_where_it_has_any(styles):
    tokenizer, _ = styles["chatml"]
    marks = ChatMarks.of(tokenizer)
    talk = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "warm rain"}]
    ids = tokenizer(text=tokenizer.apply_chat_template(talk, tokenize=False))["input_ids"]
    kept = [token for token, counts in zip(ids, counted_in_text(ids, marks), strict=True) if counts]
    assert tokenizer.decode(kept) == "warm rain"
    plain = tokenizer(text="what is it warm rain")["input_ids"]
    assert counted_in_text(plain, marks) == [False, *[True] * (len(plain) - 1)]


def test_nothing_counts_from_the_first_end_of_turn_token_on():
    """Ids 4 and 0 end a turn: [7, 8 | 4, 9, 0] counts 7 and 8; with the end-of-turn token, 4 too."""
    batch = TokenBatch.from_ids([[5, 6]], [[7, 8, 4, 9, 0]], {4, 0})
    assert batch.completion_mask[0].tolist() == [False, False, True, True, False, False, False]
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 4, 9, 0]]), "attention_mask": torch.ones(1, 7),
        "completion_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1]]),
    }  # fmt: skip
    assert counted(inputs, {4, 0}).mask[0].tolist() == batch.completion_mask[0].tolist()
    assert counted(inputs, {4, 0}, True).mask[0].tolist() == [False, False, True, True, True, False, False]


def test_tools_and_template_arguments_of_a_row_are_rendered_as_trl_renders_them(styles, tmp_path):
    import json

    _, folder = styles["plain"]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}{% if style %}<|system|>{{ style }}<|end|>{% endif %}"
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    model = load(folder)
    readout = make_readout(model)
    asked = [{"role": "user", "content": "what is it"}]
    tool = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
    cases = {"tools": (tool, {"tools": tool}), "json": (json.dumps(tool), {"tools": tool})}
    found = {}
    for name, (column, arguments) in cases.items():
        row = {"prompt": asked, "completion": [{"role": "assistant", "content": "warm rain"}], "tools": column}
        right = by_hand(model, readout, prompt_of(tokenizer, asked, **arguments), text_ids(tokenizer, "warm rain"))
        assert readout.score(read(model, [row], [readout], tokenizer=tokenizer)["concept"])[0] == pytest.approx(
            right, abs=1e-5
        )
        trainer = make_trainer(
            "SFT", str(folder), tokenizer, tmp_path / name, rows=[row] * 2, max_steps=1, learning_rate=0.0
        )
        attach(trainer, monitors=[readout])
        trainer.train()
        logs = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
        assert logs["interp/concept/mean_score"] == pytest.approx(right, abs=1e-5)
        found[name] = right
    row = {"prompt": asked, "completion": "warm rain", "chat_template_kwargs": {"style": "be warm"}}
    right = by_hand(model, readout, prompt_of(tokenizer, asked, style="be warm"), text_ids(tokenizer, "warm rain"))
    assert readout.score(read(model, [row], [readout], tokenizer=tokenizer)["concept"])[0] == pytest.approx(
        right, abs=1e-5
    )
    assert abs(right - found["tools"]) > 1e-3


def test_examples_keep_the_columns_that_are_rendered(tmp_path):
    from interp_rlhf.concepts.examples import make_examples

    rows = [
        {"prompt": [{"role": "user", "content": str(i)}], "completion": "x", "label": i % 2, "tools": [{"name": "a"}]}
        for i in range(4)
    ]  # fmt: skip
    plain = [{key: value for key, value in row.items() if key != "tools"} for row in rows]
    assert make_examples(rows).rows[0]["tools"] == [{"name": "a"}]
    assert make_examples(rows).fingerprint != make_examples(plain).fingerprint


def test_rows_without_a_token_that_counts_are_in_no_denominator(styles, tmp_path):
    """Two completions and two that are only an end-of-turn token: the term is the mean of two, not half of it."""
    tokenizer, folder = styles["plain"]

    def squared_gap(completions, **changes):
        from training import perturb

        trainer = make_trainer(
            "GRPO",
            str(folder),
            tokenizer,
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=4,
            learning_rate=0.0,
            **changes,
        )
        perturb(trainer.model)
        attach(trainer, regularizers=[ConceptAnchor(readout=make_readout(trainer.model), weight=1.0)])
        trainer._generate_single_turn = lambda prompt_ids, *a, **k: (
            [list(completions[i % len(completions)]) for i in range(len(prompt_ids))],
            None,
        )
        trainer.train()
        logs = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
        return logs["interp/anchor_concept/loss"], logs["interp/anchor_concept/squared_gap"], logs["loss"]

    doubled = squared_gap([[7, 8, 9, 0], [7, 8, 9, 0], [16, 20, 0], [16, 20, 0]])
    for completions, changes in (
        ([[7, 8, 9, 0], [0], [16, 20, 0], [0]], {}),
        (
            [[7, 8, 9, 0], [21, 22, 23, 24, 25, 26], [16, 20, 0], [26, 25, 24, 23, 22, 21]],
            {"mask_truncated_completions": True},
        ),
    ):
        found = squared_gap(completions, **changes)
        assert found[:2] == pytest.approx(doubled[:2], rel=1e-5)


def test_the_share_of_rows_that_count_is_in_the_loss_itself(styles, tmp_path):
    """What is logged is what is trained on: with a policy loss of 0 (equal rewards) the loss is the term."""
    tokenizer, folder = styles["plain"]
    from training import perturb

    trainer = make_trainer(
        "GRPO", str(folder), tokenizer, tmp_path, max_steps=1, per_device_train_batch_size=4, learning_rate=0.0, beta=1e-12,
        reward_funcs=[lambda completion_ids, **k: [1.0] * len(completion_ids)],
    )  # fmt: skip
    perturb(trainer.model)
    attach(trainer, regularizers=[ConceptAnchor(readout=make_readout(trainer.model), weight=1.0)])
    lines = [[7, 8, 9, 0], [0], [16, 20, 0], [0]]
    trainer._generate_single_turn = lambda prompt_ids, *a, **k: (
        [list(lines[i % 4]) for i in range(len(prompt_ids))],
        None,
    )
    trainer.train()
    logs = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert logs["loss"] == pytest.approx(logs["interp/anchor_concept/loss"], rel=1e-4)


def test_the_old_place_of_the_rule_still_imports():
    from interp_rlhf.training.counted import counted as old

    assert old is counted
    assert Path(__file__).exists()


# Templates that open an answer without a mark of its own, put a space before it, or close no turn; and what they write by hand.
OTHERS = {
    "inst": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} "
        "{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
        ("[INST] {} [/INST]", " {}", "</s>"),
    ),
    "named": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} {% else %}ASSISTANT: "
        "{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        ("USER: {} ASSISTANT:", " {}", "</s>"),
    ),
    "endless": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}### Question: {{ m['content'] }}\n\n{% else %}### "
        "Answer:\n{{ m['content'] }}\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}### Answer:\n{% endif %}",
        ("### Question: {}\n\n### Answer:\n", "{}", "\n\n"),
    ),
}  # fmt: skip


def other_tokenizer(name, marked=True):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["</s>", "<pad>", "<s>", *(["[INST]", "[/INST]"] if marked and name == "inst" else [])]
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )  # fmt: skip
    bpe.train_from_iterator(sentences(400), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="</s>", pad_token="<pad>", bos_token="<s>", chat_template=OTHERS[name][0],
        padding_side="left", extra_special_tokens=special[3:],
    )  # fmt: skip


@pytest.mark.parametrize(("name", "marked"), [("inst", True), ("inst", False), ("named", True), ("endless", True)])
def test_templates_without_a_header_or_an_end_count_the_answers_alone(name, marked, tmp_path):
    tokenizer = other_tokenizer(name, marked)
    model = make_model("llama", tokenizer)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    readout = make_readout(model, name="probe")
    asked, answered, close = OTHERS[name][1]
    said = [("what is it", "warm kind hope care"), ("please read", "cold bad day")]
    right, before = [], "<s>"
    for question, answer in said:
        before += asked.format(question)
        context = text_ids(tokenizer, before)
        whole = text_ids(tokenizer, before + answered.format(answer))
        assert whole[: len(context)] == context
        right.append(by_hand(model, readout, context, whole[len(context) :]))
        before += answered.format(answer) + close
    conversation = [
        {"role": role, "content": text}
        for turn in said
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    scores = readout.score(
        read(model, [{"messages": conversation[:2]}, {"messages": conversation}], [readout], tokenizer=tokenizer)[
            "probe"
        ]
    )
    assert scores == pytest.approx(right, abs=2e-5)
    for kind, rows, expected in (
        ("SFT", [{"messages": conversation}] * 2, sum(right) / 2),
        ("SFT", [{"prompt": conversation[:3], "completion": conversation[3:]}] * 2, right[1]),
        (
            "KTO",
            [{"prompt": conversation[:3], "completion": conversation[3:], "label": i < 1} for i in (0, 1)],
            right[1],
        ),
    ):
        trainer = make_trainer(
            kind, str(tmp_path / "m"), tokenizer, tmp_path / "o", rows=rows, max_steps=1, learning_rate=0.0,
            per_device_train_batch_size=2,
        )  # fmt: skip
        attach(trainer, monitors=[readout])
        trainer.train()
        assert logged(trainer, "interp/probe/mean_score") == pytest.approx([expected], abs=2e-4), (kind, rows[0])


@pytest.mark.parametrize("name", ["inst", "chatml"])
def test_completions_of_several_turns_are_refused_in_evaluation_data_and_without_a_header_too(name, styles, tmp_path):
    if name == "chatml":
        tokenizer, folder = styles["chatml"]
    else:
        tokenizer, folder = other_tokenizer("inst"), tmp_path / "m"
        make_model("llama", tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    one, other = ({"role": "assistant", "content": "warm rain"}, {"role": "user", "content": "cold bad"})
    prompt = [{"role": "user", "content": "what is it"}]
    good, several = (
        [{"prompt": prompt, "chosen": chosen, "rejected": [one]}] * 4 for chosen in ([one], [one, other, one])
    )
    trainer = make_trainer(
        "DPO", str(folder), tokenizer, tmp_path / "o", rows=good, eval_rows=several, eval_strategy="steps"
    )
    with pytest.raises(ValueError, match=r"4 of 16 completions hold several turns of the assistant"):
        attach(trainer, monitors=[make_readout(trainer.model)])


@pytest.mark.parametrize("more", [{}, {"packing": True}])
def test_a_conversation_that_is_cut_before_its_answer_has_none(more, styles, tmp_path):
    tokenizer, folder = styles["chatml"]
    model = load(folder)
    readout = make_readout(model, name="probe")
    answer = {"role": "assistant", "content": "warm kind hope care"}
    rows = [{"messages": [{"role": "user", "content": "what is it" + " cold" * n}, answer]} for n in (0, 90)]
    trainer = make_trainer(
        "SFT", str(folder), tokenizer, tmp_path, rows=rows, max_steps=1, learning_rate=0.0, max_length=60,
        per_device_train_batch_size=2, **more,
    )  # fmt: skip
    attach(trainer, monitors=[readout])
    trainer.train()
    found = read(model, rows[:1], [readout], tokenizer=tokenizer)["probe"]
    assert logged(trainer, "interp/probe/mean_score") == pytest.approx(readout.score(found), abs=2e-4)
    question = tokenizer.apply_chat_template(rows[0]["messages"][:1], tokenize=False)
    found = read(model, [{"text": question}, {"text": "w"}], [readout], tokenizer=tokenizer)["probe"]
    assert readout.score(found) == [None, None]


def test_pieces_of_conversations_are_refused(styles, tmp_path):
    tokenizer, folder = styles["chatml"]
    rows = [{"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "warm rain"}]}] * 4
    trainer = make_trainer(
        "SFT", str(folder), tokenizer, tmp_path, rows=rows, packing=True, packing_strategy="wrapped", max_length=12
    )
    with pytest.raises(ValueError, match=r"`packing_strategy` is `wrapped` on conversations – expected `bfd`"):
        attach(trainer, monitors=[make_readout(trainer.model)])


def test_a_piece_of_an_answer_counts_without_what_closes_it(styles):
    tokenizer, _ = styles["chatml"]
    marks = ChatMarks.of(tokenizer)
    ids = text_ids(tokenizer, "warm kind hope<|im_end|>\n")
    assert counted_in_text(ids, marks) == [False, *[True] * (len(ids) - 3), False, False]


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
@pytest.mark.parametrize("long", [False, True])
def test_monitors_alone_read_with_precomputed_log_probs_and_positions_of_the_longest_row(kind, long, styles, tmp_path):
    tokenizer, _ = styles["chatml"]
    changes = {}
    if long:
        changes["rope_parameters"] = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
        changes["max_position_embeddings"] = 24
    model = make_model("llama", tokenizer, **changes)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    readout = make_readout(model, name="probe")
    rows = rows_of(kind, 4)
    answers = [
        {"prompt": row["prompt"], "completion": row[key][0]["content"]}
        for row in rows
        for key in ("chosen", "rejected", "completion")
        if key in row
    ]
    scores = readout.score(read(model, answers, [readout], tokenizer=tokenizer)["probe"])
    for precompute in (True, False):
        trainer = make_trainer(
            kind, str(tmp_path / "m"), tokenizer, tmp_path / "o", rows=rows, max_steps=1, learning_rate=0.0,
            precompute_ref_log_probs=precompute,
        )  # fmt: skip
        attach(trainer, monitors=[readout])
        trainer.train()
        assert logged(trainer, "interp/probe/mean_score") == pytest.approx([sum(scores) / len(scores)], abs=2e-4)
    if long:
        trainer = make_trainer(
            kind, str(tmp_path / "m"), tokenizer, tmp_path / "o", rows=rows, precompute_ref_log_probs=True
        )
        with pytest.raises(ValueError, match=r"from there on, rotary positions depend on the longest row of a batch"):
            attach(trainer, regularizers=[ConceptAnchor(readout=readout, weight=1.0)])
