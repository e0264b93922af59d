"""`PPOTrainer`: actor-critic PPO on `GRPOTrainer`'s rollouts and policy loss.

In: what `GRPOTrainer` takes, with a `PPOConfig`. Out: a trained policy. TRL generates, scores, computes log-probs, clips and
steps; what is added is a value of every state (`critic`), where each reward falls (`token_rewards`), advantages per token
(`advantages`) and the value loss. Private methods of TRL that are overridden are pass-throughs; a test pins their signatures.

How it differs from TRL 1.12's `PPOTrainer` is listed in `docs/ppo.md`.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
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
    loaded,
    name_of,
    processing_class_of,
    refuse,
    with_value_head,
)
from .critic import VALUE_HEAD, Critic, add_value_head
from .samples import Rollout, write
from .token_rewards import Returned, listened

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...runlog.log import RunLog

OURS = ("kl", "missing_eos")  # components of the reward that are no function's
COMPILED = (
    "With `torch_compile`, hooks must be there before the first forward: turn it off, or build the trainer anew."
)


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

    Data sets and reward functions are those of `GRPOTrainer`. A reward function may also return, in place of a completion's one
    number, a list with one number per completion token; one that sets `shaping = True` returns potentials, one more than
    there are tokens. All are weighted by `reward_weights` and added up where they fall.

    Args:
        model (`str` or `PreTrainedModel`): the policy; a value head is put on it, so a model belongs to one trainer.
        reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers,
            quantization_config, peft_config: as `GRPOTrainer` has them; `args` is a `PPOConfig`.

    Raises:
        `ValueError`: what would train on nothing or on the wrong tokens; the message says what to do.

    Source: Schulman et al., arXiv 1707.06347; for language models Ziegler et al., arXiv 1909.08593.
    """

    takes_token_rewards = True  # `attach` asks
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
        model = loaded(model, args, quantization_config)
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
        self._returned: dict[str, Returned] = {}
        self._scored: dict[str, Any] = {}
        self._carried = _Carried()
        self._keep_head = False
        self.run_log: RunLog | None = None
        self.sample_scores: dict[str, Any] | None = None  # what an attached watcher found on the rollout
        self.add_callback(_Resume({"ppo": self._carried}, aligned=True, prompts=prompts_of(self)))

    # Training

    def train(self, resume_from_checkpoint: Any = None, *more: Any, **kwargs: Any) -> Any:
        """As `GRPOTrainer`; `resume_from_checkpoint=True` means the last checkpoint that is complete."""
        self.run_log = record(self)
        found = super().train(resume_from_checkpoint, *more, **kwargs)
        if self.state.global_step == 0:
            raise ValueError(
                "The run made 0 steps: `train_dataset` gave no whole rollout of "
                f"{self.args.generation_batch_size} completions – expected at least one, since TRL leaves out incomplete ones. "
                "Lower `per_device_train_batch_size`, `gradient_accumulation_steps` or `num_mini_batches`, or add prompts."
            )
        return found

    def create_optimizer(self, model: Any = None) -> Any:
        """TRL's, with a group of its own for the value function where it has its own learning rate."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        rate = self.args.value_learning_rate
        if rate is None or given or not self.has_critic:
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
        """What the value function trains of its own."""
        return [p for name, p in model.named_parameters() if f"{VALUE_HEAD}." in name and p.requires_grad]

    def _add_head_to(self, optimizer: Any, scheduler: Any) -> None:
        """An optimizer that was given was made before the value head was there."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [p for p in self._own_parameters(self.model) if id(p) not in held]
        if not missing:
            return
        if scheduler is not None:
            raise ValueError(
                "`optimizers` holds an optimizer and a scheduler – expected no scheduler (`(optimizer, None)`): the value head's "
                "parameters are added to the optimizer as a group of their own, which the scheduler would not know. Set "
                "`lr_scheduler_type`."
            )
        rate = self.args.value_learning_rate
        optimizer.add_param_group({"params": missing, "lr": self.args.learning_rate if rate is None else rate})

    # Rollouts

    def calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> Any:
        functions, names = self.reward_funcs, _distinct(self.reward_func_names, OURS)
        self._returned = {name: Returned() for name in names}
        listening = [
            listened(function, name, completion_ids, self._returned[name])
            for function, name in zip(functions, names, strict=True)
        ]
        with trl.calling_instead(self, listening):
            rewards = super().calculate_rewards(inputs, prompts, completions, completion_ids)
        first = self.accelerator.process_index * len(prompts)
        own = rewards[first : first + len(prompts)]
        for index, (function, name) in enumerate(zip(functions, names, strict=True)):
            if isinstance(function, nn.Module):
                self._returned[name] = _judged(own[:, index], name)
        self._scored = {"prompts": prompts, "completions": completions, "ids": completion_ids}
        return rewards

    def generate_and_score(self, inputs: Any) -> dict[str, Any]:
        with self._critic.reading(), trl.computing_old_log_probs(self):
            output = super().generate_and_score(inputs)
        return self._with_advantages(output)

    def _with_advantages(self, output: dict[str, Any]) -> dict[str, Any]:
        """The rollout with advantages (B, T) in place of TRL's, and with values and returns."""
        if "old_per_token_logps" not in output:
            raise RuntimeError(
                "TRL did not compute the old log-probs of this rollout – expected it, since values are read in that pass. This "
                "is made for TRL 1.16: check `GRPOTrainer._generate_and_score_completions`."
            )
        worked = self._work_out(output, output.pop("ref_per_token_logps", None))
        self._note(metrics.of_rollout(worked, self.args.gamma, self.has_critic, self._sum))
        trl.drop_metric(self, "frac_reward_zero_std")  # of TRL's groups, which are not used
        found = worked.advantages
        if self.args.whiten_advantages:
            found = adv.whiten(found, worked.counted, reduce=self._sum)
        found = found * worked.counted
        values = worked.values[:, :-1]
        self._leave_samples(worked.components, values, found)
        trl.replace_logged_advantages(self, gather_object(_mean_of_tokens(found, output["completion_mask"])))
        return {
            **output,
            "advantages": found,
            "values": values,
            "returns": worked.returns,
            "value_mask": worked.counted,
        }

    def _work_out(self, output: dict[str, Any], reference: torch.Tensor | None) -> metrics.Worked:
        """Rewards where they fall, values, advantages and returns of a rollout, before whitening."""
        args, mask = self.args, output["completion_mask"]
        values = self._rollout_values(output)  # (B, T + 1)
        truncated = self._truncated()
        ended = self._ended(truncated)
        parts = self._rewards_of_functions(mask, ended)
        applies = [any(row) for row in zip(*(r.applies for r in self._paid()), strict=True)]
        scorable = torch.tensor(applies, device=mask.device) & mask.any(1)  # TRL may mask what was cut off
        parts = self._normalized(parts, scorable)
        if args.missing_eos_penalty is not None:
            parts["missing_eos"] = adv.on_last_token(truncated * -args.missing_eos_penalty, mask)
        old = output["old_per_token_logps"].float()
        if reference is not None:
            reference = reference.float()
            parts["kl"] = adv.kl_reward(old, reference, mask, args.kl_coef)
        counted = mask * scorable[:, None]  # what no function judged teaches nothing
        if args.whiten_rewards:
            _, variance = adv.moments(torch.stack(list(parts.values())).sum(0), counted, self._sum)
            parts = {name: part * torch.rsqrt(variance + 1e-8) for name, part in parts.items()}
        rewards = torch.stack(list(parts.values())).sum(0)
        found = adv.gae(rewards, values, mask, ended, args.gamma, args.lam)
        returns = found + values[:, :-1]
        if args.group_baseline:
            found = (found - self._group_baseline(rewards, scorable)[:, None]) * mask
        return metrics.Worked(parts, old, reference, values, found, returns, counted, ended)

    def _rollout_values(self, output: dict[str, Any]) -> torch.Tensor:
        """V(s_0) … V(s_T), (B, T + 1), of the old log-probs' pass: at the last prompt token and at every completion token."""
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

    def _truncated(self) -> torch.Tensor:
        """Which completions were cut off: they do not end in an end-of-sequence token, (B,)."""
        ends = {*self.eos_token_ids, trl.tokenizer_of(self).pad_token_id}
        return torch.tensor([ids[-1] not in ends for ids in self._scored["ids"]], device=self.accelerator.device)

    def _ended(self, truncated: torch.Tensor) -> torch.Tensor:
        """Which completions are over at their last token, (B,): all but those whose rest V stands for."""
        args = self.args
        if not args.bootstrap_truncated or not self.has_critic or args.missing_eos_penalty is not None:
            return torch.ones_like(truncated)
        judged = torch.tensor(
            [any(row) for row in zip(*(r.judged for r in self._paid()), strict=True)],
            device=truncated.device,
        )
        return ~truncated | judged

    def _paid(self) -> list[Returned]:
        """What the functions returned whose word counts: one of weight 0 is only logged, unless all are."""
        every = list(self._returned.values())
        return [r for weight, r in zip(self.reward_weights.tolist(), every, strict=True) if weight] or every

    def _rewards_of_functions(self, mask: torch.Tensor, ended: torch.Tensor) -> dict[str, torch.Tensor]:
        """Weighted rewards per token (B, T) by the function that gave them."""
        return {
            name: weight * returned.rewards(mask, ended, self.args.gamma)
            for weight, (name, returned) in zip(self.reward_weights.tolist(), self._returned.items(), strict=True)
        }

    def _normalized(self, parts: dict[str, torch.Tensor], scorable: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rewards over the running deviation of completions' totals, and cut, where that is asked for."""
        args, running = self.args, self._carried.running
        if args.normalize_rewards:
            if self.model.training:
                totals = torch.stack(list(parts.values())).sum((0, 2))  # (B,)
                running.update(self.accelerator.gather(totals)[self.accelerator.gather(scorable)])
            parts = {name: part / running.std for name, part in parts.items()}
        if args.reward_clip is not None:
            parts = {name: part.clamp(-args.reward_clip, args.reward_clip) for name, part in parts.items()}
        return parts

    def _group_baseline(self, rewards: torch.Tensor, scorable: torch.Tensor) -> torch.Tensor:
        """Mean return of those of each prompt's completions that were judged, for this rank's rows, (B,)."""
        own = adv.returns_to_go(rewards, self.args.gamma)[:, 0].masked_fill(~scorable, torch.nan)
        returns = self.accelerator.gather(own.contiguous())
        size = int(self.num_generations if self.model.training else self.num_generations_eval)
        first = self.accelerator.process_index * len(rewards)
        return adv.group_means(returns, size)[first : first + len(rewards)]

    # Loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's clipped policy loss on advantages per token, without its KL, and the clipped value loss."""
        with self._critic.reading(), trl.without_kl_in_the_loss(self):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        passes = self._critic.take()
        log_probs = passes[0].log_probs if len(passes) == 1 else None
        if log_probs is None:
            raise RuntimeError(
                f"The loss took {len(passes)} passes of the policy – expected one, with TRL's log-probs. {COMPILED}"
            )
        width = inputs["completion_ids"].shape[1]
        found = None
        if self.has_critic:
            values = passes[0].values[:, -width - 1 : -1]  # V(s_t) stands at the token before y_t
            found = adv.value_losses(values, inputs["values"], inputs["returns"], self.args.cliprange_value)
        clip = (self.epsilon_low, self.epsilon_high)
        self._note(metrics.of_step(log_probs[:, -width:], inputs, clip, found, self._sum))
        if found is None or not self.model.training:
            return loss
        # The sum over the optimizer step, on all ranks, over the rollout's tokens ÷ mini-batches, as TRL's default loss (`dapo`):
        # so accumulation leaves it unchanged. With several mini-batches that is the mean over a step's tokens only on average.
        steps = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes * steps
        return loss + self.args.vf_coef * (found[0] * inputs["value_mask"]).sum() / tokens

    # Metrics

    def _sum(self, sums: torch.Tensor) -> torch.Tensor:
        """Sum over ranks."""
        if self.accelerator.num_processes == 1:
            return sums
        total: torch.Tensor = self.accelerator.reduce(sums, reduction="sum")
        return total

    def _note(self, found: dict[str, float]) -> None:
        for name, value in found.items():
            trl.add_metric(self, name, value)

    def _leave_samples(
        self, components: Mapping[str, torch.Tensor], values: torch.Tensor, found: torch.Tensor
    ) -> None:
        if not self.model.training:
            return
        due = self._carried.rollouts % self.args.samples_every == 0
        self._carried.rollouts += 1
        if self.run_log is None or not due or not self.run_log.writable:
            return
        scores = dict(self.sample_scores or {})
        for name, returned in self._returned.items():
            paid = components[name].sum(1).tolist()  # weighted, and normalized where that is asked for
            scores.setdefault(
                f"reward: {name}", [p if said else None for p, said in zip(paid, returned.applies, strict=True)]
            )
        rewards = torch.stack(list(components.values())).sum(0)
        scored = self._scored
        rollout = Rollout(
            scored["prompts"], scored["completions"], scored["ids"], scores, rewards, values, found
        )  # fmt: skip
        write(self.run_log, self.state.global_step, rollout, self.args.sample_rows, trl.tokenizer_of(self))

    # Saving

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._keep_head = True
        try:
            super().save_checkpoint(*args, **kwargs)
        finally:
            self._keep_head = False

    def save_weights(self, output_dir: str | None, state_dict: dict[str, Any] | None) -> None:
        """A checkpoint holds the value function; what `save_model` and `push_to_hub` export is the bare policy."""
        if self._keep_head or not self.has_critic:
            super().save_weights(output_dir, state_dict)
            return
        kept = None
        if state_dict is not None:
            kept = {name: value for name, value in state_dict.items() if f"{VALUE_HEAD}." not in name}
        with bare(self.model):
            super().save_weights(output_dir, kept)


@dataclass
class _Carried:
    """What a resumed run must know.

    Attributes:
        running (`RunningStd`): of completions' totals.
        rollouts (`int`): rollouts so far.
    """

    running: adv.RunningStd = field(default_factory=adv.RunningStd)
    rollouts: int = 0

    def state(self) -> dict[str, Any]:
        return {"running": self.running.state(), "rollouts": self.rollouts}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.running.load_state(state["running"])
        self.rollouts = int(state["rollouts"])


class _Resume(ResumeCallback):
    """Of a class of its own, since `attach` adds one too."""


def _distinct(names: Sequence[str], reserved: Sequence[str] = ()) -> list[str]:
    """Names, told apart by their place where two are the same, or one is reserved."""
    taken = {*names, *reserved}
    found: list[str] = []
    for i, name in enumerate(names):
        if names.count(name) > 1 or name in reserved:
            while name in taken:
                name = f"{name}_{i}"
            taken.add(name)
        found.append(name)
    return found


def _judged(column: torch.Tensor, name: str) -> Returned:
    """What a reward model said of this rank's completions, (B,)."""
    if not torch.isfinite(column).all():
        raise ValueError(f"Reward model `{name}` gave {column.tolist()} – expected finite numbers.")
    return Returned(tokens=[None] * len(column), totals=column.tolist())


def _mean_of_tokens(values: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """Mean over each completion's tokens, of values (B, T) that are 0 elsewhere."""
    means: list[float] = (values.sum(1) / mask.sum(1).clamp(min=1)).tolist()
    return means
