"""Who is in the study: series or slices joined with their labels and attributes.

Labels are keyed by the first of path, sop_uid, series_uid, study_uid, patient_id that the table has; further key
columns are checked against the files, and a contradiction stops the run. Rows that match nothing and scans without a
row are both listed: a join that silently loses cases is how studies go wrong.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from medvit.data.attributes import Attributes, choose_attributes
from medvit.data.identity import identities
from medvit.data.labels import KEYS, Table, class_order, column, key_column, key_values, read_labels
from medvit.data.pseudonym import pseudonym
from medvit.data.selection import NotSelected, select_series
from medvit.io import FileEntry, Inventory, Series
from medvit.records import Case, ReasonCode, ScanHeader, UsageError

FILE_KEYS = ("path", "sop_uid")
"""Keys that make each file a case of its own."""

FINER = {"patient_id": "study_uid", "study_uid": "series_uid"}
"""The key that tells apart what one value of another may hold several of."""

RESERVED = {name for names in KEYS.values() for name in names} | {"site", "sex", "age", "split"}
"""Columns that mean something of their own, lower case."""

MISSING = ("", "nan", "na", "n/a", "#n/a", "null")
"""A label that is none, lower case: what pandas, R, Excel and databases write where there was nothing."""

VOLUME_FAULTS = {
    ReasonCode.DUP_IDENTICAL,
    ReasonCode.SLICE_MISSING,
    ReasonCode.SPACING_NONUNIFORM,
    ReasonCode.DUP_POSITION,
    ReasonCode.MATRIX_MISMATCH,
}
"""What may be wrong with a volume while each of its slices is good."""


@dataclass(frozen=True)
class Manifest:
    """The cases of a run, and what was left out.

    Attributes:
        cases: labelled and unlabelled, in a fixed order.
        classes: names in order; for two the last is the positive one.
        key: what joined the labels.
        label_column: what they are called.
        unmatched_rows: CSV line numbers whose key matches no file.
        set_aside_rows: those whose key is in the folder, on files that cannot be used.
        without_row: how many usable series or files have no row.
        without_patient: how many cases neither files nor table give a patient id: each study counts as a patient.
        attributes: which further columns of the table go along, and which do not.
        not_selected: volumes beside the chosen one, each with the reason.
    """

    cases: tuple[Case, ...]
    classes: tuple[str, ...]
    key: str
    label_column: str = "label"
    unmatched_rows: tuple[int, ...] = ()
    set_aside_rows: tuple[int, ...] = ()
    without_row: int = 0
    without_patient: int = 0
    attributes: Attributes = field(default_factory=Attributes)
    not_selected: tuple[NotSelected, ...] = ()


@dataclass(frozen=True)
class _Unit:
    """What one case is made of: a volume, or one file of it."""

    series: Series
    files: tuple[str, ...]
    sop_uid: str = ""

    @property
    def whole(self) -> bool:
        """Whether it is all of its volume: then parts and flags of the volume are its own."""
        return self.files == self.series.files

    def key(self, name: str) -> str:
        values = {
            "path": os.path.normpath(self.series.root.absolute() / self.files[0]),
            "sop_uid": self.sop_uid,
            "series_uid": self.series.uid,
            "study_uid": self.series.study_uid,
            "patient_id": self.series.header.patient_id,
        }
        return values[name]


def build_manifest(
    inventory: Inventory,
    labels: Path,
    *,
    label_column: str = "label",
    site_column: str | None = None,
    target_sites: Sequence[str] = (),
) -> Manifest:
    """Join a scanned folder with its labels.

    Args:
        inventory: of `scan_folder`.
        labels: CSV (DESIGN section 4, "Labels CSV").
        label_column: its column with the class; an empty cell is an unlabelled case.
        site_column: column with the site; None takes `site` if there is one, else the DICOM headers.
        target_sites: scans of these sites (by their headers) are unlabelled cases where they have no row.

    Raises:
        UsageError: no key or label column, no match, contradicting keys, fewer than two classes.
    """
    table = read_labels(labels)
    columns = {name.lower(): name for name in next(iter(table.values()))}
    key, keyed_by = key_column(labels, columns)
    label = column(labels, columns, label_column, "--label-column")
    site = column(labels, columns, site_column, "--site-column") if site_column else columns.get("site")
    units, not_selected = _units(inventory, key)
    if not units:
        raise UsageError(f"{inventory.root}: no usable CT found. Run medvit-inspect on it to see what was set aside.")
    roots = sorted({labels.parent.absolute(), *(unit.series.root.absolute() for unit in units)})
    meant = {line: key_values(row[keyed_by], key, roots) for line, row in table.items()}
    matched = _match(table, meant, key, units, labels)
    found, there = {unit.key(key) for unit in units}, _there(inventory, key)
    aside = tuple(line for line, names in meant.items() if not there.isdisjoint(names) and found.isdisjoint(names))
    if not matched:
        example = next(iter(table.values()))[keyed_by]
        told = f" {len(aside)} of them mean scans that were set aside: medvit-inspect says why." if aside else ""
        raise UsageError(
            f"labels {labels}: none of {len(table)} rows matches by {key} (first value {example!r}; the folder holds "
            f"{len(units)} candidates). Check that labels and folder belong together.{told}"
        )
    _check_further_keys(table, columns, key, matched, labels)
    if key == "series_uid":
        _check_single_study(matched, labels)
    with_row = {id(unit) for _, unit in matched}
    without = [unit for unit in units if id(unit) not in with_row]
    targets = [unit for unit in without if unit.series.header.site in target_sites]
    further = [written for name, written in columns.items() if name not in RESERVED and written not in (label, site)]
    attributes = choose_attributes(further, ((table[line], unit.series.header) for line, unit in matched))
    cases = (
        *(_case(table[line], columns, unit, label, site, attributes) for line, unit in matched),
        *(_case({}, {}, unit) for unit in targets),
    )
    named_by = [columns[name] for name in KEYS["patient_id"] if name in columns]
    nameless = [
        *(unit for line, unit in matched if not any(table[line][name] for name in named_by)),
        *targets,
    ]
    return Manifest(
        cases=cases,
        classes=class_order((case.label for case in cases), label_column),
        label_column=label_column,
        key=key,
        unmatched_rows=tuple(line for line, names in meant.items() if there.isdisjoint(names)),
        set_aside_rows=aside,
        without_row=len(without) - len(targets),
        without_patient=sum(not unit.series.header.patient_id for unit in nameless),
        attributes=attributes,
        not_selected=not_selected,
    )


def unlabelled_cases(inventory: Inventory) -> tuple[tuple[Case, ...], tuple[NotSelected, ...]]:
    """One case per study of a folder, its best volume; and the volumes not selected. For prediction."""
    chosen, others = select_series(series for series in inventory.series if series.usable)
    return tuple(_case({}, {}, _Unit(series, series.files)) for series in chosen), others


def everything(inventory: Inventory, labelled: Manifest | None = None) -> Manifest:
    """All that can be learned from without labels: the cases of a table as it names them, and one of each other study.

    Raises:
        UsageError: no usable CT.
    """
    cases, others = unlabelled_cases(inventory)
    if not cases:
        raise UsageError(f"{inventory.root}: no usable CT found. Run medvit-inspect on it to see what was set aside.")
    used = {case.files[0] for case in cases}
    nameless = sum(not s.header.patient_id for s in inventory.series if s.usable and s.files[0] in used)
    if labelled is None:
        return Manifest(cases, (), "study", without_patient=nameless, not_selected=others)
    named = {name for case in labelled.cases for name in case.files}
    rest = tuple(case for case in cases if named.isdisjoint(case.files))
    return replace(labelled, cases=(*labelled.cases, *rest), without_row=0)


def _units(inventory: Inventory, key: str) -> tuple[list[_Unit], tuple[NotSelected, ...]]:
    if key in FILE_KEYS:
        return _file_units(inventory)
    usable = [series for series in inventory.series if series.usable]
    chosen, others = select_series(usable, (lambda s: (s.study_uid, s.uid)) if key == "series_uid" else None)
    return [_Unit(series, series.files) for series in chosen], others


def _file_units(inventory: Inventory) -> tuple[list[_Unit], tuple[NotSelected, ...]]:
    """Each file that may be a case of its own, with its volume; of a multi-frame file with several, the best."""
    volumes: dict[str, list[Series]] = defaultdict(list)
    for series in inventory.series:
        for name in series.files:
            volumes[name].append(series)
    # a copy is no file of its volume: it finds it through the file that it is a copy of
    originals = {(e.series_uid, e.sop_uid): volumes[e.path] for e in inventory.files if e.path in volumes}
    units: list[_Unit] = []
    passed: list[NotSelected] = []
    for entry in filter(_single_slice, inventory.files):
        candidates = volumes.get(entry.path) or originals.get((entry.series_uid, entry.sop_uid), [])
        (*best,), others = select_series([s for s in candidates if s.usable] or candidates, lambda _: None)
        units += [_Unit(series, (entry.path,), entry.sop_uid) for series in best]
        passed += others
    return units, tuple(passed)


def _single_slice(entry: FileEntry) -> bool:
    """A file may be a case of its own although it is a copy, or its series no regular volume; reading it checks it."""
    return entry.outcome.used or entry.code in VOLUME_FAULTS


def _there(inventory: Inventory, key: str) -> set[str]:
    """The keys of all that the folder holds, usable or not; of patients, those that have a series."""
    if key == "path":
        return {os.path.normpath(inventory.root.absolute() / entry.path) for entry in inventory.files}
    if key == "patient_id":
        return {series.header.patient_id for series in inventory.series}
    return {getattr(entry, key) for entry in inventory.files}


def _match(
    table: Table, meant: Mapping[int, Sequence[str]], key: str, units: Iterable[_Unit], labels: Path
) -> list[tuple[int, _Unit]]:
    """(line, unit) for each unit with a row. Several rows of one key must be the same row again."""
    lines: dict[str, int] = {}
    for line, names in meant.items():
        for name in names:
            if name in lines and table[line] != table[lines[name]]:
                finer = FINER.get(key)
                instead = f", or, where each means another scan, key the table by {finer}" if finer else ""
                raise UsageError(
                    f"labels {labels}: lines {lines[name]} and {line} contradict each other on one {key}. Keep one"
                    f"{instead}."
                )
            lines.setdefault(name, line)
    return [(lines[unit.key(key)], unit) for unit in units if unit.key(key) in lines]


def _check_further_keys(
    table: Table, columns: Mapping[str, str], key: str, matched: Iterable[tuple[int, _Unit]], labels: Path
) -> None:
    further = [(k, columns[n]) for k, names in KEYS.items() for n in names if n in columns and k not in (key, "path")]
    wrong: dict[str, list[int]] = defaultdict(list)
    for line, unit in matched:
        for name, column_name in further:
            if name in ("study_uid", "series_uid") and not unit.series.header.series_uid:
                continue  # a NIfTI file has no UIDs to contradict
            given, found = table[line][column_name], unit.key(name)
            if given and found and given != found:
                wrong[column_name].append(line)
    for column_name, lines in wrong.items():
        shown = ", ".join(str(line) for line in sorted(set(lines))[:10])
        raise UsageError(
            f"labels {labels}: column {column_name!r} contradicts the files matched by {key} on line {shown} "
            f"({len(set(lines))} in all). Correct the table, or remove the column that is wrong."
        )


def _check_single_study(matched: Iterable[tuple[int, _Unit]], labels: Path) -> None:
    """One series UID in several studies, and so perhaps of several patients: a row can mean only one of them."""
    studies: dict[int, set[str]] = defaultdict(set)
    for line, unit in matched:
        studies[line].add(unit.series.study_uid)
    several = sorted(line for line, found in studies.items() if len(found) > 1)
    if several:
        raise UsageError(
            f"labels {labels}: the series_uid on line {', '.join(map(str, several[:10]))} names series of several "
            f"studies ({len(several)} such lines). Key the labels by study_uid."
        )


def _case(
    row: Mapping[str, str],
    columns: Mapping[str, str],
    unit: _Unit,
    label: str | None = None,
    site: str | None = None,
    attributes: Attributes | None = None,
) -> Case:
    series, header = unit.series, unit.series.header
    given = {name: row[written] for name, written in columns.items() if row[written]}
    # without a patient id the study is all that can keep a patient's scans together
    named = header.patient_id or next((given[name] for name in KEYS["patient_id"] if name in given), "")
    patient = pseudonym("patient", named or series.study_uid or series.uid)
    further = {} if attributes is None else attributes.kept
    part = series.part if unit.whole else 0  # a file of its own is read alone
    return Case(
        case_id=_case_id(unit, part),
        patient_id=patient,
        group=patient,
        root=str(series.root),
        files=unit.files,
        part=part,
        identities=identities(header, named),
        label=None if label is None or row[label].lower() in MISSING else row[label],
        site=row[site] if site else header.site,
        site_source=f"column {site}" if site else header.site_source,
        sex=given.get("sex", header.sex),
        age=_age(given.get("age"), header),
        split=given.get("split", "").lower(),
        study_uid=series.study_uid,
        series_uid=series.uid,
        codes=series.codes if unit.whole and series.usable else (),
        acquisition=header.acquisition(),
        attributes={name: row[column] for column, name in further.items() if row[column]},
    )


def _case_id(unit: _Unit, part: int) -> str:
    """A hash of what the case is: study and series (one series UID in two studies has been seen), part, file."""
    of_part = [f"part {part}"] if part else []
    of_file = [unit.sop_uid, unit.files[0]] if unit.sop_uid else []
    return pseudonym("case", unit.series.study_uid, unit.series.uid, *of_part, *of_file)


def _age(given: str | None, header: ScanHeader) -> float | None:
    try:
        age = -1.0 if given is None else float(given)
    except ValueError:
        return header.age
    return age if 0 <= age < math.inf else header.age
