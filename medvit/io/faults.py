"""What is wrong or worth telling with a file, told from its header, before any pixel is decoded.

A file is judged by what it is (SOP class, ImageType), never by its name or folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from medvit.io import text
from medvit.io.elements import DEFLATED, NATIVE
from medvit.io.geometry import FARTHEST_MM, SPACING_LIMITS_MM
from medvit.io.tags import CT_IMAGE, MULTIFRAME_CT
from medvit.records import ReasonCode

if TYPE_CHECKING:
    from medvit.io.headers import SharedHeader, SliceHeader

DICOMDIR = "1.2.840.10008.1.3.10"
"""Media Storage Directory: has no SOPInstanceUID of its own. Its references are never followed."""

IMAGE_MODALITIES = {"MR", "PT", "NM", "US", "CR", "DX", "MG", "XA", "RF", "IVUS", "OCT", "OP", "SM", "ES", "XC", "PX"}
LOSSY = {f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 81, 91, 203)}
RESCALE_TYPES = {"OD", "US", "MGML", "Z_EFF", "ED", "EDW", "HU_MOD", "PCT", "LUT"}
"""Defined terms of PS3.3 C.11.1.1.2 beside HU, and a lookup table; other text may be anything and is not repeated."""

COLOURS = {"RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT", "YBR_PARTIAL_420"}
MAX_PIXELS = 2**26
"""Largest rows × columns of one slice: 8192 × 8192, far above any CT."""

MAX_BYTES = 2**31
"""Longest pixel data of one file, inflated."""

MAX_VOXELS = 2**31
"""Largest volume: 8 GiB as float32."""

_LEGAL_UID = re.compile(r"[0-9.]{1,64}")

Fault = tuple[ReasonCode, str]
"""Why, and what was seen."""


def differ(patients: Iterable[tuple[str, str, str]]) -> bool:
    """Whether (id, birth date, sex) contradict each other: absent in one and given in another is no contradiction."""
    return any(len({field for field in fields if field}) > 1 for fields in zip(*patients, strict=True))


def file_fault(header: SliceHeader) -> Fault | None:
    """Why this file is no slice of a CT volume medvit can use; None when it may be one."""
    shared = header.shared
    if shared.fault is None and not header.damaged and _LEGAL_UID.fullmatch(header.sop_uid):
        return None
    if not shared.sop_class or not (header.sop_uid or shared.sop_class == DICOMDIR):
        return ReasonCode.TAG_INVALID, "SOPClassUID or SOPInstanceUID is absent: perhaps cut off"
    if header.damaged and not shared.photometric and shared.sop_class in MULTIFRAME_CT | {CT_IMAGE}:
        return ReasonCode.TAG_INVALID, "the file ends within its header"
    if shared.fault is None and not _LEGAL_UID.fullmatch(header.sop_uid):
        return _UNSAFE_UID
    return shared.fault


_UNSAFE_UID = ReasonCode.UNSAFE_NAME, "a UID holds other characters than digits and dots, or more than 64"


def shared_fault(shared: SharedHeader) -> Fault | None:
    """The part of `file_fault` that slices share; asked once for all of them."""
    code, multiframe = ReasonCode, shared.sop_class in MULTIFRAME_CT
    if not multiframe and shared.sop_class != CT_IMAGE:
        other = code.MODALITY if shared.modality in IMAGE_MODALITIES else code.NOT_VOLUME
        return other, text.sop_class_name(shared.sop_class)
    uids = [uid for uid in (shared.series_uid, shared.study_uid) if uid]
    checks = (
        (not all(map(_LEGAL_UID.fullmatch, uids)), *_UNSAFE_UID),
        (not multiframe and shared.frames > 1, code.MULTIFRAME_UNSUPPORTED, "frames in a single-frame object"),
        (multiframe and shared.frames < 1, code.MULTIFRAME_UNSUPPORTED, "no functional groups for each frame"),
        ("LOCALIZER" in shared.image_type, code.NOT_VOLUME, "localizer"),
        (not shared.photometric, code.TAG_INVALID, "PhotometricInterpretation is absent: no image"),
        (
            shared.samples != 1 or not shared.photometric.startswith("MONOCHROME"),
            code.PHOTOMETRIC,
            "a colour image" if shared.photometric in COLOURS else "no grey image",
        ),
        (not shared.series_uid, code.TAG_INVALID, "SeriesInstanceUID is absent"),
    )
    return next(((reason, detail) for wrong, reason, detail in checks if wrong), None)


def slice_faults(header: SliceHeader, *, assume_hu: bool) -> list[Fault]:
    """What is wrong with one slice beyond what it shares with the others."""
    faults = []
    if header.pixels[1] >= MAX_BYTES:
        faults.append((ReasonCode.RESOURCE_LIMIT, f"{header.pixels[1] >> 20} MiB of pixel data in one file"))
    if fault := ends_early(header):
        faults.append((ReasonCode.PIXEL_TRUNCATED, fault))
    if header.position is None:
        faults.append((ReasonCode.ORIENTATION_INVALID, "ImagePositionPatient is absent"))
    elif max(map(abs, header.position)) > FARTHEST_MM:
        faults.append((ReasonCode.ORIENTATION_INVALID, "ImagePositionPatient lies where no table is"))
    if header.shared.rescale_tags:
        slope, intercept = header.slope, header.intercept
        if slope is None or intercept is None or not slope > 0:
            faults.append((ReasonCode.RESCALE_INVALID, f"slope {slope}, intercept {intercept}"))
    elif assume_hu and (header.slope not in (None, 1) or header.intercept not in (None, 0)):
        faults.append((ReasonCode.RESCALE_INVALID, "one of RescaleSlope and RescaleIntercept is absent"))
    elif not assume_hu:
        faults.append((ReasonCode.RESCALE_MISSING, "no RescaleSlope or RescaleIntercept"))
    return faults


def shared_faults(shared: SharedHeader) -> list[Fault]:
    """What is wrong or worth telling with what slices share; each quarantines or flags the series."""
    code, syntax = ReasonCode, f"transfer syntax {shared.transfer_syntax[:64]}"
    low, high = SPACING_LIMITS_MM
    checks: list[tuple[bool, ReasonCode, str]] = [
        (shared.rows <= 0 or shared.columns <= 0, code.TAG_INVALID, "Rows or Columns is absent or zero"),
        (shared.rows * shared.columns > MAX_PIXELS, code.RESOURCE_LIMIT, f"{shared.rows} x {shared.columns} pixels"),
        (
            shared.integer_fault,
            code.TAG_INVALID,
            "a number that describes the pixels (Rows, BitsStored, ...) is absent or none",
        ),
        (shared.orientation is None, code.ORIENTATION_INVALID, "ImageOrientationPatient is absent"),
        (
            max(map(abs, shared.orientation or (0,))) > 2,  # so far off that computing with it might overflow
            code.ORIENTATION_INVALID,
            "ImageOrientationPatient holds no direction cosines",
        ),
        (
            not shared.spacing_mm or not low <= min(shared.spacing_mm) <= max(shared.spacing_mm) <= high,
            code.TAG_INVALID,
            f"PixelSpacing is absent, or not within {low:g} to {high:g} mm",
        ),
        (
            shared.rescale_type not in ("", "HU"),  # absent means HU for CT (PS3.3 C.8.2.1)
            code.RESCALE_UNITS,
            f"RescaleType {shared.rescale_type if shared.rescale_type in RESCALE_TYPES else 'of its own'}",
        ),
        (shared.bits_allocated not in (8, 16, 32), code.TAG_INVALID, f"BitsAllocated {shared.bits_allocated}"),
        (
            not _bits_agree(shared),
            code.PIXELREP_CONFLICT,
            f"BitsStored {shared.bits_stored}, HighBit {shared.high_bit}",
        ),
        (not can_decode(shared.transfer_syntax), code.TS_UNSUPPORTED, syntax),
        (shared.lossy, code.LOSSY, syntax),
        (shared.photometric == "MONOCHROME1", code.MONO1, "photometric interpretation MONOCHROME1"),
        (not shared.preamble, code.NO_PREAMBLE, "no 128-byte preamble"),
        (shared.executable, code.PREAMBLE_EXEC, "the preamble begins like a program"),
        (shared.text_fault, code.CHARSET, "text does not fit its declared character set"),
    ]
    return [(reason, detail) for wrong, reason, detail in checks if wrong]


def _bits_agree(shared: SharedHeader) -> bool:
    if shared.transfer_syntax not in NATIVE and shared.high_bit != shared.bits_stored - 1:
        return False  # a decoder returns values, not their place in a container
    return shared.signed in (0, 1) and 0 < shared.bits_stored <= shared.high_bit + 1 <= shared.bits_allocated


@cache
def can_decode(transfer_syntax: str) -> bool:
    """Whether pixel data of this transfer syntax can be decoded here."""
    if transfer_syntax in NATIVE:
        return True
    from pydicom.pixels.decoders.base import get_decoder  # noqa: PLC0415  a quarter second native pixels need not pay
    from pydicom.uid import AllTransferSyntaxes  # noqa: PLC0415

    try:
        return transfer_syntax in AllTransferSyntaxes and bool(get_decoder(transfer_syntax).is_available)
    except NotImplementedError:
        return False


def ends_early(header: SliceHeader) -> str:
    """How the file ends before its pixel data, as far as that shows without decoding; empty if it does not."""
    (offset, length), shared = header.pixels, header.shared
    if header.damaged or length == -2:
        return "the file ends before its pixel data, or has none"
    if shared.transfer_syntax != DEFLATED and length >= 0 and offset + length > header.size:
        return "the file ends within its pixel data"
    return ""


def wrong_length(header: SliceHeader) -> str:
    """How the length of the pixel data contradicts the matrix; empty if it does not, or if only decoding tells."""
    length, shared = header.pixels[1], header.shared
    if (length == -1) == (shared.transfer_syntax in NATIVE):
        return "pixel data is encapsulated where the transfer syntax is not, or the other way round"
    surplus = length - shared.rows * shared.columns * shared.frames * shared.bits_allocated // 8
    # one byte evens an odd length (PS3.5 8.1.1); more belongs to another matrix
    return "" if length == -1 or 0 <= surplus <= 1 else f"{surplus:+d} bytes of pixels against rows and columns"
