"""What people and programs read of a run, exported from its ledger: CSVs, JSON, and a page of plain text.

Nothing in them depends on when or how often a run was interrupted. Text is UTF-8; where it goes beyond ASCII it begins
with a byte order mark, without which Excel shows Japanese as noise.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from medvit.deployment.ledger import Ledger, Result, State
from medvit.evaluation.plain import without_nan
from medvit.evaluation.predictions_csv import predictions_csv, table_csv
from medvit.io.disk import write_pieces, write_whole
from medvit.records import REASONS, Outcome, Prediction, ReasonCode

PREDICTIONS, QUARANTINE, RESULTS, SUMMARY = "predictions.csv", "quarantine.csv", "results.json", "summary.txt"

QUARANTINE_COLUMNS = ("path", "series_uid", "code", "detail")

OUTDATED = "OUTDATED"
"""Flag of a prediction of images that have changed since."""


def begun(folder: Path, studies: int, now: datetime) -> None:
    """What the summary says until a run ends: whoever reads it in the morning should not take an old one for new."""
    text = f"A run over {studies} studies began at {now.isoformat()} and has not ended: run the command again.\n"
    write_whole(folder / SUMMARY, text.encode())


def export(ledger: Ledger, folder: Path, classes: Sequence[str]) -> str:
    """Write all of them; returns the text of the summary."""
    write_pieces(folder / PREDICTIONS, _predictions(ledger, classes))
    write_pieces(folder / QUARANTINE, _quarantine(ledger))
    write_pieces(folder / RESULTS, _listed_as_json(ledger))
    text = summary(ledger)
    write_whole(folder / SUMMARY, text.encode())
    return text


def _listed_as_json(ledger: Ledger) -> Iterator[bytes]:
    """A list of one object per study, which need not be in memory together."""
    before = "[\n"
    for result in ledger.results():
        text = json.dumps(without_nan(_document(result)), indent=1, ensure_ascii=False, allow_nan=False)
        yield f"{before}{text}".encode()
        before = ",\n"
    yield b"\n]\n" if before == ",\n" else b"[]\n"


def _predictions(ledger: Ledger, classes: Sequence[str]) -> Iterator[bytes]:
    """Without a prediction, the header alone."""
    nobody = Prediction(case_id="", patient_id="", probabilities=dict.fromkeys(classes, 1 / len(classes)))
    return predictions_csv(lambda: (shown_row(result) for result in ledger.results() if result.row), nobody.to_row())


def shown_row(result: Result) -> dict[str, Any]:
    """The row of predictions.csv; one of images that have changed since says so."""
    flags = f"{result.row['flags']} {OUTDATED}".strip() if result.outdated else result.row["flags"]
    return result.row | {"flags": flags}


def _quarantine(ledger: Ledger) -> Iterator[bytes]:
    return table_csv(QUARANTINE_COLUMNS, lambda: ((e.path, e.series_uid, e.code, e.detail) for e in ledger.set_aside()))


def _document(result: Result) -> dict[str, Any]:
    """One study for a program: numbers are numbers, and what is not known is null."""
    shown = shown_row(result) if result.row else {}
    row = {name: value for name, value in shown.items() if value not in ("", None)}
    probabilities = {name[2:]: row.pop(name) for name in list(row) if name.startswith("p_")}
    return {
        "study": result.study,
        "state": str(result.state),
        "code": result.code or None,
        "detail": result.detail or None,
        **row,
        "probabilities": probabilities or None,
        "flags": row.get("flags", "").split(),
        "deciding_slices": [{"slice": number + 1, "weight": round(weight, 6)} for number, weight in result.slices],
        "report": result.sr or None,
        "picture": result.sc or None,
    }


def summary(ledger: Ledger) -> str:
    """A page for whoever comes in the morning: what was found, what was set aside and what to do about it."""
    tally = Tally()
    for result in ledger.results():
        tally.add(result)
    files = ledger.outcomes()
    used = sum(count for outcome, count in files.items() if outcome.used)
    lines = [
        f"model     {ledger.model_sha256[:12]}, configuration {ledger.config_sha256[:12]}",
        f"studies   {tally.states[State.DONE]} predicted ({_listed(tally.called) or 'none'}), "
        f"{tally.states[State.FAILED]} set aside, {tally.states[State.WAITING]} waiting"
        + (f"; {tally.outdated} predictions are of images that changed since ({OUTDATED})" if tally.outdated else ""),
        f"files     {sum(files.values())} seen: {used} used, {files[Outcome.QUARANTINE]} quarantined, "
        f"{files[Outcome.REJECT]} rejected, {files[Outcome.SKIP]} skipped",
        f"flags     {_listed(tally.flags) or 'none'}",
        f"DICOM     {tally.reports} reports, {tally.pictures} pictures"
        + (f"; {tally.bare} predictions without (results.json says why)" if tally.bare else ""),
    ]
    of_files = ledger.reasons()
    for code in sorted({*tally.failed, *of_files}):
        studies = f"{tally.failed[code]} studies, " if tally.failed[code] else ""
        lines.append(f"{code}: {studies}{of_files.get(code, 0)} files; {REASONS[ReasonCode(code)].remedy}")
    return "\n".join(lines) + "\n"


class Tally:
    """Counts over results."""

    def __init__(self) -> None:
        self.states, self.called, self.flags, self.failed = (Counter[str]() for _ in range(4))
        self.reports = self.pictures = self.bare = self.outdated = 0

    def add(self, result: Result) -> None:
        """Count one."""
        self.states[result.state] += 1
        if result.state is State.FAILED:
            self.failed[result.code] += 1
        self.outdated += result.outdated
        if result.row:
            self.called[f"{result.row['predicted']}"] += 1
            self.flags.update(result.row["flags"].split())
            self.bare += not result.sr
        self.reports += bool(result.sr)
        self.pictures += bool(result.sc)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
