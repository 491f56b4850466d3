"""Where images from a PACS land: in `NAME.part`, which becomes NAME when all is there.

Nothing that the network says is part of a path: files are named by the hash of their bytes (a UID can be `../../x`:
CVE-2026-56445). They are kept as they came. Each is written beside its name, flushed to the disk and renamed; the
folder itself is renamed last. Whatever stops a fetch, the folder NAME is there and whole, or not there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from medvit.io.pacs_retry import PacsError
from medvit.records import UsageError

BUSY = "another process is fetching the same study into the same folder: wait for it, or give each its own folder"


class Inbox:
    """The folder of one fetch, as a context; it is ours alone while the context lasts.

    Args:
        folder: what it will be called; must not exist.
        limit_bytes: of all files together, against a PACS that never stops.
        check: called with each chunk; raises to break off.

    Raises:
        UsageError: `folder` exists.
        PacsError: another process writes there.
    """

    def __init__(self, folder: Path, limit_bytes: int, check: Callable[[], None]) -> None:
        if folder.exists():
            raise UsageError(
                "the folder to fetch into exists: a study is fetched once. Remove the folder to repeat it."
            )
        self.folder, self.part = folder, folder.with_name(folder.name + ".part")
        self.check, self._limit_bytes = check, limit_bytes
        self._current, self._sizes = self.part, dict[str, int]()
        self._series = dict[int, dict[str, int]]()

    def __enter__(self) -> Self:
        self.part.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.part)
        for item in self.part.iterdir():  # left by a fetch that was broken off
            shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.folder.exists():
            os.close(self._lock)
            return
        shutil.rmtree(self.part, ignore_errors=True)
        os.close(self._lock)

    def begin(self, number: int) -> None:
        """What is saved from now on is series `number`; what an earlier try of it left goes."""
        self._current = self.part / f"{number}"
        self._sizes = self._series[number] = {}
        if self._current.exists():
            shutil.rmtree(self._current)
        self._current.mkdir()

    def save(self, chunks: Iterable[bytes | memoryview]) -> None:
        """Write one image; kept as it is.

        Raises:
            PacsError: it is larger than what is left of the limit.
        """
        digest, size = hashlib.sha256(), 0
        incoming = self._current / "incoming"
        room = self._limit_bytes - sum(sum(sizes.values()) for sizes in self._series.values())
        with incoming.open("wb") as stream:
            for chunk in chunks:
                self.check()
                size += stream.write(chunk)
                digest.update(chunk)
                if size > room:
                    raise PacsError(f"the study is larger than {self._limit_bytes:,} bytes; nothing of it was kept.")
            stream.flush()
            os.fsync(stream.fileno())
        name = f"{digest.hexdigest()}.dcm"
        incoming.replace(self._current / name)
        self._sizes[name] = size

    @property
    def count(self) -> int:
        """Images of the series that differ."""
        return len(self._sizes)

    def finish(self) -> int:
        """Give the folder its name; the number of images."""
        for number in self._series:
            _flush(self.part / f"{number}")
        _flush(self.part)
        self.part.rename(self.folder)
        _flush(self.folder.parent)
        return sum(map(len, self._series.values()))


def _flush(folder: Path) -> None:
    """The names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int:
    """The descriptor of a folder that nobody else has locked; the lock ends with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # the one who had it may have renamed it meanwhile: then this is a finished study
        still_there = os.path.samestat(os.fstat(descriptor), folder.lstat())
    except OSError:
        os.close(descriptor)
        raise PacsError(BUSY) from None
    if not still_there:
        os.close(descriptor)
        raise PacsError(BUSY)
    return descriptor
