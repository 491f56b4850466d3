"""A PACS, both ways: which CT studies are there, one study into a folder, results back.

One door for DICOMweb and DIMSE: `open_pacs("dicomweb+https://host/path")`, `open_pacs("dimse://AE@host:port")`. What
differs between them is a `Wire`; trying again, counting what came and the folder that images land in are here. No
C-MOVE: it needs a port of ours that the PACS knows and may call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from medvit.io.pacs_inbox import Inbox
from medvit.io.pacs_query import is_uid, study_query
from medvit.io.pacs_retry import Course, PacsError, Retry, TransientError
from medvit.io.pacs_url import PacsUrl, parse_url
from medvit.records import UsageError

STUDY_LIMIT_BYTES = 20 << 30
"""Of one study, by default: some ten times a large CT."""

CONNECT_S, READ_S = 10.0, 60.0
"""Timeouts of a connection and of silence on it. A PACS may have to fetch from tape; 60 s is what dcm4che allows."""


@dataclass(frozen=True)
class Found:
    """A study or series that a PACS has; nothing that names a patient is kept.

    Attributes:
        study_uid: of the study; of the series where a `Wire` lists series.
        instances: objects of every kind in it; None: the PACS does not say.
    """

    study_uid: str
    instances: int | None


@dataclass(frozen=True)
class Sent:
    """What became of a file that was sent.

    Attributes:
        path: as given.
        accepted: the PACS has it now.
        code: empty; ALREADY_THERE (accepted: the PACS had it); or why not: IO_ERROR, NOT_DICOM, NOT_SUPPORTED (the PACS
            takes no such objects), UNCONFIRMED (it did not say that it stored), HTTP_ and the status of the answer,
            STATUS_ and four hexadecimal digits (PS3.4 table B.2-1, PS3.18 table I.2-2).
    """

    path: Path
    accepted: bool
    code: str = ""


class Wire(Protocol):
    """One protocol, one request at a time; what may pass is raised as `TransientError`."""

    def studies(self, query: Mapping[str, str], check: Callable[[], None]) -> list[Found]:
        """The studies that match; UIDs as they come."""

    def series(self, study_uid: str, check: Callable[[], None]) -> list[Found]:
        """The CT series of a study; UIDs as they come."""

    def pull(self, study_uid: str, series_uid: str, inbox: Inbox) -> None:
        """All images of a series into the inbox."""

    def sender(self, paths: Iterable[Path]) -> AbstractContextManager[Callable[[Path], Sent]]:
        """What sends one of these files."""


class Pacs:
    """A PACS; made by `open_pacs`. Not for several threads at a time.

    Args:
        url: where it is.
        wire: how it is spoken to.
        retry: how often and how long to try.
    """

    def __init__(self, url: PacsUrl, wire: Wire, retry: Retry) -> None:
        self.url, self._wire, self._retry = url, wire, retry

    def __repr__(self) -> str:
        return f"Pacs({str(self.url)!r})"

    def find(self, query: Mapping[str, str]) -> tuple[Found, ...]:
        """The CT studies that match, each once.

        Args:
            query: DICOM keyword -> value, of the study level (`STUDY_KEYS`), wildcards and ranges as in PS3.4 C.2.2.2:
                `{"StudyDate": "20261127-"}`. `ModalitiesInStudy` is CT where it is not given.

        Raises:
            UsageError: an unknown keyword or an empty value.
            PacsError: the PACS cannot be reached, or refuses, or lists a study without a legal UID.
        """
        wanted = study_query(query)
        course = self._course()
        return self._legal(course.run(lambda: self._wire.studies(wanted, course.check)))

    def images(self, study_uid: str) -> int:
        """How many CT images a study has, as far as the PACS says; our own results in it do not count.

        Raises:
            PacsError: the PACS cannot be reached, or refuses.
        """
        course = self._course()
        series = self._legal(course.run(lambda: self._wire.series(study_uid, course.check)))
        return sum(one.instances or 0 for one in series)

    def fetch(self, study_uid: str, folder: Path, *, limit_bytes: int = STUDY_LIMIT_BYTES) -> int:
        """Retrieve the CT series of a study into a folder that is there when all is there; the number of images.

        Images are kept byte for byte in the transfer syntax that they come in. 0: the study has no CT, and there is no
        folder. While it runs, the images are in `NAME.part` beside it: do not scan the parent.

        Args:
            study_uid: of the study.
            folder: made; must not exist.
            limit_bytes: of the whole study.

        Raises:
            UsageError: no UID, or `folder` exists.
            PacsError: the PACS cannot be reached, refuses, or gives fewer images than it says it has.
        """
        if not is_uid(study_uid):
            raise UsageError("fetch: need a StudyInstanceUID of at most 64 digits and dots, as `find` gives it.")
        course = self._course()
        series = self._legal(course.run(lambda: self._wire.series(study_uid, course.check)))
        if not series:
            return 0
        with Inbox(Path(folder), limit_bytes, course.check) as inbox:
            for number, one in enumerate(series, 1):
                course.run(lambda number=number, one=one: self._pull(study_uid, one, number, inbox))  # type: ignore[misc]
            return inbox.finish()

    def send(self, paths: Iterable[Path], *, settled: Callable[[Sent], None] = lambda _: None) -> tuple[Sent, ...]:
        """Store files; each is accepted or refused with a code.

        Args:
            paths: DICOM files. They are sent as they are.
            settled: told of each file as soon as its fate is known, for what comes after may fail.

        Raises:
            PacsError: the PACS cannot be reached, or refuses us rather than a file.
        """
        files = [Path(path) for path in paths]
        course, results = self._course(), list[Sent]()
        with self._wire.sender(files) as store:
            for path in files:
                fault = _fault(path)
                one = Sent(path, False, fault) if fault else course.run(lambda path=path: store(path))  # type: ignore[misc]
                results.append(one)
                settled(one)
        return tuple(results)

    def _course(self) -> Course:
        return Course(self._retry, self.url.place)

    def _legal(self, found: Iterable[Found]) -> tuple[Found, ...]:
        """Each once; all or nothing, for what is left out would not be missed."""
        once = {one.study_uid: one for one in found}
        if not all(map(is_uid, once)):
            raise PacsError(f"{self.url.place}: lists a study or series without a legal UID. Correct it in the PACS.")
        return tuple(once.values())

    def _pull(self, study_uid: str, series: Found, number: int, inbox: Inbox) -> None:
        inbox.begin(number)
        self._wire.pull(study_uid, series.study_uid, inbox)
        if inbox.count < (series.instances or 0):
            raise TransientError(f"gave {inbox.count} images of a series that has {series.instances}")


def open_pacs(url: str, *, retry: Retry | None = None, connect_s: float = CONNECT_S, read_s: float = READ_S) -> Pacs:
    """A PACS by its address; nothing is sent yet.

    Args:
        url: `dicomweb+http://host:port/path`, `dicomweb+https://user:password@host/path` or
            `dimse://AE@host:port?aet=OURS`. Credentials also from MEDVIT_PACS_USER and MEDVIT_PACS_PASSWORD, or
            MEDVIT_PACS_TOKEN; certificates of an authority of one's own from REQUESTS_CA_BUNDLE.
        retry: how often and how long to try; None: `Retry()`.
        connect_s: longest wait for a connection.
        read_s: longest silence on one.

    Raises:
        UsageError: the address is none.
    """
    where = parse_url(url)
    wire: Wire
    if where.scheme == "dimse":
        from medvit.io.pacs_dimse import DimseWire  # noqa: PLC0415  half a second that DICOMweb need not wait

        wire = DimseWire(where, connect_s, read_s)
    else:
        from medvit.io.pacs_web import WebWire  # noqa: PLC0415  as above

        wire = WebWire(where, connect_s, read_s)
    return Pacs(where, wire, retry or Retry())


def _fault(path: Path) -> str:
    """Why a file cannot be sent at all; empty: it can."""
    try:
        with path.open("rb") as stream:
            return "" if stream.read(132)[128:] == b"DICM" else "NOT_DICOM"  # PS3.10 7.1
    except OSError:
        return "IO_ERROR"
