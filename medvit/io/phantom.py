"""A synthetic hospital: chest CT of three sites written as DICOM, with the junk and the damage that exports have.

For the demo, the tests and `sample_data`: nobody's images, every label and every fault known. `write_hospital` returns
which files and series must be set aside and why, so that whoever reads the folder can be checked. Everything is
deterministic, to the byte: UIDs are hashes, dates are fixed. The anatomy is in `phantom_anatomy`.

What it is worth, measured with timm's `test_vit` (0.4 million weights, from scratch, 96 px, 40 epochs, training-set
normalisation, no augmentation; three seeds of the weights, one draw of patients, at least 120 test patients unless
said): trained on 45 patients of all sites, AUROC 0.87 (0.82-0.94) on others of all sites. Trained on 40 of North Clinic
0.88 (0.87-0.90) at home and 0.65 (0.59-0.71) at Harbour Hospital; on 40 of Hill University 0.90 (0.81-0.95, 40 test
patients) at home and 0.74 at Harbour. Harbour's own is 0.69 (0.56-0.84): its noise makes it harder as well. The sites
were made this different on purpose, and one finding in five is faint: the figures show that the machinery works, and
nothing about patients.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, MRImageStorage

from medvit.io.phantom_anatomy import FINDING_MM, SITES, PhantomPatient, SitePhysics, make_patients, render
from medvit.records import ReasonCode

__all__ = [
    "DAMAGE",
    "FINDING_MM",
    "JUNK",
    "SITES",
    "Hospital",
    "PhantomPatient",
    "SitePhysics",
    "make_patients",
    "render",
    "series_uid",
    "turn_prone",
    "write_damaged_series",
    "write_hospital",
    "write_labels",
    "write_series",
]

BASIC_TEXT_SR = UID("1.2.840.10008.5.1.4.1.1.88.11")

STUDY_DATE = "20240115"
"""Of every study: fixed, so that files are byte-identical when regenerated."""

DAMAGE: tuple[ReasonCode, ...] = (
    ReasonCode.SLICE_MISSING,
    ReasonCode.PIXEL_TRUNCATED,
    ReasonCode.RESCALE_MISSING,
    ReasonCode.SPACING_NONUNIFORM,
)
"""One extra patient each, with a label: the whole series must be set aside."""

JUNK: tuple[ReasonCode, ...] = (
    ReasonCode.NOT_VOLUME,  # localizer
    ReasonCode.NOT_VOLUME,  # structured report
    ReasonCode.MODALITY,
    ReasonCode.DUP_IDENTICAL,
    ReasonCode.NOT_DICOM,
)
"""One file each, in the folders of good patients."""


@dataclass(frozen=True, kw_only=True)
class Hospital:
    """What `write_hospital` wrote.

    Attributes:
        folder: the DICOM tree.
        labels: CSV with one row per patient, those with a damaged series included.
        series: SeriesInstanceUIDs that must be usable, one per patient.
        planted: what must be set aside, and why: path of a file (relative to folder, with /) or SeriesInstanceUID.
    """

    folder: Path
    labels: Path
    series: tuple[str, ...]
    planted: Mapping[str, ReasonCode]


def write_hospital(
    folder: Path,
    patients: tuple[PhantomPatient, ...],
    *,
    faults: bool = True,
    damage: tuple[ReasonCode, ...] = DAMAGE,
    seed: int = 0,
    labels: Path | None = None,
    matrix: int = 96,
    slices: int | None = None,
) -> Hospital:
    """Write a DICOM tree of `patients` and its labels table.

    Good series vary as real ones do: file names and InstanceNumber say nothing about position, HU are stored with
    different intercepts, one site pads outside its field of view, some patients lie prone.

    Args:
        folder: created; one folder per patient, study and series.
        patients: each gets one usable series.
        faults: plant junk files (`JUNK`), and one extra patient with a label for each of `damage`.
        damage: of the extra patients' series, some of `DAMAGE`.
        seed: of the extra patients.
        labels: where the labels table goes; None is `labels.csv` beside `folder`.
        matrix: rows and columns.
        slices: per series; None covers the whole range.
    """
    folder = Path(folder)
    labels = folder.with_name("labels.csv") if labels is None else Path(labels)
    planted: dict[str, ReasonCode] = {}
    for i, patient in enumerate(patients):
        hu, affine = render(patient, matrix=matrix, slices=slices)
        if i % 7 == 3:
            hu, affine = turn_prone(hu, affine)
        write_series(series_folder(folder, patient), hu, affine, patient)
    extra = _damaged_patients(len(damage), seed, patients) if faults else ()
    for patient, code in zip(extra, damage, strict=False):
        hu, affine = render(patient, matrix=matrix, slices=slices)
        write_damaged_series(series_folder(folder, patient), hu, affine, patient, code)
        planted[series_uid(patient)] = code
    if faults:
        planted |= _plant_junk(folder, patients)
    write_labels(labels, (*patients, *extra))
    return Hospital(
        folder=folder, labels=labels, series=tuple(series_uid(patient) for patient in patients), planted=planted
    )


def write_labels(path: Path, patients: tuple[PhantomPatient, ...]) -> None:
    """One row per patient: patient_id, label (1: finding), site, sex, age."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("patient_id", "label", "site", "sex", "age"))
        rows.writerows((p.patient_id, int(p.finding), p.site.name, p.sex, p.age) for p in patients)


def write_series(
    folder: Path,
    hu: npt.NDArray[np.float32],
    affine: npt.NDArray[np.float64],
    patient: PhantomPatient,
    *,
    rescale: bool = True,
    description: str = "CHEST AXIAL",
    positions: npt.NDArray[np.int64] | None = None,
) -> list[Path]:
    """Write a volume as CT Image Storage, explicit little endian.

    Args:
        folder: created.
        hu: (Z, Y, X).
        affine: (4, 4), voxel (x, y, z, 1) -> LPS mm; a third column that is not perpendicular is a tilted gantry.
        patient: identity and site.
        rescale: write RescaleSlope, RescaleIntercept and RescaleType.
        description: SeriesDescription.
        positions: indices of the slices to write; None writes all.

    Returns:
        The files in order of position along z. Names and InstanceNumber are in another, random order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    template = _ct_template(patient, hu.shape, affine, description)
    intercept = _intercept(patient)
    stored = _stored_values(hu, intercept, patient.site)
    template.PixelRepresentation = int(stored.dtype == np.int16)
    if patient.site.padding is not None:
        template.add_new("PixelPaddingValue", "SS", patient.site.padding)
    if rescale:
        template.RescaleIntercept, template.RescaleSlope, template.RescaleType = intercept, 1, "HU"
    order = np.random.default_rng([patient.seed, 3]).permutation(len(hu)) + 1
    paths = []
    for k in range(len(hu)) if positions is None else positions:
        position = affine[:3, :3] @ (0, 0, k) + affine[:3, 3]
        template.SOPInstanceUID = _uid("image", patient.patient_id, description, str(k))
        template.InstanceNumber = int(order[k])
        template.ImagePositionPatient = [_decimal(v) for v in position]
        template.SliceLocation = _decimal(position[2])
        template.PixelData = stored[k].tobytes()
        paths.append(_save(template, folder / f"IM{order[k]:05d}"))
    return paths


def write_damaged_series(
    folder: Path,
    hu: npt.NDArray[np.float32],
    affine: npt.NDArray[np.float64],
    patient: PhantomPatient,
    code: ReasonCode,
) -> list[Path]:
    """Write a series with the fault that `code` names, one of `DAMAGE`."""
    match code:
        case ReasonCode.SLICE_MISSING:
            return write_series(folder, hu, affine, patient, positions=np.delete(np.arange(len(hu)), len(hu) // 2))
        case ReasonCode.RESCALE_MISSING:
            return write_series(folder, hu, affine, patient, rescale=False)
        case ReasonCode.SPACING_NONUNIFORM:
            paths = write_series(folder, hu, affine, patient)
            _shift_slice(paths[-1], 0.4 * float(affine[2, 2]))
            return paths
        case ReasonCode.PIXEL_TRUNCATED:
            paths = write_series(folder, hu, affine, patient)
            damaged = paths[len(paths) // 2]
            damaged.write_bytes(damaged.read_bytes()[: -hu[0].size])  # half of the 16-bit pixels
            return paths
    raise ValueError(f"no such damage: {code}. Known: {', '.join(DAMAGE)}")


def turn_prone(
    hu: npt.NDArray[np.float32], affine: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Store rows and columns backwards (ImageOrientationPatient -1,0,0,0,-1,0); the anatomy stays where it is."""
    turned = affine.copy()
    turned[:, 3] = affine @ (hu.shape[2] - 1, hu.shape[1] - 1, 0, 1)
    turned[:, :2] *= -1
    return hu[:, ::-1, ::-1], turned


def _shift_slice(path: Path, z_mm: float) -> None:
    dataset = dcmread(path)
    x, y, z = dataset.ImagePositionPatient
    dataset.ImagePositionPatient = [x, y, _decimal(z + z_mm)]
    dataset.save_as(path)


def series_uid(patient: PhantomPatient) -> str:
    """SeriesInstanceUID of the patient's CT."""
    return _uid("series", patient.patient_id, "CHEST AXIAL")


def series_folder(folder: Path, patient: PhantomPatient) -> Path:
    """Where an archive's export puts the patient's CT: names say nothing about the patient."""
    return folder / f"PA{_digest(patient.patient_id) % 10**6:06d}" / "ST000000" / "SE000001"


def _damaged_patients(n: int, seed: int, patients: tuple[PhantomPatient, ...]) -> tuple[PhantomPatient, ...]:
    """Patients beside `patients`, never one of them: their ids start with X."""
    sites = tuple(dict.fromkeys(patient.site for patient in patients)) or SITES
    return tuple(replace(p, patient_id=f"X{p.patient_id}") for p in make_patients(n, seed, sites=sites))


def _plant_junk(folder: Path, patients: tuple[PhantomPatient, ...]) -> dict[str, ReasonCode]:
    """Files that lie about in real exports, in the folders of the first patients; returns their relative paths."""
    first, second, third = (patients * 3)[:3]
    study = series_folder(folder, first).parent
    notes = folder / "notes.txt"
    notes.write_text("Export for the CT study. Ask radiology about the missing ones.\n", encoding="utf-8")
    images = sorted(series_folder(folder, second).iterdir())
    copy = images[0].with_name(f"{images[0].name}_1")  # after its original in any listing
    copy.write_bytes(images[0].read_bytes())
    _remove_preamble(sorted(series_folder(folder, third).iterdir())[-1])
    localizer = _save(_localizer(first), study / "SE000000" / "IM00001")
    report = _save(_text_report(first), study / "SE000009" / "IM00001")
    mr = _save(_mr_image(second), series_folder(folder, second).parents[1] / "ST000001/SE000001/IM00001")
    paths = (path.relative_to(folder).as_posix() for path in (localizer, report, mr, copy, notes))
    return dict(zip(paths, JUNK, strict=True))


def _remove_preamble(path: Path) -> None:
    """Old archives send files without the 128 bytes and the prefix of PS3.10 section 7.1; the image is good."""
    path.write_bytes(path.read_bytes()[132:])


def _save(dataset: Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.save_as(path, enforce_file_format=True)
    return path


def _digest(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(("medvit phantom", *parts)).encode()).digest()[:16])


def _uid(*parts: str) -> str:
    """The same for the same parts, under the root for 128-bit numbers (PS3.5 B.2)."""
    return f"2.25.{_digest(*parts)}"


def _decimal(value: float) -> float:
    """Fits the 16 characters of a DS (PS3.5 6.2): micrometres are enough."""
    return round(float(value), 6) + 0.0  # no minus zero


def _intercept(patient: PhantomPatient) -> int:
    """RescaleIntercept: scanners use -1024 or 0; a site that pads needs room below air."""
    return -1024 if patient.site.padding is not None or patient.seed % 2 else 0


def _stored_values(hu: npt.NDArray[np.float32], intercept: int, site: SitePhysics) -> npt.NDArray[np.int16 | np.uint16]:
    """Whole stored values (Z, Y, X): signed where they may be negative, padded outside the circular field of view."""
    stored = np.rint(hu - intercept).astype(np.int32)
    if site.padding is None:
        return stored.astype(np.uint16 if intercept else np.int16)
    rows, columns = (np.arange(n) - (n - 1) / 2 for n in hu.shape[1:])
    outside = np.hypot(rows[:, None] / hu.shape[1], columns / hu.shape[2]) > 0.5
    return np.where(outside, np.int32(site.padding), stored).astype(np.int16)


def _patient_study(patient: PhantomPatient, sop_class: UID, modality: str, study: str, series: str) -> Dataset:
    """What every object of a patient carries: patient, study, series and equipment modules (PS3.3 A.3)."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.ImplementationClassUID = UID(_uid("implementation"))
    ds.file_meta.ImplementationVersionName = "MEDVIT_PHANTOM"  # pydicom's holds its version: bytes would change with it
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID = sop_class
    ds.SOPInstanceUID = _uid("image", patient.patient_id, study, series)
    ds.PatientName, ds.PatientID, ds.PatientSex = patient.name, patient.patient_id, patient.sex
    ds.PatientBirthDate, ds.PatientAge = f"{int(STUDY_DATE[:4]) - patient.age}0101", f"{patient.age:03d}Y"
    ds.StudyInstanceUID = _uid("study", patient.patient_id, study)
    ds.StudyID, ds.StudyDate, ds.StudyTime, ds.AccessionNumber = "1", STUDY_DATE, "120000", ""
    ds.ReferringPhysicianName = ""
    ds.SeriesInstanceUID = _uid("series", patient.patient_id, series)
    ds.SeriesNumber, ds.SeriesDescription, ds.Modality = 1, series, modality
    ds.ContentDate, ds.ContentTime, ds.InstanceNumber = STUDY_DATE, "120000", 1
    ds.Manufacturer, ds.ManufacturerModelName = patient.site.manufacturer, patient.site.model
    ds.InstitutionName = patient.site.name
    return ds


def _image(
    patient: PhantomPatient, sop_class: UID, modality: str, study: str, series: str, shape: tuple[int, ...]
) -> Dataset:
    """Adds what images of rows × columns `shape` carry; orientation, pixel data and rescale are the caller's."""
    ds = _patient_study(patient, sop_class, modality, study, series)
    ds.FrameOfReferenceUID = _uid("frame of reference", patient.patient_id, study)
    ds.PositionReferenceIndicator, ds.PatientPosition, ds.BodyPartExamined = "", "HFS", "CHEST"
    ds.AcquisitionNumber = 1
    ds.Rows, ds.Columns = shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    return ds


def _ct_template(
    patient: PhantomPatient, shape: tuple[int, ...], affine: npt.NDArray[np.float64], series: str
) -> Dataset:
    """All of a CT slice (PS3.3 A.3.3) but position, pixels, rescale and instance."""
    ds = _image(patient, CTImageStorage, "CT", "CT", series, shape[1:])
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    column_mm, row_mm = (float(np.linalg.norm(affine[:3, axis])) for axis in (0, 1))
    ds.ImageOrientationPatient = [_decimal(v) for v in (*affine[:3, 0] / column_mm, *affine[:3, 1] / row_mm)]
    ds.PixelSpacing = [_decimal(row_mm), _decimal(column_mm)]  # between rows first (PS3.3 10.7.1.3)
    ds.SliceThickness, ds.KVP = _decimal(patient.site.slice_thickness_mm), 120
    ds.ConvolutionKernel = patient.site.kernel
    if affine[0, 0] < 0:
        ds.PatientPosition = "HFP"
    return ds


def _localizer(patient: PhantomPatient) -> Dataset:
    """A scout view in the study of the patient's CT: CT Image Storage, but no axial volume."""
    hu, _ = render(patient, matrix=64, slices=8)
    ds = _image(patient, CTImageStorage, "CT", "CT", "LOCALIZER", (8, 64))
    ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, 0, 0, -1], [-186, 0, 48]
    ds.PixelSpacing, ds.SliceThickness, ds.KVP = [12, 5.8125], 1, 120
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = 0, 1, "US"  # sums along rays are not HU (PS3.3 C.8.2.1)
    ds.PixelData = np.rint(hu.mean(axis=1)).astype(np.int16).tobytes()
    return ds


def _mr_image(patient: PhantomPatient) -> Dataset:
    """An MR image of the same patient, in a study of its own."""
    ds = _image(patient, MRImageStorage, "MR", "MR", "T1 SCOUT", (32, 32))
    ds.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
    ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-160, -160, 0]
    ds.PixelSpacing, ds.SliceThickness = [10, 10], 5
    ds.ScanningSequence, ds.SequenceVariant, ds.ScanOptions, ds.MRAcquisitionType = "SE", "NONE", "", "2D"
    ds.EchoTime, ds.EchoTrainLength, ds.RepetitionTime = 15, 1, 500
    ds.PixelData = np.arange(1024, dtype=np.int16).tobytes()
    return ds


def _text_report(patient: PhantomPatient) -> Dataset:
    """A structured report in the study of the patient's CT (Basic Text SR, PS3.3 A.35.1)."""
    ds = _patient_study(patient, BASIC_TEXT_SR, "SR", "CT", "REPORT")
    ds.ReferencedPerformedProcedureStepSequence = Sequence()
    ds.PerformedProcedureCodeSequence = Sequence()
    ds.CompletionFlag, ds.VerificationFlag = "COMPLETE", "UNVERIFIED"
    ds.ValueType, ds.ContinuityOfContent = "CONTAINER", "SEPARATE"
    ds.ConceptNameCodeSequence = Sequence([_code("18748-4", "LN", "Diagnostic imaging report")])
    text = Dataset()
    text.RelationshipType, text.ValueType, text.TextValue = "CONTAINS", "TEXT", "Synthetic; nothing to report."
    text.ConceptNameCodeSequence = Sequence([_code("121071", "DCM", "Finding")])
    ds.ContentSequence = Sequence([text])
    return ds


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code
