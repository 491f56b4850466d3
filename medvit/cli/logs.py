"""Logs without identity: what medvit logs is shown, of other libraries only who spoke and how loud.

pydicom and pynetdicom log values of patients, and several libraries write through handlers of their own, past any
filter of ours. So the text is taken out where records are made: no handler ever sees it, at any level. The same holds
for warnings and for exceptions that end a thread or cannot be raised. Of exceptions the type is shown, and where in
medvit they passed: their text may hold header values.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from types import TracebackType
from typing import Any

from medvit.records import MedvitError

WITHHELD = "text withheld, for it may name a patient"

_OUTLINE = "medvit_outline"

_PACKAGE = Path(__file__).resolve().parents[1]


@contextmanager
def identity_withheld() -> Iterator[None]:
    """While it is open, no log, warning or stray exception carries the text of another library.

    Again inside itself it changes nothing. With MEDVIT_DEBUG exceptions of threads are shown whole.
    """
    if logging.getLogRecordFactory() is _record:
        yield
        return
    before = logging.getLogRecordFactory(), logging.raiseExceptions, threading.excepthook, sys.unraisablehook
    handler = _Stderr(logging.WARNING)
    logging.setLogRecordFactory(_record)
    logging.raiseExceptions = False  # what cannot be formatted would be printed with its arguments
    logging.getLogger().addHandler(handler)
    if not os.environ.get("MEDVIT_DEBUG"):
        threading.excepthook = sys.unraisablehook = _tell_stray
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.showwarning = _show_nothing  # libraries reset filters
            yield
    finally:
        logging.getLogger().removeHandler(handler)
        logging.setLogRecordFactory(before[0])
        logging.raiseExceptions, threading.excepthook, sys.unraisablehook = before[1:]


def outline(error: BaseException | None) -> str:
    """Types of an exception and of those behind it, and the lines of medvit that each passed; no text."""
    lines: list[str] = []
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        lines += [type(error).__name__, *_own_lines(error.__traceback__)]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n".join(lines)


def _own_lines(trace: TracebackType | None) -> Iterator[str]:
    for frame, line in traceback.walk_tb(trace):
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE):
            yield f"  {path.relative_to(_PACKAGE.parent)}:{line} in {frame.f_code.co_name}"


def _ours(name: str | None) -> bool:
    return f"{name}.".startswith("medvit.")  # None: `logging.makeLogRecord` fills a record later


def _record(  # the signature is that of LogRecord
    name: Any, level: int, pathname: str, lineno: int, msg: object, args: Any, exc_info: Any, *rest: Any, **more: Any
) -> logging.LogRecord:
    """Make a record that holds no text of another library, for whatever handler."""
    if _ours(name):
        args = tuple(map(_harmless, args)) if isinstance(args, tuple) else args
        msg = _harmless(msg)
    else:
        msg, args = WITHHELD, ()
    record = logging.LogRecord(name, level, pathname, lineno, msg, args, None, *rest, **more)
    if not _ours(name):
        record.stack_info = None
    if isinstance(exc_info, tuple) and isinstance(error := exc_info[1], BaseException):
        record.exc_text = outline(error)  # formatters show it in place of the exception
        setattr(record, _OUTLINE, record.exc_text)
    return record


def _harmless(value: object) -> object:
    """An exception that is not medvit's own is shown by its type."""
    return type(value).__name__ if isinstance(value, BaseException) and not isinstance(value, MedvitError) else value


class _Stderr(logging.Handler):
    """Shows what medvit logs; of another library each level once, for thousands of lines say no more."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.said: set[tuple[str, int]] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if _ours(record.name):
            print(self._shown(record), file=sys.stderr, flush=True)
        elif (speaker := (record.name, record.levelno)) not in self.said:
            self.said.add(speaker)
            # not what the record says: one made elsewhere has its text still
            print(f"{record.name}: {record.levelname.lower()} ({WITHHELD})", file=sys.stderr, flush=True)

    def _shown(self, record: logging.LogRecord) -> str:
        shown = copy(record)
        # a record of another process has its exception still, and other handlers may have kept the text of it
        shown.exc_text = record.__dict__.get(_OUTLINE) or outline(record.exc_info[1] if record.exc_info else None)
        shown.exc_info = shown.stack_info = None
        try:
            return self.format(shown)
        except Exception:  # noqa: BLE001  a wrong format of ours must not end a run, and its arguments are not shown
            return f"{record.name}: {record.levelname.lower()} (cannot be formatted)"


def _tell_stray(stray: Any) -> None:
    """Hook for exceptions that nobody can catch."""
    print(f"unexpected error beside the run: {outline(stray.exc_value)}", file=sys.stderr, flush=True)


def _show_nothing(*_: Any, **__: Any) -> None:
    pass
