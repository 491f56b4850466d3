"""What is known of a folder's files from the last time: a small SQLite file, so that only new files are opened.

Rows hold what headers say, identity included: the index is PHI like the pixel cache that it lives beside (under the run
or MEDVIT_CACHE), and is readable by its owner alone. A file counts as unchanged when its name, size, time of change
and inode time are; anything else, a damaged index included, is read anew.
"""

from __future__ import annotations

import hashlib
import logging
import marshal
import os
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from medvit.io.headers import HeaderReader, SharedHeader, SharedKey, SliceHeader, digest_of
from medvit.records import ReasonCode, ScanError

FORMAT = 5
"""Raised when rows change meaning: an older index is thrown away."""

_TABLES = """
CREATE TABLE IF NOT EXISTS shared (digest BLOB PRIMARY KEY, content TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS folders (folder TEXT, chunk INTEGER, digest BLOB, content BLOB, PRIMARY KEY (folder, chunk));
"""
CHUNK = 1000
"""Slices that are kept, and unpacked, together."""

RACY_NS = 2_000_000_000
"""A file that changed this shortly before the scan may change again within the same tick of the clock of its stamp."""

_DAMAGED = (sqlite3.DatabaseError, UnicodeError)
"""What a damaged file ends in: the name of a table, or the words of an error, may be no text."""

_PASSING = {ReasonCode.IO_ERROR, ReasonCode.INCOMPLETE}
_log = logging.getLogger("medvit.index")

Stamp = tuple[int, int, int]
"""Size, time of change of the content, and of the inode: what changes when a file does."""

Known = tuple[str, Stamp, list[SliceHeader] | ScanError]
"""Name of a file, how it was then, and what it said."""


class Index:
    """Headers of one folder's files, kept between runs.

    Slices lie packed by `marshal`, which keeps what they share once, under a checksum: a row each would take ten times
    as long to read as the file system takes to say that nothing has changed.

    Args:
        path: the SQLite file; made when needed.
        root: the folder that it describes.
        reader: where shared headers are kept once.
    """

    def __init__(self, path: Path, root: Path, reader: HeaderReader) -> None:
        self.path, self.root, self.reader = path, ascii(root.absolute()), reader  # need not be text
        self._new: list[tuple[bytes, str]] = []
        reader.tell = lambda digest, content: self._new.append((digest, content))
        self._begun = time.time_ns()
        try:
            self._open()
        except (OSError, sqlite3.OperationalError) as error:  # read-only, full, or in use: listed without
            _log.warning("the index of headers is not used this time (%s)", type(error).__name__)
            self.path = Path(":memory:")
            self._open()
        except _DAMAGED:  # damaged, or no index: it holds nothing that the files do not
            path.unlink()
            self._open()
        self._unvisited = self._folders()

    def _open(self) -> None:
        if str(self.path) != ":memory:":
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        self._database = sqlite3.connect(self.path)
        kept = f"{FORMAT} {sys.version_info[:2]} {self.root}"
        self._database.execute("CREATE TABLE IF NOT EXISTS about (what TEXT)")
        if self._database.execute("SELECT what FROM about").fetchall() != [(kept,)]:
            self._database.executescript("DROP TABLE IF EXISTS shared; DROP TABLE IF EXISTS folders;")
            with self._database:
                self._database.execute("DELETE FROM about")
                self._database.execute("INSERT INTO about VALUES (?)", (kept,))
        self._database.executescript(_TABLES)

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        for folder in self._unvisited:  # gone with all that was in it
            self.keep(folder, [])
        self._database.close()

    def _folders(self) -> set[str]:
        """Those of which something is known."""
        with suppress(*_DAMAGED):
            return {folder for (folder,) in self._database.execute("SELECT DISTINCT folder FROM folders")}
        return set()

    def known(self, folder: str) -> Iterator[Known]:
        """Files of one folder that were there last time, in the order of their names; up to what is damaged."""
        self._unvisited.discard(folder)
        try:
            yield from self._files(folder)
        except (sqlite3.OperationalError, UnicodeError):  # another process writes; a name that is no text
            return
        except sqlite3.DatabaseError:
            _log.warning("a damaged part of the index of headers is not used")

    def _files(self, folder: str) -> Iterator[Known]:
        prefix, shared = f"{folder}/" if folder else "", self.reader.known
        name, stamp, found = "", (0, 0, 0), list[SliceHeader]()
        for row in self._rows(folder):
            frame = row[2]
            if frame == 0:  # the first frame, and of most files the only one
                if found:
                    yield name, stamp, found
                name, stamp, found = row[0], row[1], []
            if frame < 0:  # a file that is no slice, and why
                yield row[0], row[1], ScanError(ReasonCode(row[3]), row[4], (prefix + row[0],))
                continue
            header = shared.get(row[4]) or self._load(row[4])
            found.append(SliceHeader._make((prefix + name, *row[3], header)))
        if found:
            yield name, stamp, found

    def _rows(self, folder: str) -> Iterator[tuple[Any, ...]]:
        wanted = "SELECT digest, content FROM folders WHERE folder = ? ORDER BY chunk"
        for digest, content in self._database.execute(wanted, (folder,)).fetchall():
            # only what was written is unpacked
            if not isinstance(content, bytes) or hashlib.sha256(content).digest() != digest:
                raise sqlite3.DatabaseError("slices")
            yield from marshal.loads(content)

    def keep(self, folder: str, files: Iterable[Known]) -> None:
        """Remember the files of a folder, sorted by name, instead of what was known of it.

        Not those that changed just now, for a further change could leave their stamp as it is; nor those that could not
        be read, which may be well the next time.
        """
        rows = [row for name, stamp, found in files for row in self._packed(name, stamp, found)]
        chunks = []
        for number, start in enumerate(range(0, len(rows), CHUNK)):
            content = marshal.dumps(rows[start : start + CHUNK])
            chunks.append((folder, number, hashlib.sha256(content).digest(), content))
        try:
            with self._database:
                self._database.execute("DELETE FROM folders WHERE folder = ?", (folder,))
                self._database.executemany("INSERT OR REPLACE INTO shared VALUES (?, ?)", self._new)
                self._database.executemany("INSERT OR REPLACE INTO folders VALUES (?, ?, ?, ?)", chunks)
            self._new.clear()
        except _DAMAGED as error:  # in use, damaged, full; a name that is no text
            _log.warning("what was read is not kept in the index of headers (%s)", type(error).__name__)

    def _packed(self, name: str, stamp: Stamp, found: list[SliceHeader] | ScanError) -> list[tuple[Any, ...]]:
        if stamp[2] > self._begun - RACY_NS:
            return []
        if isinstance(found, ScanError):
            return [] if found.code in _PASSING else [(name, stamp, -1, str(found.code), found.detail)]
        # the path and the shared header go another way
        return [(name, stamp, one.frame, one[1:-1], one.shared.digest) for one in found]

    def _load(self, digest: bytes) -> SharedHeader:
        """A shared header by its digest; asked for when first met, for another process may have added it just now."""
        rows = self._database.execute("SELECT content FROM shared WHERE digest = ?", (digest,)).fetchall()
        if not rows or digest_of(content := str(rows[0][0])) != digest:
            raise sqlite3.DatabaseError("shared header")
        return self.reader.adopt(digest, SharedKey.from_json(content))
