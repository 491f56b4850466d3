"""Decode once: int16 HU slices at the model's size as memory-mapped files, shared by epochs, workers, ranks and runs.

Entries are named by what is in the source files and how it is prepared, so that a moved or copied folder finds them and
a changed file does not. A cache holds pixels, so it is PHI: it lives under the run or under MEDVIT_CACHE, its names are
hashes, and medvit-doctor says how large it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medvit.data.pipelines import Slices, prepare_slices
from medvit.data.sources import content
from medvit.data.store import ArrayStore, CacheFullError
from medvit.io import read_files
from medvit.records import Case, MedvitError, Preprocessing, ReasonCode, Scan, ScanError

FORMAT = 3
"""Raised when cached arrays change meaning."""


def read_case(case: Case, *, assume_hu: bool = False) -> Scan:
    """The scan of a case.

    Raises:
        ScanError: as `medvit.io.read`.
    """
    return read_files([Path(case.root) / name for name in case.files], assume_hu=assume_hu, part=case.part)


@dataclass(frozen=True)
class Failure:
    """A case that could not be read."""

    case: Case
    error: ScanError


class SliceCache:
    """Prepared slices of cases. Pickles to names and keys: worker processes map the same files.

    Args:
        folder: where the files live; made when needed.
        preprocessing: what they are prepared for.
        assume_hu: as `medvit.io.read`.
    """

    def __init__(self, folder: Path, preprocessing: Preprocessing, *, assume_hu: bool = False) -> None:
        self.store, self.preprocessing, self.assume_hu = ArrayStore(folder), preprocessing, assume_hu
        self.keys: dict[tuple[str, str, int], str] = {}

    @property
    def folder(self) -> Path:
        """Where the files live."""
        return self.store.folder

    @property
    def rebuilt(self) -> int:
        """Damaged entries that this process has made again."""
        return self.store.rebuilt

    def key(self, case: Case) -> str:
        """Hash of what the source files hold and of all that the preparation depends on; asked once per case.

        Raises:
            ScanError: the files are missing, unreadable or changing.
        """
        known = (case.root, case.case_id, case.part)
        if known not in self.keys:
            self.keys[known] = self._key(case)
        return self.keys[known]

    def _key(self, case: Case) -> str:
        prepared = f"{FORMAT} {self.preprocessing.size} {self.preprocessing.orientation} {self.assume_hu} {case.part}"
        return hashlib.sha256(f"{prepared} {content(case, self.store)}".encode()).hexdigest()

    def build(
        self, cases: Iterable[Case], progress: Callable[[], None] | None = None
    ) -> tuple[dict[str, str], list[Failure]]:
        """Prepare what is not there yet; a case that cannot be read does not stop the others.

        Returns:
            case_id -> hash of the pixels, and the failures.

        Raises:
            UsageError: the cache cannot be written, or is full.
        """
        self.store.sweep()
        hashes, failures, cases, used = {}, [], list(cases), 0
        for number, case in enumerate(cases):
            try:
                slices = self.load(case)
                hashes[case.case_id] = hashlib.sha256(slices.data).hexdigest()
                used += slices.nbytes
            except ScanError as error:
                failures.append(Failure(case, error))
            except CacheFullError as error:
                if not used:
                    raise
                left = len(cases) - number
                more = left * used / number / 1e6
                raise CacheFullError(f"{error} The {left} cases that are left need about {more:.0f} MB.") from None
            if progress is not None:
                progress()
        return hashes, failures

    def load(self, case: Case) -> Slices:
        """int16 HU (Z, size, size), memory-mapped; prepared first where missing or damaged.

        Raises:
            ScanError: the case cannot be read.
            UsageError: the cache cannot be written, or is full.
        """
        size = self.preprocessing.size
        return self.store.get(f"{self.key(case)}.npy", np.int16, (None, size, size), lambda: self._prepare(case))

    def _prepare(self, case: Case) -> Slices:
        slices = prepare_slices(read_case(case, assume_hu=self.assume_hu), self.preprocessing)
        if self._key(case) != self.key(case):  # these pixels would lie under the name of others
            raise ScanError(ReasonCode.INCOMPLETE, "a file changed while it was read")
        return slices


class FeatureCache:
    """What a frozen backbone makes of slices, one (Z, ...) float32 array per case, keyed by slices and backbone.

    Args:
        slices: what it is shown.
        backbone_hash: of its weights, and of all else that features depend on.
        shape: of what it makes of one slice; None is any length.
    """

    def __init__(self, slices: SliceCache, backbone_hash: str, shape: tuple[int | None, ...] = (None,)) -> None:
        self.slices, self.backbone_hash, self.shape = slices, backbone_hash, shape

    def name(self, case: Case) -> str:
        """File name of the features of a case."""
        return hashlib.sha256(f"{self.slices.key(case)} {self.backbone_hash}".encode()).hexdigest() + ".features.npy"

    def find(self, case: Case) -> npt.NDArray[np.float32] | None:
        """(Z, ...) memory-mapped; None where not computed yet, or damaged."""
        return self.slices.store.find(self.name(case), np.float32, (None, *self.shape))

    def load(self, case: Case) -> npt.NDArray[np.float32]:
        """(Z, ...) memory-mapped.

        Raises:
            MedvitError: they are not there (any more).
        """
        if (found := self.find(case)) is None:
            raise MedvitError("cached features were lost or damaged while they were in use. Run again with --resume.")
        return found

    def save(self, case: Case, features: npt.NDArray[np.float32]) -> None:
        """Keep the features (Z, ...) of a case.

        Raises:
            UsageError: the cache cannot be written, or is full.
        """
        self.slices.store.put(self.name(case), features)
