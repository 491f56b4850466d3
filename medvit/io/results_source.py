"""The series that a result is about: its images in the order of the model's slices, and whose they are, raw.

Patient and study are taken as bytes and copied as bytes, under the source's own SpecificCharacterSet: a name that is
decoded and encoded once more may end as '????'. Sequences are not copied: further issuers and ids of a patient stay
with the images.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydicom.charset import default_encoding, python_encoding
from pydicom.datadict import dictionary_VR, keyword_dict
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from medvit.io import dicom, geometry
from medvit.io.elements import read_elements
from medvit.io.headers import SliceHeader
from medvit.io.tags import MULTIFRAME_CT
from medvit.records import ReasonCode, ScanError

ALWAYS = (
    "PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime AccessionNumber ReferringPhysicianName "
    "StudyID"
).split()
"""Type 2 of the Patient and General Study modules: present, if empty (PS3.3 C.7.1.1, C.7.2.1)."""

WHERE_KNOWN = (
    "SpecificCharacterSet IssuerOfPatientID TypeOfPatientID PatientBirthTime PatientAge PatientSize PatientWeight "
    "StudyInstanceUID StudyDescription"
).split()

LOSSY = "LossyImageCompression LossyImageCompressionRatio LossyImageCompressionMethod".split()

_COPIED: Mapping[int, str] = {keyword_dict[keyword]: keyword for keyword in (*ALWAYS, *WHERE_KNOWN, *LOSSY)}


@dataclass(frozen=True)
class Source:
    """The series that a result is about.

    Attributes:
        slices: in the order in which the model saw them.
        across: the model's slices cut across the images of the series, so that none of them is an image.
        identity: keyword -> raw bytes of what is copied.
        part: which volume of the series.
    """

    slices: tuple[SliceHeader, ...]
    across: bool
    identity: Mapping[str, bytes]
    part: int = 0

    @property
    def uids(self) -> tuple[str, str]:
        """Of study and series."""
        shared = self.slices[0].shared
        return shared.study_uid, shared.series_uid

    @property
    def images(self) -> str:
        """Hash of which images there are."""
        uids = sorted({one.sop_uid for one in self.slices})
        return hashlib.sha256("\n".join(uids).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def patient(self) -> str:
        """What a pseudonym of the patient is made from, here as in predictions: the id, else the study."""
        shared = self.slices[0].shared
        return shared.patient[0] or shared.study_uid

    def image(self, number: int) -> SliceHeader | None:
        """The image that is slice `number` of a prediction; None: no single one is."""
        return None if self.across else self.slices[number]

    def writes(self, text: str) -> bool:
        """Whether the source's character set has the letters of a text."""
        terms = self.identity.get("SpecificCharacterSet", b"").decode("ascii", "replace").split("\\")
        encodings = {python_encoding.get(term.strip(" \0"), default_encoding) for term in terms}
        # the default repertoire is ASCII, which pydicom takes for Latin-1
        return text.isascii() or any(_encodes(text, encoding) for encoding in encodings - {default_encoding})


def _encodes(text: str, encoding: str) -> bool:
    try:
        return bool(text.encode(encoding))
    except (UnicodeError, LookupError):  # Python has no codec for some
        return False


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
    first = volume.slices[0]
    if not first.shared.study_uid:
        detail = "StudyInstanceUID is absent: a result would belong to no study"
        raise ScanError(ReasonCode.TAG_INVALID, detail, (first.path,))
    values = read_elements(first.path, first.path, _COPIED).values
    identity = {keyword: raw for keyword, raw in values.items() if isinstance(raw, bytes)}
    return Source(volume.slices[:: direction or 1], not direction, _legible(identity), part or 0)


def _legible(identity: dict[str, bytes]) -> dict[str, bytes]:
    """Without a character set that is none of DICOM's (PS3.3 C.12.1.1.2) but a codec of Python, which pydicom takes.

    Some, as "hex", are no encodings of text.
    """
    terms = [term.strip(" \0") for term in identity.get("SpecificCharacterSet", b"").decode("latin-1").split("\\")]
    if not any(_foreign_codec(term) for term in terms):
        return identity
    return {keyword: raw for keyword, raw in identity.items() if keyword != "SpecificCharacterSet"}


def _foreign_codec(term: str) -> bool:
    try:
        return term not in python_encoding and bool(codecs.lookup(term))
    except (LookupError, ValueError):
        return False


def copy_patient_study(document: Dataset, source: Source) -> None:
    """Patient, General Study and Patient Study modules (PS3.3 C.7.1.1, C.7.2.1, C.7.2.2) as the source has them."""
    for keyword in (*ALWAYS, *WHERE_KNOWN):
        if keyword in source.identity or keyword in ALWAYS:
            _copy_raw(document, keyword, source.identity.get(keyword, b""))


def copy_lossy(document: Dataset, source: Source) -> None:
    """Pixels that lost something once never get it back (PS3.3 C.7.6.1.1.5)."""
    for keyword in LOSSY:
        if keyword in source.identity:
            _copy_raw(document, keyword, source.identity[keyword])


def _copy_raw(document: Dataset, keyword: str, raw: bytes) -> None:
    """Give an element the bytes that the source has, whatever they are."""
    vr = dictionary_VR(keyword)
    if len(raw) % 2:  # values have even length (PS3.5 7.1.1)
        raw += b"\0" if vr == "UI" else b" "
    tag = Tag(keyword)
    document[tag] = RawDataElement(tag, vr, len(raw), raw, 0, False, True)


def reference(one: SliceHeader, *, whole: bool = False) -> Dataset:
    """Reference to an image (PS3.3 table 10-11), and to the frame of it unless the whole is meant."""
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = one.shared.sop_class, one.sop_uid
    if not whole and (frame := frame_number(one)) is not None:
        item.ReferencedFrameNumber = frame
    return item


def frame_number(one: SliceHeader) -> int | None:
    """Counted from 1; None: the image has one frame by its class."""
    return one.frame + 1 if one.shared.sop_class in MULTIFRAME_CT else None
