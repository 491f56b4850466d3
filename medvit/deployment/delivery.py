"""From an answer to what is kept: report and picture on the disk first, then the row that says that it is done.

A kill in between leaves files that no row names; they are written again, with the same names and bytes, or swept away
when the next run begins. A result that takes the place of an earlier one has other UIDs, because no UID may stand for
two contents (PS3.5 9), and its report names its predecessor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from medvit.data.pseudonym import pseudonym
from medvit.deployment.audit import Audit
from medvit.deployment.choice import PASSING
from medvit.deployment.ledger import Ledger, Result, State
from medvit.deployment.premises import written
from medvit.deployment.work import Answer, source_files
from medvit.io import ResultContext, Source, deciding_slices, open_source, write_sc, write_sr, written_uid
from medvit.records import Case, Prediction, Preprocessing, ScanError

REPORTS, PICTURES = "sr", "sc"
"""Folders of the output."""

Row = dict[str, object]


@dataclass(frozen=True)
class Delivery:
    """Writes answers below a folder and commits them to a ledger.

    Attributes:
        folder: of the output.
        ledger: of the run.
        preprocessing: of the model: which way its slices are counted.
        context: of results; its time is replaced by that of the study.
        to_row: the row of predictions.csv that is kept of a prediction.
        dicom: whether reports and pictures are wanted.
        audit: is told before the ledger, so that nothing is done that is not recorded.
    """

    folder: Path
    ledger: Ledger
    preprocessing: Preprocessing
    context: ResultContext
    to_row: Callable[[Prediction], Row]
    audit: Audit
    dicom: bool = True

    def __call__(self, study: str, answer: Answer) -> Result:
        """Deliver the answer of a study that is queued.

        Raises:
            MedvitError: it cannot be written; nothing can be delivered any more.
        """
        with written(self.folder):
            return self._delivered(study, answer)

    def _delivered(self, study: str, answer: Answer) -> Result:
        before = self.ledger.find(study)
        assert before is not None  # answers are asked for what was queued
        bare = Result(study=study, case_id=before.case_id, fingerprint=before.fingerprint, queued=before.queued, row={})
        if answer.prediction is None:
            result = replace(bare, state=State.FAILED, code=answer.code, detail=answer.detail)
        else:
            done = replace(
                bare,
                state=State.DONE,
                row=self.to_row(answer.prediction),
                slices=deciding_slices(answer.prediction),
            )
            result = self._written(answer, answer.prediction, done, before) if self.dicom else done
        self._record(answer, result)
        self.ledger.put(result)
        for name in (before.sr, before.sc):
            if name and name not in (result.sr, result.sc):
                (self.folder / name).unlink(missing_ok=True)
        return result

    def _written(self, answer: Answer, prediction: Prediction, result: Result, before: Result) -> Result:
        """The result with its report and picture on the disk; without, where nothing can refer to the source."""
        try:
            source = self._source(answer.case)
        except ScanError as error:
            if error.code in PASSING:  # gone since it was read: the next run sees to the study
                return replace(result, state=State.FAILED, row={}, slices=(), code=str(error.code), detail=error.detail)
            return replace(result, detail=f"no DICOM result ({error.code}: {error.detail})")
        same = before.sr == f"{REPORTS}/{written_uid('report', source, self.context)}.dcm"
        made = before.made if same and before.made else result.queued
        context = replace(self.context, now=datetime.fromisoformat(made))
        # without identity UIDs are not those of the objects in the PACS, and nothing there is replaced
        predecessor = "" if same or context.pseudonym else Path(before.sr).stem
        report = write_sr(prediction, source, context, self.folder / REPORTS, predecessor=predecessor)
        picture = ""
        if answer.picture is not None:
            path = write_sc(answer.picture.rgb, answer.picture.number, source, context, self.folder / PICTURES)
            picture = f"{PICTURES}/{path.name}"
        return replace(result, sr=f"{REPORTS}/{report.name}", sc=picture, made=made)

    def _record(self, answer: Answer, result: Result) -> None:
        """What was read, decided and written, in the audit."""
        case = answer.case
        about = {"case_id": result.case_id, "patient_id": case.patient_id, "study": pseudonym("study", case.study_uid)}
        if result.state is State.FAILED:
            self.audit.append("set_aside", **about, code=result.code)
            return
        files = [Path(name).name for name in (result.sr, result.sc) if name]
        flags = result.row["flags"].split()
        self.audit.append("decided", **about, predicted=result.row["predicted"], flags=flags, file=files)

    def _source(self, case: Case) -> Source:
        as_stored = self.preprocessing.orientation == "as_stored"
        return open_source(source_files(case), part=case.part, as_stored=as_stored)


def sweep(folder: Path, results: Iterable[Result]) -> None:
    """Remove what an interrupted run wrote and no row names."""
    known = {name for one in results for name in (one.sr, one.sc)}
    for kind in (REPORTS, PICTURES):
        for path in (folder / kind).glob("*.dcm*"):
            if f"{kind}/{path.name}" not in known:
                path.unlink()
