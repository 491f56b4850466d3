"""A night over an export: what is done once, what is done again, and what stops it."""

import csv
import errno
import json
import os
import shutil
import sqlite3
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from pydicom import dcmread

from medvit.deployment import BatchOptions, Summary, Wanted, batch, predict_folder, scribe
from medvit.deployment.audit import AuditBrokenError
from medvit.deployment.premises import occupied
from medvit.inference import Encoder
from medvit.io import sandbox
from medvit.io.disk import DiskFullError
from medvit.io.headers import HeaderReader
from medvit.records import MedvitError, ReasonCode, ScanError, UsageError
from tests.deployment.batches import NOON, garble, lose, make_model, outputs, series, write_export
from tests.training.test_disk import largest_file


@pytest.fixture
def export(tmp_path) -> Path:
    """Six series, one of them cut short."""
    write_export(tmp_path / "export", 6, bad=1 / 6, seed=1)
    return tmp_path / "export"


def run(export: Path, output: Path, now: datetime = NOON, stop=lambda: False, **options) -> Summary:
    """A night; `stop` is asked once the files are listed."""
    work: list[str] = []
    return predict_folder(
        export,
        make_model(),
        output,
        BatchOptions(**options),
        clock=lambda: now,
        stop=lambda: work[-1] == "predicting" and stop(),
        start=lambda what, _total: work.append(what),
    )


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def studies(output: Path) -> set[str]:
    return {row["study_uid"].rpartition(".")[2] for row in table(output / "predictions.csv")}


def after(count: int, do):
    """A `stop` that does something when it is asked the n-th time, and never stops."""
    asked = []

    def stop() -> bool:
        asked.append(None)
        if len(asked) == count:
            do()
        return False

    return stop


# ---- what a run leaves ----------------------------------------------------------------------------------------------


def test_every_file_is_accounted_for_and_every_study_has_a_result_or_a_reason(export, tmp_path):
    done = run(export, tmp_path / "out")
    assert (done.predicted, done.failed, done.kept, done.waiting) == (5, 0, 0, 0)
    assert done.seen == done.used + done.quarantined + done.rejected + done.skipped == 24
    documents = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(documents) == 6
    (aside,) = (one for one in documents if one["state"] == "failed")
    assert aside["code"] == "PIXEL_TRUNCATED"
    for one in (one for one in documents if one is not aside):
        assert (tmp_path / "out" / one["report"]).is_file()
        assert (tmp_path / "out" / one["picture"]).is_file()
        assert one["predicted"] in one["probabilities"]
    assert {row["code"] for row in table(tmp_path / "out" / "quarantine.csv")} == {"PIXEL_TRUNCATED"}
    assert "5 predicted" in (tmp_path / "out" / "summary.txt").read_text()


def test_a_second_run_changes_no_byte(export, tmp_path):
    run(export, tmp_path / "out")
    before = outputs(tmp_path / "out")
    done = run(export, tmp_path / "out", NOON + timedelta(days=1))
    assert (done.predicted, done.kept) == (0, 5)
    assert outputs(tmp_path / "out") == before


def test_ledger_has_a_row_per_file_and_series_and_tells_paths_of_the_bad_alone(export, tmp_path):
    run(export, tmp_path / "out")
    with closing(sqlite3.connect(tmp_path / "out" / "ledger.sqlite")) as ledger:
        files = ledger.execute("SELECT path, outcome FROM file").fetchall()
        assert ledger.execute("SELECT count(*) FROM series").fetchone() == (6,)
    assert len(files) == 24
    assert all(bool(path) == (outcome in ("quarantine", "reject")) for path, outcome in files)


# ---- late slices, better series, lost studies ------------------------------------------------------------------------


def test_late_slices_supersede_the_result_under_a_new_uid_that_names_the_old(tmp_path):
    ct = series(0, slices=6)
    ct.write(tmp_path / "in", only=range(4))
    run(tmp_path / "in", tmp_path / "out")
    (old,) = (tmp_path / "out" / "sr").iterdir()
    ct.write(tmp_path / "in", only=range(4, 6))
    done = run(tmp_path / "in", tmp_path / "out", NOON + timedelta(hours=1))
    assert done.predicted == 1
    assert len(table(tmp_path / "out" / "predictions.csv")) == 1
    (new,) = (tmp_path / "out" / "sr").iterdir()
    assert new != old
    assert len(list((tmp_path / "out" / "sc").iterdir())) == 1
    report = dcmread(new)
    predecessor = report.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0]
    assert predecessor.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == old.stem
    assert predecessor.SeriesInstanceUID == report.SeriesInstanceUID
    assert report.ContentTime == "130000"


def test_files_that_were_only_touched_give_the_same_result_to_the_byte(export, tmp_path):
    run(export, tmp_path / "out")
    before = outputs(tmp_path / "out")
    for path in export.rglob("*.dcm"):
        os.utime(path, (1, 1))
    assert run(export, tmp_path / "out", NOON + timedelta(days=1)).predicted == 5
    assert outputs(tmp_path / "out") == before


def test_a_better_series_of_the_study_takes_the_place_of_the_first(tmp_path):
    first = series(0)
    first.write(tmp_path / "in" / "a")
    run(tmp_path / "in", tmp_path / "out")
    series(0, slices=8).but(uid=2).write(tmp_path / "in" / "b")
    run(tmp_path / "in", tmp_path / "out")
    (row,) = table(tmp_path / "out" / "predictions.csv")
    assert row["series_uid"].endswith(".2")
    assert len(list((tmp_path / "out" / "sr").iterdir())) == 1


def test_a_result_does_not_outlive_its_images(export, tmp_path):
    run(export, tmp_path / "out")
    kept = studies(tmp_path / "out")
    spoiled = next(folder for folder in sorted(export.iterdir()) if str(int(folder.name) + 1) in kept)
    lose(sorted(spoiled.iterdir()))
    run(export, tmp_path / "out")
    assert studies(tmp_path / "out") == kept - {str(int(spoiled.name) + 1)}
    assert len(list((tmp_path / "out" / "sr").iterdir())) == 4
    assert "SPACING_NONUNIFORM: 1 studies, 3 files" in (tmp_path / "out" / "summary.txt").read_text()


def test_a_study_that_left_the_folder_keeps_its_result(export, tmp_path):
    run(export, tmp_path / "out")
    kept = studies(tmp_path / "out")
    for folder in sorted(export.iterdir())[:3]:
        shutil.rmtree(folder)
    run(export, tmp_path / "out")
    assert studies(tmp_path / "out") == kept


# ---- which studies ---------------------------------------------------------------------------------------------------


def test_a_limit_leaves_the_others_for_the_next_run(export, tmp_path):
    first = run(export, tmp_path / "out", wanted=Wanted(limit=2))
    assert (first.predicted, first.waiting) == (2, 3)
    second = run(export, tmp_path / "out", wanted=Wanted(limit=2))
    assert (second.predicted, second.kept, second.waiting) == (2, 2, 1)
    assert run(export, tmp_path / "out").predicted == 1
    run(export, tmp_path / "whole")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_studies_are_chosen_by_uid_and_by_time_of_arrival(export, tmp_path):
    uid = series(0).dataset(0).StudyInstanceUID
    assert run(export, tmp_path / "one", wanted=Wanted(studies=frozenset({uid}))).predicted == 1
    assert studies(tmp_path / "one") == {"1"}
    for path in export.rglob("*.dcm"):
        os.utime(path, (1000, 1000))
    time.sleep(0.05)
    since = datetime.now(UTC)
    assert run(export, tmp_path / "new", wanted=Wanted(since=since)).predicted == 0
    os.utime(next((export / "00000").iterdir()), (3000, 3000))  # an old file that arrived just now
    assert run(export, tmp_path / "new", wanted=Wanted(since=since)).predicted == 1


def test_shards_are_together_the_whole(export, tmp_path):
    (export / "notes.txt").write_text("nothing")
    whole = run(export, tmp_path / "whole")
    parts = [run(export, tmp_path / f"part{i}", wanted=Wanted(shard=(i, 3))) for i in (1, 2, 3)]
    rows = [row for i in (1, 2, 3) for row in table(tmp_path / f"part{i}" / "predictions.csv")]
    assert sorted(map(str, rows)) == sorted(map(str, table(tmp_path / "whole" / "predictions.csv")))
    for count in ("seen", "used", "quarantined", "rejected", "skipped", "predicted"):
        assert sum(getattr(part, count) for part in parts) == getattr(whole, count)
    reports = {path.name: path.read_bytes() for i in (1, 2, 3) for path in (tmp_path / f"part{i}").rglob("*.dcm")}
    assert reports == {path.name: path.read_bytes() for path in (tmp_path / "whole").rglob("*.dcm")}


def test_what_was_set_aside_is_tried_again_when_asked_to(export, tmp_path, monkeypatch):
    small = SimpleNamespace(available=1)
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: small)
        done = run(export, tmp_path / "out")
    assert (done.predicted, done.failed) == (0, 5)
    assert {row["code"] for row in table(tmp_path / "out" / "quarantine.csv")} == {"OUT_OF_MEMORY", "PIXEL_TRUNCATED"}
    assert run(export, tmp_path / "out").kept == 5
    done = run(export, tmp_path / "out", wanted=Wanted(retry=frozenset({str(ReasonCode.OUT_OF_MEMORY)})))
    assert done.predicted == 5
    run(export, tmp_path / "whole")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def finishes(export: Path, output: Path, whole: Path) -> bool:
    """Whether a next run ends with what one run would have left."""
    run(export, output)
    run(export, whole)
    return outputs(output) == outputs(whole)


def test_a_full_disk_ends_the_run_and_the_next_one_goes_on(export, tmp_path):
    with ExitStack() as full, pytest.raises(DiskFullError, match="the disk is full"):
        run(export, tmp_path / "out", stop=after(5, lambda: full.enter_context(largest_file(100_000))))
    assert 0 < len(list((tmp_path / "out" / "sr").iterdir())) < 5
    assert finishes(export, tmp_path / "out", tmp_path / "whole")


def test_a_disk_that_fails_ends_the_run_and_the_next_one_goes_on(export, tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def fail(descriptor: int) -> None:
        calls.append(None)
        if len(calls) > 6:
            raise OSError(errno.EIO, "SECRET^NAME")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(MedvitError, match=r"Input/output error"):
            run(export, tmp_path / "out")
    assert finishes(export, tmp_path / "out", tmp_path / "whole")


def test_a_run_does_not_begin_where_its_results_do_not_fit(export, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(UsageError, match=r"the results of 5 studies need 4\.5 MB and its disk has 1\.0 MB free"):
        run(export, tmp_path / "out")


@pytest.mark.parametrize("place", ["file/out", "/proc/out"])
def test_an_output_that_cannot_be_made_is_told(export, tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written \(.*that this user may write to"):
        run(export, tmp_path / place)


def test_a_series_that_vanishes_costs_itself_and_is_read_when_it_is_back(export, tmp_path):
    def vanish() -> None:
        (export / "00005").rename(tmp_path / "aside")

    done = run(export, tmp_path / "out", stop=after(1, vanish))
    assert (done.predicted, done.failed) == (4, 1)
    assert {"IO_ERROR"} <= {row["code"] for row in table(tmp_path / "out" / "quarantine.csv")}
    (tmp_path / "aside").rename(export / "00005")
    assert finishes(export, tmp_path / "out", tmp_path / "whole")


def test_a_folder_that_vanishes_ends_the_run_and_sets_nothing_aside(export, tmp_path):
    with pytest.raises(MedvitError, match="the folder is gone"):
        run(export, tmp_path / "out", stop=after(5, lambda: export.rename(tmp_path / "aside")))
    (tmp_path / "aside").rename(export)
    done = run(export, tmp_path / "out")
    assert done.failed == 0
    assert finishes(export, tmp_path / "out", tmp_path / "whole")


def test_decoders_that_are_killed_cost_nothing(export, tmp_path):
    killed = []

    def kill() -> None:
        killed.extend(sandbox.shared().pids)
        for pid in killed:
            os.kill(pid, 9)

    run(export, tmp_path / "before")
    done = run(export, tmp_path / "out", stop=after(4, kill))
    assert killed
    assert (done.predicted, done.failed) == (5, 0)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "before")


def test_a_stop_finishes_what_is_under_way_and_leaves_the_rest(export, tmp_path):
    told = []
    done = run(export, tmp_path / "out", stop=lambda: bool(told.append(None)) or len(told) > 2)
    assert done.stopped
    assert done.predicted + done.waiting == 5
    assert 0 < done.predicted < 5
    assert len(table(tmp_path / "out" / "predictions.csv")) == done.predicted
    assert finishes(export, tmp_path / "out", tmp_path / "whole")


def test_two_runs_on_one_output_refuse_each_other(export, tmp_path):
    with occupied(tmp_path / "out"), pytest.raises(UsageError, match=rf"process {os.getpid()}\) is writing there"):
        run(export, tmp_path / "out")
    assert run(export, tmp_path / "out").predicted == 5


def test_a_network_share_is_refused(export, tmp_path, monkeypatch):
    share = SimpleNamespace(mountpoint=str(tmp_path), fstype="nfs4")
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: [share])
    with pytest.raises(UsageError, match=r"network share \(nfs4\)"):
        run(export, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["model", "configuration"])
def test_results_of_two_models_or_configurations_are_not_mixed(export, tmp_path, change):
    run(export, tmp_path / "out")
    before = outputs(tmp_path / "out")
    model = make_model(seed=1 if change == "model" else 0)
    options = BatchOptions(assume_hu=change == "configuration")
    with pytest.raises(UsageError, match=f"another {change}"):
        predict_folder(export, model, tmp_path / "out", options)
    assert outputs(tmp_path / "out") == before


def test_a_ledger_that_is_none_is_refused_and_left_alone(export, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ledger.sqlite").write_bytes(b"something else, 100 bytes long" * 10)
    with pytest.raises(UsageError, match="the ledger cannot be used"):
        run(export, tmp_path / "out")
    assert (tmp_path / "out" / "ledger.sqlite").read_bytes().startswith(b"something else")


# ---- mistakes to avoid -----------------------------------------------------------------------------------------------


def test_a_file_in_the_place_of_a_result_is_not_taken_for_one(export, tmp_path):
    """P1: "output file exists = done"."""
    run(export, tmp_path / "whole")
    for name, content in outputs(tmp_path / "whole").items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(content[: len(content) // 2])
    assert run(export, tmp_path / "out").predicted == 5
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_files_of_nothing_but_damage_end_in_order(tmp_path):
    garble(series(0, 4).write(tmp_path / "in"))
    done = run(tmp_path / "in", tmp_path / "out")
    assert done.predicted == 0
    assert table(tmp_path / "out" / "predictions.csv") == []


def test_without_dicom_there_are_tables_alone(export, tmp_path):
    run(export, tmp_path / "out", dicom=False)
    assert not (tmp_path / "out" / "sr").exists()
    assert len(table(tmp_path / "out" / "predictions.csv")) == 5


def one_report(output: Path):
    (path,) = (output / "sr").iterdir()
    return dcmread(path)


def rewrite(folder: Path, number: int, **changes) -> None:
    """The same series, with the same UIDs, but for something."""
    series(number).but(**changes).write(folder)


@pytest.mark.parametrize("change", ["pixels", "patient"])
def test_no_uid_stands_for_two_contents(tmp_path, change):
    rewrite(tmp_path / "in", 0)
    run(tmp_path / "in", tmp_path / "out")
    before = one_report(tmp_path / "out")
    rewrite(tmp_path / "in", 0, **({"hu": series(0).hu[::-1]} if change == "pixels" else {"patient": "corrected"}))
    run(tmp_path / "in", tmp_path / "out", NOON + timedelta(hours=2))
    after_ = one_report(tmp_path / "out")
    assert after_.SOPInstanceUID != before.SOPInstanceUID
    assert after_.ContentTime == "140000"
    named = after_.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert named.ReferencedSOPInstanceUID == before.SOPInstanceUID


def test_a_report_that_was_withdrawn_comes_back_as_it_was(tmp_path):
    paths = series(0, slices=6).write(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "out")
    before = outputs(tmp_path / "out")
    paths[2].rename(tmp_path / "aside")
    run(tmp_path / "in", tmp_path / "out", NOON + timedelta(hours=1))
    assert not list((tmp_path / "out" / "sr").iterdir())
    (tmp_path / "aside").rename(paths[2])
    run(tmp_path / "in", tmp_path / "out", NOON + timedelta(hours=2))
    assert outputs(tmp_path / "out") == before
    events = [json.loads(line)["event"] for line in (tmp_path / "out" / "audit.jsonl").read_text().splitlines()]
    assert "withdrawn" in events


def test_there_and_back_again_is_a_third_report(tmp_path):
    """A, then a better series B, then A again: it replaces B, and says so."""
    series(0).write(tmp_path / "in" / "a")
    run(tmp_path / "in", tmp_path / "out")
    first = one_report(tmp_path / "out").SOPInstanceUID
    series(0, slices=8).but(uid=2).write(tmp_path / "in" / "b")
    run(tmp_path / "in", tmp_path / "out")
    second = one_report(tmp_path / "out").SOPInstanceUID
    shutil.rmtree(tmp_path / "in" / "b")
    run(tmp_path / "in", tmp_path / "out")
    assert one_report(tmp_path / "out").SOPInstanceUID not in (first, second)


def test_images_of_another_patient_in_the_place_of_listed_ones_are_not_predicted(tmp_path):
    for number in range(3):
        rewrite(tmp_path / "in" / str(number), number)
    swap = after(1, lambda: rewrite(tmp_path / "in" / "2", 9))
    done = run(tmp_path / "in", tmp_path / "out", stop=swap)
    assert (done.predicted, done.failed) == (2, 1)
    assert "INCOMPLETE" in (tmp_path / "out" / "summary.txt").read_text()
    assert run(tmp_path / "in", tmp_path / "out").predicted == 1
    assert studies(tmp_path / "out") == {"1", "2", "10"}


def test_a_result_outlives_a_moment_in_which_its_images_cannot_be_read(export, tmp_path):
    run(export, tmp_path / "out")
    for path in (export / "00005").iterdir():
        os.utime(path, (1, 1))
    done = run(export, tmp_path / "out", stop=after(1, lambda: (export / "00005").rename(tmp_path / "aside")))
    assert done.failed == 1
    outdated = [row for row in table(tmp_path / "out" / "predictions.csv") if "OUTDATED" in row.get("flags", "")]
    assert len(outdated) == 1
    assert len(list((tmp_path / "out" / "sr").iterdir())) == 5
    (tmp_path / "aside").rename(export / "00005")
    run(export, tmp_path / "out")
    assert not [row for row in table(tmp_path / "out" / "predictions.csv") if row.get("flags")]


def test_a_share_that_is_gone_after_the_last_study_was_read_costs_nothing(export, tmp_path, monkeypatch):
    real = scribe.shared

    def gone(order):
        if export.exists():
            export.rename(tmp_path / "aside")
        return real(order)

    with monkeypatch.context() as patch:
        patch.setattr(scribe, "shared", gone)
        with pytest.raises(MedvitError, match="the folder is gone"):
            run(export, tmp_path / "out")
    (tmp_path / "aside").rename(export)
    assert finishes(export, tmp_path / "out", tmp_path / "whole")


def test_results_of_changed_images_that_are_not_due_say_so(export, tmp_path):
    run(export, tmp_path / "out")
    for path in export.rglob("*.dcm"):
        os.utime(path, (1, 1))
    done = run(export, tmp_path / "out", wanted=Wanted(limit=1))
    assert (done.predicted, done.waiting) == (1, 4)
    outdated = [row for row in table(tmp_path / "out" / "predictions.csv") if "OUTDATED" in row["flags"]]
    assert len(outdated) == 4
    assert "4 predictions are of images that changed since" in (tmp_path / "out" / "summary.txt").read_text()


def test_a_series_whose_last_slice_could_not_be_read_is_not_predicted_short(tmp_path, monkeypatch):
    paths = series(0, slices=6).write(tmp_path / "in" / "a")
    series(1).write(tmp_path / "in" / "b")
    run(tmp_path / "in", tmp_path / "out")
    kept = studies(tmp_path / "out")
    real = HeaderReader.read

    def fail(self, full_path, path):
        if path.endswith("a/IM0005.dcm"):
            raise ScanError(ReasonCode.IO_ERROR, "EIO", (path,))
        return real(self, full_path, path)

    os.utime(paths[-1], (1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(HeaderReader, "read", fail)
        done = run(tmp_path / "in", tmp_path / "out")
    assert done.predicted == 0
    assert studies(tmp_path / "out") == kept
    assert sum("OUTDATED" in row.get("flags", "") for row in table(tmp_path / "out" / "predictions.csv")) == 1
    assert run(tmp_path / "in", tmp_path / "out").predicted == 1


@pytest.mark.parametrize("codec", ["hex", "rot13", "zlib", "idna", "undefined", "utf-8", "ISO_IR 999"])
def test_a_character_set_that_is_none_stops_nothing(tmp_path, codec):
    for path in series(0).write(tmp_path / "in" / "bad"):
        path.write_bytes(path.read_bytes().replace(b"ISO_IR 192", codec.ljust(10).encode()))
    rewrite(tmp_path / "in" / "good", 1)
    assert run(tmp_path / "in", tmp_path / "out").predicted == 2
    assert len(list((tmp_path / "out" / "sr").iterdir())) == 2


def test_a_report_that_cannot_be_made_costs_itself(export, tmp_path, monkeypatch):
    def unfit(order):
        return real(replace(order, number=-1, rgb=np.zeros((2, 2), np.uint8)))  # no picture

    real = scribe.shared
    monkeypatch.setattr(scribe, "shared", unfit)
    assert run(export, tmp_path / "out").predicted == 5
    documents = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [one["detail"] for one in documents if one["state"] == "done"] == ["no DICOM result (ValueError)"] * 5


def test_a_model_that_fails_on_all_ends_the_run_and_sets_little_aside(export, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA error: SECRET^NAME")

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "look", fail)
        with pytest.raises(MedvitError, match=r"the model failed on 3 studies in a row \(RuntimeError\)"):
            run(export, tmp_path / "out")
    retried = run(export, tmp_path / "out", wanted=Wanted(retry=frozenset({str(ReasonCode.MODEL_FAILED)})))
    assert (retried.predicted, retried.failed) == (5, 0)


def test_studies_that_fail_again_do_not_starve_the_others(export, tmp_path):
    for name in ("00000", "00001"):
        (export / name).rename(tmp_path / name)
        (export / name).mkdir()
        for path in (tmp_path / name).iterdir():
            shutil.copy(path, export / name)

    def vanish() -> None:
        for name in ("00000", "00001"):
            shutil.rmtree(export / name)

    run(export, tmp_path / "out", stop=after(1, vanish), wanted=Wanted(limit=2))
    assert run(export, tmp_path / "out", wanted=Wanted(limit=2)).predicted == 2


def test_a_run_that_has_not_ended_says_so(export, tmp_path, monkeypatch):
    run(export, tmp_path / "out", wanted=Wanted(limit=1))

    def end(*_):
        raise SystemExit(9)

    monkeypatch.setattr(batch, "_predict", end)
    with pytest.raises(SystemExit):
        run(export, tmp_path / "out")
    assert "has not ended" in (tmp_path / "out" / "summary.txt").read_text()


def test_what_was_not_written_here_is_not_swept_away(export, tmp_path):
    for name in ("mine.dcm", "2.25.1.dcm.bak", "notes.txt"):
        (tmp_path / "out" / "sr").mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / "sr" / name).write_text("mine")
    (tmp_path / "out" / "sr" / "2.25.7.dcm").write_text("left by a kill")
    run(export, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out" / "sr").iterdir() if path.read_bytes() == b"mine"} == {
        "mine.dcm",
        "2.25.1.dcm.bak",
        "notes.txt",
    }
    assert not (tmp_path / "out" / "sr" / "2.25.7.dcm").exists()


def test_a_report_that_is_gone_is_made_again(export, tmp_path):
    run(export, tmp_path / "out")
    before = outputs(tmp_path / "out")
    next((tmp_path / "out" / "sr").iterdir()).unlink()
    assert run(export, tmp_path / "out").predicted == 1
    assert outputs(tmp_path / "out") == before


def test_an_audit_that_was_shortened_is_noticed(export, tmp_path):
    run(export, tmp_path / "out")
    audit = tmp_path / "out" / "audit.jsonl"
    audit.write_bytes(b"".join(audit.read_bytes().splitlines(keepends=True)[:3]))
    with pytest.raises(AuditBrokenError, match="has 3 entries, and had 7"):
        run(export, tmp_path / "out")


def test_results_under_two_site_keys_are_not_mixed(export, tmp_path, monkeypatch):
    run(export, tmp_path / "out")
    monkeypatch.setenv("MEDVIT_SITE_KEY", "another")
    (tmp_path / "out" / "audit.jsonl").unlink()
    with pytest.raises(UsageError, match="another site key"):
        run(export, tmp_path / "out")


def test_a_study_that_is_not_there_is_told(export, tmp_path):
    with pytest.raises(UsageError, match=r"--study 1\.2\.3: no usable study"):
        run(export, tmp_path / "out", wanted=Wanted(studies=frozenset({"1.2.3"})))


def test_a_scribe_that_is_killed_is_replaced(export, tmp_path):
    run(export, tmp_path / "before")
    killed = []

    def kill() -> None:
        _, one = scribe._scribe
        killed.append(one.process.pid)
        os.kill(killed[0], 9)

    assert run(export, tmp_path / "out", stop=after(3, kill)).predicted == 5
    assert killed
    assert outputs(tmp_path / "out") == outputs(tmp_path / "before")


def test_a_study_of_which_something_is_arriving_waits_as_a_whole(tmp_path):
    """The thick series settled, the thin one has not: the result would be replaced within the hour."""
    for path in series(0).write(tmp_path / "in" / "thick"):
        os.utime(path, (1, 1))
    series(0, slices=8).but(uid=2).write(tmp_path / "in" / "thin")
    done = run(tmp_path / "in", tmp_path / "out", settled_s=3600)
    assert done.predicted == 0
    assert done.seen == done.quarantined == 12
    assert "1 waiting" in (tmp_path / "out" / "summary.txt").read_text()
    assert run(tmp_path / "in", tmp_path / "out").predicted == 1


def test_an_error_of_the_disk_while_decoding_is_no_damage(export, tmp_path):
    def vanish() -> None:
        for path in (export / "00005").iterdir():
            path.rename(tmp_path / path.name)
            path.mkdir()  # opens, and cannot be read

    done = run(export, tmp_path / "out", stop=after(1, vanish))
    assert (done.predicted, done.failed) == (4, 1)
    codes = {row["code"] for row in table(tmp_path / "out" / "quarantine.csv")}
    assert codes <= {"PIXEL_TRUNCATED", "IO_ERROR", "INCOMPLETE"}
    for path in list((export / "00005").iterdir()):
        path.rmdir()
        (tmp_path / path.name).rename(path)
    assert finishes(export, tmp_path / "out", tmp_path / "whole")


def test_an_output_in_the_folder_of_the_images_is_refused(export):
    with pytest.raises(UsageError, match="lies in the folder of the images"):
        run(export, export / "results")
    assert not (export / "results").exists()


def test_a_prediction_whose_report_could_not_be_made_is_made_again(export, tmp_path, monkeypatch):
    def die(order):
        raise ScanError(ReasonCode.WORKER_DIED, "the process that composes reports ended twice")

    with monkeypatch.context() as patch:
        patch.setattr(scribe, "shared", die)
        run(export, tmp_path / "out")
    assert "5 predictions without" in (tmp_path / "out" / "summary.txt").read_text()
    assert finishes(export, tmp_path / "out", tmp_path / "whole")


def test_a_relative_folder_is_the_same(export, tmp_path, monkeypatch):
    run(export, tmp_path / "whole")
    monkeypatch.chdir(export.parent)
    run(Path("export"), tmp_path / "out")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
