"""Files that a run leaves: the old or the new content at every instant, and a full disk told in words.

A kill, a crash or a full disk while writing costs what was to be written, never what was there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path

from medvit.records import UsageError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskFullError(UsageError):
    """No room for a file."""


def write_whole(path: Path, content: bytes, keep_as: Path | None = None) -> None:
    """Give a file new content: a temporary file beside it, flushed to the disk, takes its name.

    Args:
        path: the file; its folder exists.
        content: all of it.
        keep_as: what the file that was there is called from now on; None: it is gone.

    Raises:
        DiskFullError: no room; what was there is as it was.
    """
    with _explained(path, len(content)), _renewed(path, keep_as) as stream:
        _write_all(stream, content)


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """`write_whole` of what need not be in memory at once.

    Raises:
        DiskFullError: no room; what was there is as it was.
    """
    with _explained(path, None), _renewed(path, None) as stream:
        for piece in pieces:
            _write_all(stream, piece)


@contextlib.contextmanager
def _renewed(path: Path, keep_as: Path | None) -> Iterator[FileIO]:
    """What is to be the file's new content, and becomes it at the end."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb", buffering=0) as stream:  # unbuffered: nothing is left to be written on closing
            yield stream
            os.fsync(stream.fileno())
        if keep_as is not None and path.exists():
            path.replace(keep_as)
        part.replace(path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def append(path: Path, content: bytes) -> None:
    """Add to the end of a file, made when needed.

    Raises:
        DiskFullError: no room; some of the content may be there.
    """
    with _explained(path, len(content)), path.open("ab", buffering=0) as stream:
        _write_all(stream, content)


@contextlib.contextmanager
def _explained(path: Path, needed: int | None) -> Iterator[None]:
    """Turn what the system says of a failed write into what a person can act on.

    Args:
        path: what is written.
        needed: its size, bytes; None: nobody knows.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DiskFullError(
            f"the disk is full: {path.name} needs {'more' if needed is None else _megabytes(needed)} and its disk has "
            f"{_megabytes(_free(path.parent))} free, or a quota or a limit on file sizes is reached. What was there "
            "before is whole: make room and run the command again (medvit-train with --resume)."
        ) from None


def require_room(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin what will not fit.

    Args:
        folder: on the disk in question.
        needed: bytes.
        what: needs them, in the plural.

    Raises:
        DiskFullError: less is free.
    """
    if (free := _free(folder)) < needed:
        raise DiskFullError(
            f"{folder}: {what} need {_megabytes(needed)} and its disk has {_megabytes(free)} free. Free space "
            "or give another --output."
        )


def _write_all(stream: FileIO, content: bytes) -> None:
    rest = memoryview(content)  # a write takes what there is room for, and only the next one fails
    while rest:
        rest = rest[stream.write(rest) :]


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def sync_folder(folder: Path) -> None:
    """Put new names on the disk; where folders cannot be flushed, a power cut may cost the newest file."""
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)
