"""Confidence intervals by resampling patients.

Cases of one patient resemble each other: resampling cases would make intervals too narrow, so whole patients are drawn
with replacement. A draw is described by weights, how often each case is in it; a weighted statistic turns weights
(D, n) into D values (`medvit.evaluation.metrics`), so that thousands of draws cost a few array operations.

Intervals are percentiles (Efron 1979), taken a little farther out for few patients, since resampling n of them shows
(n - 1) / n of the variance and a normal tail where Student's is right (expanded percentiles, Hesterberg 2015). Where a
share is exactly 0 or 1 every resample repeats it and the percentile interval would have no width: there the exact
binomial end (Clopper and Pearson 1934) for the number of patients is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from medvit.evaluation.metrics import Bools, Floats, Interval, weighted_auroc, weighted_rate

Statistic = Callable[[Floats], Floats]
"""Weights (D, n) -> values (D, ...), NaN where a draw does not define it."""

CHUNK_CELLS = 2_000_000
"""Weights held at once: 16 MB, whatever the number of draws and cases."""


@dataclass(frozen=True)
class PatientBootstrap:
    """Resampling of one set of cases. The same seed gives the same draws to every statistic.

    Attributes:
        patients: (n,) patient of each case, any values that can be sorted.
        draws: B.
        confidence: 0..1.
        seed: of the draws.
    """

    patients: npt.NDArray[np.generic]
    draws: int = 2000
    confidence: float = 0.95
    seed: int = 0

    def weights(self) -> Iterator[Floats]:
        """How often each case is drawn, in chunks (D, n); D sums to the number of draws."""
        names, index = np.unique(self.patients, return_inverse=True)
        n_patients, rng = len(names), np.random.default_rng(self.seed)
        step = max(1, CHUNK_CELLS // max(1, len(index)))
        for start in range(0, self.draws, step):
            rows = min(step, self.draws - start)
            drawn = rng.integers(n_patients, size=(rows, n_patients)) + n_patients * np.arange(rows)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=rows * n_patients).reshape(rows, n_patients)
            yield counts[:, index].astype(np.float64)

    def apply(self, statistic: Statistic) -> tuple[Floats, Floats]:
        """Point (...) with every case once, and values (draws, ...) of the resamples."""
        point = statistic(np.ones((1, len(self.patients))))[0]
        return point, np.concatenate([statistic(weights) for weights in self.weights()])

    def interval(self, statistic: Statistic) -> Interval:
        """Percentile interval of a statistic with one value per draw."""
        point, values = self.apply(statistic)
        return percentile_interval(float(point), values, self.confidence, len(np.unique(self.patients)))

    def rate(self, hits: Bools, among: Bools) -> Interval:
        """Share of `hits` (n,) among `among` (n,), with the exact end where it is 0 or 1."""
        return self._of_few(lambda weights: weighted_rate(hits, among, weights), self.count(among))

    def auroc(self, labels: Bools, scores: Floats, strata: npt.NDArray[np.generic] | None = None) -> Interval:
        """AUROC (within strata), with an exact end where it is 0 or 1.

        Perfect separation of m and n independent patients contains min(m, n) disjoint pairs, all in order: each is in
        order with probability AUROC, so the binomial end for min(m, n) is a valid, cautious one.
        """
        fewest = min(self.count(labels), self.count(~labels))
        return self._of_few(lambda weights: weighted_auroc(labels, scores, weights, strata), fewest)

    def _of_few(self, statistic: Statistic, patients: int) -> Interval:
        """Interval of a share that rests on so many patients, with an exact end where it is 0 or 1."""
        point, values = self.apply(statistic)
        interval = percentile_interval(float(point), values, self.confidence, patients)
        return exact_at_limit(interval, patients, self.confidence)

    def count(self, cases: Bools) -> int:
        """Number of patients that have one of `cases` (n,)."""
        return len(np.unique(self.patients[cases]))


def tail(confidence: float, patients: int | None) -> float:
    """Share of resampled values to leave out at each end; less for few patients, `None` takes them for many."""
    share = (1 - confidence) / 2
    if patients is None or patients < 2:
        return share
    return float(stats.norm.cdf(-math.sqrt(patients / (patients - 1)) * stats.t.isf(share, patients - 1)))


def percentile_interval(point: float, values: Floats, confidence: float, patients: int | None = None) -> Interval:
    """Interval from resampled values (draws,) of a figure that rests on so many patients.

    Undefined (NaN) values are dropped; when they are more than half, the ends are NaN. They are NaN, too, when all
    values are the same: resampling then shows nothing of the uncertainty, and no width would be a false claim. The
    interval is widened to contain the point, which can fall outside where resampling biases upward (calibration error).
    """
    defined = values[~np.isnan(values)]
    if np.isnan(point) or 2 * len(defined) < len(values) or np.ptp(defined) == 0:
        return Interval(point, np.nan, np.nan)
    share = tail(confidence, patients)
    low, high = np.quantile(defined, [share, 1 - share])
    return Interval(point, min(float(low), point), max(float(high), point))


def exact_end(patients: int, confidence: float) -> float:
    """Width of the Clopper-Pearson interval of a share that is exactly 0 or 1 in this many patients; 1 for none."""
    return float(1 - ((1 - confidence) / 2) ** (1 / patients)) if patients else 1.0


def exact_at_limit(interval: Interval, patients: int, confidence: float) -> Interval:
    """The interval itself, or with a share of exactly 0 or 1 the exact one for this many patients."""
    if interval.point not in (0.0, 1.0):
        return interval
    width = exact_end(patients, confidence)
    return Interval(interval.point, max(0.0, interval.point - width), min(1.0, interval.point + width))


def clustered_bootstrap(
    groups: npt.ArrayLike,
    statistic: Callable[[npt.NDArray[np.intp]], float],
    draws: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of any statistic of case indices, resampling whole groups (patients).

    Slower than a weighted statistic (one call per draw), and needs nothing but a function.

    Args:
        groups: (n,) patient of each case.
        statistic: takes indices (m,) of the drawn cases, repeated as often as drawn; NaN where undefined.
        draws: B.
        seed: of the draws.
        confidence: 0..1.
    """

    def of_weights(weights: Floats) -> Floats:
        return np.array([statistic(np.repeat(np.arange(len(row)), row.astype(int))) for row in weights])

    return PatientBootstrap(np.asarray(groups), draws, confidence, seed).interval(of_weights)
