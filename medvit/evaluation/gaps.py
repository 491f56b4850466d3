"""Differences between groups: signed ones of every pair, and the largest with simultaneous bounds.

The largest of several noisy gaps is too large on average, and a plain percentile interval inherits that: ten equal
sites would look unfair. So its bounds are max-t bounds (Hothorn, Bretz and Westfall 2008): every pair's difference plus
and minus the same multiple of its own standard error, the multiple being what no pair exceeds in `confidence` of the
resamples. They hold for all pairs at once, and a small group widens its own pairs only.

A rate of exactly 0 or 1 shows no error in any resample; its exact binomial width then stands for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from medvit.evaluation.bootstrap import tail
from medvit.evaluation.metrics import Bools, Floats, Interval

Method = Literal["worst_case", "mean"]


def spread(values: Floats) -> Floats:
    """Largest minus smallest defined value along the last axis; NaN with fewer than two."""
    widest = np.fmax.reduce(values, axis=-1, initial=np.nan) - np.fmin.reduce(values, axis=-1, initial=np.nan)
    return np.where((~np.isnan(values)).sum(axis=-1) < 2, np.nan, widest)


@dataclass(frozen=True)
class Gaps:
    """What M figures of G groups differ by.

    Attributes:
        points: (M, G), NaN where undefined.
        draws: (B, M, G) of the patient bootstrap.
        limits: (M, G) exact binomial width where resampling shows none (a rate of exactly 0 or 1), else 0.
        confidence: 0..1.
        patients: (M, G) that each figure rests on, 0 where that says nothing; None: many.
    """

    points: Floats
    draws: Floats
    limits: Floats
    confidence: float
    patients: npt.NDArray[np.int64] | None = None

    def interval(self, figures: Sequence[int], method: Method = "worst_case") -> Interval:
        """Largest or mean gap of the chosen figures; NaN when one of them is defined in fewer than two groups.

        Both ends hold for all pairs of groups and all chosen figures at once.
        """
        combine = np.max if method == "worst_case" else np.mean
        chosen = list(figures)
        gap = float(combine(spread(self.points[chosen])))
        if np.isnan(gap):
            return Interval(gap, np.nan, np.nan)
        size, error = self._simultaneous(chosen)
        if np.isnan(error[~np.isnan(size)]).any():
            return Interval(gap, np.nan, np.nan)
        low, high = (combine(np.nanmax(size + sign * error, axis=1)) for sign in (-1, 1))
        return Interval(gap, float(max(0, low)), float(min(1, high)))

    def difference(self, figure: int, first: int, second: int) -> Interval:
        """Signed difference of one figure, first group less second: percentile interval of this pair alone."""
        point = self.points[figure, first] - self.points[figure, second]
        values = self.draws[:, figure, first] - self.draws[:, figure, second]
        values, limit = values[~np.isnan(values)], np.hypot(*self.limits[figure, [first, second]])
        if np.isnan(point) or 2 * len(values) < len(self.draws) or (np.ptp(values) == 0 and limit == 0):
            return Interval(float(point), np.nan, np.nan)
        fewest = None if self.patients is None else int(self.patients[figure, [first, second]].min())
        share = tail(self.confidence, fewest or None)
        ends = np.quantile(values, [share, 1 - share])
        # what resampling cannot see is independent of what it sees
        below, above = np.hypot(np.maximum(0, [point - ends[0], ends[1] - point]), limit)
        return Interval(float(point), float(max(-1, point - below)), float(min(1, point + above)))

    def only(self, cells: Bools) -> Gaps:
        """The same with the other `cells` (M, G) undefined."""
        return replace(self, points=np.where(cells, self.points, np.nan), limits=np.where(cells, self.limits, 0))

    def _simultaneous(self, figures: list[int]) -> tuple[Floats, Floats]:
        """Size of every pair's difference, and its simultaneous error: two (M, pairs), NaN where undefined."""
        pairs = np.array(list(combinations(range(self.points.shape[1]), 2))).reshape(-1, 2).T
        points, draws, limits = self.points[figures], self.draws[:, figures], self.limits[figures]
        size = np.abs(points[:, pairs[0]] - points[:, pairs[1]])
        errors = np.abs((draws - points)[:, :, pairs[0]] - (draws - points)[:, :, pairs[1]])
        seen = (~np.isnan(errors)).sum(axis=0)
        square = np.where(2 * seen < len(draws), np.nan, np.nansum(errors**2, axis=0) / np.maximum(seen, 1))
        normal = float(stats.norm.ppf((1 + self.confidence) / 2))
        hidden = (limits[:, pairs[0]] ** 2 + limits[:, pairs[1]] ** 2) / normal**2
        deviation = np.sqrt(square + hidden)
        deviation[deviation == 0] = np.nan
        worst = np.fmax.reduce((errors / deviation).reshape(len(draws), -1), axis=1)
        worst = worst[~np.isnan(worst)]
        multiple = max(normal, float(np.quantile(worst, self.confidence))) if len(worst) else np.nan
        return size, multiple * deviation
