"""The causal check: planted causes, effects by hand, controls, and inputs that it refuses."""

import json
import math

import numpy as np
import pytest
import torch
from planted import BAD, GOOD, HOOK_POINT, Planted, mood, prompts
from tiny import make_card, sentences

from interp_rlhf import CausalSettings, Readout, causal_check, load_card
from interp_rlhf.activations.changes import Change, changed
from interp_rlhf.activations.generating import completions_of
from interp_rlhf.cli import main
from interp_rlhf.concepts.causal_findings import CausalFindings
from interp_rlhf.concepts.examples import make_examples, write_jsonl
from interp_rlhf.validation.directions import Spread, random_directions
from interp_rlhf.validation.effects import effect_of, luck, monotone_fit, verdict_of
from interp_rlhf.validation.gate import gate

# Small doses: the planted direction moves all words at once, and larger ones leave no other word.
DOSES = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)


def verdict_on(planted, vector, seed=0, **more):
    settings = CausalSettings(doses=DOSES, max_new_tokens=4, batch_rows=256, seed=seed)
    readout = Readout("planted", HOOK_POINT, vector)
    more.setdefault("foreign", planted.foreign())
    return causal_check(
        readout, planted.model, planted.tokenizer, prompts(seed), mood, settings=settings, **more
    )  # fmt: skip


@pytest.fixture(scope="module")
def planted():
    return Planted(0)


@pytest.fixture(scope="module")
def driving(planted):
    return verdict_on(planted, planted.drives)


# --- planted causes


def test_the_direction_that_drives_the_words_is_causal(driving):
    assert driving.verdict == "causal"
    assert driving.reasons == []
    assert driving.steer.typical.value > driving.steer.bound
    assert driving.project.passes
    assert driving.mean.passes


def test_a_direction_that_is_decodable_and_inert_is_read_only(planted):
    found = verdict_on(planted, planted.inert)
    assert found.verdict == "read-only"
    assert found.steer.share.value == pytest.approx(0.5, abs=0.05)  # ties: the text does not move


def test_a_mark_of_the_text_is_read_only(planted):
    assert verdict_on(planted, planted.marked).verdict == "read-only"


def test_random_and_foreign_directions_are_not_causal(planted, driving):
    found = verdict_on(planted, random_directions(64, 1, 7)[0].vector)
    assert found.verdict == "read-only"
    for control in driving.controls:
        assert abs(control.steer) < driving.steer.typical.value


@pytest.mark.slow
def test_in_38_of_40_seeds_every_planted_direction_gets_its_verdict():
    right = 0
    for seed in range(40):
        planted = Planted(seed)
        other = torch.randn(64, generator=torch.Generator().manual_seed(1000 + seed))
        causal = verdict_on(planted, planted.drives, seed).verdict
        rest = [verdict_on(planted, v, seed).verdict for v in (planted.inert, planted.marked, other)]
        right += causal == "causal" and rest == ["read-only"] * 3
    assert right >= 38, f"{right} of 40 seeds"


def test_the_same_seed_gives_the_same_findings(planted, driving):
    again = verdict_on(planted, planted.drives)
    assert again == driving


def test_a_model_in_training_mode_is_left_there_and_gives_the_same(planted, driving):
    planted.model.train()
    again = verdict_on(planted, planted.drives)
    assert planted.model.training
    planted.model.eval()
    assert again == driving


def test_pairs_are_measured_by_their_log_probs(planted):
    rows = [
        {"prompt": prompt, "followed": f" {GOOD[i % 4]}", "violated": f" {BAD[i % 4]}"}
        for i, prompt in enumerate(prompts(0))
    ]
    readout = Readout("planted", HOOK_POINT, planted.drives)
    # Answers to prompts that end in a neutral word have a margin near 0: the concept is what lies above.
    settings = CausalSettings(doses=DOSES, batch_rows=256, occurs=3.0)
    found = causal_check(
        readout, planted.model, planted.tokenizer, pairs=rows, settings=settings, foreign=planted.foreign()
    )
    assert found.verdict == "causal"
    inert = Readout("inert", HOOK_POINT, planted.inert)
    assert (
        causal_check(
            inert, planted.model, planted.tokenizer, pairs=rows, settings=settings, foreign=planted.foreign()
        ).verdict
        == "read-only"
    )


def test_the_margin_is_the_difference_of_log_probs_by_hand(planted):
    from interp_rlhf.validation.behaviour import MarginBehaviour
    from interp_rlhf.validation.jobs import Job

    rows = [{"prompt": text, "followed": " good", "violated": " bad day"} for text in prompts(3, 10)]
    behaviour = MarginBehaviour(
        planted.model, planted.tokenizer, HOOK_POINT, rows, batch_rows=4, chat={}, progress=False
    )
    values = behaviour.values([Job(i) for i in range(10)], "")

    def log_prob(prompt, completion):
        before = planted.tokenizer(text=prompt)["input_ids"]
        after = planted.tokenizer(text=completion)["input_ids"]
        with torch.no_grad():
            log_probs = planted.model(torch.tensor([before + after])).logits[0].log_softmax(-1)
        return sum(float(log_probs[len(before) - 1 + i, token]) for i, token in enumerate(after))

    for row, value in zip(rows, values, strict=True):
        expected = log_prob(row["prompt"], " good") - log_prob(row["prompt"], " bad day")
        assert value == pytest.approx(expected, abs=1e-4)


def test_the_other_recipe_is_fitted_and_compared(planted):
    rows = [{"text": " ".join([*text.split()[:-1], word]), "label": int(word in GOOD)}
            for i, text in enumerate(prompts(5, 60)) for word in ((*GOOD, *BAD)[i % 8],)]  # fmt: skip
    found = verdict_on(planted, planted.drives, examples=make_examples(rows))
    assert found.other.method == "difference_of_means"
    assert found.other.weighted_cosine > 0.5
    assert found.other.verdict == "causal"
    assert not found.other.disagrees


def test_foreign_directions_of_the_user_come_first_and_a_relative_is_no_control(planted):
    given = {"relative": planted.drives + 0.05 * planted.marked, "marked": planted.marked, **planted.foreign()}
    found = verdict_on(planted, planted.drives, foreign=given)
    names = [control.name for control in found.controls if control.kind == "foreign"]
    assert "marked" in names
    assert "relative" not in names
    assert len(names) >= 3


def test_without_three_foreign_directions_nothing_is_said(planted, monkeypatch):
    monkeypatch.setattr("interp_rlhf.validation.directions._CONTRASTS", {})
    found = verdict_on(planted, planted.drives, foreign={"marked": planted.marked})
    assert found.verdict == "insufficient evidence"
    assert found.reasons == ["1 foreign directions are unrelated to the concept, fewer than 3"]


# --- what is done to the activation


def test_a_step_is_added_to_every_token_but_the_first(planted):
    hidden = {}
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])  # the first row is padded on the left

    def keep(name):
        def see(module, inputs, output):
            hidden[name] = (output[0] if isinstance(output, tuple) else output).detach().clone()

        return see

    layer = planted.model.model.layers[0]
    handle = layer.register_forward_hook(keep("plain"))
    planted.model(input_ids=ids, attention_mask=mask)
    handle.remove()
    steps = [Change.steering(planted.drives), Change.steering(-2 * planted.marked)]
    with changed(planted.model, HOOK_POINT, steps, mask):
        handle = layer.register_forward_hook(keep("steered"))
        planted.model(input_ids=ids, attention_mask=mask)
        handle.remove()
    moved = hidden["steered"] - hidden["plain"]
    assert torch.allclose(moved[0, 2], planted.drives, atol=1e-6)
    assert torch.allclose(moved[1, 1:], (-2 * planted.marked).expand(2, -1), atol=1e-6)
    assert torch.equal(moved[0, :2], torch.zeros(2, 64))  # padding, and the row's first token
    assert torch.equal(moved[1, 0], torch.zeros(64))


def test_a_silenced_coordinate_has_its_level_and_nothing_else_moves(planted):
    axis = torch.nn.functional.normalize(torch.ones(64), dim=0)
    seen = []
    with changed(planted.model, HOOK_POINT, [Change.silencing(axis, 0.25)], torch.ones(1, 3)):
        handle = planted.model.model.layers[0].register_forward_hook(lambda m, i, o: seen.append(o))
        planted.model(input_ids=torch.tensor([[5, 6, 7]]))
        handle.remove()
    out = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert (out[0, 1:] @ axis).tolist() == pytest.approx([0.25, 0.25], abs=1e-5)


def test_no_change_gives_the_same_answers(planted):
    ids = [planted.tokenizer(text=text)["input_ids"] for text in prompts(1, 4)]
    how = {"pad": 1, "ends": set(), "max_new_tokens": 5}
    plain = completions_of(planted.model, ids, **how)
    none = Change.steering(torch.zeros(64))
    width = max(map(len, ids))
    mask = torch.tensor([[j >= width - len(row) for j in range(width)] for row in ids])
    with changed(planted.model, HOOK_POINT, [none] * 4, mask):
        assert completions_of(planted.model, ids, **how) == plain


# --- statistics by hand


def test_the_bound_is_a_prediction_interval_of_the_random_directions():
    # Ten random directions with typical moves ±1: s = 1, t(0.99, 10) = 2.764, times √(1 + 1/10) = 2.899.
    randoms = np.repeat(np.array([[1.0], [-1.0]] * 5), 12, axis=1)
    assert luck(randoms, False) == pytest.approx(2.764 * math.sqrt(1.1), abs=1e-3)


def test_one_prompt_with_a_huge_move_decides_nothing():
    moves = np.array([1000.0] + [0.0] * 19)
    found = effect_of(moves, np.full((10, 20), 0.1), {}, False, 0)
    assert found.typical.value == 0
    assert found.share.value == pytest.approx((1 + 19 / 2) / 20)
    assert not found.passes


def test_a_control_counts_with_the_sign_that_helps_it():
    moves = np.full(20, 1.0)
    found = effect_of(moves, np.zeros((10, 20)), {"opposite": np.full(20, -2.0)}, False, 0)
    assert found.beats["opposite"].value == 0
    assert not found.passes


def test_a_measure_with_two_values_counts_prompts():
    moves = np.array([1.0] * 8 + [0.0] * 10 + [-1.0] * 2)
    found = effect_of(moves, np.zeros((10, 20)), {}, True, 0)
    assert found.typical.value == pytest.approx((8 - 2) / 20)


def test_a_curve_that_falls_again_is_not_monotone():
    alphas = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    assert monotone_fit(alphas, np.array([0.0, 0.0, 1.0, 2.0, 2.0])) == 1
    assert monotone_fit(alphas, np.array([2.0, 1.0, 0.0, -1.0, -2.0])) == 0
    assert monotone_fit(alphas, np.zeros(5)) == 0


def test_the_verdict_follows_from_steering_and_both_ways_of_silencing():
    good = effect_of(np.ones(20), np.zeros((10, 20)), {}, False, 0)
    none = effect_of(np.zeros(20), np.zeros((10, 20)), {}, False, 0)
    assert verdict_of(good, [good, good], 1.0)[0] == "causal"
    assert verdict_of(good, [good, none], 1.0)[0] == "steers only"
    assert verdict_of(none, [good, good], 1.0)[0] == "silences only"
    assert verdict_of(none, [none, none], 1.0)[0] == "read-only"
    assert verdict_of(good, [None, None], 1.0)[0] == "insufficient evidence"
    assert verdict_of(None, [good, good], 1.0)[0] == "insufficient evidence"
    assert verdict_of(good, [good, good], 0.5) == (
        "silences only", ["steering: a rising curve explains 50% of the doses' variance, less than 75%"],
    )  # fmt: skip


def test_the_direction_of_the_same_variance_is_uncorrelated():
    activations = torch.randn(400, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 9.0)
    spread = Spread(activations)
    own = torch.nn.functional.normalize(torch.tensor([0.0, 1, 0, 1, 0, 0, 1, 0]), dim=0)
    found = spread.same_variance(own, 0)
    assert spread.sigma(found) == pytest.approx(spread.sigma(own), rel=0.01)
    assert abs(spread.weighted_cosine(found, own)) < 0.01
    assert float(found.norm()) == pytest.approx(1, abs=1e-5)


# --- cards, gate and command line


@pytest.fixture(scope="module")
def card_folder(tmp_path_factory, model_folder, tokenizer):
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("causal")
    make_card(folder, AutoModelForCausalLM.from_pretrained(model_folder()), tokenizer)
    write_jsonl([{"prompt": text} for text in sentences(12, seed=4)], folder / "prompts.jsonl")
    return folder


@pytest.fixture
def card(card_folder, tmp_path):
    import shutil

    shutil.copytree(card_folder, tmp_path / "card")
    return tmp_path / "card" / "warmth.yaml"


def run(*words):
    return main([str(word) for word in words])


def causal(card, model_folder, *more):
    return run(
        "probe", "causal", card, "--model", model_folder(), "--prompts", card.parent / "prompts.jsonl",
        "--causal-measure", "regex:[aeiou]{2}", "--doses=-4,-2,2,4", "--max-new-tokens", 4, "--occurs", 0.5, *more,
    )  # fmt: skip


def test_probe_causal_writes_findings_and_a_plot_into_the_card(card, model_folder, capsys):
    before = load_card(card).card
    assert causal(card, model_folder) == 0
    after = load_card(card).card
    assert after.causal.readout == after.readout_digest
    assert after.causal.measure == "regex:[aeiou]{2}"
    assert after.evidence == before.evidence
    assert f"causal verdict: {after.causal.verdict}" in capsys.readouterr().out
    assert card.with_suffix(".causal.svg").read_text().startswith("<?xml")


def test_the_findings_are_not_replaced_by_accident(card, model_folder, capsys):
    assert causal(card, model_folder) == 0
    once = card.read_bytes()
    assert causal(card, model_folder) == 2
    assert "--replace" in capsys.readouterr().err
    assert card.read_bytes() == once
    assert causal(card, model_folder, "--replace", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["verdict"] == load_card(card).card.causal.verdict


def test_the_gate_asks_for_the_verdict_only_if_it_is_told_to(card, model_folder, driving):
    plain = load_card(card).card
    assert gate(plain) == []
    assert "no causal check" in gate(plain, require_causal=True)[0]
    found = driving.model_copy(update={"readout": plain.readout_digest})
    assert gate(plain.model_copy(update={"causal": found}), require_causal=True) == []
    weak = found.model_copy(update={"verdict": "read-only", "reasons": ["nothing moved"]})
    assert "`read-only`: nothing moved" in gate(plain.model_copy(update={"causal": weak}), require_causal=True)[0]
    stale = found.model_copy(update={"readout": "sha256:" + "0" * 64})
    assert "another readout" in gate(plain.model_copy(update={"causal": stale}), require_causal=True)[0]


def test_a_reward_can_require_the_verdict(card):
    from interp_rlhf import ConceptReward

    ConceptReward.from_card(card)
    with pytest.raises(ValueError, match="no causal check"):
        ConceptReward.from_card(card, require_causal=True)


def test_require_causal_sets_the_exit_code(card, model_folder):
    assert causal(card, model_folder, "--require-causal") == 1


# --- what is refused, and what stays


def test_a_measure_that_fails_leaves_the_card_as_it_was(card, model_folder, capsys):
    assert causal(card, model_folder) == 0
    once = card.read_bytes()
    from interp_rlhf import register_measure

    @register_measure("broken_for_causal")
    def broken():
        return lambda text: math.nan

    words = ("--causal-measure", "broken_for_causal", "--replace")
    assert causal(card, model_folder, *words) == 2
    assert "gives no finite number" in capsys.readouterr().err
    assert card.read_bytes() == once


def test_no_prompt_with_the_concept_is_one_clear_error(card, model_folder, capsys):
    assert causal(card, model_folder, "--occurs", 2) == 2
    assert "The concept occurs in no answer" in capsys.readouterr().err
    assert load_card(card).card.causal is None


def test_a_direction_of_another_width_is_refused(planted):
    with pytest.raises(ValueError, match="foreign direction `narrow` has width 3"):
        verdict_on(planted, planted.drives, foreign={"narrow": torch.ones(3)})


def test_a_direction_along_which_nothing_varies_is_refused():
    planted = Planted(2)
    with torch.no_grad():
        planted.model.get_input_embeddings().weight.sub_(
            planted.model.get_input_embeddings().weight @ planted.marked[:, None] * planted.marked
        )
    with pytest.raises(ValueError, match="standard deviation"):
        verdict_on(planted, planted.marked, 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--causal-measure", "nothing"), "`--causal-measure nothing`"),
        (("--causal-measure", "regex:("), "expected a regular expression"),
        (("--doses", "1,2"), "at least four"),
        (("--doses", "a,b"), "expected numbers"),
        (("--random", "3"), "at least 10 random directions"),
        (("--causal-pairs", "x.jsonl"), "expected one of them"),
        (("--max-new-tokens", "0"), "`max_new_tokens` is 0"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(card, capsys, words, said):
    given = ["probe", "causal", card, "--prompts", card.parent / "prompts.jsonl", "--causal-measure", "regex:a"]
    assert run(*given, "--model", "/nowhere", *words) == 2
    assert said in capsys.readouterr().err


def test_too_few_prompts_and_pairs_without_a_side_are_refused(planted):
    readout = Readout("planted", HOOK_POINT, planted.drives)
    with pytest.raises(ValueError, match="3 prompts – expected at least 10"):
        causal_check(readout, planted.model, planted.tokenizer, prompts(0, 3), mood)
    with pytest.raises(ValueError, match="Pair 0 has the keys"):
        causal_check(readout, planted.model, planted.tokenizer, pairs=[{"prompt": "a", "followed": "b"}] * 10)
    with pytest.raises(ValueError, match="and not both"):
        causal_check(readout, planted.model, planted.tokenizer, prompts(0), mood, pairs=[])


def test_findings_are_strict():
    with pytest.raises(ValueError, match="verdict"):
        CausalFindings.model_validate({"verdict": "proven"})


# --- where the check is part of something else


def test_probe_check_runs_it_for_a_reward_with_prompts_and_keeps_its_own_evidence_if_it_stops(
    card, model_folder, tmp_path, capsys
):
    from tiny import labelled_rows

    write_jsonl(labelled_rows(24, seed=1), tmp_path / "fit.jsonl")
    write_jsonl(labelled_rows(40, seed=2), tmp_path / "check.jsonl")
    words = (
        "probe", "check", card, "--fit-data", tmp_path / "fit.jsonl", "--data", tmp_path / "check.jsonl", "--model",
        model_folder(), "--prompts", card.parent / "prompts.jsonl", "--causal-measure", "regex:[aeiou]{2}", "--doses=-4,-2,2,4",
        "--max-new-tokens", 4, "--replace", "--seed", 5,
    )  # fmt: skip
    assert run(*words, "--occurs", 2) == 2  # no answer has it
    stopped = load_card(card).card
    assert stopped.evidence.seed == 5  # the evidence was written before the causal check stopped
    assert stopped.causal is None
    capsys.readouterr()
    assert run(*words, "--occurs", 0.5) == 0
    out = capsys.readouterr().out
    checked = load_card(card).card
    assert checked.causal is not None
    assert f"causal verdict: {checked.causal.verdict}" in out
    assert checked.causal.other.method == "difference_of_means"  # fitted on the data of the fit


def test_card_show_draws_the_causal_check(card, model_folder, capsys):
    assert causal(card, model_folder) == 0
    capsys.readouterr()
    assert run("card", "show", card) == 0
    assert "causal check: regex:[aeiou]{2}, 12 prompts" in capsys.readouterr().out


def test_drift_compare_checks_the_second_model_again(card, model_folder, tmp_path, capsys):
    from tiny import labelled_rows

    write_jsonl(labelled_rows(40, seed=2), tmp_path / "check.jsonl")
    words = (
        "drift", "compare", model_folder(), model_folder(), "--monitor", card, "--labelled", tmp_path / "check.jsonl",
        "--prompts", card.parent / "prompts.jsonl", "--causal-measure", "regex:[aeiou]{2}", "--doses=-4,-2,2,4",
        "--max-new-tokens", 4, "--occurs", 0.5, "--json",
    )  # fmt: skip
    assert run(*words) == 0
    found = json.loads(capsys.readouterr().out)["causal"]["warmth"]
    assert found["before"] is None
    assert found["after"]["measure"] == "regex:[aeiou]{2}"
    assert found["after"]["readout"].startswith("sha256:")


def test_a_training_ends_with_the_check_of_its_monitors(card, model_folder, tokenizer, tmp_path):
    from training import make_trainer
    from transformers import AutoModelForCausalLM

    from interp_rlhf import DriftConfig, attach, write_report
    from interp_rlhf.runlog.events import TableEvent
    from interp_rlhf.runlog.log import read_events

    trainer = make_trainer(
        "SFT", AutoModelForCausalLM.from_pretrained(model_folder()), tokenizer, tmp_path / "run", max_steps=1
    )
    drift = DriftConfig(
        every=1, causal_prompts=sentences(12, seed=4), causal_measure=lambda text: float(text.count("a"))
    )
    attachment = attach(trainer, monitors=[card], drift=drift)
    trainer.train()
    tables = [event for event in read_events(attachment.run_log.path) if isinstance(event, TableEvent)]
    assert [table.title.split("?")[0] for table in tables] == ["Is `warmth` causal after training"]
    write_report([attachment.run_log.path], tmp_path / "report.html")
    assert "causal after training" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"causal_prompts": ["a"] * 12}, "expected both or neither"),
        ({"causal_prompts": ["a"] * 3, "causal_measure": "vader"}, "3 `causal_prompts`"),
        ({"causal_prompts": ["a"] * 12, "causal_measure": "nothing"}, "`causal_measure` is 'nothing'"),
    ],
)
def test_a_drift_configuration_that_cannot_be_checked_is_refused(given, said):
    from interp_rlhf import DriftConfig

    with pytest.raises(ValueError, match=said):
        DriftConfig(**given)


# --- several concepts, and latents


def test_the_matrix_says_that_one_direction_moves_the_measure_and_the_other_does_not(planted):
    from interp_rlhf import off_target

    readouts = [Readout("drives", HOOK_POINT, planted.drives), Readout("inert", HOOK_POINT, planted.inert)]
    found = off_target(
        readouts, planted.model, planted.tokenizer, prompts(0), {"mood": mood}, dose=1.0, max_new_tokens=4
    )
    assert found.cosine[0][1] == pytest.approx(0, abs=1e-4)
    # Good and bad words carry both: over tokens of text the two go together.
    assert found.weighted_cosine[0][1] > 0.9
    (drives, inert) = found.steering
    assert drives[2] > 1
    assert inert == pytest.approx([0, 0, 0], abs=0.2)
    # Steering the first writes good words, which the second reads in the text.
    assert drives[1] > 1


def test_card_matrix_prints_cosines_moves_and_what_a_run_moved(card, model_folder, tmp_path, capsys):
    import shutil

    from interp_rlhf.runlog.events import DriftEvent, MonitorEntry
    from interp_rlhf.runlog.log import RunLog

    other = card.parent / "other.yaml"
    shutil.copy(card, other)
    other.write_text(other.read_text().replace("name: warmth", "name: other"))
    log = RunLog(tmp_path / "interp.jsonl")
    log.append(DriftEvent(monitors={"warmth": MonitorEntry(shift=1.5)}), 3)
    words = (
        "card", "matrix", card, other, "--prompts", card.parent / "prompts.jsonl", "--model", model_folder(),
        "--max-new-tokens", 4, "--run-log", f"grpo={tmp_path / 'interp.jsonl'}", "--plot", tmp_path / "m.svg",
    )  # fmt: skip
    assert run(*words) == 0
    out = capsys.readouterr().out
    assert "+1.00 / +1.00" in out
    assert "run grpo" in out
    assert "+1.50" in out
    assert (tmp_path / "m.svg").exists()
    assert run(*words, "--run-log", "nothing") == 2
    assert "expected NAME=FILE" in capsys.readouterr().err


def test_latents_go_through_the_same_check(model_folder, tmp_path, card_folder, capsys):
    from test_sae_understand import random_sae
    from transformers import AutoModelForCausalLM

    from interp_rlhf.sae.files import save_sae

    place = tmp_path / "sae"
    save_sae(random_sae(AutoModelForCausalLM.from_pretrained(model_folder())), place)
    words = (
        "sae", "causal", place, "--latents", "1,3", "--prompts", card_folder / "prompts.jsonl", "--causal-measure",
        "regex:[aeiou]{2}", "--occurs", 0.5, "--doses=-4,-2,2,4", "--max-new-tokens", 4, "--model", model_folder(),
        "--hook-point", "model.layers.1", "--out", tmp_path / "out",
    )  # fmt: skip
    assert run(*words) == 0
    written = json.loads((tmp_path / "out" / "causal.json").read_text())
    assert list(written) == ["latent-1", "latent-3", "set"]
    assert "causal verdict" in capsys.readouterr().out
    assert run(*words) == 2
    assert "holds a causal check already" in capsys.readouterr().err


# --- committed figures


def evidence_program():
    import importlib.util
    from pathlib import Path

    place = Path(__file__).resolve().parent.parent / "recipes" / "is_it_causal" / "evidence.py"
    spec = importlib.util.spec_from_file_location("is_it_causal_evidence", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, place.parent


def test_the_document_shows_the_committed_findings():
    module, folder = evidence_program()
    document = (folder.parent.parent / "docs" / "evidence.md").read_text()
    files = sorted(folder.glob("*.json"))
    assert files
    for path in files:
        result = json.loads(path.read_text())
        CausalFindings.model_validate(result["findings"])
        assert module.table_row(result) in document, path.name
        assert result["findings"]["command"].startswith(
            f"python recipes/is_it_causal/evidence.py --concept {path.stem}"
        )


def test_the_pattern_for_refusals_knows_one_when_it_sees_one():
    module, _ = evidence_program()
    assert module.refuses("I'm sorry, but I can't help with that.") == 1
    assert module.refuses("Open the task manager and end the process.") == 0
