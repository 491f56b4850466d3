"""A process beside ours that composes reports and pictures; it has no effect but its answers.

It starts when first needed, serves one order after the other, and ends when our end of the socket is gone, however that
comes about. Only we write files: a kill leaves nothing under way.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import threading
from contextlib import suppress
from multiprocessing.connection import Connection

from medvit.data.pseudonym import pseudonym
from medvit.deployment.compose import Documents, Order, compose
from medvit.io.sandbox import start_process
from medvit.records import MedvitError, ReasonCode, ScanError


class Scribe:
    """The process, and the connection to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            serve = f"from medvit.deployment.scribe import serve; serve({theirs.fileno()})"
            self.process = start_process(serve, theirs.fileno())
        self.connection, self.orders = Connection(ours.detach()), 0

    def ask(self, order: Order) -> Documents | Exception:
        """What `compose` makes there, or what it raised.

        Raises:
            EOFError, OSError: it is gone.
        """
        self.orders += 1
        self.connection.send((self.orders, order))
        number, answer = self.connection.recv()
        assert number == self.orders  # the report of one patient is not that of another
        return answer  # type: ignore[no-any-return]

    def close(self) -> None:
        """End it."""
        atexit.unregister(self.close)
        self.connection.close()
        self.process.kill()
        self.process.wait()


def serve(descriptor: int) -> None:
    """Answer orders until the other end is gone."""
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the end of the run is the parent's affair
        signal.signal(stop, signal.SIG_IGN)
    connection = Connection(descriptor)
    while True:
        with suppress(BrokenPipeError):
            try:
                number, order = connection.recv()
            except (EOFError, OSError):
                return
            connection.send((number, _attempt(order)))


def _attempt(order: Order) -> Documents | Exception:
    try:
        return compose(order)
    except MedvitError as error:
        return error
    except OSError as error:
        return OSError(error.errno, os.strerror(error.errno or 5))
    except Exception as error:  # noqa: BLE001  its kind is told; its text may hold identity
        return RuntimeError(type(error).__name__)


_scribe: tuple[tuple[int, str], Scribe] | None = None
_lock = threading.Lock()


def shared(order: Order) -> Documents:
    """`compose` in the process that this one shares; started again where it has died, and the order once more.

    Raises:
        ScanError: as `compose`; `WORKER_DIED` where it dies of the order twice.
    """
    with _lock:
        for _ in range(2):
            one = _running()
            try:
                answer = one.ask(order)
                break
            except (EOFError, OSError):
                _end()
            except BaseException:  # its answer may still come, and would pass for that to the next order
                _end()
                raise
        else:
            raise ScanError(ReasonCode.WORKER_DIED, "the process that composes reports ended twice")
    if isinstance(answer, Exception):
        raise answer
    return answer


def _running() -> Scribe:
    """That of this process and site key: a forked child has its own."""
    global _scribe  # noqa: PLW0603  one for the process is the point
    whose = os.getpid(), pseudonym("scribe", "")
    if _scribe is None or _scribe[0] != whose:
        _scribe = whose, Scribe()
        atexit.register(_scribe[1].close)
    return _scribe[1]


def _end() -> None:
    global _scribe  # noqa: PLW0603  as above
    if _scribe is not None:
        _scribe[1].close()
    _scribe = None
