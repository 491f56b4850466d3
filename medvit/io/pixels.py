"""Bytes of slices -> Hounsfield units, into memory that is given. Runs in the decoding workers.

Everything a slice needs was found in its header and is passed along, so that a worker opens the file once, at the right
place, and checks that it is still the file that was looked at. Padding is masked on stored values, and each slice is
rescaled by its own slope and intercept (PS3.3 C.11.1.1.2): real series change them from slice to slice. Display tags
(MONOCHROME1, window, presentation LUT) never touch HU.
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from medvit.io import codestream
from medvit.io.elements import DEFLATED, EXPLICIT_BIG, NATIVE
from medvit.io.plausible import Tally, tally
from medvit.records import AIR_HU, ReasonCode, ScanError

JPEG_LS = {"1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"}

TISSUE_HU = (-500.0, 3071.0)
"""Padding that has the value of tissue cannot be told from the patient."""


class Layout(NamedTuple):
    """How pixels lie in a file; slices of a series share one, as a rule."""

    transfer_syntax: str
    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    padding: tuple[int, int] | None
    overlays: bool
    photometric: str
    frames: int


class Frame(NamedTuple):
    """One slice to decode, and the plane of the volume it goes to."""

    path: str
    frame: int
    plane: int
    stamp: tuple[int, int]
    offset: int
    length: int
    slope: float
    intercept: float
    layout: int


def fill_planes(volume: npt.NDArray[np.float32], layouts: Sequence[Layout], frames: Sequence[Frame]) -> list[Tally]:
    """Decode slices into their planes of a volume (Z, H, W).

    Raises:
        ScanError: the first slice that cannot be decoded; `files` names it.
    """
    return [fill_plane(volume[frame.plane], layouts[frame.layout], frame) for frame in frames]


def fill_plane(plane: npt.NDArray[np.float32], layout: Layout, frame: Frame) -> Tally:
    """Decode one slice into `plane` (H, W) as HU."""
    try:
        stored = _stored(layout, frame)
    except (KeyboardInterrupt, SystemExit):
        raise
    except ScanError as error:
        raise ScanError(error.code, error.detail, (frame.path,)) from None
    except MemoryError:
        raise ScanError(ReasonCode.RESOURCE_LIMIT, "decoding needs too much memory", (frame.path,)) from None
    except BaseException as error:  # noqa: BLE001  codecs raise any type; Rust panics are no Exception
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not a codec's
            raise ScanError(ReasonCode.IO_ERROR, os.strerror(error.errno), (frame.path,)) from None
        detail = f"pixel data cannot be decoded ({type(error).__name__})"
        raise ScanError(ReasonCode.PIXEL_TRUNCATED, detail, (frame.path,)) from None
    return _rescale(plane, stored, layout, frame)


def _stored(layout: Layout, frame: Frame) -> npt.NDArray[Any]:
    """(H, W) stored values."""
    descriptor = os.open(frame.path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != frame.stamp:
            raise ScanError(ReasonCode.INCOMPLETE, "the file changed since it was listed")
        if layout.transfer_syntax not in NATIVE:
            os.lseek(descriptor, frame.offset, os.SEEK_SET)
            raw = _decoded(os.read(descriptor, status.st_size - frame.offset), layout, frame.frame)
        else:
            raw = _native(descriptor, status.st_size, layout, frame)
    finally:
        os.close(descriptor)
    return stored_values(raw, layout)


def _native(descriptor: int, size: int, layout: Layout, frame: Frame) -> npt.NDArray[Any]:
    itemsize = layout.bits_allocated // 8
    count = layout.rows * layout.columns
    start = frame.offset + frame.frame * count * itemsize
    if layout.transfer_syntax == DEFLATED:
        data: Any = _inflated(descriptor, size, start, count * itemsize)
    else:
        data = np.empty(count * itemsize, np.uint8)
        os.lseek(descriptor, start, os.SEEK_SET)
        with os.fdopen(os.dup(descriptor), "rb", buffering=0) as stream:
            if stream.readinto(data) != data.size:
                raise ScanError(ReasonCode.PIXEL_TRUNCATED, "the file ends before its pixel data")
            _check_single(os.pread(descriptor, 4, frame.offset + frame.length))
    order = ">" if layout.transfer_syntax == EXPLICIT_BIG else "<"
    values = np.frombuffer(data, np.dtype(f"{order}{'i' if layout.signed else 'u'}{itemsize}"))
    if itemsize == 1 and order == ">":  # OW of 8-bit pixels: bytes swapped in pairs (PS3.5 8.1.1)
        values = values[: count // 2 * 2].reshape(-1, 2)[:, ::-1].ravel()
    return values.reshape(layout.rows, layout.columns)


def _inflated(descriptor: int, size: int, start: int, length: int) -> bytes:
    """`length` bytes from `start` of a deflated data set, without inflating what lies behind."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    data = os.read(descriptor, size)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    result = inflater.decompress(data[_data_set_start(data) :], start + length)
    if len(result) < start + length:
        raise ScanError(ReasonCode.PIXEL_TRUNCATED, "the deflated data set ends before its pixel data")
    return result[start:]


def _data_set_start(data: bytes) -> int:
    """Where the data set begins: behind the file meta information, whose length (0002,0000) states."""
    if data[132:140] != b"\x02\0\0\0UL\x04\0":
        raise ScanError(ReasonCode.TAG_INVALID, "no length of the file meta information")
    return 144 + int.from_bytes(data[140:144], "little")


def _fragments(data: bytes) -> list[bytes]:
    """The items of encapsulated pixel data up to their delimiter (PS3.5 A.4), the offset table first.

    Raises:
        ScanError: `PIXEL_TRUNCATED`: an item that lost bytes would swallow what follows it.
    """
    at, items = 0, []
    while data[at : at + 4] == b"\xfe\xff\x00\xe0":
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        items.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    if data[at : at + 8] != b"\xfe\xff\xdd\xe0\0\0\0\0" or len(items) < 2:
        raise ScanError(ReasonCode.PIXEL_TRUNCATED, "the fragments do not end where they say")
    _check_single(data[at + 8 : at + 12])
    return items


def _check_offsets(items: Sequence[bytes]) -> None:
    """Refuse an offset table (PS3.5 A.4) that does not lead from frame to frame, in their order."""
    table = np.frombuffer(items[0][: len(items[0]) // 4 * 4], "<u4")
    starts = np.cumsum([0, *(8 + len(item) for item in items[1:-1])])
    if len(table) and (
        table[0] != 0 or (np.diff(table.astype(np.int64)) <= 0).any() or not np.isin(table, starts).all()
    ):
        raise ScanError(ReasonCode.PIXEL_TRUNCATED, "the offset table does not lead to the frames")


def _check_single(tag: bytes) -> None:
    if tag in (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10"):
        raise ScanError(ReasonCode.TAG_INVALID, "pixel data twice in one file")


def _decoded(data: bytes, layout: Layout, frame: int) -> npt.NDArray[Any]:
    """(H, W) container values of one encapsulated frame."""
    items = _fragments(data)
    if layout.frames == 1:
        coded = b"".join(items[1:])
    else:
        _check_offsets(items)
        from pydicom.encaps import get_frame  # noqa: PLC0415  native pixels do without

        coded = get_frame(data, frame, number_of_frames=layout.frames)
    _check_stream(codestream.describe(coded), layout)
    if layout.transfer_syntax in JPEG_LS and layout.bits_allocated <= 16:
        return _from_jpeg_ls(coded, layout)
    return _from_pydicom(data, layout, frame)


def _from_jpeg_ls(coded: bytes, layout: Layout) -> npt.NDArray[Any]:
    """By CharLS itself: through pydicom, gdcm would come first and take twice as long."""
    import jpeg_ls  # noqa: PLC0415

    decoded, about = jpeg_ls.decode_pixel_data(coded)
    dtype = np.dtype(f"<{'i' if layout.signed else 'u'}{1 if about['bits_per_sample'] <= 8 else 2}")
    if len(decoded) != layout.rows * layout.columns * dtype.itemsize:
        raise ScanError(ReasonCode.PIXEL_TRUNCATED, f"{len(decoded)} bytes decoded, header says otherwise")
    return np.frombuffer(decoded, dtype).reshape(layout.rows, layout.columns)


def _from_pydicom(data: bytes, layout: Layout, frame: int) -> npt.NDArray[Any]:
    from pydicom.pixels.decoders.base import get_decoder  # noqa: PLC0415

    options: dict[str, Any] = {
        "index": frame,
        "rows": layout.rows,
        "columns": layout.columns,
        "number_of_frames": layout.frames,
        "samples_per_pixel": 1,
        "bits_allocated": layout.bits_allocated,
        "bits_stored": layout.bits_stored,
        "pixel_representation": int(layout.signed),
        "photometric_interpretation": layout.photometric,
        "pixel_keyword": "PixelData",
        # the unused bits are judged in `stored_values`: pydicom would wipe what contradicts the header
        "correct_unused_bits": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values, _ = get_decoder(layout.transfer_syntax).as_array(data, raw=True, **options)
    if values.shape != (layout.rows, layout.columns):
        raise ScanError(ReasonCode.PIXEL_TRUNCATED, f"decoded {values.shape}, header says otherwise")
    return values


def _check_stream(stream: codestream.Stream | None, layout: Layout) -> None:
    """Refuse a frame that contradicts the header."""
    if stream is None:
        return
    if (stream.rows, stream.columns) != (layout.rows, layout.columns):
        detail = f"a frame of {stream.rows} x {stream.columns} where the header says {layout.rows} x {layout.columns}"
        raise ScanError(ReasonCode.PIXEL_TRUNCATED, detail)
    # fewer bits are well, unless nothing says where the sign is
    unsigned = stream.signed is None or stream.signed != layout.signed
    # as deep as the container is common, and the values tell; in between, one of the two is wrong
    between = layout.bits_stored < stream.precision < layout.bits_allocated
    if between or (layout.signed and unsigned and stream.precision < layout.bits_stored):
        detail = f"a frame of {stream.precision} bits where the header says {layout.bits_stored}"
        raise ScanError(ReasonCode.PIXELREP_CONFLICT, detail)


def stored_values(raw: npt.NDArray[Any], layout: Layout) -> npt.NDArray[Any]:
    """Stored values of the container's pixels (PS3.5 8.1.1): BitsStored bits up to HighBit, sign-extended if signed.

    Args:
        raw: (H, W) of the container's integer type, signed as the layout says.
        layout: BitsAllocated, BitsStored, HighBit and PixelRepresentation.

    Raises:
        ScanError: `PIXELREP_CONFLICT`: bits outside BitsStored are set that no overlay explains.
    """
    bits = layout.bits_stored
    shift = layout.high_bit + 1 - bits
    if bits == layout.bits_allocated:
        return raw
    least, most = (-(1 << (bits - 1)), 1 << (bits - 1)) if layout.signed else (0, 1 << bits)
    if shift == 0 and least <= int(raw.min()) and int(raw.max()) < most:
        return raw  # the ordinary case: nothing in the unused bits but the sign
    return _unpacked(raw.astype(np.int64), layout, shift)


def _unpacked(raw: npt.NDArray[np.int64], layout: Layout, shift: int) -> npt.NDArray[np.int64]:
    bits, spare = layout.bits_stored, layout.bits_allocated - shift
    values = (raw >> shift) & ((1 << bits) - 1)
    if layout.signed:
        sign = 1 << (bits - 1)
        values = (values ^ sign) - sign
    container = (raw >> shift) & ((1 << spare) - 1)
    plain = values & ((1 << bits) - 1)  # high bits zero, or sign-extended over the container
    extended = values & ((1 << spare) - 1)
    if not layout.overlays and not ((container == plain) | (container == extended)).all():
        raise ScanError(ReasonCode.PIXELREP_CONFLICT, f"values need more than the {bits} bits stored")
    return values


def _rescale(plane: npt.NDArray[np.float32], stored: npt.NDArray[Any], layout: Layout, frame: Frame) -> Tally:
    slope, intercept = frame.slope, frame.intercept
    least, most = int(stored.min()), int(stored.max())
    if slope == 1 and intercept == int(intercept) and abs(least) + abs(most) + abs(intercept) < 2**24:
        np.add(stored, np.float32(intercept), out=plane, casting="unsafe", dtype=np.float32)  # whole numbers: exact
    else:
        plane[:] = stored * np.float64(slope) + intercept
    padded = 0
    if layout.padding is not None and layout.padding[0] <= most and layout.padding[1] >= least:
        padding = (stored >= layout.padding[0]) & (stored <= layout.padding[1])
        least_hu, most_hu = (end * slope + intercept for end in layout.padding)
        if least_hu < TISSUE_HU[1] and most_hu > TISSUE_HU[0] and padding.any():
            detail = f"padding of {layout.padding[0]} to {layout.padding[1]} lies within tissue"
            raise ScanError(ReasonCode.PIXELREP_CONFLICT, detail, (frame.path,))
        plane[padding] = AIR_HU
        padded = int(padding.sum())
    low, high = (least * slope + intercept, most * slope + intercept) if not padded else _range(plane)
    return tally(plane, low, high, padded)


def _range(plane: npt.NDArray[np.float32]) -> tuple[float, float]:
    return float(plane.min()), float(plane.max())
