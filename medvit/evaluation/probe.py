"""The plain controls that a transferability score has to beat: nearest neighbour and linear probe on frozen features.

A patient is never on both sides of a comparison. What the data do not define (fewer than two cases, classes or patients
of a class, features that are the same for all cases) is NaN, never 0. On 500 images of other kinds plain 1-NN almost
tied with the best score (PARC, Bolya et al. 2021, arXiv 2111.06977).

Shapes: N cases, D features, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medvit.evaluation.metrics import Bools, Floats, weighted_auroc
from medvit.evaluation.transfer import checked, defined

Indices = npt.NDArray[np.intp]

UNJUDGED = -1
"""Fold of cases that no probe could be trained for."""


def nearest_neighbour(features: npt.ArrayLike, labels: npt.ArrayLike, groups: npt.ArrayLike) -> float:
    """Balanced accuracy of taking the label of the nearest case of another patient, in standardised features.

    Args:
        features: (N, D).
        labels: (N,) any values.
        groups: (N,) patient of each case.

    Returns:
        0..1, chance is 1 / K; NaN where undefined, also where a class is of one patient alone: nobody else could find
        it.

    Raises:
        ValueError: shapes that do not match, or features that are not finite.
    """
    values, truth = checked(features, labels)
    if _fewest(truth, groups) < 2 or not defined(values, truth):
        return math.nan
    people = np.asarray(groups)
    standard = StandardScaler().fit_transform(values)
    distance = cdist(standard, standard)
    distance[people[:, None] == people] = np.inf
    found = truth[distance.argmin(axis=1)]
    return float(((truth & found).sum(axis=0) / truth.sum(axis=0)).mean())


@dataclass(frozen=True)
class Probe:
    """What a linear probe made of cases that it was not trained on. Q questions: the last of two classes, or each.

    Attributes:
        truth: (N, Q).
        scores: (N, Q) probabilities.
        folds: (N,) which probe judged a case, or `UNJUDGED`.
        patients: that a probe was trained on, mean over folds; NaN without any.
    """

    truth: Bools
    scores: Floats
    folds: Indices
    patients: float

    def auroc(self, weights: Floats) -> Floats:
        """AUROC of pairs within a fold, mean over questions: weights (D, N) -> (D,); NaN where no fold has a pair."""
        drawn = weights * (self.folds != UNJUDGED)
        columns = zip(self.truth.T, self.scores.T, strict=True)
        return np.asarray(np.mean([weighted_auroc(*pair, drawn, self.folds) for pair in columns], axis=0))

    @property
    def point(self) -> float:
        """`auroc` with every case once."""
        return float(self.auroc(np.ones((1, len(self.folds))))[0])


def linear_probe(
    features: npt.ArrayLike,
    labels: npt.ArrayLike,
    groups: npt.ArrayLike,
    *,
    folds: int = 5,
    share: float = 1.0,
    seed: int = 0,
) -> Probe:
    """Logistic regression on standardised features, judged on patients it was not trained on.

    Args:
        features: (N, D).
        labels: (N,) any values; of two the last in order is positive.
        groups: (N,) patient of each case.
        folds: patient-wise parts, stratified by label; fewer where a class has fewer patients.
        share: of the training patients of each fold that are trained on, 0..1; the judged ones stay the same.
        seed: of folds and shares.

    Returns:
        The probe. A fold that holds one class only has no pairs, and does not count; with one on the training side its
        cases are unjudged. With fewer than two patients of a class, all are.

    Raises:
        ValueError: shapes that do not match, features that are not finite, or no such share.
    """
    values, truth = checked(features, labels)
    people, index, K = np.asarray(groups), truth.argmax(axis=1), truth.shape[1]
    scores, where, trained = np.zeros(truth.shape), np.full(len(values), UNJUDGED, np.intp), list[int]()
    parts = min(folds, _fewest(truth, groups)) * defined(values, truth)
    splitter = StratifiedGroupKFold(max(2, parts), shuffle=True, random_state=seed)
    for number, (rest, test) in enumerate(splitter.split(values, index, people) if parts > 1 else ()):
        train = rest[nested_subsets(people[rest], index[rest], [share], seed)[0]]
        if len(set(index[train])) == K:
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
            scores[test], where[test] = model.fit(values[train], index[train]).predict_proba(values[test]), number
            trained.append(len(set(people[train])))
    asked = slice(1, 2) if K == 2 else slice(None)
    return Probe(truth[:, asked], scores[:, asked], where, float(np.mean(trained)) if trained else math.nan)


class Labelled(NamedTuple):
    """A point of a label curve: with so many labelled `patients`, mean over folds, a probe has this `auroc`."""

    patients: float
    auroc: float


def label_curve(
    features: npt.ArrayLike,
    labels: npt.ArrayLike,
    groups: npt.ArrayLike,
    shares: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    *,
    folds: int = 5,
    seed: int = 0,
) -> tuple[Labelled, ...]:
    """AUROC of the linear probe against the number of labelled patients; all points judge the same cases.

    Args and errors as `linear_probe`; one point per share of the training patients, smaller ones inside larger ones.
    """
    probes = [linear_probe(features, labels, groups, folds=folds, share=share, seed=seed) for share in shares]
    return tuple(Labelled(probe.patients, probe.point) for probe in probes)


def nested_subsets(
    groups: npt.ArrayLike, labels: npt.ArrayLike, shares: Sequence[float], seed: int = 0
) -> tuple[Indices, ...]:
    """Cases of a share of the patients, for several shares, the smaller inside the larger; a patient is in or out.

    Patients are drawn in proportion to their kinds (which labels they have), the first of each kind before all others:
    every subset has a patient of each kind, hence every class, and is never smaller than that.

    Args:
        groups: (N,) patient of each case.
        labels: (N,) any values.
        shares: of the patients, above 0, at most 1.
        seed: of the draw.

    Returns:
        Sorted indices of cases, in the order of `shares`.

    Raises:
        ValueError: shapes that do not match, or no such share.
    """
    people, truth = np.asarray(groups), np.asarray(labels)
    if people.ndim != 1 or people.shape != truth.shape:
        raise ValueError(f"groups {people.shape} and labels {truth.shape} must be two vectors of one length")
    if not all(0 < share <= 1 for share in shares):
        raise ValueError(f"shares of the patients must be above 0 and at most 1, got {list(shares)}")
    names, number = np.unique(people, return_inverse=True)
    kinds: dict[tuple[object, ...], list[int]] = {}
    for group in range(len(names)):
        kinds.setdefault(tuple(np.unique(truth[number == group]).tolist()), []).append(group)
    rng, place = np.random.default_rng(seed), np.empty(len(names))
    for members in kinds.values():
        place[rng.permutation(members)] = np.arange(len(members)) / len(members)
    order = place.argsort(kind="stable")
    counts = [max(len(kinds), round(share * len(names))) for share in shares]
    return tuple(np.flatnonzero(np.isin(number, order[:count])) for count in counts)


def _fewest(truth: Bools, groups: npt.ArrayLike) -> int:
    """Patients of the class that has the fewest."""
    people = np.asarray(groups)
    if people.shape != truth.shape[:1]:
        raise ValueError(f"there must be a group for each of {len(truth)} cases, got {people.shape}")
    return min(len(set(people[of_class])) for of_class in truth.T)
