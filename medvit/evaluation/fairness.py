"""Fairness by one attribute (site, sex, age band, any): rates of each group, gaps between groups, a verdict.

Equalized odds (Hardt 2016): true and false positive rates do not depend on the group. The difference is
max(|dTPR|, |dFPR|) over pairs of groups, fairlearn's worst case; the mean form is (|dTPR| + |dFPR|) / 2.

The largest of several noisy gaps is too large on average: its interval is a simultaneous one, see
`medvit.evaluation.gaps`.

Not here yet: permutation test, crossed attributes, demographic parity, calibration by group, correction for the number
of attributes looked at. A gap is a fact about these cases: it does not say why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from medvit.config import EvaluationConfig
from medvit.evaluation.bootstrap import PatientBootstrap, exact_at_limit, exact_end, percentile_interval
from medvit.evaluation.gaps import Gaps, Method, spread
from medvit.evaluation.metrics import Bools, Floats, Interval, divide, weighted_auroc, weighted_rate
from medvit.evaluation.predictions import one_vs_rest

Verdict = Literal["met", "not met", "cannot tell"]
NOT_GIVEN, EVERYONE = "not given", "all"
FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class Group:
    """One row of a fairness table; NaN where a cell is empty.

    Attributes:
        positives: cases of the positive class; `positive_patients` have one.
        tpr: true positive rate, sensitivity.
        fpr: false positive rate, 1 - specificity.
        small: fewer than `min_cell` patients with or without the finding: too few to read a rate from.
    """

    name: str
    patients: int
    cases: int
    positives: int
    negatives: int
    positive_patients: int
    negative_patients: int
    prevalence: Interval
    tpr: Interval
    fpr: Interval
    auroc: Interval
    small: bool


@dataclass(frozen=True, kw_only=True)
class FairnessTable:
    """Fairness of one class by one attribute. Gaps compare the named groups; "not given" has a row, and no gap.

    Attributes:
        positive: the class asked about; `groups` are sorted by name, "not given" last; `overall` is all cases.
        tpr_gap: largest difference of true positive rates between groups; likewise `fpr_gap`, `auroc_gap`. An equal
            AUROC can hide harm at the operating point: over- and under-diagnosis cancel in it.
        equalized_odds: max(tpr_gap, fpr_gap); `equalized_odds_mean` is their mean.
        auroc_within: AUROC from pairs within a group only.
        auroc_alone: AUROC of the attribute itself as predictor of the label, `auroc_of_attribute`.
    """

    attribute: str
    positive: str
    groups: tuple[Group, ...]
    overall: Group
    tpr_gap: Interval
    fpr_gap: Interval
    auroc_gap: Interval
    equalized_odds: Interval
    equalized_odds_mean: Interval
    auroc_within: Interval
    auroc_alone: Interval
    verdict: Verdict


def equalized_odds_difference(
    truth: npt.ArrayLike,
    called: npt.ArrayLike,
    groups: npt.ArrayLike,
    method: Method = "worst_case",
) -> float:
    """Largest (worst_case) or mean of the TPR gap and the FPR gap between groups; 0 is equal, 1 the worst.

    Groups whose rate is undefined (empty cell) take no part in that gap; NaN when fewer than two groups are left.

    Args:
        truth: (n,) 0/1 or bool.
        called: (n,) predicted, 0/1 or bool.
        groups: (n,) one attribute.
        method: as fairlearn's `agg`.

    Raises:
        ValueError: the three are not of one length.
    """
    label, call, names = np.asarray(truth, dtype=bool), np.asarray(called, dtype=bool), np.asarray(groups)
    if not label.shape == call.shape == names.shape:
        raise ValueError(f"truth {label.shape}, called {call.shape} and groups {names.shape} must have one length")
    unit = np.ones((1, len(label)))
    cells = [(names == name) & side for side in (label, ~label) for name in np.unique(names)]
    rates = np.array([weighted_rate(call, cell, unit)[0] for cell in cells]).reshape(2, -1)
    gaps = spread(rates)
    return float(gaps.max() if method == "worst_case" else gaps.mean())


def assess_fairness(frame: pd.DataFrame, attribute: str, settings: EvaluationConfig) -> tuple[FairnessTable, ...]:
    """One table per class (two classes: the last only).

    Args:
        frame: checked predictions (`check_predictions`).
        attribute: column; "" and NaN are "not given".
        settings: draws, confidence, smallest cell and tolerance.
    """
    view = one_vs_rest(frame)
    bootstrap = PatientBootstrap(frame["patient_id"].to_numpy(), settings.bootstrap, settings.confidence)
    names = frame[attribute].fillna("").replace("", NOT_GIVEN).to_numpy(dtype=str)
    columns = zip(view.names, view.truth.T, view.called.T, view.score.T, strict=True)
    return tuple(
        _assess_class(attribute, positive, np.stack([truth, called]), score, names, bootstrap, settings)
        for positive, truth, called, score in columns
    )


def auroc_of_attribute(truth: Bools, names: npt.NDArray[np.str_], bootstrap: PatientBootstrap) -> Interval:
    """AUROC of predicting the label from the attribute alone: above 0.5 the attribute is confounded with the label.

    Each case scores the share of positives among cases of the same value in the other folds (5 patient-wise folds);
    pairs are compared within a fold, so that the share's dependence on the fold does not count. A value not seen in the
    other folds scores their overall share.
    """
    patients, index = np.unique(bootstrap.patients, return_inverse=True)
    fold = (np.random.default_rng(bootstrap.seed).permutation(len(patients)) % FOLDS)[index]
    _, codes = np.unique(names, return_inverse=True)
    score = np.zeros(len(truth))
    for k in range(FOLDS):
        seen = fold != k
        cases = np.bincount(codes[seen], minlength=codes.max() + 1).astype(np.float64)
        positives = np.bincount(codes[seen & truth], minlength=codes.max() + 1).astype(np.float64)
        share = divide(positives, cases)
        overall = truth[seen].mean() if seen.any() else 0.0
        score[~seen] = np.where(np.isnan(share), overall, share)[codes[~seen]]
    return bootstrap.auroc(truth, score, fold)


def _assess_class(
    attribute: str,
    positive: str,
    outcome: Bools,
    score: Floats,
    names: npt.NDArray[np.str_],
    bootstrap: PatientBootstrap,
    settings: EvaluationConfig,
) -> FairnessTable:
    truth, called = outcome
    named = sorted(set(names.tolist()) - {NOT_GIVEN})
    rows = [(name, names == name) for name in [*named, NOT_GIVEN] if (names == name).any()]
    rows.append((EVERYONE, np.ones(len(names), dtype=bool)))

    def figures(weights: Floats) -> Floats:
        """(D, n) -> (D, 4, groups): prevalence, TPR, FPR, AUROC."""
        return np.stack([_group_figures(truth, called, score, mask, weights) for _, mask in rows], axis=2)

    points, draws = bootstrap.apply(figures)
    groups = tuple(
        _group(name, mask, truth, points[:, g], draws[:, :, g], bootstrap, settings.min_cell)
        for g, (name, mask) in enumerate(rows)
    )
    compared = groups[: len(named)]
    limits = np.array([[_limit(rate, n, bootstrap.confidence) for rate, n in _cells(g)] for g in compared])
    gaps = Gaps(points[1:, : len(named)], draws[:, 1:, : len(named)], limits.reshape(-1, 3).T, bootstrap.confidence)
    crowded = np.array([[n >= settings.min_cell for _, n in _cells(g)] for g in compared], dtype=bool).reshape(-1, 3).T
    rates = Gaps(gaps.points[:2], gaps.draws[:, :2], gaps.limits[:2], gaps.confidence)
    return FairnessTable(
        attribute=attribute,
        positive=positive,
        groups=groups[:-1],
        overall=groups[-1],
        tpr_gap=gaps.interval([0]),
        fpr_gap=gaps.interval([1]),
        auroc_gap=gaps.interval([2]),
        equalized_odds=gaps.interval([0, 1]),
        equalized_odds_mean=gaps.interval([0, 1], "mean"),
        auroc_within=bootstrap.auroc(truth, score, names),
        auroc_alone=auroc_of_attribute(truth, names, bootstrap),
        verdict=_verdict(rates, crowded[:2], settings.tolerance),
    )


def _group_figures(truth: Bools, called: Bools, score: Floats, mask: Bools, weights: Floats) -> Floats:
    """Prevalence, TPR, FPR, AUROC of the group `mask` (n,): (D, n) -> (D, 4)."""
    label, call, drawn = truth[mask], called[mask], weights[:, mask]
    return np.stack(
        [
            weighted_rate(label, np.ones_like(label), drawn),
            weighted_rate(call, label, drawn),
            weighted_rate(call, ~label, drawn),
            weighted_auroc(label, score[mask], drawn),
        ],
        axis=1,
    )


def _group(
    name: str,
    mask: Bools,
    truth: Bools,
    points: Floats,
    draws: Floats,
    bootstrap: PatientBootstrap,
    min_cell: int,
) -> Group:
    """Row of one group from its points (4,) and draws (B, 4)."""
    everyone, positive, negative = (bootstrap.count(cell) for cell in (mask, mask & truth, mask & ~truth))
    patients = (everyone, positive, negative, min(positive, negative))
    prevalence, tpr, fpr, auroc = (
        exact_at_limit(percentile_interval(float(p), d, bootstrap.confidence), n, bootstrap.confidence)
        for p, d, n in zip(points, draws.T, patients, strict=True)
    )
    return Group(
        name=name,
        patients=everyone,
        cases=int(mask.sum()),
        positives=int((mask & truth).sum()),
        negatives=int((mask & ~truth).sum()),
        positive_patients=positive,
        negative_patients=negative,
        prevalence=prevalence,
        tpr=tpr,
        fpr=fpr,
        auroc=auroc,
        small=min(positive, negative) < min_cell,
    )


def _cells(group: Group) -> tuple[tuple[Interval, int], ...]:
    """TPR, FPR and AUROC, each with the number of patients that it rests on."""
    with_finding, without = group.positive_patients, group.negative_patients
    return (group.tpr, with_finding), (group.fpr, without), (group.auroc, min(with_finding, without))


def _limit(rate: Interval, patients: int, confidence: float) -> float:
    """Width that the bootstrap cannot see: of a rate of exactly 0 or 1; else 0."""
    return exact_end(patients, confidence) if rate.point in (0.0, 1.0) else 0.0


def _verdict(rates: Gaps, crowded: Bools, tolerance: float) -> Verdict:
    """Met: every rate is defined, and even the upper end is tolerable.

    Not met: even the lower end, among cells with enough patients (2, G), is not; few patients never convict.
    """
    enough = rates.only(crowded)
    comparable = np.flatnonzero(~np.isnan(spread(enough.points))).tolist()
    if comparable and enough.interval(comparable).low > tolerance:
        return "not met"
    complete = not np.isnan(rates.points).any()
    return "met" if complete and rates.interval([0, 1]).high <= tolerance else "cannot tell"
