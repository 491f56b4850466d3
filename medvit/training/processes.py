"""Several training processes as one: who writes, who waits, and how work is shared.

Started by torchrun, which sets the environment; alone, every function here does the obvious and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain, zip_longest
from typing import Any, TypeVar

import torch
from torch import distributed

PATIENCE = timedelta(hours=2)
"""While one works and the others wait, as for the report of the first; torchrun ends them all if one dies."""

Item = TypeVar("Item")
Found = TypeVar("Found")


@contextmanager
def together() -> Iterator[None]:
    """While inside, this process works with the others that torchrun has started; without torchrun, alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def count() -> int:
    """How many there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def first() -> bool:
    """Whether this is the one that writes and speaks."""
    return rank() == 0


def wait() -> None:
    """Until all are here."""
    if count() > 1:
        distributed.barrier()


def agreed(value: Item) -> Item:
    """What the first process says, for all."""
    if count() == 1:
        return value
    told: list[Any] = [value]
    distributed.broadcast_object_list(told, src=0)
    answer: Item = told[0]
    return answer


def mine(items: Sequence[Item]) -> Sequence[Item]:
    """This process's part of a list that all have."""
    return items[rank() :: count()]


def shared(items: Sequence[Item], work: Callable[[Sequence[Item]], list[Found]]) -> list[Found]:
    """Work on a list that all have, each on its part; every process gets all results, in the order of the list."""
    if count() == 1:
        return work(items)
    parts: list[Any] = [None] * count()
    distributed.all_gather_object(parts, work(mine(items)))
    return [found for found in chain.from_iterable(zip_longest(*parts, fillvalue=_NONE)) if found is not _NONE]


_NONE: Any = object()
