"""What this package uses of TRL, transformers and accelerate beyond their documented names: one place, one reason each.

In: a trainer or one of its parts. Out: what the caller needs, under a public name. Nothing here knows rewards, terms or readouts.

A TRL upgrade is a change of this file. `tests/test_trl.py` pins every name and every line of TRL that is used here; if one of
them changes, that test says which.

State of TRL that is changed for a moment and put back, all of it by the context managers below:

| state | context manager | why |
|---|---|---|
| `trainer.num_iterations` | `computing_old_log_probs` | PPO reads values in the pass for the old log-probs |
| `trainer.beta` | `without_kl_in_the_loss` | PPO pays the KL in the reward |
| `trainer.reward_funcs` | `calling_instead` | PPO listens to what reward functions return |
| `trainer.precompute_ref_logps` | `using_given_reference` | `ExplainAway` shifts the reference's log-probs of a batch |
| `args.num_generations` | `showing_a_group` | `GRPOConfig` rejects one completion per prompt |
| the log filter of `trl.trainer.grpo_trainer` | `without_warning` | one warning is wrong when PPO has loaded the model itself |
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

C = TypeVar("C", bound=type)

# Kinds of trainer that generate what they train on.
ROLLOUT_KINDS = ("GRPO", "RLOO")


class RolloutSteps:
    """Public names for three private steps of `GRPOTrainer` and `RLOOTrainer`, to be overridden in subclasses.

    TRL offers no callback between generation, rewards and loss. Put before the trainer in the bases of a class.
    """

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        return self.interp_tokenize_prompts(prompts)

    def interp_tokenize_prompts(self, prompts: list[Any]) -> Any:
        """Token ids of the prompts, first in the tuple. TRL calls it once per rollout, before it generates."""
        return super()._tokenize_prompts(prompts)  # type: ignore[misc]

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        return self.interp_calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def interp_calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> Any:
        """Rewards (N, F) of the completions of all ranks, by function. TRL calls it after the passes for log-probs."""
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids)  # type: ignore[misc]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        return self.interp_generate_and_score(inputs)

    def interp_generate_and_score(self, inputs: Any) -> dict[str, Any]:
        """The rollout batch on which TRL trains: ids, masks, log-probs, advantages."""
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        return output


class SavingSteps:
    """Public names for two private steps of `transformers.Trainer`: only there can a checkpoint differ from an export."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.interp_save_checkpoint(*args, **kwargs)

    def interp_save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Writes a whole checkpoint, weights and state."""
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self.interp_save_weights(output_dir, state_dict)

    def interp_save_weights(self, output_dir: str | None, state_dict: dict[str, Any] | None) -> None:
        """Writes the weights: part of a checkpoint, and all of an export."""
        super()._save(output_dir, state_dict)  # type: ignore[misc]


def described(name: str, tags: Sequence[str], paper: dict[str, str]) -> Callable[[C], C]:
    """Class decorator: what TRL writes into the model card of what a trainer has trained."""

    def describe(trainer_class: C) -> C:
        trainer_class._name, trainer_class._tag_names, trainer_class._paper = name, list(tags), paper  # type: ignore[attr-defined]
        return trainer_class

    return describe


# Metrics


def mode_of(trainer: Any) -> str:
    """`train` or `eval`, as TRL tells them apart when it logs."""
    return "train" if trainer.model.training else "eval"


def add_metric(trainer: Any, name: str, value: float) -> None:
    """Adds to TRL's own averages, which it logs with the loss: TRL's trainers have no public way to log from inside a step."""
    trainer._metrics[mode_of(trainer)][name].append(value)


def drop_metric(trainer: Any, name: str) -> None:
    """Takes back what TRL has noted of a metric since it logged last."""
    trainer._metrics[mode_of(trainer)].pop(name, None)


def replace_logged_advantages(trainer: Any, advantages: Sequence[float]) -> None:
    """Puts other advantages into TRL's table of completions, in place of as many that it has just added."""
    logged = trainer._logs["advantages"]
    for _ in range(min(len(advantages), len(logged))):
        logged.pop()
    logged.extend(advantages)


# Parts of a trainer


def reads_images(trainer: Any) -> bool:
    """True if the trainer's processing class is one for images; no public attribute says it."""
    return bool(getattr(trainer, "_is_vlm", False))


def tokenizer_of(trainer: Any) -> Any:
    """The tokenizer, where the trainer's processing class may be a processor that holds one."""
    processing = trainer.processing_class
    return getattr(processing, "tokenizer", processing)


def callbacks_of(trainer: Any) -> list[Any]:
    """The trainer's callbacks, in order: `Trainer` adds and removes callbacks in public, but does not list them."""
    return list(trainer.callback_handler.callbacks)


def precompute_engine(trainer: Any) -> Any:
    """DeepSpeed's engine for passes before training: TRL's own, or one that is made as TRL makes it."""
    if trainer._precompute_engine is None:  # TRL found its log-probs in a file
        from trl.models import prepare_deepspeed

        trainer._precompute_engine = prepare_deepspeed(trainer.model, trainer.accelerator)
    return trainer._precompute_engine


def loss_spans_the_step(trainer: Any, num_items: Any) -> bool:
    """True if the loss already divides by the tokens of the whole optimizer step, so that `Trainer` does not divide it again."""
    scaled = trainer.loss_is_scaled_for_ga
    if scaled is None:
        accepts = trainer.model_accepts_loss_kwargs and num_items is not None
        scaled = accepts or trainer.compute_loss_func is not None
    return bool(scaled)


def keep_from_vllm(generation: Any, keep_back: Callable[[str], bool]) -> None:
    """Leaves weights out of what TRL sends to vLLM, which refuses names that it does not know.

    Args:
        generation (`VLLMGeneration`): the trainer's `vllm_generation`.
        keep_back (`Callable`): True for the name of a weight that vLLM must not see.
    """
    every = generation._iter_named_params

    def known_to_vllm() -> Iterator[tuple[str, Any]]:
        return ((name, weight) for name, weight in every() if not keep_back(name))

    generation._iter_named_params = known_to_vllm


def restore_order(dataloader: Any, epochs: int) -> None:
    """Draws the prompts of the coming epoch in the order of a run that was never interrupted.

    TRL's sampler draws the order of each epoch from a generator that no checkpoint holds. A run that resumes in the second epoch
    would get the first epoch's order again.

    Args:
        dataloader (`DataLoader`): as accelerate prepared it; one with another sampler is left alone.
        epochs (`int`): whole epochs before the resumed step.
    """
    from trl.trainer.utils import RepeatSampler

    batches: Any = getattr(dataloader, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):  # with several processes, each has its share of the batches
        batches = batches.batch_sampler
    sampler = getattr(batches, "sampler", None)
    if isinstance(sampler, RepeatSampler) and sampler.shuffle and sampler.seed is not None:
        sampler.generator.manual_seed(sampler.seed)
        for _ in range(epochs):
            torch.randperm(sampler.num_samples, generator=sampler.generator)


# A model of transformers


def unfilled_copy(model: Any) -> Any:
    """A model of the same class and configuration on the CPU, whose weights are not initialized yet.

    transformers has no public way to build a model of a given class in a given precision without drawing its weights.
    """
    from transformers.initialization import no_init_weights

    with torch.random.fork_rng(), torch.device("cpu"), no_init_weights():
        return type(model)._from_config(deepcopy(model.config), dtype=model.dtype)


# State that is changed for a moment and put back


@contextmanager
def _changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def computing_old_log_probs(trainer: Any) -> Any:
    """Context in which TRL computes a rollout's old log-probs in any case.

    TRL leaves their pass out if they would equal the new ones. It makes the pass if the accumulation steps are no multiple of
    `steps_per_generation` × `num_iterations`, so `num_iterations` is one more than the accumulation steps here.
    """
    return _changed(trainer, "num_iterations", trainer.args.gradient_accumulation_steps + 1)


def without_kl_in_the_loss(trainer: Any) -> Any:
    """Context in which TRL's loss has no KL term."""
    return _changed(trainer, "beta", 0.0)


def calling_instead(trainer: Any, functions: Sequence[Any]) -> Any:
    """Context in which TRL calls these reward functions, in the order of `trainer.reward_funcs`."""
    return _changed(trainer, "reward_funcs", list(functions))


def using_given_reference(trainer: Any) -> Any:
    """Context in which `DPOTrainer` takes the reference's log-probs from the batch instead of running the reference."""
    return _changed(trainer, "precompute_ref_logps", True)


def showing_a_group(config: Any, size: int) -> Any:
    """Context in which a configuration has groups of this size: `GRPOConfig` rejects `num_generations=1`."""
    return _changed(config, "num_generations", size)


@contextmanager
def without_warning(text: str) -> Iterator[None]:
    """Suppresses one warning of TRL's GRPO trainer, selected by its text."""
    logger = logging.getLogger("trl.trainer.grpo_trainer")

    def keep(entry: logging.LogRecord) -> bool:
        return text not in entry.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def without_callbacks(trainer: Any, known: Iterable[Any]) -> None:
    """Takes off every callback that is not among the known ones."""
    kept = list(known)
    for callback in callbacks_of(trainer):
        if callback not in kept:
            trainer.remove_callback(callback)
