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
    assert (gap.point, gap.low, gap.high) == pytest.approx((0, 0, 0.26))


def test_only_removes_cells():
    points, draws = np.array([[0.1, 0.5, 0.9]]), np.tile([[0.1, 0.5, 0.9]], (50, 1, 1))
    gaps = Gaps(points, draws, np.zeros((1, 3)), 0.95)
    assert gaps.interval([0]).point == pytest.approx(0.8)
    assert gaps.only(np.array([[True, True, False]])).interval([0]).point == pytest.approx(0.4)
