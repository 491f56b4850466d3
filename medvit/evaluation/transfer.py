"""How well features of a pretrained model suit a task, by formulas, before anything is trained.

None of them predicts fine-tuned results reliably on medical images (Chaves et al. 2023, arXiv 2308.07444): a score is
advice, what was gained over random weights says more than the score itself, and the plain controls of
`medvit.evaluation.probe` stand beside it. Distances between sites are `medvit.objectives.discrepancy.mmd2`. Correlation
of the features of unpaired cases means nothing, and is not offered.

Shapes: N cases, D features, K classes, Z classes of the source model. Everything is computed in float64. What the data
do not define (fewer than two cases or classes, features that are the same for all cases) is NaN, never 0.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from sklearn.covariance import ledoit_wolf

from medvit.evaluation.metrics import Bools, Floats, divide

EVIDENCE_STEPS = 11
"""Of LogME's fixed point at most; it ends before, where the ratio of the two precisions moves by less than 1 %."""

TINY = 1e-12
"""What stands in for a squared length or a number of free cases that is exactly 0."""


def logme(features: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Logarithm of the evidence per case that a Bayesian linear model gives the labels, mean over one-vs-rest labels.

    You et al. 2021 (arXiv 2102.11005): the precisions of weights and noise are those of largest evidence, found by
    fixed-point iteration. Comparable between models on the same cases only.

    Args:
        features: (N, D).
        labels: (N,) any values.

    Returns:
        Nats per case, any sign, higher is better; NaN where undefined.

    Raises:
        ValueError: shapes that do not match, or features that are not finite.
    """
    values, truth = checked(features, labels)
    if not defined(values, truth):
        return math.nan
    axes, lengths, _ = np.linalg.svd(values, full_matrices=False)
    return float(np.mean([_evidence(axes, lengths**2, target) for target in truth.T.astype(np.float64)]))


def _evidence(axes: Floats, squared: Floats, target: Floats) -> float:
    """Log evidence per case of (N,) targets, from left singular vectors (N, R) and squared singular values (R,)."""
    N, along = len(target), axes.T @ target
    outside = max(0.0, float(target @ target - along @ along))  # of the span of the features

    def lengths(alpha: float, beta: float) -> tuple[float, float]:
        """||m||² of the weights, and ||F m - y||²."""
        shrunk = alpha + beta * squared
        weights = squared * (beta * along / shrunk) ** 2
        return float(weights.sum()), outside + float(((along * alpha / shrunk) ** 2).sum())

    alpha = beta = 1.0
    for _ in range(EVIDENCE_STEPS):
        weight, residual = lengths(alpha, beta)
        free = float((beta * squared / (alpha + beta * squared)).sum())  # gamma: weights that the data determine
        before = alpha / beta
        alpha, beta = free / max(weight, TINY), max(N - free, TINY) / max(residual, TINY)
        if abs(alpha / beta - before) <= 0.01 * before:
            break
    weight, residual = lengths(alpha, beta)
    # (D/2) log alpha - 1/2 sum log(alpha + beta sigma²): dimensions without spread cancel
    spread = N * math.log(beta / (2 * math.pi)) - float(np.log1p(beta * squared / alpha).sum())
    return (spread - beta * residual - alpha * weight) / (2 * N)


def h_score(features: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Spread of the class means, in units of the spread of the features: tr(cov^-1 (1 - a) cov(class means)).

    Bao et al. 2019 (H-score), with the covariance shrunk by a of Ledoit and Wolf, without which it is noise for fewer
    cases than some ten times the features (Ibrahim et al. 2021, arXiv 2110.06893).

    Args:
        features: (N, D).
        labels: (N,) any values.

    Returns:
        0 (classes alike) to K - 1, higher is better; NaN where undefined.

    Raises:
        ValueError: shapes that do not match, or features that are not finite.
    """
    values, truth = checked(features, labels)
    if not defined(values, truth):
        return math.nan
    centred = values - values.mean(axis=0)
    covariance, shrinkage = ledoit_wolf(centred, assume_centered=True)
    shares, means = truth.mean(axis=0), (truth.T @ centred) / truth.sum(axis=0)[:, None]  # (K,), (K, D)
    return float((1 - shrinkage) * (shares * (means * np.linalg.solve(covariance, means.T).T).sum(axis=1)).sum())


def leep(probabilities: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Mean log likelihood of the labels, predicted from the classes of the source model alone.

    Nguyen et al. 2020 (arXiv 2002.12462): mean of log sum_z P(y | z) p(z) with P(y | z) counted on the same cases. A
    source class that no case belongs to tells nothing, and counts for nothing.

    Args:
        probabilities: (N, Z) that the source model gives its own classes.
        labels: (N,) any values.

    Returns:
        Nats per case, at most 0, higher is better; NaN where undefined.

    Raises:
        ValueError: shapes that do not match, or rows that are no probabilities.
    """
    source, truth = checked(probabilities, labels)
    if (source < 0).any() or not np.allclose(source.sum(axis=1), 1, atol=1e-4):
        raise ValueError("source probabilities must not be negative, and those of a case must sum to 1")
    if len(source) < 2 or truth.shape[1] < 2:
        return math.nan
    joint = truth.T @ source  # (K, Z), N times P(y, z)
    given = np.nan_to_num(divide(joint, np.broadcast_to(source.sum(axis=0), joint.shape)))  # P(y | z)
    likelihood = (truth * (source @ given.T)).sum(axis=1)
    return float(np.log(likelihood).mean())


def gain(score: float, scratch: float) -> float:
    """What a model has over the same from random weights, in units of the score."""
    return score - scratch


def normalised_gain(score: float, scratch: float) -> float:
    """Share of what random weights leave to be gained: 1 is all, 0 nothing, below 0 a loss.

    Args:
        score: of a figure whose best value is 1.
        scratch: of the same from random weights; NaN results where it is 1, for nothing is left to gain.
    """
    return math.nan if scratch == 1 else gain(score, scratch) / (1 - scratch)


def checked(features: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Floats, Bools]:
    """Features (N, D) in float64, and labels one-hot (N, K), classes in order.

    Raises:
        ValueError: shapes that do not match, no case, or features that are not finite.
    """
    values, named = np.asarray(features, dtype=np.float64), np.asarray(labels)
    if values.ndim != 2 or named.shape != values.shape[:1] or not values.size:
        raise ValueError(f"features must be (N, D) and labels (N,), none empty, got {values.shape} and {named.shape}")
    if not np.isfinite(values).all():
        raise ValueError("features must be finite")
    return values, named[:, None] == np.unique(named)


def defined(values: Floats, truth: Bools) -> bool:
    """Whether there is something to tell apart, and something to tell it by."""
    return truth.shape[1] > 1 and bool((values != values[0]).any())
