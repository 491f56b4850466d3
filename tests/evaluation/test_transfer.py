import math

import numpy as np
import pytest
from scipy import optimize, stats
from sklearn.covariance import LedoitWolf

from medvit.evaluation.probe import linear_probe, nearest_neighbour
from medvit.evaluation.transfer import gain, h_score, leep, logme, normalised_gain
from tests.evaluation.conftest import make_cases

SCORES = {
    "logme": lambda features, labels, _: logme(features, labels),
    "h_score": lambda features, labels, _: h_score(features, labels),
    "nearest_neighbour": nearest_neighbour,
    "linear_probe": lambda features, labels, groups: linear_probe(features, labels, groups).point,
}


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", SCORES)
def test_permuted_labels_score_lowest(name, classes):
    features, labels, groups = make_cases(classes=classes)
    rng = np.random.default_rng(1)
    right = SCORES[name](features, labels, groups)
    assert all(SCORES[name](features, rng.permutation(labels), groups) < right for _ in range(5))


@pytest.mark.parametrize("width", [8, 90])  # more features than cases, too
@pytest.mark.parametrize("name", ["logme", "h_score"])
def test_rotation_of_the_features_changes_nothing(name, width):
    features, labels, groups = make_cases(width=width)
    rotation = stats.ortho_group.rvs(width, random_state=0)
    assert SCORES[name](features @ rotation, labels, groups) == pytest.approx(
        SCORES[name](features, labels, groups), rel=1e-6
    )


def direct_evidence(features, target):
    """Largest log density per case of the targets under N(0, F F' / alpha + I / beta), over both precisions."""

    def lost(logs):
        alpha, beta = np.exp(logs)
        covariance = features @ features.T / alpha + np.eye(len(target)) / beta
        return -stats.multivariate_normal.logpdf(target, np.zeros(len(target)), covariance) / len(target)

    return -optimize.minimize(lost, [0.0, 0.0], method="Nelder-Mead").fun


@pytest.mark.parametrize("seed", range(3))
def test_logme_is_the_largest_evidence_computed_directly(seed):
    features, labels, _ = make_cases(14, 3, seed=seed)
    expected = np.mean([direct_evidence(features, (labels == k).astype(float)) for k in (0, 1)])
    found = logme(features, labels)
    assert found <= expected + 1e-6
    assert found == pytest.approx(expected, abs=2e-3)  # it stops at 1 %


def test_h_score_equals_its_definition_with_scikit_learn():
    features, labels, _ = make_cases(classes=3)
    fitted = LedoitWolf().fit(features)
    means = np.stack([features[labels == label].mean(axis=0) for label in labels])
    between = np.cov(means.T, bias=True)
    expected = np.trace(np.linalg.inv(fitted.covariance_) @ ((1 - fitted.shrinkage_) * between))
    assert h_score(features, labels) == pytest.approx(expected, rel=1e-9)
    assert 0 < expected < 2


def slow_leep(source, labels):
    N, Z = source.shape
    total = 0.0
    for i in range(N):
        likelihood = 0.0
        for z in range(Z):
            mass = sum(source[j, z] for j in range(N))
            if mass:
                likelihood += source[i, z] * sum(source[j, z] for j in range(N) if labels[j] == labels[i]) / mass
        total += math.log(likelihood)
    return total / N


def test_leep_equals_a_double_loop_with_classes_that_nobody_is_of():
    rng = np.random.default_rng(0)
    source, labels = rng.dirichlet(np.ones(5), 20), rng.integers(0, 3, 20)
    empty = np.insert(source, 2, 0.0, axis=1)
    assert leep(source, labels) == pytest.approx(slow_leep(source, labels), abs=1e-12)
    assert leep(empty, labels) == pytest.approx(leep(source, labels), abs=1e-12)


def test_leep_of_a_source_that_knows_the_classes_is_0_and_of_one_that_is_blind_the_entropy():
    labels = np.array([0, 0, 1, 1])
    assert leep(np.eye(2)[labels], labels) == pytest.approx(0)
    assert leep(np.full((4, 3), 1 / 3), labels) == pytest.approx(math.log(0.5))


@pytest.mark.parametrize("source", [[[0.5, 0.4], [0.5, 0.5]], [[1.5, -0.5], [0.5, 0.5]]])
def test_leep_refuses_what_are_no_probabilities(source):
    with pytest.raises(ValueError, match="probabilities"):
        leep(source, [0, 1])


@pytest.mark.parametrize("name", SCORES)
def test_what_is_not_defined_is_nan(name):
    features, labels, groups = make_cases()
    assert math.isnan(SCORES[name](features, np.zeros(60), groups))
    assert math.isnan(SCORES[name](np.ones((60, 8)), labels, groups))
    assert math.isnan(SCORES[name](features[:1], labels[:1], groups[:1]))
    assert math.isnan(leep(np.full((60, 2), 0.5), np.zeros(60)))


@pytest.mark.parametrize("name", SCORES)
def test_what_does_not_fit_is_refused(name):
    features, labels, groups = make_cases()
    with pytest.raises(ValueError, match="features must be"):
        SCORES[name](features, labels[:-1], groups)
    with pytest.raises(ValueError, match="features must be"):
        SCORES[name](features[:0], labels[:0], groups[:0])
    with pytest.raises(ValueError, match="finite"):
        SCORES[name](np.where(features > 2, np.nan, features), labels, groups)
    if name in ("nearest_neighbour", "linear_probe"):
        with pytest.raises(ValueError, match="group"):
            SCORES[name](features, labels, groups[:-1])


def test_wide_features_without_information_stay_finite():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(20, 300)), np.arange(20) % 2
    assert math.isfinite(logme(features, labels))
    assert math.isfinite(logme(1e4 * features, labels))
    assert math.isfinite(h_score(features, labels))
    assert math.isfinite(logme(np.eye(20), labels))


def test_gain_is_a_difference_and_normalised_by_what_was_left():
    assert gain(0.8, 0.6) == pytest.approx(0.2)
    assert normalised_gain(0.8, 0.6) == pytest.approx(0.5)
    assert normalised_gain(0.5, 0.6) == pytest.approx(-0.25)
    assert math.isnan(normalised_gain(1.0, 1.0))
    assert math.isnan(normalised_gain(math.nan, 0.5))
