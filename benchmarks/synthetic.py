"""The models that benchmarks measure: random ones of realistic size with made-up texts, the embedded one, or a folder.

In: a seed and the command line. Out: a Llama-shaped causal LM, a tokenizer whose words are its ids, and texts; or a folder of
a real model. Speed does not depend on what weights have learned, so most benchmarks take a random model by default.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from interp_rlhf.activations import TokenBatch
from interp_rlhf.concepts.readout import Readout
from interp_rlhf.embedded import MODEL_ID, default_model

BLOCKS, WIDTH, INTERMEDIATE = 8, 512, 1376
TINY = {"blocks": 3, "width": 64, "intermediate": 160}  # of `--quick`
EOS, PAD, FIRST_WORD = 0, 1, 2  # the first ids of the vocabulary; words begin after them
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@dataclass(frozen=True)
class Subject:
    """The model of a benchmark: its folder, what to call it, and whether its weights and its tokenizer are real."""

    folder: Path
    name: str
    real: bool


def add_model(parser: argparse.ArgumentParser, default: str = "random") -> None:
    parser.add_argument(
        "--model", default=default, metavar="MODEL",
        help="`random` (8 blocks of width 512), `embedded` (SmolLM2-135M-Instruct), or the folder of a causal LM with a chat "
        "template (default: %(default)s)",
    )  # fmt: skip


@contextmanager
def subject(arguments: argparse.Namespace, vocabulary: int) -> Iterator[tuple[Subject, Path]]:
    """The model that the command line asks for, and a folder to work in, which is deleted afterwards."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if arguments.quick or arguments.model == "random":
            sizes = TINY if arguments.quick else {}
            yield (
                Subject(
                    save(work / "model", vocabulary, arguments.seed, **sizes), described(vocabulary, **sizes), False
                ),
                work,
            )
        elif arguments.model == "embedded":
            yield Subject(default_model(), MODEL_ID, True), work
        else:
            folder = Path(arguments.model).expanduser()
            yield Subject(folder, str(arguments.model), True), work


def described(vocabulary: int, blocks: int = BLOCKS, width: int = WIDTH, intermediate: int = INTERMEDIATE) -> str:
    """A random model in words."""
    sizes = f"{blocks} blocks, width {width}, intermediate {intermediate}, vocabulary {vocabulary}"
    return f"Llama, {sizes}, float32, random"


def make_model(
    vocabulary: int, seed: int, blocks: int = BLOCKS, width: int = WIDTH, intermediate: int = INTERMEDIATE
) -> Any:
    """Llama-shaped, float32, random weights, in evaluation mode; heads of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=intermediate, num_hidden_layers=blocks,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD, dtype="float32",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def make_tokenizer(vocabulary: int) -> Any:
    """One word, `w17`, is one id, 17."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Special tokens are found anywhere in a text: none may be the beginning of a word.
    ids = {"<eos>": EOS, "<pad>": PAD} | {f"w{i}": i for i in range(FIRST_WORD, vocabulary)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", chat_template=TEMPLATE, padding_side="left"
    )


def make_byte_tokenizer() -> Any:
    """One byte is one token, so that it reads any text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {"<eos>": EOS, "<pad>": PAD} | {letter: FIRST_WORD + i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split(Regex("."), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", chat_template=TEMPLATE, padding_side="left"
    )


def save(folder: Path, vocabulary: int, seed: int, **sizes: int) -> Path:
    """Model and tokenizer as a folder that `from_pretrained` reads."""
    make_model(vocabulary, seed, **sizes).save_pretrained(folder)
    make_tokenizer(vocabulary).save_pretrained(folder)
    return folder


def make_texts(lengths: list[int], vocabulary: int, seed: int) -> list[str]:
    """Texts of exactly these numbers of tokens."""
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(FIRST_WORD, vocabulary)}" for _ in range(n)) for n in lengths]


def batch_of(rows: list[list[int]]) -> TokenBatch:
    """All tokens count."""
    return TokenBatch.from_ids([[]] * len(rows), rows)


def make_readout(width: int, block: int, seed: int) -> Readout:
    """A random direction at a block's output, counted from 0."""
    weight = torch.randn(width, generator=torch.Generator().manual_seed(seed)) / width**0.5
    return Readout("concept", f"model.layers.{block}", weight, bias=0.25)
