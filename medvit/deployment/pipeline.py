"""Reading, predicting and delivering at once, in order, with bounded memory.

Scans are read ahead in two threads (decoding itself runs in worker processes) while the model is at work in the
calling thread and a third thread writes what is done. Everything that waits is counted: a reader begins only when its
volume fits into the memory set apart, and nobody runs further ahead than a few cases.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from types import TracebackType
from typing import Generic, Self, TypeVar

READERS = 2
AHEAD = 4
"""Cases that are being read or wait, prepared, for the model."""

BEHIND = 4
"""Answers that wait to be written."""

Item = TypeVar("Item")
Made = TypeVar("Made")


class Budget:
    """An amount that several threads share.

    Args:
        total: nobody can take more.
    """

    def __init__(self, total: float) -> None:
        self.total = self.left = total
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, amount: float) -> Iterator[None]:
        """Wait until so much is left, and hold it.

        Raises:
            MemoryError: there never was so much.
        """
        if amount > self.total:
            raise MemoryError
        with self._changed:
            self._changed.wait_for(lambda: self.left >= amount)
            self.left -= amount
        try:
            yield
        finally:
            with self._changed:
                self.left += amount
                self._changed.notify_all()


def read_ahead(items: Iterable[Item], read: Callable[[Item], Made]) -> Iterator[tuple[Item, Future[Made]]]:
    """Each item with what was read of it, in their order; a few are read beforehand."""
    source = iter(items)
    with ThreadPoolExecutor(READERS, "medvit-read") as pool:
        waiting = deque((item, pool.submit(read, item)) for item in islice(source, AHEAD))
        try:
            while waiting:
                yield waiting.popleft()
                waiting.extend((item, pool.submit(read, item)) for item in islice(source, 1))
        finally:
            for _, future in waiting:
                future.cancel()


class WriteBehind(Generic[Item]):
    """Hands items to another thread, in order. Use as a context manager: at its end all are delivered.

    Args:
        deliver: is called with one item at a time; what it raises ends the run at the next `put`, or at the end.
    """

    def __init__(self, deliver: Callable[[Item], None]) -> None:
        self.deliver = deliver
        self._pool = ThreadPoolExecutor(1, "medvit-write")
        self._waiting: deque[Future[None]] = deque()

    def put(self, item: Item) -> None:
        """Deliver an item soon; waits where too many do."""
        self._waiting.append(self._pool.submit(self.deliver, item))
        while len(self._waiting) > BEHIND or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # after a failed delivery the others are not tried: the disk is full for them too
        failed = any(future.done() and future.exception() for future in self._waiting) or error is not None
        self._pool.shutdown(wait=True, cancel_futures=failed)
        if error is None:
            for future in self._waiting:
                future.result()
