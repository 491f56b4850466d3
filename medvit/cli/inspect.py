"""medvit-inspect: what is in this folder, what will be used, and why not the rest."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

from rich.table import Table

from medvit import data, io
from medvit.cli.console import Display, Parser, command, tables
from medvit.records import EXIT_DONE, EXIT_QUARANTINE, REASONS, UsageError

EPILOG = """
examples:
  medvit-inspect /exports/october
  medvit-inspect /exports/october --json > october.json

reason codes:
""" + "\n".join(f"  {code:22} {reason.outcome:10} {reason.remedy}" for code, reason in REASONS.items())


def parser() -> Parser:
    """The arguments."""
    result = Parser("inspect", __doc__ or "", EPILOG)
    result.add_argument("folder", metavar="FOLDER", help="searched with all subfolders; links are not followed")
    result.add_argument("--json", action="store_true", help="one JSON document on stdout")
    result.add_argument("--assume-hu", action="store_true", help="take values without rescale tags for HU, flagged")
    result.add_argument("--deidentify", action="store_true", help="hash paths: they may hold names")
    return result


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    arguments = parser().parse_args(argv)
    with Display() as display:
        display.start("reading headers", 0)
        found = io.scan_folder(arguments.folder, assume_hu=arguments.assume_hu, progress=lambda _: display.step())
    if arguments.deidentify:
        found = replace(found, files=tuple(replace(e, path=data.pseudonym("path", e.path)) for e in found.files))
    if arguments.json:
        print(json.dumps(to_document(found), indent=1))
    else:
        show(found)
    if not found.series:
        raise UsageError(
            f"{arguments.folder}: no CT among {len(found.files)} files; the reasons are listed. Export CT images."
        )
    return EXIT_QUARANTINE if any(entry.outcome.bad for entry in found.files) else EXIT_DONE


def to_document(found: io.Inventory) -> dict[str, Any]:
    """The inventory as JSON: `files` by outcome, `codes`, `series`, and `set_aside` with a remedy for each file."""
    aside = [entry for entry in found.files if not entry.outcome.used]
    codes = Counter(entry.code for entry in aside if entry.code is not None)
    return {
        "files": {"seen": len(found.files), **found.counts()},
        "codes": {
            code: {"files": n, "outcome": REASONS[code].outcome, "remedy": REASONS[code].remedy}
            for code, n in codes.items()
        },
        "series": [
            {
                "series_uid": series.uid,
                "study_uid": series.study_uid,
                "outcome": series.outcome,
                "codes": list(series.codes),
                "detail": series.detail,
                "shape_zyx": list(series.shape),
                "spacing_xyz_mm": list(series.spacing_mm),
                "files": len(series.files),
                "site": series.header.site,
                "sex": series.header.sex,
                "age": series.header.age,
                **series.header.acquisition(),
            }
            for series in found.series
        ],
        "set_aside": [
            {
                "path": entry.path,
                "outcome": entry.outcome,
                "code": entry.code,
                "detail": entry.detail,
                "series_uid": entry.series_uid,
                "remedy": REASONS[entry.code].remedy if entry.code else "",
            }
            for entry in aside
        ],
    }


def show(found: io.Inventory) -> None:
    """Tables for a person: series, then what is set aside by code with its remedy, then the files."""
    console = tables()
    console.print(_series_table(found))
    aside = [entry for entry in found.files if not entry.outcome.used]
    if aside:
        console.print(_code_table(aside))
        for entry in aside:
            console.print(f"  {entry.outcome:10} {entry.code or '':22} {entry.path}  {entry.detail}", markup=False)
    counts = found.counts()
    used = counts["ok"] + counts["flag"]
    console.print(
        f"\n{len(found.files)} files seen: {used} used ({counts['flag']} flagged), {counts['quarantine']} quarantined, "
        f"{counts['reject']} rejected, {counts['skip']} skipped"
    )


def _series_table(found: io.Inventory) -> Table:
    table = Table(title=f"{len(found.series)} series", title_justify="left")
    for name in (
        "outcome",
        "slices",
        "matrix",
        "spacing mm",
        "kernel",
        "site",
        "sex",
        "description",
        "codes",
        "detail",
    ):
        table.add_column(name, overflow="fold")
    for series in found.series:
        header = series.header
        z, y, x = series.shape
        table.add_row(
            str(series.outcome),
            str(z),
            f"{y}×{x}",
            " × ".join(f"{value:.3g}" for value in series.spacing_mm) if any(series.spacing_mm) else "",
            header.kernel,
            header.site,
            header.sex,
            header.description,
            " ".join(series.codes),
            series.detail,
        )
    return table


def _code_table(aside: list[io.FileEntry]) -> Table:
    table = Table(title="set aside", title_justify="left")
    for name in ("files", "code", "outcome", "what to do"):
        table.add_column(name, overflow="fold")
    for (code, outcome), count in Counter((entry.code, entry.outcome) for entry in aside).most_common():
        table.add_row(str(count), str(code or ""), str(outcome), REASONS[code].remedy if code else "")
    return table
