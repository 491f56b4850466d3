"""Batch inference over an export folder: a result or a reason for every file, and a second run that continues.

One case per study, its best volume (`medvit.data.selection` has the rule). A case that fails is set aside with a code
and the others go on. What cannot be made good by going on (no room, the folder is gone) ends the run with what was done
kept; running it again continues.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path

import medvit
from medvit.data.places import index_path
from medvit.data.pseudonym import site_key
from medvit.deployment.account import account_files, account_series, named, withdraw
from medvit.deployment.audit import Audit
from medvit.deployment.choice import Listed, Studies, choose_due, list_studies
from medvit.deployment.delivery import Delivery, sweep
from medvit.deployment.engines import ENGINES
from medvit.deployment.ledger import Ledger, State
from medvit.deployment.options import BatchOptions
from medvit.deployment.outputs import export
from medvit.deployment.pipeline import WriteBehind
from medvit.deployment.premises import AUDIT, LEDGER, occupied, written
from medvit.deployment.work import Answer
from medvit.inference import Model
from medvit.io import Inventory, scan_folder
from medvit.io.disk import require_room
from medvit.records import MedvitError, Outcome, ReasonCode, UsageError

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


def utc_now() -> datetime:
    """The time, to the second: DICOM results carry it."""
    return datetime.now(UTC).replace(microsecond=0)


def predict_folder(
    folder: Path,
    model: Model,
    output: Path,
    options: BatchOptions | None = None,
    *,
    clock: Clock = utc_now,
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
    options = options or BatchOptions()
    hashes = model.info.weights_sha256, options.config_sha256(model)
    with (
        occupied(output),
        Ledger(output / LEDGER, *hashes) as ledger,
        Audit(output / AUDIT, site_key(), clock) as audit,
    ):
        start("listing files", 0)
        inventory = scan_folder(
            folder,
            assume_hu=options.assume_hu,
            index=index_path(folder),
            settled_s=options.settled_s,
            progress=lambda _: step(""),
        )
        if not inventory.series:
            raise NothingThereError(
                f"{folder}: no CT among {len(inventory.files)} files. medvit-inspect says what each one is."
            )
        studies = list_studies(inventory, options.wanted, options.study)
        withdraw(studies, ledger)
        due = choose_due(studies.listed, ledger, options.wanted)
        if options.dicom:
            require_room(output, BYTES_PER_RESULT * len(due), f"the results of {len(due)} studies")
        ledger.queue([(one.study, one.case.case_id, one.fingerprint) for one in due], clock())
        sweep(output, ledger.results())
        start("predicting", len(due))
        audit.append(
            "started",
            model_sha256=hashes[0],
            config_sha256=hashes[1],
            version=medvit.__version__,
            seen=len(inventory.files),
            count=len(due),
        )
        deliver = Delivery(
            output, ledger, model.preprocessing, options.context(model, clock()), options.row, audit, options.dicom
        )
        done = _predict(due, model, options, deliver, stop, step)
        _account(inventory, studies, options, ledger)
        with written(output):
            text = export(ledger, output, model.info.classes)
        head = audit.append("stopped" if stop() else "ended", written=done[State.DONE], failed=done[State.FAILED])
        ledger.put_audit(head)
        return _summary(studies, ledger, done, text, f"{head.entries}:{head.hash}", stopped=stop())


def _predict(
    due: Sequence[Listed],
    model: Model,
    options: BatchOptions,
    deliver: Delivery,
    stop: Callable[[], bool],
    step: Step,
) -> Counter[State]:
    """Work on what is due, and deliver each answer; how many ended how."""
    progress = Progress(len(due))
    going_on = takewhile(lambda _: not stop(), iter(due))
    with WriteBehind[tuple[str, Answer]](lambda item: progress.count(deliver(*item).state)) as writer:
        for one, answer in ENGINES[options.engine](going_on, model, options):
            if answer.code == ReasonCode.IO_ERROR:
                _require_folder(Path(one.case.root))
            writer.put((one.study, answer))
            step(progress.text())
    return progress.states


class Progress:
    """How far a run is, and how fast."""

    def __init__(self, total: int) -> None:
        self.total, self.began, self.states = total, time.monotonic(), Counter[State]()

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


def _require_folder(folder: Path) -> None:
    """A share that was unmounted would otherwise set aside all that is left, study by study."""
    try:
        there = next(folder.iterdir(), None) is not None
    except OSError:
        there = False
    if not there:
        raise MedvitError(
            f"{folder}: the folder is gone, or empty; is it still mounted? What was done is kept: run the command "
            "again when the files are back."
        )


def _account(inventory: Inventory, studies: Studies, options: BatchOptions, ledger: Ledger) -> None:
    entries = account_files(inventory, studies, ledger.failed(), options.wanted)
    ledger.put_account(
        account_series(inventory, studies, options),
        named(entries, options),
    )


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
    settled = sum(1 for one in studies.listed if _settled(one, ledger))
    return Summary(
        seen=sum(files.values()),
        used=sum(count for outcome, count in files.items() if outcome.used),
        quarantined=files[Outcome.QUARANTINE],
        rejected=files[Outcome.REJECT],
        skipped=files[Outcome.SKIP],
        predicted=done[State.DONE],
        failed=done[State.FAILED],
        kept=settled - ended,
        waiting=len(studies.listed) - settled,
        stopped=stopped,
        audit=audit,
        text=text,
    )


def _settled(one: Listed, ledger: Ledger) -> bool:
    known = ledger.find(one.study)
    return known is not None and known.state is not State.WAITING and known.fingerprint == one.fingerprint
