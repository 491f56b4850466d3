"""Candidate weights in an order: what each sees in the labelled cases, how well that suits the labels, and how sure.

The order is that of the linear probe, which is closest to what training does and has an interval; the closed formulas
stand beside it. The control is the same architecture with random weights, on the same folds, so that the gain over it
has an interval of its own, much narrower than that of either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from medvit.config import EvaluationConfig
from medvit.evaluation.bootstrap import PatientBootstrap, exact_at_limit
from medvit.evaluation.candidates import Sight
from medvit.evaluation.metrics import Interval
from medvit.evaluation.plain import without_nan
from medvit.evaluation.probe import Labelled, Probe, label_curve, linear_probe, nearest_neighbour
from medvit.evaluation.transfer import h_score, leep, logme, normalised_gain
from medvit.objectives.discrepancy import has_estimate, mmd2

Names = npt.NDArray[np.str_]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One candidate. A figure that is undefined, or does not apply, is NaN.

    Attributes:
        weights: its name.
        auroc: of the linear probe, within folds; macro for more than two classes.
        gain: its AUROC less that of random weights, on the same folds and draws.
        normalised_gain: share of what random weights leave to be gained.
        nearest_neighbour: balanced accuracy.
        logme: nats per case; `leep` too, where the weights bring a classifier.
        h_score: 0 to K - 1.
        site_distance: largest unbiased squared MMD of two sites, around 0 where they look alike.
        sites: which two; empty with one site.
    """

    weights: str
    auroc: Interval
    gain: Interval
    normalised_gain: float
    nearest_neighbour: float
    logme: float
    h_score: float
    leep: float
    site_distance: float
    sites: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """All candidates, best first, and the label curve of the first.

    Attributes:
        standings: by AUROC of the linear probe.
        label_curve: of the first: patients that the probe was trained on, and AUROC.
        cases: labelled; `patients` have them.
        classes: in order.
        confidence: of all intervals.
    """

    standings: tuple[Standing, ...]
    label_curve: tuple[Labelled, ...]
    cases: int
    patients: int
    classes: tuple[str, ...]
    confidence: float

    def to_document(self) -> dict[str, Any]:
        """For JSON: undefined is null."""
        content = asdict(self) | {"label_curve": [point._asdict() for point in self.label_curve]}
        document: dict[str, Any] = without_nan({"ranked_by": "auroc of the linear probe"} | content)
        return document


def rank(
    sights: Mapping[str, Sight],
    scratch: str,
    labels: Names,
    groups: Names,
    sites: Names,
    settings: EvaluationConfig,
) -> Ranking:
    """Put candidates in order.

    Args:
        sights: name -> what it sees in N cases.
        scratch: which of them has random weights.
        labels: (N,).
        groups: (N,) patient of each case.
        sites: (N,), empty where unknown.
        settings: draws and confidence of intervals.
    """
    bootstrap = PatientBootstrap(groups, settings.bootstrap, settings.confidence)
    probes = {name: linear_probe(sight.features, labels, groups) for name, sight in sights.items()}
    standings = [_stand(name, sights[name], probes, scratch, labels, sites, bootstrap) for name in sights]
    standings.sort(key=lambda one: -np.nan_to_num(one.auroc.point, nan=-1.0))
    return Ranking(
        standings=tuple(standings),
        label_curve=label_curve(sights[standings[0].weights].features, labels, groups),
        cases=len(labels),
        patients=len(np.unique(groups)),
        classes=tuple(np.unique(labels).tolist()),
        confidence=settings.confidence,
    )


def _stand(
    name: str,
    sight: Sight,
    probes: Mapping[str, Probe],
    scratch: str,
    labels: Names,
    sites: Names,
    bootstrap: PatientBootstrap,
) -> Standing:
    probe, control = probes[name], probes[scratch]
    fewest = min(bootstrap.count(labels == label) for label in np.unique(labels))
    auroc = exact_at_limit(bootstrap.interval(probe.auroc), fewest, bootstrap.confidence)
    apart, which = site_distance(sight.features, sites)
    return Standing(
        weights=name,
        auroc=auroc,
        gain=bootstrap.interval(lambda weights: probe.auroc(weights) - control.auroc(weights)),
        normalised_gain=normalised_gain(probe.point, control.point),
        nearest_neighbour=nearest_neighbour(sight.features, labels, bootstrap.patients),
        logme=logme(sight.features, labels),
        h_score=h_score(sight.features, labels),
        leep=math.nan if sight.source is None else leep(sight.source, labels),
        site_distance=apart,
        sites=which,
    )


def site_distance(features: npt.NDArray[np.float32], sites: Names) -> tuple[float, tuple[str, ...]]:
    """Largest unbiased squared MMD of the features (N, D) of two sites, and which two; NaN and none without two sites.

    Sites of one case have no estimate. Unbiased, so that the site with the fewest cases does not look the most distant.
    """
    of_site = {str(name): torch.as_tensor(features[sites == name]) for name in np.unique(sites) if name}
    found = {
        (one, other): float(mmd2(of_site[one], of_site[other], unbiased=True))
        for one, other in combinations(of_site, 2)
        if has_estimate(len(of_site[one]), len(of_site[other]), unbiased=True)
    }
    if not found:
        return math.nan, ()
    farthest = max(found, key=lambda pair: found[pair])
    return found[farthest], farthest
