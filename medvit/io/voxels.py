"""The voxels of a volume file: where its header says they lie, whether the file can hold them, their way into an array.

One path for NIfTI, NRRD and MetaImage: stored values, x fastest, raw or as a gzip or zlib stream, of either byte order,
with one slope and intercept. They are streamed in small blocks into the array of whoever asks, to the end of the file,
for only there is the checksum. Nothing is read or inflated beyond what the header claims.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from medvit.io.geometry import SPACING_LIMITS_MM
from medvit.records import ReasonCode, ScanError

MAX_VOXELS = 2**31
"""What a header may claim: ten times the largest CT there is."""

MAX_INFLATION = 1040
"""No deflate stream grows by more: 258 bytes from two bits, and a little for its frame."""

SHEAR_TOLERANCE = 1e-3
"""Largest cosine between two axes that counts as a right angle."""

BLOCK = 1 << 20
"""Voxels, or bytes of a compressed stream, that are taken at a time."""

ANY_FRAME = 32 + zlib.MAX_WBITS
"""For zlib: a gzip or zlib stream, as its first bytes say."""


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Where the stored values lie, and how they become HU: stored × slope + intercept.

    Attributes:
        path: the file that holds them: the header's own, or one beside it.
        start: bytes of the file before them, or before the compressed stream.
        skip: bytes of the decompressed stream before them.
        packed: whether it is a gzip or zlib stream.
        dtype: as stored, with byte order.
    """

    path: Path
    start: int
    dtype: np.dtype[np.generic]
    skip: int = 0
    packed: bool = False
    slope: float = 1.0
    intercept: float = 0.0


@dataclass(frozen=True, kw_only=True)
class VolumeHeader:
    """What the header of a volume file tells; no pixel has been looked at.

    Attributes:
        shape: (Z, Y, X).
        affine: float64 (4, 4), voxel (x, y, z, 1) -> patient LPS, mm.
        codes: flags.
        pixels: where the values lie; `pixels.path` is another file than the header's where they are detached.
    """

    shape: tuple[int, int, int]
    affine: npt.NDArray[np.float64]
    pixels: Pixels
    codes: tuple[ReasonCode, ...] = ()


def check_header(header: VolumeHeader) -> None:
    """Refuse what cannot be a CT volume, or cannot lie in its file.

    Raises:
        ScanError: `RESOURCE_LIMIT`, `PIXEL_TRUNCATED`, `NIFTI_NDIM`, `NIFTI_AFFINE`, `NIFTI_SHEAR` or `IO_ERROR`.
    """
    if min(header.shape) < 1:
        raise ScanError(ReasonCode.NIFTI_NDIM, f"an axis has {min(header.shape)} voxels")
    if math.prod(header.shape) > MAX_VOXELS:
        raise ScanError(ReasonCode.RESOURCE_LIMIT, f"the header claims {math.prod(header.shape):.2g} voxels")
    _check_axes(header.affine)
    _check_length(header)


def _check_axes(affine: npt.NDArray[np.float64]) -> None:
    if not np.isfinite(affine).all():
        raise ScanError(ReasonCode.NIFTI_AFFINE, "the affine is not finite")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    low, high = SPACING_LIMITS_MM
    if spacing.min() < low or spacing.max() > high:
        raise ScanError(ReasonCode.NIFTI_AFFINE, f"voxel edges from {spacing.min():.3g} to {spacing.max():.3g} mm")
    axes = affine[:3, :3] / spacing
    shear = float(np.abs(axes.T @ axes - np.eye(3)).max())
    if shear > SHEAR_TOLERANCE:
        raise ScanError(ReasonCode.NIFTI_SHEAR, f"axes are {shear:.3f} from orthogonal")


def _check_length(header: VolumeHeader) -> None:
    """To the byte where the file is raw: a longer one was written for another matrix."""
    pixels = header.pixels
    try:
        held = pixels.path.stat().st_size - pixels.start
    except OSError:
        raise ScanError(ReasonCode.IO_ERROR, "the file with the pixels cannot be opened") from None
    needed = pixels.skip + math.prod(header.shape) * pixels.dtype.itemsize
    if held < needed if not pixels.packed else held * MAX_INFLATION < needed:
        raise ScanError(ReasonCode.PIXEL_TRUNCATED, f"{held} bytes cannot hold the {needed} that the header claims")
    if held > needed and not pixels.packed:
        raise ScanError(ReasonCode.PIXEL_TRUNCATED, f"{held - needed} bytes more than the header claims")


def fill_values(pixels: Pixels, out: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Read all stored values, scaled, into `out` (C-contiguous).

    Returns:
        The lowest and highest value.

    Raises:
        ScanError: `GZIP_CORRUPT`, `PIXEL_TRUNCATED`, `NIFTI_NONFINITE` or `IO_ERROR`.
    """
    flat, done, nonfinite, low, high = out.reshape(-1), 0, 0, math.inf, -math.inf
    for stored in _blocks(pixels, flat.size):
        with np.errstate(over="ignore", invalid="ignore"):  # told below
            values = stored.astype(np.float64) * pixels.slope + pixels.intercept
            flat[done : done + values.size] = values
        finite = np.isfinite(values)
        nonfinite += values.size - int(finite.sum())
        low = min(low, float(values.min(initial=math.inf, where=finite)))
        high = max(high, float(values.max(initial=-math.inf, where=finite)))
        done += values.size
    if nonfinite:
        raise ScanError(ReasonCode.NIFTI_NONFINITE, f"{nonfinite} voxels are NaN or infinite")
    return low, high


def _blocks(pixels: Pixels, count: int) -> Iterator[npt.NDArray[np.generic]]:
    """The `count` stored values in blocks; then the stream must end, and its checksum hold."""
    size = pixels.dtype.itemsize
    try:
        with open_stream(pixels.path, pixels.start, packed=pixels.packed) as stream:
            for skipped in range(0, pixels.skip, BLOCK):
                stream.read(min(BLOCK, pixels.skip - skipped))
            for first in range(0, count, BLOCK):
                wanted = min(BLOCK, count - first)
                block = stream.read(wanted * size)
                if len(block) < wanted * size:
                    raise ScanError(ReasonCode.PIXEL_TRUNCATED, "the file ends before the last voxel")
                yield np.frombuffer(block, pixels.dtype)
            if stream.read(1):
                raise ScanError(ReasonCode.PIXEL_TRUNCATED, "the file holds more than the header claims")
    except (EOFError, zlib.error) as error:
        raise ScanError(ReasonCode.GZIP_CORRUPT, f"compressed stream is damaged ({type(error).__name__})") from None
    except OSError as error:
        raise ScanError(ReasonCode.IO_ERROR, f"reading failed ({type(error).__name__})") from None


def open_stream(path: Path, start: int = 0, *, packed: bool = False) -> BinaryIO:
    """The bytes of a file from `start`, decompressed if packed.

    Reading raises EOFError or zlib.error where the compressed stream is cut or damaged.
    """
    raw = path.open("rb")
    raw.seek(start)
    return io.BufferedReader(_Inflater(raw), BLOCK) if packed else raw


class _Inflater(io.RawIOBase):
    """A gzip or zlib stream of one or more members, never inflated further than it is read; checksums are verified."""

    def __init__(self, packed: BinaryIO) -> None:
        self._packed, self._waiting, self._member = packed, b"", zlib.decompressobj(ANY_FRAME)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._packed.close()
        super().close()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed names a private protocol
        while True:
            packed = self._waiting or self._packed.read(BLOCK)
            if self._member.eof:
                if not packed:
                    return 0
                self._member = zlib.decompressobj(ANY_FRAME)
            plain = self._member.decompress(packed, len(buffer))
            self._waiting = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            if plain:
                buffer[: len(plain)] = plain
                return len(plain)
            if not packed and not self._member.eof:
                raise EOFError
