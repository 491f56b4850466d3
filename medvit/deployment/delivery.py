"""From an answer to what is kept: report and picture on the disk first, then the row that says that it is done.

A kill in between leaves files that no row names; they are written again, with the same names and bytes, or swept away
when the next run begins. What a report says is part of its UID, because no UID may stand for two contents (PS3.5 9):
the same answer to the same images is the same report, with the time of the first; another one names its predecessor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medvit.data.pseudonym import pseudonym
from medvit.deployment import scribe
from medvit.deployment.audit import Audit
from medvit.deployment.choice import PASSING, REPEATED, Listed
from medvit.deployment.compose import Documents, Order, Version
from medvit.deployment.ledger import Ledger, Result, State
from medvit.deployment.premises import require_folder, written
from medvit.deployment.work import Answer, failure
from medvit.io import ResultContext, check_unchanged, deciding_slices
from medvit.records import Prediction, Preprocessing, ReasonCode, ScanError

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
        require_folder(one.series.root)
        if answer.code not in PASSING:
            try:  # a share that fails looks like a damaged file
                check_unchanged(one.series)
            except ScanError as error:
                answer = failure(one.case, error)
        why: dict[str, Any] = {"state": State.FAILED, "code": answer.code, "detail": answer.detail}
        if answer.code in PASSING:
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
            documents = scribe.shared(self._order(one, answer, prediction, done, before))
        except (ScanError, OSError) as error:
            failed = failure(one.case, error)
            if failed.code in PASSING:  # changed or gone since it was read: the next run sees to the study
                return self._failed(before, one, failed)
            code = failed.code if failed.code in REPEATED else ""
            return replace(done, code=code, detail=f"no DICOM result ({failed.code}: {failed.detail})")
        except Exception as error:  # noqa: BLE001  one study never stops a batch; its kind is kept
            kind = error if isinstance(error, RuntimeError) else type(error).__name__  # which is all the scribe tells
            return replace(done, code=str(ReasonCode.WORKER_DIED), detail=f"no DICOM result ({kind})")
        with written(self.folder):
            return self._written(done, documents)

    def _order(self, one: Listed, answer: Answer, prediction: Prediction, done: Result, before: Result) -> Order:
        picture = answer.picture
        return Order(
            series=one.series,
            as_stored=self.preprocessing.orientation == "as_stored",
            prediction=prediction,
            row=done.row,
            rgb=None if picture is None else picture.rgb,
            number=0 if picture is None else picture.number,
            context=self.context,
            before=Version(before.digest, before.made, before.predecessor, before.report),
            now=done.queued,
        )

    def _written(self, done: Result, documents: Documents) -> Result:
        """The result with its report and picture on the disk."""
        report, picture, version = documents
        report.write(self.folder / REPORTS)
        if picture is not None:
            picture.write(self.folder / PICTURES)
        return replace(
            done,
            sr=f"{REPORTS}/{report.name}",
            sc="" if picture is None else f"{PICTURES}/{picture.name}",
            made=version.made,
            digest=version.digest,
            predecessor=version.predecessor,
            report=version.uid,
        )

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


def sweep(folder: Path, named: Iterable[str]) -> None:
    """Remove what an interrupted run wrote and no row names."""
    known = set(named)
    for kind in (REPORTS, PICTURES):
        for path in (folder / kind).glob("*"):
            if OURS.fullmatch(path.name) and f"{kind}/{path.name}" not in known and path.is_file():
                path.unlink()
