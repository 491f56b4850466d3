"""What a model knows: the features of its reference cases, and how far from them another case lies.

A classifier answers whatever it is shown. The distance of a case's features from those of the cases that it was made
for says when not to listen: Mahalanobis with a covariance shrunk by Ledoit and Wolf (Lee 2018), or to the nearest of
them with every feature in its own standard deviations (after Sun 2022). The threshold is a conformal quantile of
reference cases that the model did not learn from: it never moves with the cases it judges, and of cases like them at
most `share` are flagged by chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist
from sklearn.covariance import LedoitWolf

Floats = npt.NDArray[np.float64]
Kind = Literal["mahalanobis", "knn"]

KEPT = 2000
"""Features of the nearest-neighbour detector that travel in the bundle, at most."""

SAMPLED = 500
"""Patients whose features travel in the bundle for comparing whole batches with them, at most."""

FLAG = "OUT_OF_DISTRIBUTION"
"""In `Prediction.flags`: what the model says of this case should not be relied on."""


@dataclass(frozen=True)
class Reference:
    """Features that are known, and how far is too far.

    Attributes:
        kind: how distance is measured.
        mean: (D,) of the reference cases.
        precision: (D, D) inverse of their covariance; for nearest neighbours (D,) of their standard deviations.
        known: (N, D) standardised features for nearest neighbours; empty for Mahalanobis.
        threshold: a larger score is flagged; infinite where there were too few reference cases to tell.
        sample: (M, D) features, one case per patient, that a batch of new cases can be compared with
            (`medvit.evaluation.drift`). Of cases that the model did not learn from: those it learned look unlike any
            others. Empty where there are none.
    """

    kind: Kind
    mean: npt.NDArray[np.float32]
    precision: npt.NDArray[np.float32]
    known: npt.NDArray[np.float32]
    threshold: float = math.inf
    sample: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    def score(self, features: npt.NDArray[np.floating]) -> Floats:
        """Distance (N,) of features (N, D), in standard deviations (root mean square over features).

        From the middle of what is known, or from the nearest known case.
        """
        apart = np.asarray(features, np.float64) - self.mean
        if self.kind == "mahalanobis":
            square = np.einsum("nd,de,ne->n", apart, self.precision.astype(np.float64), apart, optimize=True)
            return np.asarray(np.sqrt(np.maximum(square, 0) / apart.shape[1]))
        nearest = cdist(apart * self.precision, self.known).min(axis=1)
        return np.asarray(nearest / math.sqrt(apart.shape[1]))


def know(features: npt.NDArray[np.floating], kind: Kind = "mahalanobis", seed: int = 0) -> Reference:
    """The reference of features (N, D), without a threshold.

    Raises:
        ValueError: fewer than two cases.
    """
    values = np.asarray(features, np.float64)
    if len(values) < 2:
        raise ValueError(f"a reference needs two cases or more, got {len(values)}")
    mean = values.mean(axis=0).astype(np.float32)
    if kind == "mahalanobis":
        precision = LedoitWolf().fit(values).precision_
        return Reference(kind, mean, np.asarray(precision, np.float32), np.zeros((0, 0), np.float32))
    precision = (1 / np.maximum(values.std(axis=0), 1e-6)).astype(np.float32)
    kept = values[np.random.default_rng(seed).permutation(len(values))[:KEPT]]
    return Reference(kind, mean, precision, ((kept - mean) * precision).astype(np.float32))


def one_per_patient(
    features: npt.NDArray[np.floating], patients: Sequence[str], seed: int = 0
) -> npt.NDArray[np.float32]:
    """The first case of each patient, of SAMPLED patients at most: (N, D), (N,) -> (M, D).

    Cases of one patient resemble each other: a test that counts each of them would find a shift in every batch.
    """
    _, first = np.unique(np.asarray(patients, dtype=str), return_index=True)
    chosen = np.random.default_rng(seed).permutation(np.sort(first))[:SAMPLED]
    return np.asarray(features[chosen], np.float32)


def conformal_threshold(scores: npt.ArrayLike, share: float = 0.05) -> float:
    """The score that at most `share` of further cases like these exceed; infinite with too few to tell (under 1/share).

    Args:
        scores: (n,) of reference cases that the model and its reference did not learn from.
        share: 0..1.
    """
    ordered = np.sort(np.asarray(scores, np.float64))
    rank = math.ceil((len(ordered) + 1) * (1 - share))  # Vovk 2005: the next case is at any rank with equal chance
    return float(ordered[rank - 1]) if rank <= len(ordered) else math.inf
