"""One DICOM file -> small records of its slices.

What slices of a series share is kept once: a folder of 100,000 files has to fit in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Self

from medvit.io import text
from medvit.io.elements import Elements, Values, read_elements
from medvit.io.faults import LOSSY, Fault, shared_fault
from medvit.io.multiframe import frame_values
from medvit.io.tags import MULTIFRAME_CT, WANTED
from medvit.io.values import floats, frames, integer, number, padding, plain, scan_header, single
from medvit.records import ReasonCode, ScanError, ScanHeader

EXECUTABLE = (b"MZ", b"\x7fELF", b"\xcf\xfa\xed\xfe")
"""How programs begin, which a preamble can hold (CVE-2019-11687)."""

RECENT = 64
"""Keys at hand: series may be mixed in a folder, but not all of them."""

_OF_THE_SLICE = {"SOPInstanceUID", "ImagePositionPatient", "AcquisitionTime", "ContentTime", "RescaleSlope"}
_OF_THE_SLICE |= {"RescaleIntercept", "AcquisitionNumber", "TemporalPositionIdentifier", "TriggerTime"}
_SHARED = tuple(what for what in WANTED.values() if isinstance(what, str) and what not in _OF_THE_SLICE)


class SharedKey(NamedTuple):
    """Raw form of a `SharedHeader`: equal keys mean equal records, so that most files cost no conversion.

    The records of a folder stay in memory, their keys do not.
    """

    values: tuple[bytes | None, ...]  # of _SHARED
    transfer_syntax: str
    little: bool
    preamble: bool
    executable: bool
    overlays: bool
    lut: bool
    rescale_tags: bool

    def to_json(self) -> str:
        """As text, in one way alone."""
        values, *rest = self
        return json.dumps([[None if raw is None else raw.decode("latin-1") for raw in values], *rest])

    @classmethod
    def from_json(cls, content: str) -> Self:
        """The key of a text."""
        raw, *rest = json.loads(content)
        return cls(tuple(None if text is None else text.encode("latin-1") for text in raw), *rest)


def digest_of(content: str) -> bytes:
    """What names a shared header, in memory and in the index, by the text of its key."""
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class SharedHeader:
    """What the slices of a series usually have in common; empty, None or a default where absent or unreadable."""

    digest: bytes  # of its key
    series_uid: str
    study_uid: str
    frame_of_reference: str
    sop_class: str
    modality: str
    image_type: tuple[str, ...]
    transfer_syntax: str
    little: bool
    photometric: str
    samples: int
    frames: int
    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: int  # PixelRepresentation: 0 or 1, else a fault
    padding: tuple[int, int] | None
    overlays: bool
    orientation: tuple[float, ...] | None
    spacing_mm: tuple[float, ...] | None
    thickness_mm: float | None
    rescale_tags: bool
    rescale_type: str
    kvp: str
    cardiac_phase: str
    patient: tuple[str, str, str]  # id, birth date, sex: must agree within a study
    scan: ScanHeader
    lossy: bool
    preamble: bool
    executable: bool
    text_fault: bool
    integer_fault: bool
    fault: Fault | None  # why files like this are no slices of a CT volume


class SliceHeader(NamedTuple):
    """One slice: a CT file, or one frame of a multi-frame file.

    Attributes:
        pixels: (offset, length) of the pixel data in the file or its inflated data set; length -1 where encapsulated,
            -2 where there is none.
        size, mtime_ns: of the file when it was looked at.
        damaged: the header ends before it should.
    """

    path: str
    frame: int
    sop_uid: str
    position: tuple[float, ...] | None
    slope: float | None
    intercept: float | None
    acquisition: str
    temporal: str
    times: str
    pixels: tuple[int, int]
    size: int
    mtime_ns: int
    damaged: bool
    shared: SharedHeader


class HeaderReader:
    """Reads headers, keeping one copy of what slices share.

    Use one for a whole folder: a slice whose shared elements equal those of one seen before costs no conversion.

    Attributes:
        known: shared headers by their digest.
        tell: called with digest and text of a key when a file shows a new one.
    """

    def __init__(self) -> None:
        self.known: dict[bytes, SharedHeader] = {}
        self.tell: Callable[[bytes, str], None] = lambda _digest, _content: None
        self._recent: dict[SharedKey, SharedHeader] = {}
        self._last: SliceHeader | None = None

    def read(self, path: str | Path, name: str) -> list[SliceHeader]:
        """The slices of one file: one, or one per frame.

        Args:
            path: the file.
            name: how errors and the records call it.

        Raises:
            ScanError: `NOT_DICOM`, `IO_ERROR`, `TAG_INVALID`, `NESTING`, `RESOURCE_LIMIT`, `NOT_REGULAR`.
        """
        elements = read_elements(path, name)
        values = elements.values
        if "SOPClassUID" not in values and elements.meta_class:
            # DICOMDIR, and a file cut off early, say what they are in the file meta information alone
            values["SOPClassUID"] = elements.meta_class.encode()
        sop_class = plain(values, "SOPClassUID")
        if elements.preamble is None and not (sop_class.startswith("1.2.840.10008.") and "SOPInstanceUID" in values):
            raise ScanError(ReasonCode.NOT_DICOM, "no DICOM header", (name,))
        if sop_class in MULTIFRAME_CT:
            frames = frame_values(values, little=elements.little)
            return [self._slice(elements, each, name, frame) for frame, each in enumerate(frames)]
        return [self._slice(elements, values, name, 0)]

    def _slice(self, elements: Elements, values: Values, name: str, frame: int) -> SliceHeader:
        preamble = elements.preamble
        key = SharedKey(
            tuple(map(values.get, _SHARED)),
            elements.transfer_syntax,
            elements.little,
            preamble is not None,
            preamble is not None and preamble.startswith(EXECUTABLE),
            elements.overlays,
            "ModalityLUTSequence" in values,
            "RescaleSlope" in values and "RescaleIntercept" in values,
        )
        keyword, offset, length = elements.pixels or ("", 0, -2)
        return self.keep(
            SliceHeader(
                name,
                frame,
                plain(values, "SOPInstanceUID"),
                floats(values, "ImagePositionPatient", 3),
                single(values, "RescaleSlope"),
                single(values, "RescaleIntercept"),
                plain(values, "AcquisitionNumber"),
                plain(values, "TemporalPositionIdentifier"),
                " ".join(plain(values, name) for name in ("AcquisitionTime", "ContentTime", "TriggerTime")),
                (offset, length if keyword in ("", "PixelData") else -2),
                elements.size,
                elements.mtime_ns,
                elements.ends_early,
                self._shared(key),
            )
        )

    def _shared(self, key: SharedKey) -> SharedHeader:
        """The record of a key, made when it is new."""
        if (found := self._recent.get(key)) is not None:
            return found
        content = key.to_json()
        digest = digest_of(content)
        if (found := self.known.get(digest)) is None:
            self.tell(digest, content)
            found = self.adopt(digest, key)
        if len(self._recent) >= RECENT:
            self._recent.clear()
        self._recent[key] = found
        return found

    def adopt(self, digest: bytes, key: SharedKey) -> SharedHeader:
        """A shared header from its key, under its digest."""
        found = self.known[digest] = _shared_header(digest, key)
        return found

    def keep(self, header: SliceHeader) -> SliceHeader:
        """The same record, sharing values with the one before: neighbours differ in little."""
        last, self._last = self._last, header
        if last is None:
            return header
        position = header.position
        if position is not None and last.position is not None:
            position = tuple(old if old == new else new for old, new in zip(last.position, position, strict=True))
        self._last = header._replace(
            position=position,
            slope=last.slope if last.slope == header.slope else header.slope,
            intercept=last.intercept if last.intercept == header.intercept else header.intercept,
            acquisition=last.acquisition if last.acquisition == header.acquisition else header.acquisition,
            temporal=last.temporal if last.temporal == header.temporal else header.temporal,
            times=last.times if last.times == header.times else header.times,
            pixels=last.pixels if last.pixels == header.pixels else header.pixels,
            size=last.size if last.size == header.size else header.size,
        )
        return self._last


_DEFAULTS = {
    "SamplesPerPixel": 1,
    "NumberOfFrames": 1,
    "Rows": 0,
    "Columns": 0,
    "BitsAllocated": 16,
    "BitsStored": 0,
    "PixelRepresentation": 0,
}
_NEEDED = ("SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation")


def _shared_header(digest: bytes, key: SharedKey) -> SharedHeader:
    little = key.little
    values = {name: raw for name, raw in zip(_SHARED, key.values, strict=True) if raw is not None}
    reader = text.TextReader(values.get("SpecificCharacterSet", b""))
    scan = scan_header(values, reader)
    integers = {name: integer(values, name, default, little=little) for name, default in _DEFAULTS.items()}
    signed = integers["PixelRepresentation"]
    bits = integers["BitsStored"]
    shared = SharedHeader(
        digest=digest,
        series_uid=scan.series_uid,
        study_uid=scan.study_uid,
        frame_of_reference=scan.frame_of_reference,
        sop_class=plain(values, "SOPClassUID"),
        modality=scan.modality,
        image_type=_parts(plain(values, "ImageType")),
        transfer_syntax=key.transfer_syntax,
        little=little,
        photometric=plain(values, "PhotometricInterpretation"),
        samples=integers["SamplesPerPixel"],
        frames=frames(values, integers["NumberOfFrames"]),
        rows=integers["Rows"],
        columns=integers["Columns"],
        bits_allocated=integers["BitsAllocated"],
        bits_stored=bits,
        high_bit=integer(values, "HighBit", bits - 1, little=little),
        signed=signed,
        padding=padding(values, bits, integers["BitsAllocated"], signed=bool(signed), little=little),
        overlays=key.overlays,
        orientation=floats(values, "ImageOrientationPatient", 6),
        spacing_mm=floats(values, "PixelSpacing", 2),
        thickness_mm=scan.slice_thickness_mm,
        rescale_tags=key.rescale_tags,
        rescale_type="LUT" if key.lut else plain(values, "RescaleType"),
        kvp=plain(values, "KVP"),
        cardiac_phase=plain(values, "NominalPercentageOfCardiacPhase"),
        patient=(scan.patient_id, scan.birth_date, scan.sex),
        scan=scan,
        lossy=key.transfer_syntax in LOSSY or plain(values, "LossyImageCompression") == "01",
        preamble=key.preamble,
        executable=key.executable,
        text_fault=reader.fault,
        integer_fault=any(number(values, name, little=little) is None for name in _NEEDED),
        fault=None,
    )
    return replace(shared, fault=shared_fault(shared))


@lru_cache(maxsize=256)
def _parts(text: str) -> tuple[str, ...]:
    """Values of a text, one object for what is met again."""
    return tuple(text.split("\\")) if text else ()


def names_of(headers: Iterable[SliceHeader]) -> tuple[str, ...]:
    """The files of slices, each once, in order."""
    return tuple(dict.fromkeys(header.path for header in headers))


def shared_by(headers: Iterable[SliceHeader]) -> dict[int, SharedHeader]:
    """The few different shared headers of many slices, by their `id`."""
    return {id(one.shared): one.shared for one in headers}
