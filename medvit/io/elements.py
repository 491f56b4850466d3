"""The data elements of one DICOM file: where they are and their raw bytes, read leanly and with bounds.

Listing a hospital's export opens every file, and a header-only read through a general library costs ten times what
this walk costs; worse, such reads can be made to use gigabytes (a deflated header of 1 MB inflates to 2 GB). Here only
the elements named in `WANTED` are kept, sequences are skipped or walked no deeper than `MAX_DEPTH`, and no more than
`HEADER_LIMIT` bytes are ever looked at. Nothing is interpreted beyond PS3.5 chapter 7 (the data set) and PS3.10
chapter 7 (the file); tests hold the result against pydicom's.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from struct import Struct
from typing import Any

from medvit.io.tags import INTEGERS, WANTED
from medvit.records import ReasonCode, ScanError

MAX_DEPTH = 64
"""Sequences nested deeper than this are hostile."""

FIRST_READ = 1 << 14  # times 8 and again: ends at HEADER_LIMIT
"""Bytes that hold the header of an ordinary CT file."""

HEADER_LIMIT = FIRST_READ * 8**4
"""Bytes before the pixel data that are looked at, stored or inflated."""

IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
EXPLICIT_BIG = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
NATIVE = frozenset({IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG, DEFLATED})
"""Transfer syntaxes whose pixels are not compressed."""

Values = dict[str, Any]
"""Keyword -> raw bytes, or the items of a wanted sequence."""

_LONG = frozenset(vr.encode() for vr in "OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_SHORT = frozenset(vr.encode() for vr in "AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())
_BINARY = {b"US": "H", b"SS": "h", b"UL": "I", b"SL": "i", b"FL": "f", b"FD": "d", b"UV": "Q", b"SV": "q"}
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFE_E000, 0xFFFE_E00D, 0xFFFE_E0DD
_OVERLAY_BIT = 0x0102  # OverlayBitPosition: 0 where the overlay has data of its own
_PIXELS = {0x7FE0_0008: "FloatPixelData", 0x7FE0_0009: "DoubleFloatPixelData", 0x7FE0_0010: "PixelData"}


class _NeedMoreError(Exception):
    """The bytes at hand end within the header."""


class _DamagedError(Exception):
    """What cannot be a data set."""


@dataclass(slots=True)
class Elements:
    """The wanted elements of one file, raw.

    Attributes:
        values: keyword -> bytes, or items of a sequence; absent elements are absent.
        transfer_syntax: as the file says, or as found out where it does not.
        little: byte order of binary values.
        preamble: the 128 bytes before DICM; None where there are none.
        meta_class: SOP class of the file meta information.
        pixels: (keyword, offset, length) of the pixel data in the file, or in the inflated data set; length -1 where
            encapsulated; None where the header ends without any.
        overlays: whether overlay planes lie in unused bits of the pixels.
        size: of the file, bytes; `mtime_ns` its time of change.
        ends_early: the file ends before its header does.
    """

    values: Values = field(default_factory=dict)
    transfer_syntax: str = ""
    little: bool = True
    preamble: bytes | None = None
    meta_class: str = ""
    pixels: tuple[str, int, int] | None = None
    overlays: bool = False
    size: int = 0
    mtime_ns: int = 0
    ends_early: bool = False


def read_elements(path: str | Path, name: str, wanted: Mapping[int, Any] = WANTED) -> Elements:
    """The wanted elements of a file.

    Args:
        path: a regular file; links and pipes are refused.
        name: how errors call it.
        wanted: tag -> keyword, or keyword and what is wanted of its items.

    Raises:
        ScanError: `NOT_REGULAR`, `IO_ERROR`, `NOT_DICOM`, `TAG_INVALID`, `NESTING` or `RESOURCE_LIMIT`.
    """
    try:
        # no link is followed, and a pipe put in place of a file since it was listed does not block
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        try:
            return _read(descriptor, name, wanted)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ScanError(ReasonCode.IO_ERROR, os.strerror(error.errno or 5), (name,)) from None


def _read(descriptor: int, name: str, wanted: Mapping[int, Any]) -> Elements:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise ScanError(ReasonCode.NOT_REGULAR, "no regular file", (name,))
    data, wanted_bytes = os.read(descriptor, FIRST_READ), FIRST_READ
    while True:
        try:
            result = parse(data, complete=len(data) >= status.st_size, wanted=wanted)
        except _NeedMoreError:
            wanted_bytes *= 8
            more = os.read(descriptor, wanted_bytes - len(data))
            if not more:  # shorter than the file system said: it is being cut while it is read
                raise ScanError(ReasonCode.INCOMPLETE, "the file shrank while it was read", (name,)) from None
            data += more
            continue
        except _DamagedError as error:
            if data[128:132] != b"DICM":
                raise ScanError(ReasonCode.NOT_DICOM, "no DICOM header", (name,)) from None
            raise ScanError(ReasonCode.TAG_INVALID, f"header unreadable: {error}", (name,)) from None
        except ScanError as error:
            raise ScanError(error.code, error.detail, (name,)) from None
        result.size, result.mtime_ns = status.st_size, status.st_mtime_ns
        return result


def parse(data: bytes, *, complete: bool, wanted: Mapping[int, Any] = WANTED) -> Elements:
    """The wanted elements of the bytes at the beginning of a file.

    Args:
        data: first bytes.
        complete: whether there are no more: what ends early then ends the header.
        wanted: as `read_elements`.
    """
    result = Elements()
    start = 0
    if data[128:132] == b"DICM":
        result.preamble, start = data[:128], 132
    elif len(data) < 132 and not complete:
        raise _NeedMoreError
    start = _read_meta(data, start, result, complete=complete)
    if result.preamble is None and data[start : start + 2] not in (b"", b"\x08\0", b"\0\x08"):
        raise _DamagedError("no preamble, and no data element of group 0008 at the beginning")
    if result.transfer_syntax == DEFLATED:
        data, complete = _inflate(data[start:], complete=complete)
        start = 0
    explicit, result.little = _encoding(data, start, result)
    if wanted is WANTED:
        keyed = _LITTLE_WANTED if result.little else _BIG_WANTED
    else:
        keyed = _by_raw_key(wanted, little=result.little)
    walk = _Walk(data, keyed, explicit=explicit, little=result.little, ascending=result.preamble is None)
    try:
        walk.run(start, result.values)
    except _NeedMoreError:
        if len(data) >= HEADER_LIMIT:
            raise ScanError(ReasonCode.RESOURCE_LIMIT, f"header longer than {HEADER_LIMIT >> 20} MiB") from None
        if not complete:
            raise
        result.ends_early = True
    result.overlays = walk.overlays
    result.pixels = walk.pixels
    if walk.pixels is None and not result.ends_early and not complete:
        raise _NeedMoreError
    return result


def _read_meta(data: bytes, start: int, result: Elements, *, complete: bool) -> int:
    """Read the file meta information, always explicit little endian (PS3.10 7.1); returns where the data set begins."""
    position, end = start, len(data)
    while True:
        if position + 12 > end:
            if complete:
                return position
            raise _NeedMoreError
        if data[position : position + 2] != b"\x02\x00":
            return position
        vr = data[position + 4 : position + 6]
        if vr in _LONG:
            head, length = 12, int.from_bytes(data[position + 8 : position + 12], "little")
        elif vr in _SHORT:
            head, length = 8, int.from_bytes(data[position + 6 : position + 8], "little")
        else:
            raise _DamagedError("file meta information is not explicit little endian")
        element = int.from_bytes(data[position + 2 : position + 4], "little")
        value = data[position + head : position + head + length]
        position += head + length
        if element == 0x0010:
            result.transfer_syntax = _uid(value)
        elif element == 0x0002:
            result.meta_class = _uid(value)


@lru_cache(maxsize=256)
def _uid(value: bytes) -> str:
    return value.decode("ascii", "replace").strip(" \0")


def _encoding(data: bytes, start: int, result: Elements) -> tuple[bool, bool]:
    """(explicit, little endian) of the data set; where the file does not say, its first element tells."""
    syntax = result.transfer_syntax
    first = data[start : start + 6]
    looks_explicit = len(first) == 6 and (first[4:6] in _SHORT or first[4:6] in _LONG)
    if syntax == EXPLICIT_BIG:
        return True, False
    if syntax:
        # some writers state one encoding and use the other: an explicit VR in the first element is no accident
        return looks_explicit if len(first) == 6 and syntax in (IMPLICIT_LITTLE, EXPLICIT_LITTLE) else True, True
    little = not (len(first) >= 2 and first[0] == 0 and first[1] != 0)  # group 0008 stored high byte first
    result.transfer_syntax = (EXPLICIT_LITTLE if looks_explicit else IMPLICIT_LITTLE) if little else EXPLICIT_BIG
    return looks_explicit, little


def _inflate(data: bytes, *, complete: bool) -> tuple[bytes, bool]:
    """The first `HEADER_LIMIT` bytes of a deflated data set (PS3.5 A.5), and whether these are all."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(data, HEADER_LIMIT)
    except zlib.error:
        raise _DamagedError("the deflated data set is damaged") from None
    return inflated, inflater.eof or (complete and len(inflated) < HEADER_LIMIT)


def _by_raw_key(wanted: Mapping[int, Any], *, little: bool) -> dict[int, Any]:
    """WANTED keyed by what reading a tag's four bytes as one number gives."""
    result = {}
    for tag, what in wanted.items():
        key = (tag & 0xFFFF) << 16 | tag >> 16 if little else tag
        nested = isinstance(what, tuple)
        result[key] = (what[0], _by_raw_key(what[1], little=little)) if nested else (what, None)
    return result


_LITTLE_WANTED, _BIG_WANTED = _by_raw_key(WANTED, little=True), _by_raw_key(WANTED, little=False)
_LITTLE_EXPLICIT, _BIG_EXPLICIT = Struct("<I2sH"), Struct(">I2sH")
_LITTLE_PAIR, _BIG_PAIR = Struct("<II"), Struct(">II")


class _Walk:
    """One pass over a data set in memory. `next` is where the walk goes on: one position for all levels."""

    def __init__(self, data: bytes, wanted: dict[int, Any], *, explicit: bool, little: bool, ascending: bool) -> None:
        self.data, self.end, self.next = data, len(data), 0
        self.explicit, self.little, self.ascending = explicit, little, ascending
        self.wanted = wanted
        self.pair = (_LITTLE_PAIR if little else _BIG_PAIR).unpack_from
        self.pixels: tuple[str, int, int] | None = None
        self.overlays = False

    def run(self, start: int, into: Values) -> None:
        """Walk the data set up to its pixel data, or to its end."""
        last = -1
        for key, vr, position, length in self._elements(start, self.end):
            tag = self._tag(key)
            if tag in _PIXELS:
                self.pixels = _PIXELS[tag], position, -1 if length == _UNDEFINED else length
                return
            if 0x5FFF_FFFF < tag < 0x6020_0000 and tag & 0xFFFF == _OVERLAY_BIT:
                self.overlays = self.overlays or any(self.data[position : position + 2])
            if self.ascending and tag <= last:
                raise _DamagedError("tags do not ascend")
            last = tag
            if (found := self.wanted.get(key)) is not None or length == _UNDEFINED:
                self._take(found, vr, position, length, into, 0)
        if self.next != self.end:
            raise _NeedMoreError

    def _elements(self, start: int, end: int) -> Iterator[tuple[int, bytes, int, int]]:
        """(raw tag, VR or nothing, where the value begins, its length) of the elements of one level (PS3.5 7.1)."""
        data, pair, explicit = self.data, self.pair, self.explicit
        head = (_LITTLE_EXPLICIT if self.little else _BIG_EXPLICIT).unpack_from
        self.next = start
        while (position := self.next) + 8 <= end:
            if not explicit:
                key, length = pair(data, position)
                vr, position = b"", position + 8
            else:
                key, vr, length = head(data, position)
                if vr in _LONG:
                    if position + 12 > self.end:
                        raise _NeedMoreError
                    length, position = pair(data, position + 4)[1], position + 12
                elif vr in _SHORT or b"AA" <= vr <= b"ZZ":  # a VR of the future has two bytes of length, too
                    position += 8
                else:  # an implicit element among explicit ones, or a delimiter
                    key, length = pair(data, position)
                    vr, position = b"", position + 8
            self.next = position + length  # of undefined length: set when the end is found
            yield key, vr, position, length

    def _take(self, found: Any, vr: bytes, position: int, length: int, into: Values, depth: int) -> None:
        """Keep a wanted value, walk a wanted sequence, or find the end of any other."""
        keyword, nested = found or ("", {})
        if length == _UNDEFINED and nested is None:
            raise _DamagedError("a value of undefined length")
        after = position + length
        if length != _UNDEFINED and after > self.end:
            raise _NeedMoreError
        if nested is None:
            value = self.data[position:after]
            # the keyword's own form, whatever VR the writer chose
            into[keyword] = (
                _stored(keyword, vr, value, little=self.little) if vr in _BINARY or keyword in INTEGERS else value
            )
        else:
            explicit = self.explicit
            if vr == b"UN":  # implicit inside by PS3.5 6.2.2 note 2, but not all writers know
                inner = self.data[position + 12 : position + 14]
                self.explicit = explicit and (inner in _SHORT or inner in _LONG)
            items = self._items(position, -1 if length == _UNDEFINED else after, nested, depth + 1)
            self.explicit = explicit
            if found:
                into[keyword] = items
        if length != _UNDEFINED:
            self.next = after

    def _items(self, position: int, stop: int, wanted: Mapping[int, Any], depth: int) -> list[Values]:
        """The items of a sequence up to `stop`, or to its delimiter (PS3.5 7.5); `next` is then behind it."""
        if depth > MAX_DEPTH:
            raise ScanError(ReasonCode.NESTING, f"sequences nested more than {MAX_DEPTH} deep")
        items: list[Values] = []
        while stop < 0 or position < stop:
            if position + 8 > self.end:
                raise _NeedMoreError
            key, length = self.pair(self.data, position)
            tag = self._tag(key)
            position += 8
            if tag == _SEQUENCE_END:
                break
            if tag != _ITEM:
                raise _DamagedError("a sequence without items")
            item: Values = {}
            if length == _UNDEFINED or wanted:
                self._item(position, -1 if length == _UNDEFINED else position + length, wanted, item, depth)
            position = self.next if length == _UNDEFINED else position + length
            items.append(item)
        self.next = position
        return items

    def _item(self, position: int, stop: int, wanted: Mapping[int, Any], into: Values, depth: int) -> None:
        """One item, to `stop` or its delimiter."""
        if stop > self.end:
            raise _NeedMoreError
        for key, vr, value_at, length in self._elements(position, self.end if stop < 0 else stop):
            if self._tag(key) == _ITEM_END:
                return
            if (found := wanted.get(key)) is not None or length == _UNDEFINED:
                self._take(found, vr, value_at, length, into, depth)
        if stop < 0:
            raise _NeedMoreError

    def _tag(self, key: int) -> int:
        return (key & 0xFFFF) << 16 | key >> 16 if self.little else key


def _stored(keyword: str, vr: bytes, value: bytes, *, little: bool) -> bytes:
    """A value in the form its keyword has by PS3.6, whatever VR the writer chose: integers as bytes, else text."""
    order = "<" if little else ">"
    if keyword in INTEGERS:
        if vr in (b"", b"UN", b"US", b"SS", b"UL", b"SL", b"OW", b"OB"):
            return value
        try:  # a number written as text or float
            number = int(float(value.strip(b" \0"))) if vr not in _BINARY else int(_unpack(order, vr, value)[0])
            return number.to_bytes(4, "little" if little else "big", signed=number < 0)
        except (ValueError, OverflowError, IndexError):
            return b""
    return "\\".join(repr(number) for number in _unpack(order, vr, value)).encode()


def _unpack(order: str, vr: bytes, value: bytes) -> tuple[Any, ...]:
    layout = Struct(order + _BINARY[vr])
    return tuple(number for (number,) in layout.iter_unpack(value[: len(value) // layout.size * layout.size]))
