"""What medvit-inspect tells of a folder: numbered series by study, which one of each is chosen, filters, the JSON.

A number names one series in table, pictures and JSON, whatever the filters hide.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from medvit import data, io
from medvit.cli.studies import find_study, studies_of_files, study_of
from medvit.records import REASONS

SELECTION_RULE = """\
Of each study one usable volume is chosen: axial before not, then no reformat or projection, more slices, thinner
slices, larger matrix, lower UID.
Labels keyed by series_uid, sop_uid or path override this."""

THICKNESS_TOLERANCE_MM = 0.005
"""Headers write 5 mm as 4.999999."""


@dataclass(frozen=True)
class Row:
    """One series as listed: its number counts through the folder, studies staying together."""

    number: int
    series: io.Series
    chosen: bool


@dataclass(frozen=True)
class Filters:
    """What a series must have to be shown. `thickness` is (least, most) in mm; a series without one does not match."""

    study: str = ""
    description: str = ""
    kernel: str = ""
    thickness: tuple[float, float] | None = None

    def match(self, series: io.Series) -> bool:
        """Whether the series is shown."""
        header = series.header
        return (
            self.study in ("", study_of(series))
            and self.description.casefold() in header.description.casefold()
            and self.kernel.casefold() in header.kernel.casefold()
            and (self.thickness is None or _within(header.slice_thickness_mm, self.thickness))
        )


@dataclass(frozen=True)
class Listing:
    """A folder as medvit-inspect shows it.

    Attributes:
        found: the folder.
        rows: all series.
        shown: those that the filters leave.
        studies: relative path -> study UID, for every file whose study is known.
        study: UID of the one study asked for, or empty.
        path: how a relative path is written: as it is, or hashed.
    """

    found: io.Inventory
    rows: tuple[Row, ...]
    shown: tuple[Row, ...]
    studies: Mapping[str, str]
    study: str
    path: Callable[[str], str]

    @property
    def set_aside(self) -> list[io.FileEntry]:
        """Files that are not used."""
        return [entry for entry in self.found.files if not entry.outcome.used]

    @property
    def of_study(self) -> list[io.FileEntry]:
        """Files of the study asked for."""
        return [entry for entry in self.found.files if self.studies.get(entry.path) == self.study]

    @property
    def numbers(self) -> dict[str, int]:
        """Relative path -> number of the series it belongs to."""
        return {name: row.number for row in reversed(self.rows) for name in row.series.files}


def make_listing(found: io.Inventory, filters: Filters, path: Callable[[str], str] = str) -> Listing:
    """Number the series by study, choose, and filter.

    Raises:
        UsageError: the study asked for is unknown, or its ending ambiguous.
    """
    studies = studies_of_files(found)
    study = find_study(filters.study, found, studies) if filters.study else ""
    chosen = {id(series) for series in data.select_series(s for s in found.series if s.usable)[0]}
    by_study: dict[str, list[io.Series]] = {}
    for series in found.series:
        by_study.setdefault(study_of(series), []).append(series)
    ordered = [series for members in by_study.values() for series in members]
    rows = tuple(Row(number, series, id(series) in chosen) for number, series in enumerate(ordered, 1))
    wanted = Filters(study, filters.description, filters.kernel, filters.thickness)
    return Listing(found, rows, tuple(row for row in rows if wanted.match(row.series)), studies, study, path)


def without_free_text(listing: Listing) -> Listing:
    """The same without SeriesDescription, in which people write names."""

    def clean(row: Row) -> Row:
        return replace(row, series=replace(row.series, header=replace(row.series.header, description="")))

    return replace(listing, rows=tuple(map(clean, listing.rows)), shown=tuple(map(clean, listing.shown)))


def printable(text: str) -> str:
    """Text of a header or file name on one line, without what a terminal or font would obey instead of show."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def thickness(text: str) -> tuple[float, float]:
    """(least, most) in mm of "1-2", "1" (exactly), "-2" (at most) or "3-" (at least). For argparse."""
    least, dash, most = text.partition("-")
    try:
        bounds = (float(least or 0), float(most or math.inf) if dash else float(least))
    except ValueError:
        bounds = (math.nan, math.nan)
    if text == "-" or not 0 <= bounds[0] <= bounds[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: give mm as 1, 0.5-1.5, -2 (at most) or 3- (at least)")
    return bounds


def to_document(listing: Listing) -> dict[str, Any]:
    """The JSON document; `-h` of the command says what its keys mean."""
    found, codes = listing.found, Counter(entry.code for entry in listing.set_aside if entry.code is not None)
    document: dict[str, Any] = {
        "files": {"seen": len(found.files), **found.counts()},
        "codes": {
            code: {"files": n, "outcome": REASONS[code].outcome, "remedy": REASONS[code].remedy}
            for code, n in codes.items()
        },
        "selection_rule": SELECTION_RULE,
        "hidden_series": len(listing.rows) - len(listing.shown),
        "series": [_series_document(row) for row in listing.shown],
        "set_aside": [_file_document(entry, listing) for entry in listing.set_aside],
    }
    if listing.study:
        files = [_file_document(entry, listing) for entry in listing.of_study]
        document["study"] = {"study_uid": listing.study, "files": files}
    return document


def _series_document(row: Row) -> dict[str, Any]:
    series, header = row.series, row.series.header
    return {
        "number": row.number,
        "series_uid": series.uid,
        "study_uid": series.study_uid,
        "part": series.part,
        "phase": header.phase,
        "outcome": series.outcome,
        "chosen": row.chosen,
        "codes": list(series.codes),
        "detail": series.detail,
        "modality": header.modality,
        "description": header.description,
        "shape_zyx": list(series.shape),
        "spacing_xyz_mm": list(series.spacing_mm),
        "axial": series.axial,
        "files": len(series.files),
        "site": header.site,
        "sex": header.sex,
        "age": header.age,
        **header.acquisition(),
        "slice_thickness_mm": header.slice_thickness_mm,
    }


def _file_document(entry: io.FileEntry, listing: Listing) -> dict[str, Any]:
    return {
        "path": listing.path(entry.path),
        "outcome": entry.outcome,
        "code": entry.code,
        "detail": entry.detail,
        "study_uid": listing.studies.get(entry.path, ""),
        "series_uid": entry.series_uid,
        "remedy": REASONS[entry.code].remedy if entry.code else "",
    }


def _within(value: float | None, bounds: tuple[float, float]) -> bool:
    least, most = bounds
    return value is not None and least - THICKNESS_TOLERANCE_MM <= value <= most + THICKNESS_TOLERANCE_MM
