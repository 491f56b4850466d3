"""Batch inference over an export folder: a result or a reason for every file, and a second run that continues.

One case per study, its best volume (`medvit.data.selection` has the rule). A case that fails is set aside with a code
and the others go on. What cannot be made good by going on (no room, the folder is gone) ends the run with what was done
kept; running it again continues.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from pathlib import Path

import medvit
from medvit.data.places import index_path
from medvit.data.pseudonym import site_key
from medvit.deployment.account import account_files, account_series, named, settle_unusable
from medvit.deployment.audit import Audit, AuditBrokenError
from medvit.deployment.choice import Listed, Studies, choose_due, list_studies
from medvit.deployment.delivery import Delivery, sweep
from medvit.deployment.engines import ENGINES
from medvit.deployment.ledger import Ledger, State
from medvit.deployment.options import BatchOptions
from medvit.deployment.outputs import begun, export
from medvit.deployment.pipeline import WriteBehind
from medvit.deployment.premises import AUDIT, LEDGER, occupied, require_folder, written
from medvit.deployment.work import Answer
from medvit.inference import Model
from medvit.io import Inventory, scan_folder
from medvit.io.disk import require_room
from medvit.records import MedvitError, Outcome, ReasonCode, UsageError

IN_A_ROW = 3
"""Studies that the model fails on before it is not asked any more: a device that is gone fails on all."""

BYTES_PER_RESULT = 900_000
"""A picture, a report, a row: what must be free for each study."""

Clock = Callable[[], datetime]
Start = Callable[[str, int], None]
Step = Callable[[str], None]


class NothingThereError(UsageError):
    """No CT in the folder (yet)."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a batch did.

    Attributes:
        seen: files; `used`, `quarantined`, `rejected` and `skipped` add up to it.
        predicted: studies predicted by this run; `failed` were set aside by it.
        kept: studies whose result, or reason, was already there.
        waiting: studies left for the next run, because of a limit, a stop or a choice.
        stopped: whether it was told to stop.
        audit: end of the audit, "N:HASH": kept elsewhere, it shows whether lines were removed.
        text: of all that the output folder holds, as in summary.txt.
    """

    seen: int
    used: int
    quarantined: int
    rejected: int
    skipped: int
    predicted: int
    failed: int
    kept: int
    waiting: int
    stopped: bool
    audit: str
    text: str


def local_now() -> datetime:
    """The time of the place, to the second, as DICOM results carry it: those of the source are local too."""
    return datetime.now().replace(microsecond=0)


def predict_folder(
    folder: Path,
    model: Model,
    output: Path,
    options: BatchOptions | None = None,
    *,
    clock: Clock = local_now,
    stop: Callable[[], bool] = lambda: False,
    start: Start = lambda _what, _total: None,
    step: Step = lambda _: None,
) -> Summary:
    """Predict each study below a folder; the results go to `output`.

    Args:
        folder: the export.
        model: what predicts.
        output: kept between runs, one run at a time.
        options: what and how.
        clock: for the times that results carry.
        stop: asked before each study; true ends the run in order.
        start: told of each piece of work and its length; `step` of each unit done.
        step: see `start`.

    Raises:
        UsageError: no such folder, nothing that is CT in it; `output` belongs to another model, is in use or unfit.
        MedvitError: the run cannot go on; what is done is kept.
    """
    options, folder = options or BatchOptions(), folder.absolute()  # other processes have working folders of their own
    if output.resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            f"{output}: lies in the folder of the images, and would be read as one. Give another --output."
        )
    identity = options.identity(model)
    with (
        occupied(output),
        Ledger(output / LEDGER, *identity) as ledger,
        Audit(output / AUDIT, site_key()) as audit,
    ):
        _require_whole(audit, ledger)
        start("listing files", 0)
        inventory = _list(folder, options, stop, step)
        require_folder(folder)  # what went while it was listed is not judged
        studies = list_studies(inventory, options.wanted, options.study)
        settle_unusable(studies, ledger, audit, clock())
        due = _queue(studies, options, ledger, output, clock())
        start("predicting", len(due))
        audit.append(
            "started",
            model_sha256=identity[0],
            config_sha256=identity[1],
            version=medvit.__version__,
            seen=len(inventory.files),
            count=len(due),
        )
        deliver = Delivery(
            output, ledger, model.preprocessing, options.context(model, clock()), options.row, audit, options.dicom
        )
        states = Counter[State]()
        try:
            _predict(due, model, options, deliver, states, stop, step)
        except MedvitError:
            with suppress(MedvitError, OSError):  # what was done is shown, where there is room to show it
                _end(inventory, studies, options, ledger, output, model)
            raise
        text = _end(inventory, studies, options, ledger, output, model)
        head = audit.append("stopped" if stop() else "ended", written=states[State.DONE], failed=states[State.FAILED])
        ledger.put_audit(head)
        return _summary(studies, ledger, states, text, f"{head.entries}:{head.hash}", stopped=stop())


def _require_whole(audit: Audit, ledger: Ledger) -> None:
    """Nobody shortened the audit since a run last ended."""
    kept = ledger.audit()
    if kept is not None and audit.head.entries < kept.entries:
        raise AuditBrokenError(
            f"{audit.path}: has {audit.head.entries} entries, and had {kept.entries}. Keep both files as evidence, and "
            "write results to another folder."
        )


def _list(folder: Path, options: BatchOptions, stop: Callable[[], bool], step: Step) -> Inventory:
    """The folder's series and files."""

    def told(_path: str) -> None:
        if stop():
            raise KeyboardInterrupt  # nothing is under way that would have to be finished
        step("")

    try:
        inventory = scan_folder(
            folder,
            assume_hu=options.assume_hu,
            index=index_path(folder),
            settled_s=options.settled_s,
            progress=told,
        )
    except UsageError as error:
        raise NothingThereError(str(error)) from None
    if not inventory.series:
        raise NothingThereError(
            f"{folder}: no CT among {len(inventory.files)} files. medvit-inspect says what each one is."
        )
    return inventory


def _queue(studies: Studies, options: BatchOptions, ledger: Ledger, output: Path, now: datetime) -> list[Listed]:
    """Put down what waits, make room for what is due in this run, and say that it has begun."""
    wanted = options.wanted
    absent = wanted.studies - {one.case.study_uid for one in studies.listed}
    if absent and wanted.shard == (1, 1):
        raise UsageError(f"--study {sorted(absent)[0]}: no usable study of that UID is in the folder.")
    waiting = choose_due(studies.listed, ledger, wanted)
    due = waiting[: wanted.limit]
    if options.dicom:
        require_room(output, BYTES_PER_RESULT * len(due), f"the results of {len(due)} studies")
    ledger.queue([(one.study, one.case.case_id, one.fingerprint) for one in waiting], now)
    asked = {one.study for one in waiting}
    changed = [one.study for one in studies.listed if one.study not in asked and _changed(one, ledger)]
    ledger.outdate(changed)
    sweep(output, ledger.written())
    begun(output, len(due), now)
    return due


def _changed(one: Listed, ledger: Ledger) -> bool:
    known = ledger.find(one.study)
    return known is not None and known.state is State.DONE and known.fingerprint != one.fingerprint


def _predict(
    due: Sequence[Listed],
    model: Model,
    options: BatchOptions,
    deliver: Delivery,
    states: Counter[State],
    stop: Callable[[], bool],
    step: Step,
) -> None:
    """Work on what is due, deliver each answer, and count how it ended."""
    progress = Progress(len(due), states)
    going_on = takewhile(lambda _: not stop(), iter(due))
    failures = 0
    with WriteBehind[tuple[Listed, Answer]](lambda item: progress.count(deliver(*item).state)) as writer:
        for one, answer in ENGINES[options.engine](going_on, model, options):
            failures = failures + 1 if answer.code == ReasonCode.MODEL_FAILED else 0
            if failures == IN_A_ROW:
                raise MedvitError(
                    f"the model failed on {failures} studies in a row ({answer.detail}): see to the device and its "
                    "memory. What was done is kept; run the command again with --retry MODEL_FAILED."
                )
            writer.put((one, answer))
            step(progress.text())


class Progress:
    """How far a run is, and how fast; the counts are the caller's."""

    def __init__(self, total: int, states: Counter[State]) -> None:
        self.total, self.began, self.states = total, time.monotonic(), states

    def count(self, state: State) -> None:
        """One more study ended so."""
        self.states[state] += 1

    def text(self) -> str:
        """Counts by outcome, studies a minute, and the time that the rest will take."""
        done, minutes = sum(self.states.values()), (time.monotonic() - self.began) / 60
        rate = done / minutes if minutes > 0 else 0.0
        left = f", about {_duration((self.total - done) / rate)} left" if rate else ""
        return f"{self.states[State.DONE]} predicted, {self.states[State.FAILED]} set aside, {rate:.0f} a minute{left}"


def _duration(minutes: float) -> str:
    return f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.0f} min"


def _end(
    inventory: Inventory, studies: Studies, options: BatchOptions, ledger: Ledger, output: Path, model: Model
) -> str:
    """Account for all files, and export; the text of the summary."""
    entries = account_files(inventory, studies, ledger.failed(), options.wanted)
    ledger.put_account(account_series(studies, options), named(entries, options))
    with written(output):
        return export(ledger, output, model.info.classes)


def _summary(
    studies: Studies,
    ledger: Ledger,
    done: Counter[State],
    text: str,
    audit: str,
    *,
    stopped: bool,
) -> Summary:
    files = ledger.outcomes()
    ended = sum(done.values())
    waiting = sum(1 for one in studies.listed if not _settled(one, ledger))
    return Summary(
        seen=sum(files.values()),
        used=sum(count for outcome, count in files.items() if outcome.used),
        quarantined=files[Outcome.QUARANTINE],
        rejected=files[Outcome.REJECT],
        skipped=files[Outcome.SKIP],
        predicted=done[State.DONE],
        failed=done[State.FAILED],
        kept=len(studies.listed) - waiting - ended,
        waiting=waiting,
        stopped=stopped,
        audit=audit,
        text=text,
    )


def _settled(one: Listed, ledger: Ledger) -> bool:
    known = ledger.find(one.study)
    return known is not None and known.state is not State.WAITING and known.fingerprint == one.fingerprint
