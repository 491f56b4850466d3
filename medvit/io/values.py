"""Raw values of a header -> text, numbers, identity; guarded: real exports hold absent, empty and malformed ones."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from medvit.io import text
from medvit.io.elements import Values
from medvit.io.geometry import SPACING_LIMITS_MM
from medvit.io.tags import INTEGERS, MULTIFRAME_CT
from medvit.records import ScanHeader


def scan_header(values: Values, reader: text.TextReader) -> ScanHeader:
    """Identity and acquisition of the raw values of a file."""
    institution, manufacturer = reader.read(values, "InstitutionName"), reader.read(values, "Manufacturer")
    return ScanHeader(
        patient_id=reader.read(values, "PatientID"),
        issuer=reader.read(values, "IssuerOfPatientID"),
        patient_name=reader.read(values, "PatientName"),
        birth_date=plain(values, "PatientBirthDate"),
        study_uid=plain(values, "StudyInstanceUID"),
        series_uid=plain(values, "SeriesInstanceUID"),
        frame_of_reference=plain(values, "FrameOfReferenceUID"),
        modality=plain(values, "Modality"),
        site=institution or manufacturer,
        site_source="InstitutionName" if institution else "Manufacturer" if manufacturer else "",
        sex=plain(values, "PatientSex"),
        age=_age_years(values),
        manufacturer=manufacturer,
        body_part=plain(values, "BodyPartExamined"),
        kernel=reader.read(values, "ConvolutionKernel"),
        contrast=reader.read(values, "ContrastBolusAgent"),
        description=reader.read(values, "SeriesDescription"),
        slice_thickness_mm=_thickness_mm(values),
    )


def _thickness_mm(values: Values) -> float | None:
    """SliceThickness; None where it can be none, for some writers put 0 or a negative number."""
    thickness = single(values, "SliceThickness")
    low, high = SPACING_LIMITS_MM
    return thickness if thickness is not None and low <= thickness <= high else None


def _age_years(values: Values) -> float | None:
    """PatientAge (AS: 3 digits and D, W, M or Y; PS3.5 table 6.2-1), else birth date to study date."""
    age = plain(values, "PatientAge")
    unit = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}.get(age[-1:])
    if unit is not None and age[:-1].isdigit():
        return round(int(age[:-1]) * unit, 2)
    try:
        birth, study = (
            np.datetime64(f"{d[:4]}-{d[4:6]}-{d[6:8]}")
            for d in (plain(values, "PatientBirthDate"), plain(values, "StudyDate"))
        )
        years = float((study - birth) / np.timedelta64(1, "D")) / 365.25
    except ValueError:
        return None
    return round(years, 2) if 0 <= years < 130 else None


def frames(values: Values, stated: int) -> int:
    """A single-frame object has one, whatever senseless number below that it states."""
    return stated if plain(values, "SOPClassUID") in MULTIFRAME_CT else max(1, stated)


def padding(values: Values, bits: int, container: int, *, signed: bool, little: bool) -> tuple[int, int] | None:
    """Stored values that are padding, from and to (PS3.3 C.7.5.1.1.2); None without one that the pixels can hold."""
    low = number(values, "PixelPaddingValue", little=little)
    high = number(values, "PixelPaddingRangeLimit", little=little)
    # US or SS: many files write the one and mean the other, so PixelRepresentation decides
    ends = [_as_stored(end, bits, container, signed=signed) for end in (low, low if high is None else high)]
    known = [end for end in ends if end is not None]
    return (min(known), max(known)) if len(known) == 2 else None


def _as_stored(value: int | None, bits: int, container: int, *, signed: bool) -> int | None:
    """A padding value as pixels of so many stored bits have it; None where these bits cannot hold it."""
    if value is None or not 0 < bits <= container:
        return None
    value &= (1 << container) - 1
    low, above = value & ((1 << bits) - 1), value >> bits
    negative = signed and bool(low >> (bits - 1))
    if above and not (negative and above == (1 << (container - bits)) - 1):
        return None
    return low - (1 << bits) if negative else low


def plain(values: Values, keyword: str) -> str:
    """Text that the standard restricts to ASCII; other bytes are shown as escapes."""
    raw = values.get(keyword)
    return text.escaped(raw) if isinstance(raw, bytes) else ""


def floats(values: Values, keyword: str, count: int) -> tuple[float, ...] | None:
    """So many finite numbers from text; None where absent or anything else."""
    raw = values.get(keyword)
    return _floats(raw, count) if raw else None


@lru_cache(maxsize=1024)
def _floats(raw: bytes, count: int) -> tuple[float, ...] | None:
    """One object for what is met again: neighbours agree in most numbers."""
    if b"_" in raw:  # Python's digit separator is no part of a DS
        return None
    try:
        numbers = tuple(float(part.strip(b" \0")) for part in raw.split(b"\\"))
    except ValueError:
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def single(values: Values, keyword: str) -> float | None:
    """One finite number from text; None where absent or anything else."""
    numbers = floats(values, keyword, 1)
    return None if numbers is None else numbers[0]


def number(values: Values, keyword: str, *, little: bool) -> int | None:
    """An integer, from binary or text; None where absent, empty or unreadable."""
    raw = values.get(keyword)
    if not raw:
        return None
    if keyword in INTEGERS:
        return int.from_bytes(raw[:4], "little" if little else "big") if len(raw) >= 2 else None
    number = single(values, keyword)
    return None if number is None else int(number)


def integer(values: Values, keyword: str, default: int, *, little: bool) -> int:
    """An integer, or the default where `number` finds none."""
    found = number(values, keyword, little=little)
    return default if found is None else found
