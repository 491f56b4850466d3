import math

import numpy as np
import pytest
import sklearn.metrics
from scipy import stats
from scipy.stats import binomtest

from medvit.evaluation.bootstrap import PatientBootstrap, clustered_bootstrap, tail
from medvit.evaluation.metrics import (
    auroc,
    weighted_auroc,
    weighted_average_precision,
    weighted_brier,
    weighted_ece,
)


def make_cases(n=60, patients=25, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.4
    scores = np.round(np.clip(0.3 * labels + rng.random(n) * 0.7, 0, 1), 1)  # ties
    return rng.integers(0, patients, n), labels, scores


def test_weighted_statistics_equal_resampled_scikit_learn():
    patients, labels, scores = make_cases()
    for weights in PatientBootstrap(patients, draws=40).weights():
        figures = {
            sklearn.metrics.roc_auc_score: weighted_auroc(labels, scores, weights),
            sklearn.metrics.average_precision_score: weighted_average_precision(labels, scores, weights),
            sklearn.metrics.brier_score_loss: weighted_brier(labels, scores, weights),
        }
        for oracle, values in figures.items():
            for row, value in zip(weights.astype(int), values, strict=True):
                drawn = np.repeat(np.arange(len(labels)), row)
                assert value == pytest.approx(oracle(labels[drawn], scores[drawn]), abs=1e-12)


def test_weighted_calibration_error_equals_that_of_repeated_cases():
    patients, labels, scores = make_cases()
    weights = next(PatientBootstrap(patients, draws=20).weights())
    for row, value in zip(weights.astype(int), weighted_ece(labels, scores, weights), strict=True):
        drawn = np.repeat(np.arange(len(labels)), row)
        repeated = weighted_ece(labels[drawn], scores[drawn], np.ones((1, len(drawn))))[0]
        assert value == pytest.approx(repeated, abs=1e-12)


def test_weighted_auroc_equals_a_double_loop():
    patients, labels, scores = make_cases(30)
    weights = next(PatientBootstrap(patients, draws=5).weights())
    for row, value in zip(weights, weighted_auroc(labels, scores, weights), strict=True):
        wins = pairs = 0.0
        for i in np.flatnonzero(labels):
            for j in np.flatnonzero(~labels):
                wins += row[i] * row[j] * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
                pairs += row[i] * row[j]
        assert value == pytest.approx(wins / pairs, abs=1e-12)


def test_slow_and_fast_bootstrap_agree_draw_by_draw():
    patients, labels, scores = make_cases()
    slow = clustered_bootstrap(patients, lambda drawn: auroc(labels[drawn], scores[drawn]), draws=200, seed=3)
    fast = PatientBootstrap(patients, draws=200, seed=3).interval(
        lambda weights: weighted_auroc(labels, scores, weights)
    )
    assert (slow.point, slow.low, slow.high) == pytest.approx((fast.point, fast.low, fast.high), abs=1e-12)


def test_whole_patients_are_drawn():
    patients, *_ = make_cases()
    for weights in PatientBootstrap(patients, draws=50).weights():
        per_patient = [weights[:, patients == p] for p in np.unique(patients)]
        assert all((block == block[:, :1]).all() for block in per_patient)
        assert (sum(block[:, 0] for block in per_patient) == len(per_patient)).all()


def test_chunks_do_not_change_the_draws(monkeypatch):
    patients, *_ = make_cases()
    whole = np.concatenate(list(PatientBootstrap(patients, draws=30).weights()))
    monkeypatch.setattr("medvit.evaluation.bootstrap.CHUNK_CELLS", 7 * len(patients))
    assert (np.concatenate(list(PatientBootstrap(patients, draws=30).weights())) == whole).all()


def test_repeated_patients_widen_the_interval():
    _, labels, scores = make_cases(80, seed=2)
    repeated = [np.repeat(a, 4) for a in (np.arange(80), labels, scores)]
    by_patient = PatientBootstrap(repeated[0], draws=400).auroc(*repeated[1:])
    by_case = PatientBootstrap(np.arange(320), draws=400).auroc(*repeated[1:])
    assert by_patient.half_width > 1.6 * by_case.half_width


def test_perfect_figures_are_not_certain():
    patients, truth = np.arange(20), np.arange(20) < 12
    rate = PatientBootstrap(patients, draws=100).rate(np.ones(20, dtype=bool), truth)
    assert rate.point == 1
    assert rate.low == pytest.approx(binomtest(12, 12).proportion_ci().low)  # Clopper and Pearson
    assert PatientBootstrap(patients, draws=100).auroc(truth, truth.astype(float)).low == pytest.approx(
        binomtest(8, 8).proportion_ci().low
    )


def test_mostly_undefined_draws_give_no_interval():
    labels = np.array([True] + [False] * 30)  # the only positive is missing from 36 % of the draws
    assert not math.isnan(
        PatientBootstrap(np.arange(31), draws=300).auroc(labels, np.linspace(1, 0, 31) ** 2 - labels).low
    )
    interval = clustered_bootstrap(np.arange(9), lambda drawn: math.nan if (drawn > 1).any() else 1.0, draws=100)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    # scores normal, 1 apart: the true AUROC is Phi(1 / sqrt 2) = 0.7602
    rng, covered = np.random.default_rng(0), 0
    for cohort in range(120):
        labels = np.arange(120) < 50
        interval = PatientBootstrap(np.arange(120), draws=200, seed=cohort).auroc(labels, rng.normal(size=120) + labels)
        covered += interval.low <= 0.7602 <= interval.high
    assert 0.88 <= covered / 120 <= 0.995


@pytest.mark.parametrize("count", [8, 20, 60])
def test_interval_of_a_mean_of_few_is_students(count):
    values = np.random.default_rng(count).normal(size=count)
    found = PatientBootstrap(np.arange(count), draws=20_000).interval(
        lambda weights: weights @ values / weights.sum(axis=1)
    )
    low, high = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    # the resampled mean is not quite normal
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06 * (high - low))


def test_many_patients_leave_out_the_usual_share():
    assert tail(0.95, None) == pytest.approx(0.025)
    assert tail(0.95, 100_000) == pytest.approx(0.025, rel=1e-3)
    assert tail(0.95, 10) < 0.01
    assert tail(0.95, 1) == pytest.approx(0.025)
