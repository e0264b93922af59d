"""What a concept reward costs inside a real `trl.GRPOTrainer`.

LoRA (r = 16 on the query and value projections), learning rate 0, 16 completions of exactly 32 tokens per step, prompts of
different lengths, one linear readout at the middle block, read on the frozen reference. The model is an 8-block Llama of width
512 with random weights, or what `--model` says.

  reward_share                     β > 0: CPU time in this package's code over the whole step's (one value per step)
  own_forwards                     β > 0: readings that needed a forward pass of our own, a count
  check_share                      β > 0: one rollout in 50 reads two rows again as a check; its CPU time over that of 50 steps
                                   (one value per step)
  wall_vs_constant_reward          β > 0: a step with a concept reward over a step with a constant reward, by the clock
  cpu_vs_constant_reward           the same by CPU time
  beta0_reading_vs_forward_share   β = 0: one `read()` of the batch over (blocks read / all blocks) of a no-grad forward of TRL's
  beta0_reading_vs_backbone_share  the same over the backbone's part of that forward, without the LM head
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import synthetic
import torch
from datasets import Dataset
from ledger import THEIRS, Ledger, keeping
from peft import LoraConfig
from steps import StepClock, timed_step
from timing import Row, alternate, finish, parser, prepare
from transformers import AutoConfig, AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from interp_rlhf import ConceptReward, attach
from interp_rlhf.activations import TokenBatch, backbone, read, reference_pass
from interp_rlhf.concepts.readout import Readout
from interp_rlhf.training import rollout as rollout_module

VOCABULARY = 16_384
COMPLETIONS, GENERATIONS, TOKENS = 16, 8, 32
BETA, RANK = 0.02, 16
QUESTION = "Please tell me in your own words about the {} of a small town by the sea"
TOPICS = ["history", "food", "weather", "people", "music", "schools", "harbour", "markets", "winters", "gardens"]

Make = Callable[[Any, float], GRPOTrainer]  # a reward function and beta to a trainer


def constant_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


def prompts(tokenizer: Any, real: bool, seed: int) -> Dataset:
    """Conversations whose prompts differ in length, so that TRL pads them."""
    if real:
        texts = [QUESTION.format(", and the ".join(TOPICS[: 1 + i % len(TOPICS)])) + "?" for i in range(24)]
    else:
        texts = synthetic.make_texts([16 + i for i in range(24)], VOCABULARY, seed)
    return Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in texts])


def make_trainer(folder: Path, output: str, reward: Any, beta: float, real: bool, seed: int) -> GRPOTrainer:
    """A GRPO trainer whose every step has the same shape."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    arguments = GRPOConfig(
        output_dir=output, per_device_train_batch_size=COMPLETIONS, num_generations=GENERATIONS,
        max_completion_length=TOKENS, generation_kwargs={"min_new_tokens": TOKENS}, beta=beta, learning_rate=0.0,
        max_steps=1, logging_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, seed=seed, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    lora = LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    data = prompts(tokenizer, real, seed)
    trainer = GRPOTrainer(
        str(folder), reward, args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=lora
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def middle_readout(folder: Path, seed: int) -> tuple[Readout, float]:
    """A readout at the middle block, and the share of all blocks that reading it takes."""
    config = AutoConfig.from_pretrained(folder)
    block = config.num_hidden_layers // 2
    return synthetic.make_readout(config.hidden_size, block, seed), (block + 1) / config.num_hidden_layers


def share_rows(make: Make, readout: Readout, steps: int) -> tuple[list[Row], dict[str, float]]:
    """Our share of each step's CPU time, and milliseconds per step by entry point."""
    ledger = Ledger()
    marks: list[Counter[str]] = []
    with keeping(ledger):
        trainer = make(ConceptReward(readout), BETA)
        rollout = attach(trainer).rollout
        assert rollout is not None
        trainer.add_callback(StepClock(lambda: marks.append(ledger.snapshot())))
        trainer.args.max_steps = steps + 1
        trainer.train()
    spent = [after - before for before, after in itertools.pairwise(marks[1:])]  # the first step warms up
    assert len(spent) == steps, f"{len(spent)} steps were timed instead of {steps}"
    shares = [1 - step[THEIRS] / step.total() for step in spent]
    millis = {owner: 1000 * sum(step[owner] for step in spent) / steps for owner in ledger.seconds}
    rows = [
        Row("reward_share", shares, "≤ 0.02", f"{sum(millis.values()) - millis[THEIRS]:.1f} ms of a step"),
        Row("own_forwards", [float(rollout.own_forwards)], "0", f"{rollout.taken} readings taken from TRL's passes"),
    ]
    return rows, millis


def check_rows(make: Make, readout: Readout, steps: int) -> list[Row]:
    """Cost of the check that TRL's pass gives the activations that `read()` gives: it reads two rows again."""
    trainer = make(ConceptReward(readout), BETA)
    rollout = attach(trainer).rollout
    assert rollout is not None
    checks: list[float] = []
    marks: list[float] = []
    check = rollout.check

    def timed(*arguments: Any) -> None:
        started = time.process_time()
        check(*arguments)
        checks.append(time.process_time() - started)

    rollout.check = timed  # type: ignore[method-assign]
    trainer.add_callback(StepClock(lambda: marks.append(time.process_time())))
    trainer.args.max_steps = steps + 2
    every, rollout_module.EVERY = rollout_module.EVERY, 1  # at every step, to time it
    try:
        trainer.train()
    finally:
        rollout_module.EVERY = every
    assert len(checks) == steps + 2
    spent = [after - before for before, after in itertools.pairwise(marks)][-steps:]
    values = [checked / (every * (step - checked)) for checked, step in zip(checks[-steps:], spent, strict=True)]
    return [
        Row(
            "check_share", values, "≤ 0.005", f"{1000 * sum(checks[-steps:]) / steps:.0f} ms, once in {every} rollouts"
        )
    ]


def constant_rows(make: Make, readout: Readout, pairs: int, seed: int) -> list[Row]:
    """Steps with a concept reward over steps with a constant one: two trainers that share nothing, step by step."""
    plain, ours = make(constant_reward, BETA), make(ConceptReward(readout), BETA)
    attach(ours)

    def seeded(trainer: GRPOTrainer) -> Callable[[], GRPOTrainer]:
        draws = itertools.count(seed)

        def run() -> GRPOTrainer:
            torch.manual_seed(next(draws))  # both sides of a pair sample the same completions
            return trainer

        return run

    samples = alternate(seeded(ours), seeded(plain), pairs, "constant reward", timed=timed_step)
    return [
        Row("wall_vs_constant_reward", [a.wall / b.wall for a, b in samples]),
        Row("cpu_vs_constant_reward", [a.cpu / b.cpu for a, b in samples]),
    ]


@contextlib.contextmanager
def noting_forwards(trainer: GRPOTrainer) -> Iterator[list[tuple[torch.Tensor, torch.Tensor, int]]]:
    """What TRL passes to its log-prob forwards: (input ids, attention mask, completion tokens)."""
    noted: list[tuple[torch.Tensor, torch.Tensor, int]] = []
    forward = trainer._get_per_token_logps_and_entropies

    def note(model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: int, *args: Any, **kwargs: Any) -> Any:
        noted.append((input_ids, attention_mask, logits_to_keep))
        return forward(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

    trainer._get_per_token_logps_and_entropies = note
    try:
        yield noted
    finally:
        del trainer._get_per_token_logps_and_entropies


def beta0_rows(make: Make, readout: Readout, share: float, pairs: int) -> list[Row]:
    """Reading a batch that TRL made, against TRL's scoring of the same batch. Adapters are off on both sides."""
    trainer = make(constant_reward, 0.0)
    with noting_forwards(trainer) as noted:
        trainer.train()
    input_ids, attention_mask, kept = noted[0]
    counted = attention_mask.bool() & (torch.arange(input_ids.shape[1]) >= input_ids.shape[1] - kept)
    batch = TokenBatch(input_ids, attention_mask, counted)

    def reading() -> None:
        with reference_pass(trainer.model) as model:
            read(model, batch, [readout])

    def forward() -> None:
        with torch.no_grad(), reference_pass(trainer.model) as model:
            trainer._get_per_token_logps_and_entropies(model, input_ids, attention_mask, kept)

    def without_head() -> None:
        with torch.no_grad(), reference_pass(trainer.model) as model:
            backbone(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)

    note = f"reads {share:.0%} of the blocks; {float(attention_mask.float().mean()):.0%} of the batch is tokens"
    rows = []
    for name, other, target in (("forward", forward, "≤ 1.15"), ("backbone", without_head, "")):
        values = [a.cpu / (share * b.cpu) for a, b in alternate(reading, other, pairs, f"beta 0, {name}")]
        rows.append(Row(f"beta0_reading_vs_{name}_share", values, target, note))
        note = ""
    return rows


def main() -> None:
    made = parser(__doc__, pairs=7)
    synthetic.add_model(made)
    arguments = made.parse_args()
    prepare(arguments)
    seed, pairs = arguments.seed, arguments.pairs
    with synthetic.subject(arguments, VOCABULARY) as (subject, work):
        readout, share = middle_readout(subject.folder, seed)

        def make(reward: Any, beta: float) -> GRPOTrainer:
            output = str(work / str(time.monotonic_ns()))
            return make_trainer(subject.folder, output, reward, beta, subject.real, seed)

        rows, millis = share_rows(make, readout, pairs)
        rows += check_rows(make, readout, pairs)
        rows += constant_rows(make, readout, pairs, seed)
        rows += beta0_rows(make, readout, share, pairs)
    print("\nms per step by owner:", ", ".join(f"{owner} {ms:.2f}" for owner, ms in sorted(millis.items())))
    settings = {
        "model": subject.name, "lora_rank": RANK, "beta": BETA, "learning_rate": 0.0, "completions_per_step": COMPLETIONS,
        "completion_tokens": TOKENS, "ms_per_step_by_owner": millis,
    }  # fmt: skip
    finish("reward", rows, arguments, settings)


if __name__ == "__main__":
    main()
