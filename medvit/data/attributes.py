"""Which further columns of a labels table go along with the cases into the report, and under which names.

A table may come from a hospital's information system: names, birth dates and raw ids in it must not reach predictions
or reports, whatever the column is called. And it may have a column of a name that predictions.csv uses itself, such as
a second label: that one goes along under another name, or the report would judge the wrong one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from medvit.data.identity import normalise
from medvit.records import PREDICTION_COLUMNS, ScanHeader

NAMING = re.compile(
    r"(patients?|birth|family|last|sur|first|given|middle|maiden|full|referring\w*)?names?"
    r"|(patients?)?((date|day|time)ofbirth|birth(date|day|time)|dob)|accession(number|no)?|(other)?patientids?"
    r"|mrn|ssn|(nhs|insurance|socialsecurity)(number|no|id)|(patients?|home|postal|street)?address"
    r"|(patients?|tele|mobile|cell)?phone(number|no)?|(patients?)?e?mail"
)
"""What a column is called, letters and digits alone, that says who somebody is."""


@dataclass(frozen=True)
class Attributes:
    """`kept`: column as written -> name in predictions.csv; `left_out`: columns that name people."""

    kept: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def renamed(self) -> dict[str, str]:
        """Those that have another name in predictions.csv."""
        return {column: name for column, name in self.kept.items() if column != name}


def choose_attributes(columns: Iterable[str], rows: Iterable[tuple[Mapping[str, str], ScanHeader]]) -> Attributes:
    """Of the columns that have no meaning of their own.

    Args:
        columns: as written.
        rows: each with the header of the scan that it means; a column that repeats whose it is, in two cells or more
            and in every second one, is left out. A count may happen to be a patient's number.
    """
    columns, given, same = list(columns), Counter[str](), Counter[str]()
    for row, header in rows:
        known = {normalise(text) for text in (header.patient_name, header.patient_id, header.birth_date)}
        cells = {column: normalise(row[column]) for column in columns if normalise(row[column])}
        given.update(cells.keys())
        same.update(column for column, cell in cells.items() if cell in known)
    repeating = {column for column, count in same.items() if count > 1 and 2 * count >= given[column]}
    naming = repeating | {column for column in columns if NAMING.fullmatch(normalise(column))}
    kept = {column: _beside_ours(column, columns) for column in columns if column not in naming}
    return Attributes(kept, tuple(column for column in columns if column in naming))


def _beside_ours(column: str, columns: Sequence[str]) -> str:
    if not (column.lower() in PREDICTION_COLUMNS or column.lower().startswith("p_")):
        return column
    name = f"table_{column}"
    while name in columns:
        name += "_"
    return name
