"""How well features of a pretrained model suit a task, told from the features alone, before anything is trained.

LogME, H-score and LEEP are closed formulas; nearest neighbour and linear probe are the plain controls that they have to
beat. None predicts fine-tuned results reliably on medical images (Chaves et al. 2023, arXiv 2308.07444): a score is
advice, what was gained over random weights says more than the score itself, and a difference within the interval says
nothing. Distances between sites are `medvit.objectives.discrepancy.mmd2`. Correlation of the features of unpaired cases
means nothing, and is not offered.

Shapes: N cases, D features, K classes, Z classes of the source model. Everything is computed in float64. A patient is
never on both sides of a comparison. What the data do not define (fewer than two cases or classes, features that are
the same for all cases) is NaN, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medvit.evaluation.metrics import Bools, Floats, divide, weighted_auroc

Indices = npt.NDArray[np.intp]

EVIDENCE_STEPS = 11
"""Of LogME's fixed point at most; it ends before, where the ratio of the two precisions moves by less than 1 %."""

TINY = 1e-12
"""What stands in for a squared length or a number of free cases that is exactly 0."""

UNJUDGED = -1
"""Fold of cases that no probe could be trained for."""


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
    values, truth = _checked(features, labels)
    if not _defined(values, truth):
        return math.nan
    axes, lengths, _ = np.linalg.svd(values, full_matrices=False)
    return float(np.mean([_evidence(axes, lengths**2, target) for target in truth.T.astype(np.float64)]))


def _evidence(axes: Floats, squared: Floats, target: Floats) -> float:
    """Log evidence per case of (N,) targets, from left singular vectors (N, R) and squared singular values (R,)."""
    N, along = len(target), axes.T @ target
    outside = max(0.0, float(target @ target - along @ along))  # of the span of the features
    alpha = beta = 1.0
    for _ in range(EVIDENCE_STEPS):
        shrunk = alpha + beta * squared
        free = float((beta * squared / shrunk).sum())  # gamma, the number of determined weights
        weight = float((squared * (beta * along / shrunk) ** 2).sum())  # ||m||²
        residual = outside + float(((along * alpha / shrunk) ** 2).sum())  # ||F m - y||²
        before, alpha = alpha / beta, free / max(weight, TINY)
        beta = max(N - free, TINY) / max(residual, TINY)
        if abs(alpha / beta - before) <= 0.01 * before:
            break
    shrunk = alpha + beta * squared
    weight = float((squared * (beta * along / shrunk) ** 2).sum())
    residual = outside + float(((along * alpha / shrunk) ** 2).sum())
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
    values, truth = _checked(features, labels)
    if not _defined(values, truth):
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
    source, truth = _checked(probabilities, labels)
    if (source < 0).any() or not np.allclose(source.sum(axis=1), 1, atol=1e-4):
        raise ValueError("source probabilities must not be negative, and those of a case must sum to 1")
    if len(source) < 2 or truth.shape[1] < 2:
        return math.nan
    joint = truth.T @ source  # (K, Z), N times P(y, z)
    given = np.nan_to_num(divide(joint, np.broadcast_to(source.sum(axis=0), joint.shape)))  # P(y | z)
    likelihood = (truth * (source @ given.T)).sum(axis=1)
    return float(np.log(likelihood).mean())


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
    values, truth = _checked(features, labels, groups)
    if not _defined(values, truth) or _fewest(truth, groups) < 2:
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
    values, truth = _checked(features, labels, groups)
    people, index, K = np.asarray(groups), truth.argmax(axis=1), truth.shape[1]
    scores, where, trained = np.zeros(truth.shape), np.full(len(values), UNJUDGED, np.intp), list[int]()
    parts = min(folds, _fewest(truth, groups)) if _defined(values, truth) else 0
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


def _checked(
    features: npt.ArrayLike, labels: npt.ArrayLike, groups: npt.ArrayLike | None = None
) -> tuple[Floats, Bools]:
    """Features (N, D) in float64, and labels one-hot (N, K), classes in order."""
    values, named = np.asarray(features, dtype=np.float64), np.asarray(labels)
    if values.ndim != 2 or named.shape != values.shape[:1] or not values.size:
        raise ValueError(f"features must be (N, D) and labels (N,), none empty, got {values.shape} and {named.shape}")
    if groups is not None and np.shape(groups) != named.shape:
        raise ValueError(f"there must be a group for each of {len(named)} cases, got {np.shape(groups)}")
    if not np.isfinite(values).all():
        raise ValueError("features must be finite")
    return values, named[:, None] == np.unique(named)


def _defined(values: Floats, truth: Bools) -> bool:
    """Whether there is something to tell apart, and something to tell it by."""
    return truth.shape[1] > 1 and bool((values != values[0]).any())


def _fewest(truth: Bools, groups: npt.ArrayLike) -> int:
    """Patients of the class that has the fewest."""
    people = np.asarray(groups)
    return min(len(set(people[of_class])) for of_class in truth.T)
