"""What a compressed frame says about itself: the marker segments of JPEG, JPEG-LS and JPEG 2000 streams.

Decoders believe the stream and pydicom believes the header; where the two differ, pixels come out scrambled, spread or
off by a power of two without an error.
"""

from __future__ import annotations

from typing import NamedTuple

_SIZ = b"\xff\x4f\xff\x51"  # SOC, SIZ: ISO/IEC 15444-1 A.5.1
_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # SOF0..15 without DHT, JPG, DAC; SOF55: ISO/IEC 14495-1


class Stream(NamedTuple):
    """Rows, columns, bits per sample, and whether samples are signed (None: the stream does not say)."""

    rows: int
    columns: int
    precision: int
    signed: bool | None


def describe(frame: bytes) -> Stream | None:
    """The size and depth of one frame; None where it is no JPEG of any kind, or its rows are told only at its end."""
    start = frame.find(_SIZ, 0, 512)
    if start >= 0 and len(frame) >= start + 43:
        extent = [int.from_bytes(frame[at : at + 4], "big") for at in range(start + 8, start + 24, 4)]
        depth = frame[start + 42]
        return Stream(extent[1] - extent[3], extent[0] - extent[2], (depth & 0x7F) + 1, bool(depth & 0x80))
    if frame[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        marker, length = frame[at + 1], int.from_bytes(frame[at + 2 : at + 4], "big")
        if marker in _FRAMES:
            rows, columns = (int.from_bytes(frame[at + k : at + k + 2], "big") for k in (5, 7))
            return Stream(rows, columns, frame[at + 4], None) if rows else None
        at += 1 if marker == 0xFF else 2 + length  # fill bytes may stand before a marker
    return None
