"""What is in the files of a case, as one hash: the same wherever the files lie and whatever they are called.

Reading every file anew in each run would cost as much as the cache saves. So the hash is kept in the cache under the
files' stamps: a keyed hash of path, size, modification time, inode and change time of each. Modification times can be
set back (copying tools do), the change time cannot; a file put in another's place has another inode.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medvit.data.pseudonym import site_key
from medvit.data.store import ArrayStore
from medvit.records import Case, ReasonCode, ScanError

FRESH_NS = 2_000_000_000
"""A file that changed this recently may change again within one tick of the file system's clock: no hash is kept."""

HEADER_BYTES = 1 << 16
DETACHED = re.compile(rb"^\s*(?:ElementDataFile|data ?file)\s*[:=]\s*(.+?)\s*$", re.IGNORECASE | re.MULTILINE)
"""Where MetaImage and NRRD name the file that holds their pixels."""


def content(case: Case, store: ArrayStore) -> str:
    """SHA-256 of the content of a case's files, in hexadecimal; their order does not matter.

    Raises:
        ScanError: a file is missing or unreadable (`IO_ERROR`), or changes while it is read (`INCOMPLETE`).
        UsageError: the store cannot be written.
    """
    try:
        paths = _paths(case)
        stamp = _stamp(paths)
        if stamp.fresh:
            return _hash(paths, stamp).hex()
        name = f"{stamp.name}.source.npy"
        return store.get(name, np.uint8, (32,), lambda: np.frombuffer(_hash(paths, stamp), np.uint8)).tobytes().hex()
    except OSError as error:
        concerned = (os.path.relpath(error.filename, case.root),) if error.filename else ()
        raise ScanError(ReasonCode.IO_ERROR, os.strerror(error.errno or 5), concerned) from None


class _Stamp(NamedTuple):
    """What the file system says of some files; a path may hold a name, so it is told under the site's key only."""

    name: str
    fresh: bool


def _stamp(paths: Sequence[Path]) -> _Stamp:
    keyed, newest = hmac.new(site_key(), digestmod=hashlib.sha256), 0
    for path in paths:
        status = path.stat()
        newest = max(newest, status.st_ctime_ns)
        times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
        keyed.update(f"{status.st_size} {times} {status.st_ino} ".encode() + os.fsencode(path) + b"\0")
    return _Stamp(keyed.hexdigest(), newest > time.time_ns() - FRESH_NS)


def _hash(paths: Sequence[Path], stamp: _Stamp) -> bytes:
    digests = []
    for path in paths:
        with path.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").digest())
    if _stamp(paths).name != stamp.name:
        raise ScanError(ReasonCode.INCOMPLETE, "a file changed while it was read")
    return hashlib.sha256(b"".join(sorted(digests))).digest()


def _paths(case: Case) -> list[Path]:
    """Absolute paths of the files, and of the pixels that lie in files of their own."""
    listed = [Path(case.root).absolute() / name for name in case.files]
    return listed + [pixels for path in listed for pixels in _detached(path)]


def _detached(path: Path) -> list[Path]:
    if path.suffix.lower() not in (".mhd", ".mha", ".nhdr", ".nrrd"):
        return []
    with path.open("rb") as stream:
        found = DETACHED.search(stream.read(HEADER_BYTES))
    named = os.fsdecode(found[1]) if found else "LOCAL"
    if named.startswith("LIST") or "%" in named:  # many files by a pattern: whatever lies beside
        return sorted(other for other in path.parent.iterdir() if other != path and other.is_file())
    pixels = path.parent / named
    return [pixels] if pixels.is_file() else []
