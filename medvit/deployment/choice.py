"""Which studies of a folder are predicted now: all that are new or have changed, less what the operator leaves out."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path, PurePosixPath

from medvit.data.manifest import unlabelled_cases
from medvit.data.selection import NotSelected
from medvit.deployment.ledger import Ledger, Result, State
from medvit.io import Inventory, Series
from medvit.records import Case, Outcome, ReasonCode

PASSING = {str(ReasonCode.IO_ERROR), str(ReasonCode.INCOMPLETE)}
"""Reasons that may be gone the next time though no file has changed."""


REPEATED = {str(ReasonCode.WORKER_DIED)}
"""Why a prediction has no report although it might have one: tried again by each run."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What an operator asks for; the default is everything.

    Attributes:
        since: studies with a file that arrived or changed since; None: all.
        limit: at most so many in this run; None: no limit.
        studies: these StudyInstanceUIDs alone; empty: all.
        retry: reason codes of studies that are tried again though nothing has changed.
        shard: (i, n): the i-th of n parts of all studies, 1 <= i <= n.
    """

    since: datetime | None = None
    limit: int | None = None
    studies: frozenset[str] = frozenset()
    retry: frozenset[str] = frozenset()
    shard: tuple[int, int] = (1, 1)

    def mine(self, name: str) -> bool:
        """Whether what bears this name, a study or a file of none, belongs to the shard."""
        number, count = self.shard
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
        return count == 1 or int.from_bytes(digest[:8], "big") % count == number - 1


@dataclass(frozen=True)
class Listed:
    """A study of the folder: what it is called, the case that stands for it, and the series as it was listed."""

    study: str
    case: Case
    series: Series

    @property
    def fingerprint(self) -> str:
        """Changes when a slice arrives, goes or changes, or another series is chosen."""
        return fingerprint((self.series,))


@dataclass(frozen=True)
class Studies:
    """Studies of a folder.

    Attributes:
        listed: those with a usable series.
        not_selected: volumes that were passed over.
        unusable: study -> its series, where none can be used.
        series: all, as they are judged here: a study of which something is just arriving waits as a whole.
    """

    listed: tuple[Listed, ...]
    not_selected: tuple[NotSelected, ...]
    unusable: Mapping[str, tuple[Series, ...]]
    series: tuple[Series, ...]


def fingerprint(series: Iterable[Series]) -> str:
    """Hash of which series these are and what their files were like."""
    lines = sorted(f"{one.uid} {one.part} {one.stamp}" for one in series)
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def study_of(series: Series | Case) -> str:
    """What a study is called: its UID; that of the series where there is none."""
    return series.study_uid or (series.uid if isinstance(series, Series) else series.series_uid)


def list_studies(inventory: Inventory, wanted: Wanted, name: Callable[[str], str]) -> Studies:
    """The studies of this shard, under names of their own."""
    waiting = _torn(inventory) | {study_of(s) for s in inventory.series if PASSING.intersection(s.codes)}
    mine = tuple(
        _held_back(series) if series.usable and study_of(series) in waiting else series
        for series in inventory.series
        if wanted.mine(study_of(series))
    )
    cases, not_selected = unlabelled_cases(Inventory(inventory.root, mine, inventory.files))
    by_key = {series.key: series for series in mine}
    listed = tuple(
        Listed(name(study_of(case)), case, by_key[case.study_uid, case.series_uid, case.part]) for case in cases
    )
    usable = {one.study for one in listed}
    unusable: dict[str, tuple[Series, ...]] = {}
    for series in mine:
        if (study := name(study_of(series))) not in usable:
            unusable[study] = (*unusable.get(study, ()), series)
    return Studies(listed, not_selected, unusable, mine)


def _torn(inventory: Inventory) -> set[str]:
    """Studies that share a folder with no other study, but with a file that could not be read: it may be of theirs.

    A slice amidst the others would be missed; the first or last would not.
    """
    unread = {PurePosixPath(entry.path).parent for entry in inventory.files if entry.code is ReasonCode.IO_ERROR}
    beside: dict[PurePosixPath, set[str]] = defaultdict(set)
    for series in inventory.series if unread else ():
        for folder in {PurePosixPath(path).parent for path in series.files} & unread:
            beside[folder].add(study_of(series))
    return {study for studies in beside.values() if len(studies) == 1 for study in studies}


def _held_back(series: Series) -> Series:
    detail = "something of its study is still arriving, or could not be read"
    return replace(series, outcome=Outcome.QUARANTINE, codes=(ReasonCode.INCOMPLETE,), detail=detail)


def choose_due(studies: Iterable[Listed], ledger: Ledger, wanted: Wanted) -> list[Listed]:
    """Those that are to be predicted, whatever the limit; what failed before comes last, or it would starve others."""
    due: list[Listed] = []
    again: list[Listed] = []
    for one in studies:
        known = ledger.find(one.study)
        if _asked_for(one, known, wanted) and _open(one, known, ledger.path.parent, wanted):
            (again if known is not None and known.code in PASSING else due).append(one)
    return due + again


def _asked_for(one: Listed, known: Result | None, wanted: Wanted) -> bool:
    if wanted.studies and one.case.study_uid not in wanted.studies:
        return False
    if wanted.since is None or (known is not None and (known.state is State.WAITING or known.code in PASSING)):
        return True  # what an interrupted run left was asked for then
    return _newest(one.case) >= wanted.since.timestamp()


def _open(one: Listed, known: Result | None, output: Path, wanted: Wanted) -> bool:
    if known is None or known.fingerprint != one.fingerprint or known.state is State.WAITING:
        return True
    if known.state is State.FAILED:
        return known.code in PASSING | wanted.retry
    if known.code:  # predicted, but the report could not be made
        return known.code in REPEATED | wanted.retry
    return not all((output / name).is_file() for name in (known.sr, known.sc) if name)


def _newest(case: Case) -> float:
    """When a file of a case last arrived or changed, seconds since 1970; infinite where that cannot be told."""
    try:
        found = [(Path(case.root) / name).stat() for name in case.files]
    except OSError:
        return float("inf")
    return max(max(one.st_mtime, one.st_ctime) for one in found)  # a copy keeps the time of its source
