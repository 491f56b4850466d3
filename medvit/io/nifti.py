"""NIfTI, NRRD and MetaImage -> the same Scan as from DICOM.

`examine` reads a header and refuses what it contradicts, `fill` brings the voxels into a given array.
Values are taken as HU where they can be: these formats do not say. NIfTI's patient system is RAS, ours LPS: the first
two rows of its affine change sign.
"""

from __future__ import annotations

import zlib
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from medvit.io import nrrd
from medvit.io.plausible import check_plausible, tally
from medvit.io.voxels import Pixels, VolumeHeader, check_header, fill_values, open_stream
from medvit.records import ReasonCode, ScanError

NIFTI_SUFFIXES = (".nii", ".nii.gz")
NRRD_SUFFIXES = (".nrrd", ".nhdr")
META_SUFFIXES = (".mha", ".mhd")
_SUFFIXES = NIFTI_SUFFIXES + NRRD_SUFFIXES + META_SUFFIXES
APPLE_DOUBLE = "._"
"""How a file is called in which a Mac keeps the attributes of its neighbour: those of x in ._x."""

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
AFFINE_TOLERANCE_MM = 0.1
"""Largest distance between the corners that qform and sform give."""

NIFTI_1_BYTES, NIFTI_2_BYTES = 348, 540


def is_volume_file(name: str) -> bool:
    """Whether the name says NIfTI, NRRD or MetaImage."""
    return name.lower().endswith(_SUFFIXES) and not PurePosixPath(name).name.startswith(APPLE_DOUBLE)


def examine(path: Path) -> VolumeHeader:
    """What the header of a volume file tells, without its pixels.

    Raises:
        ScanError: `NIFTI_NDIM`, `NIFTI_AFFINE`, `NIFTI_SHEAR`, `RESCALE_INVALID`, `TAG_INVALID` (no such header),
            `TS_UNSUPPORTED` (encoding), `UNSAFE_NAME` (a data file elsewhere), `RESOURCE_LIMIT`, `PIXEL_TRUNCATED`,
            `GZIP_CORRUPT`, `NOT_REGULAR` or `IO_ERROR`.
    """
    try:
        if not path.is_file():
            code = ReasonCode.NOT_REGULAR if path.exists() else ReasonCode.IO_ERROR
            raise ScanError(code, "no such file" if code is ReasonCode.IO_ERROR else "no regular file")
        with np.errstate(all="ignore"):  # a damaged header may hold any number
            header = _parse(path)
            check_header(header)
    except ScanError as error:
        raise ScanError(error.code, error.detail, (str(path),)) from None
    except OSError as error:
        raise ScanError(ReasonCode.IO_ERROR, f"reading failed ({type(error).__name__})", (str(path),)) from None
    return header


def fill(path: Path, out: npt.NDArray[np.float32]) -> tuple[ReasonCode, ...]:
    """Read the voxels of a volume file into `out`; after an error it holds anything.

    Args:
        path: the file, as `examine` takes it.
        out: float32 (Z, Y, X), C-contiguous, of the shape that `examine` told; may be shared memory. Receives HU.

    Returns:
        Flags, those of the header included.

    Raises:
        ScanError: as `examine`, and `NIFTI_NONFINITE`, `HU_IMPLAUSIBLE`, or `INCOMPLETE` where the shape has changed.
    """
    if out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"out must be a C-contiguous float32 array, got {out.dtype}")
    header = examine(path)
    try:
        if header.shape != out.shape:
            raise ScanError(ReasonCode.INCOMPLETE, f"shape {header.shape} where it was {out.shape}")
        low, high = fill_values(header.pixels, out)
        check_plausible([tally(plane, low, high) for plane in out])
    except ScanError as error:
        raise ScanError(error.code, error.detail, (str(path),)) from None
    return header.codes


def _parse(path: Path) -> VolumeHeader:
    name = path.name.lower()
    if name.endswith(NRRD_SUFFIXES):
        return nrrd.read_nrrd(path)
    if name.endswith(META_SUFFIXES):
        return nrrd.read_metaimage(path)
    return _read_nifti(path, packed=name.endswith(".gz"))


def _read_nifti(path: Path, *, packed: bool) -> VolumeHeader:
    header = _nifti_header(path, packed=packed)
    slope, intercept, codes = _scaling(float(header["scl_slope"]), float(header["scl_inter"]))
    offset = float(header["vox_offset"])
    if not (offset == 0 or (header.single_vox_offset <= offset < 2**31 and offset.is_integer())):
        raise ScanError(ReasonCode.TAG_INVALID, "vox_offset points nowhere in the file")
    before = int(offset) or header.single_vox_offset
    return VolumeHeader(
        shape=_shape(header),
        affine=RAS_TO_LPS @ _agreed_affine(header),
        pixels=Pixels(
            path=path,
            start=0 if packed else before,
            skip=before if packed else 0,
            packed=packed,
            dtype=_dtype(header),
            slope=slope,
            intercept=intercept,
        ),
        codes=codes,
    )


def _nifti_header(path: Path, *, packed: bool) -> Any:
    """The header record of nibabel, as the file has it: nothing repaired, byte order by the length it states first."""
    # a third of a second that listing a folder without NIfTI does not need
    from nibabel import Nifti1Header, Nifti2Header  # noqa: PLC0415

    try:
        with open_stream(path, packed=packed) as stream:
            raw = stream.read(NIFTI_2_BYTES)
    except (EOFError, zlib.error) as error:
        detail = f"compressed stream is damaged ({type(error).__name__})"
        raise ScanError(ReasonCode.GZIP_CORRUPT, detail) from None
    kinds = {
        NIFTI_1_BYTES.to_bytes(4, "little"): (Nifti1Header, "<"),
        NIFTI_1_BYTES.to_bytes(4, "big"): (Nifti1Header, ">"),
        NIFTI_2_BYTES.to_bytes(4, "little"): (Nifti2Header, "<"),
        NIFTI_2_BYTES.to_bytes(4, "big"): (Nifti2Header, ">"),
    }
    if len(raw) < NIFTI_1_BYTES:
        raise ScanError(ReasonCode.PIXEL_TRUNCATED, f"{len(raw)} bytes are no NIfTI header")
    kind, order = kinds.get(raw[:4], (None, ""))
    if kind is None:
        raise ScanError(ReasonCode.TAG_INVALID, "no NIfTI header")
    if len(raw) < kind.sizeof_hdr:
        raise ScanError(ReasonCode.PIXEL_TRUNCATED, f"{len(raw)} bytes are no NIfTI-2 header")
    header: Any = kind(raw[: kind.sizeof_hdr], endianness=order, check=False)  # type: ignore[no-untyped-call]
    if header["magic"].item() != kind.single_magic:
        raise ScanError(ReasonCode.TAG_INVALID, "the header is not that of a single-file NIfTI")
    return header


def _shape(header: Any) -> tuple[int, int, int]:
    """Axes behind the third may be there, with one entry each."""
    count, *sizes = (int(size) for size in header["dim"])
    if not 3 <= count <= 7 or any(size != 1 for size in sizes[3:count]):
        raise ScanError(ReasonCode.NIFTI_NDIM, f"{count} axes of {sizes[: max(0, count)]} voxels")
    x, y, z = sizes[:3]
    return z, y, x


def _dtype(header: Any) -> np.dtype[np.generic]:
    """Integers and floats; not colours, complex numbers, long doubles."""
    try:
        dtype: np.dtype[np.generic] = header.get_data_dtype()
    except Exception:  # noqa: BLE001  an unknown number raises HeaderDataError, KeyError and more
        raise ScanError(ReasonCode.TAG_INVALID, "unknown datatype") from None
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise ScanError(ReasonCode.NIFTI_NDIM, f"voxels of {dtype}")
    return dtype


def _scaling(slope: float, intercept: float) -> tuple[float, float, tuple[ReasonCode, ...]]:
    """0 and NaN mean unscaled, says the standard; nobody writes them into a CT on purpose, so they are flagged."""
    if slope == 0 or np.isnan(slope):
        return 1.0, 0.0, (ReasonCode.NIFTI_SCALE,)
    if slope < 0 or not np.isfinite((slope, intercept)).all():
        raise ScanError(ReasonCode.RESCALE_INVALID, f"scl_slope {slope:g}, scl_inter {intercept:g}")
    return slope, intercept, ()


def _agreed_affine(header: Any) -> npt.NDArray[np.float64]:
    """The one RAS affine that sform and qform tell, where set; readers differ when they disagree or are both unset."""
    qcode, scode = int(header["qform_code"]), int(header["sform_code"])
    if not qcode and not scode:
        raise ScanError(ReasonCode.NIFTI_AFFINE, "neither qform nor sform is set")
    if int(header["xyzt_units"]) & 7 not in (0, 2):
        raise ScanError(ReasonCode.NIFTI_AFFINE, "lengths are not in mm")
    sform = np.asarray(header.get_sform(), dtype=np.float64)
    if not qcode:
        return sform
    qform = _qform(header)
    if not scode:
        return qform
    x, y, z = (int(size) for size in header["dim"][1:4])
    corners = np.array([[i, j, k, 1] for i in (0, x) for j in (0, y) for k in (0, z)])
    apart = float(np.abs(corners @ (qform - sform).T).max())
    if not apart <= AFFINE_TOLERANCE_MM:  # NaN is none either
        raise ScanError(ReasonCode.NIFTI_AFFINE, f"qform and sform are up to {apart:.1f} mm apart")
    return sform


def _qform(header: Any) -> npt.NDArray[np.float64]:
    if header["pixdim"][0] == 0:
        header["pixdim"][0] = 1  # so the standard, of files that leave it out
    try:
        return np.asarray(header.get_qform(), dtype=np.float64)
    except Exception:  # noqa: BLE001  ValueError and nibabel's own HeaderDataError
        detail = "the qform is no rotation with positive voxel sizes"
        raise ScanError(ReasonCode.NIFTI_AFFINE, detail) from None
