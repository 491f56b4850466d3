"""What a batch has done, in one SQLite file: the only memory of a run, from which its CSVs are exported.

A result is done when its row is committed, not when some file exists. The journal is write-ahead and every commit is
flushed to the disk, so that a kill or a power cut at any moment leaves the last commit. One process writes; anybody may
look, while it does.

One row per study, because a study has one result: late slices, or a better series, reopen it, and the next result takes
the place of the first. A study gets its time when it is queued, so that the result of a run that was killed and of one
that was not are the same to the byte.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, Self

from medvit.deployment.audit_line import Head
from medvit.io import FileEntry
from medvit.records import MedvitError, Outcome, ReasonCode, UsageError

SCHEMA_VERSION = 2
SCHEMA = """
CREATE TABLE run (model_sha256 TEXT NOT NULL, config_sha256 TEXT NOT NULL, site_key TEXT NOT NULL);
CREATE TABLE result (
    study TEXT PRIMARY KEY, case_id TEXT NOT NULL, fingerprint TEXT NOT NULL, queued TEXT NOT NULL, state TEXT NOT NULL,
    row TEXT NOT NULL, slices TEXT NOT NULL, code TEXT NOT NULL, detail TEXT NOT NULL,
    sr TEXT NOT NULL, sc TEXT NOT NULL, made TEXT NOT NULL, digest TEXT NOT NULL, report TEXT NOT NULL,
    predecessor TEXT NOT NULL);
CREATE TABLE series (
    study_uid TEXT NOT NULL, series_uid TEXT NOT NULL, part INTEGER NOT NULL, outcome TEXT NOT NULL,
    codes TEXT NOT NULL, detail TEXT NOT NULL, files INTEGER NOT NULL, PRIMARY KEY (study_uid, series_uid, part));
CREATE TABLE file (
    name TEXT PRIMARY KEY, path TEXT NOT NULL, outcome TEXT NOT NULL, code TEXT NOT NULL, detail TEXT NOT NULL,
    series_uid TEXT NOT NULL);
CREATE TABLE audit (entries INTEGER NOT NULL, hash TEXT NOT NULL);
CREATE TABLE sent (name TEXT NOT NULL, target TEXT NOT NULL, PRIMARY KEY (name, target));
"""


class State(StrEnum):
    """Where a study stands."""

    WAITING = "waiting"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What is known of one study.

    Attributes:
        study: its UID, or what stands for it.
        case_id: of the series that was chosen.
        fingerprint: of the files it was made from.
        queued: when it was found, as ISO 8601.
        row: of predictions.csv; empty without a prediction. While a study waits again, what it had before: `outdated`.
        slices: those that decided, (number, weight).
        code: why there is no prediction; `detail` too, or why there is no DICOM result.
        sr: name of its report in `sr/`, empty where there is none; `sc` of its picture likewise.
        made: the time that report and picture carry.
        digest: of what they say.
        report: UID of the last report there was, also where it was withdrawn.
        predecessor: UID of the one before it.
    """

    study: str
    case_id: str
    fingerprint: str
    queued: str
    state: State = State.WAITING
    row: dict[str, Any]
    slices: tuple[tuple[int, float], ...] = ()
    code: str = ""
    detail: str = ""
    sr: str = ""
    sc: str = ""
    made: str = ""
    digest: str = ""
    report: str = ""
    predecessor: str = ""

    @property
    def outdated(self) -> bool:
        """Whether its prediction is of other images than there are now."""
        return bool(self.row) and self.state is not State.DONE


class SeriesEntry(NamedTuple):
    """What became of one volume of the folder."""

    study_uid: str
    series_uid: str
    part: int
    outcome: str
    codes: str
    detail: str
    files: int


class NamedFile(NamedTuple):
    """What became of a file; `name` is a keyed hash of its path, told only where the file was set aside."""

    name: str
    entry: FileEntry


class LedgerError(MedvitError):
    """The ledger cannot be written: nothing can be called done any more."""


class Ledger:
    """The ledger of one output folder.

    Args:
        path: the SQLite file; made when missing.
        model_sha256: a ledger belongs to one model.
        config_sha256: and to one configuration.
        site_key: and to one key of pseudonyms, of which this is a hash.

    Raises:
        UsageError: the ledger belongs to another model, configuration or key; is in use, damaged or of
            another version.
    """

    def __init__(self, path: Path, model_sha256: str, config_sha256: str, site_key: str) -> None:
        self.path, self.model_sha256, self.config_sha256 = path, model_sha256, config_sha256
        try:
            # the thread that delivers results writes, and nobody else while it does
            self.connection = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
            self.connection.execute("PRAGMA journal_mode=WAL")
            self.connection.execute("PRAGMA synchronous=FULL")
            known = self._opened(model_sha256, config_sha256, site_key)
        except sqlite3.DatabaseError as error:
            raise UsageError(f"{path}: the ledger cannot be used ({error}). Give another --output folder.") from None
        ours = model_sha256, config_sha256, site_key
        for what, one, other in zip(("model", "configuration", "site key"), known, ours, strict=True):
            if one != other:
                self.connection.close()
                raise UsageError(
                    f"{path.parent}: holds the results of another {what} ({one[:12]}, this is {other[:12]}). "
                    "Results of two are not mixed: give another --output folder."
                )

    def _opened(self, *ours: str) -> tuple[str, ...]:
        """Whose ledger it is; ours when it is new. Tables and owner are there together or not at all."""
        version = self.connection.execute("PRAGMA user_version").fetchone()[0]
        tables = self.connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not tables:
            with self._transaction():
                for statement in SCHEMA.split(";"):
                    self.connection.execute(statement)
                self.connection.execute("INSERT INTO run VALUES (?, ?, ?)", ours)
                self.connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        elif version != SCHEMA_VERSION:
            raise sqlite3.DatabaseError("written by another version of medvit")
        return tuple(self.connection.execute("SELECT * FROM run").fetchone())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, on the disk at the end."""
        try:
            self.connection.execute("BEGIN IMMEDIATE")
            yield
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise

    def find(self, study: str) -> Result | None:
        """What is known of a study."""
        row = self.connection.execute(f"SELECT {_COLUMNS} FROM result WHERE study = ?", (study,)).fetchone()
        return None if row is None else _result(row)

    def queue(self, found: Iterable[tuple[str, str, str]], now: datetime) -> None:
        """Put studies (study, case_id, fingerprint) on the list, in one transaction; what they had stays till then."""
        time = now.isoformat()
        with _told(self.path), self._transaction():
            self.connection.executemany(
                "INSERT INTO result VALUES (?, ?, ?, ?, 'waiting', '{}', '[]', '', '', '', '', '', '', '', '') "
                "ON CONFLICT (study) DO UPDATE SET case_id = excluded.case_id, fingerprint = excluded.fingerprint, "
                "queued = excluded.queued, state = 'waiting', code = '', detail = '' "
                "WHERE state <> 'waiting' OR fingerprint <> excluded.fingerprint OR case_id <> excluded.case_id",
                ((*one, time) for one in found),
            )

    def outdate(self, studies: Iterable[str]) -> None:
        """The images of these studies changed; they wait, though they are not predicted in this run."""
        with _told(self.path), self._transaction():
            self.connection.executemany(
                "UPDATE result SET state = 'waiting' WHERE study = ?", ((study,) for study in studies)
            )

    def put(self, result: Result) -> None:
        """Commit the result of a study, in place of an earlier one."""
        values = astuple(result)
        packed = [json.dumps(value) if isinstance(value, dict | tuple) else value for value in values]
        with _told(self.path):
            self.connection.execute(f"INSERT OR REPLACE INTO result ({_COLUMNS}) VALUES ({_MARKS})", packed)

    def failed(self) -> dict[str, Result]:
        """Studies without a prediction."""
        query = f"SELECT {_COLUMNS} FROM result WHERE state = ?"
        return {row[0]: _result(row) for row in self.connection.execute(query, (str(State.FAILED),))}

    def results(self) -> Iterator[Result]:
        """All results, by study."""
        for row in self.connection.execute(f"SELECT {_COLUMNS} FROM result ORDER BY study"):
            yield _result(row)

    def put_account(self, series: Iterable[SeriesEntry], files: Iterable[NamedFile]) -> None:
        """Replace the account of series and files, in one transaction."""
        with _told(self.path), self._transaction():
            self.connection.execute("DELETE FROM series")
            self.connection.execute("DELETE FROM file")
            self.connection.executemany("INSERT INTO series VALUES (?, ?, ?, ?, ?, ?, ?)", series)
            self.connection.executemany(
                "INSERT INTO file VALUES (?, ?, ?, ?, ?, ?)",
                ((name, e.path, str(e.outcome), str(e.code or ""), e.detail, e.series_uid) for name, e in files),
            )

    def set_aside(self) -> Iterator[FileEntry]:
        """Files that could not be used, by path."""
        rows = self.connection.execute(
            f"SELECT path, outcome, code, detail, series_uid FROM file WHERE {_SET_ASIDE} ORDER BY path"
        )
        for path, outcome, code, detail, series_uid in rows:
            yield FileEntry(path, Outcome(outcome), ReasonCode(code), detail, series_uid)

    def outcomes(self) -> dict[Outcome, int]:
        """Files by outcome; they add up to the files seen."""
        rows = dict(self.connection.execute("SELECT outcome, count(*) FROM file GROUP BY outcome"))
        return {outcome: rows.get(str(outcome), 0) for outcome in Outcome}

    def reasons(self) -> dict[str, int]:
        """Files that could not be used, by reason code."""
        query = f"SELECT code, count(*) FROM file WHERE {_SET_ASIDE} GROUP BY code"
        return dict(self.connection.execute(query))

    def written(self) -> list[str]:
        """Reports and pictures that there are, as paths in the output folder, by study."""
        rows = self.connection.execute("SELECT sr, sc FROM result ORDER BY study")
        return [name for row in rows for name in row if name]

    def put_audit(self, head: Head) -> None:
        """Remember the end of the audit: without it nobody would miss its last lines."""
        with _told(self.path), self._transaction():
            self._keep_audit(head)

    def _keep_audit(self, head: Head) -> None:
        self.connection.execute("DELETE FROM audit")
        self.connection.execute("INSERT INTO audit VALUES (?, ?)", head)

    def audit(self) -> Head | None:
        """The end of the audit when a run last ended."""
        row = self.connection.execute("SELECT entries, hash FROM audit").fetchone()
        return None if row is None else Head(*row)

    def unsent(self, target: str) -> list[str]:
        """Results, as paths in the output folder, that a PACS has not got yet; none of images that have changed."""
        rows = self.connection.execute("SELECT sr, sc FROM result WHERE state = ? ORDER BY study", (str(State.DONE),))
        known = {name for (name,) in self.connection.execute("SELECT name FROM sent WHERE target = ?", (target,))}
        return [name for row in rows for name in row if name and name not in known]

    def put_sent(self, name: str, target: str, audit: Head) -> None:
        """Remember that a PACS has a result, and the end of the audit that says so."""
        with _told(self.path), self._transaction():
            self.connection.execute("INSERT OR REPLACE INTO sent VALUES (?, ?)", (name, target))
            self._keep_audit(audit)


_COLUMNS = ", ".join(field.name for field in fields(Result))
_MARKS = ", ".join("?" for _ in fields(Result))
_SET_ASIDE = f"outcome IN ({', '.join(repr(str(outcome)) for outcome in Outcome if outcome.bad)})"


def _result(row: tuple[Any, ...]) -> Result:
    values = dict(zip((field.name for field in fields(Result)), row, strict=True))
    slices = tuple((number, weight) for number, weight in json.loads(values.pop("slices")))
    return Result(**values | {"row": json.loads(values["row"]), "slices": slices, "state": State(values["state"])})


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What SQLite says of a failed write, as what a person can act on."""
    try:
        yield
    except sqlite3.OperationalError as error:
        full = "full" in str(error)
        do = "make room" if full else "see to the disk"
        raise LedgerError(
            f"{path}: the ledger cannot be written ({error}). What it holds is safe: {do} and run the command again."
        ) from None
