"""Whom a run has learned from: nobody among them may judge it, or what is made of it.

RUN/cases.csv has every patient as a hash under the site's key, and on which side each stood. On another machine, with
another key, hashes differ and nothing can be told.
"""

from __future__ import annotations

import csv
from collections.abc import Collection
from pathlib import Path

TAUGHT = ("train",)
"""Sides of cases.csv whose labels a model with one split has learned."""

KNOWN = ("train", "val", "target")
"""Sides that it has learned from or was chosen by."""


def patients_of(run: Path, sides: Collection[str]) -> frozenset[str] | None:
    """Patients (hashes) on some sides of a run; with folds everybody, for the bundle is a refit on all.

    Args:
        run: folder of medvit-train, or the bundle in it.
        sides: `TAUGHT` or `KNOWN`.

    Returns:
        None where there is no cases.csv.
    """
    folder = run.resolve().parent if run.resolve().name == "bundle" else run
    path = folder / "cases.csv"
    if not path.is_file():
        return None
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    folds = len({row["fold"] for row in rows} - {""}) > 1
    return frozenset(row["patient_id"] for row in rows if folds or row["split"] in sides)


def shared(run: Path, patients: Collection[str], sides: Collection[str]) -> frozenset[str] | None:
    """Which of some patients are on these sides of a run; None where that cannot be told."""
    known = patients_of(run, sides)
    return None if known is None else known & frozenset(patients)
