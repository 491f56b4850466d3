"""Figures of merit: AUROC, average precision, Brier score, calibration error, rates, and the operating point.

Every figure is written once, as a function of case weights (D, n): weights of one give the point, the patient bootstrap
gives the interval, thousands of draws at a time. scikit-learn computes the same points one draw at a time and is the
oracle in the tests. A figure that the data do not define (one class only, empty cell) is NaN, never 0.

All functions are binary; `macro` figures of K > 2 classes are means of the one-vs-rest figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Interval:
    """A figure with the ends of its confidence interval; NaN where the data do not define it."""

    point: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.point):
            return "undefined"
        if math.isnan(self.low) or math.isnan(self.high):
            return f"{self.point:.2f} [undefined]"
        return f"{self.point:.2f} [{self.low:.2f}, {self.high:.2f}]"

    @property
    def half_width(self) -> float:
        """Half of high - low: a difference much smaller than this could not have been seen."""
        return (self.high - self.low) / 2


UNDEFINED = Interval(math.nan, math.nan, math.nan)


def divide(numerator: Floats, denominator: Floats) -> Floats:
    """Elementwise quotient, NaN where the denominator is 0."""
    quotient = np.full(np.shape(denominator), np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator != 0)
    return quotient


def auroc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Probability that a positive case scores higher than a negative one, ties counting half; NaN with one class only.

    Args:
        labels: (n,) 0/1 or bool.
        scores: (n,) higher means more positive.
    """
    truth, values = _aligned(labels, scores)
    return float(weighted_auroc(truth, values, np.ones((1, len(truth))))[0])


def auroc_within(labels: npt.ArrayLike, scores: npt.ArrayLike, strata: npt.ArrayLike) -> float:
    """AUROC from pairs of the same stratum only: the mean over strata, weighted by their positive-negative pairs.

    With folds as strata it compares scores of one model at a time; with sites as strata, knowing the site is no help.

    Args:
        labels: (n,) 0/1 or bool.
        scores: (n,) higher means more positive.
        strata: (n,) fold, site, sex; strata with one class only hold no pair and do not count.
    """
    truth, values = _aligned(labels, scores)
    return float(weighted_auroc(truth, values, np.ones((1, len(truth))), np.asarray(strata))[0])


def macro_auroc(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Mean one-vs-rest AUROC; for two classes the AUROC of the last. NaN when one of the classes has no case.

    Args:
        labels: (n,) class index, 0..K-1.
        probabilities: (n, K).
    """
    index, matrix = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    classes = range(matrix.shape[1]) if matrix.shape[1] > 2 else [1]
    return float(np.mean([auroc(index == k, matrix[:, k]) for k in classes]))


def average_precision(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Mean precision over recall steps (area under the precision-recall steps); NaN without positives."""
    truth, values = _aligned(labels, scores)
    return float(weighted_average_precision(truth, values, np.ones((1, len(truth))))[0])


def brier(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Mean squared difference between probability (n,) and outcome 0/1: 0 is perfect, 0.25 is always saying 0.5."""
    truth, values = _aligned(labels, probabilities)
    return float(weighted_brier(truth, values, np.ones((1, len(truth))))[0])


def ece(labels: npt.ArrayLike, probabilities: npt.ArrayLike, bins: int = 10) -> float:
    """Expected calibration error: mean over cases of |observed share - mean probability| of the case's bin.

    Args:
        labels: (n,) 0/1 or bool.
        probabilities: (n,) 0..1.
        bins: of equal width; the last includes 1.
    """
    truth, values = _aligned(labels, probabilities)
    return float(weighted_ece(truth, values, np.ones((1, len(truth))), bins)[0])


def operating_point(labels: npt.ArrayLike, scores: npt.ArrayLike, sensitivity: float | None = None) -> float:
    """Threshold t for "positive when score >= t". Give it validation data: never the cases the report is about.

    It lies halfway between neighbouring distinct scores (below the lowest: halfway to 0), so that a tiny numeric change
    flips no case. Tied scores are never separated. Equal Youden's J: the lowest threshold, because a miss costs more.

    Args:
        labels: (n,) 0/1 or bool.
        scores: (n,) probabilities 0..1.
        sensitivity: 0..1: the highest threshold with at least this sensitivity; None: largest Youden's J, TPR - FPR.

    Raises:
        ValueError: one class only, or labels and scores that do not match.
    """
    truth, values = _aligned(labels, scores)
    if truth.all() or not truth.any():
        raise ValueError(f"an operating point needs cases of both classes, got {truth.sum()} positives of {len(truth)}")
    distinct, index = np.unique(values, return_inverse=True)
    thresholds = (np.append(0.0, distinct[:-1]) + distinct) / 2
    # number of positives, negatives at or above each distinct score
    above = [np.bincount(index[mask], minlength=len(distinct))[::-1].cumsum()[::-1] for mask in (truth, ~truth)]
    tpr, fpr = above[0] / truth.sum(), above[1] / (~truth).sum()
    if sensitivity is None:
        return float(thresholds[np.argmax(tpr - fpr)])
    return float(thresholds[np.flatnonzero(tpr >= sensitivity)[-1]])


def weighted_auroc(
    labels: Bools, scores: Floats, weights: Floats, strata: npt.NDArray[np.generic] | None = None
) -> Floats:
    """AUROC of each draw: (n,), (n,), (D, n) -> (D,). `strata` (n,): pairs within a stratum only; None: all pairs."""
    groups = [np.ones(len(labels), dtype=bool)] if strata is None else [strata == name for name in np.unique(strata)]
    wins, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for mask in groups:
        positive, negative = tied(labels[mask], scores[mask], weights[:, mask])
        below = negative.cumsum(axis=1) - negative
        wins += (positive * (below + negative / 2)).sum(axis=1)
        pairs += positive.sum(axis=1) * negative.sum(axis=1)
    return divide(wins, pairs)


def weighted_average_precision(labels: Bools, scores: Floats, weights: Floats) -> Floats:
    """Average precision of each draw: (n,), (n,), (D, n) -> (D,)."""
    positive, negative = tied(labels, -scores, weights)
    precision = divide(positive.cumsum(axis=1), (positive + negative).cumsum(axis=1))
    # a leading score that was not drawn has neither precision nor weight
    return divide((positive * np.nan_to_num(precision)).sum(axis=1), positive.sum(axis=1))


def weighted_brier(labels: Bools, probabilities: Floats, weights: Floats) -> Floats:
    """Brier score of each draw: (n,), (n,), (D, n) -> (D,)."""
    return divide(weights @ (probabilities - labels) ** 2, weights.sum(axis=1))


def weighted_ece(labels: Bools, probabilities: Floats, weights: Floats, bins: int = 10) -> Floats:
    """Expected calibration error of each draw: (n,), (n,), (D, n) -> (D,)."""
    index = np.minimum((probabilities * bins).astype(int), bins - 1)
    excess = (index[:, None] == np.arange(bins)) * (labels - probabilities)[:, None]  # (n, bins)
    return divide(np.abs(weights @ excess).sum(axis=1), weights.sum(axis=1))


def weighted_sensitivity_at(labels: Bools, scores: Floats, weights: Floats, specificity: float = 0.9) -> Floats:
    """Largest sensitivity of any threshold with at least this specificity: (n,), (n,), (D, n) -> (D,).

    The threshold is the best one for these very cases: a summary of the ROC curve, not an operating point.
    """
    positive, negative = tied(labels, -scores, weights)
    alarms = divide(negative.cumsum(axis=1), np.broadcast_to(negative.sum(axis=1, keepdims=True), negative.shape))
    found = divide(positive.cumsum(axis=1), np.broadcast_to(positive.sum(axis=1, keepdims=True), positive.shape))
    allowed = alarms <= 1 - specificity + 1e-12
    best = np.where(allowed, found, 0.0).max(axis=1, initial=0.0)
    return np.where(np.isnan(alarms[:, -1:] + found[:, -1:]).any(axis=1), np.nan, best)


def weighted_rate(hits: Bools, among: Bools, weights: Floats) -> Floats:
    """Share of `hits` among `among` in each draw: (n,), (n,), (D, n) -> (D,); NaN where nothing is among."""
    return divide(weights @ (hits & among), weights @ among.astype(np.float64))


def tied(labels: Bools, scores: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Weight of positives and of negatives at each distinct score, ascending: two (D, distinct scores)."""
    if not len(scores):
        return np.zeros((len(weights), 0)), np.zeros((len(weights), 0))
    order = np.argsort(scores, kind="stable")
    ranked, truth, drawn = scores[order], labels[order], weights[:, order]
    starts = np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1]))
    if len(starts) == len(scores):
        return drawn * truth, drawn * ~truth
    return np.add.reduceat(drawn * truth, starts, axis=1), np.add.reduceat(drawn * ~truth, starts, axis=1)


def _aligned(labels: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[Bools, Floats]:
    truth, values = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=np.float64)
    if truth.ndim != 1 or truth.shape != values.shape:
        raise ValueError(f"labels {truth.shape} and scores {values.shape} must be two vectors of one length")
    return truth, values
