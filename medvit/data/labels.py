"""The labels table: a CSV as people save it, read as text with the line numbers an editor shows.

The first of path, sop_uid, series_uid, study_uid, patient_id that the table has is its key: it says which scan a row
means. `medvit.data.manifest` joins the rows with the scans.
"""

from __future__ import annotations

import csv
import difflib
import os
from collections.abc import Iterable, Mapping
from io import StringIO
from itertools import zip_longest
from pathlib import Path

from medvit.records import UsageError

KEYS: Mapping[str, tuple[str, ...]] = {
    "path": ("path",),
    "sop_uid": ("sop_uid", "sopinstanceuid"),
    "series_uid": ("series_uid", "seriesinstanceuid"),
    "study_uid": ("study_uid", "studyinstanceuid"),
    "patient_id": ("patient_id", "patientid"),
}
"""Key -> accepted column names, lower case; the first key present joins."""

Table = dict[int, dict[str, str]]
"""Line number in the file -> column -> cell."""


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
    seen: dict[str, str] = {}
    for name in filter(None, names):
        if other := seen.get(name.lower()):
            spelt = "" if other == name else f" (also as {other!r}: capitals make no difference)"
            raise UsageError(f"labels {path}: column {name!r} is there twice{spelt}. Keep one, or rename it.")
        seen[name.lower()] = name
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


def key_column(labels: Path, columns: Mapping[str, str]) -> tuple[str, str]:
    """The key, and the column that holds it.

    Args:
        labels: the table, for the message.
        columns: lower-case name -> name as written.

    Raises:
        UsageError: no key column.
    """
    for key, names in KEYS.items():
        for name in names:
            if name in columns:
                return key, columns[name]
    raise UsageError(
        f"labels {labels}: no key column. Saw {', '.join(columns.values())}; needed one of {', '.join(KEYS)}."
    )


def column(labels: Path, columns: Mapping[str, str], wanted: str, option: str) -> str:
    """The column meant by `wanted`, whatever its case.

    Raises:
        UsageError: there is none; the nearest name is given, and the option that chooses another.
    """
    if wanted.lower() in columns:
        return columns[wanted.lower()]
    near = difflib.get_close_matches(wanted.lower(), columns, n=1)
    hint = f" Did you mean {columns[near[0]]!r}?" if near else ""
    raise UsageError(f"labels {labels}: no column {wanted!r}. Saw {', '.join(columns.values())}; set {option}.{hint}")


def key_values(value: str, key: str, roots: Iterable[Path]) -> list[str]:
    """What a key cell may mean: a path is relative to the table or to the folder; an empty cell means nothing."""
    if not value:
        return []
    if key != "path":
        return [value]
    return [os.path.normpath(root / value.replace("\\", "/")) for root in roots]


def class_order(labels: Iterable[str | None], label_column: str) -> tuple[str, ...]:
    """Class names, numbers in their order and then text; for two the last is the positive one.

    Raises:
        UsageError: fewer than two classes, or one that is spelt in two ways, such as Yes and yes or 1 and 1.0.
    """
    names = {label for label in labels if label is not None}
    spelt: dict[tuple[int, float, str], str] = {}
    for name in sorted(names):
        if (other := spelt.setdefault(_same(name), name)) != name:
            raise UsageError(
                f"column {label_column!r}: {other!r} and {name!r} would be two classes. Write both alike, or so that "
                "more than capitals and zeros tells them apart."
            )
    if len(names) < 2:
        seen = f"only {names.pop()!r}" if names else "no label"
        raise UsageError(f"column {label_column!r}: saw {seen} on the matched cases; two classes or more are needed.")
    return tuple(sorted(names, key=_natural))


def _same(name: str) -> tuple[int, float, str]:
    """What all spellings of a class have in common."""
    kind, number, text = _natural(name)
    return kind, number, text.casefold() if kind else ""


def _natural(name: str) -> tuple[int, float, str]:
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name
