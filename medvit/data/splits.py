"""Who trains, who selects, who judges: patient-wise splits, and the check that nobody is on two sides.

The unit is the group (`Case.group`, of `medvit.data.identity`): all cases of a person, under whatever id. Slices of one
patient on both sides are the classic way to a model that only works on paper (CTSCAN: Dice 0.667 mixed, 0.207 apart;
arXiv 2604.15561).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedGroupKFold

from medvit.config import DataConfig
from medvit.records import Case, GateError, ReasonCode, UsageError

Indices = npt.NDArray[np.intp]

SPLITS = ("train", "val", "test")
"""What a split column may say."""


@dataclass(frozen=True)
class Fold:
    """Indices into the labelled cases: trained on, selected on (epoch, threshold), judged on once."""

    train: Indices
    val: Indices
    test: Indices


def make_folds(cases: Sequence[Case], data: DataConfig, seed: int) -> list[Fold]:
    """Split labelled cases: by a given `split` column, by held-out sites, into k folds, or once at random.

    Raises:
        UsageError: too few patients, a class missing on one side, unknown site or split name.
        GateError: the given split has a patient on two sides.
    """
    labels = np.array([case.label for case in cases])
    groups = np.array([case.group for case in cases])
    everyone = np.arange(len(cases))
    if any(case.split for case in cases):
        folds = [_given(cases)]
    elif data.holdout_sites:
        folds = [_leave_sites_out(cases, data, labels, groups, seed)]
    elif data.folds:
        outer = _stratified(everyone, labels, groups, data.folds, seed, "data.folds")
        folds = [_with_validation(rest, test, labels, groups, data, seed) for rest, test in outer]
    else:
        rest, test = _stratified(everyone, labels, groups, _parts(data.test_fraction), seed, "data.test_fraction")[0]
        folds = [_with_validation(rest, test, labels, groups, data, seed)]
    for fold in folds:
        check_leakage(cases, fold)
        _check_classes(labels, fold)
    return folds


def check_leakage(cases: Sequence[Case], fold: Fold) -> None:
    """Refuse a split that has one patient (or identical pixels) on two sides.

    Raises:
        GateError: names how many and the first few, as hashes.
    """
    sides: dict[str, set[str]] = defaultdict(set)
    for side, indices in (("train", fold.train), ("val", fold.val), ("test", fold.test)):
        for index in indices:
            sides[cases[index].group].add(side)
    leaking = sorted(group for group, where in sides.items() if len(where) > 1)
    if leaking:
        raise GateError(
            f"{ReasonCode.LEAKAGE}: {len(leaking)} patients stand on more than one side of the split "
            f"(hashes {', '.join(leaking[:5])}). Results would be worth nothing: put all cases of a patient, and all "
            "cases with identical pixels, on one side."
        )


def _parts(fraction: float) -> int:
    return max(2, round(1 / fraction))


def _stratified(
    chosen: Indices, labels: npt.NDArray[np.str_], groups: npt.NDArray[np.str_], parts: int, seed: int, key: str
) -> list[tuple[Indices, Indices]]:
    """(rest, part) for each of `parts` patient-wise parts of the chosen cases, each with every class."""
    patients = {str(name): set(groups[chosen][labels[chosen] == name]) for name in np.unique(labels[chosen])}
    fewest = min(patients, key=lambda name: len(patients[name]))
    if len(patients[fewest]) < parts:
        raise UsageError(
            f"{key}: saw {len(set(groups[chosen]))} patients, {len(patients[fewest])} of them with label {fewest!r}; "
            f"{parts} parts need at least {parts} of each label. Lower data.folds, or label more patients."
        )
    splitter = StratifiedGroupKFold(n_splits=parts, shuffle=True, random_state=seed)
    return [(chosen[rest], chosen[part]) for rest, part in splitter.split(chosen, labels[chosen], groups[chosen])]


def _with_validation(
    rest: Indices,
    test: Indices,
    labels: npt.NDArray[np.str_],
    groups: npt.NDArray[np.str_],
    data: DataConfig,
    seed: int,
) -> Fold:
    parts = _parts(data.validation_fraction)
    train, val = _stratified(rest, labels, groups, parts, seed + 1, "data.validation_fraction")[0]
    return Fold(train, val, test)


def _leave_sites_out(
    cases: Sequence[Case], data: DataConfig, labels: npt.NDArray[np.str_], groups: npt.NDArray[np.str_], seed: int
) -> Fold:
    sites = np.array([case.site for case in cases])
    unknown = sorted(set(data.holdout_sites) - set(sites))
    if unknown:
        raise UsageError(f"data.holdout_sites: no site {', '.join(unknown)}. Saw {', '.join(sorted(set(sites)))}.")
    out = np.isin(sites, data.holdout_sites)
    # a patient seen at both kinds of site would leak: the whole patient is held out
    out = np.isin(groups, groups[out])
    if out.all():
        raise UsageError(
            "data.holdout_sites: nothing is left to train on. Leave at least one site in; and where each site numbers "
            "its patients from 1, make the ids differ: one id is one patient."
        )
    return _with_validation(np.flatnonzero(~out), np.flatnonzero(out), labels, groups, data, seed)


def _given(cases: Sequence[Case]) -> Fold:
    names = Counter(case.split for case in cases)
    unknown = sorted(set(names) - set(SPLITS))
    if unknown or not all(names[name] for name in SPLITS):
        seen = ", ".join(f"{name or '(empty)'}: {count}" for name, count in sorted(names.items()))
        raise UsageError(f"column 'split': saw {seen}; each labelled row needs one of {', '.join(SPLITS)}, each used.")
    train, val, test = (np.array([i for i, case in enumerate(cases) if case.split == name]) for name in SPLITS)
    return Fold(train, val, test)


def _check_classes(labels: npt.NDArray[np.str_], fold: Fold) -> None:
    wanted = set(labels)
    for side, indices in (("training", fold.train), ("validation", fold.val)):
        missing = wanted - set(labels[indices])
        if missing:
            raise UsageError(
                f"the {side} split has no case with label {', '.join(sorted(missing))}. Label more patients, or give "
                "a split column."
            )
