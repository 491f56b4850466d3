"""Where the studies of a batch are worked on: in this process, or on a Ray cluster. The answers are the same."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Protocol

import numpy as np
import psutil

from medvit.deployment.choice import Listed
from medvit.deployment.cluster import ray_answers
from medvit.deployment.options import BatchOptions
from medvit.deployment.pipeline import Budget, read_ahead
from medvit.deployment.work import Answer, Prepared, failure, judge, prepare
from medvit.inference import Model

MEMORY_SHARE = 0.5
"""Of the memory that is free at the start, for volumes that are being read."""

BYTES_PER_VOXEL = 12
"""HU as float32, once more as oriented, and what resizing needs beside."""

Answers = Iterator[tuple[Listed, Answer]]


class Engine(Protocol):
    """Works on studies, in any order, until they are done or nobody asks for more."""

    def __call__(self, due: Iterator[Listed], model: Model, options: BatchOptions) -> Answers:
        """Pairs of a study and what became of it."""
        ...


def local_answers(due: Iterator[Listed], model: Model, options: BatchOptions) -> Answers:
    """Reading in threads and decoding processes, the model in this thread."""
    memory = Budget(MEMORY_SHARE * psutil.virtual_memory().available)

    def read(one: Listed) -> Prepared:
        with memory.taken(BYTES_PER_VOXEL * float(np.prod(one.series.shape, dtype=np.float64))):
            return prepare(one, model)

    for one, future in read_ahead(due, read):
        yield one, _answer(one, future, model, options)


def _answer(one: Listed, read: Future[Prepared], model: Model, options: BatchOptions) -> Answer:
    try:
        return judge(read.result(), model, draw=options.dicom)
    except Exception as error:  # noqa: BLE001  one case never stops a batch; its kind is kept
        return failure(one.case, error)


ENGINES: dict[str, Engine] = {"local": local_answers, "ray": ray_answers}
