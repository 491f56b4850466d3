import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from medvit.evaluation.calibration import fit_temperature, weighted_intercept, weighted_slope


def weighted_calibration(truth, p, weights):
    """Slope and intercept of each draw, (D, 2)."""
    return np.stack([weighted_slope(truth, p, weights), weighted_intercept(truth, p, weights)], axis=1)


def simulated(seed, slope=1.0, intercept=0.0, cases=400):
    """Outcomes whose logit is slope * logit(p) + intercept."""
    rng = np.random.default_rng(seed)
    p = special.expit(rng.normal(0, 1.5, cases))
    return rng.random(cases) < special.expit(slope * special.logit(p) + intercept), p


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.3, 2), st.floats(-1, 1))
def test_slope_and_intercept_equal_logistic_regression(seed, slope, intercept):
    truth, p = simulated(seed, slope, intercept)
    weights = np.random.default_rng(seed).integers(0, 4, (3, len(truth))).astype(float)
    for row, found in zip(weights, weighted_calibration(truth, p, weights), strict=True):
        logit = special.logit(p)[:, None]
        expected = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logit, truth, sample_weight=row)
        assert found[0] == pytest.approx(expected.coef_[0, 0], abs=1e-4)
        # at slope 1 as many findings are expected as there are
        assert row @ special.expit(logit[:, 0] + found[1]) == pytest.approx(row @ truth, abs=1e-6)


def test_well_calibrated_is_slope_one_and_intercept_zero():
    truth, p = simulated(0, cases=40_000)
    assert weighted_calibration(truth, p, np.ones((1, len(p))))[0] == pytest.approx([1, 0], abs=0.05)


@pytest.mark.parametrize(
    ("truth", "p"),
    [
        ([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9]),  # a threshold separates them
        ([1, 1, 1], [0.2, 0.5, 0.9]),
        ([0, 1, 0], [0.5, 0.5, 0.5]),  # no slope in a constant
    ],
)
def test_slope_that_the_cases_do_not_define(truth, p):
    assert np.isnan(weighted_calibration(np.array(truth, bool), np.array(p), np.ones((1, len(p))))[0, 0])


def test_certain_probabilities_have_figures():
    truth = np.array([0, 0, 1, 1, 1, 0], bool)
    found = weighted_calibration(truth, np.array([0, 0.4, 1, 0.7, 0.2, 0.6]), np.ones((1, 6)))
    assert np.isfinite(found).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_is_recovered_and_lowers_the_loss(temperature):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 3))
    labels = np.array([rng.choice(3, p=p) for p in special.softmax(logits, axis=1)])
    overstated = special.softmax(logits * temperature, axis=1)
    found = fit_temperature(labels, overstated)
    assert found == pytest.approx(temperature, rel=0.05)
    mended = special.softmax(np.log(overstated) / found, axis=1)
    assert log_loss(labels, mended) <= log_loss(labels, overstated) + 1e-9


def test_one_class_decides_no_temperature():
    assert fit_temperature([1, 1], [[0.2, 0.8], [0.4, 0.6]]) == 1.0


def test_few_perfect_cases_do_not_make_it_certain():
    assert 0.3 < fit_temperature([0, 1] * 5, [[0.9, 0.1], [0.1, 0.9]] * 5) < 1
