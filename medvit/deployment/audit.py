"""What a run started, read, decided, wrote, sent and stopped: one line each, chained so that no change goes unseen.

A line holds the hash of the line before it and its own, an HMAC under a key derived from the site's: without the key
nobody can edit, insert, remove or swap lines and mend the chain. Two things the file alone cannot show: that its last
lines are gone, or that the whole is another one of the same key. Keep `Audit.head` elsewhere and give it to `verify`.

Lines hold no identity: names of fields and the form of their values are a closed list, `audit_line.FIELDS`.
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from medvit.deployment.audit_check import Verdict, verify
from medvit.deployment.audit_line import START, Head, check_field, derive_key, head_of, seal, unseal
from medvit.io.disk import sync_folder
from medvit.records import GateError, UsageError

__all__ = ["Audit", "AuditBrokenError", "AuditWriteError", "Head", "Verdict", "verify"]

MAX_LINE = 16_384
"""Bytes; so much is read of the end of a file to go on."""

TORN = "torn_line"
"""Event: the line before was cut off, and what there was of it is removed or completed."""


class AuditBrokenError(GateError):
    """The file is not the chain that this site wrote."""


class AuditWriteError(UsageError):
    """An entry could not be put on the disk: what cannot be recorded is not done."""


class Audit:
    """The audit of a folder of results, open for appending; use as a context manager.

    Opening reads the last line alone. A line that a kill cut off is removed, and that becomes an entry.

    Args:
        path: made when missing; its folder exists.
        key: the site's.
        clock: aware of its time zone.

    Raises:
        AuditBrokenError: the last line was not written with this key; nothing is changed.
        AuditWriteError: no room, or another process writes.
    """

    def __init__(self, path: Path, key: bytes, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.path, self._key, self._clock = path, derive_key(key), clock
        self._lock, self._failed, self.head = threading.Lock(), False, START
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            self._resume()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the file free; entries are on the disk already."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def append(self, event: str, **fields: str | int | list[str] | tuple[str, ...]) -> Head:
        """Put one entry on the disk; from any thread.

        Args:
            event: a word, as 'written'.
            **fields: of `audit_line.FIELDS`.

        Returns:
            The new end of the chain.

        Raises:
            ValueError: a field or a value that is not of the list: it might be identity.
            AuditWriteError: the entry is not on the disk, and no further one is taken.
        """
        if not re.fullmatch("[a-z][a-z_]{0,39}", event):
            raise ValueError("an event is a short word of small letters")
        for name, value in fields.items():
            check_field(name, value)
        with self._lock:
            now = self._clock().astimezone(UTC).isoformat(timespec="milliseconds")
            entry = {"seq": self.head.entries + 1, "time": now, "event": event, **fields, "prev": self.head.hash}
            line = seal(entry, self._key)
            if len(line) >= MAX_LINE:
                raise ValueError("an entry is too long")
            self._write(line + b"\n")
            self.head = head_of(entry, line)
            return self.head

    def _write(self, content: bytes) -> None:
        if self._failed or self._file < 0:
            raise AuditWriteError(f"{self.path.name} is closed after an error: run the same command again.")
        before = os.fstat(self._file).st_size
        try:
            rest = memoryview(content)
            while rest:  # a write takes what there is room for, and only the next one fails
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            self._failed = True
            with suppress(OSError):
                os.ftruncate(self._file, before)
            raise AuditWriteError(
                f"{self.path.name} could not be written ({os.strerror(error.errno or 0)}), and what cannot be recorded "
                "is not done. Entries before are whole: make room on the disk and run the same command again."
            ) from None

    def _resume(self) -> None:
        """Find the end of the chain, and mend it where a kill tore it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise AuditWriteError(f"{self.path.name}: another medvit writes here. Wait for it, or end it.") from None
        size = os.fstat(self._file).st_size
        if not size:
            sync_folder(self.path.parent)
            return
        whole, newline, torn = os.pread(self._file, 2 * MAX_LINE, max(0, size - 2 * MAX_LINE)).rpartition(b"\n")
        self.head = self._end_of(whole.rpartition(b"\n")[2]) if newline else START
        if not newline and not _begins_entry(torn):
            raise self._foreign()
        if torn:
            self._mend(torn, size)

    def _end_of(self, line: bytes) -> Head:
        if (entry := unseal(line, self._key)) is None:
            raise self._foreign()
        return head_of(entry, line)

    def _foreign(self) -> AuditBrokenError:
        return AuditBrokenError(
            f"the last line of {self.path.name} was edited, or written with another site key. Nothing was changed: run "
            "medvit-doctor --audit on it, keep it as evidence, and write results to another folder."
        )

    def _mend(self, torn: bytes, size: int) -> None:
        entry = unseal(torn, self._key)
        if entry is not None and entry["prev"] == self.head.hash:  # all but the line's end was written
            self._write(b"\n")
            self.head = head_of(entry, torn)
            self.append(TORN, bytes_cut=0)
            return
        os.ftruncate(self._file, size - len(torn))
        self.append(TORN, bytes_cut=len(torn))


def _begins_entry(torn: bytes) -> bool:
    """Whether this may be the beginning of a first line: another file that was named by mistake is left alone."""
    start = b'{"seq":1,"time":'
    # a power cut can leave zeros where the length was written and the content was not
    return torn.startswith(start[: len(torn)]) or not torn.strip(b"\0")
