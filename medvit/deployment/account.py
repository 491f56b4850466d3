"""What became of every series and file of a folder, once selection and reading have had their say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from medvit.data.pseudonym import pseudonym
from medvit.deployment.audit import Audit
from medvit.deployment.choice import PASSING, Studies, Wanted, fingerprint
from medvit.deployment.ledger import Ledger, NamedFile, Result, SeriesEntry, State
from medvit.deployment.options import BatchOptions
from medvit.io import FileEntry, Inventory
from medvit.records import REASONS, Outcome, ReasonCode


def account_files(
    inventory: Inventory, studies: Studies, failed: Mapping[str, Result], wanted: Wanted
) -> Iterator[FileEntry]:
    """The inventory's entries, corrected by what selection and reading found out.

    By path, because a multi-frame file may hold several volumes: it is used where one of them is, else set aside where
    one failed, else not selected. Files of other shards are theirs.

    Args:
        inventory: of the folder.
        studies: that were chosen in it.
        failed: study -> why it has no prediction.
        wanted: which shard.
    """
    lost = {name: failed[one.study] for one in studies.listed if one.study in failed for name in one.case.files}
    held = {name: s for several in studies.unusable.values() for s in several for name in s.files}
    passed = {name: other.detail for other in studies.not_selected for name in other.series.files}
    doubtful = lost.keys() | held.keys() | passed.keys()  # the names of all other files would be megabytes
    predicted = (one.case.files for one in studies.listed if one.study not in failed)
    used = {name for files in predicted for name in files if name in doubtful}
    for entry in inventory.files:
        if not wanted.mine(entry.study_uid or entry.series_uid or entry.path):
            continue
        if not entry.outcome.used or entry.path in used:
            yield entry
        elif entry.path in held:
            series = held[entry.path]
            yield entry._replace(outcome=series.outcome, code=next(iter(series.codes), None), detail=series.detail)
        elif entry.path in lost:
            yield _failed(entry, lost[entry.path])
        elif entry.path in passed:
            yield entry._replace(outcome=Outcome.SKIP, code=ReasonCode.NOT_SELECTED, detail=passed[entry.path])
        else:
            yield entry


def _failed(entry: FileEntry, result: Result) -> FileEntry:
    code = ReasonCode(result.code)
    outcome = REASONS[code].outcome
    return entry._replace(outcome=outcome if outcome.bad else Outcome.QUARANTINE, code=code, detail=result.detail)


def account_series(studies: Studies, options: BatchOptions) -> Iterator[SeriesEntry]:
    """One entry per volume; what became of the chosen ones is in the results."""
    passed = {other.series.key: other.detail for other in studies.not_selected}
    for series in studies.series:
        outcome, codes, detail = str(series.outcome), " ".join(series.codes), series.detail
        if series.key in passed:
            outcome, codes, detail = str(Outcome.SKIP), str(ReasonCode.NOT_SELECTED), passed[series.key]
        uids = options.study(series.study_uid), options.named("series", series.uid)
        yield SeriesEntry(*uids, series.part, outcome, codes, detail, len(series.files))


def named(entries: Iterable[FileEntry], options: BatchOptions) -> Iterator[NamedFile]:
    """Entries under hashes of their paths; the path itself stays with those that were set aside."""
    for entry in entries:
        path = options.path(entry.path) if entry.outcome.bad else ""
        shown = entry._replace(path=path, series_uid=options.named("series", entry.series_uid))
        yield NamedFile(pseudonym("path", entry.path), shown)


def settle_unusable(studies: Studies, ledger: Ledger, audit: Audit, now: datetime) -> None:
    """A study without a usable series has a reason; a result does not outlive its images.

    One whose slices are just arriving waits, with what it had; one that is not in the folder at all keeps its result.
    """
    for study, series in studies.unusable.items():
        known = ledger.find(study)
        passing = next((one for one in series if PASSING.intersection(one.codes)), None)
        worst = passing or next((one for one in series if one.outcome.bad), series[0])
        if not worst.codes or (known is None and not worst.outcome.bad):
            continue  # localizers and the like are no studies to predict
        why: dict[str, Any] = {"code": str(worst.codes[0]), "detail": worst.detail, "fingerprint": fingerprint(series)}
        empty = Result(study=study, case_id="", fingerprint="", queued=now.isoformat(), row={})
        before = known or empty
        if passing:
            result = replace(before, state=State.WAITING, **why)
        else:
            result = replace(before, state=State.FAILED, row={}, slices=(), sr="", sc="", **why)
        if result == known:
            continue
        if before.row and not result.row:
            audit.append("withdrawn", study=pseudonym("study", series[0].study_uid), code=result.code)
        ledger.put(result)
