"""Identity stays where DESIGN section 4 allows it: a hospital full of canaries, and no canary in anything written.

Each tag that may name a person holds a canary of its own, so that a finding says where it came from; so do private
elements, sequences, the preamble and the names of files and folders. Allowed: paths below FOLDER in quarantine.csv, the
ledger it is exported from, and what medvit-inspect lists without --deidentify. Study and series UID, site, sex and age
are results, not canaries.
"""

import csv
import io
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from damage import MUTATIONS, Sample
from pydicom import Dataset, dcmread
from pydicom.datadict import dictionary_VR
from pydicom.uid import ExplicitVRLittleEndian

from medvit.cli import console, inspect, predict, train
from medvit.io import phantom, read_files, scan_folder
from medvit.records import ScanError
from tests.cli.conftest import TINY

TAGS = """PatientID PatientName PatientBirthDate FrameOfReferenceUID
    OtherPatientNames PatientBirthName PatientMotherBirthName ReferringPhysicianName ConsultingPhysicianName
    PerformingPhysicianName NameOfPhysiciansReadingStudy OperatorsName PhysiciansOfRecord RequestingPhysician
    ResponsiblePerson ScheduledPerformingPhysicianName HumanPerformerName VerifyingObserverName PersonName ReviewerName
    ContentCreatorName
    IssuerOfPatientID AccessionNumber StudyID AdmissionID MilitaryRank BranchOfService
    MedicalRecordLocator RequestedProcedureID ScheduledProcedureStepID PerformedProcedureStepID ServiceEpisodeID
    PlacerOrderNumberImagingServiceRequest FillerOrderNumberImagingServiceRequest DeviceSerialNumber StationName
    PerformedStationName ClinicalTrialSubjectID ClinicalTrialSubjectReadingID
    PatientAddress PatientTelephoneNumbers InstitutionAddress InstitutionalDepartmentName ReferringPhysicianAddress
    ReferringPhysicianTelephoneNumbers ResponsibleOrganization OrderCallbackPhoneNumber OrderEnteredBy
    OrderEntererLocation CurrentPatientLocation PatientInstitutionResidence CountryOfResidence RegionOfResidence
    Occupation EthnicGroup PatientReligiousPreference
    PatientComments ImageComments StudyComments AdditionalPatientHistory MedicalAlerts Allergies
    RequestedProcedureComments AcquisitionComments StudyDescription ProtocolName SeriesDescription
    PerformedProcedureStepDescription RequestedProcedureDescription DerivationDescription
    PatientBirthTime LastMenstrualDate AdmittingDate
    DeviceUID SynchronizationFrameOfReferenceUID IrradiationEventUID RequestedContrastAgent""".split()

HEADER_CANARY = re.compile(
    rb"canary\d\d|(?<![\d.])1899[01]\d[0-3]\d(?!\d)|031859\.2718|\.498\.77\d\d777", re.IGNORECASE
)
PATH_CANARY = re.compile(rb"pathbird", re.IGNORECASE)
ROOT_CANARY = re.compile(rb"rootbird", re.IGNORECASE)


def canary(number: int, keyword: str, patient: int, original: str) -> str:
    """What stands in a tag: unlike in each tag, and for what tells patients apart, in each patient."""
    match dictionary_VR(keyword):
        case "PN":
            return f"Canary{number:02d}^{original}" if keyword == "PatientName" else f"Canary{number:02d}^Zoë"
        case "UI":
            return f"1.2.826.0.1.3680043.8.498.77{number:02d}777.{patient}"
        case "DA":
            return f"1899{1 + patient % 12:02d}{1 + patient % 28:02d}"
        case "TM":
            return "031859.2718"
        case _:
            return f"CANARY{number:02d}-{original}" if keyword == "PatientID" else f"CANARY{number:02d}"


def stamp(dataset: Dataset, patient: int) -> None:
    for number, keyword in enumerate(TAGS):
        setattr(dataset, keyword, canary(number, keyword, patient, str(dataset.get(keyword, ""))))
    item = Dataset()
    item.PatientID, item.RequestedProcedureDescription, item.TypeOfPatientID = "CANARY90", "CANARY91", "TEXT"
    dataset.OtherPatientIDsSequence = [item]
    dataset.RequestAttributesSequence = [item]
    block = dataset.private_block(0x0029, "CANARY92", create=True)
    block.add_new(0x10, "LO", "CANARY93")
    block.add_new(0x11, "OB", b"CANARY94")
    block.add_new(0x12, "PN", "Canary95^Zoe")
    dataset.file_meta.SourceApplicationEntityTitle = "CANARY96"
    dataset.preamble = b"CANARY97".ljust(128, b"\0")
    dataset.add_new(0xFFFCFFFC, "OB", b"CANARY98")  # data set trailing padding


@dataclass(frozen=True)
class Hospital:
    """FOLDER and its labels."""

    folder: Path
    labels: Path


@pytest.fixture(scope="module")
def hospital(tmp_path_factory) -> Hospital:
    """The synthetic hospital with its damage and junk, every DICOM file and every name with canaries."""
    root = tmp_path_factory.mktemp("site")
    plain = phantom.write_hospital(root / "plain", phantom.make_patients(24, 1), seed=2, matrix=32, slices=4)
    folder = root / "rootbird" / "hospital"
    patients: dict[str, int] = {}
    for path in sorted(path for path in plain.folder.rglob("*") if path.is_file()):
        patient, *middle, name = ("", *path.relative_to(plain.folder).parts)[-4:]
        target = folder.joinpath(f"Pathbird {patient}", *middle, f"pathbird {name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            target.write_text("CANARY99")
        else:
            write_stamped(path, target, patients.setdefault(patient, len(patients)))
    with plain.labels.open(newline="") as stream:
        head, *rows = csv.reader(stream)
    with (root / "labels.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([head, *([f"CANARY00-{patient}", *more] for patient, *more in rows)])
    return Hospital(folder, root / "labels.csv")


def write_stamped(path: Path, target: Path, patient: int) -> None:
    dataset = dcmread(path, force=True)
    has_preamble = "TransferSyntaxUID" in dataset.file_meta
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    stamp(dataset, patient)
    dataset.save_as(target, enforce_file_format=True)
    if not has_preamble:
        target.write_bytes(target.read_bytes()[132:])


@dataclass(frozen=True)
class Told:
    """What a command said: on stdout, on stderr, and to any logger."""

    status: int
    stdout: str
    stderr: str
    logs: str


def told(command: Callable[[list[str]], int], *arguments: object) -> Told:
    with listening() as logs, redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = command([str(argument) for argument in arguments])
    return Told(status, out.getvalue(), err.getvalue(), logs.getvalue())


@contextmanager
def listening() -> Iterator[io.StringIO]:
    """Everything that any logger emits at DEBUG and above."""
    stream, root = io.StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(stream), root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield stream
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


@pytest.fixture(scope="module")
def run(hospital, tmp_path_factory) -> tuple[Path, Told]:
    output = tmp_path_factory.mktemp("train") / "run"
    arguments = ["--labels", hospital.labels, "--output", output, *TINY, "training.stages.0.epochs=1"]
    return output, told(train.main, hospital.folder, *arguments)


@pytest.fixture(scope="module")
def results(hospital, run, tmp_path_factory) -> tuple[Path, Told]:
    output = tmp_path_factory.mktemp("predict") / "out"
    return output, told(predict.main, hospital.folder, "--model", run[0], "--output", output)


def found(where: Path | str | bytes, *canaries: re.Pattern[bytes]) -> set[str]:
    """The canaries in a text, or in the names and contents of all files below a folder."""
    if isinstance(where, Path):
        content = {str(path.relative_to(where)): path.read_bytes() for path in where.rglob("*") if path.is_file()}
        assert content
    else:
        content = {"text": where if isinstance(where, bytes) else where.encode()}
    return {
        f"{name}: {match.decode()}"
        for name, raw in content.items()
        for pattern in canaries
        for match in pattern.findall(name.encode() + b"\n" + raw)
    }


DESCRIPTION = f"CANARY{TAGS.index('SeriesDescription'):02d}"
"""Free text, and what an engineer finds a series by."""

EVERYWHERE = (HEADER_CANARY, PATH_CANARY, ROOT_CANARY)


def test_the_canaries_are_there(hospital):
    """In each file of the hospital, in at least 60 tags; else nothing below proves anything."""
    assert len(TAGS) >= 60
    scan, *_ = (series for series in scan_folder(hospital.folder).series if series.usable)
    raw = (scan.root / scan.files[0]).read_bytes()
    assert len(set(HEADER_CANARY.findall(raw))) > 60
    assert found(scan.header.patient_name, HEADER_CANARY)
    assert found(scan.header.patient_id, HEADER_CANARY)
    assert found(scan.files[0], PATH_CANARY)


@pytest.mark.parametrize("options", [(), ("--json",)], ids=" ".join)
def test_inspect_shows_paths_and_descriptions_and_nothing_else(hospital, options, monkeypatch):
    monkeypatch.setattr(console, "PLAIN_WIDTH", 10_000)  # a folded canary would not be found
    shown = told(inspect.main, hospital.folder, *options)
    assert shown.status == 3
    assert found(shown.stdout, PATH_CANARY)
    assert not found(shown.stdout.replace(DESCRIPTION, ""), HEADER_CANARY, ROOT_CANARY)
    assert not found(shown.stderr + shown.logs, *EVERYWHERE)


@pytest.mark.parametrize("options", [("--deidentify",), ("--json", "--deidentify")], ids=" ".join)
def test_inspect_shows_nothing_that_names_a_person_when_told_to(hospital, options, monkeypatch):
    monkeypatch.setattr(console, "PLAIN_WIDTH", 10_000)
    shown = told(inspect.main, hospital.folder, *options)
    assert shown.status == 3
    assert not found(shown.stdout + shown.stderr + shown.logs, *EVERYWHERE)


def test_a_training_run_holds_no_identity(run):
    output, said = run
    assert said.status == 3
    assert not found(output, *EVERYWHERE)
    assert not found(said.stdout + said.stderr + said.logs, *EVERYWHERE)


def test_batch_results_hold_paths_in_the_quarantine_and_nothing_else(results):
    output, said = results
    assert said.status == 3
    told_of = {name.partition(":")[0].partition("/")[0] for name in found(output, HEADER_CANARY, ROOT_CANARY)}
    assert told_of == {"sr", "sc"}  # as in the source: tests/io/test_results.py
    with_paths = {name.split(":")[0].partition("-")[0] for name in found(output, PATH_CANARY)}
    assert with_paths <= {"quarantine.csv", "ledger.sqlite"}
    assert not found(said.stdout + said.stderr + said.logs, *EVERYWHERE)
    assert "North Clinic" in (output / "predictions.csv").read_text()  # sites are results


def test_batch_results_hold_nothing_that_names_a_person_when_told_to(hospital, run, tmp_path):
    said = told(predict.main, hospital.folder, "--model", run[0], "--output", tmp_path / "out", "--deidentify")
    assert said.status == 3
    assert list((tmp_path / "out" / "sr").iterdir())
    assert not found(tmp_path / "out", *EVERYWHERE)
    assert not found(tmp_path / "out", re.compile(rb"North Clinic|St\.? Elsewhere|Hill University"))
    assert not found(said.stdout + said.stderr + said.logs, *EVERYWHERE)


def test_names_of_outputs_and_caches_are_no_names_of_patients(run, results):
    for output, _ in (run, results):
        names = "\n".join(str(path.relative_to(output)) for path in output.rglob("*"))
        assert not found(names, *EVERYWHERE)


def test_refusals_name_no_patient(hospital):
    """The text of each error and each entry's detail, and whatever is logged on the way."""
    with listening() as logs:
        inventory = scan_folder(hospital.folder)
        texts = [f"{entry.code} {entry.detail}" for entry in inventory.files]
        for series in inventory.series:
            texts += [f"{series.codes} {series.detail}", refusal([series.root / name for name in series.files])]
        texts += [refusal([hospital.folder / entry.path]) for entry in inventory.files if not entry.outcome.used]
    assert sum("re-export" in text for text in texts) > 1
    assert not found("\n".join(texts) + logs.getvalue(), *EVERYWHERE)


def test_damage_moves_no_name_into_a_message(hospital, tmp_path):
    """Where lengths and tags are wrong, one element's text is read as another's: it must not be quoted."""
    good = next(series for series in scan_folder(hospital.folder).series if series.usable)
    sample = Sample.of((good.root / good.files[0]).read_bytes())
    texts = []
    with listening() as logs:
        for number in range(300):
            random = Random(number)
            path = tmp_path / "mutated"
            path.write_bytes(random.choice(MUTATIONS)(sample, random))
            texts += [entry.detail for entry in scan_folder(tmp_path).files]
            texts.append(refusal([path]))
    assert sum(map(bool, texts)) > 100
    assert not found("\n".join(texts), *EVERYWHERE)
    assert not found(logs.getvalue(), *EVERYWHERE)


def refusal(paths: list[Path]) -> str:
    """The text of the error that reading the files as one series raises, if any."""
    try:
        read_files(paths)
    except ScanError as error:
        return f"{error} {error.detail} {error.args}"
    return ""
