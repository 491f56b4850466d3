"""Is it worth it? Three figures for whoever decides: quality gain over what is done today, latency, cost of ownership.

The gain is paired: both methods judged the same cases, and patients are resampled. Latency is measured on the machine
at hand. Cost is arithmetic on stated prices: training, operation and maintenance over the years of use; nothing is
assumed that the configuration does not say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from medvit.config import EvaluationConfig, PricesConfig
from medvit.evaluation.bootstrap import PatientBootstrap, exact_end, percentile_interval
from medvit.evaluation.figures import mean_figures, patients_behind
from medvit.evaluation.metrics import Interval, weighted_rate
from medvit.evaluation.predictions import NUMBERED, class_names, one_vs_rest
from medvit.records import UsageError

COMPARED = ("auroc", "sensitivity", "specificity")


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Over a baseline that judged the same cases.

    Attributes:
        baseline: its name.
        cases: that both judged, of `patients`.
        auroc: of the model less that of the baseline; means over classes with more than two.
        sensitivity: likewise at the two operating points; `specificity` too.
        recall: of each class by name, the share of its cases that are called so: what means over classes can hide.
        notes: what the baseline's table assumed, and whom the comparison leaves out; the report has them with its own.
    """

    baseline: str
    cases: int
    patients: int
    auroc: Interval
    sensitivity: Interval
    specificity: Interval
    recall: Mapping[str, Interval] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Seconds per case from prepared slices to prediction, one case at a time, on a device or so many CPU `threads`."""

    median: float
    slowest: float
    cases: int
    slices: float
    device: str
    threads: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of owning the model for `years`, in `currency`: all three parts, never the price of a study alone."""

    currency: str
    years: float
    training: float
    operation: float
    maintenance: float
    per_study: float

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.training + self.operation + self.maintenance


def measure_gain(frame: pd.DataFrame, baseline: pd.DataFrame, name: str, settings: EvaluationConfig) -> Gain:
    """Compare two checked predictions frames on the cases they share.

    Args:
        frame: of the model.
        baseline: of the present method, with the same classes.
        name: of the present method.
        settings: draws and confidence.

    Raises:
        UsageError: other classes, another label of a case, or no case in common.
    """
    if class_names(frame) != class_names(baseline):
        raise UsageError(
            f"--baseline {name}: its classes are {', '.join(class_names(baseline))}, those of the model "
            f"{', '.join(class_names(frame))}. Both need the same p_<class> columns in the same order."
        )
    known = set(baseline["case_id"])
    shared = [case for case in frame["case_id"] if case in known and not case.startswith(NUMBERED)]
    own, other = (one.set_index("case_id").loc[shared].reset_index() for one in (frame, baseline))
    if not shared:
        raise UsageError(
            f"--baseline {name}: no case_id is in both tables, and rows are not paired by their number. Give both "
            "methods the same case_id."
        )
    if (differ := int((own["label"] != other["label"]).sum())) > 0:
        raise UsageError(f"--baseline {name}: {differ} cases have another label there. Judge both by one reference.")
    views = one_vs_rest(own), one_vs_rest(other)
    bootstrap = PatientBootstrap(own["patient_id"].to_numpy(), settings.bootstrap, settings.confidence)
    points, draws = bootstrap.apply(
        lambda weights: mean_figures(views[0], COMPARED, weights) - mean_figures(views[1], COMPARED, weights)
    )
    patients, behind = own["patient_id"].nunique(), patients_behind(views[0], bootstrap)
    intervals = {
        figure: percentile_interval(float(points[i]), draws[:, i], settings.confidence, behind[figure])
        for i, figure in enumerate(COMPARED)
    }
    recall = {one: _recall_gained(own, other, one, bootstrap) for one in class_names(frame)}
    notes = [f"Baseline {name}: {note}" for note in baseline.attrs["notes"]]
    notes += _left_out(name, len(shared), len(frame), len(baseline))
    return Gain(baseline=name, cases=len(shared), patients=patients, recall=recall, notes=tuple(notes), **intervals)


def _left_out(name: str, shared: int, own: int, other: int) -> list[str]:
    """Who was judged by one method alone, if anybody was."""
    if shared == own == other:
        return []
    return [
        f"Gain over {name}: on the {shared} cases that both judged, paired by case_id. Left out are {own - shared} of "
        f"the model's {own} and {other - shared} of the baseline's {other}."
    ]


def _recall_gained(own: pd.DataFrame, other: pd.DataFrame, name: str, bootstrap: PatientBootstrap) -> Interval:
    """Share of the cases of a class that are called so, in the rows of one frame less in the same rows of another."""
    among = own["label"].to_numpy(dtype=object) == name
    called = [one["predicted"].to_numpy(dtype=object) == name for one in (own, other)]
    points, draws = bootstrap.apply(
        lambda weights: np.subtract(*(weighted_rate(hits, among, weights) for hits in called))
    )
    point, patients = float(points), bootstrap.count(among)
    if abs(point) == 1:  # a class wholly lost, or wholly gained: every resample repeats it, and the exact end is known
        far = point * (1 - 2 * exact_end(patients, bootstrap.confidence))
        return Interval(point, min(point, far), max(point, far))
    return percentile_interval(point, draws, bootstrap.confidence, patients)


def cost_of_ownership(prices: PricesConfig, latency: Latency, labelled_cases: int, training_hours: float) -> Cost:
    """Training, operation and maintenance over the years of use.

    Training: labelling once, computing at the beginning and again at every update. Operation: machine time of every
    study, and what the service costs a year. Maintenance: hours of people.
    """
    once = labelled_cases * prices.label_case + training_hours * prices.machine_hour
    updates = prices.updates_per_year * prices.years
    studies = prices.studies_per_year * prices.years
    operation = studies * latency.median / 3600 * prices.machine_hour + prices.service_year * prices.years
    maintenance = prices.staff_hours_year * prices.years * prices.staff_hour
    training = once + updates * training_hours * prices.machine_hour
    return Cost(
        currency=prices.currency,
        years=prices.years,
        training=training,
        operation=operation,
        maintenance=maintenance,
        per_study=(training + operation + maintenance) / studies,
    )
