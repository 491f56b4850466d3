"""Unlabelled pictures for `pretraining.py`, with labels that only judge: digits, phantom slices, slices of head CT.

Every set is cases with HU, so that one code draws the views of all: medvit's own. Views are drawn beforehand, the same
for every contender, and kept on disk as half-precision numbers: drawing is no part of what is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medvit import data, io
from medvit.config import AugmentConfig, DataConfig, ViewsConfig
from medvit.data.cache import read_case
from medvit.data.pipelines import prediction_transform, prepare_slices, window_statistics
from medvit.data.slice_views import ViewDataset
from medvit.io import phantom
from medvit.records import Case, Preprocessing

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

EPOCHS = 6
"""Of views that are drawn; a longer training sees them again."""

LOCAL = 2
"""Small crops of each slice, for DINO."""

DIGITS, JUDGED = 6000, 2000
"""The last 2,000 of 10,000 were those that pilots were judged on."""

PATIENTS, SLICES = 600, 4
"""Of the phantom; two thirds are learned from."""


@dataclass(frozen=True)
class Source:
    """Slices of a set.

    Attributes:
        hu: int16 (N, H, H).
        labels: (N,) class index.
        patients: (N,) number of each slice's patient.
        learned: (N,) true where pretraining sees the slice, and labels may teach; the others are only judged.
        preprocessing: windows and size.
        patch: side of a patch, px.
        local_size: side of small crops, px.
        jitter: of windows; where HU alone decide it must be small.
    """

    hu: npt.NDArray[np.int16]
    labels: Ints
    patients: Ints
    learned: Flags
    preprocessing: Preprocessing
    patch: int
    local_size: int
    jitter: float = 0.2


@dataclass(frozen=True)
class Pictures:
    """A set made ready. Pickles to a file name.

    Attributes:
        folder: of the arrays.
        labels: (N,) of all slices; `patients` and `learned` too.
        size: px; `patch` too.
        channels: C.
    """

    folder: Path
    labels: Ints
    patients: Ints
    learned: Flags
    size: int
    patch: int
    channels: int

    def views(self, epoch: int) -> Tensor:
        """Of the slices that are learned from, (M, 2, C, H, W), float16."""
        return self._load(f"views{epoch % EPOCHS}")

    def local(self, epoch: int) -> Tensor:
        """Small crops of them, (M, L, C, h, w), float16."""
        return self._load(f"local{epoch % EPOCHS}")

    def plain(self) -> Tensor:
        """All slices as a model is shown them when it is judged, (N, C, H, W)."""
        return self._load("plain").float()

    def _load(self, name: str) -> Tensor:
        return torch.from_numpy(np.load(self.folder / f"{name}.npy"))


def digits(shared: Path) -> Source:
    """MNIST without its empty border, a patient each."""
    with np.load(shared / "digits" / "mnist_10k.npz") as stored:
        order = np.random.default_rng(0).permutation(len(stored["labels"]))[: DIGITS + JUDGED]
        images, labels = stored["images"][order, 2:26, 2:26], stored["labels"][order].astype(np.int64)
    prep = Preprocessing(size=24, windows=((0.0, 2000.0),), train_slices=1)
    hu = (images.astype(np.int16) * 8 - 1000).clip(-1000, 1000).astype(np.int16)
    return Source(hu, labels, np.arange(len(hu)), np.arange(len(hu)) < DIGITS, prep, patch=3, local_size=12)


def phantom_slices(_: Path) -> Source:
    """Slices about the level of the finding, of patients with and without."""
    people = phantom.make_patients(PATIENTS, 11)
    hu = np.stack([phantom.render(one, matrix=40, slices=SLICES)[0] for one in people]).reshape(-1, 40, 40)
    labels = np.repeat([int(one.finding) for one in people], SLICES)
    patients = np.repeat(np.arange(PATIENTS), SLICES)
    prep = Preprocessing(size=40, windows=("lung",), train_slices=1)
    learned = patients < 2 * PATIENTS // 3
    return Source(hu.astype(np.int16), labels, patients, learned, prep, patch=4, local_size=24, jitter=0.05)


def head_slices(shared: Path) -> Source:
    """All slices of 82 head CT, with haemorrhage or without; two thirds of the patients are learned from."""
    folder = shared / "ct_ich"
    prep = Preprocessing(size=40, windows=((40.0, 120.0), (40.0, 80.0), (60.0, 60.0)), train_slices=1)
    inventory = io.scan_folder(folder / "hospital")
    cases = data.build_manifest(inventory, folder / "slice_labels.csv", label_column="hemorrhage").cases
    hu = np.concatenate([prepare_slices(read_case(case), prep) for case in cases])
    labels = np.array([int(str(case.label)) for case in cases])
    _, patients = np.unique([case.patient_id for case in cases], return_inverse=True)
    learned = np.ones(len(hu), bool)
    learned[data.make_folds(cases, DataConfig(folds=3), seed=0)[0].test] = False
    return Source(hu, labels, patients.astype(np.int64), learned, prep, patch=4, local_size=24)


SETS: Mapping[str, Callable[[Path], Source]] = {"digits": digits, "phantom": phantom_slices, "ct_ich": head_slices}


def prepare(source: Source, folder: Path) -> Pictures:
    """Draw all views, and what is judged on, into a folder."""
    folder.mkdir(parents=True)
    prep, chosen = source.preprocessing, np.flatnonzero(source.learned)
    mean, std = window_statistics([source.hu[chosen]], prep.windows)
    plain = np.asarray(prediction_transform(prep, mean, std)(source.hu.astype(np.float32)))
    np.save(folder / "plain.npy", plain.astype(np.float16))
    dataset = ViewDataset(
        [_case(index, source.patients[index]) for index in chosen],
        lambda case: source.hu[[int(case.case_id)]],
        prep,
        AugmentConfig(window_jitter=source.jitter),
        ViewsConfig(
            crop=(0.6, 1.0),
            local=LOCAL,
            local_crop=(0.2, 0.6),
            local_size=source.local_size,
            neighbours=0,
        ),
        mean,
        std,
        seed=0,
    )
    for epoch in range(EPOCHS):
        dataset.epoch = epoch
        drawn = [dataset[index] for index in range(len(dataset))]
        for name, key in (("views", "input"), ("local", "local")):
            np.save(folder / f"{name}{epoch}.npy", np.stack([one[key][0].numpy() for one in drawn]).astype(np.float16))
    place = source.labels, source.patients, source.learned, prep.size, source.patch
    return Pictures(folder, *place, len(prep.windows))


def _case(index: int, patient: int) -> Case:
    return Case(case_id=str(index), patient_id=str(patient), group=str(patient), root="", files=())
