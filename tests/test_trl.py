"""What `training/trl.py` uses of TRL and transformers still looks the same. An upgrade that moves a name fails here."""

from __future__ import annotations

import importlib
import inspect
import logging
from types import SimpleNamespace

import pytest
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer, SFTTrainer

from interp_rlhf.training import trl

REWARDS = ["self", "inputs", "prompts", "completions", "completion_ids_list"]
# Class, method, its parameters.
SIGNATURES = [
    *[(c, "_tokenize_prompts", ["self", "prompts"]) for c in (GRPOTrainer, RLOOTrainer)],
    *[(c, "_calculate_rewards", REWARDS) for c in (GRPOTrainer, RLOOTrainer)],
    *[(c, "_generate_and_score_completions", ["self", "inputs"]) for c in (GRPOTrainer, RLOOTrainer)],
    (GRPOTrainer, "_save_checkpoint", ["self", "model", "trial"]),
    (GRPOTrainer, "_save", ["self", "output_dir", "state_dict"]),
    (GRPOTrainer, "compute_loss", ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]),
    (GRPOTrainer, "create_optimizer", ["self", "model"]),
]
# Module, and a line of it that `training/trl.py` or `training/ppo/` counts on.
LINES = [
    ("trl.trainer.grpo_trainer", line)
    for line in (
        "rewards_per_func = self._calculate_rewards(inputs, prompts, completions, completion_ids_list)",
        "prompt_ids, images, multimodal_fields = self._tokenize_prompts(prompts)",
        "generate_every = self.args.steps_per_generation * self.num_iterations  # generation frequency",
        "if self.args.gradient_accumulation_steps % generate_every != 0 or (",
        'output["old_per_token_logps"] = old_per_token_logps',
        'output["ref_per_token_logps"] = ref_per_token_logps',
        'self._logs["advantages"].extend(all_process_advantages.tolist())',
        "outputs = model(**model_inputs, labels=labels, fused_lm_head=True)",
        "per_token_logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(",
        "if advantages.dim() == 1:",
        'normalizer = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes',
        "model_init_kwargs` will be ignored",
        "self._is_vlm = True",
        "logger = get_logger(__name__)",
    )
] + [
    ("trl.trainer.rloo_trainer", line)
    for line in (
        "rewards_per_func = self._calculate_rewards(inputs, prompts, completions, completion_ids_list)",
        "prompt_ids, images, multimodal_fields = self._tokenize_prompts(prompts)",
        "self._is_vlm = True",
    )
] + [
    ("trl.trainer.grpo_config", "if self.num_generations < 2:"),
    ("trl.trainer.dpo_trainer", "self.precompute_ref_logps = args.precompute_ref_log_probs"),
    ("trl.trainer.dpo_trainer", "self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)"),
    ("trl.trainer.kto_trainer", "self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)"),
    ("trl.trainer.base_trainer", "_tag_names = []"),
    ("trl.trainer.base_trainer", '_name = "Base"'),
    ("trl.trainer.base_trainer", "_paper = {}"),
    ("trl.trainer.utils", "indexes = torch.randperm(self.num_samples, generator=self.generator).tolist()"),
    ("trl.trainer.utils", "self.generator.manual_seed(seed)"),
    ("trl.generation.vllm_generation", "def _iter_named_params(self):"),
    ("transformers.trainer", "if self.loss_is_scaled_for_ga is not None:"),
    ("transformers.trainer", "self.model_accepts_loss_kwargs and num_items_in_batch is not None"),
    ("transformers.modeling_utils", "def _from_config(cls, config, **kwargs):"),
    ("transformers.initialization", "def no_init_weights():"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("owner", "name", "parameters"), SIGNATURES, ids=lambda value: getattr(value, "__name__", None)
)
def test_the_private_names_that_are_overridden_still_look_the_same(owner, name, parameters):
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters


@pytest.mark.parametrize(("module", "line"), LINES)
def test_the_private_names_that_are_used_still_look_the_same(module, line):
    path = importlib.util.find_spec(module).origin
    with open(path, encoding="utf-8") as file:
        assert line in file.read(), f"{module} has no line `{line}`"


@pytest.mark.parametrize("owner", [DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer, SFTTrainer])
def test_metrics_are_averaged_by_mode_in_every_trainer(owner):
    source = inspect.getsource(owner.__init__)
    assert 'self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}' in source


@pytest.mark.parametrize("name", ["interp_tokenize_prompts", "interp_calculate_rewards", "interp_generate_and_score"])
def test_no_public_name_of_ours_hides_one_of_trl(name):
    for owner in (GRPOTrainer, RLOOTrainer):
        assert not hasattr(owner, name)
    for name in ("interp_save_checkpoint", "interp_save_weights"):
        assert not hasattr(GRPOTrainer, name)


@pytest.mark.parametrize(
    ("change", "name", "inside"),
    [
        (trl.computing_old_log_probs, "num_iterations", 5),
        (trl.without_kl_in_the_loss, "beta", 0.0),
        (lambda trainer: trl.calling_instead(trainer, ("f",)), "reward_funcs", ["f"]),
        (trl.using_given_reference, "precompute_ref_logps", True),
        (lambda trainer: trl.showing_a_group(trainer, 8), "num_generations", 8),
    ],
)
def test_state_that_is_changed_for_a_moment_is_put_back_after_an_error_too(change, name, inside):
    before = SimpleNamespace(
        num_iterations=1, beta=0.1, reward_funcs=["a", "b"], precompute_ref_logps=False, num_generations=1,
        args=SimpleNamespace(gradient_accumulation_steps=4),
    )  # fmt: skip
    value = getattr(before, name)

    def fail_inside():
        with change(before):
            assert getattr(before, name) == inside
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert getattr(before, name) is value


def test_one_warning_is_suppressed_and_the_others_are_not(caplog):
    logger = logging.getLogger("trl.trainer.grpo_trainer")
    with trl.without_warning("will be ignored"):
        logger.warning("`model_init_kwargs` will be ignored")
        logger.warning("something else")
    logger.warning("this will be ignored, but nobody asks for it any more")
    assert [record.getMessage() for record in caplog.records] == [
        "something else",
        "this will be ignored, but nobody asks for it any more",
    ]
