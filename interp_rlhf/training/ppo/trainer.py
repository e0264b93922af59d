"""`PPOTrainer`: actor-critic PPO on `GRPOTrainer`'s rollouts and policy loss.

In: what `GRPOTrainer` takes, with a `PPOConfig`. Out: a trained policy. TRL generates, scores, computes log-probs, clips and
steps. This trainer adds a value of every state (`critic`), the token at which each reward falls (`token_rewards`), advantages
per token (`estimates`, `advantages`) and the value loss.

How it differs from TRL 1.12's `PPOTrainer` is listed in `docs/ppo.md`.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import nn
from trl import GRPOTrainer

from ...runlog.recorder import record
from .. import trl
from ..checkpoints import ResumeCallback, prompts_of
from ..mixin import RolloutMixin
from . import advantages as adv
from . import metrics
from .config import PPOConfig
from .construction import (
    bare,
    load_policy,
    name_of,
    processing_class_of,
    refuse,
    with_value_head,
)
from .critic import VALUE_HEAD, Critic, add_value_head
from .estimates import Carried, Estimator, ScoredRollout
from .samples import SampledRows, write
from .token_rewards import Returned, listened

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...activations.tap import PassKind
    from ...runlog.log import RunLog

# Components of the reward that come from no reward function.
RESERVED_NAMES = ("kl", "missing_eos")
COMPILED = "With `torch_compile`, hooks must exist before the first forward: turn it off, or build the trainer again."


PAPER = {
    "title": "Proximal Policy Optimization Algorithms",
    "id": "1707.06347",
    "citation": textwrap.dedent("""\
        @article{schulman2017proximal,
            title        = {{Proximal Policy Optimization Algorithms}},
            author       = {John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov},
            year         = 2017,
            eprint       = {arXiv:1707.06347}
        }"""),
}


@trl.described("PPO", tags=["trl", "ppo", "interp_rlhf"], paper=PAPER)
class PPOTrainer(RolloutMixin, trl.SavingSteps, GRPOTrainer):
    """Proximal policy optimization with a value function and rewards at every token.

    Data sets and reward functions are those of `GRPOTrainer`. A reward function may also return a list per completion, with one
    number per completion token. A function that sets `shaping = True` returns potentials: one more number than there are
    tokens. `reward_weights` weighs all of them, and they are added up at their tokens.

    Args:
        model (`str` or `PreTrainedModel`): the policy. The trainer puts a value head on it, so a model belongs to one trainer.
        reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers,
            quantization_config, peft_config: as in `GRPOTrainer`. `args` is a `PPOConfig`.

    Raises:
        `ValueError`: a setting under which it would train on nothing or on the wrong tokens. The message says what to do.

    Source: Schulman et al., arXiv 1707.06347; for language models Ziegler et al., arXiv 1909.08593.

    Example:
        >>> from datasets import Dataset
        >>> from interp_rlhf import PPOConfig, PPOTrainer
        >>> def brevity(completion_ids, **kwargs):
        ...     return [[-0.1] * len(ids) for ids in completion_ids]  # a reward at every token
        >>> args = PPOConfig("runs/ppo", per_device_train_batch_size=4, max_completion_length=4, max_steps=1, num_ppo_epochs=1,
        ...                  use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no")
        >>> prompts = Dataset.from_list([{"prompt": "the cat sat"}] * 4)
        >>> trainer = PPOTrainer(model, reward_funcs=[brevity], args=args, train_dataset=prompts, processing_class=tokenizer)
        >>> _ = trainer.train()
        {'train_runtime': ...}
        >>> trainer.state.global_step
        1
    """

    takes_token_rewards = True
    interp_writes_samples = True
    args: PPOConfig
    model: Any
    num_generations: Any
    num_generations_eval: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: PPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        **more: Any,
    ):
        args = args if args is not None else PPOConfig(f"{name_of(model)}-PPO")
        refuse(model, args, train_dataset, peft_config, more)
        by_path = isinstance(model, str)
        model = load_policy(model, args, quantization_config)
        if by_path and processing_class is None:
            processing_class = processing_class_of(model, args)
        self.has_critic = args.critic != "none"
        if self.has_critic:
            add_value_head(model, own_trunk=args.critic == "model")
        with trl.without_warning("`model_init_kwargs` will be ignored"):  # they were used, here
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=with_value_head(peft_config) if self.has_critic else peft_config,
            )
        if trl.reads_images(self):
            raise ValueError(
                "The processing class is one for images – expected a tokenizer: values and token rewards are for text alone."
            )
        if self.has_critic and self.use_vllm:
            trl.keep_from_vllm(self.vllm_generation, lambda name: f"{VALUE_HEAD}." in name)
        if self.has_critic and optimizers[0] is not None:
            self._add_head_to(optimizers[0], optimizers[1])
        self._critic = Critic(self.model, args.detach_trunk, self.has_critic)
        self._scored: ScoredRollout | None = None
        self._carried = Carried()
        self._estimator = Estimator(self, self._carried)
        self._keep_head = False
        self.run_log: RunLog | None = None
        self.add_callback(_Resume({"ppo": self._carried}, aligned=True, prompts=prompts_of(self)))

    # Training

    def train(self, resume_from_checkpoint: Any = None, *more: Any, **kwargs: Any) -> Any:
        """As `GRPOTrainer`; `resume_from_checkpoint=True` means the last checkpoint that is complete."""
        self.run_log = record(self)
        result = super().train(resume_from_checkpoint, *more, **kwargs)
        if self.state.global_step == 0:
            raise ValueError(
                "The run made 0 steps: `train_dataset` gave no whole rollout of "
                f"{self.args.generation_batch_size} completions – expected at least one, since TRL leaves out incomplete ones. "
                "Lower `per_device_train_batch_size`, `gradient_accumulation_steps` or `num_mini_batches`, or add prompts."
            )
        return result

    def create_optimizer(self, model: Any = None) -> Any:
        """TRL's optimizer. The value function gets a separate parameter group if it has its own learning rate."""
        made_by_user = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        rate = self.args.value_learning_rate
        if rate is None or made_by_user or not self.has_critic:
            return optimizer
        named = {id(p) for p in self._own_parameters(self.model if model is None else model)}
        for group in list(optimizer.param_groups):
            taken = [p for p in group["params"] if id(p) in named]
            if taken:
                group["params"] = [p for p in group["params"] if id(p) not in named]
                optimizer.add_param_group({**group, "params": taken, "lr": rate})
        return optimizer

    @staticmethod
    def _own_parameters(model: Any) -> list[nn.Parameter]:
        """Trainable parameters of the value function."""
        return [p for name, p in model.named_parameters() if f"{VALUE_HEAD}." in name and p.requires_grad]

    def _add_head_to(self, optimizer: Any, scheduler: Any) -> None:
        """Add the value head to an optimizer that the user made before the head existed."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [p for p in self._own_parameters(self.model) if id(p) not in held]
        if not missing:
            return
        if scheduler is not None:
            raise ValueError(
                "`optimizers` holds an optimizer and a scheduler – expected no scheduler (`(optimizer, None)`): the value head's "
                "parameters are added to the optimizer as a new group, which the scheduler would not know. Set "
                "`lr_scheduler_type`."
            )
        rate = self.args.value_learning_rate
        optimizer.add_param_group({"params": missing, "lr": self.args.learning_rate if rate is None else rate})

    # Rollouts

    def interp_calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> Any:
        functions, names = self.reward_funcs, _distinct(self.reward_func_names, RESERVED_NAMES)
        returned = {name: Returned() for name in names}
        listening = [
            listened(function, name, completion_ids, returned[name])
            for function, name in zip(functions, names, strict=True)
        ]
        with trl.calling_instead(self, listening):
            rewards = super().interp_calculate_rewards(inputs, prompts, completions, completion_ids)
        first = self.accelerator.process_index * len(prompts)
        of_this_rank = rewards[first : first + len(prompts)]
        for index, (function, name) in enumerate(zip(functions, names, strict=True)):
            if isinstance(function, nn.Module):
                returned[name] = _judged(of_this_rank[:, index], name)
        self._scored = ScoredRollout(prompts, completions, completion_ids, returned)
        return rewards

    def interp_generate_and_score(self, inputs: Any) -> dict[str, Any]:
        with self._critic.reading("policy_no_grad"), trl.computing_old_log_probs(self):
            output = super().interp_generate_and_score(inputs)
        scored, self._scored = self._scored, None
        assert scored is not None, "TRL calls the reward functions once per rollout"
        return self._with_advantages(output, scored)

    def _with_advantages(self, output: dict[str, Any], scored: ScoredRollout) -> dict[str, Any]:
        """The rollout with advantages (B, T) instead of TRL's, and with values and returns."""
        if "old_per_token_logps" not in output:
            raise RuntimeError(
                "TRL did not compute the old log-probs of this rollout – expected them, since values are read in that pass. This "
                "code was written for TRL 1.16: check `GRPOTrainer._generate_and_score_completions`."
            )
        reference = output.pop("ref_per_token_logps", None)
        reduce = self._estimator.sum_over_ranks
        estimates = self._estimator.estimate(output, reference, scored, self._rollout_values(output))
        self._note(metrics.of_rollout(estimates, self.args.gamma, self.has_critic, reduce))
        trl.drop_metric(self, "frac_reward_zero_std")  # about TRL's groups, which PPO does not use
        advantages = estimates.advantages
        if self.args.whiten_advantages:
            advantages = adv.whiten(advantages, estimates.counted, reduce=reduce)
        advantages = advantages * estimates.counted
        values = estimates.values[:, :-1]
        self._write_samples(scored, estimates.components, values, advantages)
        means = advantages.sum(1) / output["completion_mask"].sum(1).clamp(min=1)
        trl.replace_logged_advantages(self, gather_object(means.tolist()))
        return {
            **output,
            "advantages": advantages,
            "values": values,
            "returns": estimates.returns,
            "value_mask": estimates.counted,
        }

    def _rollout_values(self, output: dict[str, Any]) -> torch.Tensor:
        """V(s_0) … V(s_T), (B, T + 1): at the last prompt token and at each completion token, in the pass for old log-probs."""
        width = output["completion_ids"].shape[1] + 1
        passes = self._critic.take()
        if not self.has_critic:
            return torch.zeros(len(output["completion_ids"]), width, device=output["completion_ids"].device)
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        read = [p.input_ids for p in passes if p.input_ids is not None]
        if not read or not torch.equal(torch.cat(read), ids):
            raise RuntimeError(
                f"The policy's passes over this rollout of {len(ids)} completions were not seen – expected TRL's pass for the "
                f"old log-probs, saw {len(passes)} passes. {COMPILED}"
            )
        return torch.cat([p.values for p in passes])[:, -width:]

    # Loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's clipped policy loss on advantages per token, without its KL, plus the clipped value loss."""
        kind: PassKind = "policy" if torch.is_grad_enabled() else "policy_no_grad"
        with self._critic.reading(kind), trl.without_kl_in_the_loss(self):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        passes = self._critic.take()
        log_probs = passes[0].log_probs if len(passes) == 1 else None
        if log_probs is None:
            raise RuntimeError(
                f"The loss took {len(passes)} passes of the policy – expected one, with TRL's log-probs. {COMPILED}"
            )
        width = inputs["completion_ids"].shape[1]
        value_losses = None
        if self.has_critic:
            values = passes[0].values[:, -width - 1 : -1]  # V(s_t) is at the token before y_t
            value_losses = adv.value_losses(values, inputs["values"], inputs["returns"], self.args.cliprange_value)
        clip = (self.epsilon_low, self.epsilon_high)
        reduce = self._estimator.sum_over_ranks
        self._note(metrics.of_step(log_probs[:, -width:], inputs, clip, value_losses, reduce))
        if value_losses is None or not self.model.training:
            return loss
        # The sum over the optimizer step, on all ranks, divided by the rollout's tokens ÷ mini-batches, as in TRL's default loss
        # (`dapo`). So accumulation leaves it unchanged. With several mini-batches it is the mean over a step's tokens only on
        # average.
        steps = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes * steps
        return loss + self.args.vf_coef * (value_losses[0] * inputs["value_mask"]).sum() / tokens

    # Metrics

    def _note(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            trl.add_metric(self, name, value)

    def _write_samples(
        self,
        scored: ScoredRollout,
        components: Mapping[str, torch.Tensor],
        values: torch.Tensor,
        advantages: torch.Tensor,
    ) -> None:
        if not self.model.training:
            return
        due = self._carried.rollouts % self.args.samples_every == 0
        self._carried.rollouts += 1
        if self.run_log is None or not due or not self.run_log.writable:
            return
        scores = dict(self.interp_sample_scores or {})
        for name, result in scored.returned.items():
            paid = components[name].sum(1).tolist()  # weighted, and normalized if the configuration asks for it
            scores.setdefault(
                f"reward: {name}", [p if applies else None for p, applies in zip(paid, result.applies, strict=True)]
            )
        rewards = torch.stack(list(components.values())).sum(0)
        rows = SampledRows(
            scored.prompts, scored.completions, scored.completion_ids, scores, rewards, values, advantages
        )  # fmt: skip
        write(self.run_log, self.state.global_step, rows, self.args.sample_rows, trl.tokenizer_of(self))

    # Saving

    def interp_save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._keep_head = True
        try:
            super().interp_save_checkpoint(*args, **kwargs)
        finally:
            self._keep_head = False

    def interp_save_weights(self, output_dir: str | None, state_dict: dict[str, Any] | None) -> None:
        """A checkpoint holds the value function; what `save_model` and `push_to_hub` export is the bare policy."""
        if self._keep_head or not self.has_critic:
            super().interp_save_weights(output_dir, state_dict)
            return
        kept = None
        if state_dict is not None:
            kept = {name: value for name, value in state_dict.items() if f"{VALUE_HEAD}." not in name}
        with bare(self.model):
            super().interp_save_weights(output_dir, kept)


class _Resume(ResumeCallback):
    """A separate class, because `attach` adds a `ResumeCallback` too and TRL keeps one callback per class."""


def _distinct(names: Sequence[str], reserved: Sequence[str] = ()) -> list[str]:
    """Names that differ: a repeated or reserved name gets its place as a suffix."""
    taken = {*names, *reserved}
    distinct: list[str] = []
    for i, name in enumerate(names):
        if names.count(name) > 1 or name in reserved:
            while name in taken:
                name = f"{name}_{i}"
            taken.add(name)
        distinct.append(name)
    return distinct


def _judged(column: torch.Tensor, name: str) -> Returned:
    """A reward model's scores of this rank's completions, (B,)."""
    if not torch.isfinite(column).all():
        raise ValueError(f"Reward model `{name}` gave {column.tolist()} – expected finite numbers.")
    return Returned(tokens=[None] * len(column), totals=column.tolist())
