"""How much of training is spent waiting for input: a model that waits needs faster input, no faster device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Batch = TypeVar("Batch")

TOO_MUCH, TOO_LONG = 0.2, 10.0
"""Share and seconds of waiting that are worth a word: a head on cached features is trained in a few seconds."""


class WaitingClock:
    """Measures passes over the batches.

    Args:
        now: seconds, from any origin.

    Attributes:
        last: share of waiting in the last whole pass, 0..1.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.last = self.waited = self.total = 0.0

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches. Until one is there, the start of loader processes included, counts as waiting."""
        waited, asked = 0.0, self.now()
        began = asked
        for batch in batches:
            waited += self.now() - asked
            yield batch
            asked = self.now()
        ended = self.now()
        waited, total = waited + ended - asked, ended - began
        self.last = waited / total if total else 0.0
        self.waited += waited
        self.total += total

    @property
    def overall(self) -> float:
        """Share of waiting in all whole passes, 0..1."""
        return self.waited / self.total if self.total else 0.0


def advice(clock: WaitingClock, workers: int) -> str:
    """What to do about much waiting; empty where it is little.

    Args:
        clock: of the whole training.
        workers: loader processes it had.
    """
    if clock.overall <= TOO_MUCH or clock.waited < TOO_LONG:
        return ""
    return (
        f"{clock.overall:.0%} of the training time ({clock.waited:.0f} s) went by waiting for input: try more loader "
        f"processes (data.workers, now {workers}), or put the cache on a faster disk (data.cache_dir or MEDVIT_CACHE)."
    )
