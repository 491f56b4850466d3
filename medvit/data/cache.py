"""Decode once: int16 HU slices at the model's size as memory-mapped files, shared by epochs, workers, ranks and runs.

A cache holds pixels, so it is PHI: it lives under the run or under MEDVIT_CACHE, its names are hashes, and
medvit-doctor says how large it is. Files appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.transforms import Compose
from torch.utils.data import Dataset

from medvit.data.pipelines import Slices, choose_slices, prepare_slices
from medvit.io import read_files
from medvit.records import Case, Preprocessing, ReasonCode, Scan, ScanError

FORMAT = 2
"""Raised when cached arrays change meaning."""


def default_cache_dir(run: Path) -> Path:
    """MEDVIT_CACHE where set, else a folder of the run."""
    shared = os.environ.get("MEDVIT_CACHE")
    return Path(shared) if shared else run / "cache"


def read_case(case: Case, *, assume_hu: bool = False) -> Scan:
    """The scan of a case.

    Raises:
        ScanError: as `medvit.io.read`.
    """
    return read_files([Path(case.root) / name for name in case.files], assume_hu=assume_hu)


@dataclass(frozen=True)
class Failure:
    """A case that could not be read."""

    case: Case
    error: ScanError


class SliceCache:
    """Prepared slices of cases.

    Args:
        folder: where the files live; made when needed.
        preprocessing: what they are prepared for.
    """

    def __init__(self, folder: Path, preprocessing: Preprocessing, *, assume_hu: bool = False) -> None:
        self.folder, self.preprocessing, self.assume_hu = folder, preprocessing, assume_hu
        self.keys: dict[tuple[str, str], str] = {}

    def key(self, case: Case) -> str:
        """Hash of the source files (name, size, time of change) and of what the preparation depends on; asked once."""
        known = (case.root, case.case_id)
        if known in self.keys:
            return self.keys[known]
        parts = [f"{FORMAT} {self.preprocessing.size} {self.preprocessing.orientation} {self.assume_hu}"]
        for name in case.files:
            path = Path(case.root).absolute() / name
            try:
                status = path.stat()
            except OSError as error:
                raise ScanError(ReasonCode.IO_ERROR, os.strerror(error.errno or 5), (name,)) from None
            parts.append(f"{path} {status.st_size} {status.st_mtime_ns}")
        self.keys[known] = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return self.keys[known]

    def build(
        self, cases: Iterable[Case], progress: Callable[[], None] | None = None
    ) -> tuple[dict[str, str], list[Failure]]:
        """Prepare what is not there yet; a case that cannot be read does not stop the others.

        Returns:
            case_id -> hash of the pixels, and the failures.
        """
        hashes, failures = {}, []
        for case in cases:
            try:
                hashes[case.case_id] = hashlib.sha256(self.load(case).tobytes()).hexdigest()
            except ScanError as error:
                failures.append(Failure(case, error))
            if progress is not None:
                progress()
        return hashes, failures

    def load(self, case: Case) -> Slices:
        """int16 HU (Z, size, size), memory-mapped; prepared first where missing or unreadable.

        Raises:
            ScanError: the case cannot be read.
        """
        path = self.folder / f"{self.key(case)}.npy"
        if (found := _map(path)) is not None:
            return found
        slices = prepare_slices(read_case(case, assume_hu=self.assume_hu), self.preprocessing)
        save_array(path, slices)
        return slices


def _map(path: Path) -> npt.NDArray[Any] | None:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
    except (FileNotFoundError, ValueError, EOFError):  # missing, or damaged: made again
        return None


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write a .npy file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as stream:
        try:
            np.save(stream, array, allow_pickle=False)
            stream.flush()
            os.fsync(stream.fileno())
        except BaseException:
            Path(stream.name).unlink(missing_ok=True)
            raise
    Path(stream.name).replace(path)


class FeatureCache:
    """Features of a frozen backbone, one (Z, D) float32 array per case, keyed by slices and backbone."""

    def __init__(self, slices: SliceCache, backbone_hash: str) -> None:
        self.slices, self.backbone_hash = slices, backbone_hash

    def path(self, case: Case) -> Path:
        """Where the features of a case live."""
        name = hashlib.sha256(f"{self.slices.key(case)} {self.backbone_hash}".encode()).hexdigest()
        return self.slices.folder / f"{name}.features.npy"

    def load(self, case: Case) -> npt.NDArray[np.float32] | None:
        """(Z, D) memory-mapped; None where not computed yet."""
        return _map(self.path(case))

    def save(self, case: Case, features: npt.NDArray[np.float32]) -> None:
        """Keep the features (Z, D) of a case."""
        save_array(self.path(case), features)


def draw(seed: int, *where: int) -> np.random.RandomState:
    """Random numbers that depend only on seed and place (epoch, sample, view), never on workers or order."""
    words = np.random.SeedSequence([seed, *where]).generate_state(4)
    return np.random.RandomState(words)  # MONAI's transforms draw from RandomState


class CaseDataset(Dataset[dict[str, Any]]):
    """Slices (or cached features) of cases, drawn anew each epoch.

    Args:
        cases: in a fixed order.
        load: case -> (Z, size, size) HU or (Z, D) features.
        labels: (N,) class index of each case.
        slices: how many to draw of each at most.
        transform: HU (S, H, W) -> (S, C, H, W); None leaves features as they are.
        seed: of all draws.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        load: Callable[[Case], npt.NDArray[Any]],
        labels: npt.NDArray[np.int64],
        *,
        slices: int,
        transform: Compose | None,
        seed: int,
    ) -> None:
        self.cases, self.load, self.labels = list(cases), load, labels
        self.slices, self.transform, self.seed, self.epoch = slices, transform, seed, 0

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`input` (S, ...) float32, `label` and `index`."""
        rng = draw(self.seed, self.epoch, index)
        volume = self.load(self.cases[index])
        chosen = np.array(volume[choose_slices(len(volume), self.slices, rng)], np.float32)
        if self.transform is None:
            values = torch.from_numpy(chosen)
        else:
            self.transform.set_random_state(seed=int(rng.randint(2**31)))
            values = torch.as_tensor(self.transform(chosen)).as_subclass(torch.Tensor)
        return {"input": values, "label": int(self.labels[index]), "index": index}


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad to the longest: `input` (B, S, ...), `mask` (B, S) true where there is a slice, `label` and `index` (B,)."""
    longest = max(len(sample["input"]) for sample in samples)
    first = samples[0]["input"]
    values = first.new_zeros((len(samples), longest, *first.shape[1:]))
    mask = torch.zeros((len(samples), longest), dtype=torch.bool)
    for row, sample in enumerate(samples):
        values[row, : len(sample["input"])] = sample["input"]
        mask[row, : len(sample["input"])] = True
    return {
        "input": values,
        "mask": mask,
        "label": torch.tensor([sample["label"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
    }


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """A shuffle of 0..count-1 that depends only on seed and epoch."""
    order: list[int] = draw(seed, epoch).permutation(count).tolist()
    return order
