"""What a folder holds: its series, and what became of every file. Records, valid once built."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from medvit.records import Outcome, ReasonCode, ScanHeader

if TYPE_CHECKING:
    import pandas as pd


class FileEntry(NamedTuple):
    """What became of one file. `path` is relative to the folder."""

    path: str
    outcome: Outcome
    code: ReasonCode | None = None
    detail: str = ""
    series_uid: str = ""
    sop_uid: str = ""
    study_uid: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One CT series (or volume file) of a folder. Its text, which ends in logs and metadata, holds no path.

    Attributes:
        uid: SeriesInstanceUID; a hash of the relative path for volume files, which have none.
        outcome: ok, flag, quarantine or skip.
        codes: why; empty when ok.
        detail: what was seen, without identity.
        files: relative to `root`, sorted along the slice normal where the series is usable.
        part: 0, 1, ... where one SeriesInstanceUID holds several volumes (phases, kernels); `header.phase` names it.
        stamp: hash of sizes and times of change when it was listed.
        shape: (Z, Y, X) and `spacing_mm` (x, y, z), as far as the headers tell.
    """

    uid: str
    study_uid: str
    root: Path = field(repr=False)
    outcome: Outcome
    codes: tuple[ReasonCode, ...] = ()
    detail: str = ""
    files: tuple[str, ...] = field(default=(), repr=False)
    part: int = 0
    header: ScanHeader = field(default_factory=ScanHeader)
    shape: tuple[int, int, int] = (0, 0, 0)
    spacing_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    axial: bool = True
    assume_hu: bool = False
    stamp: str = ""

    def __str__(self) -> str:
        """A short name of its own, fit for a file: MONAI's SaveImage names what it writes by the text of its source."""
        study, series, part = self.key
        return hashlib.sha256(f"{study} {series} {part}".encode()).hexdigest()[:16]

    @property
    def usable(self) -> bool:
        """Whether it may be read."""
        return self.outcome.used

    @property
    def key(self) -> tuple[str, str, int]:
        """What names this volume in its folder: study, series, part."""
        return self.study_uid, self.uid, self.part


@dataclass(frozen=True)
class Inventory:
    """A folder: its series, and one entry per file."""

    root: Path
    series: tuple[Series, ...]
    files: tuple[FileEntry, ...]

    def counts(self) -> dict[str, int]:
        """Files by outcome; they sum to the files seen."""
        tally = Counter(entry.outcome for entry in self.files)
        return {str(outcome): tally[outcome] for outcome in Outcome}

    def to_frame(self) -> pd.DataFrame:
        """One row per series, for a notebook."""
        import pandas as pd  # noqa: PLC0415  a third of a second that listing a folder does not need

        return pd.DataFrame([_series_row(series) for series in self.series])


def _series_row(series: Series) -> dict[str, object]:
    header = series.header
    return {
        "series_uid": series.uid,
        "outcome": str(series.outcome),
        "codes": " ".join(series.codes),
        "slices": series.shape[0],
        "rows": series.shape[1],
        "columns": series.shape[2],
        "spacing_mm": " x ".join(f"{value:.4g}" for value in series.spacing_mm),
        "kernel": header.kernel,
        "body_part": header.body_part,
        "description": header.description,
        "manufacturer": header.manufacturer,
        "site": header.site,
        "sex": header.sex,
        "age": header.age,
        "study_uid": series.study_uid,
        "detail": series.detail,
    }


def stamp_of(files: Iterable[tuple[str, int, int]]) -> str:
    """Hash of (path, size, time of change) of files, in any order; frames of one file count once."""
    text = "\n".join([f"{name}\0{size} {mtime_ns}" for name, size, mtime_ns in sorted(set(files))])
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
