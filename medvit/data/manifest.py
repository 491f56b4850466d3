"""Who is in the study: series or slices joined with their labels and attributes.

Labels are keyed by the first of path, sop_uid, series_uid, study_uid, patient_id that the table has; further key
columns are checked against the files, and a contradiction stops the run. Rows that match nothing and scans without a
row are both listed: a join that silently loses cases is how studies go wrong.
"""

from __future__ import annotations

import csv
import difflib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import StringIO
from itertools import zip_longest
from pathlib import Path

from medvit.data.pseudonym import pseudonym
from medvit.io import FileEntry, Inventory, Series
from medvit.records import Case, ReasonCode, ScanHeader, UsageError

KEYS: Mapping[str, tuple[str, ...]] = {
    "path": ("path",),
    "sop_uid": ("sop_uid", "sopinstanceuid"),
    "series_uid": ("series_uid", "seriesinstanceuid"),
    "study_uid": ("study_uid", "studyinstanceuid"),
    "patient_id": ("patient_id", "patientid"),
}
"""Key -> accepted column names, lower case; the first key present joins."""

FILE_KEYS = ("path", "sop_uid")
"""Keys that make each file a case of its own."""

SPLITS = ("train", "val", "test")

Table = dict[int, dict[str, str]]
"""Line number in the file -> column -> cell."""


@dataclass(frozen=True)
class Manifest:
    """The cases of a run, and what was left out.

    Attributes:
        cases: labelled and unlabelled, in a fixed order.
        classes: names in order; for two the last is the positive one.
        key: what joined the labels.
        unmatched_rows: CSV line numbers whose key matches no file.
        without_row: how many usable series or files have no row.
        not_selected: series of a study beside the chosen one.
    """

    cases: tuple[Case, ...]
    classes: tuple[str, ...]
    key: str
    unmatched_rows: tuple[int, ...] = ()
    without_row: int = 0
    not_selected: tuple[Series, ...] = ()


@dataclass(frozen=True)
class _Unit:
    """What one case is made of: a series, or one file of it."""

    series: Series
    files: tuple[str, ...]
    sop_uid: str = ""

    def key(self, name: str) -> str:
        values = {
            "path": os.path.normpath(self.series.root.absolute() / self.files[0]),
            "sop_uid": self.sop_uid,
            "series_uid": self.series.uid,
            "study_uid": self.series.study_uid,
            "patient_id": self.series.header.patient_id,
        }
        return values[name]


def read_labels(path: Path) -> Table:
    """A labels table as text, stripped of white space: line number in the file -> column -> cell.

    Raises:
        UsageError: missing, unreadable or empty.
    """
    if not path.is_file():
        raise UsageError(f"labels {path}: no such file. Give a CSV with a key column and a label column.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        header = text.partition("\n")[0]
        separator = max(",;\t", key=header.count)  # Excel writes semicolons where the decimal sign is a comma
        numbered = _numbered_rows(text, separator)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"labels {path}: not readable as CSV ({error}). Save it as comma-separated UTF-8.") from None
    if len(numbered) < 2:
        raise UsageError(f"labels {path}: no rows below the header.")
    names = numbered.pop(next(iter(numbered)))
    for name in names:
        if name and names.count(name) > 1:
            raise UsageError(f"labels {path}: column {name!r} is there twice. Keep one.")
    for line, row in numbered.items():
        if any(row[len(names) :]):
            raise UsageError(f"labels {path}: line {line} has more cells than the header. Put quotes around commas.")
    return {line: dict(zip_longest(names, row[: len(names)], fillvalue="")) for line, row in numbered.items()}


def _numbered_rows(text: str, separator: str) -> dict[int, list[str]]:
    """Line number where each row begins -> its cells; rows without content are left out."""
    reader, rows, line = csv.reader(StringIO(text), delimiter=separator), {}, 1
    for row in reader:
        cells = [cell.strip() for cell in row]
        if any(cells):
            rows[line] = cells
        line = reader.line_num + 1
    return rows


def build_manifest(
    inventory: Inventory, labels: Path, *, label_column: str = "label", site_column: str | None = None
) -> Manifest:
    """Join a scanned folder with its labels.

    Args:
        inventory: of `scan_folder`.
        labels: CSV (DESIGN section 4, "Labels CSV").
        label_column: its column with the class; an empty cell is an unlabelled case.
        site_column: column with the site; None takes `site` if there is one, else the DICOM headers.

    Raises:
        UsageError: no key or label column, no match, contradicting keys, fewer than two classes.
    """
    table = read_labels(labels)
    columns = {name.lower(): name for name in next(iter(table.values()))}
    key, key_column = _key_column(labels, columns)
    label = _column(labels, columns, label_column, "--label-column")
    site = _column(labels, columns, site_column, "--site-column") if site_column else columns.get("site")
    units, not_selected = _units(inventory, key)
    if not units:
        raise UsageError(f"{inventory.root}: no usable CT found. Run medvit-inspect on it to see what was set aside.")
    matched = _match(table, key, key_column, units, labels)
    found, roots = {unit.key(key) for unit in units}, _roots(labels, units)
    if not matched:
        example = next(iter(table.values()))[key_column]
        raise UsageError(
            f"labels {labels}: none of {len(table)} rows matches by {key} (first value {example!r}; the folder holds "
            f"{len(units)} candidates). Check that labels and folder belong together."
        )
    _check_further_keys(table, columns, key, matched, labels)
    cases = tuple(_case(table[line], columns, unit, label, site) for line, unit in matched)
    return Manifest(
        cases=cases,
        classes=_classes(cases, label_column),
        key=key,
        unmatched_rows=tuple(
            line for line, row in table.items() if found.isdisjoint(_key_values(row[key_column], key, roots))
        ),
        without_row=len(units) - len(matched),
        not_selected=not_selected,
    )


def unlabelled_cases(inventory: Inventory) -> tuple[tuple[Case, ...], tuple[Series, ...]]:
    """One case per study of a folder, its best series; and the series not selected. For prediction."""
    chosen, others = select_series([series for series in inventory.series if series.usable])
    return tuple(_case({}, {}, _Unit(series, series.files), None, None) for series in chosen), others


def select_series(candidates: Iterable[Series]) -> tuple[tuple[Series, ...], tuple[Series, ...]]:
    """The best series of each study, and the others: axial before not, then more slices, then the larger matrix."""
    studies: dict[str, list[Series]] = defaultdict(list)
    for series in candidates:
        studies[series.study_uid or series.uid].append(series)  # without a study each series is its own
    ranked = [
        sorted(members, key=lambda s: (not s.axial, -s.shape[0], -s.shape[1] * s.shape[2], s.uid))
        for members in studies.values()
    ]
    return tuple(r[0] for r in ranked), tuple(series for r in ranked for series in r[1:])


def _key_column(labels: Path, columns: Mapping[str, str]) -> tuple[str, str]:
    for key, names in KEYS.items():
        for name in names:
            if name in columns:
                return key, columns[name]
    raise UsageError(
        f"labels {labels}: no key column. Saw {', '.join(columns.values())}; needed one of {', '.join(KEYS)}."
    )


def _column(labels: Path, columns: Mapping[str, str], wanted: str, option: str) -> str:
    if wanted.lower() in columns:
        return columns[wanted.lower()]
    near = difflib.get_close_matches(wanted.lower(), columns, n=1)
    hint = f" Did you mean {columns[near[0]]!r}?" if near else ""
    raise UsageError(f"labels {labels}: no column {wanted!r}. Saw {', '.join(columns.values())}; set {option}.{hint}")


def _units(inventory: Inventory, key: str) -> tuple[list[_Unit], tuple[Series, ...]]:
    by_uid = {series.uid: series for series in inventory.series}
    by_path = {name: series for series in inventory.series for name in series.files}
    usable = [series for series in inventory.series if series.usable]
    if key in FILE_KEYS:
        entries = [entry for entry in inventory.files if entry.series_uid in by_uid and _single_slice(entry)]
        # a copy is no file of its series; a series UID that two studies share names neither
        return [
            _Unit(by_path.get(entry.path, by_uid[entry.series_uid]), (entry.path,), entry.sop_uid) for entry in entries
        ], ()
    if key == "series_uid":
        return [_Unit(series, series.files) for series in usable], ()
    chosen, others = select_series(usable)
    return [_Unit(series, series.files) for series in chosen], others


def _single_slice(entry: FileEntry) -> bool:
    """A file may be a case of its own although it is a copy, or its series no regular volume; reading it checks it."""
    volume_faults = {
        ReasonCode.DUP_IDENTICAL,
        ReasonCode.SLICE_MISSING,
        ReasonCode.SPACING_NONUNIFORM,
        ReasonCode.GANTRY_TILT,
        ReasonCode.DUP_POSITION,
        ReasonCode.MULTIPHASE,
        ReasonCode.MATRIX_MISMATCH,
    }
    return entry.outcome.used or entry.code in volume_faults


def _match(table: Table, key: str, key_column: str, units: Iterable[_Unit], labels: Path) -> list[tuple[int, _Unit]]:
    """(line, unit) for each unit with a row. Several rows of one key must be the same row again."""
    lines: dict[str, int] = {}
    roots = _roots(labels, units)
    for line, row in table.items():
        for name in _key_values(row[key_column], key, roots):
            if name in lines and row != table[lines[name]]:
                raise UsageError(
                    f"labels {labels}: lines {lines[name]} and {line} contradict each other on one {key}. Keep one."
                )
            lines.setdefault(name, line)
    return [(lines[unit.key(key)], unit) for unit in units if unit.key(key) in lines]


def _roots(labels: Path, units: Iterable[_Unit]) -> list[Path]:
    return sorted({labels.parent.absolute(), *(unit.series.root.absolute() for unit in units)})


def _key_values(value: str, key: str, roots: Iterable[Path]) -> list[str]:
    """What a cell may mean: a path is relative to the table or to the folder."""
    if not value:
        return []
    if key != "path":
        return [value]
    return [os.path.normpath(root / value.replace("\\", "/")) for root in roots]


def _check_further_keys(
    table: Table, columns: Mapping[str, str], key: str, matched: Iterable[tuple[int, _Unit]], labels: Path
) -> None:
    further = [(k, columns[n]) for k, names in KEYS.items() for n in names if n in columns and k not in (key, "path")]
    wrong: dict[str, list[int]] = defaultdict(list)
    for line, unit in matched:
        for name, column in further:
            if name in ("study_uid", "series_uid") and not unit.series.header.series_uid:
                continue  # a NIfTI file has no UIDs to contradict
            given, found = table[line][column], unit.key(name)
            if given and found and given != found:
                wrong[column].append(line)
    for column, lines in wrong.items():
        shown = ", ".join(str(line) for line in sorted(set(lines))[:10])
        raise UsageError(
            f"labels {labels}: column {column!r} contradicts the files matched by {key} on line {shown} "
            f"({len(set(lines))} in all). Correct the table, or remove the column that is wrong."
        )


def _case(row: Mapping[str, str], columns: Mapping[str, str], unit: _Unit, label: str | None, site: str | None) -> Case:
    header: ScanHeader = unit.series.header
    given = {name: row[column] for name, column in columns.items() if row[column]}
    # without a patient id the study is all that can keep a patient's scans together
    named = next((given[name] for name in KEYS["patient_id"] if name in given), "")
    patient = pseudonym("patient", header.patient_id or named or unit.series.study_uid or unit.series.uid)
    reserved = {name for names in KEYS.values() for name in names} | {"site", "sex", "age", "split"}
    taken = {str(label).lower(), str(site).lower()} | reserved
    return Case(
        case_id=pseudonym("case", unit.series.uid, *([unit.sop_uid, unit.files[0]] if unit.sop_uid else [])),
        patient_id=patient,
        group=patient,
        root=str(unit.series.root),
        files=unit.files,
        label=(row[label] or None) if label else None,
        site=row[site] if site else header.site,
        site_source=f"column {site}" if site else header.site_source,
        sex=given.get("sex", header.sex),
        age=_age(given.get("age"), header.age),
        split=given.get("split", "").lower(),
        study_uid=unit.series.study_uid,
        series_uid=unit.series.uid,
        codes=unit.series.codes if len(unit.files) > 1 else (),
        acquisition=header.acquisition(),
        attributes={columns[name]: value for name, value in given.items() if name not in taken},
    )


def _age(given: str | None, from_header: float | None) -> float | None:
    if given is None:
        return from_header
    try:
        return float(given)
    except ValueError:
        return from_header


def _classes(cases: Iterable[Case], label_column: str) -> tuple[str, ...]:
    names = {case.label for case in cases if case.label is not None}
    if len(names) < 2:
        seen = f"only {names.pop()!r}" if names else "no label"
        raise UsageError(f"column {label_column!r}: saw {seen} on the matched cases; two classes or more are needed.")
    return tuple(sorted(names, key=_natural))


def _natural(name: str) -> tuple[int, float, str]:
    """Numbers in their order, then text."""
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name
