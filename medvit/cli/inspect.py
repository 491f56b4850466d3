"""medvit-inspect: what is in this folder, what will be used, and why not the rest."""

from __future__ import annotations

import argparse
import functools
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvit import data, io
from medvit.cli import listing_tables
from medvit.cli.console import Display, Parser, command
from medvit.cli.listing import SELECTION_RULE, Filters, Listing, make_listing, thickness, to_document, without_free_text
from medvit.records import EXIT_DONE, EXIT_QUARANTINE, REASONS, UsageError

if TYPE_CHECKING:
    from medvit.cli.contact_sheet import Sheet

EPILOG = f"""
examples:
  medvit-inspect /exports/october
  medvit-inspect /exports/october --pictures october.png
  medvit-inspect /exports/october --description thorax --kernel b70 --thickness -2
  medvit-inspect /exports/october --study 1.2.840.99.4711      why is there nothing for this study?
  medvit-inspect /exports/october --study 4711                 the end of the UID is enough, as in the table
  medvit-inspect /exports/october --json > october.json

which series is chosen:
{textwrap.indent(SELECTION_RULE, "  ")}

filters choose the series that are shown, in --json and --pictures too; all that are given must hold. The account of
files, the exit code and the numbers of the series are always those of the whole folder.

keys of --json:
  files           seen, and how many of each outcome; these sum to seen
  codes           for each code of a file set aside: files, outcome, remedy
  series          number (as in table and pictures), series_uid, study_uid, part and phase (volumes that share one
                  series), outcome, chosen, codes, detail, modality, description, shape_zyx, spacing_xyz_mm, axial,
                  files, site, sex, age (years), body_part, kernel, manufacturer, contrast, slice_thickness_mm
  hidden_series   how many the filters hide
  selection_rule  as above
  set_aside       every file that is not used: path, outcome, code, detail, study_uid, series_uid, remedy
  study           with --study: study_uid, and every file of it with the keys of set_aside
  pictures        with --pictures: drawn, left_out, and failed: series whose pixels could not be read

reason codes:
""" + "\n".join(f"  {code:22} {reason.outcome:10} {reason.remedy}" for code, reason in REASONS.items())


def parser() -> Parser:
    """The arguments."""
    result = Parser("inspect", __doc__ or "", EPILOG)
    result.add_argument("folder", metavar="FOLDER", help="searched with all subfolders; links are not followed")
    result.add_argument("--study", metavar="UID", default="", help="all of one study, file by file: UID or its end")
    result.add_argument("--description", metavar="TEXT", default="", help="show series with this in SeriesDescription")
    result.add_argument("--kernel", metavar="TEXT", default="", help="show series with this in their kernel")
    result.add_argument(
        "--thickness", metavar="MM", type=thickness, help="show series of this thickness: 1, 0.5-1.5, -2 or 3-"
    )
    result.add_argument("--pictures", metavar="PNG", type=Path, help="draw the middle slices of the series shown")
    result.add_argument("--json", action="store_true", help="one JSON document on stdout")
    result.add_argument("--assume-hu", action="store_true", help="take values without rescale tags for HU, flagged")
    result.add_argument(
        "--deidentify", action="store_true", help="hash paths and leave out descriptions: they may hold names"
    )
    return result


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_args(argv)
    try:
        return _inspect(arguments)
    except UsageError as error:
        raise UsageError(_without_folder(str(error), arguments)) from None


def _inspect(arguments: argparse.Namespace) -> int:
    _check_picture(arguments.pictures)
    filters = Filters(arguments.study, arguments.description, arguments.kernel, arguments.thickness)
    with Display() as display:
        display.start("reading headers", 0)
        folder = Path(arguments.folder)
        found = io.scan_folder(
            folder, assume_hu=arguments.assume_hu, index=data.index_path(folder), progress=lambda _: display.step()
        )
        path = functools.partial(data.pseudonym, "path") if arguments.deidentify else str
        listing = make_listing(found, filters, path)
        if arguments.deidentify:
            listing = without_free_text(listing)
        sheet = _draw(listing, arguments.pictures, display) if arguments.pictures else None
    if arguments.json:
        print(json.dumps(to_document(listing) | _pictures_document(sheet), indent=1))
    else:
        listing_tables.show(listing)
        _show_pictures(sheet, arguments.pictures)
    if not found.series and not listing.study:
        raise UsageError(
            f"{arguments.folder}: no CT among {len(found.files)} files; the reasons are listed. Export CT images."
        )
    bad = any(entry.outcome.bad for entry in found.files) or (sheet is not None and sheet.failed)
    return EXIT_QUARANTINE if bad else EXIT_DONE


def _without_folder(text: str, arguments: argparse.Namespace) -> str:
    """The message, which may open with the folder, without it where paths are to be hashed."""
    for written in (arguments.folder, str(Path(arguments.folder))):
        if arguments.deidentify and text.startswith(f"{written}: "):
            return data.pseudonym("path", arguments.folder) + text.removeprefix(written)
    return text


def _check_picture(path: Path | None) -> None:
    """Before an hour of reading, not after it."""
    if path is not None and path.suffix.lower() != ".png":
        raise UsageError(f"--pictures {path}: give a name that ends in .png.")
    if path is not None and not path.absolute().parent.is_dir():
        raise UsageError(f"--pictures {path}: no such folder. Make it first.")


def _draw(listing: Listing, path: Path, display: Display) -> Sheet | None:
    # matplotlib takes a second that -h and the listing need not wait for
    from medvit.cli.contact_sheet import MOST_TILES, draw_sheet  # noqa: PLC0415

    rows = [row for row in listing.shown if row.series.usable]
    if not rows:
        return None
    display.start("reading pixels", min(len(rows), MOST_TILES))
    return draw_sheet(rows, path, display.step)


def _pictures_document(sheet: Sheet | None) -> dict[str, Any]:
    if sheet is None:
        return {}
    failed = [
        {
            "number": row.number,
            "series_uid": row.series.uid,
            "code": error.code,
            "detail": error.detail,
            "remedy": REASONS[error.code].remedy,
        }
        for row, error in sheet.failed
    ]
    return {"pictures": {"drawn": sheet.drawn, "left_out": sheet.left_out, "failed": failed}}


def _show_pictures(sheet: Sheet | None, path: Path | None) -> None:
    if path is None:
        return
    if sheet is None:
        print("no pictures: no series shown can be used")
        return
    more = f", {sheet.left_out:,} more not drawn: narrow them with a filter" if sheet.left_out else ""
    print(f"pictures of {sheet.drawn} series: {path}{more}")
    for row, error in sheet.failed:
        print(f"  series {row.number} is not readable: {error}")
