"""Whom a run has learned from: nobody among them may judge it, or what is made of it.

RUN/cases.csv has every case on the side where it stood, RUN/identities.csv all that names its patient: the hashes by
which splits keep people together, under the site's key. On another machine, with another key, nothing can be told. A
run that began with the weights of another has learned from the patients of both.
"""

from __future__ import annotations

import csv
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from medvit import data
from medvit.config import load_config
from medvit.records import Case

TAUGHT, MET, KNOWN = "taught", "met", "known"
SIDES = {TAUGHT: ("train",), MET: ("train",), KNOWN: ("train", "val", "target")}
"""What is asked -> sides of cases.csv: whose labels a model has learned (a run that pretrains: nobody's), whom it has
learned from at all, and by whom it was chosen as well."""

CASES, IDENTITIES, CONFIG = "cases.csv", "identities.csv", "config.yaml"


class Learned(NamedTuple):
    """`names`: all that names the people a run has learned from; `unknown`: why there may be more, or nothing."""

    names: frozenset[str]
    unknown: str = ""


class Shared(NamedTuple):
    """`patients`: who is among them; `unknown`: why others may be, or nothing."""

    patients: frozenset[str]
    unknown: str = ""


def write_identities(folder: Path, cases: Collection[Case]) -> None:
    """identities.csv of a run: case and hash, a row each; by the first, without a case, the key is known again."""
    with (folder / IDENTITIES).open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows((("case_id", "named_by"), ("", _key())))
        writer.writerows((case, name) for case, names in data.naming(cases).items() for name in sorted(names))


def shared(run: Path, cases: Collection[Case], asked: str) -> Shared:
    """Which of the patients of some cases a run has learned from, or one whose weights it began with.

    Args:
        run: folder of medvit-train, or the bundle in it.
        cases: all that are asked about: what too many of them share names nobody.
        asked: a key of `SIDES`.
    """
    learned, named = learned_from(run, asked), data.naming(cases)
    patients = (case.patient_id for case in cases if not learned.names.isdisjoint(named[case.case_id]))
    return Shared(frozenset(patients), learned.unknown)


def learned_from(run: Path, asked: str) -> Learned:
    """Whom a run has learned from; with folds everybody, for the bundle is a refit on all."""
    folder = run_folder(run)
    if not all((folder / name).is_file() for name in (CASES, IDENTITIES)):
        return Learned(frozenset(), f"no {CASES} with {IDENTITIES} is beside it")
    identities = _rows(folder / IDENTITIES)
    if _key() not in {row["named_by"] for row in identities}:
        return Learned(frozenset(), "it was made under another site key (MEDVIT_SITE_KEY)")
    path = folder / CONFIG
    config = load_config(path if path.is_file() else None)
    before = _before(config.model.weights, asked)
    if asked == TAUGHT and config.objective.pretrains:
        return before
    cases = _rows(folder / CASES)
    folds = len({row["fold"] for row in cases} - {""}) > 1
    chosen = {row["case_id"] for row in cases if folds or row["split"] in SIDES[asked]}
    names = frozenset(row["named_by"] for row in identities if row["case_id"] in chosen)
    return Learned(names | before.names, before.unknown)


def run_folder(given: Path) -> Path:
    """The run that its folder, or the bundle in it, stands for; a bundle elsewhere stands for itself."""
    folder = given.resolve()
    return folder.parent if folder.name == "bundle" and (folder / "bundle.json").is_file() else given


def run_of(weights: str) -> Path | None:
    """The run or bundle that `model.weights` means, if it means one: a folder, or a file in a bundle."""
    path = Path(weights)
    folder = path.parent if path.is_file() and (path.parent / "bundle.json").is_file() else path
    return folder if folder.is_dir() else None


def _before(weights: str, asked: str) -> Learned:
    """Of the run whose weights another began with."""
    if run := run_of(weights):
        return learned_from(run, asked)
    if weights in ("hub", "none") or Path(weights).is_file():
        return Learned(frozenset())
    return Learned(frozenset(), "the run or file whose weights it began with is gone")


def _key() -> str:
    return data.pseudonym("key", "")


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))
