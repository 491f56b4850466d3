"""NRRD and MetaImage headers: lines of text, then the pixels, or the name of the file beside that holds them.

Read by ourselves, not by SimpleITK: it reads cut streams as zeros, takes a missing orientation for LPS, and opens
whatever file a header names. Only what ITK and 3D Slicer write is understood: raw or gzip, three axes of numbers.
Formats: https://teem.sourceforge.net/nrrd/format.html, https://itk.org/Wiki/ITK/MetaIO/Documentation.
"""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from medvit.io.voxels import Pixels, VolumeHeader
from medvit.records import ReasonCode, ScanError

Fields = Mapping[str, str]

MAX_HEADER_BYTES = 1 << 20
"""Real headers have a few kilobytes."""

TO_LPS = {
    "left-posterior-superior": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1),
}
TO_LPS |= {"lps": TO_LPS["left-posterior-superior"], "ras": TO_LPS["right-anterior-superior"]}
TO_LPS |= {"las": TO_LPS["left-anterior-superior"]}
"""NRRD spaces of a patient -> signs of its axes in LPS."""

NRRD_TYPES = {
    name: code
    for code, names in {
        "i1": "signed char, int8, int8_t",
        "u1": "uchar, unsigned char, uint8, uint8_t",
        "i2": "short, short int, signed short, signed short int, int16, int16_t",
        "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
        "i4": "int, signed int, int32, int32_t",
        "u4": "uint, unsigned int, uint32, uint32_t",
        "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
        "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
        "f4": "float",
        "f8": "double",
    }.items()
    for name in names.split(", ")
}
META_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",  # four bytes in every MetaIO file, whatever the machine
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}


def read_nrrd(path: Path) -> VolumeHeader:
    """Header of an .nrrd or .nhdr file; the caller checks it.

    Raises:
        ScanError: `TAG_INVALID`, `NIFTI_NDIM`, `NIFTI_AFFINE`, `TS_UNSUPPORTED` or `UNSAFE_NAME`.
    """
    with path.open("rb") as file:
        fields = _nrrd_fields(file)
        start = file.tell()
    shape = _shape(fields, "dimension", "sizes")
    encoding = fields.get("encoding", "").lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise ScanError(ReasonCode.TS_UNSUPPORTED, "the encoding is neither raw nor gzip")
    dtype = _dtype(NRRD_TYPES.get(fields.get("type", "").lower()), {"little": False, "big": True}, fields.get("endian"))
    if "datafile" in fields:
        path, start = _beside(path, fields["datafile"]), 0
    if _whole(fields.get("lineskip", "0")):
        raise ScanError(ReasonCode.TS_UNSUPPORTED, "lines before the pixels are to be skipped")
    packed = encoding != "raw"
    start = _skipped(path, start, fields.get("byteskip", "0"), shape, dtype, packed=packed)
    return VolumeHeader(
        shape=shape, affine=_nrrd_affine(fields), pixels=Pixels(path=path, start=start, dtype=dtype, packed=packed)
    )


def read_metaimage(path: Path) -> VolumeHeader:
    """Header of an .mha or .mhd file; the caller checks it.

    Raises:
        ScanError: as `read_nrrd`, and `PIXEL_TRUNCATED` where the compressed stream has another length than declared.
    """
    with path.open("rb") as file:
        fields = _meta_fields(file)
        start = file.tell()
    shape = _shape(fields, "NDims", "DimSize")
    if _whole(fields.get("ElementNumberOfChannels", "1")) != 1:
        raise ScanError(ReasonCode.NIFTI_NDIM, "several values per voxel")
    if not _switch(fields, "BinaryData", default=True):
        raise ScanError(ReasonCode.TS_UNSUPPORTED, "the voxels are written as text")
    order = fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB"))
    dtype = _dtype(META_TYPES.get(fields.get("ElementType", "")), SWITCH, order)
    if fields["ElementDataFile"].upper() != "LOCAL":
        path, start = _beside(path, fields["ElementDataFile"]), 0
    packed = _switch(fields, "CompressedData", default=False)
    start = _skipped(path, start, fields.get("HeaderSize", "0"), shape, dtype, packed=packed)
    if packed and "CompressedDataSize" in fields:
        declared, held = _whole(fields["CompressedDataSize"]), path.stat().st_size - start
        if declared != held:
            raise ScanError(ReasonCode.PIXEL_TRUNCATED, f"{held} compressed bytes, the header says {declared}")
    return VolumeHeader(
        shape=shape, affine=_meta_affine(fields), pixels=Pixels(path=path, start=start, dtype=dtype, packed=packed)
    )


def _lines(file: BinaryIO) -> Iterator[str]:
    """Lines of the header, as far as the caller takes them; the file is left behind the last one taken."""
    while line := file.readline(MAX_HEADER_BYTES - file.tell() + 1):
        if file.tell() > MAX_HEADER_BYTES:
            raise ScanError(ReasonCode.TAG_INVALID, "the header does not end")
        yield line.decode("latin-1").rstrip("\r\n")


def _nrrd_fields(file: BinaryIO) -> dict[str, str]:
    """Fields by their lower-case name without spaces, up to the empty line; comments and key:=value pairs are left."""
    fields: dict[str, str] = {}
    lines = _lines(file)
    if not re.fullmatch(r"NRRD000[1-5]", next(lines, "")):
        raise ScanError(ReasonCode.TAG_INVALID, "no NRRD header")
    for line in lines:
        if not line:
            break
        name, colon, value = line.partition(":")
        if not line.startswith("#") and not value.startswith("="):
            _add(fields, name.lower().replace(" ", ""), colon, value)
    return fields


def _meta_fields(file: BinaryIO) -> dict[str, str]:
    """Fields up to ElementDataFile, which ends the header."""
    fields: dict[str, str] = {}
    for line in _lines(file):
        name, equals, value = line.partition("=")
        _add(fields, name.strip(), equals, value)
        if name.strip() == "ElementDataFile":
            return fields
    raise ScanError(ReasonCode.TAG_INVALID, "no MetaImage header")


def _add(fields: dict[str, str], name: str, separator: str, value: str) -> None:
    """A field told twice has no meaning: readers take the first, or the last."""
    if not separator or name in fields:
        raise ScanError(ReasonCode.TAG_INVALID, "a line of the header is no field, or repeats one")
    fields[name] = value.strip()


def _shape(fields: Fields, dimension: str, sizes: str) -> tuple[int, int, int]:
    counts = [_whole(size) for size in fields.get(sizes, "").split()]
    if _whole(fields.get(dimension, "")) != 3 or len(counts) != 3:
        raise ScanError(ReasonCode.NIFTI_NDIM, f"{len(counts)} axes")
    x, y, z = counts
    return z, y, x


def _whole(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,15}", text):
        raise ScanError(ReasonCode.TAG_INVALID, "a field that counts holds no whole number")
    return int(text)


def _dtype(code: str | None, orders: Mapping[str, bool], order: str | None) -> np.dtype[np.generic]:
    """The numpy type; `orders` maps the words for byte order to whether the most significant byte comes first."""
    if code is None:
        raise ScanError(ReasonCode.NIFTI_NDIM, "the voxels are no numbers of a known type")
    if code[1] == "1":
        return np.dtype(code)
    if order is None or order.lower() not in orders:
        raise ScanError(ReasonCode.TAG_INVALID, "the byte order is not told")
    return np.dtype((">" if orders[order.lower()] else "<") + code)


SWITCH = {"true": True, "false": False, "1": True, "0": False}


def _switch(fields: Fields, name: str, *, default: bool) -> bool:
    value = fields.get(name, str(default)).lower()
    if value not in SWITCH:
        raise ScanError(ReasonCode.TAG_INVALID, f"{name} is neither True nor False")
    return SWITCH[value]


def _beside(header: Path, name: str) -> Path:
    """The file with the pixels: a plain name in the header's own folder, and no link, pipe or device."""
    if name.upper() == "LIST" or "%" in name:
        raise ScanError(ReasonCode.TS_UNSUPPORTED, "the pixels lie in several files")
    parts = Path(name).parts
    if len(parts) != 1 or parts[0] == ".." or re.search(r"[\\\x00-\x1f]", name):
        raise ScanError(ReasonCode.UNSAFE_NAME, "the header names a data file outside of its folder")
    path = header.parent / parts[0]
    try:
        mode = path.lstat().st_mode
    except OSError:
        raise ScanError(ReasonCode.IO_ERROR, "the data file that the header names is not there") from None
    if not stat.S_ISREG(mode):
        raise ScanError(ReasonCode.UNSAFE_NAME, "the data file that the header names is no regular file")
    return path


def _skipped(
    path: Path, start: int, skip: str, shape: tuple[int, int, int], dtype: np.dtype[np.generic], *, packed: bool
) -> int:
    """Where the pixels start; -1 means that they are the end of the file."""
    count = _whole(skip)
    if count < -1 or (count and packed):
        raise ScanError(ReasonCode.TS_UNSUPPORTED, "bytes of a compressed stream are to be skipped")
    if count == -1:
        return max(start, path.stat().st_size - math.prod(shape) * dtype.itemsize)
    return start + count


def _nrrd_affine(fields: Fields) -> npt.NDArray[np.float64]:
    signs = TO_LPS.get(fields.get("space", "").lower())
    if signs is None:
        raise ScanError(ReasonCode.NIFTI_AFFINE, "the NRRD names no patient space: left and right are unknown")
    if set(fields.get("spaceunits", "").replace('"', " ").split()) - {"mm"}:
        raise ScanError(ReasonCode.NIFTI_AFFINE, "lengths are not in mm")
    if set(fields.get("kinds", "").lower().split()) - {"domain", "space", "???", "none"}:
        raise ScanError(ReasonCode.NIFTI_NDIM, "an axis is not one of space")
    vector = r"\(([^()]*)\)"
    axes = [_numbers(text.replace(",", " ")) for text in re.findall(vector, fields.get("spacedirections", ""))]
    origin = [_numbers(text.replace(",", " ")) for text in re.findall(vector, fields.get("spaceorigin", ""))]
    if [len(axis) for axis in axes] != [3, 3, 3] or [len(point) for point in origin] != [3]:
        raise ScanError(ReasonCode.NIFTI_AFFINE, "space directions or space origin are absent or incomplete")
    affine = np.eye(4)
    affine[:3] = np.array([*axes, *origin]).T * np.array(signs)[:, None]
    return affine


def _meta_affine(fields: Fields) -> npt.NDArray[np.float64]:
    matrix = _first(fields, "TransformMatrix", "Rotation", "Orientation")
    origin, spacing = _first(fields, "Offset", "Position", "Origin"), _first(fields, "ElementSpacing")
    if (len(matrix), len(origin), len(spacing)) != (9, 3, 3):
        detail = "TransformMatrix, Offset or ElementSpacing are absent or incomplete: left and right are unknown"
        raise ScanError(ReasonCode.NIFTI_AFFINE, detail)
    affine = np.eye(4)
    affine[:3, :3] = np.array(matrix).reshape(3, 3).T * np.array(spacing)  # the file has one axis after the other
    affine[:3, 3] = origin
    return affine


def _first(fields: Fields, *names: str) -> list[float]:
    """Numbers of the first of these fields that is there; they are older names of one another."""
    return next((_numbers(fields[name]) for name in names if name in fields), [])


def _numbers(text: str) -> list[float]:
    try:
        return [float(word.replace("_", "?")) for word in text.split()]  # 1_0 is 10 to Python alone
    except ValueError:
        raise ScanError(ReasonCode.NIFTI_AFFINE, "a direction, distance or position is no number") from None
