"""Arrays on disk: whole or not there, checked before they are believed, mapped into memory, made once.

An entry is a .npy file that numpy reads as it is, followed by the SHA-256 of its name and of all bytes before: an entry
that was damaged, cut short or put under another's name is not served. Readers map it, so that all processes of a
machine share one copy in memory.

The temporary file of an entry is also the claim to make it. Its maker holds a lock on it, so that others wait and then
find the entry; the kernel drops the lock of a maker that dies, so what it left is known for litter.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from medvit.io.disk import FULL, sync_folder
from medvit.records import UsageError

Array = npt.NDArray[Any]
Shape = tuple[int | None, ...]
"""Expected shape; None is any length."""

CHECKSUM_BYTES = hashlib.sha256().digest_size
BLOCK = 1 << 20
ELSEWHERE = "free space, or put the cache elsewhere (data.cache_dir=FOLDER or MEDVIT_CACHE)"

_log = logging.getLogger("medvit.cache")


class _Verified(NamedTuple):
    """As what file an entry passed its check, and what its header says."""

    as_what: tuple[int, ...]
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class CacheFullError(UsageError):
    """No room for an entry."""


class ArrayStore:
    """Named arrays in one folder; any number of processes may use it at once. Pickles without its arrays.

    Attributes:
        folder: where the entries are; made when needed.
        rebuilt: damaged entries that this process has made again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.rebuilt = folder, 0
        self.verified: dict[str, _Verified] = {}
        self.damaged: set[str] = set()

    def get(self, name: str, dtype: npt.DTypeLike, shape: Shape, make: Callable[[], Array]) -> Array:
        """An entry, memory-mapped; made first where there is none or a damaged one.

        Args:
            name: file name, the same for the same content.
            dtype: what the entry must be.
            shape: what it must have.
            make: computes the array; called in one process at a time, and its errors pass through.

        Raises:
            UsageError: the folder cannot be written; `CacheFullError` where it has no room.
        """
        if (found := self.find(name, dtype, shape)) is not None:
            return found
        with self._claim(name) as claim:
            if (found := self.find(name, dtype, shape)) is not None:  # another process was first
                return found
            array = make()
            self._write(claim, name, array)
        found = self.find(name, dtype, shape)
        return array if found is None else found

    def find(self, name: str, dtype: npt.DTypeLike, shape: Shape) -> Array | None:
        """An entry, memory-mapped; None where there is none, or a damaged one, which is told once."""
        try:
            with (self.folder / name).open("rb") as stream:
                found = self._checked(name, stream, np.dtype(dtype), shape)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            if name not in self.damaged:
                why = error.strerror if isinstance(error, OSError) else error
                _log.warning("cache entry %s is damaged (%s); it is made again", name[:12], why)
                self.damaged.add(name)
            return None
        self.damaged.discard(name)
        return found

    def put(self, name: str, array: Array) -> None:
        """Keep an array, in place of what may be there.

        Raises:
            UsageError: as `get`.
        """
        with self._claim(name) as claim:
            self._write(claim, name, array)

    def sweep(self) -> None:
        """Remove what processes that died while writing have left."""
        for part in self.folder.glob("*.part"):
            with contextlib.suppress(OSError), part.open("rb+") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by its writer as long as that lives
                if _is_at(stream, part):
                    part.unlink()

    def _checked(self, name: str, stream: IO[bytes], dtype: np.dtype[Any], shape: Shape) -> Array:
        """The array in a file; ValueError says what is wrong with it."""
        status = os.fstat(stream.fileno())
        as_what = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        known = self.verified.get(name)
        if known is None or known.as_what != as_what:
            _verify(name, stream, status.st_size)
            np.lib.format.read_magic(stream)
            length, _, kind = np.lib.format.read_array_header_1_0(stream)
            known = self.verified[name] = _Verified(as_what, stream.tell(), kind, length)
        if known.dtype != dtype or not _fits(known.shape, shape):
            raise ValueError(f"{known.dtype} {known.shape} instead of {dtype} {shape}")
        return np.memmap(stream, dtype, "r", known.offset, known.shape)

    @contextlib.contextmanager
    def _claim(self, name: str) -> Iterator[FileIO]:
        """The temporary file of an entry, locked, and removed at the end unless it became the entry."""
        part = self.folder / f"{name}.part"
        with self._explained(BLOCK):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                stream = _lock(part)
            except OSError:  # no locks here, or left by another user: made in each process, under a name of its own
                part = part.with_name(f"{name}.{uuid.uuid4().hex}.part")
                stream = _open(part)
        with stream:
            try:
                yield stream
            finally:
                if _is_at(stream, part):
                    part.unlink()

    def _write(self, claim: FileIO, name: str, array: Array) -> None:
        """Fill the claimed file, and give it the entry's name once it is on the disk."""
        array = np.ascontiguousarray(array)
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
        digest = hashlib.sha256(name.encode())
        with self._explained(array.nbytes + BLOCK):
            claim.truncate(0)  # what a dead maker left
            for block in (header.getbuffer(), array.data.cast("B")):
                digest.update(block)
                _write_all(claim, block)
            _write_all(claim, memoryview(digest.digest()))
            os.fsync(claim.fileno())
            Path(claim.name).replace(self.folder / name)
            sync_folder(self.folder)
        self.rebuilt += name in self.damaged
        self.damaged.discard(name)

    @contextlib.contextmanager
    def _explained(self, needed: int) -> Iterator[None]:
        """Turn what the system says of a failed write into what a person can act on."""
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise UsageError(f"the cache cannot be written ({error.strerror}): {ELSEWHERE}.") from None
            there = next(place for place in (self.folder, *self.folder.absolute().parents) if place.is_dir())
            need, free = needed / 1e6, shutil.disk_usage(there).free / 1e6
            raise CacheFullError(
                f"the cache is full: the next entry needs {need:.1f} MB, its disk has {free:.1f} MB free: {ELSEWHERE}."
            ) from None


def _verify(name: str, stream: IO[bytes], size: int) -> None:
    digest, left = hashlib.sha256(name.encode()), size - CHECKSUM_BYTES
    while left > 0 and (block := stream.read(min(left, BLOCK))):
        digest.update(block)
        left -= len(block)
    if stream.read() != digest.digest():
        raise ValueError("its checksum does not fit")
    stream.seek(0)


def _fits(have: tuple[int, ...], want: Shape) -> bool:
    return len(have) == len(want) and all(w in (None, h) for w, h in zip(want, have, strict=True))


def _open(path: Path) -> FileIO:
    """Unbuffered, so that a failed write is not tried again on closing; its mode follows the umask."""
    return path.open("ab", buffering=0)


def _lock(path: Path) -> FileIO:
    """The open file of this name, held by nobody else; made where there is none."""
    while True:
        stream = _open(path)
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:
            path.unlink(missing_ok=True)
            stream.close()
            raise
        if _is_at(stream, path):
            return stream
        stream.close()  # whoever held it has finished with this file


def _write_all(stream: FileIO, block: memoryview) -> None:
    while block:
        block = block[stream.write(block) :]


def _is_at(stream: IO[bytes] | FileIO, path: Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False
