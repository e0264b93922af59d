"""Training of sparse autoencoders: what is learned, what is repeated to the bit, what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch
from tiny import make_model, make_tokenizer, sentences

from interp_rlhf.activations import read_activations
from interp_rlhf.cli import main
from interp_rlhf.runlog.log import RunLog, read_run_log
from interp_rlhf.sae import cache as cache_module
from interp_rlhf.sae.cache import CachedActivations, fill_cache
from interp_rlhf.sae.checkpoint import drop_checkpoints, load_checkpoint, save_checkpoint
from interp_rlhf.sae.files import load_sae, save_sae
from interp_rlhf.sae.held_out import evaluate, held_out
from interp_rlhf.sae.optimizing import Training
from interp_rlhf.sae.sparse import Entries, keep_largest, keep_rows
from interp_rlhf.sae.stream import ModelActivations, ShuffleBuffer, cut, load_corpus
from interp_rlhf.sae.train import train_sae
from interp_rlhf.sae.training_settings import SaeTraining

POINT = "model.layers.1"
# 60 steps of 64 activations; the texts have about 1,900 tokens that count.
SMALL = {
    "hook_point": POINT,
    "latents": 48,
    "k": 4,
    "tokens": 60 * 64,
    "batch_tokens": 64,
    "context": 16,
    "buffer": 512,
}
TEXTS = [" ".join(sentences(60, seed=seed)) for seed in range(4)]


class Rows:
    """Activations in memory as a source."""

    def __init__(self, rows, block=128):
        self.rows, self.block, self.tokens = rows, block, len(rows)

    def blocks(self, epoch, start=0):
        yield from self.rows.split(self.block)[start:]


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model("llama", tokenizer)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sparse_data(count, width=32, size=48, on=3, seed=0):
    """Sums of `on` random unit directions with weights between 1 and 2, and the directions."""
    random = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(size, width, generator=torch.Generator().manual_seed(99)))
    chosen = torch.rand(count, size, generator=random).topk(on).indices
    weights = torch.zeros(count, size).scatter_(1, chosen, 1 + torch.rand(count, on, generator=random))
    return weights @ directions, directions


def synthetic(rows, **changes):
    settings = {"latents": 96, "k": 3, "batch_tokens": 256, "context": 16, "buffer": 4096, "epochs": 30}
    return Training(Rows(rows), SaeTraining(**{"hook_point": "here", **settings, **changes}))


def run(training, steps=None):
    measured = [training.take_step() for _ in range(training.steps if steps is None else steps)]
    return {name: [float(step[name]) for step in measured] for name in measured[0]}


def weights_of(folder):
    return (folder / "sae" / "sae_weights.safetensors").read_bytes()


# --- what is learned ---


def test_sparse_gradients_are_those_of_the_dense_computation():
    random = torch.Generator().manual_seed(0)
    shape = {"encoder": (7, 5), "bias": (7,), "decoder": (7, 5), "center": (5,)}
    dense = {name: torch.randn(size, generator=random, dtype=torch.double) for name, size in shape.items()}
    activation = torch.randn(6, 5, generator=random, dtype=torch.double)
    for tensor in dense.values():
        tensor.requires_grad_()
    before = (activation - dense["center"]) @ dense["encoder"].T + dense["bias"]
    kept = before.topk(3).indices
    codes = torch.zeros(6, 7, dtype=torch.double).scatter(1, kept, before.gather(1, kept).relu())
    loss = (codes @ dense["decoder"] + dense["center"] - activation).pow(3).sum()
    wanted = torch.autograd.grad(loss, list(dense.values()))

    entries = keep_rows(kept, 7)
    centred = (activation - dense["center"]).detach()
    picked = entries.pick(before.detach(), dense["encoder"], dense["bias"], dense["center"], centred)
    found = entries.decode(picked.relu(), dense["decoder"]) + dense["center"]
    torch.testing.assert_close(found, (codes @ dense["decoder"] + dense["center"]))
    gradients = torch.autograd.grad((found - activation).pow(3).sum(), list(dense.values()))
    for name, gradient, expected in zip(shape, gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, msg=name)


def test_the_largest_of_a_batch_are_the_same_whatever_is_hinted():
    before = torch.randn(20, 9, generator=torch.Generator().manual_seed(0))
    smallest = before.flatten().sort(descending=True).values[39]
    for hint in (-9.0, float(smallest) - 0.01, float(smallest) + 0.5, 9.0):
        found = keep_largest(before, 40, hint)
        assert isinstance(found, Entries)
        assert set(zip(found.rows.tolist(), found.columns.tolist(), strict=True)) == {
            tuple(place) for place in (before >= smallest).nonzero().tolist()
        }
        assert found.rows.diff().min() >= 0  # token by token


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_a_known_dictionary_is_found_again(architecture):
    rows, directions = sparse_data(20_000)
    training = synthetic(rows, architecture=architecture, learning_rate=5e-3, epochs=10)
    fvu = run(training)["fvu"]
    assert fvu[0] > 0.3
    assert sum(fvu[-20:]) / 20 < 0.08
    learned = training.finished().decoder
    assert (directions @ learned.T).max(dim=1).values.mean() > 0.9
    torch.testing.assert_close(learned.norm(dim=1), torch.ones(96))


def test_the_exported_autoencoder_does_what_the_trained_one_did():
    """The scale is folded in: activations of norm near 1,000 with a far mean are reconstructed as they are."""
    rows = sparse_data(20_000)[0] * 300 + 500
    training = synthetic(rows, learning_rate=5e-3, epochs=5)
    measured = run(training)["fvu"]
    sae = training.finished()
    assert sae.fvu(rows) == pytest.approx(measured[-1], abs=0.02)
    assert sae.l0(rows) == pytest.approx(3, abs=0.1)
    assert sae.center is not None
    assert torch.equal(sae.center, sae.decoder_bias)


def test_the_threshold_of_batchtopk_leaves_about_k_on():
    rows, _ = sparse_data(20_000)
    training = synthetic(rows, architecture="batchtopk", learning_rate=5e-3, epochs=10)
    run(training)
    sae = training.finished()
    assert sae.spec.architecture == "jumprelu"
    assert sae.l0(sparse_data(4000, seed=5)[0]) == pytest.approx(3, rel=0.15)


def test_the_auxiliary_loss_revives_what_is_silent():
    """48 latents for 48 directions, of which 32 begin too small to be among the k largest of any token."""
    rows, _ = sparse_data(10_000)

    def trained(aux_k):
        training = synthetic(rows, latents=48, aux_k=aux_k, dead_after=2048, learning_rate=5e-3, epochs=6)
        with torch.no_grad():
            training.weights["encoder"][16:] *= 0.02
        measured = run(training)
        return measured["dead_fraction"][-1], measured["fvu"][-1]

    (without, poor), (with_it, good) = trained(0), trained(8)
    assert without > 0.5
    assert with_it < 0.1
    assert good < poor / 2


# --- the stream ---


def test_the_buffer_holds_no_more_than_it_may_and_gives_every_activation_once_per_epoch():
    source = Rows(torch.arange(1000.0)[:, None], block=60)
    buffer = ShuffleBuffer(source, size=256, batch=64, seed=0)
    given = []
    for _ in range(60):
        given += buffer.next().flatten().tolist()
        assert len(buffer) <= 256
        assert buffer._data.shape == (256, 1)
    counts = Counter(given) + Counter(buffer.held().flatten().tolist())
    # 60 · 64 = 3,840 given and what is held: whole epochs, and a part of the next one.
    assert max(counts.values()) - min(counts.values()) <= 1
    neighbours = torch.tensor(given).diff().abs()
    assert neighbours.median() > 20


def test_a_stopped_buffer_goes_on_where_it_was():
    source = Rows(torch.arange(1000.0)[:, None], block=60)
    buffer = ShuffleBuffer(source, size=256, batch=64, seed=0)
    for _ in range(7):
        buffer.next()
    tensors, position = buffer.state()
    other = ShuffleBuffer(source, size=256, batch=64, seed=4)
    other.restore({name: tensor.clone() for name, tensor in tensors.items()}, position)
    for _ in range(40):
        assert torch.equal(buffer.next(), other.next())


def test_contexts_hold_one_text_each_and_their_first_token_does_not_count(tokenizer, model):
    contexts = cut(["the warm day rain sun tree walk", "good night"], tokenizer, 5)
    ids = [tokenizer(text)["input_ids"] for text in ("the warm day rain sun tree walk", "good night")]
    batch = contexts.batch(range(len(contexts)))
    rows = [line[mask].tolist() for line, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    assert rows[0] == ids[0][:5]
    assert [token for row in rows for token in row] == ids[0] + ids[1]
    assert not batch.completion_mask[:, 0].any()
    assert contexts.tokens == int(batch.completion_mask.sum()) == len(ids[0]) + len(ids[1]) - len(rows)


def test_every_context_begins_as_the_tokenizer_begins_a_text():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", tokenizer.convert_tokens_to_ids("<|system|>"))]
    )
    contexts = cut([TEXTS[0]], tokenizer, 8)
    batch = contexts.batch(range(len(contexts)))
    assert (batch.input_ids[:, 0] == tokenizer.convert_tokens_to_ids("<|system|>")).all()
    assert batch.completion_mask[0].tolist() == [False] + [True] * 7  # the first token of the text counts
    assert contexts.tokens == int(batch.completion_mask.sum())


def test_a_cache_gives_what_the_model_gives_and_reads_once(tmp_path, model, tokenizer, monkeypatch):
    contexts = cut(TEXTS, tokenizer, 16)
    monkeypatch.setattr(cache_module, "SHARD_CONTEXTS", 40)
    fill_cache(tmp_path, model, contexts, POINT, dtype="float32")
    read = torch.cat(list(CachedActivations(tmp_path, 100, 0).in_order()))
    batch = contexts.batch(range(len(contexts)))
    wanted = read_activations(model, batch, [POINT])[POINT]
    assert len(read) == len(wanted) == contexts.tokens
    torch.testing.assert_close(read, wanted, rtol=1e-4, atol=1e-4)
    shuffled = torch.cat(list(CachedActivations(tmp_path, 100, 0).blocks(1)))
    assert not torch.equal(shuffled, read)
    torch.testing.assert_close(shuffled.sum(0), read.sum(0), rtol=1e-4, atol=1e-2)

    # What is there is not read again; what is missing is.
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    files[1].unlink()
    rows = []
    monkeypatch.setattr(
        cache_module, "in_order", lambda m, c, point, part: rows.extend(part) or in_order(m, c, point, part)
    )
    fill_cache(tmp_path, model, contexts, POINT, dtype="float32")
    assert rows == [*range(40, 80)]
    assert torch.equal(torch.cat(list(CachedActivations(tmp_path, 100, 0).in_order())), read)


in_order = cache_module.in_order


@pytest.mark.parametrize("changed", ["texts", "hook_point", "context", "model", "weights", "dtype"])
def test_a_stale_cache_is_refused(tmp_path, model, tokenizer, changed):
    contexts = cut(TEXTS, tokenizer, 16)
    fill_cache(tmp_path, model, contexts, POINT)
    given = {"model": model, "contexts": contexts, "hook_point": POINT}
    said = f"`{changed}`"
    if changed == "texts":
        given["contexts"] = cut([*TEXTS, "one more"], tokenizer, 16)
    elif changed == "context":
        given["contexts"] = cut(TEXTS, tokenizer, 18)
    elif changed == "hook_point":
        given["hook_point"] = "model.layers.0"
    elif changed == "model":
        given["model"] = make_model("llama", tokenizer, seed=1)
    elif changed == "weights":  # below the hook point, and not in a norm: the digest is the same
        given["model"] = make_model("llama", tokenizer)
        given["model"].model.layers[0].mlp.down_proj.weight.data *= 1.1
        said = "the activations of the first context differ by"
    else:
        given["dtype"] = "float32"
    with pytest.raises(ValueError, match=f"(?s)holds other activations than those asked for:\n.*{said}"):
        fill_cache(tmp_path, **given)


def test_activations_beyond_float16_are_refused_not_clipped(tmp_path, tokenizer):
    model = make_model("llama", tokenizer)
    model.model.embed_tokens.weight.data *= 1e6
    with pytest.raises(ValueError, match=r"do not fit into float16.*Keep them as float32"):
        fill_cache(tmp_path, model, cut(TEXTS, tokenizer, 16), POINT)
    assert not list(tmp_path.glob("*.safetensors"))


# --- to the bit ---


class Stop(Exception):
    pass


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_a_resumed_training_has_the_weights_of_one_that_was_not_stopped(
    tmp_path, model, tokenizer, monkeypatch, cached, architecture
):
    config = SaeTraining(**SMALL, architecture=architecture, checkpoint_every=7, dead_after=300)
    cache = {"cache": tmp_path / "cache"} if cached else {}

    def train(name, **changes):
        train_sae(model, tokenizer, TEXTS, config, tmp_path / name, progress=False, **cache, **changes)

    train("whole")
    take = Training.take_step
    for stop in (12, 33, 34):

        def stopping(self, stop=stop):
            if self.step == stop:
                raise Stop
            return take(self)

        monkeypatch.setattr(Training, "take_step", stopping)
        with pytest.raises(Stop):
            train("stopped", resume=stop != 12)
    monkeypatch.setattr(Training, "take_step", take)
    train("stopped", resume=True)
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "whole")
    assert not list((tmp_path / "stopped").glob("*checkpoint*"))
    # The log tells of one run, without what was done twice.
    steps = [
        event["step"] for event in read_run_log(tmp_path / "stopped" / "interp.jsonl") if event["event"] == "metric"
    ]
    assert steps == sorted(set(steps))


def test_the_same_seed_repeats_and_leaves_random_state_and_model_alone(tmp_path, model, tokenizer):
    state, weights = torch.get_rng_state(), {name: p.clone() for name, p in model.named_parameters()}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = SaeTraining(**{**SMALL, "tokens": 640}, seed=seed)
        train_sae(model, tokenizer, TEXTS, config, tmp_path / name, progress=False)
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b") != weights_of(tmp_path / "c")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_a_kill_between_checkpoints_loses_nothing_before_the_last_one(tmp_path, model_folder):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    command = ["sae", "train", "--model", str(model_folder("llama")), "--hook-point", POINT, "--data", str(tmp_path / "a.txt"),
               "--latents", "48", "--k", "4", "--batch-tokens", "64", "--context", "16", "--buffer", "512",
               "--checkpoint-every", "200", "--cache", str(tmp_path / "cache")]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    long = [*command, "--tokens", str(64 * 1200), "--out"]
    process = subprocess.Popen([sys.executable, "-m", "interp_rlhf", *long, str(killed)], env=environment,
                               stderr=subprocess.PIPE, cwd=Path(__file__).parent.parent)  # fmt: skip
    until = time.monotonic() + 100
    while not list(killed.glob("sae-checkpoint-*")):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "sae").exists()
    assert main([*long, str(killed), "--resume"]) == 0
    resumed = [event["step"] for event in read_run_log(killed / "interp.jsonl") if event["event"] == "run"]
    assert resumed[0] == 0
    assert resumed[1] >= 200
    assert main([*long, str(whole)]) == 0
    assert weights_of(killed) == weights_of(whole)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path, model, tokenizer, monkeypatch):
    config = SaeTraining(**SMALL, checkpoint_every=5)
    take = Training.take_step
    monkeypatch.setattr(
        Training, "take_step", lambda self: take(self) if self.step < 8 else (_ for _ in ()).throw(Stop)
    )
    with pytest.raises(Stop):
        train_sae(model, tokenizer, TEXTS, config, tmp_path, progress=False)
    other = SaeTraining(**{**SMALL, "learning_rate": 1.0}, checkpoint_every=6)
    with pytest.raises(ValueError, match=r"other settings:\n  - `learning_rate` was 0\.003 – now 1\.0\nGive"):
        train_sae(model, tokenizer, TEXTS, other, tmp_path, resume=True, progress=False)


def test_what_others_left_in_a_folder_is_neither_trained_into_nor_deleted(tmp_path, model, tokenizer):
    """A trainer's `checkpoint-5` in a folder without a log of ours, and one that has the name of ours."""
    theirs = tmp_path / "checkpoint-5" / "model.safetensors"
    theirs.parent.mkdir()
    theirs.write_text("weights")
    config = SaeTraining(**{**SMALL, "tokens": 640}, checkpoint_every=2)
    with pytest.raises(ValueError, match=r"holds `checkpoint-5` – expected an empty folder\. Name another one"):
        train_sae(model, tokenizer, TEXTS, config, tmp_path, progress=False)
    (tmp_path / "sae-checkpoint-1").mkdir()
    kept = tmp_path / "sae-checkpoint-1" / "notes.txt"
    kept.write_text("mine")
    for step in (2, 4):
        save_checkpoint(tmp_path, step, {"a": torch.ones(1) * step}, {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "sae-checkpoint-1", "sae-checkpoint-4"]
    drop_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "sae-checkpoint-1"]
    assert (theirs.read_text(), kept.read_text()) == ("weights", "mine")


def test_the_log_of_another_run_is_not_resumed(tmp_path, model, tokenizer):
    RunLog(tmp_path / "interp.jsonl").append("run", step=0, title="Warmth", trainer="DPOTrainer")
    before = (tmp_path / "interp.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"is the log of \['DPOTrainer'\] – expected that of `train_sae`"):
        train_sae(model, tokenizer, TEXTS, SaeTraining(**SMALL), tmp_path, resume=True, progress=False)
    assert (tmp_path / "interp.jsonl").read_bytes() == before


@pytest.mark.parametrize("inside", ["cache", "deep/cache", "."])
def test_a_new_folder_may_have_the_cache_and_hidden_files(tmp_path, model, tokenizer, inside):
    out = tmp_path / "out"
    fill_cache(out / inside, model, cut(TEXTS, tokenizer, 16), POINT)
    (out / ".gitignore").write_text("*")
    config = SaeTraining(**{**SMALL, "tokens": 640})
    train_sae(model, tokenizer, TEXTS, config, out, cache=out / inside, progress=False)
    assert (out / ".gitignore").exists()
    with pytest.raises(ValueError, match="is where the autoencoder goes"):
        train_sae(model, tokenizer, TEXTS, config, tmp_path / "b", cache=tmp_path / "b" / "sae", progress=False)


def test_a_training_that_is_done_is_loaded_for_its_own_settings_only(tmp_path, model, tokenizer):
    config = SaeTraining(**{**SMALL, "tokens": 640})

    def train(texts=TEXTS, **changes):
        other = SaeTraining(**{**SMALL, "tokens": 640, **changes})
        return train_sae(model, tokenizer, texts, other, tmp_path, resume=True, progress=False)

    done = train_sae(model, tokenizer, TEXTS, config, tmp_path, progress=False)
    assert torch.equal(train(checkpoint_every=3).encoder, done.encoder)
    with pytest.raises(ValueError, match=r"other settings:\n  - `k` was 4 – now 5\n  - `seed` was 0 – now 7\nGive"):
        train(k=5, seed=7)
    with pytest.raises(ValueError, match=r"other settings:\n  - `texts` was 'sha256:"):
        train(TEXTS[:3])
    shutil.rmtree(tmp_path / "sae")
    done.spec.source.clear()
    save_sae(done, tmp_path / "sae")
    with pytest.raises(ValueError, match="does not say how it was trained"):
        train()


def test_a_cut_checkpoint_is_named_with_where_the_training_goes_on(tmp_path):
    (older, newer) = tmp_path / "sae-checkpoint-3", tmp_path / "sae-checkpoint-20"
    save_checkpoint(tmp_path, 3, {"a": torch.zeros(100)}, {"step": 3})
    shutil.copytree(older, tmp_path / "kept")
    save_checkpoint(tmp_path, 20, {"a": torch.zeros(100)}, {"step": 20})
    (tmp_path / "kept").rename(older)
    tensors, state = newer / "tensors.safetensors", newer / "state.json"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:200])
    said = r"Delete `.*sae-checkpoint-20`: the training then goes on from `sae-checkpoint-3`"
    with pytest.raises(ValueError, match=r"tensors.safetensors` is not a whole safetensors file .*" + said):
        load_checkpoint(tmp_path)
    tensors.write_bytes(whole)
    for text, problem in (('{"step": ', "is not JSON"), ("{}", r"lacks the keys \['step'\]"), ("[]", "holds a list")):
        state.write_text(text)
        with pytest.raises(ValueError, match=r"state.json` " + problem + ".*" + said):
            load_checkpoint(tmp_path, ["step"])
    state.unlink()
    with pytest.raises(ValueError, match=r"sae-checkpoint-20` has no `state.json` .*" + said):
        load_checkpoint(tmp_path)
    shutil.rmtree(newer)
    found = load_checkpoint(tmp_path, ["step"])
    assert found is not None
    assert found[1] == {"step": 3}
    state = older / "state.json"
    state.write_text("")
    with pytest.raises(ValueError, match="the training then goes on from its start"):
        load_checkpoint(tmp_path)


def test_a_cut_file_of_a_cache_is_named_and_read_anew_where_it_is_deleted(tmp_path, model, tokenizer, monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_CONTEXTS", 40)
    contexts = cut(TEXTS, tokenizer, 16)
    fill_cache(tmp_path, model, contexts, POINT)
    shard = tmp_path / "activations-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    fill_cache(tmp_path, model, contexts, POINT)
    with pytest.raises(ValueError, match=r"activations-00001.safetensors` .* is not a whole safetensors.*Delete it"):
        CachedActivations(tmp_path, 64, 0)
    shard.unlink()
    fill_cache(tmp_path, model, contexts, POINT)
    assert shard.read_bytes() == whole
    (tmp_path / "cache.json").write_text('{"format"')
    with pytest.raises(ValueError, match=r"cache.json` does not say what the cache holds .*Delete"):
        fill_cache(tmp_path, model, contexts, POINT)


def test_a_damaged_compressed_file_is_named(tmp_path):
    """Bytes of the compressed stream, of the zip's version and of its flags: each has an error of its own."""
    path = tmp_path / "params.npz"
    numpy.savez_compressed(path, W_enc=numpy.random.default_rng(0).normal(size=(8, 12)), b_enc=numpy.zeros(12))
    whole = path.read_bytes()
    name = len("W_enc.npy") + whole.index(b"W_enc.npy")
    directory = whole.index(b"PK\x01\x02")
    for place in (*range(name, name + 60), directory + 6, directory + 8):
        for flipped in (0x01, 0xFF):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flipped]) + whole[place + 1 :])
            with contextlib.suppress(ValueError):
                load_sae(path, hook_point=POINT)
                pytest.fail("read as if it were whole")
    path.write_bytes(whole[: name + 30] + bytes(40) + whole[name + 70 :])
    with pytest.raises(ValueError, match=r"params.npz` .* is not a whole npz file .*copy or fetch it again"):
        load_sae(path, hook_point=POINT)


def test_norm_outliers_do_not_count_where_a_small_corpus_is_cached(tmp_path, model, tokenizer, monkeypatch):
    """Every fifth activation is an outlier here: of the cache's tokens, 4/5, blocks and batches are made."""
    monkeypatch.setattr("interp_rlhf.sae.stream.norm_outliers", lambda rows: torch.arange(len(rows)) % 5 == 0)
    contexts = cut(TEXTS, tokenizer, 16)
    config = SaeTraining(**{**SMALL, "tokens": 640, "buffer": 4096})
    assert contexts.tokens < config.buffer  # the buffer is as large as the corpus
    train_sae(model, tokenizer, contexts, config, tmp_path / "a", cache=tmp_path / "cache", progress=False)
    count = cache_module.cached_tokens(tmp_path / "cache")
    assert count == pytest.approx(0.8 * contexts.tokens, rel=0.02)
    large = SaeTraining(**{**SMALL, "batch_tokens": contexts.tokens // 2, "buffer": 4096})
    with pytest.raises(
        ValueError, match=f"have {count} tokens that count and are no norm outliers – expected at least"
    ):
        train_sae(model, tokenizer, contexts, large, tmp_path / "b", cache=tmp_path / "cache", progress=False)


# --- what is refused ---


def test_settings_that_cannot_work_are_named_together():
    with pytest.raises(ValueError, match="4 problem") as raised:
        SaeTraining("model.layers.1", latents=8, k=9, epochs=1, tokens=5, buffer=100)
    for part in ("`k` is 9 – expected 1 to 8", "expected one of them", "expected at least 512", "at least 4096"):
        assert part in str(raised.value)


def test_what_cannot_be_trained_is_refused_before_any_work(tmp_path, model, tokenizer, monkeypatch):
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    config = SaeTraining(**SMALL)

    def train(texts=TEXTS, config=config, **changes):
        train_sae(model, tokenizer, texts, config, tmp_path / "out", progress=False, **changes)

    with pytest.raises(ValueError, match=r"expected a module path.*Nearest: `model.layers.1`"):
        train(config=SaeTraining(**{**SMALL, "hook_point": "model.layer.1"}))
    for texts in ([], ["", ""]):
        with pytest.raises(ValueError, match="without a token that counts"):
            train(texts)
    with pytest.raises(ValueError, match="tokens that count – expected at least 128: two batches of 64"):
        train([sentences(1)[0]])
    with pytest.raises(ValueError, match="holds no training – expected one to resume"):
        train(resume=True)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out" / "sae").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds a training – expected an empty folder"):
        train()


def test_a_corpus_is_texts_and_nothing_else(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"text": "four"}\n')
    assert load_corpus([tmp_path / "a.txt", tmp_path / "b.jsonl"]) == ["one\ntwo\n", "three", "four"]
    (tmp_path / "c.jsonl").write_text('{"body": "three"}\n')
    with pytest.raises(ValueError, match=r"Row 0 of .*c.jsonl` has the keys \['body'\] – expected `text`"):
        load_corpus([tmp_path / "c.jsonl"])
    (tmp_path / "d.txt").write_text(" \n")
    with pytest.raises(ValueError, match="expected text, and there is none"):
        load_corpus([tmp_path / "d.txt"])
    with pytest.raises(FileNotFoundError, match=r"missing\.txt` does not exist"):
        load_corpus([tmp_path / "missing.txt"])


# --- held out ---


def test_held_out_figures_are_those_of_their_definitions():
    rows, _ = sparse_data(3000, seed=3)
    rows = rows + torch.linspace(-1, 1, 32)
    training = synthetic(rows, epochs=3, learning_rate=5e-3)
    run(training)
    sae = training.finished()
    found = held_out(sae, lambda: rows.split(700), 5)
    assert found.explained_variance == pytest.approx(1 - sae.fvu(rows), abs=1e-6)
    assert found.l0 == pytest.approx(sae.l0(rows))
    assert found.dead_fraction == pytest.approx(float((~(sae.encode(rows) > 0).any(0)).double().mean()))
    centred = (rows - rows.mean(0)).double()
    values = torch.linalg.svdvals(centred).pow(2)
    assert found.pca_here == pytest.approx(float(values[:5].sum() / values.sum()), abs=1e-6)
    missed = (rows - sae(rows)).double().pow(2).sum(1) / centred.pow(2).sum(1)
    assert found.explained_variance_per_token == pytest.approx(1 - float(missed.mean()), abs=1e-5)


def test_the_command_trains_evaluates_and_writes_it_all_down(tmp_path, model_folder, capsys):
    for name, texts in (("a", TEXTS[:3]), ("b", TEXTS[3:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts))
    out = tmp_path / "sae"
    command = ["sae", "train", "--model", str(model_folder("llama")), "--hook-point", POINT, "--data", str(tmp_path / "a.txt"),
               "--eval", str(tmp_path / "b.txt"), "--k", "4", "--epochs", "30", "--batch-tokens", "64", "--context", "16",
               "--buffer", "512", "--cache", str(tmp_path / "cache"), "--out", str(out), "--json"]  # fmt: skip
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads((out / "training.json").read_text())
    assert found["training"]["latents"] == 128  # four times the width
    assert found["training"]["epochs"] == 30
    assert found["eval"]["explained_variance"] > 0.3
    assert found["eval"]["l0"] == pytest.approx(4, abs=0.05)
    assert 0 < found["eval"]["pca"] <= found["eval"]["pca_here"] < 1
    assert found["versions"]["torch"] == torch.__version__
    sae = load_sae(str(out / "sae"))
    assert (sae.spec.architecture, sae.spec.k, sae.size, sae.spec.hook_point) == ("topk", 4, 128, POINT)
    assert sae.spec.source["metadata"]["training"]["seed"] == 0
    assert main(command) == 2
    assert "holds a training" in capsys.readouterr().err
    # Once more on what is done: nothing is trained, the evaluation is there again.
    assert main([*command, "--resume"]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["eval"] == found["eval"]


def test_pca_of_the_training_text_is_told_where_the_cache_has_all_of_it(tmp_path, model, tokenizer, monkeypatch):
    config = SaeTraining(**{**SMALL, "tokens": 640})
    contexts, other = cut(TEXTS[:3], tokenizer, 16), cut(TEXTS[3:], tokenizer, 16)
    cache, new = tmp_path / "cache", tmp_path / "new"
    monkeypatch.setattr(cache_module, "SHARD_CONTEXTS", 40)
    sae = train_sae(model, tokenizer, contexts, config, tmp_path / "out", cache=cache, progress=False)

    def found(folder):
        return evaluate(sae, model, other, 4, cache=folder, progress=False)

    assert found(cache).pca is not None
    assert found(new).pca is None
    # What the evaluation left there is no obstacle to a training, and the other text's activations are not the training's.
    fill_cache(new, model, contexts, POINT)
    assert found(new) == found(cache)
    fill_cache(tmp_path / "others", model, other, POINT)
    assert found(tmp_path / "others").pca is None
    (cache / "activations-00001.safetensors").unlink()
    assert found(cache).pca is None
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds files and no `cache\.json`"):
        found(tmp_path / "mine")
    with pytest.raises(ValueError, match="is the one that is trained on, token by token"):
        evaluate(sae, model, contexts, 4, progress=False)


def test_resuming_what_is_done_keeps_what_was_measured(tmp_path, model_folder, capsys):
    for name, text in (("a", TEXTS[0]), ("b", TEXTS[1]), ("c", TEXTS[2])):
        (tmp_path / f"{name}.txt").write_text(text)
    out = tmp_path / "out"

    def train(*more, code=0, data="a"):
        command = ["sae", "train", "--model", str(model_folder("llama")), "--hook-point", POINT, "--k", "4", "--tokens", "640",
                   "--batch-tokens", "64", "--context", "16", "--buffer", "512", "--out", str(out), "--json"]  # fmt: skip
        assert main([*command, "--data", str(tmp_path / f"{data}.txt"), *more]) == code
        return capsys.readouterr().err if code else json.loads((out / "training.json").read_text())

    # What must not be evaluated on, and a number of latents that cannot be, before anything is trained.
    (tmp_path / "ab.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (TEXTS[1], TEXTS[0])))
    for name in ("a.txt", "ab.jsonl"):
        assert "texts to evaluate on are trained on" in train("--eval", str(tmp_path / name), code=2)
    assert "`latents` is 0 – expected at least 1" in train("--latents", "0", code=2)
    assert not out.exists()

    first = train("--eval", str(tmp_path / "b.txt"))
    assert first["eval"]["data"] == [str(tmp_path / "b.txt")]
    assert train("--resume") == first
    assert "`texts` was" in train("--resume", code=2, data="c")
    again = train("--resume", "--eval", str(tmp_path / "c.txt"), "--cache", str(tmp_path / "new"))
    assert again["eval"]["data"] == [str(tmp_path / "c.txt")]
    assert again["eval"]["pca"] is None
    changed = {key for key in first if first[key] != again[key]}
    assert changed - {"seconds"} == {"eval"}  # on a fast machine seconds may be the same
    assert again["seconds"]["training"] == first["seconds"]["training"]
    (out / "training.json").write_text("{")
    assert "training.json` is not JSON" in train("--resume", code=2)


def test_the_model_reads_another_order_in_each_epoch(model, tokenizer):
    source = ModelActivations(model, cut(TEXTS, tokenizer, 16), POINT, 64, seed=0)
    first, second = (next(source.blocks(epoch)) for epoch in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(next(source.blocks(0)), first)
    skipped = next(source.blocks(0, 2))
    assert torch.equal(list(source.blocks(0))[2], skipped)
