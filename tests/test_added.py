"""What a probe adds: nothing where it knows what the baselines know, something where it knows more. And the numbers around it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from interp_rlhf.validation import baselines
from interp_rlhf.validation.added import added
from interp_rlhf.validation.statistics import (
    auroc_difference,
    auroc_interval,
    auroc_within,
    calibration,
    enough_prompts,
    mean_interval,
    weighted_aurocs,
)

SEEDS = 40


def rows(rng, prompts, per=1):
    return rng.permutation(np.arange(prompts * per) % 2), [str(i // per) for i in range(prompts * per)]


def noisier_copy(rng):
    labels, groups = rows(rng, 80)
    words = 1.2 * labels + rng.normal(size=80)
    return labels, words + 0.7 * rng.normal(size=80), {"words": words}, groups


def better_mix(rng):
    labels, groups = rows(rng, 50, per=2)
    known = {str(i): 0.4 * labels + rng.normal(size=100) for i in range(6)}
    return labels, sum(known.values()) + rng.normal(size=100), known, groups


def bent_baseline(rng):
    labels, groups = rows(rng, 80)
    log_length = labels + rng.normal(size=80)
    return labels, log_length + 0.2 * rng.normal(size=80), {"length": np.exp(1.5 * log_length)}, groups


def separable(rng):
    labels, groups = rows(rng, 60)
    words, probe = (8.0 * labels + np.clip(rng.normal(size=60), -2, 2) for _ in range(2))
    return labels, probe, {"words": words}, groups


def noise(rng):
    labels, groups = rows(rng, 30, per=2)
    return labels, rng.normal(size=60), {str(i): rng.normal(size=60) for i in range(3)}, groups


@pytest.mark.parametrize("draw", [noisier_copy, better_mix, bent_baseline, separable, noise])
def test_a_probe_that_knows_what_the_baselines_know_adds_nothing(draw):
    found = [added(*draw(np.random.default_rng([7, seed])), seed=seed) for seed in range(SEEDS)]
    for interval in ([one.auroc for one in found], [one.log_loss for one in found]):
        assert sum(low <= 1e-12 and high >= -1e-12 for _, low, high in interval) >= 0.95 * SEEDS


def test_a_probe_that_knows_more_is_seen_to():
    held = 0
    for seed in range(SEEDS):
        rng = np.random.default_rng([8, seed])
        labels, groups = rows(rng, 200)
        known = {str(i): (0.35 if i < 2 else 0.0) * labels + rng.normal(size=200) for i in range(10)}  # AUROC 0.6
        found = added(labels, 1.2 * labels + rng.normal(size=200), known, groups, seed)  # AUROC 0.8 = Φ(1.2/√2)
        held += found.auroc[1] > 0 and found.log_loss[1] > 0
    assert held >= 0.95 * SEEDS


def test_added_names_what_it_leaves_out_and_repeats():
    labels, probe, known, groups = noisier_copy(np.random.default_rng(0))
    bad = {"constant": np.ones(80), "unknown": np.where(np.arange(80) == 3, np.nan, known["words"])}
    found = added(labels, probe, known | bad, groups, 0)
    assert found.left_out == ["constant", "unknown"]
    assert vars(found) | {"left_out": []} == vars(added(labels, probe, known, groups, 0))
    alone = added(labels, probe, {}, groups, 0)
    assert alone.auroc_without == 0.5
    assert alone.log_loss_without == pytest.approx(np.log(2))
    assert alone.auroc[1] > 0


def test_added_says_nothing_of_too_few_prompts_or_an_unknown_score():
    labels, probe, known, groups = noisier_copy(np.random.default_rng(0))
    few = added(labels, probe, known, [str(i % 9) for i in range(80)], 0)
    assert few.prompts == 9
    assert np.isnan([*few.auroc, *few.log_loss, few.auroc_with, few.log_loss_without]).all()
    unknown = added(labels, np.where(np.arange(80) == 3, np.nan, probe), known, groups, 0)
    assert unknown.left_out == ["probe"]
    assert np.isnan(unknown.auroc).all()


def test_a_nan_never_ranks_and_infinity_does():
    labels, scores = np.array([0, 0, 0, 1, 1, 1]), np.array([0.1, 0.2, np.nan, 0.3, 0.4, 0.5])
    once, without_it = np.ones(6), np.array([1.0, 1, 0, 1, 1, 1])
    np.testing.assert_array_equal(weighted_aurocs(labels, scores, np.stack([once, without_it])), [np.nan, 1.0])
    assert np.isnan(auroc_interval(labels, scores, list("abcdef"), 0)).all()
    assert np.isnan(auroc_difference(labels, np.arange(6.0), scores, list("abcdef"), 0)).all()
    infinite = np.array([-np.inf, -np.inf, np.inf, np.inf, np.inf, -np.inf])
    np.testing.assert_allclose(weighted_aurocs(labels, infinite, once[None]), roc_auc_score(labels, np.sign(infinite)))


def test_too_few_prompts_give_a_value_and_no_interval():
    labels, scores = np.arange(40) % 2, np.arange(40.0)
    for groups in (["one"] * 40, [str(i % 9) for i in range(40)]):
        assert not enough_prompts(labels, groups)
        value, *bounds = auroc_interval(labels, scores, groups, 0)
        assert value == pytest.approx(roc_auc_score(labels, scores))
        assert np.isnan([*bounds, *auroc_difference(labels, scores, -scores, groups, 0)[1:]]).all()
        assert np.isnan(mean_interval(scores, 0, groups)[1:]).all()
    groups = ["b" if label else str(i) for i, label in enumerate(labels)]  # label 1 in one prompt only
    assert not enough_prompts(labels, groups)
    assert enough_prompts(labels, [str(i) for i in range(40)])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(0, 3)), min_size=1, max_size=30))
def test_auroc_within_prompts_is_that_of_a_double_loop(drawn):
    groups, labels, scores = ([row[i] for row in drawn] for i in range(3))
    pairs = [
        (a > b) + 0.5 * (a == b)
        for g, one, a in zip(groups, labels, scores, strict=True)
        for h, other, b in zip(groups, labels, scores, strict=True)
        if g == h and one == 1 and other == 0
    ]
    value, low, high, count = auroc_within(np.array(labels), np.array(scores, float), list(map(str, groups)), 0)
    assert count == len({g for g in groups if {0, 1} <= {y for h, y in zip(groups, labels, strict=True) if g == h}})
    assert value == pytest.approx(np.mean(pairs) if pairs else np.nan, nan_ok=True)
    assert np.isnan([low, high]).all()


def test_auroc_within_prompts_does_not_see_what_the_prompt_gives_away():
    rng = np.random.default_rng(0)
    groups = [str(i // 4) for i in range(400)]
    easy = np.repeat(
        rng.integers(2, size=100), 4
    )  # label 1 is more frequent in some prompts, and the score knows which
    labels = (rng.random(400) < 0.25 + 0.5 * easy).astype(int)
    scores = easy + 0.1 * rng.normal(size=400)
    assert auroc_interval(labels, scores, groups, 0)[1] > 0.6
    _, low, high, count = auroc_within(labels, scores, groups, 0)
    assert low < 0.5 < high
    assert 50 < count < 100
    assert auroc_within(labels, np.full(400, np.nan), groups, 0)[3] == count


def test_calibration_is_scikit_learns():
    rng = np.random.default_rng(0)
    labels = (rng.random(500) < 0.3).astype(int)
    log_odds = 3 * (labels + rng.normal(size=500)) - 1
    slope, intercept, brier, loss = calibration(labels, log_odds)
    model = LogisticRegression(C=1e8, class_weight="balanced", tol=1e-10).fit(log_odds[:, None], labels)
    assert (slope, intercept) == pytest.approx((model.coef_[0, 0], model.intercept_[0]), rel=1e-4)
    weights = np.where(labels == 1, 1 / labels.sum(), 1 / (1 - labels).sum())
    likely = 1 / (1 + np.exp(-log_odds))
    assert brier == pytest.approx(brier_score_loss(labels, likely, sample_weight=weights))
    assert loss == pytest.approx(log_loss(labels, likely, sample_weight=weights))


def test_calibration_is_not_defined_where_a_threshold_separates():
    labels = np.array([0, 0, 1, 1])
    for log_odds in ([-2.0, -1, 1, 2], [2.0, 1, -1, -2], [-1.0, 0, 0, 1], [1.0, 1, 1, 1]):
        slope, intercept, brier, loss = calibration(labels, np.array(log_odds))
        assert np.isnan([slope, intercept]).all()
        assert np.isfinite([brier, loss]).all()
    assert np.isnan(calibration(labels, np.array([0.0, 1, np.nan, 2]))).all()
    assert np.isnan(calibration(np.ones(4), np.arange(4.0))).all()


def test_tfidf_reads_chinese_and_survives_texts_that_say_nothing():
    good = ["这部电影真好看", "我很喜欢这家店", "服务态度真好", "今天的菜很好吃", "这本书我很喜欢"]
    bad = ["这部电影太难看", "我讨厌这家店", "服务态度太差", "今天的菜太难吃", "这本书我讨厌"]
    labels = np.array([1] * 5 + [0] * 5)
    for groups in (None, [str(i % 5) for i in range(10)]):
        scores = baselines.tfidf(good + bad, labels, ["那首歌真好听我很喜欢", "那首歌太难听我讨厌"], groups)
        assert scores[0] > scores[1]
    for texts in ([""] * 10, ["same"] * 10, ["", " "] * 5):
        np.testing.assert_array_equal(baselines.tfidf(texts, labels, ["a", ""]), 0)
