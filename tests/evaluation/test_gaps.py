import math

import numpy as np
import pytest

from medvit.evaluation.gaps import Gaps, spread


def test_spread_ignores_undefined_groups_and_needs_two():
    nan = np.nan
    values = np.array([[0.2, nan, 0.9], [nan, nan, 0.5], [nan, nan, nan]])
    assert spread(values)[0] == pytest.approx(0.7)
    assert np.isnan(spread(values)[1:]).all()
    assert math.isnan(spread(np.zeros((0,))))


def test_interval_holds_for_the_largest_of_many_equal_groups():
    # ten groups of 25, all with rate 0.8: the largest gap is noise, and its interval must say so
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(100):
        points = rng.binomial(25, 0.8, (1, 10)) / 25
        draws = rng.binomial(25, points, (300, 1, 10)) / 25
        wrong += Gaps(points, draws, np.zeros((1, 10)), 0.95).interval([0]).low > 0.05
    assert wrong <= 5


def test_rates_of_exactly_one_widen_the_gap_to_their_exact_width():
    points, draws = np.array([[1.0, 1.0]]), np.ones((100, 1, 2))
    gap = Gaps(points, draws, np.array([[0.26, 0.1]]), 0.95).interval([0])
    assert (gap.point, gap.low, gap.high) == pytest.approx((0, 0, math.hypot(0.26, 0.1)))


def test_only_removes_cells():
    points, draws = np.array([[0.1, 0.5, 0.9]]), np.tile([[0.1, 0.5, 0.9]], (50, 1, 1))
    gaps = Gaps(points, draws, np.zeros((1, 3)), 0.95)
    assert gaps.interval([0]).point == pytest.approx(0.8)
    assert gaps.only(np.array([[True, True, False]])).interval([0]).point == pytest.approx(0.4)


def test_a_pair_has_a_signed_interval_of_its_own():
    rng = np.random.default_rng(0)
    points = np.array([[0.5, 0.8]])
    draws = points + rng.normal(0, [0.03, 0.04], (4000, 1, 2))
    first = Gaps(points, draws, np.zeros((1, 2)), 0.95).difference(0, 0, 1)
    assert first.point == pytest.approx(-0.3)
    assert (first.low, first.high) == pytest.approx((-0.3 - 1.96 * 0.05, -0.3 + 1.96 * 0.05), abs=0.006)
    other = Gaps(points, draws, np.zeros((1, 2)), 0.95).difference(0, 1, 0)
    assert (other.low, other.high) == pytest.approx((-first.high, -first.low))


def test_a_small_group_does_not_widen_the_gap_of_the_others():
    rng = np.random.default_rng(0)
    points, errors = np.array([[0.2, 0.7, 0.45]]), rng.normal(0, 1, (2000, 1, 3)) * [0.02, 0.02, 0.2]
    three = Gaps(points, points + errors, np.zeros((1, 3)), 0.95).interval([0])
    two = Gaps(points[:, :2], points[:, :2] + errors[:, :, :2], np.zeros((1, 2)), 0.95).interval([0])
    assert three.low == pytest.approx(two.low, abs=0.03)  # the lower end is of the two that are well known
    assert three.high > two.high  # and nobody knows how far off the small one is


def test_a_group_without_any_error_leaves_the_ends_undefined():
    gap = Gaps(np.array([[0.4, 0.5]]), np.tile([[0.4, 0.5]], (50, 1, 1)), np.zeros((1, 2)), 0.95)
    assert np.isnan(gap.interval([0]).high)
    assert np.isnan(gap.difference(0, 0, 1).high)
