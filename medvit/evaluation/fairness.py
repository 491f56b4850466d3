"""Fairness by one attribute (site, sex, age band, any, or two crossed): rates of each group, gaps, a verdict.

Equalized odds (Hardt 2016): true and false positive rates do not depend on the group. The difference is
max(|dTPR|, |dFPR|) over pairs of groups, fairlearn's worst case; the mean form is (|dTPR| + |dFPR|) / 2. Equal
opportunity compares TPR alone, demographic parity the share that is called.

Three questions are kept apart. How large is the gap: a simultaneous interval, since the largest of several noisy gaps
is too large on average (`medvit.evaluation.gaps`). Is there any: a permutation test. Is it tolerable: the verdict. A
gap is a fact about these cases: it does not say why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from medvit.config import EvaluationConfig
from medvit.evaluation.bootstrap import PatientBootstrap
from medvit.evaluation.confounding import auroc_of_attribute
from medvit.evaluation.gaps import Gaps, Method, spread
from medvit.evaluation.groups import MEASURES, Group, Question, Roll, Row, make_group, measure, supporting, unseen
from medvit.evaluation.metrics import Bools, Interval, weighted_rate
from medvit.evaluation.permutation import no_gap_p
from medvit.evaluation.predictions import one_vs_rest
from medvit.models.reference import FLAG

Verdict = Literal["met", "not met", "cannot tell"]
NOT_GIVEN, EVERYONE = "not given", "all"
ODDS = ("tpr", "fpr")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Signed difference of one figure between two groups, `first` less `second`; the interval is of this pair alone."""

    figure: str
    first: str
    second: str
    difference: Interval


@dataclass(frozen=True, kw_only=True)
class FairnessTable:
    """Fairness of one class by one attribute. Gaps compare the named groups; "not given" has a row, and no gap.

    Attributes:
        positive: the class asked about; `groups` are sorted by name, "not given" last; `overall` is all cases.
        differences: every figure of every pair of named groups.
        selection_gap: largest difference of the share called (demographic parity).
        tpr_gap: of true positive rates (equal opportunity); likewise `fpr_gap`, `auroc_gap`. An equal AUROC can hide
            harm at the operating point: over- and under-diagnosis cancel in it.
        equalized_odds: max(tpr_gap, fpr_gap); `equalized_odds_mean` is their mean.
        no_gap_p: of the permutation test that TPR and FPR are equal in all named groups; `no_gap_p_adjusted` for the
            number of tables of the report (Holm 1979), None in a table by itself.
        auroc_within: AUROC from pairs within a group only.
        auroc_alone: AUROC of the attribute itself as predictor of the label, `auroc_of_attribute`.
    """

    attribute: str
    positive: str
    groups: tuple[Group, ...]
    overall: Group
    differences: tuple[Difference, ...]
    selection_gap: Interval
    tpr_gap: Interval
    fpr_gap: Interval
    auroc_gap: Interval
    equalized_odds: Interval
    equalized_odds_mean: Interval
    no_gap_p: float
    no_gap_p_adjusted: float | None = None
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
    names = _named(frame[attribute])
    flags = frame["flags"].str.split() if "flags" in frame else pd.Series([[]] * len(frame))
    roll = Roll(
        studies=frame["study_uid"].to_numpy(dtype=str) if "study_uid" in frame else None,
        unknown=np.array([FLAG in one for one in flags], dtype=bool),
    )
    refused = _named(pd.Series([row[attribute] for row in frame.attrs.get("refused", [])], dtype=object))
    columns = zip(view.names, view.truth.T, view.called.T, view.score.T, strict=True)
    return tuple(
        _assess_class(attribute, positive, Question(*question), names, roll, refused, bootstrap, settings)
        for positive, *question in columns
    )


def _named(values: pd.Series) -> npt.NDArray[np.str_]:
    """(n,) names of groups."""
    return values.fillna("").replace("", NOT_GIVEN).to_numpy(dtype=str)


def adjusted(tables: Sequence[FairnessTable]) -> tuple[FairnessTable, ...]:
    """The same with p-values adjusted for how many tables were looked at (Holm 1979)."""
    defined = [i for i, table in enumerate(tables) if not math.isnan(table.no_gap_p)]
    order = sorted(defined, key=lambda i: tables[i].no_gap_p)
    found, so_far = dict.fromkeys(range(len(tables)), math.nan), 0.0
    for rank, i in enumerate(order):
        so_far = max(so_far, min(1.0, (len(order) - rank) * tables[i].no_gap_p))
        found[i] = so_far
    return tuple(replace(table, no_gap_p_adjusted=found[i]) for i, table in enumerate(tables))


def _assess_class(
    attribute: str,
    positive: str,
    question: Question,
    names: npt.NDArray[np.str_],
    roll: Roll,
    refused: npt.NDArray[np.str_],
    bootstrap: PatientBootstrap,
    settings: EvaluationConfig,
) -> FairnessTable:
    known = {*names.tolist(), *refused.tolist()}  # a group that was refused as a whole has its row
    named = sorted(known - {NOT_GIVEN})
    rows = [Row(name, names == name, int((refused == name).sum())) for name in [*named, NOT_GIVEN] if name in known]
    rows.append(Row(EVERYONE, np.ones(len(names), dtype=bool), len(refused)))
    points, draws = bootstrap.apply(
        lambda weights: np.stack([measure(question.among(row.mask), weights[:, row.mask]) for row in rows], axis=2)
    )
    supports = [supporting(question, row.mask, bootstrap) for row in rows]
    groups = tuple(
        make_group(row, question, points[:, g], draws[:, :, g], bootstrap, supports[g], settings.min_cell, roll)
        for g, row in enumerate(rows)
    )
    patients = np.array(supports[: len(named)], dtype=object).reshape(-1, len(MEASURES)).T
    gaps = _gaps(points[:, : len(named)], draws[:, :, : len(named)], patients, bootstrap.confidence)
    given = names != NOT_GIVEN
    place = {name: i for i, name in enumerate(MEASURES)}
    return FairnessTable(
        attribute=attribute,
        positive=positive,
        groups=groups[:-1],
        overall=groups[-1],
        differences=_differences(gaps, named),
        selection_gap=gaps.interval([place["selection_rate"]]),
        tpr_gap=gaps.interval([place["tpr"]]),
        fpr_gap=gaps.interval([place["fpr"]]),
        auroc_gap=gaps.interval([place["auroc"]]),
        equalized_odds=gaps.interval([place[name] for name in ODDS]),
        equalized_odds_mean=gaps.interval([place[name] for name in ODDS], "mean"),
        no_gap_p=no_gap_p(
            question.truth[given],
            question.called[given],
            names[given],
            bootstrap.patients[given],
            bootstrap.draws,
            bootstrap.seed,
        ),
        auroc_within=bootstrap.auroc(question.truth, question.score, names),
        auroc_alone=auroc_of_attribute(question.truth, names, bootstrap),
        verdict=_verdict(gaps, patients, settings),
    )


def _gaps(
    points: npt.NDArray[np.float64],
    draws: npt.NDArray[np.float64],
    patients: npt.NDArray[np.object_],
    confidence: float,
) -> Gaps:
    """Of points (M, G), draws (B, M, G) and the patients (M, G) that each cell rests on."""
    limits = [
        [unseen(point, count, confidence) for point, count in zip(*row, strict=True)]
        for row in zip(points, patients, strict=True)
    ]
    known = np.array([[n or 0 for n in row] for row in patients], dtype=np.int64).reshape(points.shape)
    return Gaps(points, draws, np.array(limits, dtype=np.float64).reshape(points.shape), confidence, known)


def _differences(gaps: Gaps, named: Sequence[str]) -> tuple[Difference, ...]:
    return tuple(
        Difference(figure=figure, first=named[i], second=named[j], difference=gaps.difference(m, i, j))
        for m, figure in enumerate(MEASURES)
        for i, j in combinations(range(len(named)), 2)
    )


def _verdict(gaps: Gaps, patients: npt.NDArray[np.object_], settings: EvaluationConfig) -> Verdict:
    """Met: every rate is defined, and even the upper end is tolerable.

    Not met: even the lower end, among cells with enough patients (M, G), is not; few patients never convict.
    """
    odds = [i for i, name in enumerate(MEASURES) if name in ODDS]
    crowded: Bools = np.array([[(n or 0) >= settings.min_cell for n in row] for row in patients], dtype=bool)
    enough = gaps.only(crowded.reshape(gaps.points.shape))
    comparable = [i for i in odds if not np.isnan(spread(enough.points[i]))]
    if comparable and enough.interval(comparable).low > settings.tolerance:
        return "not met"
    complete = not np.isnan(gaps.points[odds]).any()
    return "met" if complete and gaps.interval(odds).high <= settings.tolerance else "cannot tell"
