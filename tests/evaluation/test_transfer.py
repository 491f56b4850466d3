import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import optimize, stats
from sklearn.covariance import LedoitWolf

from medvit.evaluation.transfer import (
    UNJUDGED,
    gain,
    h_score,
    label_curve,
    leep,
    linear_probe,
    logme,
    nearest_neighbour,
    nested_subsets,
    normalised_gain,
)


def make_cases(n=60, width=8, patients=24, classes=2, seed=0):
    """Features in which classes are apart, several cases per patient, patients of both classes among them."""
    rng = np.random.default_rng(seed)
    groups = np.array([f"p{number}" for number in rng.integers(0, patients, n)])
    labels = rng.integers(0, classes, n)
    centres = 1.5 * rng.normal(size=(classes, width))
    return rng.normal(size=(n, width)) + centres[labels], labels, groups


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


def test_nearest_neighbour_equals_a_loop_over_other_patients():
    features, labels, groups = make_cases(classes=3)
    standard = (features - features.mean(axis=0)) / features.std(axis=0)
    right = {0: [], 1: [], 2: []}
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if groups[j] != groups[i]]
        nearest = min(others, key=lambda j: math.dist(standard[i], standard[j]))
        right[labels[i]].append(labels[nearest] == labels[i])
    expected = np.mean([np.mean(found) for found in right.values()])
    assert nearest_neighbour(features, labels, groups) == pytest.approx(expected)


def test_a_patient_does_not_find_itself():
    rng = np.random.default_rng(0)
    features, labels = np.repeat(rng.normal(size=(30, 6)), 2, axis=0), np.repeat(np.arange(30) % 2, 2)
    assert nearest_neighbour(features, labels, np.arange(60)) == 1  # copies, as if of different patients
    assert nearest_neighbour(features, labels, np.repeat(np.arange(30), 2)) < 0.8
    assert linear_probe(features, labels, np.repeat(np.arange(30), 2)).point < 0.8


def test_probe_never_trains_on_the_patient_it_judges():
    features, labels, groups = make_cases()
    probe = linear_probe(features, labels, groups)
    assert all(len(set(probe.folds[groups == name])) == 1 for name in set(groups))
    assert set(probe.folds) == set(range(5))
    assert probe.patients == pytest.approx(0.8 * len(set(groups)))
    assert probe.truth.tolist() == [[bool(label)] for label in labels]


def test_probe_is_paired_with_weights_of_cases():
    features, labels, groups = make_cases(classes=3)
    probe = linear_probe(features, labels, groups)
    both = probe.auroc(np.stack([np.ones(60), np.full(60, 2.0), groups != "p1"]))
    assert both[0] == both[1] == probe.point
    assert 0.5 < both[2] <= 1


def test_folds_of_one_class_do_not_count():
    """All positives of two patients: with five folds, three would have none."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 3)
    labels = (groups < 2).astype(int)
    features = rng.normal(size=(36, 4)) + 3 * labels[:, None]
    probe = linear_probe(features, labels, groups)
    assert set(probe.folds) == {0, 1}
    assert probe.point > 0.9


def test_a_class_of_one_patient_is_undefined():
    features, _, groups = make_cases()
    alone = (groups == groups[0]).astype(int)
    probe = linear_probe(features, alone, groups)
    assert math.isnan(probe.point)
    assert math.isnan(probe.patients)
    assert set(probe.folds) == {UNJUDGED}
    assert math.isnan(nearest_neighbour(features, alone, groups))


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


@pytest.mark.parametrize("seed", range(5))
def test_subsets_are_nested_whole_patients_of_both_classes(seed):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 15, 50)
    labels = np.isin(groups, [3, 7]) | (rng.random(50) < 0.05)
    subsets = nested_subsets(groups, labels, (0.1, 0.25, 0.5, 1.0), seed)
    for smaller, larger in pairwise(subsets):
        assert set(smaller) <= set(larger)
    for subset in subsets:
        assert set(subset) == set(np.flatnonzero(np.isin(groups, groups[subset])))
        assert set(labels[subset]) == {False, True}
    assert subsets[-1].tolist() == list(range(50))


def test_subsets_follow_the_seed_and_keep_the_share_of_kinds():
    groups, labels = np.arange(100), np.arange(100) < 30
    (half,) = nested_subsets(groups, labels, [0.5])
    assert len(half) == 50
    assert labels[half].sum() == pytest.approx(15, abs=1)
    assert nested_subsets(groups, labels, [0.5])[0].tolist() == half.tolist()
    assert nested_subsets(groups, labels, [0.5], seed=1)[0].tolist() != half.tolist()


@pytest.mark.parametrize("share", [0.0, -0.5, 1.1])
def test_no_such_share(share):
    with pytest.raises(ValueError, match="shares"):
        nested_subsets([1, 2], [0, 1], [share])
    with pytest.raises(ValueError, match="one length"):
        nested_subsets([1, 2], [0], [1.0])


def test_label_curve_ends_at_the_probe_and_rises():
    features, labels, groups = make_cases(120, 40, 40, seed=3)
    features += 4 * np.random.default_rng(0).normal(size=features.shape)
    curve = label_curve(features, labels, groups, (0.1, 0.5, 1.0))
    whole = linear_probe(features, labels, groups)
    assert curve[-1] == (whole.patients, whole.point)
    assert [point.patients for point in curve] == sorted(point.patients for point in curve)
    assert curve[0].auroc < curve[-1].auroc


def test_gain_is_a_difference_and_normalised_by_what_was_left():
    assert gain(0.8, 0.6) == pytest.approx(0.2)
    assert normalised_gain(0.8, 0.6) == pytest.approx(0.5)
    assert normalised_gain(0.5, 0.6) == pytest.approx(-0.25)
    assert math.isnan(normalised_gain(1.0, 1.0))
    assert math.isnan(normalised_gain(math.nan, 0.5))
