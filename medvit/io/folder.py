"""A folder -> series, with every file accounted for.

The folder structure and the file names mean nothing: files are grouped by SeriesInstanceUID, judged by what their
headers say, and checked for forming one volume. Each regular file ends in exactly one entry with an outcome.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from medvit.io import dicom, headers, nifti
from medvit.records import REASONS, Outcome, ReasonCode, ScanError, ScanHeader, UsageError

if TYPE_CHECKING:
    import pandas as pd

HARMLESS_SUFFIXES = {".csv", ".txt", ".json", ".xml", ".html", ".md", ".pdf", ".jpg", ".jpeg", ".png", ".log", ".ini"}
HARMLESS_SUFFIXES |= {".raw", ".zraw"}  # the pixels of an .mhd or .nhdr, read through it
HARMLESS_NAMES = {"DICOMDIR", "LOCKFILE", "VERSION", ".DS_Store", "Thumbs.db", "desktop.ini"}
"""What PACS exports leave beside images: no image, nothing to worry about."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What became of one file. `path` is relative to the folder."""

    path: str
    outcome: Outcome
    code: ReasonCode | None = None
    detail: str = ""
    series_uid: str = ""
    sop_uid: str = ""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One CT series (or volume file) of a folder.

    Attributes:
        uid: SeriesInstanceUID; a hash of the relative path for volume files, which have none.
        outcome: ok, flag, quarantine or skip.
        codes: why; empty when ok.
        detail: what was seen, without identity.
        files: relative to `root`, sorted along the slice normal where the series is usable.
        part: 0, 1, ... where one SeriesInstanceUID holds several volumes (phases, kernels); `header.phase` names it.
        shape: (Z, Y, X) and `spacing_mm` (x, y, z), as far as the headers tell.
    """

    uid: str
    study_uid: str
    root: Path
    outcome: Outcome
    codes: tuple[ReasonCode, ...] = ()
    detail: str = ""
    files: tuple[str, ...] = ()
    part: int = 0
    header: ScanHeader = field(default_factory=ScanHeader)
    shape: tuple[int, int, int] = (0, 0, 0)
    spacing_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    axial: bool = True
    assume_hu: bool = False

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


def scan_folder(
    folder: str | Path, *, assume_hu: bool = False, progress: Callable[[str], None] | None = None
) -> Inventory:
    """List the series of a folder and what became of every file.

    Args:
        folder: searched with all subfolders; links are never followed.
        assume_hu: take values without RescaleSlope and RescaleIntercept for HU, and flag them.
        progress: called with each file's relative path before it is read.

    Raises:
        UsageError: no such folder, or nothing in it.
    """
    root = Path(folder)
    if not root.is_dir():
        seen = "a file" if root.exists() else "nothing"
        raise UsageError(f"{root}: expected a folder with CT, saw {seen} there. Check the path and that it is mounted.")
    entries: list[FileEntry] = []
    slices: list[headers.SliceHeader] = []
    volumes: list[Series] = []
    for path, regular in _walk(root):
        name = path.relative_to(root).as_posix()
        if progress is not None:
            progress(name)
        if not regular:
            entries.append(FileEntry(name, Outcome.REJECT, ReasonCode.NOT_REGULAR, "no regular file"))
        elif nifti.is_volume_file(path):
            volumes.append(_list_volume(root, name))
        else:
            _list_dicom(path, name, entries, slices)
    if not entries and not slices and not volumes:
        raise UsageError(f"{root}: the folder is empty. Put the exported DICOM or NIfTI files in it.")
    listed = _list_series(root, _set_duplicates_aside(root, slices, entries), assume_hu=assume_hu)
    series = tuple(_mark_patient_conflicts(listed, slices) + volumes)
    sop_uids = {header.path: header.sop_uid for header in slices}
    entries += [entry for one in series for entry in _entries_of(one, sop_uids)]
    return Inventory(root, series, tuple(sorted(entries, key=lambda entry: entry.path)))


def _walk(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Everything below that is no folder, sorted, and whether it is a regular file; a link to a folder is not."""
    try:
        with os.scandir(folder) as listing:
            items = sorted(listing, key=lambda item: item.name)
    except OSError:
        yield folder, False
        return
    for item in items:
        if item.is_dir(follow_symlinks=False):
            yield from _walk(Path(item.path))
        else:
            yield Path(item.path), item.is_file(follow_symlinks=False)


def _list_dicom(path: Path, name: str, entries: list[FileEntry], slices: list[headers.SliceHeader]) -> None:
    try:
        header = headers.parse(path, name)
    except ScanError as error:
        entries.append(FileEntry(name, _outcome_of(path, error.code), error.code, error.detail))
        return
    if (fault := headers.file_fault(header)) is None:
        slices.append(header)
    else:
        code, detail = fault
        entries.append(FileEntry(name, REASONS[code].outcome, code, detail, header.series_uid, header.sop_uid))


def _outcome_of(path: Path, code: ReasonCode) -> Outcome:
    """A text file beside the images is normal; a file that claims to be an image and is none is a rejected input."""
    if code is ReasonCode.NOT_DICOM:
        harmless = path.suffix.lower() in HARMLESS_SUFFIXES or path.name in HARMLESS_NAMES
        return Outcome.SKIP if harmless else Outcome.REJECT
    # a single file that cannot be read belongs to no series: it is the file that is rejected
    return Outcome.REJECT


def _list_volume(root: Path, name: str) -> Series:
    digest = int(hashlib.sha256(name.encode()).hexdigest()[:32], 16)
    uid = f"2.25.{digest}"  # PS3.5 B.2: UUID-derived
    return Series(uid=uid, study_uid=uid, root=root, outcome=Outcome.OK, files=(name,))


def _set_duplicates_aside(
    root: Path, slices: Sequence[headers.SliceHeader], entries: list[FileEntry]
) -> dict[tuple[str, str], tuple[list[headers.SliceHeader], bool]]:
    """Group by study and series; copies become entries; the flag says that one SOPInstanceUID names different files."""
    grouped: dict[tuple[str, str], list[headers.SliceHeader]] = defaultdict(list)
    for header in slices:
        grouped[header.study_uid, header.series_uid].append(header)
    result = {}
    for key, members in grouped.items():
        by_sop: dict[str, list[headers.SliceHeader]] = defaultdict(list)
        for header in members:
            by_sop[header.sop_uid].append(header)
        conflict = False
        for first, *others in by_sop.values():
            for other in others:
                if _same_bytes(root / first.path, root / other.path):
                    entries.append(
                        FileEntry(
                            other.path,
                            Outcome.SKIP,
                            ReasonCode.DUP_IDENTICAL,
                            "copy of another file",
                            other.series_uid,
                            other.sop_uid,
                        )
                    )
                    members.remove(other)
                else:
                    conflict = True
        result[key] = (members, conflict)
    return result


def _same_bytes(one: Path, other: Path) -> bool:
    return hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest()


def _list_series(
    root: Path, grouped: dict[tuple[str, str], tuple[list[headers.SliceHeader], bool]], *, assume_hu: bool
) -> list[Series]:
    return [_list_one(root, members, conflict=conflict, assume_hu=assume_hu) for members, conflict in grouped.values()]


def _list_one(root: Path, members: list[headers.SliceHeader], *, conflict: bool, assume_hu: bool) -> Series:
    first = members[0]
    series = Series(
        uid=first.series_uid,
        study_uid=first.study_uid,
        root=root,
        outcome=Outcome.OK,
        files=tuple(header.path for header in members),
        header=first.scan,
        shape=(len(members), first.rows, first.columns),
        assume_hu=assume_hu,
    )
    try:
        if conflict:
            raise ScanError(ReasonCode.DUP_CONFLICT, "one SOPInstanceUID names different files")
        stack, codes = dicom.examine(members, assume_hu=assume_hu)
    except ScanError as error:
        return replace(series, outcome=Outcome.QUARANTINE, codes=(error.code,), detail=error.detail)
    x_mm, y_mm, z_mm = (float(value) for value in (stack.affine[:3, :3] ** 2).sum(axis=0) ** 0.5)
    return replace(
        series,
        outcome=Outcome.FLAG if codes else Outcome.OK,
        codes=codes,
        files=tuple(members[index].path for index in stack.order),
        spacing_mm=(x_mm, y_mm, z_mm),
        axial=bool(abs(stack.affine[2, 2]) > 0.5 * z_mm),  # within 60 degrees of the body axis
    )


def _mark_patient_conflicts(series: list[Series], slices: Sequence[headers.SliceHeader]) -> list[Series]:
    """A study with two patients is set aside whole: a result on a wrong patient is the worst result."""
    patients: dict[str, set[tuple[str, str, str]]] = defaultdict(set)
    for header in slices:  # each slice, not one of each series: a single stray one taints its study
        patients[header.study_uid].add(header.patient)
    return [
        replace(
            one,
            outcome=Outcome.QUARANTINE,
            codes=(ReasonCode.PATIENT_CONFLICT,),
            detail="patient id, birth date or sex differ within one study",
        )
        if one.study_uid and len(patients[one.study_uid]) > 1
        else one
        for one in series
    ]


def _entries_of(series: Series, sop_uids: Mapping[str, str]) -> Iterator[FileEntry]:
    code = series.codes[0] if series.codes else None
    for name in series.files:
        yield FileEntry(name, series.outcome, code, series.detail, series.uid, sop_uids.get(name, ""))
