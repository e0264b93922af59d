"""Builders of real TRL trainers on tiny models, and what their terms are by hand: one row at a time, without padding."""

from __future__ import annotations

import random

import torch
from datasets import Dataset
from tiny import WORDS, sentences

KINDS = ("DPO", "KTO", "SFT", "GRPO", "RLOO")
OFFLINE = ("DPO", "KTO", "SFT")


def rows_of(kind: str, count: int = 8, seed: int = 1):
    """Rows of a data set for a trainer, of different lengths."""
    rng = random.Random(seed)

    def said(role, low=2, high=14):
        return [{"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(low, high)))}]

    if kind == "DPO":
        return [
            {"prompt": said("user"), "chosen": said("assistant"), "rejected": said("assistant")} for _ in range(count)
        ]
    if kind == "KTO":
        return [{"prompt": said("user"), "completion": said("assistant"), "label": i % 2 == 0} for i in range(count)]
    if kind == "SFT":
        return [{"prompt": said("user"), "completion": said("assistant")} for _ in range(count)]
    return [{"prompt": said("user")} for _ in range(count)]


def by_length(completion_ids, **kwargs):
    return [float(len(ids) % 3) + 0.1 * (ids[0] % 7) for ids in completion_ids]


def lora_config(**changes):
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes})


def make_trainer(
    kind,
    model,
    tokenizer,
    folder,
    lora=None,
    ours=False,
    rows=None,
    eval_rows=None,
    attach=None,
    reward_funcs=None,
    **changes,
):
    """A trainer on a CPU; `ours` builds the subclass, with the keywords of `attach`."""
    import trl

    import interp_rlhf

    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1,
        "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "seed": 3,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    more = {}
    if kind in ("GRPO", "RLOO"):
        settings |= {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}
        more["reward_funcs"] = reward_funcs or [by_length]
    config = getattr(trl, f"{kind}Config")(**{**settings, **changes})
    trainer_class = getattr(interp_rlhf, f"Interp{kind}Trainer") if ours else getattr(trl, f"{kind}Trainer")
    return trainer_class(
        model=model, args=config, train_dataset=Dataset.from_list(rows_of(kind) if rows is None else rows),
        eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None, processing_class=tokenizer,
        peft_config=lora_config(**lora) if lora is not None else None, **more, **(attach or {}),
    )  # fmt: skip


def randomize_adapters(trainer, seed: int = 0):
    """Adapters that change activations from the first step on."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)


def perturb(model, seed: int = 0):
    """Weights that differ from the reference's from the first step on."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def snapshot(trainer, load):
    """The policy as it is now, in a fresh model: a deep copy would run on the live weights (TRL patches `forward`)."""
    model = load()
    if hasattr(trainer.model, "peft_config"):
        from peft import get_peft_model

        model = get_peft_model(model, trainer.model.peft_config["default"])
    model.load_state_dict({name: value.clone() for name, value in trainer.model.state_dict().items()})
    return model.eval()


def weights_of(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def logged(trainer, key):
    return [log[key] for log in trainer.state.log_history if key in log]


def distance(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def activations_by_hand(model, ids, hook_point):
    """Activation (T, D) of one row without padding, by a hook of PyTorch's own."""
    from interp_rlhf.activations import resolve

    found = []
    handle = resolve(model, hook_point).register_forward_hook(
        lambda m, a, o: found.append((o[0] if isinstance(o, tuple) else o).detach())
    )
    try:
        with torch.no_grad():
            model(input_ids=ids[None], use_cache=False)
    finally:
        handle.remove()
    return found[0][0]


def rows_by_hand(trainer, dataset, leave_out=()):
    """(ids, counted positions) of every sequence of a batch's rows, as the trainer's own loss counts them."""
    batch = trainer.data_collator([dataset[i] for i in range(len(dataset))])
    found = []
    for row in range(len(batch["input_ids"])):
        real = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row][real]
        mask = batch["labels"][row][real] != -100 if "labels" in batch else batch["completion_mask"][row][real].bool()
        mask = mask & ~torch.isin(ids, torch.tensor(sorted(leave_out), dtype=torch.long))
        found.append((ids, mask))
    return found


def log_probs_by_hand(model, ids, mask):
    """Sum of log-probs of the masked tokens of one row."""
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
    taken = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return float(taken[mask[1:]].sum())


__all__ = [name for name in globals() if not name.startswith("_")] + ["sentences"]
