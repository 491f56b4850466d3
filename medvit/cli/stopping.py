"""Stopping in order: the first SIGTERM or Ctrl-C ends a run after what is under way, the second at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stop:
    """Whether the run was told to stop, and by which signal (0: it was not)."""

    def __init__(self) -> None:
        self.signal = 0
        self._told = threading.Event()

    def __call__(self) -> bool:
        """Whether the run was told to stop."""
        return self._told.is_set()

    def wait(self, seconds: float) -> bool:
        """Sleep, but not longer than until told to stop; whether it was."""
        return self._told.wait(seconds)

    def tell(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler."""
        if self._told.is_set():
            raise KeyboardInterrupt
        self.signal = number
        self._told.set()
        with suppress(OSError):  # the terminal may be gone; an error here would be that of whatever is under way
            os.write(2, b"stopping: what is under way is finished first (once more: at once)\n")


@contextmanager
def stopped_by_signals() -> Iterator[Stop]:
    """A `Stop` that hears SIGTERM and SIGINT; outside the main thread, where nobody can, one that never stops."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.tell) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
