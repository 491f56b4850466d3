import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf

from medvit.models.reference import Reference, conformal_threshold, know

KINDS = ("mahalanobis", "knn")


def features(seed, cases=200, width=12, shift=0.0):
    """Correlated, as features are."""
    mix = np.random.default_rng(99).normal(size=(width, width))
    return np.random.default_rng(seed).normal(size=(cases, width)) @ mix + shift


def test_mahalanobis_equals_scipy():
    known, other = features(0), features(1, 20)
    covariance = LedoitWolf().fit(known)
    expected = [mahalanobis(one, known.mean(axis=0), covariance.precision_) / math.sqrt(12) for one in other]
    np.testing.assert_allclose(know(known).score(other), expected, rtol=1e-5)


def test_nearest_neighbours_by_hand():
    known, other = features(0, 30), features(1, 5)
    own, others = (side / known.std(axis=0) for side in (known, other))
    distances = np.linalg.norm(others[:, None] - own[None], axis=2).min(axis=1) / math.sqrt(12)
    np.testing.assert_allclose(know(known, "knn").score(other), distances, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_elsewhere_lies_farther(kind):
    reference = know(features(0), kind)
    own, strange = reference.score(features(1)), reference.score(features(2, shift=15.0))
    assert stats.mannwhitneyu(strange, own).statistic / (len(own) * len(strange)) > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_more_features_than_cases(kind):
    scores = know(features(0, 20, 64), kind).score(features(1, 50, 64))
    assert np.isfinite(scores).all()
    assert (scores > 0).all()


@given(st.integers(19, 200), st.sampled_from([0.05, 0.1, 0.2]))
def test_threshold_is_exceeded_by_the_share_that_was_asked(cases, share):
    """Averaged over which of n + 1 exchangeable cases is the new one, exactly at most the share lies above."""
    scores = np.random.default_rng(cases).normal(size=cases + 1)
    above = np.mean([scores[i] > conformal_threshold(np.delete(scores, i), share) for i in range(cases + 1)])
    assert share - 1 / (cases + 1) - 1e-9 <= above <= share + 1e-9


def test_threshold_of_unseen_cases_holds_where_that_of_the_learned_ones_does_not():
    known, unseen, new = features(0, 60, 48), features(1, 400, 48), features(2, 4000, 48)
    reference = know(known)
    flagged = [
        float((reference.score(new) > conformal_threshold(reference.score(side))).mean()) for side in (unseen, known)
    ]
    assert 0.03 < flagged[0] < 0.07
    assert flagged[1] > 0.3  # what a reference learned from is always nearer


def test_too_few_cases_set_no_threshold():
    assert conformal_threshold(np.arange(18)) == math.inf
    assert conformal_threshold(np.arange(19)) == 18


def test_one_case_is_no_reference():
    with pytest.raises(ValueError, match="two cases"):
        know(features(0, 1))


def test_the_threshold_does_not_move_with_what_is_judged():
    reference = know(features(0))
    strange = features(1, 50, shift=30.0)
    one_by_one = np.concatenate([reference.score(case[None]) for case in strange])
    np.testing.assert_allclose(one_by_one, reference.score(strange))
    assert isinstance(reference, Reference)
