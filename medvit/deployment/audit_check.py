"""Is an audit the chain that the site wrote? Every line that was edited, removed, inserted or moved, by its number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from medvit.deployment.audit_line import START, Head, derive_key, hash_of, unseal


class Problem(NamedTuple):
    """What is wrong, at which line of the file; lines and entries count from 1."""

    line: int
    what: str


@dataclass(frozen=True)
class Verdict:
    """What a check of a whole file found.

    Attributes:
        head: the last entry that is the site's.
        problems: none: the chain is whole up to `head`.
        anchored: an expected end was given, so that removal at the end would have shown.
    """

    head: Head
    problems: tuple[Problem, ...]
    anchored: bool = False

    @property
    def intact(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(path: Path, key: bytes, expected: Head | None = None) -> Verdict:
    """Check every line of an audit.

    Args:
        path: of the file.
        key: the site's.
        expected: an end of the chain that was kept elsewhere: entries up to it must be there. Without it, removing the
            last lines leaves no trace.
    """
    check = _Check(derive_key(key), expected)
    problems: list[Problem] = []
    number = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            problems += (Problem(number, what) for what in check.line(line))
    problems += (Problem(number + 1, what) for what in check.end())
    return Verdict(check.head, tuple(problems), expected is not None)


class _Check:
    """Goes through a file line by line; holds no more than one."""

    def __init__(self, key: bytes, expected: Head | None) -> None:
        self.key, self.expected, self.head = key, expected, START
        self.foreign = 0  # lines that are not the site's since the last one that is

    def line(self, line: bytes) -> Iterator[str]:
        """What is wrong with the next line."""
        if not line.endswith(b"\n"):
            yield "is cut off: a kill while it was written (the next run mends that), or somebody removed its end"
            return
        if (entry := unseal(line[:-1], self.key)) is None:
            self.foreign += 1
            yield "was edited or inserted: its hash is not the site's"
            return
        this = Head(entry["seq"], hash_of(line[:-1]))
        yield from self._place(this, entry["prev"])
        if this.entries > self.head.entries:
            self.head, self.foreign = this, 0

    def _place(self, this: Head, prev: str) -> Iterator[str]:
        gap = this.entries - self.head.entries - 1
        if gap < 0:
            yield f"holds entry {this.entries}, which belongs further up: moved or copied"
        elif gap > self.foreign:
            missing = _entries(self.head.entries + 1, this.entries - 1)
            of = f" ({self.foreign} of these may be lines that were edited)" if self.foreign else ""
            yield f"holds entry {this.entries}, and {missing} not before it{of}"
        elif not gap and prev != self.head.hash:
            yield f"holds entry {this.entries} of another chain"
        if self.expected and this.entries == self.expected.entries and this.hash != self.expected.hash:
            yield f"holds entry {this.entries}, and it is not the one whose hash was kept"

    def end(self) -> Iterator[str]:
        """What is missing after the last line."""
        if self.expected and self.head.entries < self.expected.entries:
            yield f"is absent: {_entries(self.head.entries + 1, self.expected.entries)} missing, and were there once"


def _entries(first: int, last: int) -> str:
    return f"entry {first} is" if first == last else f"entries {first} to {last} are"


def told(verdict: Verdict, shown: int = 20) -> Iterable[str]:
    """A verdict in plain words, a line each."""
    if not verdict.intact:
        places = f"{len(verdict.problems)} place" + "s" * (len(verdict.problems) > 1)
        yield f"the chain is broken in {places}. Keep the file as it is, and find out who changed it."
        yield from (f"line {line} {what}" for line, what in verdict.problems[:shown])
        if len(verdict.problems) > shown:
            yield f"and {len(verdict.problems) - shown} more"
        return
    entries, end = verdict.head
    yield f"{entries} entries, none edited, removed from between, inserted or moved."
    if verdict.anchored:
        yield "Nor is any missing up to the end that was given."
    else:
        yield "Whether any is missing at the end shows only against an end that was kept elsewhere (--audit-end)."
    yield f"The end is {entries}:{end}"
