"""A listing for a person: series by study, what is set aside with its remedy, one study in full.

Long accounts are shortened here and nowhere else. All text from headers and file names is shown, never obeyed.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import TextIOWrapper

from rich.console import Console
from rich.text import Text

from medvit import io
from medvit.cli.console import tables
from medvit.cli.listing import SELECTION_RULE, Listing, Row, printable
from medvit.cli.series_table import STYLES, WIDE, series_table
from medvit.cli.studies import study_of
from medvit.records import REASONS, Outcome, ReasonCode

FILES_PER_CODE, FILES_OF_STUDY = 3, 12
"""Lines shown of each code before "and 1,990 more", of a folder and of the one study asked for."""

INDENT = " " * 9


def show(listing: Listing) -> None:
    """Print the series, then the account of the folder or of the one study asked for."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # Japanese must not end the listing on an ASCII terminal
    console = tables()
    _show_series(console, listing)
    if listing.study:
        _show_study(console, listing)
    else:
        _show_flags(console, listing.rows)
        _show_accounts(console, "set aside", listing.set_aside, listing, FILES_PER_CODE)
    found, counts = listing.found, listing.found.counts()
    _say(
        console,
        f"\n{len(found.files):,} files seen: {counts['ok'] + counts['flag']:,} used ({counts['flag']:,} flagged), "
        f"{counts['quarantine']:,} quarantined, {counts['reject']:,} rejected, {counts['skip']:,} skipped",
    )


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style), soft_wrap=True)


def _show_series(console: Console, listing: Listing) -> None:
    shown, hidden = listing.shown, len(listing.rows) - len(listing.shown)
    studies = len({study_of(row.series) for row in shown})
    beside = f"; {hidden:,} more hidden by the filter" if hidden else ""
    _say(console, f"{len(shown):,} series in {studies:,} {'study' if studies == 1 else 'studies'}{beside}", "bold")
    if not shown:
        return
    console.print(series_table(listing, console.width))
    if any(row.chosen for row in shown):
        _say(console, SELECTION_RULE, "dim")


def _show_flags(console: Console, rows: Iterable[Row]) -> None:
    """What the codes of used series mean."""
    flags = Counter(code for row in rows if row.series.usable for code in row.series.codes)
    if flags:
        _say(console, "\nused, with a warning", "bold")
    for code, count in flags.most_common():
        _say(console, _with_remedy(f"{_count(count, 'series', 'series')}  {code:16}", code, console.width))


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:>6,} {one if number == 1 else many or one + 's':6}"


def _with_remedy(head: str, code: ReasonCode | None, width: int) -> str:
    """The remedy behind its code, or below it where the terminal is narrow."""
    if code is None:
        return head.rstrip()
    return f"{head}  {REASONS[code].remedy}" if width >= WIDE else f"{head}\n{INDENT}{REASONS[code].remedy}"


def _show_accounts(console: Console, title: str, entries: Sequence[io.FileEntry], listing: Listing, most: int) -> None:
    """Entries by outcome and code, worst first: how many, what to do, and the first few."""
    if not entries:
        return
    _say(console, f"\n{title}", "bold")
    numbers = listing.numbers
    groups: dict[tuple[Outcome, ReasonCode | None], list[io.FileEntry]] = {}
    for entry in entries:
        groups.setdefault((entry.outcome, entry.code), []).append(entry)
    for (outcome, code), members in sorted(groups.items(), key=lambda item: (not item[0][0].bad, -len(item[1]))):
        head = f"{_count(len(members), 'file')}  {outcome:10}  {code or '':16}"
        _say(console, _with_remedy(head, code, console.width), STYLES.get(outcome, ""))
        lines = _account_lines(members, numbers, listing.path)
        for line in lines[:most]:
            _say(console, f"{INDENT}{line}")
        if len(lines) > most:
            _say(console, f"{INDENT}and {len(lines) - most:,} more: --json lists all")


def _account_lines(
    entries: Iterable[io.FileEntry], numbers: Mapping[str, int], path: Callable[[str], str]
) -> list[str]:
    """One line for the files of one series, one for each file that belongs to none."""
    of_series: dict[int, list[io.FileEntry]] = {}
    alone: list[io.FileEntry] = []
    for entry in entries:
        members = of_series.setdefault(numbers[entry.path], []) if entry.path in numbers else alone
        members.append(entry)
    lines = [_account_line("", entry, 0, path) for entry in alone]
    for number, members in sorted(of_series.items()):
        lines.append(_account_line(f"series {number}: ", members[0], len(members) - 1, path))
    return lines


def _account_line(head: str, first: io.FileEntry, further: int, path: Callable[[str], str]) -> str:
    more = f" and {further:,} more" if further else ""
    return f"{head}{printable(path(first.path))}{more}  {printable(first.detail)}".rstrip()


def _show_study(console: Console, listing: Listing) -> None:
    entries = listing.of_study
    _show_accounts(console, f"files of study {listing.study}", entries, listing, FILES_OF_STUDY)
    members = [row for row in listing.rows if study_of(row.series) == listing.study]
    chosen = next((row.number for row in members if row.chosen), None)
    others = ", ".join(str(row.number) for row in members if row.series.usable and not row.chosen)
    if chosen is not None:
        beside = f"; not chosen: {others}" if others else ""
        _say(console, f"\nSeries {chosen} is what medvit uses of this study{beside}.", "bold")
    else:
        codes = ", ".join(dict.fromkeys(str(entry.code) for entry in entries if entry.code))
        what = "its CT is set aside" if members else "it holds no CT volume"
        _say(console, f"\nNothing of this study is used: {what} ({codes}).", "bold")
