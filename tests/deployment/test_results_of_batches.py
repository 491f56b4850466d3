"""What a night leaves for others: DICOM that validators and a PACS take, CSVs that Excel opens, nothing outside OUT."""

import csv
import io
import json
import os
from pathlib import Path

import highdicom as hd
import pytest
from ct_builder import Ct, put
from dicom_validators import dumped, errors_by_dciodvfy, false_alarm, said_by_pixelmed
from pydicom import dcmread

from medvit.deployment import BatchOptions, predict_folder
from medvit.io import Finding
from tests.deployment.batches import NOON, garble, make_model, series, write_export

FINDING = {"1": Finding("50960005", "SCT", "Hemorrhage")}
JAPANESE = "山田病院"


def japanese(dataset, index) -> None:
    """A hospital and a patient in the letters of ISO 2022 IR 87, as scanners in Japan write them."""
    dataset.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
    put(dataset, "PatientName", b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B")
    put(dataset, "InstitutionName", b"\x1b$B;3EDIB1!\x1b(B")


def run(export: Path, output: Path, **options):
    return predict_folder(export, make_model(), output, BatchOptions(findings=FINDING, **options), clock=lambda: NOON)


@pytest.fixture(scope="module")
def night(tmp_path_factory) -> Path:
    """Two nights: late slices in the second, a Japanese patient, something bad."""
    folder = tmp_path_factory.mktemp("night")
    write_export(folder / "in", 4, bad=0.25)
    Ct(study=77, damage=japanese).write(folder / "in" / "japan")
    late = series(50, slices=6)
    late.write(folder / "in" / "late", only=range(4))
    run(folder / "in", folder / "out")
    late.write(folder / "in" / "late", only=range(4, 6))
    run(folder / "in", folder / "out")
    return folder / "out"


def test_every_report_and_picture_is_without_error_to_dciodvfy(night):
    written = sorted((*(night / "sr").iterdir(), *(night / "sc").iterdir()))
    assert len(written) == 2 * 5
    assert [errors_by_dciodvfy(path) for path in written] == [[]] * len(written)


def test_every_report_is_read_by_pydicom_highdicom_and_dsrdump(night):
    for path in (night / "sr").iterdir():
        assert dcmread(path).Modality == "SR"
        assert hd.sr.srread(path).content.get_image_measurement_groups()
        assert "Imaging Measurement Report" in dumped(path)


def test_the_report_that_replaces_another_is_without_error_to_pixelmed(night):
    (report,) = (path for path in (night / "sr").iterdir() if "PredecessorDocumentsSequence" in dcmread(path))
    assert not [line for line in said_by_pixelmed(report) if not false_alarm(line)]


@pytest.mark.slow
def test_every_report_is_without_error_to_pixelmed(night):
    for path in (night / "sr").iterdir():
        assert not [line for line in said_by_pixelmed(path) if not false_alarm(line)]


def test_a_pacs_takes_every_report_and_picture(night, orthanc):
    for path in (*(night / "sr").iterdir(), *(night / "sc").iterdir()):
        assert orthanc.ask("/instances", path.read_bytes())["Status"] == "Success"
    assert orthanc.instances() == 10


def test_reports_are_measurements_and_no_basic_text(night):
    """P2: "Basic Text SR that viewers do not show"."""
    for path in (night / "sr").iterdir():
        report = dcmread(path)
        assert report.SOPClassUID.name == "Comprehensive 3D SR Storage"
        assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"


def test_csvs_open_in_excel_with_japanese_intact(night):
    raw = (night / "predictions.csv").read_bytes()
    assert raw.startswith(b"\xef\xbb\xbf")  # or Excel takes it for the code page of the machine
    rows = list(csv.DictReader(io.StringIO(raw.decode("utf-8-sig"))))
    assert JAPANESE in {row["site"] for row in rows}
    assert JAPANESE in {one.get("site") for one in json.loads((night / "results.json").read_text(encoding="utf-8"))}


def test_tables_of_ascii_alone_are_plain(tmp_path):
    series(0).write(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "predictions.csv").read_bytes().startswith(b"case_id")


HOSTILE = [
    "../../../tmp/x", "a\0b", "..\\..\\x", "9" * 300, "\u202e😀.dcm", "/etc/passwd", "=1+1", "+cmd|' /C calc'!A0",
    "-2+3", "@SUM(A1)", "\tx", "a\nb", "a\rb", "'", '"', ",;", "CON", "%s%n", "{0}", "<b>",
]  # fmt: skip


def test_hostile_ids_and_uids_leave_nothing_outside_and_no_formula(tmp_path):
    """HAZARDS G10: ids, names, descriptions and UIDs; what is refused is named, what is not is predicted."""
    for number, value in enumerate(HOSTILE):
        raw = value.encode()
        raw += b" " * (len(raw) % 2)

        def names(dataset, index, raw=raw) -> None:
            for keyword in ("PatientID", "PatientName", "AccessionNumber", "InstitutionName", "Manufacturer"):
                put(dataset, keyword, raw)

        def uids(dataset, index, raw=raw) -> None:
            put(dataset, "StudyInstanceUID", raw)

        series(number).but(damage=names).write(tmp_path / "in" / f"n{number}")
        series(100 + number).but(damage=uids).write(tmp_path / "in" / f"u{number}")
    check_hostile(tmp_path, predicted=len(HOSTILE))


def test_hostile_paths_leave_nothing_outside_and_no_formula(tmp_path):
    for number, value in enumerate(HOSTILE):
        name = os.fsencode(value.replace("/", "_").replace("\0", "_"))[:200] + b"\xff"  # no text in any encoding
        folder = tmp_path / "in" / str(number)
        paths = series(number).write(folder)
        garble(paths)
        for path in paths:
            os.rename(path, os.path.join(os.fsencode(folder), name + path.name.encode()))  # noqa: PTH104, PTH118
    check_hostile(tmp_path, predicted=0)


def check_hostile(folder: Path, predicted: int) -> None:
    before = set(folder.rglob("*"))
    done = run(folder / "in", folder / "out")
    assert done.predicted == predicted
    assert done.seen == done.used + done.quarantined + done.rejected + done.skipped
    assert {path for path in folder.rglob("*") if not path.is_relative_to(folder / "out")} == before
    for path in (folder / "out").rglob("*.dcm"):
        assert path.name.removesuffix(".dcm").replace(".", "").isdigit()
    for name in ("predictions.csv", "quarantine.csv"):
        text = (folder / "out" / name).read_bytes().decode("utf-8-sig")
        for row in csv.reader(io.StringIO(text, newline="")):
            assert not [cell for cell in row if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))
    (folder / "out" / "summary.txt").read_text(encoding="utf-8")
