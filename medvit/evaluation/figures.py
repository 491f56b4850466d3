"""The figures of all cases together, each with its interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from medvit.evaluation.bootstrap import PatientBootstrap, exact_at_limit, percentile_interval
from medvit.evaluation.calibration import weighted_intercept, weighted_slope
from medvit.evaluation.groups import Question
from medvit.evaluation.metrics import (
    Floats,
    Interval,
    weighted_auroc,
    weighted_average_precision,
    weighted_brier,
    weighted_ece,
    weighted_rate,
    weighted_sensitivity_at,
)
from medvit.evaluation.predictions import OneVsRest

FIGURES: dict[str, Callable[[Question, Floats], Floats]] = {
    "auroc": lambda one, weights: weighted_auroc(one.truth, one.score, weights),
    "average_precision": lambda one, weights: weighted_average_precision(one.truth, one.score, weights),
    "sensitivity": lambda one, weights: weighted_rate(one.called, one.truth, weights),
    "specificity": lambda one, weights: weighted_rate(~one.called, ~one.truth, weights),
    "sensitivity_at_90_specificity": lambda one, weights: weighted_sensitivity_at(one.truth, one.score, weights, 0.9),
    "brier": lambda one, weights: weighted_brier(one.truth, one.score, weights),
    "ece": lambda one, weights: weighted_ece(one.truth, one.score, weights),
    "calibration_slope": lambda one, weights: weighted_slope(one.truth, one.score, weights),
    "calibration_intercept": lambda one, weights: weighted_intercept(one.truth, one.score, weights),
}
"""Name -> question (n,), weights (D, n) -> (D,)."""


def measure_figures(view: OneVsRest, bootstrap: PatientBootstrap) -> dict[str, Interval]:
    """Mean over the C one-vs-rest questions of every figure in FIGURES."""
    names = list(FIGURES)
    points, draws = bootstrap.apply(lambda weights: mean_figures(view, names, weights))
    rest_on = patients_behind(view, bootstrap)
    exact = {name: rest_on[name] for name in ("auroc", "sensitivity", "specificity")}
    intervals = {
        name: percentile_interval(float(points[i]), draws[:, i], bootstrap.confidence, rest_on[name])
        for i, name in enumerate(names)
    }
    return intervals | {k: exact_at_limit(intervals[k], n, bootstrap.confidence) for k, n in exact.items()}


def patients_behind(view: OneVsRest, bootstrap: PatientBootstrap) -> dict[str, int]:
    """On how many patients each of FIGURES rests: those with the rarer answer, or with the one that it is about."""
    positive = min(bootstrap.count(truth) for truth in view.truth.T)
    negative = min(bootstrap.count(~truth) for truth in view.truth.T)
    fewest = min(positive, negative)
    return dict.fromkeys(FIGURES, fewest) | {"sensitivity": positive, "specificity": negative}


def mean_figures(view: OneVsRest, names: Sequence[str], weights: Floats) -> Floats:
    """Means over questions of some of FIGURES: weights (D, n) -> (D, len(names))."""
    questions = [Question(*columns) for columns in zip(view.truth.T, view.called.T, view.score.T, strict=True)]
    values = [[FIGURES[name](question, weights) for question in questions] for name in names]
    return np.asarray(np.mean(values, axis=1).T)


def auroc_within_folds(frame: pd.DataFrame, view: OneVsRest, bootstrap: PatientBootstrap) -> Interval | None:
    """AUROC from pairs of one fold only; None without folds."""
    if "fold" not in frame or frame["fold"].nunique() < 2:
        return None
    folds = frame["fold"].to_numpy(dtype=str)

    def mean(weights: Floats) -> Floats:
        columns = zip(view.truth.T, view.score.T, strict=True)
        values = [weighted_auroc(truth, score, weights, folds) for truth, score in columns]
        return np.asarray(np.mean(values, axis=0))

    return bootstrap.interval(mean)
