"""One row of a fairness table: what a binary question looks like in one group of cases, each figure with its interval.

A *question* is a class against the rest: which cases have it, which were called, how they scored. A *measure* is a
figure of a question with the cells of cases that it rests on: the patients in them are how many there are to learn
from, and decide the exact interval where a share is 0 or 1 and resampling shows nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from medvit.evaluation.bootstrap import PatientBootstrap, exact_at_limit, exact_end, percentile_interval
from medvit.evaluation.metrics import Bools, Floats, Interval, weighted_auroc, weighted_ece, weighted_rate


class Question(NamedTuple):
    """Of n cases: `truth` (n,), `called` (n,), and `score` (n,) 0..1."""

    truth: Bools
    called: Bools
    score: Floats

    def among(self, mask: Bools) -> Question:
        """The cases of `mask` (n,) only."""
        return Question(self.truth[mask], self.called[mask], self.score[mask])


class Row(NamedTuple):
    """Which cases a row of the table is about: its name, `mask` (n,), and how many more the model would not judge."""

    name: str
    mask: Bools
    refused: int


class Roll(NamedTuple):
    """What is known of the cases beside the question.

    `studies` (n,), None where they are not told apart; `unknown` (n,), flagged as unlike what the model knows.
    """

    studies: npt.NDArray[np.str_] | None
    unknown: Bools


Cell = Callable[[Question], Bools]


def everyone(question: Question) -> Bools:
    """All cases."""
    return np.ones_like(question.truth)


def positive(question: Question) -> Bools:
    """Cases with the finding."""
    return question.truth


def negative(question: Question) -> Bools:
    """Cases without it."""
    return ~question.truth


def called(question: Question) -> Bools:
    """Cases that were called."""
    return question.called


def left(question: Question) -> Bools:
    """Cases that were left alone."""
    return ~question.called


@dataclass(frozen=True)
class Measure:
    """A figure.

    Attributes:
        of: question (n,), weights (D, n) -> (D,), NaN where a draw does not define it.
        rests_on: cells whose patients it is learned from, the fewest of them count; none: no exact interval.
    """

    of: Callable[[Question, Floats], Floats]
    rests_on: tuple[Cell, ...]


def share(hits: Cell, among: Cell) -> Measure:
    """Share of `hits` among `among`."""
    return Measure(lambda question, weights: weighted_rate(hits(question), among(question), weights), (among,))


MEASURES: dict[str, Measure] = {
    "prevalence": share(positive, everyone),
    "selection_rate": share(called, everyone),
    "tpr": share(called, positive),
    "fpr": share(called, negative),
    "ppv": share(positive, called),
    "npv": share(negative, left),
    "auroc": Measure(lambda one, weights: weighted_auroc(one.truth, one.score, weights), (positive, negative)),
    "ece": Measure(lambda one, weights: weighted_ece(one.truth, one.score, weights), ()),
}


@dataclass(frozen=True, kw_only=True)
class Group:
    """One row of a fairness table; NaN where a cell is empty.

    Attributes:
        studies: None where the table does not tell studies apart.
        refused: cases that the model would not judge; they are in no other figure.
        unknown: cases among `cases` that are flagged as unlike what the model knows.
        positives: cases of the positive class; `positive_patients` have one.
        prevalence: share of cases with the finding.
        selection_rate: share of cases that are called (demographic parity compares it).
        tpr: true positive rate, sensitivity (equal opportunity compares it).
        fpr: false positive rate, 1 - specificity.
        ppv: share of called cases that have the finding; `npv`, of those left alone, that have not.
        ece: expected calibration error, ten bins of equal width.
        small: fewer than `min_cell` patients with or without the finding: too few to read a rate from.
    """

    name: str
    patients: int
    studies: int | None
    cases: int
    refused: int
    unknown: int
    positives: int
    negatives: int
    positive_patients: int
    negative_patients: int
    prevalence: Interval
    selection_rate: Interval
    tpr: Interval
    fpr: Interval
    ppv: Interval
    npv: Interval
    auroc: Interval
    ece: Interval
    small: bool


def measure(question: Question, weights: Floats) -> Floats:
    """All MEASURES of one group: weights (D, n) -> (D, measures)."""
    return np.stack([one.of(question, weights) for one in MEASURES.values()], axis=1)


def supporting(question: Question, mask: Bools, bootstrap: PatientBootstrap) -> list[int | None]:
    """Patients of the group `mask` (n,) that each of MEASURES is learned from; None: it has no exact interval."""
    cells = [[bootstrap.count(mask & cell(question)) for cell in one.rests_on] for one in MEASURES.values()]
    return [min(counts, default=None) for counts in cells]


def make_group(
    row: Row,
    question: Question,
    points: Floats,
    draws: Floats,
    bootstrap: PatientBootstrap,
    supports: Sequence[int | None],
    min_cell: int,
    roll: Roll,
) -> Group:
    """The figures of a row, from its points (measures,), draws (B, measures) and `supporting` patients."""
    mask = row.mask
    patients, positives, negatives = (bootstrap.count(mask & cell(question)) for cell in (everyone, positive, negative))
    found = {}
    for key, point, values, count in zip(MEASURES, points, draws.T, supports, strict=True):
        interval = percentile_interval(float(point), values, bootstrap.confidence, patients if count is None else count)
        found[key] = interval if count is None else exact_at_limit(interval, count, bootstrap.confidence)
    return Group(
        name=row.name,
        patients=patients,
        studies=None if roll.studies is None else len(np.unique(roll.studies[mask])),
        cases=int(mask.sum()),
        refused=row.refused,
        unknown=int(roll.unknown[mask].sum()),
        positives=int((mask & question.truth).sum()),
        negatives=int((mask & ~question.truth).sum()),
        positive_patients=positives,
        negative_patients=negatives,
        small=min(positives, negatives) < min_cell,
        **found,
    )


def unseen(point: float, patients: int | None, confidence: float) -> float:
    """Width that resampling does not show: of a share of exactly 0 or 1, or of one patient; else 0."""
    if patients is None or np.isnan(point):
        return 0.0
    return exact_end(patients, confidence) if point in (0.0, 1.0) or patients < 2 else 0.0
