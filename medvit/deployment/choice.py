"""Which studies of a folder are predicted now: all that are new or have changed, less what the operator leaves out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from medvit.data.manifest import unlabelled_cases
from medvit.data.selection import NotSelected
from medvit.deployment.ledger import Ledger, Result, State
from medvit.io import Inventory, Series
from medvit.records import Case, ReasonCode

PASSING = {str(ReasonCode.IO_ERROR), str(ReasonCode.INCOMPLETE)}
"""Reasons that may be gone the next time though no file has changed."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What an operator asks for; the default is everything.

    Attributes:
        since: studies with a file that changed since; None: all.
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
    """A study of the folder: the case that stands for it, and what its files were like when listed."""

    study: str
    case: Case
    fingerprint: str
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Studies:
    """Studies of a folder.

    Attributes:
        listed: those with a usable series.
        not_selected: volumes that were passed over.
        unusable: study -> its first series, where none can be used.
    """

    listed: tuple[Listed, ...]
    not_selected: tuple[NotSelected, ...]
    unusable: Mapping[str, Series]


def study_of(series: Series | Case) -> str:
    """What a study is called: its UID; that of the series where there is none."""
    return series.study_uid or (series.uid if isinstance(series, Series) else series.series_uid)


def list_studies(inventory: Inventory, wanted: Wanted, name: Callable[[str], str]) -> Studies:
    """The studies of this shard, under names of their own."""
    mine = Inventory(inventory.root, tuple(s for s in inventory.series if wanted.mine(study_of(s))), inventory.files)
    cases, not_selected = unlabelled_cases(mine)
    by_key = {series.key: series for series in mine.series}
    listed = []
    for case in cases:
        series = by_key[case.study_uid, case.series_uid, case.part]
        fingerprint = f"{series.uid} {series.part} {series.stamp}"
        listed.append(
            Listed(name(study_of(case)), case, hashlib.sha256(fingerprint.encode()).hexdigest(), series.shape)
        )
    usable = {one.study for one in listed}
    unusable: dict[str, Series] = {}
    for series in mine.series:
        if (study := name(study_of(series))) not in usable:
            unusable.setdefault(study, series)
    return Studies(tuple(listed), not_selected, unusable)


def choose_due(studies: Iterable[Listed], ledger: Ledger, wanted: Wanted) -> list[Listed]:
    """Those that are to be predicted now."""
    due: list[Listed] = []
    for one in studies:
        if len(due) == wanted.limit:
            break
        if _asked_for(one, wanted) and _open(one, ledger.find(one.study), wanted):
            due.append(one)
    return due


def _asked_for(one: Listed, wanted: Wanted) -> bool:
    if wanted.studies and one.case.study_uid not in wanted.studies:
        return False
    return wanted.since is None or _newest(one.case) >= wanted.since.timestamp()


def _open(one: Listed, known: Result | None, wanted: Wanted) -> bool:
    if known is None or known.fingerprint != one.fingerprint or known.state is State.WAITING:
        return True
    return known.state is State.FAILED and known.code in PASSING | wanted.retry


def _newest(case: Case) -> float:
    """When a file of a case last changed, seconds since 1970; now where that cannot be told, so that it is read."""
    try:
        return max((Path(case.root) / name).stat().st_mtime for name in case.files)
    except OSError:
        return float("inf")
