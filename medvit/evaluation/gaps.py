"""Gaps between groups with simultaneous intervals.

The largest of several noisy gaps is too large on average, and a plain percentile interval inherits that: ten equal
sites would look unfair. So the interval is the observed gap plus and minus the largest error that any pair's gap makes
in `confidence` of the resamples (maximum deviation bootstrap): it holds for all pairs at once. A rate of exactly 0 or 1
shows no error in any resample; its exact binomial width is then the least that is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

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
        limits: (M, G) exact binomial width of rates that are exactly 0 or 1, else 0.
        confidence: 0..1.
    """

    points: Floats
    draws: Floats
    limits: Floats
    confidence: float

    def interval(self, figures: list[int], method: Method = "worst_case") -> Interval:
        """Largest or mean gap of the chosen figures; NaN when one of them is defined in fewer than two groups."""
        combine = np.max if method == "worst_case" else np.mean
        gap = combine(spread(self.points[figures]))
        errors = combine(spread(self.draws[:, figures] - self.points[figures]), axis=1)
        errors = errors[~np.isnan(errors)]
        if np.isnan(gap) or 2 * len(errors) < len(self.draws):
            return Interval(float(gap), np.nan, np.nan)
        error = max(np.quantile(errors, self.confidence), combine(self.limits[figures].max(axis=1)))
        return Interval(float(gap), float(max(0, gap - error)), float(min(1, gap + error)))

    def only(self, cells: Bools) -> Gaps:
        """The same with the other `cells` (M, G) undefined."""
        return Gaps(np.where(cells, self.points, np.nan), self.draws, np.where(cells, self.limits, 0), self.confidence)
