"""What a batch has done, in one SQLite file: the only memory of a run, from which its CSVs are exported.

A result is done when its row is committed, not when some file exists. The journal is write-ahead, so that a kill at any
moment leaves the last commit.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from medvit.io import FileEntry
from medvit.records import Outcome, ReasonCode, UsageError

SCHEMA = """
CREATE TABLE IF NOT EXISTS run (model_sha256 TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS result (
    case_id TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, row TEXT, code TEXT NOT NULL, detail TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS file (
    path TEXT PRIMARY KEY, outcome TEXT NOT NULL, code TEXT NOT NULL, detail TEXT NOT NULL, series_uid TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Stored:
    """The result of one case: a row of predictions.csv, or why there is none."""

    case_id: str
    fingerprint: str
    row: dict[str, Any] | None
    code: str = ""
    detail: str = ""


class Ledger:
    """The ledger of one output folder.

    Args:
        path: the SQLite file; made when missing.
        model_sha256: a ledger belongs to one model.

    Raises:
        UsageError: the ledger belongs to another model, or is in use or damaged.
    """

    def __init__(self, path: Path, model_sha256: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.connection = sqlite3.connect(path, timeout=5, isolation_level=None)
            self.connection.execute("PRAGMA journal_mode=WAL")
            self.connection.execute("PRAGMA synchronous=FULL")
            self.connection.executescript(SCHEMA)
            known = self.connection.execute("SELECT model_sha256 FROM run").fetchone()
        except sqlite3.DatabaseError as error:
            raise UsageError(f"{path}: the ledger cannot be used ({error}). Give another --output folder.") from None
        if known is None:
            self.connection.execute("INSERT INTO run VALUES (?)", (model_sha256,))
        elif known[0] != model_sha256:
            self.connection.close()
            raise UsageError(
                f"{path.parent}: holds the results of another model ({known[0][:12]}, this is {model_sha256[:12]}). "
                "Results of two models are not mixed: give another --output folder."
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def find(self, case_id: str) -> Stored | None:
        """The stored result of a case."""
        row = self.connection.execute("SELECT * FROM result WHERE case_id = ?", (case_id,)).fetchone()
        return None if row is None else _stored(row)

    def put(self, result: Stored) -> None:
        """Commit the result of a case, in place of an earlier one."""
        row = None if result.row is None else json.dumps(result.row)
        values = (result.case_id, result.fingerprint, row, result.code, result.detail)
        self.connection.execute("INSERT OR REPLACE INTO result VALUES (?, ?, ?, ?, ?)", values)

    def results(self) -> list[Stored]:
        """All results, by case."""
        return [_stored(row) for row in self.connection.execute("SELECT * FROM result ORDER BY case_id")]

    def put_files(self, entries: Iterable[FileEntry]) -> None:
        """Replace the account of files, in one transaction."""
        rows = [(e.path, str(e.outcome), str(e.code or ""), e.detail, e.series_uid) for e in entries]
        self.connection.execute("BEGIN")
        self.connection.execute("DELETE FROM file")
        self.connection.executemany("INSERT INTO file VALUES (?, ?, ?, ?, ?)", rows)
        self.connection.execute("COMMIT")

    def files(self) -> list[FileEntry]:
        """The account of files, by path."""
        rows = self.connection.execute("SELECT path, outcome, code, detail, series_uid FROM file ORDER BY path")
        return [
            FileEntry(path, Outcome(outcome), ReasonCode(code) if code else None, detail, series_uid)
            for path, outcome, code, detail, series_uid in rows
        ]


def _stored(row: tuple[Any, ...]) -> Stored:
    case_id, fingerprint, data, code, detail = row
    return Stored(case_id, fingerprint, None if data is None else json.loads(data), code, detail)
