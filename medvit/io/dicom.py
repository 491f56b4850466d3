"""One DICOM series -> HU volume, geometry, identity.

Each slice is decoded, padding is masked on stored values, and the slice is rescaled by its own slope and intercept in
float64 (PS3.3 C.11.1.1.2): real series change them from slice to slice. Display tags (MONOCHROME1, window, presentation
LUT) never touch HU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom import dcmread
from pydicom.dataset import FileDataset
from pydicom.pixels.utils import pixel_array
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from medvit.io import geometry, headers
from medvit.records import AIR_HU, REASONS, Outcome, ReasonCode, Scan, ScanError

HU_RANGE_LIMIT = 20_000.0
"""Wider than this is no CT: metal in extended-scale CT stays below."""


ASSUMED_AIR_HU = (-1100.0, -500.0)
"""Where the lowest value must lie for --assume-hu to hold."""


def examine(
    slices: Sequence[headers.SliceHeader], *, assume_hu: bool = False
) -> tuple[geometry.Stack, tuple[ReasonCode, ...]]:
    """Check that slices form one volume, from their headers alone. The same check when a folder is listed and read.

    Returns:
        The stack order and affine, and the codes that flag it.

    Raises:
        ScanError: the first fault that forbids using the series.
    """
    faults = [
        (code, detail, header.path)
        for header in slices
        for code, detail in headers.slice_faults(header, assume_hu=assume_hu)
    ]
    for code, detail, _ in faults:
        if REASONS[code].outcome is not Outcome.FLAG:
            raise ScanError(code, detail, tuple(path for other, _, path in faults if other is code))
    _check_agreement(slices)
    first = slices[0]
    stack = geometry.stack_slices(
        np.array([header.position for header in slices]),
        np.array(first.orientation),
        np.array(first.spacing_mm),
        first.thickness_mm,
    )
    codes = [code for code, _, _ in faults]
    if assume_hu and not all(header.rescale_tags for header in slices):
        codes.append(ReasonCode.RESCALE_MISSING)
    return stack, tuple(dict.fromkeys(codes))


def _check_agreement(slices: Sequence[headers.SliceHeader]) -> None:
    """One patient, one grid, one direction, one frame of reference, one acquisition where positions repeat."""
    if len({header.patient for header in slices}) > 1:
        raise ScanError(ReasonCode.PATIENT_CONFLICT, "patient id, birth date or sex differ between slices")
    grids = {(header.rows, header.columns, header.spacing_mm) for header in slices}
    if len(grids) > 1:
        raise ScanError(ReasonCode.MATRIX_MISMATCH, f"{len(grids)} different matrices or pixel spacings")
    directions = np.array([header.orientation for header in slices])
    if np.abs(directions - directions[0]).max() > geometry.ORTHONORMAL_TOLERANCE:
        raise ScanError(ReasonCode.ORIENTATION_INVALID, "slices of one series point in different directions")
    if len({header.frame_of_reference for header in slices}) > 1:
        raise ScanError(ReasonCode.ORIENTATION_INVALID, "slices of one series have different frames of reference")
    positions = {header.position for header in slices}
    if len(positions) < len(slices) and len({header.acquisition for header in slices}) > 1:
        raise ScanError(ReasonCode.MULTIPHASE, f"{len(slices)} slices at {len(positions)} positions")


def read_series(paths: Iterable[Path], *, assume_hu: bool = False) -> Scan:
    """Read the slices of one series, in any order, into one volume.

    Raises:
        ScanError: with the code of the first fault, and the files concerned.
    """
    opened = {str(path): _open(path) for path in paths}
    slices = [header for _, header in opened.values()]
    stack, codes = examine(slices, assume_hu=assume_hu)
    ordered = [slices[index] for index in stack.order]
    hu = np.empty((len(ordered), ordered[0].rows, ordered[0].columns), np.float32)
    padded = 0
    for plane, header in zip(hu, ordered, strict=True):
        padded += _fill_slice(plane, opened.pop(header.path)[0], header)
    _check_plausible(hu)
    if ReasonCode.RESCALE_MISSING in codes:
        _check_assumed(hu)
    if padded:
        codes = (*codes, ReasonCode.PADDING_APPLIED)
    return Scan(
        hu=hu,
        affine=stack.affine,
        header=replace(ordered[0].scan, sop_uids=tuple(header.sop_uid for header in ordered)),
        codes=codes,
        padding_fraction=padded / hu.size,
        files=tuple(header.path for header in ordered),
    )


def _open(path: Path) -> tuple[FileDataset, headers.SliceHeader]:
    name = str(path)
    header = headers.parse(path, name)  # every fault of the header is found and coded here
    if (fault := headers.file_fault(header)) is not None:
        raise ScanError(*fault, (name,))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = dcmread(path, force=not header.preamble)
            if "TransferSyntaxUID" not in dataset.file_meta:  # no preamble: pydicom found out by looking
                implicit, little = dataset.original_encoding
                native = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
                dataset.file_meta.TransferSyntaxUID = native if little else ExplicitVRBigEndian
    except Exception as error:  # noqa: BLE001  damage behind the header raises any type
        raise ScanError(
            ReasonCode.PIXEL_TRUNCATED, f"unreadable behind its header ({type(error).__name__})", (name,)
        ) from None
    if "PixelData" not in dataset:  # pydicom returns an empty dataset where compressed pixels end too early
        raise ScanError(ReasonCode.PIXEL_TRUNCATED, "no pixel data, or cut short", (name,))
    return dataset, header


def _fill_slice(plane: npt.NDArray[np.float32], dataset: FileDataset, header: headers.SliceHeader) -> int:
    """Write the HU of one slice into `plane` (H, W); returns the number of padding pixels."""
    stored = stored_values(_decode(dataset, header), dataset, header.path)
    if stored.shape != plane.shape:
        raise ScanError(
            ReasonCode.PIXEL_TRUNCATED, f"decoded {stored.shape}, header says {plane.shape}", (header.path,)
        )
    padding = padding_mask(stored, dataset)
    slope = 1.0 if header.slope is None else header.slope
    intercept = 0.0 if header.intercept is None else header.intercept
    plane[:] = stored * np.float64(slope) + intercept
    if padding is None:
        return 0
    plane[padding] = AIR_HU
    return int(padding.sum())


def _decode(dataset: FileDataset, header: headers.SliceHeader) -> npt.NDArray[np.int32]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check_length(dataset, header)
            # the unused bits are judged in `stored_values`: pydicom would wipe what contradicts the header
            return np.asarray(pixel_array(dataset, raw=True, correct_unused_bits=False)).astype(np.int32)
    except (KeyboardInterrupt, SystemExit, MemoryError, ScanError):
        raise
    except BaseException as error:  # noqa: BLE001  codecs raise any type; Rust panics are no Exception (HAZARDS 0.2)
        detail = f"pixel data cannot be decoded ({type(error).__name__})"
        raise ScanError(ReasonCode.PIXEL_TRUNCATED, detail, (header.path,)) from None


def _check_length(dataset: FileDataset, header: headers.SliceHeader) -> None:
    """Native pixel data longer than its matrix belongs to another matrix; one byte evens its length (PS3.5 8.1.1)."""
    if dataset.file_meta.TransferSyntaxUID.is_compressed:
        return
    surplus = len(dataset.PixelData) - header.rows * header.columns * header.bits // 8
    if surplus > 1:
        raise ScanError(ReasonCode.PIXEL_TRUNCATED, f"{surplus} bytes more than the header says", (header.path,))


def stored_values(raw: npt.NDArray[np.int32], dataset: FileDataset, name: str = "") -> npt.NDArray[np.int32]:
    """Stored values of the container's pixels (PS3.5 8.1.1): BitsStored bits up to HighBit, sign-extended if signed.

    Raises:
        ScanError: `PIXELREP_CONFLICT`: bits outside BitsStored are set that no overlay explains.
    """
    stored_bits, signed = int(dataset.BitsStored), bool(dataset.PixelRepresentation)
    high_bit = dataset.get("HighBit")  # may be there and empty
    shift = 0 if high_bit is None else int(high_bit) + 1 - stored_bits
    if not (stored_bits > 0 and 0 <= shift <= int(dataset.BitsAllocated) - stored_bits):
        raise ScanError(
            ReasonCode.PIXELREP_CONFLICT, f"BitsStored {stored_bits}, HighBit {stored_bits + shift - 1}", (name,)
        )
    if stored_bits == int(dataset.BitsAllocated):
        return raw
    values = (raw >> shift) & ((1 << stored_bits) - 1)
    if signed:
        sign = 1 << (stored_bits - 1)
        values = (values ^ sign) - sign
    has_overlay = any(tag.group >= 0x6000 and tag.group <= 0x601E for tag in dataset.keys())  # noqa: SIM118
    container = (raw >> shift) & ((1 << (int(dataset.BitsAllocated) - shift)) - 1)
    plain = values & ((1 << stored_bits) - 1)  # high bits zero, or sign-extended over the container
    extended = values & ((1 << (int(dataset.BitsAllocated) - shift)) - 1)
    if not has_overlay and not ((container == plain) | (container == extended)).all():
        raise ScanError(ReasonCode.PIXELREP_CONFLICT, f"values need more than the {stored_bits} bits stored", (name,))
    return values


def padding_mask(stored: npt.NDArray[np.int32], dataset: FileDataset) -> npt.NDArray[np.bool_] | None:
    """Which stored values are padding (PS3.3 C.7.5.1.1.2); None without a padding value."""
    low = _padding_value(dataset, "PixelPaddingValue")
    if low is None:
        return None
    high = _padding_value(dataset, "PixelPaddingRangeLimit")
    low, high = sorted((low, low if high is None else high))
    return np.asarray((stored >= low) & (stored <= high))


def _padding_value(dataset: FileDataset, keyword: str) -> int | None:
    """US or SS: many files write the one and mean the other, so PixelRepresentation decides."""
    value = dataset.get(keyword)
    if value is None or not isinstance(value, int | float):
        return None
    bits = int(dataset.BitsStored)
    wrapped = int(value) & ((1 << bits) - 1)
    return wrapped - (1 << bits) if dataset.PixelRepresentation and wrapped >> (bits - 1) else wrapped


def _check_assumed(hu: npt.NDArray[np.float32]) -> None:
    """Unrescaled values pass for HU only where they show air: a lowest value near -1000."""
    low_min, low_max = ASSUMED_AIR_HU
    if not low_min <= float(hu.min()) <= low_max:
        detail = f"assumed to be HU, but the lowest value is {hu.min():g}, not {low_min:g} to {low_max:g}"
        raise ScanError(ReasonCode.RESCALE_MISSING, detail)


def _check_plausible(hu: npt.NDArray[np.float32]) -> None:
    low, high = float(hu.min()), float(hu.max())
    if not np.isfinite((low, high)).all() or low == high or high - low > HU_RANGE_LIMIT:
        raise ScanError(ReasonCode.HU_IMPLAUSIBLE, f"values from {low:g} to {high:g} HU")
