"""A folder -> series, with every file accounted for.

The folder structure and the file names mean nothing: files are grouped by SeriesInstanceUID, judged by what their
headers say, told apart where several volumes share a series, and checked for forming one volume each. Each regular file
ends in exactly one entry with an outcome.
"""

from __future__ import annotations

import gc
import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import itemgetter
from pathlib import Path, PurePosixPath

import numpy as np

from medvit.io import dicom, faults, grouping, headers, nifti
from medvit.io.headers import SliceHeader
from medvit.io.index import Index, Known, Stamp
from medvit.io.inventory import FileEntry, Inventory, Series, stamp_of
from medvit.records import REASONS, Outcome, ReasonCode, ScanError, UsageError

HARMLESS_SUFFIXES = {".csv", ".txt", ".json", ".xml", ".html", ".md", ".pdf", ".jpg", ".jpeg", ".png", ".log", ".ini"}
HARMLESS_SUFFIXES |= {".raw", ".zraw"}  # the pixels of an .mhd or .nhdr, read through it
HARMLESS_NAMES = {"DICOMDIR", "LOCKFILE", "VERSION", ".DS_Store", "Thumbs.db", "desktop.ini"}
"""What PACS exports leave beside images: no image, nothing to worry about."""


BROKEN = {ReasonCode.TAG_INVALID, ReasonCode.UNSAFE_NAME, ReasonCode.MULTIFRAME_UNSUPPORTED}
"""Faults of a file that set its whole series aside; a colour image, a localizer or another modality is none of it."""

ARCHIVES = {
    b"PK\x03\x04": 0,
    b"PK\x05\x06": 0,
    b"\x1f\x8b": 0,
    b"7z\xbc\xaf": 0,
    b"Rar!": 0,
    b"BZh": 0,
    b"\xfd7zXZ": 0,
    b"ustar": 257,
}
"""How archives begin, and at which byte. They are never opened."""


def scan_folder(
    folder: str | Path,
    *,
    assume_hu: bool = False,
    index: Path | None = None,
    settled_s: float = 0.0,
    progress: Callable[[str], None] | None = None,
) -> Inventory:
    """List the series of a folder and what became of every file.

    Args:
        folder: searched with all subfolders; links are never followed.
        assume_hu: take values without RescaleSlope and RescaleIntercept for HU, and flag them.
        index: file that remembers headers between runs, identity included; only new files are opened then.
        settled_s: a series with a file changed within this many seconds is still arriving: `INCOMPLETE`.
        progress: called with each file's relative path before it is read.

    Raises:
        UsageError: no such folder, or nothing in it.
    """
    root = Path(folder)
    if not root.is_dir():
        seen = "a file" if root.exists() else "nothing"
        raise UsageError(f"{root}: expected a folder with CT, saw {seen} there. Check the path and that it is mounted.")
    listing = _Listing(root, assume_hu=assume_hu, settled_s=settled_s, progress=progress)
    with _no_garbage():
        if index is None:
            listing.walk(None)
        else:
            with Index(index, root, listing.reader) as known:
                listing.walk(known)
        return listing.inventory()


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Hundreds of thousands of records are made and none is dropped: Python need not look for garbage meanwhile."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _Listing:
    """One pass over a folder: slices, volume files, and entries of everything else."""

    def __init__(
        self, root: Path, *, assume_hu: bool, settled_s: float, progress: Callable[[str], None] | None
    ) -> None:
        self.root, self.assume_hu, self.progress = root, assume_hu, progress
        self.newest = time.time_ns() - int(settled_s * 1e9) if settled_s else 0
        self.reader = headers.HeaderReader()
        self.entries: list[FileEntry] = []
        self.slices: list[SliceHeader] = []
        self.broken: list[tuple[SliceHeader, ScanError]] = []
        self.volumes: list[Series] = []
        self.folders: list[str] = []

    def walk(self, index: Index | None) -> None:
        """Read all that is below the root; however deep, for a stack of our own is not the interpreter's."""
        self.folders = [""]
        while self.folders:
            self._visit(index, self.folders.pop())

    def _visit(self, index: Index | None, folder: str) -> None:
        """Read the files of one folder, given relative to the root; its subfolders are next."""
        try:
            with os.scandir(self.root / folder) as listing:
                items = sorted(listing, key=lambda item: item.name)
        except OSError:
            self._set_aside(folder, ReasonCode.NOT_REGULAR, "a folder that cannot be opened")
            return
        known = index.known(folder) if index is not None else iter(())
        before, prefix, changed = next(known, None), f"{folder}/" if folder else "", False
        files, folders = list[Known](), list[str]()
        tell = self.progress
        for item in items:
            name, path = item.name, prefix + item.name
            while before is not None and before[0] < name:
                before, changed = next(known, None), True
            if before is not None and before[0] == name:
                if _stamp(item) == before[1]:
                    if tell is not None:
                        tell(path)
                    self._take(path, before[2])
                    files.append(before)
                    before = next(known, None)
                    continue
                before = next(known, None)
            if item.is_dir(follow_symlinks=False):
                folders.append(path)
                continue
            if tell is not None:
                tell(path)
            if (found := self._file(item, path)) is not None:
                files.append((name, _stamp(item) if index is not None else (0, 0, 0), found))
                changed = True
        if index is not None and (changed or before is not None):
            index.keep(folder, files)
        self.folders += reversed(folders)

    def _file(self, item: os.DirEntry[str], path: str) -> list[SliceHeader] | ScanError | None:
        """What the header of a file says; None for what has none to remember."""
        if not item.is_file(follow_symlinks=False):
            self._set_aside(path, ReasonCode.NOT_REGULAR, "no regular file")
            return None
        if nifti.is_volume_file(path):
            self.volumes.append(_list_volume(self.root, path))
            return None
        found = self._read(item.path, path)
        self._take(path, found)
        return found

    def _read(self, full_path: str, path: str) -> list[SliceHeader] | ScanError:
        try:
            return self.reader.read(full_path, path)
        except ScanError as error:
            return _as_archive(full_path, error) if error.code is ReasonCode.NOT_DICOM else error

    def _take(self, path: str, found: list[SliceHeader] | ScanError) -> None:
        if isinstance(found, ScanError):
            self._set_aside(path, found.code, found.detail)
            return
        if len(found) == 1 and faults.file_fault(found[0]) is None:
            self.slices.append(found[0])
            return
        judged = {faults.file_fault(one) for one in found}
        if judged == {None}:
            self.slices += found
            return
        fault = judged.pop() if len(judged) == 1 else None
        code, detail = fault or (ReasonCode.MULTIFRAME_UNSUPPORTED, "frames of different kinds in one object")
        one = found[0]
        self.entries.append(_entry_of(one, REASONS[code].outcome, code, detail))
        if code in BROKEN and one.shared.series_uid:
            # a slice of this series, though it cannot be used: without it the series would be short and not say so
            self.broken.append((one, ScanError(code, f"one of its files: {detail}")))

    def _set_aside(self, path: str, code: ReasonCode, detail: str) -> None:
        """A single file that belongs to no series: skipped if it is harmless, else rejected."""
        outcome = Outcome.SKIP if code is ReasonCode.NOT_DICOM and _harmless(path) else Outcome.REJECT
        self.entries.append(FileEntry(path, outcome, code, detail))

    def inventory(self) -> Inventory:
        """The series and the account of files."""
        if not self.entries and not self.slices and not self.volumes:
            raise UsageError(f"{self.root}: the folder is empty. Put the exported DICOM or NIfTI files in it.")
        grouped: dict[tuple[str, str], list[SliceHeader]] = defaultdict(list)
        for one in self.slices:
            grouped[one.shared.study_uid, one.shared.series_uid].append(one)
        copies, conflicts = self._duplicates()
        mixed, torn = _mixed_studies(self.slices), _torn_series(self.slices)
        # a broken copy of a whole slice takes nothing away
        whole = {one.sop_uid for one in self.slices} if self.broken else set()
        broken = {
            (one.shared.study_uid, one.shared.series_uid): error
            for one, error in self.broken
            if one.sop_uid not in whole
        }
        self.slices = []  # one reference less to a hundred thousand records
        series, entries = list(self.volumes), self.entries
        owners = {name: volume for volume in self.volumes for name in volume.files}
        entries = [entry for entry in entries if entry.path not in owners]  # detached pixels, met as files of their own
        for name, volume in owners.items():
            code = volume.codes[0] if volume.codes else None
            entry = FileEntry(name, volume.outcome, code, volume.detail, volume.uid)
            entries.append(entry._replace(study_uid=volume.study_uid))
        for key, members in grouped.items():
            kept = [one for one in members if one.path not in copies] if copies else members
            fault = None
            if key[0] in mixed:
                # a study with two patients is set aside whole: a result on a wrong patient is the worst result
                detail = "patient id, birth date or sex differ within one study"
                fault = ScanError(ReasonCode.PATIENT_CONFLICT, detail)
            elif key in broken:
                fault = broken[key]
            elif key in torn:
                fault = ScanError(ReasonCode.TAG_INVALID, "one SeriesInstanceUID of one patient in several studies")
            elif key in conflicts:
                fault = ScanError(ReasonCode.DUP_CONFLICT, "one SOPInstanceUID names different files")
            elif self.newest and any(one.stamp[1] > self.newest for one in kept):
                fault = ScanError(ReasonCode.INCOMPLETE, "a file was changed just now")
            found = self._volumes_of(kept, fault)
            series += found
            entries += _account(found, kept)
        return Inventory(self.root, tuple(series), tuple(sorted(entries, key=itemgetter(0))))

    def _duplicates(self) -> tuple[set[str], set[tuple[str, str]]]:
        """Paths of byte-identical copies, which become entries; and series in which one UID names different files."""
        files = [one for one in self.slices if one.frame == 0]
        uids = {one.sop_uid for one in files}
        if len(uids) == len(files):
            return set(), set()
        same: dict[str, list[SliceHeader]] = defaultdict(list)
        for one in files:
            same[one.sop_uid].append(one)
        copies, conflicts = set(), set()
        for first, *others in same.values():
            for other in others:
                if _same_bytes(self.root / first.path, self.root / other.path):
                    copies.add(other.path)
                    detail = "copy of another file"
                    self.entries.append(_entry_of(other, Outcome.SKIP, ReasonCode.DUP_IDENTICAL, detail))
                else:
                    conflicts |= {(one.shared.study_uid, one.shared.series_uid) for one in (first, other)}
        return copies, conflicts

    def _volumes_of(self, members: list[SliceHeader], fault: ScanError | None) -> list[Series]:
        """What slices of one SeriesInstanceUID make: one series, one for each volume, or one that is set aside."""
        try:
            if fault is not None:
                raise fault
            flags = dicom.check_headers(members, assume_hu=self.assume_hu)
            parts = grouping.split(members)
        except ScanError as error:
            return [self._refused(members, error)]
        everything = headers.names_of(members) if any(one.frame for one in members) else ()  # parts may share a file
        return [
            self._volume(part, number, flags, everything, one_of_several=len(parts.volumes) > 1)
            for number, part in enumerate(parts.volumes)
        ]

    def _refused(self, members: Sequence[SliceHeader], error: ScanError, part: int = 0, phase: str = "") -> Series:
        first = members[0].shared
        return Series(
            uid=first.series_uid,
            study_uid=first.study_uid,
            root=self.root,
            outcome=Outcome.QUARANTINE,
            codes=(error.code,),
            detail=error.detail,
            files=headers.names_of(members),
            part=part,
            header=replace(first.scan, phase=phase),
            shape=(len(members), first.rows, first.columns),
            assume_hu=self.assume_hu,
        )

    def _volume(
        self,
        part: grouping.Part,
        number: int,
        flags: tuple[ReasonCode, ...],
        everything: tuple[str, ...],
        *,
        one_of_several: bool,
    ) -> Series:
        try:
            volume = dicom.examine(part, flags, assume_hu=self.assume_hu)
        except ScanError as error:
            return self._refused(part.slices, error, number, part.phase)
        codes = tuple(dict.fromkeys((*volume.codes, *([ReasonCode.MULTIPHASE] if one_of_several else []))))
        files = everything or headers.names_of(volume.slices)
        x_mm, y_mm, z_mm = (float(value) for value in np.linalg.norm(volume.affine[:3, :3], axis=0))
        return Series(
            uid=part.slices[0].shared.series_uid,
            study_uid=part.slices[0].shared.study_uid,
            root=self.root,
            outcome=Outcome.FLAG if codes else Outcome.OK,
            codes=codes,
            detail=part.phase if one_of_several else "",
            files=files,
            part=number,
            header=replace(part.slices[0].shared.scan, phase=part.phase),
            shape=volume.shape,
            spacing_mm=(x_mm, y_mm, z_mm),
            axial=bool(abs(volume.affine[2, 2]) > 0.5 * z_mm),  # within 60 degrees of the body axis
            assume_hu=self.assume_hu,
            stamp=stamp_of((one.path, *one.stamp) for one in volume.slices),
        )


def _stamp(item: os.DirEntry[str]) -> Stamp:
    try:
        status = item.stat(follow_symlinks=False)
    except OSError:  # gone since the folder was listed: reading it will say so
        return 0, 0, 0
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _mixed_studies(slices: Iterable[SliceHeader]) -> set[str]:
    """Studies with more than one patient: each slice counts, a single stray one taints its study."""
    patients: dict[str, set[tuple[str, str, str]]] = defaultdict(set)
    for shared in headers.shared_by(slices).values():
        patients[shared.study_uid].add(shared.patient)
    return {study for study, found in patients.items() if study and faults.differ(found)}


def _torn_series(slices: Iterable[SliceHeader]) -> set[tuple[str, str]]:
    """Series (study, series) whose UID one patient has in several studies: one series, torn by whoever changed them."""
    studies: dict[tuple[object, ...], set[str]] = defaultdict(set)
    for shared in headers.shared_by(slices).values():
        studies[shared.series_uid, shared.frame_of_reference, shared.patient].add(shared.study_uid)
    return {(study, key[0]) for key, found in studies.items() if len(found) > 1 for study in found}  # type: ignore[misc]


def _account(series: Sequence[Series], members: Sequence[SliceHeader]) -> list[FileEntry]:
    """One entry for each file of one SeriesInstanceUID; a file that several volumes share is used if one of them is."""
    owner: dict[str, Series] = {}
    for one in series:
        for name in one.files:
            if name not in owner or not owner[name].usable:
                owner[name] = one
    entries = []
    for header in members:
        if header.frame:
            continue
        if (found := owner.get(header.path)) is not None:
            entries.append(_entry_of(header, found.outcome, found.codes[0] if found.codes else None, found.detail))
        else:
            detail = "localizer: turned against the other slices of its series"
            entries.append(_entry_of(header, Outcome.SKIP, ReasonCode.NOT_VOLUME, detail))
    return entries


def _entry_of(one: SliceHeader, outcome: Outcome, code: ReasonCode | None, detail: str) -> FileEntry:
    return FileEntry(one.path, outcome, code, detail, one.shared.series_uid, one.sop_uid, one.shared.study_uid)


def _as_archive(path: str, error: ScanError) -> ScanError:
    """The refusal of a file that is no DICOM, for another reason where it is an archive."""
    try:
        with open(path, "rb") as stream:  # noqa: PTH123  a str is at hand
            head = stream.read(512)
    except OSError:
        return error
    if any(head[at : at + len(magic)] == magic for magic, at in ARCHIVES.items()):
        return ScanError(ReasonCode.ARCHIVE_LIMIT, "an archive", error.files)
    return error


def _harmless(path: str) -> bool:
    """A text file beside the images is normal; a file that claims to be an image and is none is a rejected input."""
    pure = PurePosixPath(path)
    return pure.suffix.lower() in HARMLESS_SUFFIXES or pure.name in HARMLESS_NAMES


def _same_bytes(one: Path, other: Path) -> bool:
    digests = []
    for path in (one, other):
        try:
            with path.open("rb") as stream:
                digests.append(hashlib.file_digest(stream, "sha256").digest())
        except OSError:  # what cannot be compared is not called a copy
            return False
    return digests[0] == digests[1]


def _list_volume(root: Path, name: str) -> Series:
    """A volume file as a series, judged by its header; its pixels may be in a second file."""
    uid = f"2.25.{int(hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:32], 16)}"  # PS3.5 B.2
    series = Series(uid=uid, study_uid=uid, root=root, outcome=Outcome.OK, files=(name,))
    try:
        header = nifti.examine(root / name)
        files = tuple(dict.fromkeys((name, header.pixels.path.relative_to(root).as_posix())))
        stamps = [(each, (root / each).stat()) for each in files]
    except OSError:
        return replace(series, outcome=Outcome.REJECT, codes=(ReasonCode.IO_ERROR,), detail="gone while it was listed")
    except ScanError as error:
        bad = REASONS[error.code].outcome if REASONS[error.code].outcome.bad else Outcome.QUARANTINE
        return replace(series, outcome=bad, codes=(error.code,), detail=error.detail)
    x_mm, y_mm, z_mm = (float(value) for value in np.linalg.norm(header.affine[:3, :3], axis=0))
    return replace(
        series,
        outcome=Outcome.FLAG if header.codes else Outcome.OK,
        codes=header.codes,
        shape=header.shape,
        spacing_mm=(x_mm, y_mm, z_mm),
        axial=bool(abs(header.affine[2, 2]) > 0.5 * z_mm),
        files=files,
        stamp=stamp_of((each, status.st_size, status.st_mtime_ns) for each, status in stamps),
    )
