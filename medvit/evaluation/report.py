"""One self-contained HTML page, and the same numbers as metrics.json.

The page is read from the top: a sentence, four figures, three pictures, then who is served worse, then what these data
cannot tell. Hospitals are offline: styles and pictures are inline, there is no script and no link. It names groups,
never patients.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from medvit.config import EvaluationConfig
from medvit.evaluation.bootstrap import PatientBootstrap, exact_at_limit, percentile_interval
from medvit.evaluation.charts import draw_reliability, draw_roc, draw_scores
from medvit.evaluation.fairness import FairnessTable, Verdict, assess_fairness
from medvit.evaluation.metrics import (
    Bools,
    Floats,
    Interval,
    weighted_auroc,
    weighted_average_precision,
    weighted_brier,
    weighted_ece,
    weighted_rate,
)
from medvit.evaluation.predictions import OneVsRest, age_band, check_predictions, class_names, one_vs_rest

SEVERITY: tuple[Verdict, ...] = ("not met", "cannot tell", "met")
ATTRIBUTES = ("site", "sex", "age_band")
FIGURES: dict[str, Callable[[Bools, Bools, Floats, Floats], Floats]] = {
    "auroc": lambda truth, _, score, weights: weighted_auroc(truth, score, weights),
    "average_precision": lambda truth, _, score, weights: weighted_average_precision(truth, score, weights),
    "sensitivity": lambda truth, called, _, weights: weighted_rate(called, truth, weights),
    "specificity": lambda truth, called, _, weights: weighted_rate(~called, ~truth, weights),
    "brier": lambda truth, _, score, weights: weighted_brier(truth, score, weights),
    "ece": lambda truth, _, score, weights: weighted_ece(truth, score, weights),
}
"""Name -> truth (n,), called (n,), score (n,), weights (D, n) -> (D,)."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The numbers of one report; `metrics.json` has the same keys (without `path`), intervals as point, low, high.

    Two classes: figures of the positive (last) class. More: means of the one-vs-rest figures of all classes.

    Attributes:
        path: of report.html; metrics.json lies beside it.
        summary: the verdict in one or two sentences.
        classes: in column order.
        positive: classes that the figures are about: the last of two, or all.
        cases: labelled cases; `patients` have them.
        confusion: true class -> predicted class -> cases.
        thresholds: distinct operating points in the table; empty: the most probable class, or not recorded.
        auroc: area under the ROC curve, all pairs of cases.
        auroc_within_folds: pairs of one fold only, so that scores of different models are not compared; None: no folds.
        average_precision: mean precision over recall; a useless model scores the prevalence.
        sensitivity: at the operating point; likewise `specificity`.
        brier: mean squared error of the probability.
        ece: expected calibration error, ten bins of equal width.
        detectable_auroc_difference: half the width of AUROC's interval.
        fairness: one table per attribute and positive class.
        notes: what was assumed or left out.
        draws: of the patient bootstrap, with `confidence` and `seed`.
    """

    path: Path
    summary: str
    classes: tuple[str, ...]
    positive: tuple[str, ...]
    cases: int
    patients: int
    confusion: dict[str, dict[str, int]]
    thresholds: tuple[float, ...]
    auroc: Interval
    auroc_within_folds: Interval | None
    average_precision: Interval
    sensitivity: Interval
    specificity: Interval
    brier: Interval
    ece: Interval
    detectable_auroc_difference: float
    fairness: tuple[FairnessTable, ...]
    notes: tuple[str, ...]
    draws: int
    confidence: float
    seed: int


def write_report(
    frame: pd.DataFrame,
    output_dir: str | Path,
    settings: EvaluationConfig,
    about: Mapping[str, str] | None = None,
    attributes: Sequence[str] = ATTRIBUTES,
) -> Report:
    """Write report.html and metrics.json into `output_dir`.

    Args:
        frame: predictions, checked or not (`check_predictions`). `age_band` is derived where there is an age.
        output_dir: made if need be; files of an earlier report are replaced.
        settings: draws, confidence, smallest cell, tolerance.
        about: what the reader should know of model and data, shown as a table: {"Model": "...", "Data": "..."}.
        attributes: columns to compare groups by; one that is not in the frame becomes a note.

    Raises:
        UsageError: the frame cannot be evaluated.
    """
    checked = frame.copy() if "notes" in frame.attrs else check_predictions(frame)
    if "age" in checked:
        checked["age_band"] = age_band(checked["age"])
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    report = _measure(checked, folder / "report.html", settings, attributes)
    numbers = {key: value for key, value in asdict(report).items() if key != "path"}
    (folder / "metrics.json").write_text(
        json.dumps(_without_nan(numbers), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    report.path.write_text(_render(report, checked, settings, about or {}), encoding="utf-8")
    return report


def _measure(frame: pd.DataFrame, path: Path, settings: EvaluationConfig, attributes: Sequence[str]) -> Report:
    view, classes = one_vs_rest(frame), class_names(frame)
    bootstrap = PatientBootstrap(frame["patient_id"].to_numpy(), settings.bootstrap, settings.confidence)
    figures = _measure_figures(view, bootstrap)
    absent = [f"No column `{name}`: no comparison by it." for name in attributes if name not in frame]
    fairness = tuple(table for name in attributes if name in frame for table in assess_fairness(frame, name, settings))
    confusion = Counter(zip(frame["label"], frame["predicted"], strict=True))
    return Report(
        path=path,
        summary=_summarise(view, classes, figures["auroc"], fairness, settings.tolerance),
        classes=classes,
        positive=view.names,
        cases=len(frame),
        patients=frame["patient_id"].nunique(),
        confusion={true: {name: confusion[true, name] for name in classes} for true in classes},
        thresholds=tuple(sorted(set(frame["threshold"].dropna()))) if "threshold" in frame else (),
        **figures,
        auroc_within_folds=_measure_within_folds(frame, view, bootstrap),
        detectable_auroc_difference=figures["auroc"].half_width,
        fairness=fairness,
        notes=(*frame.attrs["notes"], *absent),
        draws=bootstrap.draws,
        confidence=bootstrap.confidence,
        seed=bootstrap.seed,
    )


def _measure_figures(view: OneVsRest, bootstrap: PatientBootstrap) -> dict[str, Interval]:
    """Mean over the C one-vs-rest questions of every figure in FIGURES."""
    columns = list(zip(view.truth.T, view.called.T, view.score.T, strict=True))
    names = list(FIGURES)

    def means(weights: Floats) -> Floats:
        """(D, n) -> (D, figures)."""
        values = [[FIGURES[name](*column, weights) for column in columns] for name in names]
        return np.asarray(np.mean(values, axis=1).T)

    points, draws = bootstrap.apply(means)
    positive = min(bootstrap.count(truth) for truth in view.truth.T)
    negative = min(bootstrap.count(~truth) for truth in view.truth.T)
    exact = {"auroc": min(positive, negative), "sensitivity": positive, "specificity": negative}
    intervals = {
        name: percentile_interval(float(points[i]), draws[:, i], bootstrap.confidence) for i, name in enumerate(names)
    }
    return intervals | {k: exact_at_limit(intervals[k], n, bootstrap.confidence) for k, n in exact.items()}


def _measure_within_folds(frame: pd.DataFrame, view: OneVsRest, bootstrap: PatientBootstrap) -> Interval | None:
    if "fold" not in frame or frame["fold"].nunique() < 2:
        return None
    folds = frame["fold"].to_numpy(dtype=str)

    def mean(weights: Floats) -> Floats:
        columns = zip(view.truth.T, view.score.T, strict=True)
        values = [weighted_auroc(truth, score, weights, folds) for truth, score in columns]
        return np.asarray(np.mean(values, axis=0))

    return bootstrap.interval(mean)


def _summarise(
    view: OneVsRest, classes: tuple[str, ...], auroc: Interval, fairness: Sequence[FairnessTable], tolerance: float
) -> str:
    subject = " from ".join(reversed(classes)) if len(classes) == 2 else ", ".join(classes)
    if math.isnan(auroc.point):
        figure = "AUROC is undefined: at least one class has no case, so nothing can be said about telling them apart."
    elif auroc.low > 0.5:
        figure = f"The scores tell {subject} better than chance: AUROC {auroc}."
    elif auroc.high < 0.5:
        figure = f"The scores tell {subject} worse than chance: AUROC {auroc}. Are the classes swapped?"
    else:
        figure = f"These cases do not show that the scores tell {subject} better than chance: AUROC {auroc}."
    verdicts = {table.attribute: [t.verdict for t in fairness if t.attribute == table.attribute] for table in fairness}
    worst = {name: next(v for v in SEVERITY if v in found) for name, found in verdicts.items()}
    parts = [
        f"{verdict} for {', '.join(title(name) for name in worst if worst[name] == verdict)}"
        for verdict in SEVERITY
        if verdict in worst.values()
    ]
    return figure + (f" Equalized odds (tolerance {tolerance:.2f}): {'; '.join(parts)}." if parts else "")


def title(attribute: str) -> str:
    """Column name as words: "age_band" -> "age band"."""
    return attribute.replace("_", " ")


def _render(report: Report, frame: pd.DataFrame, settings: EvaluationConfig, about: Mapping[str, str]) -> str:
    view = one_vs_rest(frame)
    bootstrap = PatientBootstrap(frame["patient_id"].to_numpy(), report.draws, report.confidence, report.seed)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["title_of"] = title
    environment.tests["nan"] = math.isnan
    return environment.get_template("report.html.j2").render(
        report=report,
        about=about,
        settings=settings,
        roc=Markup(draw_roc(view, bootstrap)),
        reliability=Markup(draw_reliability(view)),
        scores=Markup(draw_scores(frame, report.thresholds)),
    )


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: undefined becomes null."""
    match value:
        case dict():
            return {key: _without_nan(item) for key, item in value.items()}
        case list() | tuple():
            return [_without_nan(item) for item in value]
        case float() if math.isnan(value):
            return None
        case _:
            return value
