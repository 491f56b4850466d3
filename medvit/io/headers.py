"""One DICOM header -> a small record, and what can be told from it before any pixel is decoded.

Headers of real exports hold absent, empty and malformed values; every needed tag goes through a guarded getter, and a
file is judged by what it is (SOP class, ImageType), never by its name or folder.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydicom import dcmread
from pydicom.config import IGNORE
from pydicom.dataset import Dataset, FileDataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

from medvit.records import ReasonCode, ScanError, ScanHeader

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
MULTIFRAME_CT = {"1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"}
"""Enhanced CT and Legacy Converted Enhanced CT Image Storage."""

DICOMDIR = "1.2.840.10008.1.3.10"
"""Media Storage Directory: has no SOPInstanceUID of its own. Its references are never followed."""

IMAGE_MODALITIES = {"MR", "PT", "NM", "US", "CR", "DX", "MG", "XA", "RF", "IVUS", "OCT", "OP", "SM", "ES", "XC", "PX"}
DEFLATED = b"1.2.840.10008.1.2.1.99"
"""Deflated Explicit VR: even its header inflates without bound, so it is set aside unread."""

LOSSY = {f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 81, 91, 203)}
MAX_VOXELS = 2**26
"""Largest rows × columns of one slice: 8192 × 8192, far above any CT."""

TAGS = """SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID Modality ImageType
    ImageOrientationPatient ImagePositionPatient PixelSpacing SliceThickness Rows Columns NumberOfFrames SamplesPerPixel
    PhotometricInterpretation BitsAllocated BitsStored HighBit PixelRepresentation PixelPaddingValue
    PixelPaddingRangeLimit RescaleSlope RescaleIntercept RescaleType LossyImageCompression PatientID PatientName
    PatientBirthDate PatientSex PatientAge StudyDate InstitutionName Manufacturer BodyPartExamined ConvolutionKernel
    ContrastBolusAgent SeriesDescription IssuerOfPatientID AcquisitionNumber SpecificCharacterSet
    ModalityLUTSequence""".split()


@dataclass(frozen=True, slots=True)
class SliceHeader:
    """What one CT file says about itself; None where absent or unreadable."""

    path: str
    sop_uid: str
    series_uid: str
    study_uid: str
    frame_of_reference: str
    sop_class: str
    modality: str
    image_type: tuple[str, ...]
    transfer_syntax: str
    photometric: str
    samples: int
    frames: int
    rows: int
    columns: int
    bits: int
    orientation: tuple[float, ...] | None
    position: tuple[float, ...] | None
    spacing_mm: tuple[float, ...] | None
    thickness_mm: float | None
    slope: float | None
    intercept: float | None
    rescale_tags: bool
    rescale_type: str
    patient: tuple[str, str, str]  # id, birth date, sex: must agree within a series
    scan: ScanHeader
    acquisition: str
    preamble: bool
    truncated: bool


def parse(path: Path, name: str) -> SliceHeader:
    """Read the header of one file.

    Args:
        path: the file.
        name: how errors and the record call it.

    Raises:
        ScanError: `NOT_DICOM`, `IO_ERROR`, `TS_UNSUPPORTED` (deflated), `TAG_INVALID` or `NESTING`.
    """
    try:
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lenient reader: only the needed tags decide
            head = stream.read(1024)
            if DEFLATED in head:
                raise ScanError(ReasonCode.TS_UNSUPPORTED, "deflated transfer syntax is not inflated", (name,))
            preamble = head[128:132] == b"DICM"
            stream.seek(0)
            dataset = dcmread(stream, stop_before_pixels=True, specific_tags=TAGS, force=not preamble)
            truncated = preamble and _pixels_cut_short(stream, dataset)
            return summarise(dataset, name, preamble=preamble, truncated=truncated)
    except ScanError:
        raise
    except InvalidDicomError:
        raise ScanError(ReasonCode.NOT_DICOM, "no DICOM header", (name,)) from None
    except RecursionError:
        raise ScanError(ReasonCode.NESTING, "sequences nested beyond the interpreter's depth", (name,)) from None
    except OSError as error:
        raise ScanError(ReasonCode.IO_ERROR, os.strerror(error.errno or 5), (name,)) from None
    except Exception as error:  # noqa: BLE001  damaged headers raise nine and more types (HAZARDS 1.2)
        code = ReasonCode.TAG_INVALID if preamble else ReasonCode.NOT_DICOM
        raise ScanError(code, f"header unreadable ({type(error).__name__})", (name,)) from None


def _pixels_cut_short(stream: BinaryIO, dataset: FileDataset) -> bool:
    """Whether native pixel data ends before the length its element states. The stream stands at the element."""
    start = stream.tell()
    head = stream.read(12)
    if not head:  # the file ends where its pixel data should begin
        return True
    if head[:4] != b"\xe0\x7f\x10\x00":  # little endian (7FE0,0010); others are found out when decoding
        return False
    explicit = head[4:6] in (b"OW", b"OB")
    length = int.from_bytes(head[8:12] if explicit else head[4:8], "little")
    if length == 0xFFFFFFFF:
        return False  # encapsulated
    return os.fstat(stream.fileno()).st_size < start + (12 if explicit else 8) + length


def summarise(dataset: Dataset, name: str, *, preamble: bool = True, truncated: bool = False) -> SliceHeader:
    """The record of an opened dataset.

    Raises:
        ScanError: `NOT_DICOM`: no preamble, and nothing in it looks like an image or report.
    """
    meta = getattr(dataset, "file_meta", None)
    # DICOMDIR, and a file cut off early, say what they are in the file meta information alone
    sop_class = _text(dataset, "SOPClassUID") or str(getattr(meta, "MediaStorageSOPClassUID", ""))
    if not preamble and not (sop_class.startswith("1.2.840.10008.") and _text(dataset, "SOPInstanceUID")):
        raise ScanError(ReasonCode.NOT_DICOM, "no DICOM header", (name,))
    return SliceHeader(
        path=name,
        sop_uid=_text(dataset, "SOPInstanceUID"),
        series_uid=_text(dataset, "SeriesInstanceUID"),
        study_uid=_text(dataset, "StudyInstanceUID"),
        frame_of_reference=_text(dataset, "FrameOfReferenceUID"),
        sop_class=sop_class,
        modality=_text(dataset, "Modality"),
        image_type=tuple(str(part) for part in _values(dataset, "ImageType")),
        transfer_syntax=str(getattr(meta, "TransferSyntaxUID", "1.2.840.10008.1.2")),
        photometric=_text(dataset, "PhotometricInterpretation"),
        samples=_integer(dataset, "SamplesPerPixel", 1),
        frames=_integer(dataset, "NumberOfFrames", 1),
        rows=_integer(dataset, "Rows", 0),
        columns=_integer(dataset, "Columns", 0),
        bits=_integer(dataset, "BitsAllocated", 16),
        orientation=_floats(dataset, "ImageOrientationPatient", 6),
        position=_floats(dataset, "ImagePositionPatient", 3),
        spacing_mm=_floats(dataset, "PixelSpacing", 2),
        thickness_mm=_float(dataset, "SliceThickness"),
        slope=_float(dataset, "RescaleSlope"),
        intercept=_float(dataset, "RescaleIntercept"),
        rescale_tags="RescaleSlope" in dataset and "RescaleIntercept" in dataset,
        rescale_type="LUT" if "ModalityLUTSequence" in dataset else _text(dataset, "RescaleType"),
        patient=(_text(dataset, "PatientID"), _text(dataset, "PatientBirthDate"), _text(dataset, "PatientSex")),
        scan=scan_header(dataset),
        acquisition=_text(dataset, "AcquisitionNumber"),
        preamble=preamble,
        truncated=truncated,
    )


def file_fault(header: SliceHeader) -> tuple[ReasonCode, str] | None:
    """Why this file is no slice of a CT volume medvit can use; None when it may be one."""
    if header.sop_class in MULTIFRAME_CT or (header.sop_class == CT_IMAGE and header.frames > 1):
        return ReasonCode.MULTIFRAME_UNSUPPORTED, f"{header.frames} frames in one object"
    if not header.sop_class or not (header.sop_uid or header.sop_class == DICOMDIR):
        return ReasonCode.TAG_INVALID, "SOPClassUID or SOPInstanceUID is absent: perhaps cut off"
    if header.sop_class != CT_IMAGE:
        code = ReasonCode.MODALITY if header.modality in IMAGE_MODALITIES else ReasonCode.NOT_VOLUME
        return code, UID(header.sop_class, IGNORE).name
    if "LOCALIZER" in header.image_type:
        return ReasonCode.NOT_VOLUME, "localizer"
    if header.samples != 1 or not header.photometric.startswith("MONOCHROME"):
        return ReasonCode.PHOTOMETRIC, f"photometric interpretation {header.photometric[:16] or 'absent'}"
    if not header.series_uid or not header.sop_uid:
        return ReasonCode.TAG_INVALID, "SeriesInstanceUID or SOPInstanceUID is absent"
    return None


def slice_faults(header: SliceHeader, *, assume_hu: bool) -> list[tuple[ReasonCode, str]]:
    """What is wrong or worth telling with one slice, from its header alone; each quarantines or flags its series."""
    faults = []
    if header.truncated:
        faults.append((ReasonCode.PIXEL_TRUNCATED, "the file ends before its pixel data"))
    if header.rows <= 0 or header.columns <= 0:
        faults.append((ReasonCode.TAG_INVALID, "Rows or Columns is absent or zero"))
    elif header.rows * header.columns > MAX_VOXELS:
        faults.append((ReasonCode.RESOURCE_LIMIT, f"{header.rows} x {header.columns} pixels"))
    if header.orientation is None or header.position is None:
        faults.append((ReasonCode.ORIENTATION_INVALID, "ImageOrientationPatient or ImagePositionPatient is absent"))
    if header.spacing_mm is None or min(header.spacing_mm) <= 0:
        faults.append((ReasonCode.TAG_INVALID, "PixelSpacing is absent or not positive"))
    if not can_decode(header.transfer_syntax):
        faults.append((ReasonCode.TS_UNSUPPORTED, f"transfer syntax {header.transfer_syntax[:64]}"))
    if header.transfer_syntax in LOSSY:
        faults.append((ReasonCode.LOSSY, f"transfer syntax {header.transfer_syntax}"))
    if header.photometric == "MONOCHROME1":
        faults.append((ReasonCode.MONO1, "photometric interpretation MONOCHROME1"))
    if not header.preamble:
        faults.append((ReasonCode.NO_PREAMBLE, "no 128-byte preamble"))
    return faults + _rescale_faults(header, assume_hu=assume_hu)


def _rescale_faults(header: SliceHeader, *, assume_hu: bool) -> list[tuple[ReasonCode, str]]:
    if header.rescale_type not in ("", "HU"):  # absent means HU for CT (PS3.3 C.8.2.1)
        return [(ReasonCode.RESCALE_UNITS, f"RescaleType {header.rescale_type[:16]}")]
    if not header.rescale_tags:
        return [] if assume_hu else [(ReasonCode.RESCALE_MISSING, "no RescaleSlope or RescaleIntercept")]
    slope, intercept = header.slope, header.intercept
    if slope is None or intercept is None or not slope > 0:
        return [(ReasonCode.RESCALE_INVALID, f"slope {slope}, intercept {intercept}")]
    return []


def can_decode(transfer_syntax: str) -> bool:
    """Whether pixel data of this transfer syntax can be decoded here."""
    uid = UID(transfer_syntax, IGNORE)
    if not uid.is_transfer_syntax or uid.is_deflated:
        return False
    if not uid.is_compressed:
        return True
    try:
        return bool(get_decoder(uid).is_available)
    except NotImplementedError:
        return False


def scan_header(dataset: Dataset) -> ScanHeader:
    """Identity and acquisition of a dataset."""
    institution, manufacturer = _text(dataset, "InstitutionName"), _text(dataset, "Manufacturer")
    return ScanHeader(
        patient_id=_text(dataset, "PatientID"),
        issuer=_text(dataset, "IssuerOfPatientID"),
        patient_name=_text(dataset, "PatientName"),
        birth_date=_text(dataset, "PatientBirthDate"),
        frame_of_reference=_text(dataset, "FrameOfReferenceUID"),
        modality=_text(dataset, "Modality"),
        study_uid=_text(dataset, "StudyInstanceUID"),
        series_uid=_text(dataset, "SeriesInstanceUID"),
        site=institution or manufacturer,
        site_source="InstitutionName" if institution else "Manufacturer" if manufacturer else "",
        sex=_text(dataset, "PatientSex"),
        age=_age_years(dataset),
        manufacturer=manufacturer,
        body_part=_text(dataset, "BodyPartExamined"),
        kernel="\\".join(str(part) for part in _values(dataset, "ConvolutionKernel")),
        contrast=_text(dataset, "ContrastBolusAgent"),
        description=_text(dataset, "SeriesDescription"),
        slice_thickness_mm=_float(dataset, "SliceThickness"),
    )


def _age_years(dataset: Dataset) -> float | None:
    """PatientAge (AS: 3 digits and D, W, M or Y; PS3.5 table 6.2-1), else birth date to study date."""
    text = _text(dataset, "PatientAge")
    unit = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}.get(text[-1:])
    if unit is not None and text[:-1].isdigit():
        return round(int(text[:-1]) * unit, 2)
    try:
        birth, study = (
            np.datetime64(f"{d[:4]}-{d[4:6]}-{d[6:8]}")
            for d in (_text(dataset, "PatientBirthDate"), _text(dataset, "StudyDate"))
        )
        years = float((study - birth) / np.timedelta64(1, "D")) / 365.25
    except ValueError:
        return None
    return round(years, 2) if 0 <= years < 130 else None


def _value(dataset: Dataset, keyword: str) -> Any:
    try:
        return dataset.get(keyword)
    except Exception:  # noqa: BLE001  a malformed element raises whatever its parser raises; absent is the right reading
        return None


def _values(dataset: Dataset, keyword: str) -> list[Any]:
    value = _value(dataset, keyword)
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str | bytes | int | float) else list(value)


def _text(dataset: Dataset, keyword: str) -> str:
    value = _value(dataset, keyword)
    return "" if value is None else str(value).strip(" \0")


def _floats(dataset: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    try:
        values = tuple(float(part) for part in _values(dataset, keyword))
    except (TypeError, ValueError):
        return None
    return values if len(values) == count and np.isfinite(values).all() else None


def _float(dataset: Dataset, keyword: str) -> float | None:
    values = _floats(dataset, keyword, 1)
    return None if values is None else values[0]


def _integer(dataset: Dataset, keyword: str, default: int) -> int:
    value = _float(dataset, keyword)
    return default if value is None else int(value)
