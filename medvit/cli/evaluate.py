"""medvit-evaluate: the report of a run, of a model on another labelled folder, or of anybody's predictions.

Writes report.html (one file, no links), metrics.json and fairness.json: AUROC with patient-clustered intervals, the
operating point, calibration, and sensitivity, specificity and equalized odds per site, sex and age. With a model it
also tells what the model looked at, what breaks it, and how long a prediction takes.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd

import medvit
from medvit import data, evaluation
from medvit.cli.console import Display, Parser, command, tables
from medvit.cli.learned import CONFIG, KNOWN, run_folder, shared
from medvit.cli.looking import look_into, predict, refused_row
from medvit.cli.study import Study, add_label_arguments, prepare, set_aside, show_study
from medvit.config import EvaluationConfig, load_config
from medvit.evaluation.pages import title
from medvit.records import (
    EXIT_DONE,
    EXIT_QUARANTINE,
    EXIT_REFUSED,
    Case,
    GateError,
    ReasonCode,
    ScanError,
    UsageError,
)

EPILOG = """
examples:
  medvit-evaluate runs/first --output report
  medvit-evaluate runs/first /exports/other-site --labels labels.csv --output report-other-site
  medvit-evaluate --predictions predictions.csv --output report --gate
  medvit-evaluate runs/second --baseline first=runs/first/predictions.csv --output report-gain

predictions.csv needs label and p_<class> columns; case_id, patient_id, site, sex, age and threshold make it better.
"""


DETAILED = ("site", "sex", "age_band")
"""Attributes whose groups have a line each; of the others only the gap is shown here, and all in the report."""


def parser() -> Parser:
    """The arguments."""
    result = Parser("evaluate", __doc__ or "", EPILOG)
    result.add_argument("run", metavar="RUN", nargs="?", type=Path, help="output folder of medvit-train, or a bundle")
    add_label_arguments(result, optional=True)
    result.add_argument("--predictions", metavar="CSV", type=Path, help="predictions to judge instead of a run")
    result.add_argument("--output", metavar="DIR", type=Path, required=True, help="where the report goes")
    result.add_argument(
        "--baseline", metavar="NAME=CSV", help="predictions of the present method on the same cases: what is gained?"
    )
    result.add_argument("--gate", action="store_true", help="exit code 4 where a fairness tolerance is not met")
    return result


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_intermixed_args(argv)
    if (arguments.run is None) == (arguments.predictions is None):
        raise UsageError("give either RUN or --predictions CSV (see -h).")
    check_arguments(arguments)
    baseline = read_baseline(arguments.baseline)
    status, further = EXIT_DONE, evaluation.Further()
    about: dict[str, str] = {}
    settings, noted = settings_of(arguments.run)
    if arguments.predictions is not None:
        frame = evaluation.read_predictions(arguments.predictions)
    elif arguments.folder is None:
        frame, about, further = held_out(arguments.run)
    else:
        frame, about, further, status = predict_labelled(arguments, settings)
    frame.attrs["notes"] += noted
    if baseline is not None:
        further = replace(further, gain=evaluation.measure_gain(frame, *baseline, settings))
    report = evaluation.write_report(frame, arguments.output, settings, about, further)
    show_report(report, further)
    if arguments.gate and any(table.verdict == "not met" for table in report.fairness):
        return EXIT_REFUSED
    return status


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what would be ignored, and an output that is somebody else's.

    Raises:
        UsageError: labels without a folder, or results of another command in --output.
    """
    given = {
        "--labels": arguments.labels,
        "--label-column": arguments.label_column != "label",
        "--site-column": arguments.site_column,
        "--assume-hu": arguments.assume_hu,
    }
    if arguments.folder is None and any(given.values()):
        named = ", ".join(option for option, value in given.items() if value)
        raise UsageError(f"{named}: belongs to a FOLDER of CT to predict (see -h), and there is none.")
    for name in ("cases.csv", "ledger.sqlite", "bundle.json"):
        if (arguments.output / name).exists():
            raise UsageError(f"--output {arguments.output}: holds {name}, results of a run. Give a folder of its own.")


def read_baseline(given: str | None) -> tuple[pd.DataFrame, str] | None:
    """Predictions and name of the present method from NAME=CSV.

    Raises:
        UsageError: no name, or the CSV cannot be evaluated.
    """
    if given is None:
        return None
    name, equals, path = given.partition("=")
    if not (name and equals and path):
        raise UsageError(f"--baseline {given}: expected NAME=CSV, for example --baseline radiographers=theirs.csv.")
    return evaluation.read_predictions(path), name


def settings_of(given: Path | None) -> tuple[EvaluationConfig, list[str]]:
    """As the run of RUN or of its bundle says, else the defaults; and what a reader of the report must know of it."""
    path = None if given is None else run_folder(given) / CONFIG
    if path is not None and path.is_file():
        return load_config(path).evaluation, []
    settings = load_config().evaluation
    told = f"Evaluated with default settings (tolerance {settings.tolerance:g}): no {CONFIG} is beside the model."
    return settings, [told] if given is not None else []


def held_out(given: Path) -> tuple[pd.DataFrame, dict[str, str], evaluation.Further]:
    """What a run has kept of its own held-out cases: predictions, how the model was made, and the look inside.

    Raises:
        UsageError: there is none, as with a bundle alone.
    """
    run = run_folder(given)
    path = run / "predictions.csv"
    if not path.is_file():
        raise UsageError(
            f"{given}: no predictions of a run there (looked for {path}): a bundle alone has none, nor has a run "
            "that has not ended. Give the output folder of medvit-train, or a FOLDER of CT with --labels to predict."
        )
    about = evaluation.read_made(run / "bundle")
    return evaluation.read_predictions(path), about, evaluation.load_further(run / "report")


def predict_labelled(
    arguments: argparse.Namespace, settings: EvaluationConfig
) -> tuple[pd.DataFrame, dict[str, str], evaluation.Further, int]:
    """Predictions of a model on a labelled folder, written to predictions.csv beside the report, and a look inside."""
    model = medvit.load_bundle(arguments.run)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with Display() as display, tempfile.TemporaryDirectory(dir=arguments.output, prefix=".cache-") as scratch:
        study = prepare(arguments, data.default_cache_dir(Path(scratch)), model.preprocessing, display)
        show_study(study, [], display)
        cases, notes = unseen(arguments.run, study)
        unknown = sorted({str(case.label) for case in cases} - set(model.info.classes))
        if unknown:
            raise UsageError(f"labels {', '.join(unknown)} are none of the model's: {', '.join(model.info.classes)}.")
        display.start("predicting", len(cases))
        rows, judged, features = [], [], []
        for case in cases:
            try:
                prediction, pooled = predict(model, case, study.cache)
            except ScanError as error:  # the model must not be asked
                rows.append(refused_row(model.info.classes, case, str(error.code)))
            else:
                judged.append(medvit.Judged(model, case, prediction, study.cache.load))
                rows.append(prediction.to_row())
                features.append(pooled)
            display.step()
        further = look_into(judged, settings, display)
        patients = [one.case.patient_id for one in judged]
        further = replace(further, drift=evaluation.compare_batch(model.reference, features, patients))
    path = arguments.output / "predictions.csv"
    evaluation.write_predictions(pd.DataFrame(rows), path)
    about = {
        "Model": model.info.architecture.name,
        "Cases": f"{len(cases)} labelled",
    }
    frame = evaluation.read_predictions(path)
    frame.attrs["notes"] = notes + frame.attrs["notes"]
    incomplete = set_aside(study) or len(judged) < len(cases)
    return frame, about, further, EXIT_QUARANTINE if incomplete else EXIT_DONE


def unseen(run: Path, study: Study) -> tuple[list[Case], list[str]]:
    """The labelled cases that a run has not learned from, and what a reader must know of the others.

    Raises:
        GateError: it has learned from all of them.
    """
    cases = [case for case in study.cases if case.label is not None]
    (seen, unknown), notes = shared(run, cases, KNOWN), list[str]()
    if unknown:
        notes.append(f"Whether the model has learned from these patients is not known: {unknown}.")
    if seen:
        left = [case for case in cases if case.patient_id not in seen]
        if not left:
            raise GateError(
                f"{ReasonCode.LEAKAGE}: {run} has learned from all {len(seen)} patients of this folder, and would be "
                f"judged by what it was told. Its held-out patients are in medvit-evaluate {run}; give others here."
            )
        notes.append(
            f"{len(cases) - len(left)} of {len(cases)} cases are of {len(seen)} patients whom the model has learned "
            "from: left out."
        )
        cases = left
    if study.failures:
        notes.append(f"{len(study.failures)} labelled cases could not be read and are in no figure.")
    if unmatched := len(study.manifest.unmatched_rows):
        notes.append(f"{unmatched} rows of the labels match no file.")
    if aside := len(study.manifest.set_aside_rows):
        notes.append(
            f"{aside} rows of the labels mean scans that were set aside (medvit-inspect says why): in no figure."
        )
    return cases, notes


def show_report(report: evaluation.Report, further: evaluation.Further) -> None:
    """The main figures of a report as plain lines, and where it is."""
    percent = f"{100 * report.confidence:g} %"
    lines = [f"AUROC        {report.auroc}  ({percent} interval, {report.patients} patients, {report.cases} cases)"]
    if report.auroc_within_folds is not None:
        lines.append(f"within fold  {report.auroc_within_folds}")
    lines += [f"sensitivity  {report.sensitivity}", f"specificity  {report.specificity}"]
    for table in report.fairness:
        name = title(table.attribute)
        for group in table.groups if table.attribute in DETAILED else ():
            lines.append(f"  {name} {group.name}: AUROC {group.auroc}, {group.patients} patients, {group.cases} cases")
        lines.append(
            f"  {name}: equalized-odds difference {table.equalized_odds}: {table.verdict}; "
            f"{name} alone predicts the label with AUROC {table.auroc_alone}"
        )
    if further.gain is not None:
        lines.append(
            f"gain         AUROC {further.gain.auroc} over {further.gain.baseline}, {further.gain.cases} cases"
        )
        lines += [f"  recall of {name}: {change}" for name, change in further.gain.recall.items()]
    if further.drift is not None:
        alike = "unlike" if further.drift.p < 1 - report.confidence else "not told from"
        lines.append(f"drift        as a whole {alike} what the model knows (p {further.drift.p:.2g})")
    if further.latency is not None:
        lines.append(f"latency      {further.latency.median:.2g} s a case")
    lines.append(f"report       {report.path}")
    console = tables()
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
