"""What results written as DICOM have in common: who made them, their codes, their names.

A result belongs into the study that it is about. UIDs, and with them file names, are hashes of study, series, images,
model and configuration: writing a result again gives the same object, and nothing of a source reaches a path. Identity
is the source's to the byte, or with `ResultContext.pseudonym` none. The header is made here and not by highdicom, which
would parse the source's names, refuse some and ask the clock; it makes the content of reports alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from pydicom.charset import convert_encodings, default_encoding
from pydicom.config import IGNORE, settings
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from medvit.io.deidentify import Pseudonym, deidentify
from medvit.io.disk import write_whole
from medvit.io.results_source import Source, copy_patient_study
from medvit.records import Prediction

PRIVATE_SCHEME = "99MEDVIT"
"""Coding scheme of what no standard has a code for; 99 is for private ones (PS3.16 8)."""

MOST_DECIDING = 5
"""Slices that a report points to: a model that looks at all alike would have half of them listed."""

RESEARCH_USE = "RESEARCH USE"
"""On every picture and in the description of every series."""

_NAMESPACE = uuid.UUID("5f8b3c52-3a1d-5c0e-9c55-8f5b6b0f6f1a")


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
        content: hash of what is said, part of the UIDs: no UID stands for two contents (PS3.5 9).
        pseudonym: (kind, value) -> hash under a key: results carry pseudonyms in place of identity, in name and
            content (`medvit.io.deidentify`); None: identity as in the source.
    """

    model_name: str
    model_version: str
    model_sha256: str
    config_sha256: str
    now: datetime
    findings: Mapping[str, Finding] = field(default_factory=dict)
    content: str = ""
    pseudonym: Pseudonym | None = None

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


def deciding_slices(prediction: Prediction) -> tuple[tuple[int, float], ...]:
    """The fewest slices (number, weight) that hold half of the attention, at most `MOST_DECIDING`, heaviest first."""
    heaviest = sorted(prediction.slice_weights, key=lambda one: -one[1])
    chosen, held = [], 0.0
    for number, weight in heaviest[:MOST_DECIDING]:
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


def sop_instance_uid(kind: str, source: Source, context: ResultContext, *parts: str) -> str:
    """Of the result of a kind, about these images, that says this."""
    volume = [f"part {source.part}"] if source.part else []
    return uid_of(kind, source, context, source.images, context.content, *volume, *parts)


def start_document(sop_class: str, kind: str, source: Source, context: ResultContext, *parts: str) -> Dataset:
    """An object of the source's study: patient, study, series, equipment and SOP common modules (PS3.3 C.7, C.12.1).

    Args:
        sop_class: of the object.
        kind: of result: objects of one kind form a series of the study.
        source: the series.
        context: model and time.
        parts: what tells the object from others of its series.
    """
    document = Dataset()
    copy_patient_study(document, source)
    document.SOPClassUID = UID(sop_class)
    document.SOPInstanceUID = UID(sop_instance_uid(kind, source, context, *parts))
    series = result_uid(f"{kind} series", source.uids[0], context.model_sha256, context.config_sha256)
    document.SeriesInstanceUID = UID(series)
    document.SeriesDescription = f"medvit {kind}, {RESEARCH_USE.lower()}"
    document.Manufacturer, document.ManufacturerModelName = "medvit", context.model_name
    document.DeviceSerialNumber, document.SoftwareVersions = context.model_sha256[:64], context.model_version
    date, time = f"{context.now:%Y%m%d}", f"{context.now:%H%M%S}"
    document.ContentDate, document.ContentTime = date, time
    document.InstanceCreationDate, document.InstanceCreationTime = date, time
    document.SeriesDate, document.SeriesTime = date, time
    return document


@contextmanager
def unjudged() -> Iterator[None]:
    """Values of the source are written as they are, legal or not.

    What pydicom has to say about them it says with the value, into logs, where nothing of a patient may be.
    """
    before = settings.reading_validation_mode, settings.writing_validation_mode
    settings.reading_validation_mode = settings.writing_validation_mode = IGNORE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a character set that pydicom does not know
            yield
    finally:
        settings.reading_validation_mode, settings.writing_validation_mode = before


class Composed(NamedTuple):
    """An object as it will be written: its file name, which is its UID, and its bytes."""

    name: str
    content: bytes

    def write(self, folder: Path) -> Path:
        """Put it into a folder, made when missing: a temporary file, flushed to the disk, takes the name."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / self.name, self.content)
        return folder / self.name


def finish(document: Dataset, source: Source, context: ResultContext) -> Composed:
    """Take identity out if wanted, and encode."""
    if context.pseudonym is not None:
        deidentify(document, context.pseudonym, context.pseudonym("patient", source.patient))
    return encode(document)


def encode(document: Dataset) -> Composed:
    """The file of an object (PS3.10)."""
    document.file_meta = FileMetaDataset()
    document.file_meta.MediaStorageSOPClassUID = document.SOPClassUID
    document.file_meta.MediaStorageSOPInstanceUID = document.SOPInstanceUID
    document.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    document.file_meta.ImplementationClassUID = UID(result_uid("implementation"))
    document.file_meta.ImplementationVersionName = "MEDVIT"  # pydicom's holds its version: bytes would change with it
    declared = "SpecificCharacterSet" in document
    encodings = convert_encodings(document.SpecificCharacterSet) if declared else default_encoding
    # as if read so: otherwise pydicom decodes and encodes what is raw, and loses what does not fit its character set
    document.set_original_encoding(is_implicit_vr=False, is_little_endian=True, character_encoding=encodings)
    content = BytesIO()
    document.save_as(content, enforce_file_format=True)
    return Composed(f"{document.SOPInstanceUID}.dcm", content.getvalue())
