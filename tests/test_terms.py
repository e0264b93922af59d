"""The contract of every registered term, a user's own included: what holds for one holds for all.

A term whose only field without a default is `readout` or `hook_point` is tested without a line here. Another one gets a line in
`FIELDS` (objects) and in `OPTIONS` (the same as a recipe writes them; `"card": None` if it takes no card).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from tiny import make_card, make_readout
from training import distance, logged, make_trainer, perturb, rows_of, weights_of

from interp_rlhf import DriftConfig, Latents, Subspace, attach, register_term
from interp_rlhf.drift.callback import DriftCallback
from interp_rlhf.drift.verdicts import evidence_of
from interp_rlhf.runlog.events import DriftEvent
from interp_rlhf.runlog.log import read_events
from interp_rlhf.training.make import make_regularizer
from interp_rlhf.training.terms.registry import TERMS
from interp_rlhf.training.terms.term import LossTerm, OneConcept, TermValues

LAYER, EMBEDDING = "model.layers.1", "model.embed_tokens"


@register_term("score_in_tests")
@dataclass(frozen=True, eq=False, kw_only=True)
class ScoreInTests(OneConcept, LossTerm):
    """A user's own term: what the documentation says is all that it takes."""

    def compute(self, batch, weight):
        tokens = batch.tokens(self.include_end_of_turn)
        scores = tokens.means(self.readout(batch.policy(self.policy_point, tokens))[:, 0])
        return TermValues(weight * scores.relu(), {"score": scores})

    def pushes(self):
        return {self.readout: -1}


def latents(point):
    random = torch.Generator().manual_seed(5)
    return Latents("latents", point, torch.randn(24, 32, generator=random) / 4, torch.zeros(24))


# Fields that a term needs besides `readout`, or in its place: objects, made for a hook point.
FIELDS = {
    "drift_penalty": lambda point: {"subspace": Subspace(point, torch.eye(32)[:2])},
    "concept_penalty": lambda point: {"allow_differentiable_probe": True},
    "feature_constraint": lambda point: {"readout": latents(point), "k": 4},
}
# The same options, as a recipe writes them.
OPTIONS = {
    "drift_penalty": {"hook_point": LAYER, "card": None},
    "concept_penalty": {"allow_differentiable_probe": True},
}


def needs_hook_point(kind):
    """True if a term has no readout and says its hook point itself."""
    return any(
        field.name == "hook_point" and field.default is dataclasses.MISSING
        for field in dataclasses.fields(TERMS[kind])
    )


def make_term(kind, model, weight=0.5, point=LAYER, **fields):
    """A term of a kind on a tiny model."""
    known = {field.name for field in dataclasses.fields(TERMS[kind])}
    readout = {"readout": dataclasses.replace(make_readout(model), hook_point=point)} if "readout" in known else {}
    usual = readout or ({"hook_point": point} if needs_hook_point(kind) else {})
    return TERMS[kind](
        weight=weight, **{"name": "term", **usual, **FIELDS.get(kind, lambda point: {})(point), **fields}
    )


def attached(trainer, kind, start=None, **asked):
    """`attach` with one term, and a monitor with another artifact."""
    holdout = make_readout(trainer.model, "holdout", layer=2, seed=7)
    reference = {"reference": start} if start is not None else {}
    terms = [make_term(kind, trainer.model, **asked.pop("fields", {}))]
    return attach(trainer, regularizers=terms, monitors=[holdout], **reference, **asked)


def build(kind, load, tokenizer, folder, **changes):
    """A trainer whose policy has moved, and what SFT needs as its reference."""
    trainer = make_trainer(kind, perturb(load()), tokenizer, folder, **changes)
    return trainer, load() if kind == "SFT" else None


def metrics_of(trainer, kind, only_own_tokens=False):
    """What a term logged at the first step; without what depends on TRL's log-probs, if asked."""
    log = trainer.state.log_history[0]
    metrics = {key: log[key] for key in log if key.startswith("interp/term/")}
    if only_own_tokens and TERMS[kind].per_pair:
        metrics = {key: value for key, value in metrics.items() if "rewards" not in key and "loss" not in key}
    assert any(abs(value) > 1e-6 for key, value in metrics.items() if not key.endswith("weight"))
    return metrics


def same(metrics):
    first, *others = metrics
    for other in others:
        assert other.keys() == first.keys()
        for key, value in first.items():
            assert other[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


TERMS_IN_TRAINERS = [(kind, trainer) for kind in TERMS for trainer in TERMS[kind].trainers]
# One trainer whose batches hold pairs, one that packs, one with rollouts; `test_loss_terms` has all of them.
ON_ROWS = [(kind, trainer) for kind, trainer in TERMS_IN_TRAINERS if trainer in ("DPO", "SFT")]
IN_STEPS = [(kind, trainer) for kind, trainer in TERMS_IN_TRAINERS if trainer in ("DPO", "GRPO")]


@pytest.fixture(scope="module")
def plain_runs():
    return {}


@pytest.mark.parametrize(("kind", "trainer_kind"), TERMS_IN_TRAINERS)
def test_a_weight_of_zero_is_plain_trl_bit_for_bit(kind, trainer_kind, load, tokenizer, tmp_path, plain_runs):
    if trainer_kind not in plain_runs:
        plain, _ = build(trainer_kind, load, tokenizer, tmp_path / "plain")
        plain.train()
        plain_runs[trainer_kind] = weights_of(plain), logged(plain, "loss"), logged(plain, "grad_norm")
    weights, *logs = plain_runs[trainer_kind]
    trainer, start = build(trainer_kind, load, tokenizer, tmp_path)
    attached(trainer, kind, start, fields={"weight": 0.0})
    trainer.train()
    assert distance(weights, weights_of(trainer)) == 0.0
    assert logs == [logged(trainer, "loss"), logged(trainer, "grad_norm")]


@pytest.mark.parametrize(("kind", "trainer_kind"), ON_ROWS)
def test_padding_leaves_a_term_as_it_is(kind, trainer_kind, load, tokenizer, tmp_path):
    metrics = []
    for multiple in (None, 64):
        trainer, start = build(
            trainer_kind, load, tokenizer, tmp_path / str(multiple), per_device_train_batch_size=8, max_steps=1,
            learning_rate=0.0, pad_to_multiple_of=multiple,
        )  # fmt: skip
        attached(trainer, kind, start)
        trainer.train()
        metrics.append(metrics_of(trainer, kind))
    same(metrics)


@pytest.mark.parametrize(("kind", "trainer_kind"), IN_STEPS)
def test_accumulation_leaves_the_update_as_it_is(kind, trainer_kind, load, tokenizer, tmp_path):
    trained = []
    for size, steps in ((4, 1), (2, 2)):
        trainer, start = build(
            trainer_kind, load, tokenizer, tmp_path / str(size), per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, optim="sgd", max_steps=1,
        )  # fmt: skip
        attached(trainer, kind, start)
        trainer.train()
        trained.append(weights_of(trainer))
    assert distance(*trained) < 2e-6


@pytest.mark.parametrize("kind", [kind for kind in TERMS if "SFT" in TERMS[kind].trainers])
def test_packing_leaves_a_term_as_it_is(kind, load, tokenizer, tmp_path):
    metrics = []
    for name, changes in {
        "packed": {
            "packing": True, "max_length": 80, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 12,
        },
        "padded": {"per_device_train_batch_size": 12},
    }.items():  # fmt: skip
        losses = {}
        for weight in (0.0, 3.0):
            trainer, start = build(
                "SFT", load, tokenizer, tmp_path / f"{name}{weight}", rows=rows_of("SFT", 12), max_steps=1, learning_rate=0.0,
                **changes,
            )  # fmt: skip
            attached(trainer, kind, start, fields={"weight": weight})
            trainer.train()
            losses[weight] = logged(trainer, "loss")[0]
        metrics.append({"loss": losses[3.0] - losses[0.0]})
    assert abs(metrics[0]["loss"]) > 1e-4
    same(metrics)


# Text around turns: a system prompt, a second token that opens an answer, nothing.
TEMPLATES = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "<|system|>warm and kind<|end|>{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{% for m in messages %}<|{{ m['role'] }}|><|system|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><|system|>{% endif %}",
)


@pytest.mark.parametrize(("kind", "trainer_kind"), ON_ROWS)
def test_the_text_that_a_template_writes_is_not_scored(kind, trainer_kind, load, tokenizer, tmp_path):
    """At the embedding an activation is its token's alone, so a term's value must not depend on what is around the answer."""
    from copy import deepcopy

    metrics = []
    for index, template in enumerate(TEMPLATES):
        told = deepcopy(tokenizer)
        told.chat_template = template
        trainer, start = build(
            trainer_kind, load, told, tmp_path / str(index), per_device_train_batch_size=8, max_steps=1, learning_rate=0.0,
        )  # fmt: skip
        attached(trainer, kind, start, fields={"point": EMBEDDING})
        trainer.train()
        metrics.append(metrics_of(trainer, kind, only_own_tokens=True))
    same(metrics)


@pytest.mark.parametrize("kind", TERMS)
def test_the_verdict_on_drift_knows_what_a_term_pushes(kind, load, tokenizer, tmp_path):
    trainer, _ = build("DPO", load, tokenizer, tmp_path)
    attachment = attached(
        trainer, kind, drift=DriftConfig(every=1, texts=["warm kind day", "the sun is a good friend"])
    )
    [term] = attachment.terms.terms
    expected = {readout.name: sign for readout, sign in term.pushes().items()}
    [callback] = [one for one in trainer.callback_handler.callbacks if isinstance(one, DriftCallback)]
    assert callback.evaluation.pressure == expected
    trainer.train()
    events = [event for event in read_events(attachment.run_log.path) if isinstance(event, DriftEvent)]
    assert evidence_of(events[-1], events[0]).pressure == expected


@pytest.mark.parametrize("kind", TERMS)
def test_a_negative_weight_is_refused_unless_it_means_something(kind, load):
    model = load()
    if TERMS[kind].allows_negative_weight:
        assert make_term(kind, model, weight=-0.5).weight == -0.5
        return
    with pytest.raises(ValueError, match=r"`weight` of a .* is -0.5 – expected 0 or more"):
        make_term(kind, model, weight=-0.5)


@pytest.mark.parametrize("kind", TERMS)
def test_a_recipe_can_name_every_term(kind, load, tokenizer, tmp_path):
    card = str(make_card(tmp_path, load(), tokenizer))
    mapping = {"kind": kind, "card": card, "weight": 0.5, "schedule": {"kind": "warmup", "steps": 1e1}}
    mapping |= {"hook_point": LAYER, "card": None} if needs_hook_point(kind) else OPTIONS.get(kind, {})
    term = make_regularizer({key: value for key, value in mapping.items() if value is not None})
    assert type(term) is TERMS[kind]
    assert term.kind == kind
    assert term.schedule.steps == 10
    with pytest.raises(ValueError, match=r"expected options of .*Did you mean `weight`"):
        make_regularizer({key: value for key, value in {**mapping, "weigth": 1}.items() if value is not None})


@pytest.mark.slow
def test_two_processes_give_the_terms_of_one(tmp_path):
    from engines import compare

    compare.make_model(tmp_path / "model")
    results = {engine: compare.run(engine, ["terms"], tmp_path / "model", tmp_path, "--steps", "3") for engine in
               ("single", "ddp")}  # fmt: skip
    one, two = (results[engine]["terms"] for engine in ("single", "ddp"))
    assert (one["found"]["processes"], two["found"]["processes"]) == (1, 2)
    logged_keys = {key for log in one["history"] for key in log}
    assert {f"interp/{kind}/weight" for kind in TERMS} - {"interp/score_of_mine/weight"} <= logged_keys
    folders = tmp_path / "terms" / "single", tmp_path / "terms" / "ddp"
    assert compare.differing(compare.compare(one, two, folders)) == {}


def test_a_term_from_a_users_own_module_is_known_to_recipes(load, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "my_terms.py").write_text(
        "from dataclasses import dataclass\n"
        "from interp_rlhf import register_term\n"
        "from interp_rlhf.training.terms.term import LossTerm, OneConcept, TermValues\n\n\n"
        "@register_term('score_of_mine')\n"
        "@dataclass(frozen=True, eq=False, kw_only=True)\n"
        "class ScoreOfMine(OneConcept, LossTerm):\n"
        "    above: float = 0.0\n\n"
        "    def compute(self, batch, weight):\n"
        "        tokens = batch.tokens(self.include_end_of_turn)\n"
        "        scores = tokens.means(self.readout(batch.policy(self.policy_point, tokens))[:, 0])\n"
        "        return TermValues(weight * (scores - self.above).relu(), {'score': scores})\n\n"
        "    def pushes(self):\n"
        "        return {self.readout: -1}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_terms

    trainer = make_trainer("KTO", load(), tokenizer, tmp_path / "out", max_steps=1)
    mapping = {"kind": "score_of_mine", "card": str(make_card(tmp_path, load(), tokenizer)), "weight": 2, "above": -5}
    attachment = attach(trainer, regularizers=[mapping])
    assert isinstance(attachment.terms.terms[0], my_terms.ScoreOfMine)
    trainer.train()
    assert logged(trainer, "interp/score_of_mine_warmth/loss")[0] > 0


def test_a_class_that_is_no_whole_term_cannot_be_registered():
    with pytest.raises(ValueError, match="is not a dataclass"):

        @register_term("bare")
        class Bare(OneConcept, LossTerm):
            def compute(self, batch, weight):
                raise AssertionError

            def pushes(self):
                return {}

    with pytest.raises(ValueError, match="does not define `compute`, `pushes`"):

        @register_term("half")
        @dataclass(frozen=True, eq=False, kw_only=True)
        class Half(OneConcept, LossTerm):
            pass

    with pytest.raises(ValueError, match="expected a subclass of `LossTerm` or `MarginShift`"):
        register_term("number")(int)
    with pytest.raises(ValueError, match="`concept_anchor` is already registered"):
        register_term("concept_anchor")(dataclasses.dataclass(frozen=True, eq=False, kw_only=True)(type(
            "Other", (ScoreInTests,), {"__module__": __name__})))  # fmt: skip
    assert not {"bare", "half", "number"} & set(TERMS)


def test_features_come_from_an_autoencoder_or_from_a_card(load, tokenizer, tmp_path):
    card = str(make_card(tmp_path, load(), tokenizer))
    with pytest.raises(ValueError, match="`sae` and `card` are both given"):
        make_regularizer({"kind": "feature_constraint", "sae": "somewhere", "card": card, "weight": 0.5})


def test_a_shift_of_single_sequences_is_refused():
    with pytest.raises(ValueError, match="`Shifts` shifts the reference and its `per_pair` is False"):

        @register_term("shifts_in_tests")
        @dataclass(frozen=True, eq=False, kw_only=True)
        class Shifts(ScoreInTests):
            def shift_reference(self, log_probs, batch, loss, weight):
                return log_probs - weight
