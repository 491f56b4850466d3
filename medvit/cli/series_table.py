"""The series of a listing as a table, for wide and for narrow terminals. Header text is shown, never obeyed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from rich import box
from rich.table import Table
from rich.text import Text

from medvit.cli.listing import Listing, Row, printable
from medvit.cli.studies import endings, study_of
from medvit.records import Outcome

WIDE = 120
"""Columns from which each property of a series has a column of its own; below, a series takes a few lines."""

STYLES = {Outcome.FLAG: "yellow", Outcome.QUARANTINE: "red", Outcome.REJECT: "red", Outcome.SKIP: "dim"}


@dataclass(frozen=True)
class _Column:
    """A column of the series table; one that is empty for all series is left out."""

    name: str
    cell: Callable[[Row], str]
    right: bool = False
    wraps: bool = False


def _outcome(row: Row) -> str:
    if not row.series.usable:
        return str(row.series.outcome)
    return f"{row.series.outcome}, {'chosen' if row.chosen else 'not chosen'}"


def _matrix(row: Row) -> str:
    _, y, x = row.series.shape
    return f"{y}×{x}" if x else ""


def _spacing(row: Row) -> str:
    return "×".join(f"{value:.3g}" for value in row.series.spacing_mm) if any(row.series.spacing_mm) else ""


def _thickness(row: Row) -> str:
    value = row.series.header.slice_thickness_mm
    return "" if value is None else f"{value:.3g}"


def _findings(row: Row) -> str:
    return ": ".join(filter(None, (" ".join(row.series.codes), row.series.detail)))


def _slices(row: Row) -> str:
    return str(row.series.shape[0] or "")


def _in_words(row: Row) -> str:
    header = row.series.header
    thick = f"{_thickness(row)} mm thick" if _thickness(row) else ""
    words = (header.description, header.kernel, thick, header.site, header.sex, header.phase)
    return "\n".join(filter(None, (", ".join(filter(None, words)), _findings(row))))


def _volume(row: Row) -> str:
    size = "×".join(filter(None, (_slices(row), _matrix(row))))
    return f"{row.series.header.modality} {size}\n{_spacing(row)}".strip()


_WIDE_COLUMNS = (
    _Column("outcome", _outcome),
    _Column("mod", lambda row: row.series.header.modality),
    _Column("slices", _slices, right=True),
    _Column("matrix", _matrix, right=True),
    _Column("spacing mm", _spacing, right=True),
    _Column("thick", _thickness, right=True),
    _Column("kernel", lambda row: row.series.header.kernel, wraps=True),
    _Column("description", lambda row: row.series.header.description, wraps=True),
    _Column("site", lambda row: row.series.header.site, wraps=True),
    _Column("sex", lambda row: row.series.header.sex),
    _Column("phase", lambda row: row.series.header.phase, wraps=True),
    _Column("codes", _findings, wraps=True),
)
_NARROW_COLUMNS = (
    _Column("outcome", lambda row: _outcome(row).replace(", ", ",\n")),
    _Column("volume, mm", _volume),
    _Column("series", _in_words, wraps=True),
)


def series_table(listing: Listing, width: int) -> Table:
    """The series shown, for a terminal of that many columns; the study is named on the first of its series."""
    possible: tuple[_Column, ...] = _WIDE_COLUMNS if width >= WIDE else _NARROW_COLUMNS
    columns = [column for column in possible if any(column.cell(row) for row in listing.shown)]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("study", no_wrap=True)
    for column in columns:
        table.add_column(
            column.name, justify="right" if column.right else "left", no_wrap=not column.wraps, overflow="fold"
        )
    names = endings(listing.studies.values())
    for study, members in groupby(listing.shown, key=lambda row: study_of(row.series)):
        for place, row in enumerate(members):
            cells = [str(row.number), f"…{names[study]}" if place == 0 else "", *(c.cell(row) for c in columns)]
            table.add_row(*(Text(_lines(cell)) for cell in cells), style=STYLES.get(row.series.outcome, ""))
    return table


def _lines(cell: str) -> str:
    return "\n".join(printable(line) for line in cell.split("\n"))
