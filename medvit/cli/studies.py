"""Which study a file belongs to, and which study a person means by a UID, by the end of one, or by a wrong one."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from medvit import io
from medvit.records import Outcome, ReasonCode, UsageError

SHORTEST_ENDING = 6
"""Characters of a study UID that the table shows, or more where these do not tell the studies apart."""


def study_of(series: io.Series) -> str:
    """The study's UID; a series without a study is its own."""
    return series.study_uid or series.uid


def endings(studies: Iterable[str]) -> dict[str, str]:
    """Study UID -> its last characters, as many as tell all of them apart."""
    uids = set(studies)
    longest = max(map(len, uids), default=0)
    for length in range(SHORTEST_ENDING, longest):
        if len({uid[-length:] for uid in uids}) == len(uids):
            return {uid: uid[-length:] for uid in uids}
    return {uid: uid for uid in uids}


def studies_of_files(found: io.Inventory) -> dict[str, str]:
    """Relative path -> study UID: of its series, else what the file itself says, else that of a series it names."""
    known = {name: study_of(series) for series in found.series for name in series.files}
    by_series: dict[str, set[str]] = {}
    for series in found.series:
        by_series.setdefault(series.uid, set()).add(study_of(series))
    for entry in found.files:
        named = by_series.get(entry.series_uid, set())
        study = entry.study_uid or (next(iter(named)) if len(named) == 1 else "")
        if study:
            known.setdefault(entry.path, study)
    return known


def find_study(given: str, found: io.Inventory, studies: Mapping[str, str]) -> str:
    """The study UID that is meant by a UID or by an unambiguous ending of one.

    Args:
        given: what a person typed.
        found: the folder.
        studies: of `studies_of_files`.

    Raises:
        UsageError: no such study, or several; the message tells which come near, and how many files tell no study.
    """
    wanted, uids = given.strip().lstrip("…"), sorted(set(studies.values()))
    ending = [wanted] if wanted in uids else [uid for uid in uids if wanted and uid.endswith(wanted)]
    if len(ending) == 1:
        return ending[0]
    if ending:
        raise UsageError(
            f"study {wanted}: {len(ending)} studies end so ({_first(ending)}). Give more of the UID's end."
        )
    raise UsageError(_unknown_study(wanted, found, studies, uids))


def _unknown_study(wanted: str, found: io.Inventory, studies: Mapping[str, str], uids: Sequence[str]) -> str:
    lost = Counter(entry.code for entry in found.files if entry.path not in studies and not _harmless(entry))
    by_code = ", ".join(f"{n:,} {code}" for code, n in lost.most_common())
    text = f"study {wanted}: no file of this study was seen among {len(found.files):,} files."
    if lost:
        text += f" {lost.total():,} files do not tell their study and may belong to it: {by_code}."
    holder = next((study_of(series) for series in found.series if series.uid == wanted), "")
    if holder:
        return f"{text} It is a SeriesInstanceUID; its study is {holder}."
    near = difflib.get_close_matches(wanted, uids, n=3, cutoff=0.8)
    return f"{text} {f'Near: {_first(near)}.' if near else 'Check the UID, and whether the export holds the study.'}"


def _harmless(entry: io.FileEntry) -> bool:
    """A text file or picture beside the images, which belongs to no study."""
    return entry.outcome is Outcome.SKIP and entry.code is ReasonCode.NOT_DICOM


def _first(uids: Sequence[str]) -> str:
    return ", ".join(uids[:3]) + (f" and {len(uids) - 3:,} more" if len(uids) > 3 else "")
