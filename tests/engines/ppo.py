"""PPO on one engine: four steps on a tiny model, with everything that has to be the same on every engine written to a file.

    accelerate launch --config_file recipes/accelerate_configs/cpu_zero3.yaml tests/engines/ppo.py MODEL OUT full lora_model

`tests/test_ppo.py` starts it on each engine and compares. Completions are given, so that every rank scores what one process does.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import conftest  # noqa: E402, F401, the environment of all tests
import torch  # noqa: E402
from cpu_engines import allow_fsdp_on_cpu, partition_small_weights  # noqa: E402
from datasets import Dataset  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from training import lora_config, rows_of  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

COMPLETIONS = [
    [7, 8, 9, 0], [10, 11, 12, 13, 14, 15], [16, 0], [17, 18, 19], [20, 21], [22, 23, 0], [24, 25, 26, 27], [28, 29, 30, 31, 0],
]  # fmt: skip


def by_token(completion_ids, **kwargs):
    return [[0.1 * (token % 7) for token in ids] for ids in completion_ids]


def by_length(completion_ids, **kwargs):
    return [float(len(ids) % 3) if len(ids) != 4 else None for ids in completion_ids]


def make(model: str, out: Path, lora: bool, critic: str):
    from interp_rlhf import PPOConfig, PPOTrainer

    size = len(COMPLETIONS) // int(os.environ.get("WORLD_SIZE", "1"))
    args = PPOConfig(
        str(out / "run"), per_device_train_batch_size=size, max_steps=4, learning_rate=0.1, logging_steps=1, use_cpu=True,
        bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, seed=3, max_completion_length=6, num_ppo_epochs=2,
        optim="sgd", lr_scheduler_type="constant", normalize_rewards=True, model_init_kwargs={"dtype": "float32"}, critic=critic,
    )  # fmt: skip
    trainer = PPOTrainer(
        model, [by_token, by_length], args, Dataset.from_list(rows_of("GRPO", len(COMPLETIONS))),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"), peft_config=lora_config() if lora else None,
    )  # fmt: skip
    first = trainer.accelerator.process_index * size

    def generate(prompt_ids, *more, **kwargs):
        return [list(COMPLETIONS[first + i]) for i in range(len(prompt_ids))], None

    trainer._generate_single_turn = generate
    return trainer


def randomize(trainer) -> None:
    """A value head and adapters that say something from the first step on; ZeRO-3 holds them in pieces already."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if ("value_head" not in name or "trunk" in name) and "lora_" not in name:
            continue
        whole = nullcontext()
        if hasattr(parameter, "ds_id"):
            import deepspeed

            whole = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
        with whole, torch.no_grad():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def train(model: str, out: Path, kind: str) -> None:
    """One run, its weights and results in a folder."""
    out.mkdir(exist_ok=True)
    trainer = make(model, out, "lora" in kind, "model" if "model" in kind else "head")
    randomize(trainer)
    trainer.train()
    accelerator = trainer.accelerator
    weights = accelerator.get_state_dict(trainer.deepspeed if trainer.is_deepspeed_enabled else trainer.model)
    trainer.save_model(str(out / "bare"))
    if trainer.is_world_process_zero():
        save_file({n: w.detach().cpu().float().clone() for n, w in weights.items()}, out / "weights.safetensors")
        result = {
            "engine": accelerator.distributed_type.value, "processes": accelerator.num_processes,
            "model": type(trainer.model_wrapped).__name__, "history": trainer.state.log_history,
            "exported": sorted(key for file in (out / "bare").glob("*.safetensors") for key in load_file(file)),
        }  # fmt: skip
        (out / "result.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def main(model: str, out: Path, kinds: list[str]) -> None:
    allow_fsdp_on_cpu()
    partition_small_weights()
    torch.set_num_threads(1)
    for kind in kinds:
        train(model, out / kind, kind)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
