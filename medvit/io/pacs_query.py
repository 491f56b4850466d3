"""What a PACS is asked for: attributes at the level of a study, checked before anything is sent.

A closed list. A PACS ignores a key that it does not know or that belongs to another level, and then answers with all
that it has: a slip of the pen must not fetch an archive.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from medvit.records import UsageError

STUDY_KEYS = (
    "StudyDate StudyTime AccessionNumber ModalitiesInStudy StudyInstanceUID StudyID StudyDescription "
    "PatientID PatientName PatientBirthDate PatientSex PatientAge IssuerOfPatientID ReferringPhysicianName"
).split()
"""Required and usual keys of the study level (PS3.4 C.6.2.1.2, PS3.18 table 10.6.1-5)."""


def study_query(query: Mapping[str, str]) -> dict[str, str]:
    """The query with `ModalitiesInStudy` set, to CT where it was not.

    Raises:
        UsageError: an unknown keyword (the nearest is named), or an empty value, which would match everything.
    """
    for key, value in query.items():
        if key not in STUDY_KEYS:
            near = difflib.get_close_matches(key, STUDY_KEYS, n=1, cutoff=0.5)
            meant = f"Did you mean {near[0]}? " if near else ""
            raise UsageError(f"query: {key!r} is no key for studies. {meant}Known: {', '.join(STUDY_KEYS)}.")
        if not value.strip() or not value.isprintable():
            raise UsageError(
                f"query: {key} is empty or holds control characters. Give a value, e.g. StudyDate=20261127-."
            )
    return {"ModalitiesInStudy": "CT", **query}


def is_uid(text: object) -> bool:
    """Whether it is digits and dots, at most 64: harmless in a path and in a URL, legal or not (PS3.5 9.1)."""
    return isinstance(text, str) and re.fullmatch(r"[0-9][0-9.]{0,63}", text) is not None and ".." not in text
