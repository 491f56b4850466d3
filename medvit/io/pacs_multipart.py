"""A multipart/related answer (RFC 2046 5.1, PS3.18 8.6.1.2) -> the bytes of its parts, as they arrive.

dicomweb-client holds a whole part, parses it, and takes what is left when the line breaks for the last one. Here a part
passes through in chunks, and an answer without its closing delimiter is broken off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from medvit.io.pacs_retry import TransientError

HEADERS_LIMIT_BYTES = 1 << 16
"""Of what stands between parts."""


def boundary_of(content_type: str) -> bytes | None:
    """The delimiter's text; None: not multipart/related, or none stated."""
    kind, *parameters = content_type.split(";")
    if kind.strip().lower() != "multipart/related":
        return None
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "boundary" and (text := value.strip().strip('"')):
            return text.encode("latin-1", "replace")
    return None


def parts(chunks: Iterable[bytes], boundary: bytes) -> Iterator[Iterator[bytes]]:
    """Each part as an iterator over its chunks, to be used up before the next.

    Raises:
        TransientError: the answer ends in the middle.
    """
    reader = _Reader(chunks)
    reader.skip_past(b"--" + boundary)
    while reader.head(2) != b"--":
        reader.skip_past(b"\r\n\r\n")
        yield reader.until(b"\r\n--" + boundary)


class _Reader:
    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks, self._buffer = iter(chunks), bytearray()

    def _fill(self) -> None:
        more = next(self._chunks, None)
        if more is None:
            raise TransientError("the answer was broken off")
        self._buffer += more

    def head(self, length: int) -> bytes:
        """What comes next; it stays."""
        while len(self._buffer) < length:
            self._fill()
        return bytes(self._buffer[:length])

    def skip_past(self, mark: bytes) -> None:
        """Drop everything up to a mark, and the mark."""
        while (at := self._buffer.find(mark)) < 0:
            if len(self._buffer) > HEADERS_LIMIT_BYTES:
                raise TransientError("the answer is no multipart message")
            self._fill()
        del self._buffer[: at + len(mark)]

    def until(self, mark: bytes) -> Iterator[bytes]:
        """What comes before a mark; the mark is dropped."""
        overlap = len(mark) - 1  # the mark may lie across two chunks
        while (at := self._buffer.find(mark)) < 0:
            if len(self._buffer) > overlap:
                yield bytes(self._buffer[:-overlap])
                del self._buffer[:-overlap]
            self._fill()
        yield bytes(self._buffer[:at])
        del self._buffer[: at + len(mark)]
