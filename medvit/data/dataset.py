"""Cases -> batches: which slices are drawn when, and how scans of different length share a batch.

Every draw depends on seed, epoch and case only, so that workers, ranks and a resumed run see the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.transforms import Compose
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from medvit.data.pipelines import choose_slices, resize_slices
from medvit.records import Case


def draw(seed: int, *where: int) -> np.random.RandomState:
    """Random numbers that depend only on seed and place (epoch, sample, view), never on workers or order."""
    words = np.random.SeedSequence([seed, *where]).generate_state(4)
    return np.random.RandomState(words)  # MONAI's transforms draw from RandomState


class CaseDataset(Dataset[dict[str, Any]]):
    """Slices (or cached features) of cases, drawn anew each epoch.

    Args:
        cases: in a fixed order.
        load: case -> (Z, size, size) HU or (Z, D) features.
        labels: (N,) class index of each case; negative: trained on without a label.
        slices: how many to draw of each at most.
        transform: rows and columns -> (HU (S, H, W) -> (S, C, H, W)); None leaves features as they are.
        seed: of all draws.
        domains: (N,) which site each case is of; None is one site.
        strata: (N,) that are drawn equally often; None: every case once an epoch.

    Attributes:
        epoch: decides the draws; set by the loop before it makes the loader, so that no worker has an older one.
        size: rows and columns of what the model sees, px; likewise.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        load: Callable[[Case], npt.NDArray[Any]],
        labels: npt.NDArray[np.int64],
        *,
        slices: int,
        transform: Callable[[int], Any] | None,
        seed: int,
        domains: npt.NDArray[np.int64] | None = None,
        strata: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self.cases, self.load, self.labels = list(cases), load, labels
        self.domains = np.zeros(len(self.cases), np.int64) if domains is None else domains
        self.slices, self.transform, self.seed, self.strata = slices, transform, seed, strata
        self.epoch, self.size = 0, 0
        self._made: dict[int, Compose] = {}

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`input` (S, ...) float32, `label`, `domain` and `index`."""
        rng = draw(self.seed, self.epoch, index)
        volume = self.load(self.cases[index])
        chosen = np.array(volume[choose_slices(len(volume), self.slices, rng)], np.float32)
        if self.transform is None:
            values = torch.from_numpy(chosen)
        else:
            size = self.size or chosen.shape[-1]
            if size not in self._made:
                self._made[size] = self.transform(size)
            transform = self._made[size]
            transform.set_random_state(seed=int(rng.randint(2**31)))
            values = torch.as_tensor(transform(resize_slices(chosen, size))).as_subclass(torch.Tensor)
        return {"input": values, "label": int(self.labels[index]), "domain": int(self.domains[index]), "index": index}


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What is of slices padded to the longest (B, S, ...), `mask` (B, S) true where there is a slice, the rest (B,)."""
    lengths = torch.tensor([len(sample["input"]) for sample in samples])
    batch = {"mask": torch.arange(int(lengths.max())) < lengths[:, None]}
    for name, first in samples[0].items():
        column = [sample[name] for sample in samples]
        batch[name] = pad_sequence(column, batch_first=True) if torch.is_tensor(first) else torch.tensor(column)
    return batch
