import math
from itertools import pairwise

import numpy as np
import pytest

from medvit.evaluation.probe import UNJUDGED, label_curve, linear_probe, nearest_neighbour, nested_subsets
from tests.evaluation.conftest import make_cases


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
