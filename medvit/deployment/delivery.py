"""From an answer to what is kept: report and picture on the disk first, then the row that says that it is done.

A kill in between leaves files that no row names; they are written again, with the same names and bytes, or swept away
when the next run begins. What a report says is part of its UID, because no UID may stand for two contents (PS3.5 9):
the same answer to the same images is the same report, with the time of the first; another one names its predecessor.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from medvit.data.pseudonym import pseudonym
from medvit.deployment.audit import Audit
from medvit.deployment.choice import PASSING, Listed
from medvit.deployment.ledger import Ledger, Result, State
from medvit.deployment.premises import require_folder, written
from medvit.deployment.work import Answer, failure
from medvit.io import ResultContext, Source, check_unchanged, deciding_slices, open_source, write_sc, write_sr
from medvit.records import MedvitError, Prediction, Preprocessing, ScanError

REPORTS, PICTURES = "sr", "sc"
"""Folders of the output."""

OURS = re.compile(r"2\.25\.\d+\.dcm(\.part)?")
"""Names of what is written there."""


@dataclass(frozen=True)
class Delivery:
    """Writes answers below a folder and commits them to a ledger.

    Attributes:
        folder: of the output.
        ledger: of the run.
        preprocessing: of the model: which way its slices are counted.
        context: of results; its time is replaced by that of the study.
        to_row: the row of predictions.csv that is kept of a prediction.
        audit: is told before the ledger, so that nothing is done that is not recorded.
        dicom: whether reports and pictures are wanted.
    """

    folder: Path
    ledger: Ledger
    preprocessing: Preprocessing
    context: ResultContext
    to_row: Callable[[Prediction], dict[str, Any]]
    audit: Audit
    dicom: bool = True

    def __call__(self, one: Listed, answer: Answer) -> Result:
        """Deliver the answer of a study that is queued.

        Raises:
            MedvitError: it cannot be written, or the folder of the images is gone; nothing can be delivered any more.
        """
        before = self.ledger.find(one.study)
        assert before is not None  # answers are asked for what was queued
        if answer.prediction is None:
            result = self._failed(before, one, answer)
        else:
            result = self._done(before, one, answer, answer.prediction)
        self._record(one, result)
        self.ledger.put(result)
        for name in (before.sr, before.sc):
            if name and name not in (result.sr, result.sc):
                (self.folder / name).unlink(missing_ok=True)
        return result

    def _failed(self, before: Result, one: Listed, answer: Answer) -> Result:
        """Without a prediction; for a reason that may pass, what the study had stays as it is."""
        why: dict[str, Any] = {"state": State.FAILED, "code": answer.code, "detail": answer.detail}
        if answer.code in PASSING:
            require_folder(one.series.root)
            return replace(before, **why)
        return replace(before, row={}, slices=(), sr="", sc="", **why)

    def _done(self, before: Result, one: Listed, answer: Answer, prediction: Prediction) -> Result:
        done = replace(
            before,
            state=State.DONE,
            row=self.to_row(prediction),
            slices=deciding_slices(prediction),
            code="",
            detail="",
            sr="",
            sc="",
        )
        if not self.dicom:
            return done
        try:
            source = self._source(one)
        except (ScanError, OSError) as error:
            failed = failure(one.case, error)
            if failed.code in PASSING:  # changed or gone since it was read: the next run sees to the study
                return self._failed(before, one, failed)
            return replace(done, detail=f"no DICOM result ({failed.code}: {failed.detail})")
        try:
            with written(self.folder):
                return self._written(done, before, source, answer, prediction)
        except MedvitError:
            raise
        except Exception as error:  # noqa: BLE001  one study never stops a batch; its kind is kept
            return replace(done, detail=f"no DICOM result ({type(error).__name__})")

    def _source(self, one: Listed) -> Source:
        """The series as it was when the model saw it."""
        as_stored = self.preprocessing.orientation == "as_stored"
        paths = [one.series.root / name for name in one.series.files]
        source = open_source(paths, part=one.series.part, as_stored=as_stored)
        check_unchanged(one.series)
        return source

    def _written(self, done: Result, before: Result, source: Source, answer: Answer, prediction: Prediction) -> Result:
        """The result with its report and picture on the disk."""
        digest = _digest(done, source, answer, self.context)
        if digest == before.digest:
            done = replace(done, made=before.made, predecessor=before.predecessor)
        else:
            # without identity UIDs are not those of the objects in the PACS, and nothing there is replaced
            predecessor = "" if self.context.pseudonym else before.report
            done = replace(done, digest=digest, made=done.queued, predecessor=predecessor)
        context = replace(
            self.context, now=datetime.fromisoformat(done.made), content=f"{digest} {done.predecessor}".strip()
        )
        report = write_sr(prediction, source, context, self.folder / REPORTS, predecessor=done.predecessor)
        picture = ""
        if answer.picture is not None:
            path = write_sc(answer.picture.rgb, answer.picture.number, source, context, self.folder / PICTURES)
            picture = f"{PICTURES}/{path.name}"
        return replace(done, sr=f"{REPORTS}/{report.name}", sc=picture, report=report.stem)

    def _record(self, one: Listed, result: Result) -> None:
        """What was read, decided and written, in the audit."""
        case = one.case
        about = {"case_id": case.case_id, "patient_id": case.patient_id, "study": pseudonym("study", case.study_uid)}
        if result.state is State.FAILED:
            self.audit.append("set_aside", **about, code=result.code)
            return
        files = [Path(name).name for name in (result.sr, result.sc) if name]
        called = str(result.row["predicted"])
        if not re.fullmatch(r"[^\x00-\x1f\x7f]{1,64}", called):
            called = pseudonym("class", called)
        flags = result.row["flags"].split()
        self.audit.append("decided", **about, predicted=called, flags=flags, file=files)


def _digest(done: Result, source: Source, answer: Answer, context: ResultContext) -> str:
    """Hash of all that report and picture say, time and predecessor apart."""
    picture = answer.picture
    said = {
        "row": done.row,
        "slices": done.slices,
        "identity": {keyword: raw.hex() for keyword, raw in source.identity.items()},
        "picture": None if picture is None else [picture.number, hashlib.sha256(picture.rgb.tobytes()).hexdigest()],
        "version": context.model_version,
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def sweep(folder: Path, results: Iterable[Result]) -> None:
    """Remove what an interrupted run wrote and no row names."""
    known = {name for one in results for name in (one.sr, one.sc)}
    for kind in (REPORTS, PICTURES):
        for path in (folder / kind).glob("*"):
            if OURS.fullmatch(path.name) and f"{kind}/{path.name}" not in known and path.is_file():
                path.unlink()
