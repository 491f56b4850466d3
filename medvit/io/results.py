"""What results written as DICOM have in common: whose they are, which images they are about, their names.

A result belongs into the study that it is about, so patient and study are those of the source to the byte: raw values
under the source's own SpecificCharacterSet, never decoded (a name that is decoded and encoded once more may end as
'????'). The header is therefore made here; highdicom, which would parse names, refuse some and ask the clock, makes the
content of reports alone. UIDs, and with them file names, are hashes of what the result is about: writing it again gives
the same object, and nothing that a source contains reaches a path.

Sequences of the source are not copied: further issuers and ids of a patient stay with the images.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from pydicom.datadict import dictionary_VR, keyword_dict
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import UID, ExplicitVRLittleEndian

from medvit.io import dicom, geometry
from medvit.io.elements import read_elements
from medvit.io.headers import SliceHeader
from medvit.io.tags import MULTIFRAME_CT
from medvit.records import Prediction, ReasonCode, ScanError

PRIVATE_SCHEME = "99MEDVIT"
"""Coding scheme of what no standard has a code for; 99 is for private ones (PS3.16 8)."""

RESEARCH_USE = "RESEARCH USE"
"""On every picture and in the description of every series."""

_NAMESPACE = uuid.UUID("5f8b3c52-3a1d-5c0e-9c55-8f5b6b0f6f1a")

_EMPTY = (
    "PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime AccessionNumber ReferringPhysicianName "
    "StudyID"
).split()
"""Type 2 of the Patient and General Study modules: present, if empty (PS3.3 C.7.1.1, C.7.2.1)."""

_WHERE_KNOWN = (
    "SpecificCharacterSet IssuerOfPatientID TypeOfPatientID PatientBirthTime PatientAge PatientSize PatientWeight "
    "StudyInstanceUID StudyDescription"
).split()

_LOSSY = "LossyImageCompression LossyImageCompressionRatio LossyImageCompressionMethod".split()

_COPIED: Mapping[int, str] = {keyword_dict[keyword]: keyword for keyword in (*_EMPTY, *_WHERE_KNOWN, *_LOSSY)}


class Finding(NamedTuple):
    """A coded concept: what a class is called in a report."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class ResultContext:
    """What a result says beside its prediction.

    Attributes:
        model_name: ASCII, at most 64 characters; `model_version` too.
        model_sha256: of the weights.
        config_sha256: of whatever else decided the prediction.
        now: when the result was made; the same for the same result, or a repeat is not the same to the byte.
        findings: class name -> code; classes without one get a private code.
    """

    model_name: str
    model_version: str
    model_sha256: str
    config_sha256: str
    now: datetime
    findings: Mapping[str, Finding] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for text in (self.model_name, self.model_version):
            # LO (PS3.5 6.2), in the repertoire that every character set of a source contains
            if not re.fullmatch(r"[ -\[\]-~]{1,64}", text) or not text.strip():
                raise ValueError(f"model name and version: 1 to 64 ASCII characters without backslash, got {text!r}")

    def finding(self, name: str) -> Finding:
        """The code of a class."""
        return self.findings.get(name) or private_code(name, name)


def private_code(value: str, meaning: str) -> Finding:
    """A code of our own scheme; a value that cannot be one is replaced by its hash."""
    if not re.fullmatch(r"[\w.+-]{1,64}", value, re.ASCII):
        value = hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    # CodeMeaning is an LO: no backslash, no control characters, at most 64 (PS3.5 6.2)
    shown = "".join(letter if letter.isprintable() and letter != "\\" else " " for letter in meaning)[:64].strip()
    return Finding(value, PRIVATE_SCHEME, shown or value)


@dataclass(frozen=True)
class Source:
    """The series that a result is about.

    Attributes:
        slices: in the order in which the model saw them.
        across: the model's slices cut across the images of the series, so that none of them is an image.
        identity: keyword -> raw bytes of what is copied.
    """

    slices: tuple[SliceHeader, ...]
    across: bool
    identity: Mapping[str, bytes]

    @property
    def uids(self) -> tuple[str, str]:
        """Of study and series."""
        shared = self.slices[0].shared
        return shared.study_uid, shared.series_uid

    def image(self, number: int) -> SliceHeader | None:
        """The image that is slice `number` of a prediction; None: no single one is."""
        return None if self.across else self.slices[number]


def open_source(paths: Iterable[Path], *, part: int | None = None, as_stored: bool = False) -> Source:
    """Examine the files of a series that was predicted, in any order.

    Args:
        paths: its files.
        part: which volume, where the files hold several.
        as_stored: the model saw the slices as stored, not oriented (`Preprocessing.orientation`).

    Raises:
        ScanError: the series cannot be used, or belongs to no study; what is not read is not written about.
    """
    # whether values without rescale tags may pass for HU was settled when the pixels were read
    volume, _ = dicom.examine_files(paths, assume_hu=True, part=part)
    direction = 1 if as_stored else geometry.slice_direction(volume.affine)
    first = volume.slices[0].path
    if not volume.slices[0].shared.study_uid:
        raise ScanError(
            ReasonCode.TAG_INVALID, "StudyInstanceUID is absent: a result would belong to no study", (first,)
        )
    values = read_elements(first, first, _COPIED).values
    identity = {keyword: raw for keyword, raw in values.items() if isinstance(raw, bytes)}
    return Source(volume.slices[:: direction or 1], not direction, identity)


def deciding_slices(prediction: Prediction) -> tuple[tuple[int, float], ...]:
    """The fewest slices (number, weight) that hold half of the attention, heaviest first."""
    heaviest = sorted(prediction.slice_weights, key=lambda one: -one[1])
    chosen, held = [], 0.0
    for number, weight in heaviest:
        if held >= 0.5 - 1e-9:  # equal weights: half of the slices, and not one more
            break
        chosen.append((number, weight))
        held += weight
    return tuple(chosen)


def result_uid(kind: str, *parts: str) -> str:
    """The same UID for the same parts, others for others: a UUID under its root (PS3.5 B.2), at most 44 characters."""
    # JSON tells ("ab", "c") from ("a", "bc"), and is ASCII whatever the parts hold
    return f"2.25.{uuid.uuid5(_NAMESPACE, json.dumps((kind, *parts))).int}"


def uid_of(kind: str, source: Source, context: ResultContext, *parts: str) -> str:
    """`result_uid` of something about a series by a model."""
    return result_uid(kind, *source.uids, context.model_sha256, context.config_sha256, *parts)


def start_document(sop_class: str, kind: str, source: Source, context: ResultContext, *parts: str) -> Dataset:
    """An object of the source's study: patient, study, series, equipment and SOP common modules (PS3.3 C.7, C.12.1).

    Args:
        sop_class: of the object.
        kind: of result: objects of one kind form a series.
        source: the series.
        context: model and time.
        parts: what tells the object from others of its series.
    """
    document = Dataset()
    for keyword in (*_EMPTY, *_WHERE_KNOWN):
        if keyword in source.identity or keyword in _EMPTY:
            copy_raw(document, keyword, source.identity.get(keyword, b""))
    document.SOPClassUID = UID(sop_class)
    document.SOPInstanceUID = UID(uid_of(kind, source, context, *parts))
    document.SeriesInstanceUID = UID(uid_of(f"{kind} series", source, context))
    document.SeriesDescription = f"medvit {kind}, {RESEARCH_USE.lower()}"
    document.Manufacturer, document.ManufacturerModelName = "medvit", context.model_name
    document.DeviceSerialNumber, document.SoftwareVersions = context.model_sha256[:64], context.model_version
    date, time = f"{context.now:%Y%m%d}", f"{context.now:%H%M%S}"
    document.ContentDate, document.ContentTime = date, time
    document.InstanceCreationDate, document.InstanceCreationTime = date, time
    document.SeriesDate, document.SeriesTime = date, time
    return document


def copy_raw(document: Dataset, keyword: str, raw: bytes) -> None:
    """Give an element the bytes that the source has, whatever they are."""
    vr = dictionary_VR(keyword)
    if len(raw) % 2:  # values have even length (PS3.5 7.1.1)
        raw += b"\0" if vr == "UI" else b" "
    tag = Tag(keyword)
    document[tag] = RawDataElement(tag, vr, len(raw), raw, 0, False, True)


def copy_lossy(document: Dataset, source: Source) -> None:
    """Pixels that lost something once never get it back (PS3.3 C.7.6.1.1.5)."""
    for keyword in _LOSSY:
        if keyword in source.identity:
            copy_raw(document, keyword, source.identity[keyword])


def reference(one: SliceHeader) -> Dataset:
    """Reference to an image, or to a frame of it (PS3.3 table 10-3)."""
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = UID(one.shared.sop_class), UID(one.sop_uid)
    if (frame := frame_number(one)) is not None:
        item.ReferencedFrameNumber = frame
    return item


def frame_number(one: SliceHeader) -> int | None:
    """Counted from 1; None: the image has one frame by its class."""
    return one.frame + 1 if one.shared.sop_class in MULTIFRAME_CT else None


def save(document: Dataset, folder: Path) -> Path:
    """Write an object under its UID: a temporary file, flushed to the disk, takes the name."""
    document.file_meta = FileMetaDataset()
    document.file_meta.MediaStorageSOPClassUID = document.SOPClassUID
    document.file_meta.MediaStorageSOPInstanceUID = document.SOPInstanceUID
    document.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    document.file_meta.ImplementationClassUID = UID(result_uid("implementation"))
    document.file_meta.ImplementationVersionName = "MEDVIT"  # pydicom's holds its version: bytes would change with it
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{document.SOPInstanceUID}.dcm"
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a character set that pydicom does not know is the source's, and stays
            document.save_as(stream, enforce_file_format=True)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path
