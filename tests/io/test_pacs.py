"""A real PACS, both ways and over both protocols: what comes back is what was sent, and only CT comes."""

import itertools
import logging
import os
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from ct_builder import Ct, phantom_hu, put
from orthanc import Orthanc
from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless, JPEGLosslessSV1, RLELossless

from medvit.io import (
    PacsError,
    PacsRefusedError,
    ResultContext,
    Retry,
    open_pacs,
    open_source,
    phantom,
    read,
    scan_folder,
    write_sc,
    write_sr,
)
from medvit.records import Prediction, UsageError

JAPANESE = (
    rb"ISO 2022 IR 13\ISO 2022 IR 87",
    b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3=\x1b$B;3ED\x1b(J^\x1b$BB@O:\x1b(J=\x1b$B$d$^$@\x1b(J^\x1b$B$?$m$&\x1b(J",
)
CANARY = "Canary77"
AT_ONCE = Retry(tries=3, first_s=0.01)


@pytest.fixture(params=["dicomweb", "dimse"])
def address(request: pytest.FixtureRequest, orthanc: Orthanc) -> str:
    return str(getattr(orthanc, request.param))


@pytest.fixture(scope="session")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pacs") / "hospital"
    patients = phantom.make_patients(2, 1)
    return phantom.write_hospital(folder, patients, faults=False, matrix=40, slices=8).folder


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def volumes(folder: Path) -> dict[str, np.ndarray]:
    return {series.uid: read(series).hu for series in scan_folder(folder).series if series.outcome.used}


def data_set(path: Path) -> bytes:
    """The bytes after the file meta information, which is the sender's (PS3.10 7.1)."""
    whole = path.read_bytes()
    return whole[144 + int.from_bytes(whole[140:144], "little") :]


def named(dataset, index):
    put(dataset, "SpecificCharacterSet", JAPANESE[0] + b" ")
    put(dataset, "PatientName", JAPANESE[1] + b" " * (len(JAPANESE[1]) % 2))


# ---- there and back -------------------------------------------------------------------------------------------------


def test_there_and_back(address: str, orthanc: Orthanc, hospital: Path, tmp_path: Path) -> None:
    pacs = open_pacs(address, retry=AT_ONCE)
    settled = []
    sent = pacs.send(files(hospital), settled=settled.append)
    assert len(sent) == orthanc.instances() == 16
    assert [(one.path, one.accepted, one.code) for one in sent] == [(path, True, "") for path in files(hospital)]
    assert tuple(settled) == sent
    found = pacs.find({})
    assert sorted(one.study_uid for one in found) == orthanc.studies()
    assert {one.instances for one in found} == {8}
    for number, one in enumerate(found):
        assert pacs.fetch(one.study_uid, tmp_path / "spool" / f"{number}") == 8
    assert not list(tmp_path.rglob("*.part"))
    original, back = volumes(hospital), volumes(tmp_path / "spool")
    assert original.keys() == back.keys()
    assert all(np.array_equal(original[uid], back[uid]) for uid in original)
    uids = [{dcmread(path).SOPInstanceUID for path in files(folder)} for folder in (hospital, tmp_path / "spool")]
    assert uids[0] == uids[1]


def test_dicomweb_keeps_every_byte(orthanc: Orthanc, hospital: Path, tmp_path: Path) -> None:
    pacs = open_pacs(orthanc.dicomweb)
    pacs.send(files(hospital))
    for number, one in enumerate(pacs.find({})):
        pacs.fetch(one.study_uid, tmp_path / f"{number}")
    assert sorted(path.read_bytes() for path in files(hospital)) == sorted(
        path.read_bytes() for path in files(tmp_path)
    )


@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless, JPEGLosslessSV1, JPEG2000Lossless]
)
def test_transfer_syntax_and_data_set_stay(address: str, tmp_path: Path, syntax: str) -> None:
    paths = Ct(hu=phantom_hu(3), transfer_syntax=syntax).write(tmp_path / "ct")
    pacs = open_pacs(address)
    assert all(one.accepted for one in pacs.send(paths))
    (study,) = pacs.find({})
    assert pacs.fetch(study.study_uid, tmp_path / "back") == 3
    assert {dcmread(path).file_meta.TransferSyntaxUID for path in files(tmp_path / "back")} == {syntax}
    assert sorted(map(data_set, files(tmp_path / "back"))) == sorted(map(data_set, paths))


@pytest.mark.parametrize("back", ["dicomweb", "dimse"])
def test_japanese_names_stay_to_the_byte(address: str, orthanc: Orthanc, tmp_path: Path, back: str) -> None:
    open_pacs(address).send(Ct(hu=phantom_hu(2), damage=named).write(tmp_path / "ct"))
    pacs = open_pacs(getattr(orthanc, back))
    (study,) = pacs.find({"StudyDate": "20210304"})
    pacs.fetch(study.study_uid, tmp_path / "back")
    for path in files(tmp_path / "back"):
        dataset = dcmread(path)
        assert dataset.get_item("PatientName").value.rstrip() == JAPANESE[1]
        assert b"\\".join(each.encode() for each in dataset.SpecificCharacterSet) == JAPANESE[0]


def test_results_join_their_study(address: str, orthanc: Orthanc, tmp_path: Path) -> None:
    source = open_source(Ct(damage=named).write(tmp_path / "ct"))
    context = ResultContext(
        model_name="chest model",
        model_version="1",
        model_sha256="ab" * 32,
        config_sha256="cd" * 32,
        now=datetime(2025, 3, 4),
    )
    prediction = Prediction(
        case_id="case",
        patient_id="hash",
        probabilities={"normal": 0.25, "bleed": 0.75},
        threshold=0.4,
        slice_weights=((0, 0.4), (5, 0.6)),
    )
    picture = np.zeros((64, 48, 3), np.uint8)
    results = [
        write_sr(prediction, source, context, tmp_path / "sr"),
        write_sc(picture, 5, source, context, tmp_path / "sc"),
    ]
    pacs = open_pacs(address)
    pacs.send(files(tmp_path / "ct"))
    assert [(one.accepted, one.code) for one in pacs.send(results)] == [(True, "")] * 2
    assert orthanc.studies() == [source.uids[0]]
    assert {each["MainDicomTags"]["Modality"] for each in orthanc.ask("/series?expand")} == {"CT", "SR", "OT"}
    assert pacs.find({})[0].instances == 14
    assert pacs.fetch(source.uids[0], tmp_path / "back") == 12  # the results stay where they are
    for result in results:
        identifier = orthanc.ask("/tools/lookup", data=result.stem.encode())[0]["ID"]
        (tmp_path / "stored.dcm").write_bytes(orthanc.ask(f"/instances/{identifier}/file"))
        assert data_set(tmp_path / "stored.dcm") == data_set(result)


def test_sent_twice_is_there_once(address: str, orthanc: Orthanc, hospital: Path) -> None:
    pacs = open_pacs(address)
    for _ in range(2):
        assert all(one.accepted for one in pacs.send(files(hospital)))
        assert orthanc.instances() == 16


def test_a_bad_file_does_not_stop_the_others(address: str, orthanc: Orthanc, hospital: Path, tmp_path: Path) -> None:
    (tmp_path / "text.dcm").write_text("no image")
    broken = tmp_path / "broken.dcm"
    broken.write_bytes(files(hospital)[0].read_bytes()[:200])
    sent = open_pacs(address, retry=AT_ONCE).send(
        [tmp_path / "text.dcm", tmp_path / "absent.dcm", broken, files(hospital)[0]]
    )
    assert [one.accepted for one in sent] == [False, False, False, True]
    assert [one.code for one in sent[:2]] == ["NOT_DICOM", "IO_ERROR"]
    assert sent[2].code.startswith(("HTTP_", "STATUS_", "NOT_DICOM"))
    assert orthanc.instances() == 1


def test_find_by_keys(address: str, hospital: Path, tmp_path: Path) -> None:
    pacs = open_pacs(address)
    pacs.send([*files(hospital), *Ct(hu=phantom_hu(1), study=2, damage=_magnetic).write(tmp_path / "mr")])
    one = dcmread(files(hospital)[0])
    for key in ("PatientID", "StudyInstanceUID"):
        assert [each.study_uid for each in pacs.find({key: one[key].value})] == [one.StudyInstanceUID]
    assert pacs.find({"StudyDate": "19000101-19000102"}) == ()
    assert len(pacs.find({})) == 2
    (other,) = pacs.find({"ModalitiesInStudy": "MR"})
    assert pacs.fetch(other.study_uid, tmp_path / "none") == 0
    assert not (tmp_path / "none").exists()
    assert pacs.fetch("1.2.3", tmp_path / "none") == 0
    assert not (tmp_path / "none.part").exists()


def _magnetic(dataset, index):
    dataset.Modality = "MR"


def test_a_folder_that_is_there_is_left_alone(address: str, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    pacs = open_pacs(address)
    pacs.send(Ct(hu=phantom_hu(1)).write(tmp_path / "ct"))
    with pytest.raises(UsageError, match="exists"):
        pacs.fetch(pacs.find({})[0].study_uid, tmp_path / "study")


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_down_then_up(address: str, orthanc: Orthanc, hospital: Path, tmp_path: Path) -> None:
    waits = []

    def start_at_the_second(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            orthanc.start()

    pacs = open_pacs(address, retry=Retry(tries=5, first_s=0.01, sleep=start_at_the_second), connect_s=2, read_s=5)
    orthanc.stop()
    try:
        assert all(one.accepted for one in pacs.send(files(hospital)))
        assert len(waits) == 2
        assert len(pacs.find({})) == 2
    finally:
        if orthanc.process is None:
            orthanc.start()


def test_restart_while_associated(address: str, orthanc: Orthanc, hospital: Path) -> None:
    """The connection that a sender keeps is gone in the middle."""
    seen = itertools.count()

    def restart_once(_: object) -> None:
        if next(seen) == 5:
            orthanc.stop()
            orthanc.start()

    sent = open_pacs(address, retry=AT_ONCE, read_s=5).send(files(hospital), settled=restart_once)
    assert all(one.accepted for one in sent)
    assert orthanc.instances() == 16


@pytest.mark.parametrize("scheme", ["dicomweb+http://127.0.0.1:{}/dicom-web", "dimse://ORTHANC@127.0.0.1:{}"])
def test_nobody_there(scheme: str, hospital: Path, tmp_path: Path) -> None:
    waits = []
    pacs = open_pacs(
        scheme.format(1), retry=Retry(tries=4, sleep=waits.append, jitter=lambda: 1.0), connect_s=1, read_s=1
    )
    with pytest.raises(PacsError, match=r"127\.0\.0\.1:1: no answer.*4 tries.*Check") as caught:
        pacs.find({"PatientID": CANARY})
    assert caught.value.exit_code == 1
    assert waits == [1, 2, 4]
    assert CANARY not in str(caught.value)
    with pytest.raises(PacsError):
        pacs.fetch("1.2.3", tmp_path / "study")
    with pytest.raises(PacsError):
        pacs.send(files(hospital))
    assert not list(tmp_path.iterdir())


def test_wrong_title_of_the_pacs(orthanc: Orthanc) -> None:
    with pytest.raises(PacsRefusedError, match="not called NOBODY"):
        open_pacs(orthanc.dimse.replace("ORTHANC", "NOBODY")).find({})


def test_wrong_path_of_the_pacs(orthanc: Orthanc) -> None:
    with pytest.raises(PacsRefusedError, match=r"404.*root of its DICOMweb"):
        open_pacs(orthanc.dicomweb.replace("dicom-web", "elsewhere")).find({})


KILLED = """
import sys, time
from pathlib import Path
from medvit.io import open_pacs
from medvit.io.pacs_inbox import Inbox
save, count = Inbox.save, 0
def halting(self, chunks):
    global count
    count += 1
    if count < 4:
        return save(self, chunks)
    def some():
        yield bytes(next(iter(chunks)))[:100]
        print("now", flush=True)
        time.sleep(60)
    return save(self, some())
Inbox.save = halting
open_pacs(sys.argv[1]).fetch(sys.argv[2], Path(sys.argv[3]))
"""


def test_killed_in_the_middle(address: str, hospital: Path, tmp_path: Path) -> None:
    pacs = open_pacs(address)
    pacs.send(files(hospital))
    study, target = pacs.find({})[0].study_uid, tmp_path / "study"
    child = subprocess.Popen([sys.executable, "-c", KILLED, address, study, str(target)], stdout=subprocess.PIPE)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"now\n"
        with pytest.raises(PacsError, match="another process"):  # while it lives, it has the folder for itself
            pacs.fetch(study, target)
        os.kill(child.pid, signal.SIGKILL)
    assert not target.exists()
    assert len(files(tmp_path / "study.part")) == 4  # three, and one that has no name yet
    assert pacs.fetch(study, target) == 8
    assert not (tmp_path / "study.part").exists()
    assert len(files(target)) == 8


def test_silence(
    address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """No name in logs or errors, though all loggers are asked for everything, by hand."""
    paths = Ct(hu=phantom_hu(2), patient=CANARY, damage=_canaries).write(tmp_path / "ct")
    caplog.set_level(logging.DEBUG)
    names = [
        "pynetdicom",
        "pynetdicom.events",
        "pynetdicom.assoc",
        "dicomweb_client",
        "urllib3",
        "urllib3.connectionpool",
    ]
    for name in names:
        caplog.set_level(logging.DEBUG, logger=name)
    pacs = open_pacs(address, retry=AT_ONCE)
    pacs.send(paths)
    query = {"PatientID": CANARY, "PatientName": f"{CANARY}*"}
    (study,) = pacs.find(query)
    pacs.fetch(study.study_uid, tmp_path / "back")
    with pytest.raises(UsageError) as caught:
        pacs.find({"PatientName": f"{CANARY}\n"})
    said = capfd.readouterr()
    shown = [caplog.text, said.out, said.err, str(caught.value), repr(pacs), repr(study)]
    assert not [text for text in shown if CANARY.lower() in text.lower()]


def _canaries(dataset, index):
    dataset.PatientName, dataset.AccessionNumber, dataset.StudyDescription = f"{CANARY}^Zoe", CANARY, CANARY
