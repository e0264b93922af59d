"""Configuration of PPO: the names of TRL 1.12's `PPOConfig` and of the literature, on top of `GRPOConfig`.

In: the fields that a user sets. Out: the same, and `GRPOConfig`'s fields with their meaning for PPO. Only here are GRPO's rules
lifted that do not hold for PPO, and options refused that would act twice or not at all.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from ..trl import showing_a_group

CRITICS = ("head", "model", "none")
# PPO's name, and the field of `GRPOConfig` that is set to it.
ALIASES = {"num_ppo_epochs": "num_iterations", "cliprange": "epsilon", "kl_coef": "beta"}
# PPO options that are meaningless without a critic.
OF_A_CRITIC = ("vf_coef", "cliprange_value", "value_learning_rate", "detach_trunk")
MAY_BE_NONE = (
    "num_mini_batches",
    "num_generations",
    "cliprange_value",
    "missing_eos_penalty",
    "reward_clip",
    "value_learning_rate",
)
# Options of GRPO about group advantages or about a loss per sequence, which PPO does not have: the allowed values, and why.
WITHOUT_MEANING: dict[str, tuple[tuple[Any, ...], str]] = {
    "scale_rewards": (("group", "none", True, False), "there are no groups. Use `normalize_rewards` or `whiten_rewards`"),
    "multi_objective_aggregation": (("sum_then_normalize",), "rewards are added up where they fall. Use `reward_weights`"),
    "importance_sampling_level": (("token",), "advantages are per token"),
    "off_policy_mask_threshold": ((None,), "it masks by a sequence's one advantage"),
    "loss_type": (("dapo", "bnpo", "grpo", "dr_grpo"), "PPO's clipped ratio is what these have"),
}  # fmt: skip


@dataclass
class PPOConfig(GRPOConfig):
    r"""Configuration of `PPOTrainer`: everything of `GRPOConfig`, and the fields below.

    One rollout is `per_device_train_batch_size` × `gradient_accumulation_steps` × `num_mini_batches` × processes completions. The
    trainer passes over it `num_ppo_epochs` times, in `num_mini_batches` optimizer steps each. Changed defaults of `GRPOConfig`:
    `learning_rate` 3e-6, `num_generations` 1, `disable_dropout` True.

    Args:
        num_ppo_epochs (`int`, defaults to 4): passes over each rollout; sets `num_iterations`.
        num_mini_batches (`int`, *optional*, defaults to 1): optimizer steps per pass; sets `steps_per_generation`, or follows
            from it or from `generation_batch_size` if one of them is set.
        gamma (`float`, defaults to 1.0): discount per token, in [0, 1].
        lam (`float`, defaults to 0.95): λ of generalized advantage estimation, in [0, 1].
        cliprange (`float`, defaults to 0.2): of the policy's ratio; sets `epsilon`. `epsilon_high` and `delta` stay available.
        cliprange_value (`float`, *optional*, defaults to 0.2): how far a value may move from the rollout's value before its
            loss is clipped, in units of reward. None does not clip.
        vf_coef (`float`, defaults to 0.1): weight of the value loss.
        kl_coef (`float`, defaults to 0.05): price of a nat of KL to the reference, k1 per token, in the reward. It sets
            `beta`, so TRL keeps a reference. At 0 there is none.
        missing_eos_penalty (`float`, *optional*): subtracted from the reward of a truncated completion; positive.
        whiten_rewards (`bool`, defaults to `False`): divide rewards by their standard deviation over the rollout's tokens.
        whiten_advantages (`bool`, defaults to `True`): mean 0 and standard deviation 1 over the rollout's tokens, on all ranks.
        normalize_rewards (`bool`, defaults to `False`): divide rewards by the running standard deviation of a completion's total.
        reward_clip (`float`, *optional*): clips each token's reward to ± this, after normalization and before the KL.
        bootstrap_truncated (`bool`, defaults to `True`): if a completion was truncated at `max_completion_length` and only token
            rewards apply to it, V(s_T) stands for the rest. If a sequence-level reward function or `missing_eos_penalty` judged
            it, it ends there. With `False` every completion ends where it was truncated, as in TRL 1.12. At `gamma` 1 nothing
            bounds V if completions never end: set `gamma` below 1, or this to `False`.
        critic (`str`, defaults to `"head"`): `head`: a linear value head on the policy's last block. `model`: a second copy of
            the policy's backbone with its own head, which costs the memory and the passes of a model. `none`: no value function.
            With `gamma` = `lam` = 1 and `group_baseline`, that is GRPO's advantage without its scaling.
        detach_trunk (`bool`, defaults to `False`): the value loss does not reach the policy's own weights.
        value_learning_rate (`float`, *optional*): of the value function's parameters; by default `learning_rate`.
        group_baseline (`bool`, defaults to `False`): subtract the mean return of a prompt's judged completions. Only without
            a critic, and at `lam` 1.
        sample_rows (`int`, defaults to 4): completions of a rollout whose token rewards, values and advantages go into the
            run log.
        samples_every (`int`, defaults to 10): rollouts between two such samples; the one of `attach` is not used.

    Raises:
        `ValueError`: a value out of range, or an option of GRPO that contradicts PPO's or has no effect in PPO.

    Example:
        >>> from interp_rlhf import PPOConfig
        >>> args = PPOConfig("runs/ppo", per_device_train_batch_size=8, num_mini_batches=2, kl_coef=0.1, use_cpu=True, bf16=False)
        >>> args.steps_per_generation, args.beta
        (2, 0.1)
    """

    learning_rate: float = field(default=3e-6, metadata={"help": "The initial learning rate for AdamW."})
    num_generations: int | None = field(default=1, metadata={"help": "Completions per prompt."})
    disable_dropout: bool = field(
        default=True, metadata={"help": "Whether to disable dropout: with it, the first ratio is not 1."}
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout."})
    num_mini_batches: int | None = field(default=None, metadata={"help": "Optimizer steps per pass. 1 by default."})
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalized advantage estimation."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of the policy's ratio."})
    cliprange_value: float | None = field(default=0.2, metadata={"help": "Clip range of the value function."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    kl_coef: float = field(default=0.05, metadata={"help": "Price of the KL to the reference, in the reward."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the reward of a truncated completion; positive."}
    )
    whiten_rewards: bool = field(default=False, metadata={"help": "Whether to whiten the rewards."})
    whiten_advantages: bool = field(default=True, metadata={"help": "Whether to whiten the advantages."})
    normalize_rewards: bool = field(
        default=False, metadata={"help": "Divide rewards by the running deviation of a completion's total."}
    )
    reward_clip: float | None = field(
        default=None, metadata={"help": "Clip each token's reward to plus or minus this."}
    )
    bootstrap_truncated: bool = field(
        default=True, metadata={"help": "V stands for the rest of a truncated completion that only has token rewards."}
    )
    critic: str = field(default="head", metadata={"help": "`head`, `model` or `none`."})
    detach_trunk: bool = field(
        default=False, metadata={"help": "No gradient of the value loss in the policy's weights."}
    )
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the value function's parameters."}
    )
    group_baseline: bool = field(
        default=False, metadata={"help": "Subtract the mean return of a prompt's completions."}
    )
    sample_rows: int = field(default=4, metadata={"help": "Completions whose tokens are written into the run log."})
    samples_every: int = field(default=10, metadata={"help": "Rollouts between two that are written."})

    def __post_init__(self) -> None:
        self._refuse_out_of_range()
        self._refuse_what_has_no_meaning()
        for ours, theirs in ALIASES.items():
            setattr(self, theirs, getattr(self, ours))
        self._set_mini_batches()
        generations = self.num_generations or 1
        if self.num_generations_eval is None:
            self.num_generations_eval = generations
        self.num_generations = generations
        with showing_a_group(self, self._local_rollout() if generations == 1 else generations):
            super().__post_init__()
        self._check_mini_batches()

    def _refuse_out_of_range(self) -> None:
        wrong = []

        def expect(name: str, holds: Any, what: str) -> None:
            value = getattr(self, name)
            number = isinstance(value, int | float) and math.isfinite(value)
            if not (name in MAY_BE_NONE if value is None else number and holds(value)):
                wrong.append(f"`{name}` is {value!r} – expected {what}")

        for name in ("gamma", "lam"):
            expect(name, lambda v: 0 <= v <= 1, "a number from 0 to 1")
        expect("cliprange", lambda v: v > 0, "a number above 0")
        for name in ("cliprange_value", "missing_eos_penalty", "reward_clip", "value_learning_rate"):
            expect(name, lambda v: v > 0, "a number above 0, or none")
        for name in ("vf_coef", "kl_coef"):
            expect(name, lambda v: v >= 0, "a number of at least 0")
        for name in ("num_ppo_epochs", "num_mini_batches", "num_generations", "samples_every"):
            expect(name, lambda v: v >= 1 and int(v) == v, "a whole number of at least 1")
        expect("sample_rows", lambda v: v >= 0 and int(v) == v, "a whole number of at least 0")
        if self.critic not in CRITICS:
            wrong.append(f"`critic` is {self.critic!r} – expected one of {', '.join(f'`{c}`' for c in CRITICS)}")
        if self.group_baseline and (self.critic != "none" or (self.num_generations or 1) < 2):
            wrong.append(
                f"`group_baseline` is True with `critic` `{self.critic}` and `num_generations` {self.num_generations} – expected "
                "`critic: none` and at least 2: a value function is the baseline where there is one"
            )
        if self.group_baseline and self.lam != 1:
            wrong.append(
                f"`group_baseline` is True and `lam` {self.lam} – expected `lam: 1`: the baseline is a mean of whole returns, "
                "and λ below 1 would cut the returns that it is taken off"
            )
        if wrong:
            raise ValueError("; ".join(wrong) + ".")

    def _refuse_what_has_no_meaning(self) -> None:
        defaults = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
        self._refuse_what_does_nothing()
        for ours, theirs in ALIASES.items():
            value = getattr(self, theirs)
            if value not in (defaults[theirs], getattr(self, ours)):
                why = ": the KL is in the reward" if ours == "kl_coef" else ""
                raise ValueError(
                    f"`{theirs}` is {value} and `{ours}` {getattr(self, ours)} – expected `{ours}` alone{why}. Set `{ours}`."
                )
        for name, (allowed, why) in WITHOUT_MEANING.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r} – expected {', '.join(f'`{a}`' for a in allowed)} in PPO: {why}."
                )
        self.scale_rewards = "none"

    def _refuse_what_does_nothing(self) -> None:
        defaults = {f.name: f.default for f in dataclasses.fields(PPOConfig)}
        idle = {"none": OF_A_CRITIC, "model": ("detach_trunk",)}.get(self.critic, ())
        for name in idle:
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r} and `critic` `{self.critic}` – expected {defaults[name]!r}: there is "
                    f"{'no value function' if self.critic == 'none' else 'no trunk that it shares with the policy'}, and it "
                    f"would do nothing. Leave `{name}` out, or set `critic: head`."
                )
        if self.sync_ref_model and self.critic != "none":
            raise ValueError(
                f"`sync_ref_model` is True and `critic` `{self.critic}` – expected False: TRL copies the policy's parameters "
                "onto the reference's one by one, and the value head has no counterpart there. Leave it out."
            )
        if self.missing_eos_penalty is not None and self.mask_truncated_completions:
            raise ValueError(
                f"`missing_eos_penalty` is {self.missing_eos_penalty} and `mask_truncated_completions` True – expected one of "
                "them: a completion that is masked teaches nothing, its penalty neither."
            )
        if "eos_token_id" in (self.generation_kwargs or {}):
            raise ValueError(
                "`generation_kwargs` has `eos_token_id` – expected none: TRL cuts completions at the model's own, and padding "
                "after another stop token would be trained on. Set `model.generation_config.eos_token_id` before the trainer is "
                "built, and pass that model."
            )

    def _set_mini_batches(self) -> None:
        if self.generation_batch_size is None and self.steps_per_generation is None:
            self.steps_per_generation = (self.num_mini_batches or 1) * self.gradient_accumulation_steps

    def _local_rollout(self) -> int:
        """Completions per process and rollout; all of them where that is given."""
        if self.generation_batch_size is not None:
            count = self.generation_batch_size
        else:
            assert self.steps_per_generation is not None
            count = self.per_device_train_batch_size * self.steps_per_generation
        if count < 2:
            raise ValueError(
                "`per_device_train_batch_size` × `gradient_accumulation_steps` × `num_mini_batches` is 1 – expected a rollout of "
                "at least 2 completions per process: one alone has no spread to compare with. Raise one of them."
            )
        return count

    def _check_mini_batches(self) -> None:
        assert self.steps_per_generation is not None
        mini_batches, rest = divmod(self.steps_per_generation, self.gradient_accumulation_steps)
        if rest or not mini_batches:
            raise ValueError(
                f"`steps_per_generation` is {self.steps_per_generation} and `gradient_accumulation_steps` "
                f"{self.gradient_accumulation_steps} – expected a multiple of it, so that every optimizer step sees one "
                "mini-batch of one rollout. Leave `steps_per_generation` out and set `num_mini_batches`."
            )
        if self.num_mini_batches not in (None, mini_batches):
            raise ValueError(
                f"`num_mini_batches` is {self.num_mini_batches} and the rollout is {mini_batches} times what an optimizer step "
                "takes – expected the same number. Leave `steps_per_generation` and `generation_batch_size` out."
            )
        self.num_mini_batches = mini_batches
