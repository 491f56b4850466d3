"""Batch inference over an export folder: a result or a reason for every file, and a second run that continues.

One case per study, its best volume (`medvit.data.selection` has the rule). A case that fails is set aside with a code
and the others go on.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from medvit.data.cache import read_case
from medvit.data.manifest import unlabelled_cases
from medvit.data.pipelines import prepare_slices
from medvit.data.places import index_path
from medvit.data.selection import NotSelected
from medvit.deployment.ledger import Ledger, Stored
from medvit.evaluation.predictions import write_predictions
from medvit.inference import Model
from medvit.io import FileEntry, Inventory, scan_folder
from medvit.records import REASONS, Case, Outcome, Prediction, ReasonCode, ScanError, UsageError


@dataclass(frozen=True)
class Summary:
    """What a batch did.

    Attributes:
        seen: files; `used`, `quarantined`, `rejected` and `skipped` add up to it.
        predicted: cases predicted by this run.
        kept: cases whose result was already there.
        failed: cases set aside when reading their pixels, by this run or an earlier one.
    """

    seen: int
    used: int
    quarantined: int
    rejected: int
    skipped: int
    predicted: int
    kept: int
    failed: int


def predict_folder(
    folder: Path,
    model: Model,
    output: Path,
    *,
    assume_hu: bool = False,
    settled_s: float = 0.0,
    start: Callable[[str, int], None] = lambda _what, _total: None,
    step: Callable[[str], None] = lambda _: None,
) -> Summary:
    """Predict each study below a folder, and write predictions.csv, quarantine.csv and the ledger to `output`.

    Args:
        folder: the export.
        model: what predicts.
        output: kept between runs.
        assume_hu: take values without rescale tags for HU, flagged.
        settled_s: leave series with a file that changed within so many seconds for the next run.
        start: told of each piece of work and its length; `step` of each unit done.
        step: see `start`.

    Raises:
        UsageError: no such folder, nothing that is CT in it, or `output` belongs to another model.
    """
    start("listing files", 0)
    inventory = scan_folder(
        folder, assume_hu=assume_hu, index=index_path(folder), settled_s=settled_s, progress=lambda _: step("")
    )
    if not inventory.series:
        raise UsageError(f"{folder}: no CT among {len(inventory.files)} files. medvit-inspect says what each one is.")
    cases, not_selected = unlabelled_cases(inventory)
    with Ledger(output / "ledger.sqlite", model.info.weights_sha256) as ledger:
        start("predicting", len(cases))
        new = [_settle(case, model, ledger, step, assume_hu=assume_hu) for case in cases]
        settled = [(case, stored) for case in cases if (stored := ledger.find(case.case_id)) is not None]
        ledger.put_files(_account(inventory, settled, not_selected))
        export(ledger, output, model.info.classes)
        outcomes = Counter(entry.outcome for entry in ledger.files())
    return Summary(
        seen=sum(outcomes.values()),
        used=sum(outcomes[outcome] for outcome in Outcome if outcome.used),
        quarantined=outcomes[Outcome.QUARANTINE],
        rejected=outcomes[Outcome.REJECT],
        skipped=outcomes[Outcome.SKIP],
        predicted=sum(new),
        kept=len(cases) - sum(new),
        failed=sum(stored.row is None for _, stored in settled),
    )


def _settle(case: Case, model: Model, ledger: Ledger, step: Callable[[str], None], *, assume_hu: bool) -> bool:
    """Make sure that the ledger holds the result of a case; True where it had to be computed."""
    fingerprint = _fingerprint(case)
    known = ledger.find(case.case_id)
    if known is not None and known.fingerprint == fingerprint:
        step("")
        return False
    ledger.put(_predict(case, model, fingerprint, assume_hu=assume_hu))
    step("")
    return True


def _predict(case: Case, model: Model, fingerprint: str, *, assume_hu: bool) -> Stored:
    try:
        scan = read_case(case, assume_hu=assume_hu)
        flagged = replace(case, codes=tuple(dict.fromkeys((*case.codes, *scan.codes))))
        prediction = model.predict_slices(prepare_slices(scan, model.preprocessing), flagged)
    except ScanError as error:
        return Stored(case.case_id, fingerprint, None, str(error.code), error.detail)
    except Exception as error:  # noqa: BLE001  one case never stops a batch; its kind is kept, its text may hold identity
        return Stored(case.case_id, fingerprint, None, str(ReasonCode.WORKER_DIED), type(error).__name__)
    return Stored(case.case_id, fingerprint, prediction.to_row())


def _fingerprint(case: Case) -> str:
    """Changes when a slice arrives, goes or changes: the study is then predicted again."""
    lines = []
    for name in sorted(case.files):
        status = (Path(case.root) / name).stat()
        lines.append(f"{name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _account(
    inventory: Inventory, settled: Iterable[tuple[Case, Stored]], not_selected: Iterable[NotSelected]
) -> Iterable[FileEntry]:
    """The inventory's entries, corrected by what selection and reading found out.

    By path, because a multi-frame file may hold several volumes: it is used where one of them is, else set aside where
    one failed, else not selected.
    """
    used, failed = set[str](), dict[str, Stored]()
    for case, stored in settled:
        if stored.row is None:
            failed |= dict.fromkeys(case.files, stored)
        else:
            used.update(case.files)
    passed = {name: other.detail for other in not_selected for name in other.series.files}
    for entry in inventory.files:
        if not entry.outcome.used or entry.path in used:
            yield entry
        elif entry.path in failed:
            yield _failed(entry, failed[entry.path])
        elif entry.path in passed:
            detail = passed[entry.path]
            yield entry._replace(outcome=Outcome.SKIP, code=ReasonCode.NOT_SELECTED, detail=detail)
        else:
            yield entry


def _failed(entry: FileEntry, stored: Stored) -> FileEntry:
    code = ReasonCode(stored.code)
    outcome = REASONS[code].outcome
    return entry._replace(outcome=outcome if outcome.bad else Outcome.QUARANTINE, code=code, detail=stored.detail)


def export(ledger: Ledger, output: Path, classes: Sequence[str]) -> None:
    """Write predictions.csv and quarantine.csv from the ledger; without a prediction, the header alone."""
    rows = [stored.row for stored in ledger.results() if stored.row is not None]
    nobody = Prediction(case_id="", patient_id="", probabilities=dict.fromkeys(classes, 1 / len(classes)))
    columns = None if rows else list(nobody.to_row())
    write_predictions(pd.DataFrame(rows, columns=columns), output / "predictions.csv")
    part = output / "quarantine.csv.part"
    with part.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("path", "series_uid", "code", "detail"))
        for entry in ledger.files():
            if entry.outcome.bad:
                writer.writerow((entry.path, entry.series_uid, entry.code, entry.detail))
    part.replace(output / "quarantine.csv")
