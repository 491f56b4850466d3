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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from operator import itemgetter
from pathlib import Path, PurePosixPath

import numpy as np

from medvit.io import assembly, faults, headers, nifti
from medvit.io.headers import SliceHeader
from medvit.io.index import Index, Known, Stamp
from medvit.io.inventory import FileEntry, Inventory, Series, stamp_of
from medvit.records import REASONS, Outcome, ReasonCode, ScanError, UsageError

HARMLESS_SUFFIXES = {".csv", ".txt", ".json", ".xml", ".html", ".md", ".pdf", ".jpg", ".jpeg", ".png", ".log", ".ini"}
HARMLESS_SUFFIXES |= {".raw", ".zraw"}  # the pixels of an .mhd or .nhdr, read through it
HARMLESS_SUFFIXES |= {".exe", ".dll", ".so", ".inf", ".bat", ".cmd", ".sh", ".cfg", ".db", ".lnk", ".url"}
HARMLESS_SUFFIXES |= {".htm", ".css", ".js", ".chm", ".rtf", ".ico", ".gif", ".bmp", ".svg"}
HARMLESS_NAMES = {"dicomdir", "lockfile", "version", "readme", "license", ".ds_store"}
"""What exports leave beside images, on a CD with its viewer: no image, nothing to worry about. In lower case."""


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
    with _no_garbage():
        listing = _Listing(root, assume_hu=assume_hu, settled_s=settled_s, progress=progress)
        if index is None:
            listing.walk(None)
        else:
            with Index(index, root, listing.reader) as known:
                listing.walk(known)
        found = listing.inventory()
        del listing  # Python will look through all that is there
    return found


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
        self.root, self.assume_hu, self.tell = root, assume_hu, progress or _silent
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
            # as text: Path would intern every part, and the table of interned text only grows
            with os.scandir(f"{self.root}/{folder}") as listing:
                items = sorted(listing, key=lambda item: item.name)
        except OSError:
            self._set_aside(folder, ReasonCode.NOT_REGULAR, "a folder that cannot be opened")
            return
        files, folders, changed = list[Known](), list[str](), False
        prefix = f"{folder}/" if folder else ""
        known = {each[0]: each for each in index.known(folder)} if index is not None else {}
        for item in items:
            path, before = prefix + item.name, known.pop(item.name, None)
            if item.is_dir(follow_symlinks=False):
                folders.append(path)
                changed |= before is not None
                continue
            self.tell(path)
            if before is not None and _stamp(item) == before[1]:
                self._take(path, before[2])
                files.append(before)
                continue
            changed |= before is not None
            if (found := self._file(item, path)) is not None:
                files.append((item.name, _stamp(item) if index is not None else (0, 0, 0), found))
                changed = True
        if index is not None and (changed or known):  # what is left is gone
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
        self.entries.append(assembly.entry_of(one, REASONS[code].outcome, code, detail))
        if code in BROKEN and one.shared.series_uid:
            # a slice of this series, though it cannot be used: without it the series would be short and not say so
            self.broken.append((one, ScanError(code, f"one of its files: {detail}")))

    def _set_aside(self, path: str, code: ReasonCode, detail: str) -> None:
        """A single file that belongs to no series: skipped if it is harmless, else rejected."""
        outcome = Outcome.SKIP if code is ReasonCode.NOT_DICOM and _harmless(path) else Outcome.REJECT
        self.entries.append(FileEntry(path, outcome, code, detail))

    def inventory(self) -> Inventory:
        """The series and the account of files; what was read for them goes while they come."""
        self.reader.known.clear()
        if not self.entries and not self.slices and not self.volumes:
            raise UsageError(f"{self.root}: the folder is empty. Put the exported DICOM or NIfTI files in it.")
        of_volumes = [entry for volume in self.volumes for entry in _entries_of(volume)]
        series, entries = assembly.assemble(
            self.root, self.slices, self.broken, assume_hu=self.assume_hu, changed_after_ns=self.newest
        )
        entries += self.entries
        if of_volumes:  # detached pixels were also met as files of their own, as slices even
            entries = list({entry.path: entry for entry in (*entries, *of_volumes)}.values())
        entries.sort(key=itemgetter(0))
        return Inventory(self.root, (*self.volumes, *series), tuple(entries))


def _silent(path: str) -> None:
    pass


def _stamp(item: os.DirEntry[str]) -> Stamp:
    try:
        status = item.stat(follow_symlinks=False)
    except OSError:  # gone since the folder was listed: reading it will say so
        return 0, 0, 0
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _entries_of(volume: Series) -> list[FileEntry]:
    code = volume.codes[0] if volume.codes else None
    return [
        FileEntry(name, volume.outcome, code, volume.detail, volume.uid, study_uid=volume.study_uid)
        for name in volume.files
    ]


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
    name = pure.name.lower()  # a mounted CD may show its names in either case
    return pure.suffix.lower() in HARMLESS_SUFFIXES or name in HARMLESS_NAMES or name.startswith(nifti.APPLE_DOUBLE)


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
