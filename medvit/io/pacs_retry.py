"""Trying again: what may pass is tried again, later and later; what will not pass is said at once.

A PACS restarts, is overloaded or loses the line every night. Waiting grows by powers of two, with jitter so that
several clients do not come back in step, and ends at a number of tries or at a deadline, whichever is first. Errors
name the host and the kind of fault, never what a library said of it: its text holds URLs, and with them identity.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

from medvit.records import EXIT_USAGE, MedvitError

T = TypeVar("T")


class PacsError(MedvitError):
    """A PACS could not be reached, broke off or did not do what it was asked; trying again later may help."""


class PacsRefusedError(PacsError):
    """A PACS said no: credentials, address, AE title, a service that it does not offer. Trying again will not help."""

    exit_code = EXIT_USAGE


class TransientError(Exception):
    """A fault that may pass; caught by `Course.run` and by nobody else.

    Args:
        what: was seen, without identity.
        after_s: how long the PACS asked to wait; 0: it did not say.
    """

    def __init__(self, what: str, after_s: float = 0.0) -> None:
        self.what, self.after_s = what, after_s
        super().__init__(what)


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How often and how long to try.

    Attributes:
        tries: of one request, image series or file, the first included.
        first_s: wait before the second try, doubled before each further one.
        longest_s: of one wait.
        deadline_s: of a whole `find`, `fetch` or `send`, waits included.
        sleep: replaced in tests, as are `clock` and `jitter` (0..1).
        clock: see `sleep`.
        jitter: see `sleep`.
    """

    tries: int = 5
    first_s: float = 1.0
    longest_s: float = 30.0
    deadline_s: float = 3600.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = random.random

    def wait_s(self, tried: int, after_s: float = 0.0) -> float:
        """Seconds to wait after so many tries: between half and all of the step, and what the PACS asked for."""
        step = min(self.longest_s, self.first_s * 2.0 ** (tried - 1))
        return max(step * (0.5 + self.jitter() / 2), min(after_s, self.longest_s))


class Course:
    """One operation on a PACS, from now to its deadline.

    Args:
        retry: how often and how long.
        host: named in errors.
    """

    def __init__(self, retry: Retry, host: str) -> None:
        self._retry, self._host = retry, host
        self._start = retry.clock()

    def run(self, work: Callable[[], T]) -> T:
        """What `work` returns, tried again while it raises `TransientError`.

        Raises:
            PacsError: tries or time are used up.
        """
        for tried in count(1):
            self.check()
            try:
                return work()
            except TransientError as error:
                self._wait(error, tried)
        raise AssertionError("unreachable")  # for mypy

    def check(self) -> None:
        """Raise where the deadline has passed; called as data comes in, for a PACS may send a byte a minute.

        Raises:
            PacsError: it has passed.
        """
        if self._spent() > self._retry.deadline_s:
            raise PacsError(
                f"{self._host}: not finished within {self._retry.deadline_s:g} s. Ask for less at a time, allow more "
                "time, or look at the load of the PACS and of the line."
            )

    def _spent(self) -> float:
        return self._retry.clock() - self._start

    def _wait(self, error: TransientError, tried: int) -> None:
        wait_s = self._retry.wait_s(tried, error.after_s)
        if tried >= self._retry.tries or self._spent() + wait_s > self._retry.deadline_s:
            times = "1 try" if tried == 1 else f"{tried} tries"
            raise PacsError(
                f"{self._host}: {error.what} ({times} over {self._spent():.0f} s). Check that the PACS is running, "
                "that address and port are right and no firewall is between, then run again."
            ) from None
        self._retry.sleep(wait_s)


def silence(*packages: str) -> None:
    """Switch off the loggers of network libraries in this process.

    At debug level, and pynetdicom at info too, they write URLs with patient ids and whole data sets (pynetdicom #911).
    Switched off and not filtered: a level that somebody sets later brings nothing back.
    """
    for name in list(logging.root.manager.loggerDict):
        if name in packages or name.startswith(tuple(f"{package}." for package in packages)):
            logging.getLogger(name).disabled = True
