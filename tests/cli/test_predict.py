import csv
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from medvit.cli import predict
from medvit.cli.stopping import Stop
from medvit.data.pseudonym import pseudonym
from medvit.deployment import batch, work
from medvit.io import scan_folder
from medvit.records import Outcome, ReasonCode, ScanError
from tests.deployment.batches import series, write_export


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def results(export, trained, tmp_path) -> Path:
    assert predict.main([str(export.folder), "--model", str(trained), "--output", str(tmp_path / "out")]) == 3
    return tmp_path / "out"


def test_every_study_has_a_prediction_or_a_reason(results, export):
    predicted = rows(results / "predictions.csv")
    assert len(predicted) == export.patients
    assert all(row["model_sha256"] and row["threshold"] for row in predicted)
    aside = {row["code"] for row in rows(results / "quarantine.csv")}
    assert {"SLICE_MISSING", "PIXEL_TRUNCATED", "RESCALE_MISSING", "SPACING_NONUNIFORM"} <= aside


def test_second_run_adds_nothing_and_repeats_nothing(results, export, trained, capsys):
    before = {name: (results / name).read_bytes() for name in ("predictions.csv", "quarantine.csv")}
    capsys.readouterr()
    assert predict.main([str(export.folder), "--model", str(trained), "--output", str(results)]) == 3
    assert f"0 studies predicted, {export.patients} already done" in capsys.readouterr().out
    assert before == {name: (results / name).read_bytes() for name in before}


def test_new_slices_supersede_and_do_not_duplicate(export, trained, tmp_path, capsys):
    folder = tmp_path / "folder"
    shutil.copytree(export.folder, folder)
    arguments = [str(folder), "--model", str(trained), "--output", str(tmp_path / "out")]
    predict.main(arguments)
    first = next(path for path in sorted(folder.rglob("IM*")))
    os.utime(first, (1, 1))
    capsys.readouterr()
    predict.main(arguments)
    shown = capsys.readouterr().out
    assert "already done" in shown
    assert len(rows(tmp_path / "out" / "predictions.csv")) == export.patients


def test_results_of_two_models_are_not_mixed(results, export, train_tiny, tmp_path, capsys):
    train_tiny(tmp_path / "other", "training.seed=3", "training.stages.0.epochs=1")
    arguments = [str(export.folder), "--model", str(tmp_path / "other"), "--output", str(results)]
    assert predict.main(arguments) == 2
    assert "another model" in capsys.readouterr().err


def test_one_case_that_crashes_does_not_stop_the_others(export, trained, tmp_path, monkeypatch):
    read, calls = work.read, []

    def crash_first(series):
        calls.append(series)
        if len(calls) == 1:
            raise ZeroDivisionError("SECRET^NAME")
        return read(series)

    monkeypatch.setattr(work, "read", crash_first)
    assert predict.main([str(export.folder), "--model", str(trained), "--output", str(tmp_path / "out")]) == 3
    assert len(rows(tmp_path / "out" / "predictions.csv")) == export.patients - 1
    crashed = [row for row in rows(tmp_path / "out" / "quarantine.csv") if row["code"] == "WORKER_DIED"]
    assert crashed
    assert all("SECRET" not in row["detail"] for row in crashed)


def add_volume(monkeypatch, **changes):
    """Make the scan find a second volume on the files of the first usable series; returns those files."""
    scan = batch.scan_folder
    found = []

    def scan_with_two(folder, **settings):
        inventory = scan(folder, **settings)
        series = next(series for series in inventory.series if series.usable)
        found.extend(series.files)
        return replace(inventory, series=(*inventory.series, replace(series, part=1, **changes)))

    monkeypatch.setattr(batch, "scan_folder", scan_with_two)
    return found


def account(output, files):
    """(outcome, code, detail) of each of the files in the ledger."""
    names = {pseudonym("path", file) for file in files}
    with closing(sqlite3.connect(output / "ledger.sqlite")) as ledger:
        found = ledger.execute("SELECT name, outcome, code, detail FROM file").fetchall()
    return {tuple(row) for name, *row in found if name in names}


def test_a_file_of_two_volumes_is_used_where_one_is(export, trained, tmp_path, monkeypatch):
    files = add_volume(monkeypatch, shape=(1, 8, 8))
    predict.main([str(export.folder), "--model", str(trained), "--output", str(tmp_path)])
    assert len(rows(tmp_path / "predictions.csv")) == export.patients
    assert {Outcome(outcome).used for outcome, _, _ in account(tmp_path, files)} == {True}


def test_the_volume_not_selected_is_accounted_for_with_the_reason(export, trained, tmp_path, monkeypatch):
    scan = batch.scan_folder

    def split(folder, **settings):
        inventory = scan(folder, **settings)
        series = next(series for series in inventory.series if series.usable)
        parts = [
            replace(series, files=series.files[:5], shape=(5, *series.shape[1:])),
            replace(series, files=series.files[5:], shape=(3, *series.shape[1:]), part=1),
        ]
        return replace(inventory, series=tuple(parts + [other for other in inventory.series if other is not series]))

    passed = next(series for series in scan(export.folder).series if series.usable).files[5:]
    monkeypatch.setattr(batch, "scan_folder", split)
    predict.main([str(export.folder), "--model", str(trained), "--output", str(tmp_path)])
    detail = "another volume of this series was chosen: more slices (5 against 3)"
    assert account(tmp_path, passed) == {(Outcome.SKIP, ReasonCode.NOT_SELECTED, detail)}


def test_a_failed_volume_sets_its_own_files_aside_and_all_files_are_accounted_for(
    export, trained, tmp_path, monkeypatch, capsys
):
    files = add_volume(monkeypatch, shape=(1, 8, 8))
    read = work.read

    def fail(series):
        if set(series.files) == set(files):
            raise ScanError(ReasonCode.HU_IMPLAUSIBLE, "constant")
        return read(series)

    monkeypatch.setattr(work, "read", fail)
    predict.main([str(export.folder), "--model", str(trained), "--output", str(tmp_path)])
    assert account(tmp_path, files) == {(Outcome.QUARANTINE, ReasonCode.HU_IMPLAUSIBLE, "constant")}
    seen, *parts = map(int, re.findall(r"(\d+) (?:seen|used|quarantined|rejected|skipped)", capsys.readouterr().out))
    assert seen == sum(parts) == len([path for path in export.folder.rglob("*") if path.is_file()])


def test_export_of_damaged_series_alone_still_ends_in_order(export, trained, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(export.folder, folder)
    while usable := [series for series in scan_folder(folder).series if series.usable]:
        for name in usable[0].files:
            (folder / name).unlink()
    assert predict.main([str(folder), "--model", str(trained), "--output", str(tmp_path / "out")]) == 3
    assert (tmp_path / "out" / "predictions.csv").read_text().startswith("case_id,patient_id,label,p_0,p_1")
    assert rows(tmp_path / "out" / "predictions.csv") == []


@pytest.mark.parametrize("kind", ["no model", "changed"])
def test_wrong_model_ends_with_2(kind, export, trained, tmp_path, capsys):
    model = tmp_path / "model"
    if kind == "changed":
        shutil.copytree(trained / "bundle", model)
        with (model / "model.safetensors").open("r+b") as stream:
            stream.seek(-1, 2)
            stream.write(b"\x55")
    assert predict.main([str(export.folder), "--model", str(model), "--output", str(tmp_path / "out")]) == 2
    assert "error:" in capsys.readouterr().err


def test_a_scan_that_the_model_is_not_for_gets_a_reason_and_no_score(export, for_one_vendor, tmp_path):
    arguments = [str(export.folder), "--model", str(for_one_vendor), "--output", str(tmp_path / "out")]
    assert predict.main(arguments) == 3
    predicted = rows(tmp_path / "out" / "predictions.csv")
    aside = [row for row in rows(tmp_path / "out" / "quarantine.csv") if row["code"] == "NOT_FOR_MODEL"]
    assert 0 < len(predicted) < export.patients
    assert len({row["series_uid"] for row in aside}) == export.patients - len(predicted)
    assert all("manufacturer SIEMENS" in row["detail"] for row in aside)
    assert all(float(row["ood_score"]) > 0 for row in predicted)


def started(*arguments: str) -> subprocess.Popen:
    """The command in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "medvit.cli", "predict", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_the_command_in_order_and_the_next_run_goes_on(number, trained, tmp_path):
    write_export(tmp_path / "in", 120, bad=0)
    arguments = [str(tmp_path / "in"), "--model", str(trained), "--output", str(tmp_path / "out")]
    run = started(*arguments)
    while not list((tmp_path / "out" / "sr").glob("*.dcm")):
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(number)
    shown, told = run.communicate(timeout=60)
    assert run.returncode == 128 + number, told
    assert "waiting" in shown
    assert "stopping: what is under way is finished first" in told
    done = len(rows(tmp_path / "out" / "predictions.csv"))
    assert 0 < done < 120
    assert done == len(list((tmp_path / "out" / "sr").iterdir()))


def test_watching_takes_what_arrives_until_it_is_stopped(trained, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "in"
    looks: list[int] = []

    def wait(stop: Stop, seconds: float) -> bool:
        looks.append(int(seconds))
        if len(looks) == 1:  # nothing was there
            series(0).write(folder / "a")
        elif len(looks) == 2:
            series(1).write(folder / "b")
        return len(looks) == 3

    monkeypatch.setattr(Stop, "wait", wait)
    folder.mkdir()
    arguments = ["--model", str(trained), "--output", str(tmp_path / "out"), "--watch", "7", "--settled", "0"]
    assert predict.main([str(folder), *arguments]) == 0
    assert looks == [7, 7, 7]
    shown = capsys.readouterr()
    assert "the folder is empty" in shown.err
    assert len(rows(tmp_path / "out" / "predictions.csv")) == 2


def test_what_is_still_arriving_waits(trained, tmp_path):
    series(0).write(tmp_path / "in")
    arguments = [str(tmp_path / "in"), "--model", str(trained), "--output", str(tmp_path / "out")]
    predict.main([*arguments, "--settled", "3600"])
    assert rows(tmp_path / "out" / "predictions.csv") == []
    assert "1 waiting" in (tmp_path / "out" / "summary.txt").read_text()
    predict.main(arguments)
    assert len(rows(tmp_path / "out" / "predictions.csv")) == 1


def test_the_run_as_json(trained, tmp_path, capsys):
    series(0).write(tmp_path / "in")
    assert (
        predict.main([str(tmp_path / "in"), "--model", str(trained), "--output", str(tmp_path / "out"), "--json"]) == 0
    )
    done = json.loads(capsys.readouterr().out)
    assert (done["predicted"], done["seen"], done["used"]) == (1, 4, 4)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--since", "soon"),
        ("--limit", "0"),
        ("--shard", "3/2"),
        ("--retry", "NO_SUCH_CODE"),
        ("--finding", "1=Hemorrhage"),
        ("--finding", f"1=SCT:1:{'x' * 65}"),
        ("--query", "StudyDate"),
    ],
)
def test_wrong_options_end_with_2_and_say_what_is_needed(option, value, tmp_path, capsys):
    assert predict.main([str(tmp_path), "--model", "m", "--output", "o", option, value]) == 2
    assert option in capsys.readouterr().err


def test_the_unit_in_the_readme_takes_3_for_success():
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert "SuccessExitStatus=3 " in text
