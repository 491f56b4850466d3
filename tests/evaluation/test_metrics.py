import math

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from medvit.evaluation.metrics import (
    Interval,
    auroc,
    auroc_within,
    average_precision,
    brier,
    ece,
    macro_auroc,
    operating_point,
    weighted_sensitivity_at,
)

# eighths: many ties, exact in binary
cases = st.lists(st.tuples(st.booleans(), st.integers(0, 8).map(lambda k: k / 8)), min_size=1, max_size=40)
both_classes = cases.filter(lambda rows: len({label for label, _ in rows}) == 2)


def columns(rows):
    labels, scores = zip(*rows, strict=True)
    return np.array(labels), np.array(scores)


@given(both_classes)
def test_points_equal_scikit_learn_with_ties(rows):
    labels, scores = columns(rows)
    assert auroc(labels, scores) == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores), abs=1e-12)
    expected = sklearn.metrics.average_precision_score(labels, scores)
    assert average_precision(labels, scores) == pytest.approx(expected, abs=1e-12)
    assert brier(labels, scores) == pytest.approx(sklearn.metrics.brier_score_loss(labels, scores), abs=1e-12)


@given(cases)
def test_one_class_is_undefined_and_nothing_else_is(rows):
    labels, scores = columns(rows)
    assert math.isnan(auroc(labels, scores)) == (len(set(labels)) == 1)
    assert math.isnan(average_precision(labels, scores)) == (not labels.any())


def test_macro_auroc_equals_scikit_learn():
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 3, 60), rng.dirichlet(np.ones(3), 60)
    expected = sklearn.metrics.roc_auc_score(labels, probabilities, multi_class="ovr")
    assert macro_auroc(labels, probabilities) == pytest.approx(expected, abs=1e-12)
    two = rng.dirichlet(np.ones(2), 60)
    assert macro_auroc(labels > 0, two) == auroc(labels > 0, two[:, 1])
    assert math.isnan(macro_auroc(np.minimum(labels, 1), probabilities))


def test_ece_of_a_case_worked_by_hand():
    # bin 0.2..0.3: 2 cases, mean 0.25, observed 0.5; bin 0.9..1: 2 cases, mean 0.95, observed 1
    assert ece([0, 1, 1, 1], [0.24, 0.26, 0.9, 1.0]) == pytest.approx((2 * 0.25 + 2 * 0.05) / 4)


def test_auroc_within_folds_ignores_pairs_across_folds():
    labels, folds = np.array([0, 1, 0, 1]), np.array(["a", "a", "b", "b"])
    scores = np.array([0.1, 0.2, 0.8, 0.9])  # each fold perfect, their scales apart
    assert auroc(labels, scores) == 0.75
    assert auroc_within(labels, scores, folds) == 1.0


@given(both_classes, st.integers(0, 3))
def test_auroc_within_is_the_mean_weighted_by_pairs(rows, seed):
    labels, scores = columns(rows)
    folds = np.random.default_rng(seed).integers(0, 3, len(labels))
    parts = [(auroc(labels[folds == f], scores[folds == f]), labels[folds == f]) for f in range(3)]
    defined = [(value, truth.sum() * (~truth).sum()) for value, truth in parts if not math.isnan(value)]
    if defined:
        expected = np.average([v for v, _ in defined], weights=[w for _, w in defined])
        assert auroc_within(labels, scores, folds) == pytest.approx(expected, abs=1e-12)
    else:
        assert math.isnan(auroc_within(labels, scores, folds))


@given(both_classes)
def test_youden_threshold_is_the_best_of_all(rows):
    labels, scores = columns(rows)

    def youden(threshold):
        called = scores >= threshold
        return called[labels].mean() - called[~labels].mean()

    best = max(youden(t) for t in np.linspace(-0.01, 1.01, 200))
    assert youden(operating_point(labels, scores)) == pytest.approx(best, abs=1e-12)


@given(both_classes, st.floats(0.01, 0.99))
def test_sensitivity_is_reached_by_the_highest_threshold(rows, wanted):
    labels, scores = columns(rows)
    threshold = operating_point(labels, scores, wanted)
    assert (scores >= threshold)[labels].mean() >= wanted
    higher = scores[scores >= threshold].min() + 1e-9
    assert (scores >= higher)[labels].mean() < wanted


@settings(max_examples=50)
@given(both_classes, st.integers(0, 9))
def test_a_tiny_change_of_scores_flips_no_case(rows, seed):
    labels, scores = columns(rows)
    threshold = operating_point(labels, scores)
    shaken = np.clip(scores + np.random.default_rng(seed).uniform(-1e-6, 1e-6, len(scores)), 0, 1)
    assert ((scores >= threshold) == (shaken >= threshold)).all()


def test_operating_point_needs_both_classes():
    with pytest.raises(ValueError, match="both classes"):
        operating_point([1, 1], [0.2, 0.3])


def test_misaligned_arrays_are_refused():
    with pytest.raises(ValueError, match="one length"):
        auroc([0, 1, 1], [0.2, 0.3])


def test_interval_reads_as_text():
    assert str(Interval(0.876, 0.81, 0.93)) == "0.88 [0.81, 0.93]"
    assert str(Interval(math.nan, math.nan, math.nan)) == "undefined"
    assert str(Interval(0.5, math.nan, math.nan)) == "0.50 [undefined]"
    assert Interval(0.5, 0.4, 0.7).half_width == pytest.approx(0.15)


@given(both_classes, st.sampled_from([0.5, 0.75, 0.9]))
def test_sensitivity_at_a_specificity_is_the_best_that_scikit_learns_curve_has(rows, specificity):
    labels, scores = columns(rows)
    fpr, tpr, _ = sklearn.metrics.roc_curve(labels, scores, drop_intermediate=False)
    expected = tpr[fpr <= 1 - specificity + 1e-12].max()
    found = weighted_sensitivity_at(labels, scores, np.ones((1, len(labels))), specificity)
    assert found[0] == pytest.approx(expected, abs=1e-12)


def test_sensitivity_of_one_class_is_undefined():
    for truth in ([True, True], [False, False]):
        assert np.isnan(weighted_sensitivity_at(np.array(truth), np.array([0.2, 0.7]), np.ones((1, 2)))[0])
