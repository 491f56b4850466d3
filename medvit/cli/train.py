"""medvit-train: train a classifier on a CT folder and a table of labels, or a backbone on a CT folder without labels.

Reads the folder, joins the labels, splits by patient, trains, predicts the held-out patients once, and writes RUN:
config.yaml, cases.csv, metrics.jsonl, TensorBoard events, checkpoints/, bundle/ (the model), predictions.csv, report/.
With a config pretrain_* there is nothing to predict: model.weights=RUN then starts from the bundle.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

import medvit
from medvit import data, evaluation, training
from medvit.cli.console import Display, Parser, command
from medvit.cli.evaluate import show_report
from medvit.cli.learned import MET, TAUGHT, run_of, shared, write_identities
from medvit.cli.looking import look_into, refused_row
from medvit.cli.study import Study, add_label_arguments, prepare, set_aside, show_study
from medvit.config import GRIDS, Config, load_config, shipped_configs
from medvit.records import EXIT_DONE, EXIT_QUARANTINE, Case, GateError, ReasonCode, UsageError
from medvit.training import processes

EPILOG = f"""
labels: a CSV with one key column (the first present of path, sop_uid, series_uid, study_uid, patient_id), the label
column, and optionally site, sex, age, split (train/val/test) and further columns for the report. path and sop_uid make
each file a case of its own. An empty label means unlabelled.

configs that come with medvit (a name is enough): {", ".join(shipped_configs())}

examples:
  medvit-train /exports/ct --labels labels.csv --dry-run
  medvit-train /exports/ct --labels labels.csv --config frozen model.weights=vit.safetensors data.folds=5
  medvit-train /exports/ct --labels labels.csv training.batch_size=4 preprocessing.windows=[brain,subdural,bone]
  medvit-train /exports/ct --labels labels.csv --output runs/first --resume
  medvit-train /exports/ct --labels labels.csv --config dann data.target_sites=[Harbour] --sweep strength
  medvit-train /exports/ct --config pretrain_simclr --output runs/backbone
  medvit-train /exports/ct --labels labels.csv model.weights=runs/backbone model.name=vit_small_patch16_224
  torchrun --nproc-per-node 2 -m medvit.cli.train /exports/ct --labels labels.csv --output runs/both
"""


def parser() -> Parser:
    """The arguments."""
    result = Parser("train", __doc__ or "", EPILOG)
    add_label_arguments(result)
    result.add_argument("--config", metavar="YAML", help="file, or name of a shipped config (default: baseline)")
    result.add_argument("--output", metavar="RUN", type=Path, help="new folder (default: runs/DATE-TIME)")
    result.add_argument("--resume", action="store_true", help="continue an interrupted run in --output")
    result.add_argument(
        "--sweep",
        choices=sorted(GRIDS),
        help="try the settings as given and a grid of others on validation cases (of an adaptation also by how "
        "informative predictions on unlabelled target cases are), go on with the best",
    )
    result.add_argument(
        "--dry-run",
        action="store_true",
        help="show cases, splits, class by site, and a time estimate; no run is written, decoded pixels are kept",
    )
    result.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings over the config file")
    return result


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    # intermixed: overrides may stand before and after options
    arguments = parser().parse_intermixed_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    with processes.together():
        return train(arguments, config)


def train(arguments: argparse.Namespace, config: Config) -> int:
    """Prepare, train, judge and tell; of several processes the first one writes and speaks."""
    now = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    output: Path = processes.agreed(arguments.output or Path("runs") / now)
    cache_dir = config.data.cache_dir or data.default_cache_dir(output)
    if arguments.sweep:
        check_sweep(config, arguments.sweep)
    if not arguments.dry_run and processes.first():
        prepare_output(output, config, cache_dir, resume=arguments.resume, sweep=bool(arguments.sweep))
    processes.wait()
    with Display(quiet=not processes.first()) as display:
        if config.objective.pretrains:
            return pretrain(arguments, config, output, cache_dir, display)
        study = prepare(arguments, cache_dir, config.preprocessing, display, config.data.target_sites)
        folds = data.make_folds(study.cases, config.data, config.training.seed)
        experiment = supervised(study, config, output, display, resume=arguments.resume)
        show_study(study, folds, display)
        check_weights(config.model.weights, study, folds, display)
        experiment.check(folds)
        if arguments.dry_run:
            show_estimate(experiment, folds, display)
            show_kept(cache_dir, output, display)
            return EXIT_DONE
        began = time.monotonic()
        if arguments.sweep:
            experiment = sweep(experiment, folds, arguments.sweep, display)
        result = experiment.run(folds)
        if result.refused:
            display.say(
                f"  {len(result.refused)} held-out cases {ReasonCode.NOT_FOR_MODEL}: no training scan was like them in "
                "what inference.refuse names; they have no score, as they would have none in deployment"
            )
        hours = None if arguments.resume else (time.monotonic() - began) / 3600
        if processes.first():
            write_cases(output / "cases.csv", study.cases, folds)
            write_identities(output, study.cases)
            write_predictions(result, study.manifest.classes, output / "predictions.csv")
            report, further = write_reports(study, experiment, result, hours, display)
            show_result(report, further, output, result)
        processes.wait()  # torchrun ends the first where another has gone with a code of its own, such as 3
    return EXIT_QUARANTINE if set_aside(study) or result.refused else EXIT_DONE


def pretrain(arguments: argparse.Namespace, config: Config, output: Path, cache_dir: Path, display: Display) -> int:
    """Learn a backbone from all CT of a folder; labels, where they are given, only tell how good it becomes."""
    study = prepare(arguments, cache_dir, config.preprocessing, display, unlabelled=True)
    fold = data.split_patients(study.cases, config.data, config.training.seed)
    pretraining = unsupervised(study, config, output, display, resume=arguments.resume)
    show_study(study, [fold], display)
    if arguments.dry_run:
        show_minutes(config, [len(fold.train)], pretraining.time_step(fold.train), 0, display)
        show_kept(cache_dir, output, display)
        return EXIT_DONE
    if processes.first():
        write_cases(output / "cases.csv", study.cases, [fold])
        write_identities(output, study.cases)
    pretraining.run(fold)
    if processes.first():
        name = config.model.name
        print(f"backbone     {output / 'bundle'}\ntrain it     --labels CSV model.name={name} model.weights={output}")
    processes.wait()
    return EXIT_QUARANTINE if set_aside(study) else EXIT_DONE


def supervised(
    study: Study, config: Config, folder: Path, display: Display, *, resume: bool = False
) -> training.Experiment:
    """A training that writes into a folder, judged as evaluation judges."""
    return training.Experiment(
        config=config,
        cases=study.cases,
        classes=study.manifest.classes,
        slices=study.cache,
        folder=folder,
        judge=judge(config),
        reporter=training.Reporter(start=display.start, step=display.step, say=display.say),
        resume=resume,
    )


def unsupervised(
    study: Study, config: Config, folder: Path, display: Display, *, resume: bool = False
) -> training.Pretraining:
    """A pretraining that writes into a folder, judged by labels where there are some."""
    return training.Pretraining(
        config=config,
        cases=study.cases,
        classes=study.manifest.classes,
        slices=study.cache,
        folder=folder,
        probe=evaluation.probe_online if study.manifest.classes else None,
        reporter=training.Reporter(start=display.start, step=display.step, say=display.say, epoch=telling(display)),
        resume=resume,
    )


def telling(display: Display) -> Callable[[dict[str, Any]], None]:
    """What is said of each epoch of a pretraining: whether the encoder sees anything, and how well labels follow."""
    names = {"val_effective_rank": "rank", "val_feature_spread": "spread", "val_knn": "kNN", "val_auroc": "probe AUROC"}

    def tell(row: dict[str, Any]) -> None:
        figures = ", ".join(f"{word} {row[name]:.3g}" for name, word in names.items() if name in row)
        display.say(f"  epoch {row['epoch']}: loss {row['loss']:.4g}, {figures}")

    return tell


def sweep(
    experiment: training.Experiment, folds: Sequence[data.Fold], grid: str, display: Display
) -> training.Experiment:
    """Try the points of a grid on the first fold, show them, and go on with the best."""
    best, points = training.sweep(experiment, folds[0], grid)
    show_points(best, points, display)
    if processes.first():
        (experiment.folder / "config.yaml").write_text(best.config.to_yaml(), encoding="utf-8")
    return replace(experiment, config=best.config)


def show_points(best: training.Point, points: Sequence[training.Point], display: Display) -> None:
    """What came of each point of a sweep, which one the run goes on with, and why."""
    for point in points:
        told = {"sites told apart": point.domain_probe, "information at the target": point.target_information}
        at_target = "".join(f", {name} {value:.3f}" for name, value in told.items() if not math.isnan(value))
        display.say(f"  {settings_of(point)}: validation AUROC {point.auroc:.3f} (epoch {point.best_epoch}){at_target}")
    objective = best.config.objective
    without = ": training without adaptation" if objective.adapts and not objective.strength else ""
    by = "validation AUROC" + (" + information at the target" if objective.adapts else "")
    display.say(f"  goes on with {settings_of(best)}{without} (chosen by {by}; sweep.csv has all)")


def settings_of(point: training.Point) -> str:
    """What a point of a sweep has set, in short."""
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {value:g}" for key, value in point.settings.items())


def check_sweep(config: Config, grid: str) -> None:
    """Refuse a sweep that compares nothing, or by cases that are judged later.

    Raises:
        UsageError: pretraining, folds, or a strength without adaptation.
    """
    if config.objective.pretrains:
        raise UsageError("--sweep compares by labels, and pretraining has none. Leave it out.")
    if config.data.folds:
        raise UsageError(
            "--sweep chooses settings on validation patients, and each of them is judged in another fold. Sweep with "
            "one split (data.folds=0), and keep the patients that it held out for judging."
        )
    if grid == "strength" and not config.objective.adapts:
        raise UsageError(f"--sweep strength: objective.name={config.objective.name} has none. Take dann, cdan or mmd.")


def check_weights(weights: str, study: Study, folds: Sequence[data.Fold], display: Display) -> None:
    """Refuse to start from a run that has learned the labels of patients who are to choose or to judge.

    Raises:
        GateError: so many patients.
    """
    if (run := run_of(weights)) is None:
        return
    judging = [study.cases[index] for fold in folds for index in (*fold.val, *fold.test)]
    seen, unknown = shared(run, judging, TAUGHT)
    patients = len({case.patient_id for case in judging})
    if unknown:
        display.say(f"  whether {run} has learned from these patients is not known: {unknown}")
    if seen:
        raise GateError(
            f"{ReasonCode.LEAKAGE}: {len(seen)} of {patients} patients who choose or judge here have taught "
            f"model.weights={weights} their labels: figures would be worth nothing. Start from other weights, or keep "
            "those patients out by a split column."
        )
    if met := shared(run, judging, MET).patients:
        display.say(f"  {len(met)} of {patients} patients who judge were in the pretraining, without labels")


def prepare_output(output: Path, config: Config, cache_dir: Path, *, resume: bool, sweep: bool = False) -> None:
    """Make RUN and write its config; an existing run is only continued, and only with the same settings.

    A folder that holds nothing but the cache is as good as empty: --dry-run leaves one. With a sweep these are the
    settings that it varies, kept beside its points; RUN's own are known at its end.

    Raises:
        UsageError: `output` holds something and is not to be resumed, or was made with other settings.
    """
    saved = output / "sweep" / "config.yaml" if sweep else output / "config.yaml"
    if output.exists() and any(path.resolve() != cache_dir.resolve() for path in output.iterdir()):
        if not resume:
            raise UsageError(f"{output}: not empty. Give another --output, or --resume to continue that run.")
        if not saved.is_file():
            raise UsageError(
                f"{output}: holds no run of this kind (no {saved.relative_to(output)}). Give another --output."
            )
        if saved.read_text(encoding="utf-8") != config.to_yaml():
            raise UsageError(f"{output}: was started with other settings ({saved}). Resume with those, or start anew.")
    saved.parent.mkdir(parents=True, exist_ok=True)
    saved.write_text(config.to_yaml(), encoding="utf-8")


def judge(config: Config) -> training.Judge:
    """How evaluation judges models, for training."""
    return training.Judge(
        score=evaluation.macro_auroc,
        operating_point=lambda labels, probabilities: evaluation.operating_point(
            labels, probabilities[:, -1], config.evaluation.sensitivity
        ),
        temperature=evaluation.fit_temperature,
    )


def show_estimate(experiment: training.Experiment, folds: Sequence[data.Fold], display: Display) -> None:
    """How long the run would take, from one timed step."""
    timing = experiment.time_step(folds[0].train, folds[0].target)
    sizes = [len(fold.train) for fold in folds] + ([len(experiment.cases)] if len(folds) > 1 else [])  # and the refit
    show_minutes(experiment.config, sizes, timing, len(experiment.cases), display)


def show_minutes(config: Config, sizes: Sequence[int], timing: training.Timing, cases: int, display: Display) -> None:
    """How long it would take to prepare `cases`, and to train on so many cases as `sizes` says, one after another."""
    epochs = sum(stage.epochs for stage in config.training.stages)
    steps = sum(-(-size // config.training.batch_size) for size in sizes) * epochs
    seconds = timing.prepare_case * cases + timing.step * steps
    display.say(
        f"one step takes {timing.step:.2f} s, {steps} steps: about {max(1, round(seconds / 60))} minutes, and "
        "validation besides"
    )


def show_kept(cache_dir: Path, output: Path, display: Display) -> None:
    """What a dry run leaves behind: pixels are PHI, and nobody should decode them twice."""
    used = f"; a run with --output {output} begins with them" if cache_dir.is_relative_to(output) else ""
    display.say(f"no run was written; decoded pixels (PHI) are kept in {cache_dir}{used}")


def write_cases(path: Path, cases: Sequence[Case], folds: Sequence[data.Fold]) -> None:
    """cases.csv: who was where. With folds, `fold` is the one that a case was judged in."""
    where: dict[int, tuple[str, int | str]] = {}
    for number, fold in enumerate(folds):
        for name, indices in fold.sides().items():
            for index in indices:
                if len(folds) == 1 or name == "test":
                    where[index] = (name, number)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("case_id", "patient_id", "split", "fold", "label", "site", "sex", "age"))
        for index, case in enumerate(cases):
            # an unlabelled scan of a patient who is judged: trained on, it would give the patient away
            split, fold_number = where.get(index, ("unused", ""))
            age = "" if case.age is None else case.age
            row = (case.case_id, case.patient_id, split, fold_number, case.label, case.site, case.sex, age)
            writer.writerow(row)


def write_predictions(result: training.Result, classes: Sequence[str], path: Path) -> None:
    """predictions.csv: a row for each held-out case, without a score where its model must not be asked."""
    rows = [prediction.to_row() for prediction in result.predictions]
    rows += [
        refused_row(classes, case, str(ReasonCode.NOT_FOR_MODEL)) | {"fold": fold} for case, fold in result.refused
    ]
    evaluation.write_predictions(pd.DataFrame(rows), path)


def write_reports(
    study: Study, experiment: training.Experiment, result: training.Result, hours: float | None, display: Display
) -> tuple[evaluation.Report, evaluation.Further]:
    """The report on held-out cases in RUN, and the model card in its bundle."""
    output, settings, origin = experiment.folder, experiment.config.evaluation, about(study, experiment)
    labelled = sum(case.label is not None for case in study.cases)
    further = look_into(result.judged, settings, display, labelled=labelled, hours=hours)
    further = replace(further, learning=evaluation.how_it_went([history.rows for history in result.histories]))
    display.start("report", 0)
    frame = evaluation.read_predictions(output / "predictions.csv")
    report = evaluation.write_report(frame, output / "report", settings, origin, further)
    info = medvit.load_bundle(result.bundle).info
    evaluation.write_model_card(result.bundle, info, study.cases, report, origin)
    return report, further


def about(study: Study, experiment: training.Experiment) -> dict[str, str]:
    """What the report says about its origin."""
    config = experiment.config
    prep, folds = config.preprocessing, config.data.folds
    windows = ", ".join(w if isinstance(w, str) else f"{w[0]:g}/{w[1]:g}" for w in prep.windows)
    clahe = "with CLAHE" if prep.clahe else "no CLAHE"
    return {
        "Label": study.manifest.label_column,
        "Model": f"{config.model.name}, weights {experiment.weights.source}",
        "Input": f"{prep.size} px, HU windows {windows}, {clahe}",
        "Training": ", ".join(f"{s.name}: {s.trainable}, {s.epochs} epochs" for s in config.training.stages),
        "Split": f"{folds} patient-grouped folds, predictions out of fold" if folds else "patients held out",
        "Cases": f"{sum(case.label is not None for case in study.cases)} labelled, keyed by {study.manifest.key}",
        "Positive class": study.manifest.classes[-1],
    }


def show_result(report: evaluation.Report, further: evaluation.Further, output: Path, result: training.Result) -> None:
    """The figures, and where everything is."""
    show_report(report, further)
    card = result.bundle / "model_card.md"
    print(f"model        {result.bundle}\nmodel card   {card}\npredictions  {output / 'predictions.csv'}")


if __name__ == "__main__":  # torchrun -m
    sys.exit(main(None))
