"""Construction of a `PPOTrainer`: what it refuses, how it loads the model, and how it exports the model without value head.

In: arguments of `PPOTrainer`. Out: a model that TRL can wrap, or an error that says what to do. It knows nothing of rewards.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model, set_seed
from transformers import AutoProcessor
from trl.trainer.utils import create_model_from_path, get_config_model_id

from ...activations.hook_points import unwrap
from ..checkpoints import require_aligned_saves
from .config import PPOConfig
from .critic import VALUE_HEAD

if TYPE_CHECKING:
    from collections.abc import Iterator

NOT_BUILT = {
    "tools": "tool results would be among the rewarded tokens",
    "rollout_func": "its completions may hold tokens that the model did not write",
    "environment_factory": "observations would be among the rewarded tokens",
}


def name_of(model: Any) -> str:
    return str(model if isinstance(model, str) else get_config_model_id(model.config)).split("/")[-1]


def refuse(model: Any, args: Any, train_dataset: Any, peft_config: Any, more: dict[str, Any]) -> None:
    """Refuse settings under which PPO would train on nothing, or on the wrong tokens."""
    if not isinstance(args, PPOConfig):
        raise ValueError(
            f"`args` is a `{type(args).__name__}` – expected a `PPOConfig`. Its fields are those of `GRPOConfig` and PPO's own."
        )
    for name, value in more.items():
        if name not in NOT_BUILT:
            raise TypeError(f"`PPOTrainer` got `{name}` – expected arguments of `GRPOTrainer`.")
        if value:
            raise ValueError(f"`{name}` is set – expected none in PPO: {NOT_BUILT[name]}.")
    if not isinstance(model, str) and is_peft_model(model):
        raise ValueError(
            "`model` is a `PeftModel` – expected the base model and a `peft_config`: the value head has to be among what the "
            "adapter saves. Merge the adapter first (`model.merge_and_unload()`)."
        )
    if peft_config is not None and getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(
            "`peft_config` is of prompt learning – expected adapters such as LoRA: values are read at tokens."
        )
    require_aligned_saves(args, args.save_steps, len(train_dataset) if hasattr(train_dataset, "__len__") else None)
    if train_dataset is not None and hasattr(train_dataset, "__len__"):
        needed = int(args.generation_batch_size or 0) // int(args.num_generations or 1)
        if len(train_dataset) < needed:
            raise ValueError(
                f"`train_dataset` has {len(train_dataset)} prompts – expected at least {needed}, those of one rollout "
                "(`per_device_train_batch_size` × `gradient_accumulation_steps` × `num_mini_batches` × processes ÷ "
                "`num_generations`): TRL leaves out incomplete rollouts and would train 0 steps. Lower one of these, or add "
                "prompts."
            )


def load_policy(model: Any, args: PPOConfig, quantization_config: Any) -> Any:
    """Load the model of a path as `GRPOTrainer` does: the value head must exist before TRL wraps the model."""
    if not isinstance(model, str):
        return model
    set_seed(args.seed)
    keywords: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    if quantization_config is not None:
        keywords["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]:
        keywords["device_map"] = None
    keywords.setdefault("trust_remote_code", args.trust_remote_code)
    return create_model_from_path(model, **keywords)


def with_value_head(peft_config: Any) -> Any:
    """The adapter's configuration with the value head among the modules that it trains and saves whole."""
    if peft_config is None:
        return None
    changed = copy.deepcopy(peft_config)
    changed.modules_to_save = [*(peft_config.modules_to_save or []), VALUE_HEAD]
    return changed


def processing_class_of(model: Any, args: PPOConfig) -> Any:
    """Load the processing class of a path, of the model's revision, as `GRPOTrainer` does when it loads the model too."""
    keywords: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    return AutoProcessor.from_pretrained(
        get_config_model_id(model.config), revision=keywords.get("revision"), truncation_side="left", padding_side="left",
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip


@contextmanager
def bare(model: Any) -> Iterator[None]:
    """Context in which the model has no value head and the adapter's configuration does not name one."""
    base = unwrap(model)
    head = getattr(base, VALUE_HEAD)
    delattr(base, VALUE_HEAD)
    configs = list(getattr(model, "peft_config", {}).values())
    listed = [config.modules_to_save for config in configs]
    for config, names in zip(configs, listed, strict=True):
        config.modules_to_save = [name for name in names or [] if name != VALUE_HEAD] or None
    try:
        yield
    finally:
        setattr(base, VALUE_HEAD, head)
        for config, names in zip(configs, listed, strict=True):
            config.modules_to_save = names
