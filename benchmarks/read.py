"""How fast `read()` scores texts, against the other ways of reading the same activation.

Every contestant reads the output of block 4 (counted from 0) of an 8-block Llama-shaped model with random float32 weights and
takes the same dot product. All must give the same scores to 1e-4 before anything is timed. A ratio is the other's time over
ours, so 2 means that ours is twice as fast.

  early_stop_vs_output_hidden_states   read() against model(…, output_hidden_states=True).hidden_states[5]
  early_stop_vs_backbone               read() against the same call of the backbone alone, without its LM head
  one_hook_vs_output_hidden_states     one plain forward hook, nothing stopped, against the same
  early_stop_vs_<peer>                 read() against lmprobe and TransformerLens (`pip install 'interp-rlhf[bench]'`)
  length_buckets_vs_unsorted           read() on lines of WikiText against the same reading in file order
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peers
import synthetic
import torch
from timing import Row, alternate, finish, parser, prepare, rows_of
from transformers import AutoModelForCausalLM

from interp_rlhf.activations import TokenBatch, read
from interp_rlhf.concepts.readout import Readout

VOCABULARY = 32_000
TEXTS, LENGTH = 32, 64
LINES, BATCH_TOKENS = 96, 2048
CORPUS = Path(__file__).resolve().parents[2] / "shared" / "data" / "corpus" / "wikitext2_valid.txt"


def block_of(readout: Readout) -> int:
    """The block that a readout is at, counted from 0."""
    return int(readout.hook_point.rsplit(".", 1)[1])


def ours(model: Any, batch: TokenBatch, readout: Readout) -> torch.Tensor:
    """Scores (B, T) by `read()`."""
    return read(model, batch, [readout])[readout.name].scores[..., 0]


@torch.no_grad()
def plain(model: Any, batch: TokenBatch, readout: Readout) -> torch.Tensor:
    """Scores (B, T) the way the documentation of transformers shows, LM head included."""
    output = model(batch.input_ids, batch.attention_mask.long(), output_hidden_states=True, use_cache=False)
    return readout(output.hidden_states[block_of(readout) + 1])[..., 0]


@torch.no_grad()
def without_head(model: Any, batch: TokenBatch, readout: Readout) -> torch.Tensor:
    """Scores (B, T) from the hidden states of the backbone: what a user does who knows that the LM head is not needed."""
    output = model.model(batch.input_ids, batch.attention_mask.long(), output_hidden_states=True, use_cache=False)
    return readout(output.hidden_states[block_of(readout) + 1])[..., 0]


@torch.no_grad()
def one_hook(model: Any, batch: TokenBatch, readout: Readout) -> torch.Tensor:
    """Scores (B, T) by a forward hook, LM head included."""
    scores = []
    block = model.get_submodule(readout.hook_point)
    handle = block.register_forward_hook(lambda module, inputs, output: scores.append(readout(output)[..., 0]))
    try:
        model(batch.input_ids, batch.attention_mask.long(), use_cache=False)
    finally:
        handle.remove()
    return scores[0]


def require_equal(name: str, scores: torch.Tensor, expected: torch.Tensor) -> None:
    """Stops the benchmark if a contestant gives other scores."""
    worst = float((scores - expected).abs().max())
    if not worst <= 1e-4:
        raise SystemExit(f"`{name}` differs from `read` by {worst:.2g} – expected the same scores to 1e-4.")


def equal_lengths(model: Any, readout: Readout, folder: Path, pairs: int, seed: int) -> list[Row]:
    """Rows about 32 texts of 64 tokens, all in one forward."""
    texts = synthetic.make_texts([LENGTH] * TEXTS, VOCABULARY, seed)
    batch = synthetic.batch_of([[int(word[1:]) for word in text.split()] for text in texts])
    expected = ours(model, batch, readout)
    for contestant in (plain, without_head, one_hook):
        require_equal(contestant.__name__, contestant(model, batch, readout), expected)

    def run(function: Callable[..., torch.Tensor]) -> Callable[[], torch.Tensor]:
        return lambda: function(model, batch, readout)

    samples = alternate(run(plain), run(ours), pairs, "early stop")
    rows = rows_of("early_stop_vs_output_hidden_states", samples, "≥ 1.75", "5 of 8 blocks and no LM head")
    rows += rows_of("early_stop_vs_backbone", alternate(run(without_head), run(ours), pairs, "backbone"))
    rows += rows_of("one_hook_vs_output_hidden_states", alternate(run(plain), run(one_hook), pairs, "one hook"))
    for name in peers.PEERS:
        theirs = peers.load(name, folder, block_of(readout), batch.input_ids, texts)
        if isinstance(theirs, str):
            rows.append(Row(f"early_stop_vs_{name}", [], note=theirs))
            continue
        scored = scores_of(theirs, readout)
        require_equal(name, scored(), expected)
        rows += rows_of(f"early_stop_vs_{name}", alternate(scored, run(ours), pairs, name))
    return rows


def scores_of(reader: peers.Reader, readout: Readout) -> Callable[[], torch.Tensor]:
    """A peer's activation with the same dot product behind it."""
    return lambda: readout(reader())[..., 0]


def word_ids(line: str) -> list[int]:
    """A stable id for each word. Only the number of words in a real line matters here."""
    return [zlib.crc32(word.encode()) % VOCABULARY for word in line.split()]


def file_order(rows: list[list[int]]) -> Iterator[TokenBatch]:
    """Batches in file order, each as many rows as fit the token budget when padded to its longest."""
    batch: list[list[int]] = []
    for row in rows:
        if batch and (len(batch) + 1) * max(len(row), *map(len, batch)) > BATCH_TOKENS:
            yield synthetic.batch_of(batch)
            batch = []
        batch.append(row)
    yield synthetic.batch_of(batch)


def real_lengths(model: Any, readout: Readout, pairs: int) -> list[Row]:
    """Rows about lines of WikiText.

    Both sides have the same budget of padded tokens per forward, because that bounds memory. With the same number of rows the
    unsorted side would need several times the memory for its longest batch. The unsorted side is `read` too, one call per
    batch, so that only order and padding differ.
    """
    name = "length_buckets_vs_unsorted"
    if not CORPUS.exists():
        return [Row(name, [], "≥ 1.3", f"skipped: no corpus at {CORPUS}")]
    lines = [ids for line in CORPUS.read_text(encoding="utf-8").splitlines() if (ids := word_ids(line))][:LINES]
    whole = synthetic.batch_of(lines)
    unsorted = list(file_order(lines))

    def sorted_reading() -> torch.Tensor:
        scores = read(model, whole, [readout], batch_tokens=BATCH_TOKENS)[readout.name].scores
        return scores[whole.attention_mask]

    def unsorted_reading() -> torch.Tensor:
        # The budget is the batch's own size: one forward.
        read_in_turn = [
            read(model, b, [readout], batch_tokens=b.input_ids.numel())[readout.name].scores for b in unsorted
        ]
        return torch.cat([scores[b.attention_mask] for scores, b in zip(read_in_turn, unsorted, strict=True)])

    require_equal("unsorted", unsorted_reading(), sorted_reading())
    padding = sum(b.input_ids.numel() for b in unsorted) / int(whole.attention_mask.sum())
    note = f"unsorted runs {padding:.2f} × the real tokens"
    return rows_of(name, alternate(unsorted_reading, sorted_reading, pairs, "buckets"), "≥ 1.3", note)


def main() -> None:
    made = parser(__doc__, pairs=9)
    made.set_defaults(model="random")
    arguments = made.parse_args()
    prepare(arguments)
    with synthetic.subject(arguments, VOCABULARY) as (subject, _):
        model = AutoModelForCausalLM.from_pretrained(subject.folder, dtype=torch.float32).eval()
        readout = synthetic.make_readout(model.config.hidden_size, model.config.num_hidden_layers // 2, arguments.seed)
        rows = equal_lengths(model, readout, subject.folder, arguments.pairs, arguments.seed)
    rows += real_lengths(model, readout, arguments.pairs)
    settings = {
        "model": subject.name, "block": block_of(readout), "texts": TEXTS, "length": LENGTH, "lines": LINES,
        "batch_tokens": BATCH_TOKENS, "corpus": CORPUS.name,
    }  # fmt: skip
    finish("read", rows, arguments, settings)


if __name__ == "__main__":
    main()
