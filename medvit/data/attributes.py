"""Which further columns of a labels table go along with the cases into the report, and under which names.

A table may come from a hospital's information system: names, birth dates and raw ids in it must not reach predictions
or reports, whatever the column is called. And it may have a column of a name that predictions.csv uses itself, such as
a second label: that one goes along under another name, or the report would judge the wrong one.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations

from medvit.data.identity import normalise
from medvit.records import PREDICTION_COLUMNS, ScanHeader

NAMING = re.compile(
    r"(patients?|birth|family|last|sur|first|given|middle|maiden|full|referring\w*)?names?"
    r"|(patients?)?((date|day|time)ofbirth|birth(date|day|time)|dob|born)|accession(number|no)?|(other)?patients?(id|nr)s?"
    r"|mrn|ssn|(nhs|insurance|socialsecurity)(number|no|id)|(patients?|home|postal|street)?address"
    r"|(patients?|tele|mobile|cell)?phone(number|no)?|(patients?)?e?mail"
    r"|(patienten|nach|vor|familien|geburts)name|geboren(am)?|geb(urts)?(datum|tag|dat|jahr)?"  # German
    r"|(patienten?|fall|versicherten)(nr|nummer|id)|adresse|anschrift|strasse|telefon(nummer)?"
    r"|(nomde|pre)?(nom|naissance)|nomprenom|(date|jour)(de)?naissance|ddn"  # French
    r"|apellidos?|nombres?|(fecha)?(de)?nacimiento|historiaclinica|nhc|dni|direccion"  # Spanish
    r"|cognome|nome|(data)?(di)?nascita|(data)?(de)?nascimento|sobrenome|codicefiscale|cpf"  # Italian, Portuguese
    r"|(achter|voor)?naam|geboortedatum|bsn|(for|efter|etter)?na[mv]n|fodt|fodelsedatum|personnummer"  # northern
)
"""What a column is called, letters and digits alone, that says who somebody is."""

FEWEST = 10
"""Cells below which a column may have as many values as cells by chance."""

LONG = 6
"""Digits from which a whole number that nobody shares is taken for somebody's number, and not for a measurement."""


@dataclass(frozen=True)
class Attributes:
    """`kept`: column as written -> name in predictions.csv; `left_out`: columns that name people, or may."""

    kept: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def renamed(self) -> dict[str, str]:
        """Those that have another name in predictions.csv."""
        return {column: name for column, name in self.kept.items() if column != name}


def choose_attributes(columns: Iterable[str], rows: Iterable[tuple[Mapping[str, str], ScanHeader]]) -> Attributes:
    """Of the columns that have no meaning of their own.

    Left out is what is called as names, birth dates and numbers of people are; what repeats whose the scan is, however
    it is spelt, in two cells or more and in every second one (a count may happen to be a patient's number); and words,
    dates or long numbers that nearly nobody shares: they tell persons apart, and make no groups.

    Args:
        columns: as written.
        rows: each with the header of the scan that it means.
    """
    columns, same, cells = list(columns), Counter[str](), defaultdict[str, list[tuple[str, str]]](list)
    for row, header in rows:
        for column in columns:
            if cell := row[column]:
                cells[column].append((header.patient_id or header.study_uid, cell))
                same[column] += _repeats(cell, header)
    repeating = {column for column, count in same.items() if count > 1 and 2 * count >= len(cells[column])}
    naming = repeating | {column for column in columns if NAMING.fullmatch(normalise(column))}
    naming |= {column for column, given in cells.items() if _one_each(given)}
    kept = {column: _beside_ours(column, columns) for column in columns if column not in naming}
    return Attributes(kept, tuple(column for column in columns if column in naming))


def _repeats(cell: str, header: ScanHeader) -> bool:
    """Whether a cell is the header's name (in any order), birth date (day or year first) or id (or holds it)."""
    text, name, patient = normalise(cell), _words(header.patient_name), normalise(header.patient_id)
    if not text:
        return False
    if text == patient or (len(patient) > 3 and patient in text) or text == normalise(header.patient_name):
        return True
    born = re.sub(r"\D", "", header.birth_date)
    numbers = [number.zfill(2) for number in re.findall(r"\d+", cell)]
    dates = {"".join(order) for order in permutations(numbers[:3])} if len(numbers) > 2 else {text}
    return (len(name) > 1 and _words(cell) == name) or (len(born) == 8 and not dates.isdisjoint((born, born[2:])))


def _words(text: str) -> frozenset[str]:
    """Whatever their order; "Müller" is "Mueller", as scanners without umlauts write it."""
    words = (re.sub("(?<=[aou])e", "", normalise(word)) for word in re.split(r"[\W_]+", text))
    return frozenset(filter(None, words))


def _one_each(given: Sequence[tuple[str, str]]) -> bool:
    """Whether nearly each patient has a value of their own, which is no measurement."""
    values = dict(given)
    if len(values) < FEWEST or 10 * len(set(values.values())) < 9 * len(values):
        return False
    measured = [cell for cell in values.values() if re.fullmatch(r"[-+]?\d*[.,]?\d*(e[-+]?\d+)?", cell.lower())]
    numbers = [cell for cell in measured if cell.isdigit() and len(cell) >= LONG]
    return 2 * len(measured) < len(values) or 2 * len(numbers) > len(values)


def _beside_ours(column: str, columns: Sequence[str]) -> str:
    if not (column.lower() in PREDICTION_COLUMNS or column.lower().startswith("p_")):
        return column
    name = f"table_{column}"
    while name in columns:
        name += "_"
    return name
