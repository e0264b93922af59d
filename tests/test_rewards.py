"""Concept rewards on real GRPO and RLOO trainers: exactly the completion tokens, in every configuration."""

from __future__ import annotations

import copy
import logging
import pickle
import shutil
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from tiny import make_card, make_readout, sentences, with_lora

from interp_rlhf import ConceptAnchor, ConceptReward, DriftConfig, Readout, attach
from interp_rlhf.activations import TokenBatch, end_of_turn_ids, read, reference_pass
from interp_rlhf.activations.batch import tokenize_prompt


def prompts(conversational=True, count=16):
    texts = sentences(count, seed=7)
    return Dataset.from_list([{"prompt": [{"role": "user", "content": t}] if conversational else t} for t in texts])


def trainer_of(
    tmp_path, model, tokenizer, rewards, kind="grpo", lora=False, conversational=True, data=None, **changes
):
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    config, trainer = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[kind]
    settings = {
        "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "num_generations": 4, "max_steps": 2,
        "max_completion_length": 6, "beta": 0.1, "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True, "bf16": False,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    targets = (
        ["c_attn"] if getattr(model, "config", None) and model.config.model_type == "gpt2" else ["q_proj", "v_proj"]
    )
    peft_config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM") if lora else None
    return trainer(
        model=model if isinstance(model, str) else str(model.config._name_or_path) if not lora else model,
        reward_funcs=rewards,
        args=config(**{**settings, **changes}),
        train_dataset=prompts(conversational) if data is None else data,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


class Recorder:
    """A reward function that notes what it was given."""

    __name__ = "recorder"

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, completions, completion_ids, **kwargs):
        self.calls.append((copy.deepcopy(prompts), copy.deepcopy(completion_ids)))
        return [float(len(ids) % 3) for ids in completion_ids]


class Noted(ConceptReward):
    """A concept reward that notes what it returned."""

    def __call__(self, completion_ids, **kwargs):
        values = super().__call__(completion_ids, **kwargs)
        self.returned = [*getattr(self, "returned", []), values]
        return values


def expected_scores(reference, tokenizer, readout, calls, trainer):
    """The reward by hand: prompt and completion tokens, one row at a time, no padding."""
    found = []
    arguments = trainer.args.chat_template_kwargs or {}
    for asked, ids in calls:
        values = []
        for prompt, completion in zip(asked, ids, strict=True):
            asked_ids = tokenize_prompt(prompt, tokenizer, None, arguments)
            row = TokenBatch.from_ids([asked_ids], [completion], end_of_turn_ids(trainer.model, tokenizer))
            values += readout.score(read(reference, row, [readout])[readout.name])
        found.append(values)
    return found


CONFIGURATIONS = {
    "full": {},
    "lora": {"lora": True},
    "plain prompts": {"conversational": False},
    "rloo": {"kind": "rloo"},
    "rloo, lora": {"kind": "rloo", "lora": True},
    "two generation batches": {"steps_per_generation": 2},
    "two iterations": {"num_iterations": 2},
    "accumulation": {"gradient_accumulation_steps": 2, "lora": True},
    "truncated completions masked": {"mask_truncated_completions": True, "lora": True},
    "beta 0, lora": {"beta": 0.0, "lora": True},
    "beta 0, full": {"beta": 0.0},
    "small log-prob batches": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "chat template arguments": {"chat_template_kwargs": {"style": "warm day"}, "lora": True},
    "rloo, chat template arguments": {"kind": "rloo", "chat_template_kwargs": {"style": "warm day"}, "lora": True},
    "rloo, plain prompts": {"kind": "rloo", "conversational": False},
    "rloo, two generation batches": {"kind": "rloo", "steps_per_generation": 2},
    "rloo, two iterations": {"kind": "rloo", "num_iterations": 2, "lora": True},
    "rloo, truncated completions masked": {"kind": "rloo", "mask_truncated_completions": True, "lora": True},
    "rloo, beta 0": {"kind": "rloo", "beta": 0.0},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_reward_reads_exactly_the_completion_tokens(name, tmp_path, load, tokenizer):
    settings = dict(CONFIGURATIONS[name])
    model = load("llama")
    readout = make_readout(model)
    recorder, reward = Recorder(), Noted(readout)
    trainer = trainer_of(tmp_path, model, tokenizer, [recorder, reward], **settings)
    attachment = attach(trainer)
    trainer.train()
    reference = load("llama")  # a fresh copy of what the run started from
    expected = expected_scores(reference, tokenizer, readout, recorder.calls, trainer)
    assert len(expected) == len(reward.returned) > 0
    for by_hand, returned in zip(expected, reward.returned, strict=True):
        assert returned == pytest.approx(by_hand, abs=1e-5)
    masked = settings.get("mask_truncated_completions") and any(
        0 not in ids for _, call in recorder.calls for ids in call
    )
    if settings.get("beta") == 0.0 or masked:
        assert attachment.rollout.own_forwards > 0
    else:
        assert attachment.rollout.own_forwards == 0
        assert attachment.rollout.taken == len(recorder.calls)


@pytest.mark.parametrize("lora", [False, True])
def test_every_family_is_read_right_and_learned_positions_are_read_anew(family, lora, tmp_path, load, tokenizer):
    model = load(family)
    readout = make_readout(model)
    recorder, reward = Recorder(), Noted(readout)
    trainer = trainer_of(
        tmp_path, model, tokenizer, [recorder, reward], lora=lora, max_steps=1, per_device_train_batch_size=16
    )
    attachment = attach(trainer)
    trainer.train()
    assert len({len(tokenize_prompt(prompt, tokenizer)) for prompt in recorder.calls[0][0]}) > 1  # so there is padding
    expected = expected_scores(load(family), tokenizer, readout, recorder.calls, trainer)
    assert reward.returned[0] == pytest.approx(expected[0], abs=1e-5)
    assert (attachment.rollout.own_forwards == 0) == (family != "gpt2")


@pytest.mark.parametrize(("lora_dropout", "attention_dropout", "free"), [(0.5, 0.0, True), (0.0, 0.5, False)])
def test_a_pass_that_drew_dropout_is_not_taken_and_an_adapters_own_does_not_count(
    lora_dropout, attention_dropout, free, tmp_path, load, tokenizer
):
    from peft import LoraConfig
    from trl import GRPOTrainer

    model = load("llama", attention_dropout=attention_dropout)
    readout = make_readout(model)
    recorder, reward = Recorder(), Noted(readout)
    args = trainer_of(tmp_path, load("llama"), tokenizer, [reward]).args
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=lora_dropout)
    trainer = GRPOTrainer(model, [recorder, reward], args, prompts(), processing_class=tokenizer, peft_config=adapter)
    attachment = attach(trainer)
    trainer.train()
    assert (attachment.rollout.own_forwards == 0) == free
    clean = load("llama", attention_dropout=attention_dropout)
    expected = expected_scores(clean, tokenizer, readout, recorder.calls, trainer)
    for by_hand, returned in zip(expected, reward.returned, strict=True):
        assert returned == pytest.approx(by_hand, abs=1e-5)


def test_the_policy_is_read_as_it_is_now(tmp_path, load, tokenizer):
    model = load("llama")
    readout = make_readout(model)
    seen = []

    class OnPolicy(Noted):
        def __call__(self, completion_ids, **kwargs):
            values = super().__call__(completion_ids, **kwargs)
            rollout = self._rollout
            seen.append(readout.score(read(rollout.trainer.model, rollout._batch, [readout])["concept"]))
            return values

    reward = OnPolicy(readout, reader="policy")
    trainer = trainer_of(tmp_path, model, tokenizer, [reward], lora=True, max_steps=3, steps_per_generation=2)
    attachment = attach(trainer)
    trainer.train()
    for returned, now in zip(reward.returned, seen, strict=True):
        assert returned == pytest.approx(now, abs=1e-5)
    assert attachment.rollout.own_forwards == 0  # old log-probs were computed: their pass is taken


def test_both_readers_log_the_drift_between_them(tmp_path, load, tokenizer):
    model = load("llama")
    reward = Noted(make_readout(model), reader="both")
    trainer = trainer_of(tmp_path, model, tokenizer, [reward], lora=True, max_steps=3, learning_rate=0.1)
    attach(trainer)
    trainer.train()
    drift = [entry["interp/concept/drift"] for entry in trainer.state.log_history if "interp/concept/drift" in entry]
    assert drift[0] == pytest.approx(0.0, abs=1e-5)  # LoRA starts at nothing
    assert abs(drift[-1]) > 1e-4


def test_evaluation_reads_the_same_way_and_logs_under_eval(tmp_path, load, tokenizer):
    model = load("llama")
    readout = make_readout(model)
    recorder, reward = Recorder(), Noted(readout)
    settings = {"per_device_eval_batch_size": 4, "num_generations_eval": 2}
    trainer = trainer_of(tmp_path, model, tokenizer, [recorder, reward], lora=True, **settings)
    attachment = attach(trainer, monitors=[make_readout(model, name="watched", pooling="last")])
    found = trainer.evaluate(prompts(count=4))
    assert found["eval_interp/watched/mean_score"] == found["eval_interp/watched/mean_score"]
    expected = expected_scores(load("llama"), tokenizer, readout, recorder.calls, trainer)
    for by_hand, returned in zip(expected, reward.returned, strict=True):
        assert returned == pytest.approx(by_hand, abs=1e-5)
    assert attachment.rollout.own_forwards == 0


def test_several_rewards_cost_one_reading(tmp_path, load, tokenizer):
    model = load("llama")
    rewards = [ConceptReward(make_readout(model, name=f"r{i}", layer=i, seed=i)) for i in range(3)]
    trainer = trainer_of(tmp_path, model, tokenizer, rewards, lora=True, beta=0.0)
    attachment = attach(trainer, monitors=[make_readout(model, name="watched", pooling="max")])
    trainer.train()
    assert attachment.rollout.own_forwards == 2  # two steps, one batch each


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_adapter_named_ref_is_what_is_read(dropout, tmp_path, load, tokenizer):
    """TRL copies a given adapter to `ref` and takes its log-probs from it, in training mode, so with its dropout."""
    from trl import GRPOTrainer

    model = with_lora(load("llama"), lora_dropout=dropout)
    readout = make_readout(model)
    recorder, reward = Recorder(), Noted(readout)
    args = trainer_of(tmp_path, load("llama"), tokenizer, [recorder, reward], max_steps=2).args
    trainer = GRPOTrainer(model, [recorder, reward], args, prompts(), processing_class=tokenizer)
    attachment = attach(trainer)
    trainer.train()
    expected = expected_scores(with_lora(load("llama")), tokenizer, readout, recorder.calls, trainer)
    assert (attachment.rollout.own_forwards == 0) == (dropout == 0)
    for by_hand, returned in zip(expected, reward.returned, strict=True):
        assert returned == pytest.approx(by_hand, abs=1e-5)


class Server:
    """In the place of TRL's `VLLMGeneration`: weights of its own, other than the trainer's, and passes of the policy on the way.

    The worst that a colocated engine could do to us: it runs the very modules that are tapped, over the very tokens.
    """

    def __init__(self, trainer):
        self.trainer, self.syncs = trainer, 0

    def sync_weights(self):
        self.syncs += 1

    def generate(self, prompts, images, num_generations, profiler=None):
        model, found, log_probs = self.trainer.model, [], []
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
            for ids in prompts:
                row = torch.tensor([ids])
                whole = model.generate(input_ids=row, max_new_tokens=6, do_sample=True, use_cache=True)
                model(input_ids=whole, attention_mask=torch.ones_like(whole))
                found.append(whole[0, len(ids) :].tolist())
                log_probs.append([[-1.0]] * len(found[-1]))
            for name, parameter in model.named_parameters():
                parameter.copy_(before[name])
        return prompts, found, log_probs, None


@pytest.mark.parametrize("reader", ["reference", "policy"])
@pytest.mark.parametrize("correction", [True, False], ids=["corrected", "uncorrected"])
def test_passes_of_generation_are_never_read_also_with_vllm(correction, reader, tmp_path, load, tokenizer):
    model = load("llama")
    readout = make_readout(model)
    seen = []

    class Read(Noted):
        def __call__(self, completion_ids, **kwargs):
            values = super().__call__(completion_ids, **kwargs)
            batch, of = self._rollout._batch, trainer.model
            with reference_pass(of) if reader == "reference" else nullcontext(of) as read_on:
                seen.append(readout.score(read(read_on, batch, [readout])["concept"]))
            return values

    recorder, reward = Recorder(), Read(readout, reader=reader)
    settings = {"lora": True, "vllm_importance_sampling_correction": correction, "steps_per_generation": 2}
    trainer = trainer_of(tmp_path, model, tokenizer, [recorder, reward], max_steps=4, learning_rate=0.1, **settings)
    attachment = attach(trainer)
    trainer.use_vllm, trainer._last_loaded_step, trainer.vllm_generation = True, -1, Server(trainer)
    trainer.train()
    assert trainer.vllm_generation.syncs == len(reward.returned) == 2
    for returned, now in zip(reward.returned, seen, strict=True):
        assert returned == pytest.approx(now, abs=1e-5)
    assert attachment.rollout.own_forwards == 0  # taken from TRL's own log-prob passes, which come after generation


def test_an_empty_completion_is_not_scored_and_a_penalty_is_negative(tmp_path, load, tokenizer):
    model = load("llama")
    readout = make_readout(model)
    reward, penalty = Noted(readout), Noted(make_readout(model, name="penalty"), role="penalty")

    trainer = trainer_of(tmp_path, model, tokenizer, [reward, penalty], lora=True, max_steps=1)
    attach(trainer)
    rollout = trainer.interp_rollout
    end = tokenizer.eos_token_id
    rollout.open([[5, 6], [5, 6], [7]], [[end], [9, end], [9, 10]])
    kwargs = {"trainer_state": trainer.state, "log_metric": None}
    found = reward([[end], [9, end], [9, 10]], **kwargs)
    assert found[0] is None
    assert None not in found[1:]
    assert penalty([[end], [9, end], [9, 10]], **kwargs)[1:] == pytest.approx([-value for value in found[1:]])
    with pytest.raises(RuntimeError, match="asked about 1 completions that are not the trainer's current ones"):
        reward([[9]], **kwargs)
    rollout.close()


def test_equal_completions_under_different_prompts_score_differently(tmp_path, load, tokenizer):
    model = load("llama")
    reward = Noted(make_readout(model))
    trainer = trainer_of(tmp_path, model, tokenizer, [reward], lora=True)
    attach(trainer)
    trainer.interp_rollout.open([[5, 6, 7], [8, 9]], [[10, 11], [10, 11]])
    first, second = reward([[10, 11], [10, 11]], trainer_state=trainer.state, log_metric=None)
    assert first != pytest.approx(second, abs=1e-3)
    trainer.interp_rollout.close()


def test_a_recorded_pass_over_other_tokens_is_never_taken(tmp_path, load, tokenizer):
    model = load("llama")
    readout = make_readout(model)
    reward = Noted(readout)
    trainer = trainer_of(tmp_path, model, tokenizer, [reward], lora=True)
    attachment = attach(trainer)
    other = torch.tensor([[8, 6, 7, 10, 11]])  # the same completion under another prompt
    with torch.no_grad(), reference_pass(trainer.model) as reference:
        reference(input_ids=other, attention_mask=torch.ones_like(other), use_cache=False)
    attachment.rollout.open([[5, 6, 7]], [[10, 11]])
    (found,) = reward([[10, 11]], trainer_state=trainer.state, log_metric=None)
    alone = TokenBatch.from_ids([[5, 6, 7]], [[10, 11]])
    assert found == pytest.approx(readout.score(read(load("llama"), alone, [readout])["concept"])[0], abs=1e-5)
    assert attachment.rollout.own_forwards == 1


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def trl_metrics(trainer):
    timings = ("runtime", "per_second", "step_time", "flos")
    rows = [
        {k: v for k, v in row.items() if not k.startswith("interp/") and not any(t in k for t in timings)}
        for row in trainer.state.log_history
    ]
    return [row for row in rows if set(row) - {"step", "epoch"}]


def some_none(prompts, completions, completion_ids, **kwargs):
    return [None if sum(ids) % 3 == 0 else float(sum(ids) % 5) for ids in completion_ids]


@pytest.mark.parametrize("case", ["plain", "dropout", "beta 0", "lora", "rloo"])
def test_monitors_leave_weights_and_metrics_bit_identical(case, tmp_path, load, tokenizer):
    from interp_rlhf import DriftConfig

    family, changes = ("gpt2", {"resid_pdrop": 0.1, "attn_pdrop": 0.1}) if case == "dropout" else ("llama", {})
    settings = {"beta 0": {"beta": 0.0}, "lora": {"lora": True}, "rloo": {"kind": "rloo"}}.get(case, {})
    runs = []
    for watched in (False, True):
        model = load(family, **changes)
        torch.manual_seed(0)
        trainer = trainer_of(tmp_path / str(watched), model, tokenizer, [some_none], max_steps=3, **settings)
        if watched:
            monitors = [make_readout(model, pooling=pooling, name=pooling) for pooling in ("mean", "ema_max", "last")]
            attach(trainer, monitors=monitors, measures={"length": len}, drift=DriftConfig(every=1))
        trainer.train()
        runs.append((weights(trainer), trl_metrics(trainer), trainer.state.log_history))
    (plain, plain_metrics, _), (with_monitors, metrics, history) = runs
    assert all(torch.equal(plain[name], with_monitors[name]) for name in plain)
    assert metrics == plain_metrics
    logged = {key for row in history for key in row}
    assert {"interp/mean/mean_score", "interp/ema_max/std", "interp/measure/length/mean"} <= logged
    assert "interp/drift/model.layers.1/cosine" in logged or "interp/drift/transformer.h.1/cosine" in logged


def test_the_holdouts_of_a_card_are_watched_without_being_asked_for(tmp_path, load, tokenizer):
    model = load("llama")
    watch = make_card(
        tmp_path, model, tokenizer, role="monitor", name="watch", pooling="ema_max", evidence=False, layer=0
    )
    card = make_card(tmp_path, model, tokenizer, holdouts=[watch.name])
    for monitors in ([], [watch]):  # asked for as well, it still counts once
        trainer = trainer_of(
            tmp_path, load("llama"), tokenizer, [ConceptReward.from_card(card)], lora=True, max_steps=1
        )
        attach(trainer, monitors=monitors)
        trainer.train()
        assert "interp/watch/mean_score" in trainer.state.log_history[0]
        assert "interp/warmth/mean_score" not in trainer.state.log_history[0]


def test_a_holdout_with_the_rewards_own_artifact_is_refused(tmp_path, load, tokenizer):
    model = load("llama")
    same = make_card(tmp_path, model, tokenizer, role="monitor", name="watch", pooling="ema_max", evidence=False)
    card = make_card(tmp_path, model, tokenizer, holdouts=[same.name])
    trainer = trainer_of(tmp_path, load("llama"), tokenizer, [ConceptReward.from_card(card)], lora=True, max_steps=1)
    with pytest.raises(ValueError, match="cannot be its own witness"):
        attach(trainer)


def test_a_holdout_that_a_regularizer_holds_is_refused(tmp_path, load, tokenizer):
    model = load("llama")
    held = make_card(tmp_path, model, tokenizer, role="monitor", name="watch", evidence=False, layer=0)
    card = make_card(tmp_path, model, tokenizer, holdouts=[held.name])
    trainer = trainer_of(tmp_path, load("llama"), tokenizer, [ConceptReward.from_card(card)], lora=True, max_steps=1)
    term = ConceptAnchor(readout=Readout.from_card(str(held)), weight=1.0)
    with pytest.raises(ValueError, match="which is in a regularizer"):
        attach(trainer, regularizers=[term], drift=DriftConfig())


def test_the_shuffled_sham_keeps_the_scores_and_loses_the_rows(tmp_path, load, tokenizer):
    model = load("llama")
    readout = make_readout(model)
    real, sham = Noted(readout), Noted(make_readout(model, name="sham"), sham="shuffle", seed=1)
    trainer = trainer_of(tmp_path, model, tokenizer, [real, sham], per_device_train_batch_size=8)
    attach(trainer)
    trainer.train()
    for honest, shuffled in zip(real.returned, sham.returned, strict=True):
        assert sorted(honest) == sorted(shuffled)
    assert real.returned != sham.returned


def test_a_cards_weight_counts_unless_the_user_sets_one(tmp_path, load, tokenizer):
    model = load("llama")
    reward = ConceptReward(make_readout(model), weight=0.25)
    trainer = trainer_of(tmp_path, model, tokenizer, [some_none, reward], lora=True)
    attach(trainer)
    assert trainer.reward_weights.tolist() == [1.0, 0.25]
    trainer = trainer_of(tmp_path, load("llama"), tokenizer, [some_none, reward], lora=True, reward_weights=[2.0, 3.0])
    attach(trainer)
    assert trainer.reward_weights.tolist() == [2.0, 3.0]


def test_the_reward_is_no_module_and_pickles_unbound(tmp_path, load, tokenizer):
    model = load("llama")
    path = make_card(tmp_path, model, tokenizer, transform={"mean": 0.1, "std": 2.0, "clip": [-3.0, 3.0]})
    reward = ConceptReward.from_card(path)
    assert not isinstance(reward, torch.nn.Module)
    trainer = trainer_of(tmp_path, model, tokenizer, [reward], lora=True)
    attach(trainer)
    copied = pickle.loads(pickle.dumps(reward))
    assert copied.__name__ == "warmth"
    assert torch.equal(copied.readout.weight, reward.readout.weight)
    with pytest.raises(RuntimeError, match=r"not attached to a trainer.*\n.*import attach\n *attach\(trainer\)"):
        copied(completion_ids=[[1]], prompts=[""], completions=[""])


def test_unbound_it_raises_inside_a_stock_trainer(tmp_path, load, tokenizer):
    model = load("llama")
    trainer = trainer_of(tmp_path, model, tokenizer, [ConceptReward(make_readout(model))], lora=True)
    with pytest.raises(RuntimeError, match="not attached to a trainer"):
        trainer.train()


def test_a_nan_in_the_reference_stops_the_run(tmp_path, load, tokenizer):
    model = load("llama")
    readout = make_readout(model)
    readout.weight[0] = torch.nan
    trainer = trainer_of(tmp_path, model, tokenizer, [ConceptReward(readout)], lora=True)
    attach(trainer)
    with pytest.raises(ValueError, match="Readout `concept` gives"):
        trainer.train()


def test_what_would_score_wrongly_is_refused(tmp_path, load, tokenizer, caplog):
    model = load("llama")
    reward = ConceptReward(make_readout(model))
    trainer = trainer_of(tmp_path, model, tokenizer, [reward], sync_ref_model=True)
    with pytest.raises(ValueError, match="`sync_ref_model` is True – expected False"):
        attach(trainer)
    trainer = trainer_of(tmp_path, model, tokenizer, [reward], lora=True, beta=0.0)
    with caplog.at_level(logging.WARNING):
        attach(trainer)
    assert "beta is 0" in caplog.text
    with pytest.raises(ValueError, match="attached already"):
        attach(trainer)
    trainer = trainer_of(tmp_path, load("llama"), tokenizer, [reward], lora=True)
    trainer.rollout_func = lambda *_: None
    with pytest.raises(ValueError, match="The trainer uses `rollout_func` – expected none where `concept`"):
        attach(trainer)
    trainer.rollout_func = None
    trainer.tools = [len]
    with pytest.raises(ValueError, match="The trainer uses `tools`"):
        attach(trainer)


def test_an_artifact_of_another_model_is_refused(tmp_path, load, tokenizer):
    path = make_card(tmp_path, load("llama"), tokenizer)
    for other in (load("qwen2"), load("llama", hidden_size=64)):
        trainer = trainer_of(tmp_path, other, tokenizer, [ConceptReward.from_card(path)], lora=True)
        with pytest.raises(ValueError, match=r"width 32 – the model's is 64|another architecture"):
            attach(trainer)


def test_a_call_that_is_refused_leaves_the_trainer_as_it_was(tmp_path, load, tokenizer):
    from interp_rlhf import DriftConfig

    model = load("llama")
    trainer = trainer_of(tmp_path, model, tokenizer, [ConceptReward(make_readout(model))], lora=True)
    with pytest.raises(ValueError, match=r"`model.layer.1` – expected"):
        attach(trainer, drift=DriftConfig(hook_points=["model.layer.1"]))
    attach(trainer, drift=DriftConfig(hook_points=["model.layers.1"]))
    trainer.train()


def test_the_card_and_the_arm_reach_a_log_that_the_callback_opened_first(tmp_path, load, tokenizer):
    from interp_rlhf import DriftCallback
    from interp_rlhf.concepts.card import load_card
    from interp_rlhf.runlog.log import read_run_log

    model = load("llama")
    path = make_card(tmp_path, model, tokenizer)
    trainer = trainer_of(tmp_path, model, tokenizer, [ConceptReward.from_card(path)], lora=True, max_steps=1)
    trainer.add_callback(DriftCallback(trainer))
    with pytest.raises(ValueError, match="is recorded into"):
        attach(trainer, run_log=tmp_path / "other.jsonl")
    attached = attach(trainer, arm="probe")
    trainer.train()
    run, *_, last = read_run_log(attached.run_log.path)
    assert (run["arm"], run["cards"][0]["sha256"]) == ("probe", load_card(path).sha256)
    assert last["event"] == "end"


def test_every_end_of_sequence_token_of_the_model_is_left_out_alike(load, tokenizer):
    model = load("llama")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 4]
    rows = [{"prompt": "a", "completion": "x", "completion_ids": [8, 9, 4]}]
    scores = read(model, rows, [make_readout(model)], tokenizer=tokenizer)["concept"]
    assert scores.mask.sum() == 2
    rewarded = TokenBatch.from_ids([[5]], [[8, 9, 4]], end_of_turn_ids(model, tokenizer))
    assert rewarded.completion_mask.sum() == 2


def test_detached_the_trainer_is_stock_again(tmp_path, load, tokenizer):
    from trl import GRPOTrainer

    trainer = trainer_of(tmp_path, load("llama"), tokenizer, [some_none], lora=True)

    def hooks():
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in trainer.model.modules())

    before = hooks()
    attachment = attach(trainer, monitors=[make_readout(trainer.model)])
    assert hooks() > before
    assert type(trainer).__name__ == "InterpGRPOTrainer"
    attachment.detach()
    assert type(trainer) is GRPOTrainer
    assert hooks() == before
    trainer.train()


def test_a_model_compiled_before_attach_stops_before_the_first_step(tmp_path, load, tokenizer):
    model = load("llama")
    settings = {"torch_compile": True, "torch_compile_backend": "eager", "lora": True, "max_steps": 1}
    trainer = trainer_of(tmp_path, model, tokenizer, [some_none], **settings)
    trainer.train()
    before = weights(trainer)
    attach(trainer, monitors=[make_readout(model)])
    with pytest.raises(RuntimeError, match=r"`model.layers.1` (did not fire|saw no policy pass)"):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_attached_first_a_compiled_run_is_the_run(backend, tmp_path, load, tokenizer):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor compiles C++ on a CPU, and there is no g++")
    torch._dynamo.reset()  # what was compiled for other models of this process has none of our hooks
    found = []
    for compiled in (False, True):
        model = load("llama")
        settings = {"torch_compile": True, "torch_compile_backend": backend} if compiled else {}
        reward = Noted(make_readout(model), reader="both")
        trainer = trainer_of(tmp_path, model, tokenizer, [some_none, reward], lora=True, **settings)
        attachment = attach(trainer, monitors=[make_readout(model, "watched", seed=2)])
        trainer.train()
        found.append((reward.returned, weights(trainer), trainer.state.log_history, attachment.rollout.own_forwards))
    (rewards, trained, history, own), (again, trained_again, history_again, own_again) = found
    assert own == own_again
    for one, other in zip(rewards, again, strict=True):
        assert other == pytest.approx(one, abs=1e-4)
    assert max(float((trained[name] - trained_again[name]).abs().max()) for name in trained) < 1e-4
    for key in ("interp/watched/mean_score", "interp/concept/drift"):
        assert [log[key] for log in history_again if key in log] == pytest.approx(
            [log[key] for log in history if key in log], abs=1e-4
        )
