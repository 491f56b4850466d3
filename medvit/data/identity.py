"""Who is one person: what names a patient besides the id, and which cases must therefore stay on one side of a split.

The same patient under two ids, at two sites, or as a copy under new UIDs makes a result look better than it is, and
nothing else in the run would show it. Evidence is of two kinds: what the header says (`identities`) and the pixels
(`medvit.data.copies`). Where in doubt patients are joined: a group too many costs a little data, a group too few costs
the truth.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from medvit.data.copies import SlicePrints, identical_slices, near_copies
from medvit.data.pseudonym import pseudonym
from medvit.records import Case, ReasonCode, ScanHeader

PLACEHOLDER = re.compile(r"(anon|deid|unknown|noname|nopatient)\w*|(patient|name|test|none|removed|x+)\d*")
"""What de-identification writes for a name, normalised."""

STANDARD_UIDS = "1.2.840.10008."
"""Root of the UIDs that DICOM itself defines: an atlas is everybody's frame of reference."""

REASONS = {"id": "patient id", "name": "name and birth date", "frame": "frame of reference"}
IDENTICAL, NEAR = "identical slices", "nearly identical slices"
"""Why patients stay together, in the words of the report."""


def identities(header: ScanHeader, patient_id: str = "") -> tuple[str, ...]:
    """Hashes of all that names the patient, `kind:hash` with the kinds of `REASONS`.

    The id counts without its issuer: most exports have none or the name of the sending system, and a copy at a second
    site keeps the id under a new issuer. Two sites that both number from 1 are joined pair by pair for it.

    A name counts with a birth date only, once for each way it is written (PN component groups: alphabetic, ideographic,
    phonetic). 1 January stands for an unknown day, where a common name soon meets its namesake: no birth date.

    Args:
        header: of the series.
        patient_id: as the header or the labels table gives it.
    """
    named = [("id", normalise(patient_id))]
    birth = re.sub(r"\D", "", header.birth_date)
    if len(birth) == 8 and not birth.endswith("0101"):
        spellings = filter(None, map(normalise, header.patient_name.split("=")))
        named += [("name", f"{name} {birth}") for name in spellings if not PLACEHOLDER.fullmatch(name)]
    frame = header.frame_of_reference.strip()
    named.append(("frame", "" if frame.startswith(STANDARD_UIDS) else frame))
    return tuple(dict.fromkeys(f"{kind}:{pseudonym(kind, value)}" for kind, value in named if value))


def normalise(text: str) -> str:
    """Letters and digits alone, folded in case, width and accents: "MÜLLER^Anna" and "Muller, anna" are one."""
    return "".join(sign for sign in unicodedata.normalize("NFKD", text.casefold()) if sign.isalnum())


@dataclass(frozen=True)
class Bond:
    """Patients (hashes, sorted) that stay together, or would, and why."""

    reason: str
    patients: tuple[str, ...]


@dataclass(frozen=True)
class Grouping:
    """What `group_cases` found.

    Attributes:
        cases: with `group` set; flagged DUP_IDENTICAL where they share slices.
        bonds: what joined patients of different ids.
        unused: identities that too many patients share to name one; nobody was joined by them.
    """

    cases: tuple[Case, ...]
    bonds: tuple[Bond, ...] = ()
    unused: tuple[Bond, ...] = ()


def most_sharers(patients: int) -> int:
    """How many patient ids may share one identity before it counts as a placeholder: a quarter of all, within 3..10.

    Nobody has eleven ids in one data set; in a small one, what a quarter shares is no name either, but a patient with
    two or three ids is still found.
    """
    return max(3, min(10, patients // 4))


def group_cases(cases: Sequence[Case], prints: Mapping[str, SlicePrints]) -> Grouping:
    """Join the groups of patients that one identity names or whose slices are the same, through others as well.

    Args:
        cases: with `group` and `patient_id` set to the patient.
        prints: case_id -> `slice_prints` of its pixels; cases without stay apart unless their header joins them.
    """
    bonds, unused = _by_name(cases)
    identical, near = identical_slices(prints), near_copies(cases, prints)
    patient_of = {case.case_id: case.patient_id for case in cases}
    exact, like = (
        [tuple(sorted({patient_of[name] for name in cluster})) for cluster in clusters]
        for clusters in (identical, near)
    )
    known = [set(patients) for patients in exact]  # the stronger reason is enough
    bonds += [Bond(IDENTICAL, patients) for patients in exact]
    bonds += [Bond(NEAR, patients) for patients in like if not any(same.issuperset(patients) for same in known)]
    bonds = [bond for bond in dict.fromkeys(bonds) if len(bond.patients) > 1]
    leaders = _leaders(bond.patients for bond in bonds)
    twins = {name for cluster in (*identical, *near) for name in cluster}
    grouped = (replace(case, group=leaders.get(case.patient_id, case.group)) for case in cases)
    return Grouping(
        tuple(_flag(case) if case.case_id in twins else case for case in grouped), tuple(bonds), tuple(unused)
    )


def naming(cases: Iterable[Case]) -> dict[str, frozenset[str]]:
    """case_id -> all that names its patient: hash of the id, `identities` that are no placeholder, and the case itself.

    Two sets of cases share a person where they share one of these, whichever day each was scanned.
    """
    cases = list(cases)
    sharers = _sharers(cases)
    most = most_sharers(len({case.patient_id for case in cases}))
    placeholders = {identity for identity, patients in sharers.items() if len(patients) > most}
    return {case.case_id: frozenset({case.case_id, case.patient_id, *case.identities} - placeholders) for case in cases}


def _sharers(cases: Iterable[Case]) -> dict[str, set[str]]:
    """Identity -> the patients that have it."""
    sharers: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        for identity in case.identities:
            sharers[identity].add(case.patient_id)
    return sharers


def _by_name(cases: Sequence[Case]) -> tuple[list[Bond], list[Bond]]:
    """What the headers join, and what too many share."""
    sharers = _sharers(cases)
    limit = most_sharers(len({case.patient_id for case in cases}))
    bonds: list[Bond] = []
    unused: list[Bond] = []
    for identity, patients in sharers.items():
        bond = Bond(REASONS[identity.partition(":")[0]], tuple(sorted(patients)))
        (bonds if len(patients) <= limit else unused).append(bond)
    return bonds, unused


def _leaders(clusters: Iterable[Sequence[str]]) -> dict[str, str]:
    """Union-find: patient -> the patient that stands for all it is joined with."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    for first, *others in clusters:
        for other in others:
            one, two = sorted((find(first), find(other)))
            leader[two] = one  # the lower hash leads: the order of cases does not matter
    return {name: find(name) for name in leader}


def _flag(case: Case) -> Case:
    return replace(case, codes=tuple(dict.fromkeys((*case.codes, ReasonCode.DUP_IDENTICAL))))
