"""Processes that do the runs of a benchmark, each on one thread: two of them train more than one with two."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def workers(processes: int) -> Iterator[ProcessPoolExecutor]:
    """So many; what waits at the end, or after an error, is not begun."""
    alone()
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"), initializer=alone)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def alone() -> None:
    """From now on this process computes on one thread, and those that it starts too."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
