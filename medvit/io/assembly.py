"""Slices of a whole folder -> series, and what became of each file.

Slices are grouped by StudyInstanceUID and SeriesInstanceUID. What concerns more than one series is judged here: copies,
one UID on different files, a study with two patients. Each group then becomes one volume, several, or is set aside.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from medvit.io import dicom, faults, grouping, headers
from medvit.io.headers import SharedHeader, SliceHeader
from medvit.io.inventory import FileEntry, Series, stamp_of
from medvit.records import Outcome, ReasonCode, ScanError, ScanHeader

SeriesKey = tuple[str, str]
"""(StudyInstanceUID, SeriesInstanceUID)."""

Fate = tuple[Outcome, ReasonCode | None, str]
"""What became of a file, why, and what was seen."""

TURNED: Fate = (Outcome.SKIP, ReasonCode.NOT_VOLUME, "localizer: turned against the other slices of its series")

Broken = tuple[SliceHeader, ScanError]
"""A slice that cannot be used, and why its series cannot be either."""


def assemble(
    root: Path,
    slices: list[SliceHeader],
    broken: Sequence[Broken],
    *,
    assume_hu: bool,
    changed_after_ns: int = 0,
) -> tuple[list[Series], list[FileEntry]]:
    """Series that slices form, and one entry for each of their files.

    Args:
        root: what the paths of slices are relative to.
        slices: of all series, in any order; the list is emptied, so that they go while series and entries come.
        broken: further slices; without them their series would be short and not say so.
        assume_hu: take values without RescaleSlope and RescaleIntercept for HU, and flag them.
        changed_after_ns: a series with a file changed later than this is still arriving; 0: none is.
    """
    copies, conflicts = _duplicates(root, slices)
    grouped: dict[SeriesKey, list[SliceHeader]] = defaultdict(list)
    for one in slices:
        grouped[one.shared.study_uid, one.shared.series_uid].append(one)
    faulty = _faults(slices, broken, conflicts)
    entries = [
        entry_of(one, Outcome.SKIP, ReasonCode.DUP_IDENTICAL, "copy of another file")
        for one in slices
        if copies and one.path in copies and one.frame == 0
    ]
    slices.clear()
    series: list[Series] = []
    for key in list(grouped):
        members = grouped.pop(key)
        kept = [one for one in members if one.path not in copies] if copies else members
        fault = faulty.get(key)
        if fault is None and changed_after_ns and any(one.mtime_ns > changed_after_ns for one in kept):
            fault = ScanError(ReasonCode.INCOMPLETE, "a file was changed just now")
        found = _Group(root, kept, assume_hu=assume_hu).volumes(fault)
        series += found
        entries += _account(found, kept)
    return series, entries


def entry_of(one: SliceHeader, outcome: Outcome, code: ReasonCode | None, detail: str) -> FileEntry:
    """What became of the file of a slice."""
    return FileEntry(one.path, outcome, code, detail, one.shared.series_uid, one.sop_uid, one.shared.study_uid)


def _faults(
    slices: Sequence[SliceHeader], broken: Sequence[Broken], conflicts: set[SeriesKey]
) -> dict[SeriesKey, ScanError]:
    """Why a series may not be used, from what the folder holds beside it; the gravest reason of several."""
    found: dict[SeriesKey, ScanError] = {}
    kinds = tuple(headers.shared_by(slices).values())  # few, of a hundred thousand slices
    for key in conflicts:
        found[key] = ScanError(ReasonCode.DUP_CONFLICT, "one SOPInstanceUID names different files")
    for key in _torn_series(kinds):
        found[key] = ScanError(ReasonCode.TAG_INVALID, "one SeriesInstanceUID of one patient in several studies")
    # a broken copy of a whole slice takes nothing away
    whole = {one.sop_uid for one in slices} if broken else set()
    for one, error in broken:
        if one.sop_uid not in whole:
            found[one.shared.study_uid, one.shared.series_uid] = error
    if mixed := _mixed_studies(kinds):
        # a study with two patients is set aside whole: a result on a wrong patient is the worst result
        detail = "patient id, birth date or sex differ within one study"
        for shared in kinds:
            if shared.study_uid in mixed:
                found[shared.study_uid, shared.series_uid] = ScanError(ReasonCode.PATIENT_CONFLICT, detail)
    return found


def _mixed_studies(kinds: Iterable[SharedHeader]) -> set[str]:
    """Studies with more than one patient: each slice counts, a single stray one taints its study."""
    patients: dict[str, set[tuple[str, str, str]]] = defaultdict(set)
    for shared in kinds:
        patients[shared.study_uid].add(shared.patient)
    return {study for study, found in patients.items() if study and faults.differ(found)}


def _torn_series(kinds: Iterable[SharedHeader]) -> set[SeriesKey]:
    """Series whose UID one patient has in several studies: one series, torn by whoever changed them."""
    studies: dict[tuple[object, ...], set[SeriesKey]] = defaultdict(set)
    for shared in kinds:
        one = (shared.series_uid, shared.frame_of_reference, shared.patient)
        studies[one].add((shared.study_uid, shared.series_uid))
    return {key for found in studies.values() if len(found) > 1 for key in found}


def _duplicates(root: Path, slices: Sequence[SliceHeader]) -> tuple[set[str], set[SeriesKey]]:
    """Paths of byte-identical copies; and series in which one SOPInstanceUID names different files."""
    files = [one for one in slices if one.frame == 0]
    if len({one.sop_uid for one in files}) == len(files):
        return set(), set()
    same: dict[str, list[SliceHeader]] = defaultdict(list)
    for one in files:
        same[one.sop_uid].append(one)
    copies, conflicts = set(), set()
    for first, *others in same.values():
        for other in others:
            if _same_bytes(root / first.path, root / other.path):
                copies.add(other.path)
            else:
                conflicts |= {(one.shared.study_uid, one.shared.series_uid) for one in (first, other)}
    return copies, conflicts


def _same_bytes(one: Path, other: Path) -> bool:
    digests = []
    for path in (one, other):
        try:
            with path.open("rb") as stream:
                digests.append(hashlib.file_digest(stream, "sha256").digest())
        except OSError:  # what cannot be compared is not called a copy
            return False
    return digests[0] == digests[1]


@dataclass(frozen=True)
class _Group:
    """Slices of one study and SeriesInstanceUID."""

    root: Path
    members: Sequence[SliceHeader]
    assume_hu: bool

    def volumes(self, fault: ScanError | None) -> list[Series]:
        """What they make: one series, one for each volume, or one that is set aside."""
        try:
            if fault is not None:
                raise fault
            flags = dicom.check_headers(self.members, assume_hu=self.assume_hu)
            parts = grouping.split(self.members).volumes
        except ScanError as error:
            return [self._refused(self.members, error)]
        if len(parts) > 1:
            flags = (*flags, ReasonCode.MULTIPHASE)
        names = [name for part in parts for name in headers.names_of(part.slices)]
        # frames of one file in several volumes: each is read from all files, and told which it is
        whole = self.members if len(set(names)) < len(names) else None
        return [
            self._volume(part, number if len(parts) > 1 else None, flags, whole) for number, part in enumerate(parts)
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
            header=_of_phase(first.scan, phase),
            shape=(len(members), first.rows, first.columns),
            assume_hu=self.assume_hu,
        )

    def _volume(
        self,
        part: grouping.Part,
        number: int | None,
        flags: tuple[ReasonCode, ...],
        whole: Sequence[SliceHeader] | None,
    ) -> Series:
        """A volume as a series; `number` is None where it is the only one, `whole` where its files are its own."""
        try:
            volume = dicom.examine(part, flags, assume_hu=self.assume_hu)
        except ScanError as error:
            return self._refused(part.slices, error, number or 0, part.phase)
        sources = volume.slices if whole is None else whole
        x_mm, y_mm, z_mm = (float(value) for value in np.linalg.norm(volume.affine[:3, :3], axis=0))
        return Series(
            uid=part.slices[0].shared.series_uid,
            study_uid=part.slices[0].shared.study_uid,
            root=self.root,
            outcome=Outcome.FLAG if volume.codes else Outcome.OK,
            codes=volume.codes,
            detail="" if number is None else part.phase,
            files=headers.names_of(sources),
            part=number or 0,
            header=_of_phase(part.slices[0].shared.scan, part.phase),
            shape=_one_shape(volume.shape),
            spacing_mm=_one_spacing((x_mm, y_mm, z_mm)),
            axial=bool(abs(volume.affine[2, 2]) > 0.5 * z_mm),  # within 60 degrees of the body axis
            assume_hu=self.assume_hu,
            stamp=stamp_of((one.path, one.size, one.mtime_ns) for one in sources),
        )


@lru_cache(maxsize=1024)
def _one_shape(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """The same object for equal ones: an export has few, of a hundred thousand series."""
    return shape


@lru_cache(maxsize=1024)
def _one_spacing(spacing_mm: tuple[float, float, float]) -> tuple[float, float, float]:
    """As `_one_shape`; apart from it, since (2, 2, 2) equals (2.0, 2.0, 2.0)."""
    return spacing_mm


def _of_phase(header: ScanHeader, phase: str) -> ScanHeader:
    """The same object where the phase is: that of most series is empty."""
    return header if header.phase == phase else replace(header, phase=phase)


def _account(series: Sequence[Series], members: Sequence[SliceHeader]) -> list[FileEntry]:
    """One entry for each file of one SeriesInstanceUID; a file that several volumes share is used if one of them is."""
    fate: dict[str, Fate] = {}
    used = [one for one in reversed(series) if one.usable]
    for one in (*(each for each in series if not each.usable), *used):  # the last to claim a file owns it
        fate |= dict.fromkeys(one.files, (one.outcome, one.codes[0] if one.codes else None, one.detail))
    study, uid = members[0].shared.study_uid, members[0].shared.series_uid
    return [
        FileEntry(one.path, *fate.get(one.path, TURNED), uid, one.sop_uid, study) for one in members if not one.frame
    ]
