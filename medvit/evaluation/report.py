"""One self-contained HTML page, and the same numbers as metrics.json.

The page is read from the top: a sentence, three figures, one picture; then the details: how good, for whom, what it
looked at, what it is worth, and what these data cannot tell. Hospitals are offline: styles and pictures are inline,
there is no script and no link that leads away. It names groups, never patients.
"""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from medvit.config import EvaluationConfig
from medvit.evaluation.attributes import with_attributes
from medvit.evaluation.bootstrap import PatientBootstrap
from medvit.evaluation.charts import draw_reliability, draw_roc, draw_scores
from medvit.evaluation.curves import Level, Robustness
from medvit.evaluation.fairness import FairnessTable, Verdict, adjusted, assess_fairness
from medvit.evaluation.figures import auroc_within_folds, measure_figures
from medvit.evaluation.forest import draw_groups
from medvit.evaluation.further import Further, save_further
from medvit.evaluation.metrics import Interval
from medvit.evaluation.pages import templates, title
from medvit.evaluation.physics import CORRUPTIONS
from medvit.evaluation.plain import without_nan
from medvit.evaluation.predictions import OneVsRest, check_predictions, class_names, one_vs_rest
from medvit.evaluation.robustness_chart import draw_robustness
from medvit.records import UsageError

SCHEMA_VERSION = 1
"""Of metrics.json and fairness.json; docs/report_schema.md lists their fields."""

PAIRED = {"tpr": "TPR", "fpr": "FPR", "ppv": "PPV", "npv": "NPV", "auroc": "AUROC", "selection_rate": "Called"}
"""Figures whose differences between pairs of groups the page shows; fairness.json has them all."""

SEVERITY: tuple[Verdict, ...] = ("not met", "cannot tell", "met")


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
        sensitivity_at_90_specificity: the largest that any threshold has there: of the ROC curve, no operating point.
        ece: expected calibration error, ten bins of equal width.
        calibration_slope: below 1: too sure. `calibration_intercept`, at slope 1, above 0: expects too few findings.
        detectable_auroc_difference: half the width of AUROC's interval.
        fairness: one table per attribute and positive class; in `fairness.json`, not in `metrics.json`.
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
    sensitivity_at_90_specificity: Interval
    brier: Interval
    ece: Interval
    calibration_slope: Interval
    calibration_intercept: Interval
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
    further: Further | None = None,
) -> Report:
    """Write report.html, metrics.json, fairness.json and further.json into `output_dir`.

    Args:
        frame: predictions, checked or not (`check_predictions`).
        output_dir: made if need be; files of an earlier report are replaced.
        settings: draws, confidence, smallest cell, tolerance, and what groups to compare.
        about: what the reader should know of model and data, shown as a table: {"Model": "...", "Data": "..."}.
        further: what is known beside the predictions; `metrics.json` has it, too, without pictures.

    Raises:
        UsageError: the frame cannot be evaluated.
    """
    checked = frame.copy() if "notes" in frame.attrs else check_predictions(frame)
    checked, attributes, absent = with_attributes(checked, settings)
    further = further or Further()
    compared = further.gain.notes if further.gain else ()
    checked.attrs["notes"] = [*checked.attrs["notes"], *absent, *compared]
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: no folder can be made there ({error.strerror}). Give another.") from None
    report = _measure(checked, folder / "report.html", settings, attributes)
    numbers = asdict(report)
    fairness = {"tolerance": settings.tolerance, "min_cell": settings.min_cell, "tables": numbers.pop("fairness")}
    del numbers["path"]
    for name, content in (("metrics.json", numbers | further.to_json()), ("fairness.json", fairness)):
        text = json.dumps({"schema_version": SCHEMA_VERSION} | without_nan(content), indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    save_further(further, folder)
    report.path.write_text(_render(report, checked, settings, about or {}, further), encoding="utf-8")
    return report


def _measure(frame: pd.DataFrame, path: Path, settings: EvaluationConfig, attributes: Sequence[str]) -> Report:
    view, classes = one_vs_rest(frame), class_names(frame)
    bootstrap = PatientBootstrap(frame["patient_id"].to_numpy(), settings.bootstrap, settings.confidence)
    figures = measure_figures(view, bootstrap)
    fairness = adjusted([table for name in attributes for table in assess_fairness(frame, name, settings)])
    decides = "threshold" in frame and len(classes) == 2  # of more, the most probable is called
    confusion = Counter(zip(frame["label"], frame["predicted"], strict=True))
    return Report(
        path=path,
        summary=_summarise(view, classes, figures["auroc"], fairness, settings.tolerance),
        classes=classes,
        positive=view.names,
        cases=len(frame),
        patients=frame["patient_id"].nunique(),
        confusion={true: {name: confusion[true, name] for name in classes} for true in classes},
        thresholds=tuple(sorted(set(frame["threshold"].dropna()))) if decides else (),
        **figures,
        auroc_within_folds=auroc_within_folds(frame, view, bootstrap),
        detectable_auroc_difference=figures["auroc"].half_width,
        fairness=fairness,
        notes=tuple(frame.attrs["notes"]),
        draws=bootstrap.draws,
        confidence=bootstrap.confidence,
        seed=bootstrap.seed,
    )


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


def pairs_of(table: FairnessTable) -> dict[tuple[str, str], dict[str, Interval]]:
    """First and second group -> figure -> difference."""
    found: dict[tuple[str, str], dict[str, Interval]] = {}
    for one in table.differences:
        found.setdefault((one.first, one.second), {})[one.figure] = one.difference
    return found


def _render(
    report: Report, frame: pd.DataFrame, settings: EvaluationConfig, about: Mapping[str, str], further: Further
) -> str:
    view = one_vs_rest(frame)
    bootstrap = PatientBootstrap(frame["patient_id"].to_numpy(), report.draws, report.confidence, report.seed)
    environment = templates(escape=True)
    environment.filters["pairs_of"] = pairs_of
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.tests["nan"] = math.isnan
    return environment.get_template("report.html.j2").render(
        report=report,
        about=about,
        settings=settings,
        further=further,
        worst=_worst(further.robustness),
        curves=Markup(draw_robustness(further.robustness)) if further.robustness else None,
        paired=PAIRED,
        groups=Markup(draw_groups(report.fairness)) if report.fairness and len(report.positive) == 1 else None,
        roc=Markup(draw_roc(view, bootstrap)),
        reliability=Markup(draw_reliability(view)),
        scores=Markup(draw_scores(frame, report.thresholds)),
    )


def _worst(robustness: Robustness | None) -> tuple[str, Level, str] | None:
    """Of what hospitals do to pictures, not adversaries nor mere noise: the largest loss beyond chance by itself."""
    curves = robustness.curves if robustness else ()
    hospital = CORRUPTIONS.keys() - {"white"}
    levels = [(c.name, level, c.unit) for c in curves if c.name in hospital for level in c.levels]
    certain = [one for one in levels if one[1].change.high < 0]
    return min(certain, key=lambda one: one[1].change.point, default=None)
