"""Which batches a fit takes, and this process's part of them, from any step of an epoch on."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from medvit.config import TrainingConfig
from medvit.data.dataset import CaseDataset, collate
from medvit.data.sampling import epoch_batches, share
from medvit.records import UsageError

Item = TypeVar("Item")


class Feeding:
    """Batches of a training, grouped into optimizer steps.

    Args:
        dataset: training cases.
        config: batch size, accumulation, seed.
        rank: of this process.
        processes: that share each batch.

    Attributes:
        batches: of an epoch.
        steps: of an epoch.

    Raises:
        UsageError: fewer labelled cases than processes.
    """

    def __init__(self, dataset: CaseDataset, config: TrainingConfig, *, rank: int, processes: int) -> None:
        self.dataset, self.config, self.rank, self.processes = dataset, config, rank, processes
        try:
            groups = self.groups(0)
        except ValueError as error:
            raise UsageError(f"{error}. Start fewer of them, or give more labelled cases.") from None
        self.batches, self.steps = sum(map(len, groups)), len(groups)

    def groups(self, epoch: int) -> list[list[list[int]]]:
        """Per step its batches, for all processes together; each a list of indices of cases."""
        batches = epoch_batches(
            self.dataset.labels,
            epoch,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            strata=self.dataset.strata,
            processes=self.processes,
        )
        return list(grouped(batches, self.config.accumulate))

    def loader(self, groups: Sequence[Sequence[list[int]]], workers: int) -> DataLoader[dict[str, Any]]:
        """This process's part of the batches of some steps."""
        own = [share(batch, self.dataset.labels, self.rank, self.processes) for group in groups for batch in group]
        return DataLoader(
            self.dataset, batch_sampler=own, collate_fn=collate, num_workers=workers, worker_init_fn=_die_with_parent
        )


def _die_with_parent(_worker: int) -> None:
    """End a loader process with the training that it reads for, however that ends.

    torch's own watchdog then asks for a lock that a training killed at the wrong moment holds for ever: the process
    stays, with its memory and all it has open. Linux can tell it (prctl(2), PR_SET_PDEATHSIG).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def grouped(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of so many items; the last one has what is left."""
    stream = iter(items)
    while group := list(islice(stream, size)):
        yield group
