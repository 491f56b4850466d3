"""Do the probabilities mean what they say? Slope and intercept, and the one number that mends a network's confidence.

Slope and intercept are of a logistic regression of the outcome on the logit of the probability (Cox 1958): a slope
below 1 says that the model is too sure of itself, an intercept (at slope 1: calibration in the large) above 0 that it
expects too few findings. Temperature scaling (Guo 2017) divides all logits by one number: ranking and AUROC stay, and
only validation cases may decide it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from medvit.evaluation.metrics import Bools, Floats

CLIP = 1e-6
"""Probabilities of 0 and 1 have no logit: they count as this far from them."""

STEPS = 25
"""Of Newton's method, at most; it takes five or six."""

TEMPERATURES = (0.05, 20.0)
PRIOR = 1.0
"""Standard deviation of the log temperature before any case is seen: few cases, however well told apart, say little."""


def weighted_slope(labels: Bools, probabilities: Floats, weights: Floats) -> Floats:
    """Calibration slope of each draw: (n,), (n,), (D, n) -> (D,); NaN of one class, or where a threshold parts them."""
    logit = _logit(probabilities)
    (lowest, highest), (least, most) = (_ends(logit, weights * cell) for cell in (labels, ~labels))
    both = np.isfinite(lowest) & np.isfinite(least)
    apart = (highest <= least) | (most <= lowest)  # the steeper, the likelier, without end
    slope = _newton(np.stack([np.ones_like(logit), logit]), labels, weights, np.zeros_like(logit))[:, 1]
    return np.where(both & ~apart, slope, np.nan)


def weighted_intercept(labels: Bools, probabilities: Floats, weights: Floats) -> Floats:
    """Calibration intercept at slope 1 of each draw: (n,), (n,), (D, n) -> (D,); NaN of one class."""
    logit = _logit(probabilities)
    both = (weights @ labels > 0) & (weights @ ~labels > 0)
    return np.where(both, _newton(np.ones((1, len(logit))), labels, weights, logit)[:, 0], np.nan)


def _logit(probabilities: Floats) -> Floats:
    return np.asarray(special.logit(np.clip(probabilities, CLIP, 1 - CLIP)))


def _ends(values: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Smallest and largest value that each draw holds: (n,), (D, n) -> two (D,), infinite where it holds none."""
    drawn = weights > 0
    return np.where(drawn, values, np.inf).min(axis=1), np.where(drawn, values, -np.inf).max(axis=1)


def _newton(inputs: Floats, truth: Bools, weights: Floats, offset: Floats) -> Floats:
    """Weighted logistic regressions: inputs (P, n), weights (D, n) -> coefficients (D, P), all draws at once."""
    products = inputs[:, None] * inputs[None]  # (P, P, n)
    found = np.zeros((len(weights), len(inputs)))
    for _ in range(STEPS):
        expected = special.expit(found @ inputs + offset)  # (D, n)
        gradient = (weights * (truth - expected)) @ inputs.T
        curvature = np.einsum("dn,pqn->dpq", weights * expected * (1 - expected), products, optimize=True)
        with np.errstate(all="ignore"):
            step = _solve(curvature, gradient)
        found = found + np.clip(step, -2, 2)
        if np.nanmax(np.abs(step), initial=0.0) < 1e-9:
            break
    return found


def _solve(matrix: Floats, right: Floats) -> Floats:
    """(D, P, P) and (D, P) for P of one or two: NaN where there is no solution."""
    if right.shape[1] == 1:
        return np.asarray(np.where(matrix[:, 0] > 0, right / matrix[:, 0], np.nan))
    (a, b), (c, d) = matrix.transpose(1, 2, 0)
    determinant = a * d - b * c
    solution = np.stack([d * right[:, 0] - b * right[:, 1], a * right[:, 1] - c * right[:, 0]], axis=1)
    return np.where(determinant[:, None] > 1e-12 * np.abs(a * d)[:, None], solution / determinant[:, None], np.nan)


def fit_temperature(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """The likeliest temperature. Give it validation cases, never those reported.

    Args:
        labels: (n,) class index, 0..K-1.
        probabilities: (n, K) at temperature 1.

    Returns:
        What to divide logits by, 0.05..20: above 1 the model was too sure. 1 where there is only one class.
    """
    index, matrix = np.asarray(labels, dtype=np.intp), np.asarray(probabilities, dtype=np.float64)
    if len(np.unique(index)) < 2:
        return 1.0
    logits = np.log(np.clip(matrix, CLIP, 1))

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        losses = special.logsumexp(scaled, axis=1) - scaled[np.arange(len(index)), index]
        return float(losses.sum() + (log_temperature / PRIOR) ** 2 / 2)

    low, high = np.log(TEMPERATURES)
    return float(np.exp(optimize.minimize_scalar(loss, bounds=(low, high), method="bounded").x))
