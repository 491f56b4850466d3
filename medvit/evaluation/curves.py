"""Curves of robustness: what becomes of AUROC, probabilities and calls when the same cases look otherwise.

Records and arithmetic without torch: a report draws what `medvit.evaluation.robustness` has measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medvit.evaluation.bootstrap import PatientBootstrap, exact_at_limit, percentile_interval
from medvit.evaluation.metrics import Floats, Interval, weighted_auroc
from medvit.records import Prediction


@dataclass(frozen=True)
class Level:
    """What one severity does.

    Attributes:
        severity: in the unit of its curve.
        auroc: within folds; of more than two classes the mean of one-vs-rest.
        change: of AUROC from clean, same cases.
        moved: mean over cases of how much probability went to another class, 0..1.
        flipped: share of cases whose call changed.
    """

    severity: float
    auroc: float
    change: Interval
    moved: float
    flipped: float


@dataclass(frozen=True)
class Curve:
    """What one corruption or attack does, by severity.

    Attributes:
        name: of `robustness.STRESSES`.
        unit: of the severities; `imitates` says what it stands for.
        cases: that it was measured on, of so many `patients`.
        seconds: that it took.
        clean: AUROC of the same cases as they are.
        levels: in the order of severities.
    """

    name: str
    unit: str
    imitates: str
    cases: int
    patients: int
    seconds: float
    clean: Interval
    levels: tuple[Level, ...]


@dataclass(frozen=True)
class NotMeasured:
    """A corruption or attack without a curve, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """All curves, and what they cost.

    Attributes:
        curves: measured.
        not_measured: the others.
        available: labelled cases that the models judge; they would not judge `refused` more.
        case_cap: most cases of a curve; `slices` most slices of a case.
        minutes: time cap; `seconds` were used.
        seed: of the choice of cases and of all draws.
        draws: of the patient bootstrap, with `confidence`.
    """

    curves: tuple[Curve, ...]
    not_measured: tuple[NotMeasured, ...]
    available: int
    refused: int
    case_cap: int
    slices: int
    minutes: float
    seconds: float
    seed: int
    draws: int
    confidence: float

    @property
    def extent(self) -> str:
        """On how much it rests, in a sentence or two."""
        counts = sorted({curve.cases for curve in self.curves})
        used = " to ".join(str(count) for count in dict.fromkeys([counts[0], counts[-1]])) if counts else "none"
        return (
            f"Measured on {used} of {self.available} labelled cases (at most {self.case_cap}) in {self.seconds:.0f} s "
            f"(at most {self.minutes:g} minutes, and what was begun is finished), on up to "
            f"{self.slices} slices of each, without test-time augmentation."
        )


class Scores:
    """Predictions of labelled cases as arrays.

    Args:
        predictions: n of them, all of the same K classes.
        folds: (n,) which model judged; pairs of one fold are compared only.

    Attributes:
        probabilities: (n, K).
        called: (n,) class names.
        truth: (n, C) the binary questions, and `score` (n, C): of two classes the last, of more each against the rest.
    """

    def __init__(self, predictions: Sequence[Prediction], folds: npt.NDArray[np.int_]) -> None:
        names = list(predictions[0].probabilities)
        self.probabilities = np.array([list(one.probabilities.values()) for one in predictions])
        self.called = np.array([one.predicted for one in predictions])
        first = 0 if len(names) > 2 else 1
        labels = np.array([one.label for one in predictions])
        self.truth, self.score = labels[:, None] == names[first:], self.probabilities[:, first:]
        self.folds = folds

    def weighted(self, weights: Floats) -> Floats:
        """AUROC within folds of each draw, (D, n) -> (D,)."""
        columns = zip(self.truth.T, self.score.T, strict=True)
        return np.asarray(np.mean([weighted_auroc(t, s, weights, self.folds) for t, s in columns], axis=0))

    def fewest(self, bootstrap: PatientBootstrap) -> int:
        """Patients with the rarer answer: what AUROC rests on."""
        return min(bootstrap.count(mask) for truth in self.truth.T for mask in (truth, ~truth))

    def auroc(self, bootstrap: PatientBootstrap) -> Interval:
        """Within folds, with an exact end where it is 0 or 1."""
        point, values = bootstrap.apply(self.weighted)
        patients = self.fewest(bootstrap)
        interval = percentile_interval(float(point), values, bootstrap.confidence, patients)
        return exact_at_limit(interval, patients, bootstrap.confidence)


def measure_level(severity: float, clean: Scores, worse: Scores, bootstrap: PatientBootstrap) -> Level:
    """Compare predictions of the same cases, in the same order, with the clean ones."""
    point, values = bootstrap.apply(lambda weights: worse.weighted(weights) - clean.weighted(weights))
    return Level(
        severity=severity,
        auroc=float(worse.weighted(np.ones((1, len(worse.called))))[0]),
        change=percentile_interval(float(point), values, bootstrap.confidence, clean.fewest(bootstrap)),
        moved=float(np.abs(worse.probabilities - clean.probabilities).sum(axis=1).mean() / 2),
        flipped=float((worse.called != clean.called).mean()),
    )
