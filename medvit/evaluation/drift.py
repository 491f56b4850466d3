"""Is this batch drawn from what the model knows? One test for a whole night of cases.

A single case can be ordinary and the batch still be shifted: a new scanner moves everybody a little. Maximum mean
discrepancy (Gretton 2012) compares the features of the batch with those of reference patients; its p-value is a
permutation test, exact for any size: how often patients that are shuffled between the two look as different. One case
per patient on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

from medvit.models.reference import Reference, one_per_patient

FEWEST = 10
"""Patients on either side below which nothing is tested: hardly any shift would show."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Of a batch against reference patients.

    Attributes:
        discrepancy: squared maximum mean discrepancy, Gaussian kernel at the median distance; its expectation is above
            0 without any shift, so it means nothing without p.
        p: share of shuffles that are as different; small: the batch is not like the reference.
        patients: of the batch; `reference` patients were compared with.
    """

    discrepancy: float
    p: float
    patients: int
    reference: int


def drift_test(
    reference: npt.NDArray[np.floating], batch: npt.NDArray[np.floating], draws: int = 2000, seed: int = 0
) -> Drift | None:
    """Compare features of a batch (N, D) with those of reference patients (M, D); one row per patient.

    Features count in standard deviations of both together: a scale of one side would tell the sides apart after any
    shuffle. None with too few patients on either side.

    Raises:
        ValueError: the two have not the same features.
    """
    if min(len(reference), len(batch)) < FEWEST:
        return None
    if reference.shape[1:] != batch.shape[1:]:
        raise ValueError(f"features of shape {reference.shape} and {batch.shape}: of the same model?")
    everybody = np.concatenate([reference, batch]).astype(np.float64)
    kernel = gaussian_kernel(everybody / np.maximum(everybody.std(axis=0), 1e-6))
    share = np.repeat([1 / len(reference), -1 / len(batch)], [len(reference), len(batch)])
    rng = np.random.default_rng(seed)
    shuffled = np.stack([rng.permutation(share) for _ in range(draws)])
    observed = share @ kernel @ share
    # a hair below: a shuffle that is the batch itself must count whatever rounding does
    as_different = np.einsum("di,di->d", shuffled @ kernel, shuffled) >= observed - 1e-12
    p = (1 + int(as_different.sum())) / (1 + draws)
    return Drift(discrepancy=float(observed), p=p, patients=len(batch), reference=len(reference))


def compare_batch(
    reference: Reference | None, features: Sequence[npt.NDArray[np.floating]], patients: Sequence[str]
) -> Drift | None:
    """Compare the features (D,) of cases, and whose they are, with the reference of their model; None as above."""
    if reference is None or not features:
        return None
    return drift_test(reference.sample, one_per_patient(np.stack(features), patients))


def gaussian_kernel(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """exp(-d² / (2 m²)) of all pairs (n, n), m the median distance of different rows; ones where all are the same."""
    squares = cdist(values, values, "sqeuclidean")
    apart = squares[np.triu_indices(len(values), 1)]
    median = float(np.median(apart))
    return np.exp(-squares / (2 * median)) if median > 0 else np.ones_like(squares)
