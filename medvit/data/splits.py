"""Who trains, who selects, who judges: patient-wise splits, and the check that nobody is on two sides.

The unit is the group (`Case.group`, of `medvit.data.identity`): all cases of a person, under whatever id. Slices of one
patient on both sides are the classic way to a model that only works on paper (CTSCAN: Dice 0.667 mixed, 0.207 apart;
arXiv 2604.15561).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import islice

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from medvit.config import DataConfig
from medvit.records import Case, GateError, ReasonCode, UsageError

Indices = npt.NDArray[np.intp]

NOBODY: Indices = np.array([], np.intp)

SPLITS = ("train", "val", "test")
"""What a split column must say, each of them somewhere; it may also say `target`: trained on without labels."""

FINE = 10
"""Into so many parts patients are cut where the fraction to be held out asks for it and there are enough of them."""


@dataclass(frozen=True)
class Fold:
    """Indices into the cases: trained on, selected on (epoch, threshold), judged on once, trained on without labels."""

    train: Indices
    val: Indices
    test: Indices
    target: Indices = field(default_factory=NOBODY.copy)

    def sides(self) -> dict[str, Indices]:
        """By name, as in cases.csv."""
        return {"train": self.train, "val": self.val, "test": self.test, "target": self.target}


def make_folds(cases: Sequence[Case], data: DataConfig, seed: int) -> list[Fold]:
    """Split cases: by a given `split` column, by held-out sites, by target sites, into k folds, or once at random.

    Args:
        cases: labelled; unlabelled ones are of target sites.
        data: how.
        seed: of all shuffles.

    Raises:
        UsageError: too few patients, a class missing on one side, unknown site or split name.
        GateError: the given split has a patient on two sides.
    """
    labels = np.array([case.label or "" for case in cases])
    groups = np.array([case.group for case in cases])
    everyone = np.arange(len(cases))
    if any(case.split for case in cases):
        _refuse_two_splits(data)
        folds = [_given(cases)]
    elif data.target_sites:
        folds = [_towards_target(cases, data, labels, groups, seed)]
    elif data.holdout_sites:
        folds = [_leave_sites_out(cases, data, labels, groups, seed)]
    elif data.folds:
        outer = _stratified(everyone, labels, groups, data.folds, seed, "data.folds")
        folds = [_with_validation(rest, test, labels, groups, data, seed) for rest, test in outer]
    else:
        rest, test = _hold_out(everyone, labels, groups, data.test_fraction, seed, "data.test_fraction")
        folds = [_with_validation(rest, test, labels, groups, data, seed)]
    for fold in folds:
        check_leakage(cases, fold)
        _check_classes(labels, fold)
    return folds


def split_patients(cases: Sequence[Case], data: DataConfig, seed: int) -> Fold:
    """Patients to learn from without labels, and a few to watch: at random, or as a `split` column says.

    Whoever a split column has under `test` takes no part, not even without label; under `val`, only watched.

    Args:
        cases: labelled or not.
        data: `validation_fraction`.
        seed: of the shuffle.

    Raises:
        UsageError: a single patient.
    """
    groups = np.array([case.group for case in cases])
    splits = np.array([case.split for case in cases])
    test, val = (np.isin(groups, groups[splits == name]) for name in ("test", "val"))
    val &= ~test
    rest = np.flatnonzero(~test)
    most = min(max(_parts(data.validation_fraction), FINE), len(set(groups[rest])))
    if most < 2:
        raise UsageError("pretraining needs two patients to learn from and one to validate on. Give more CT.")
    if not val.any():
        share = _share(data.validation_fraction, most)
        parts = GroupKFold(share.denominator, shuffle=True, random_state=seed).split(rest, groups=groups[rest])
        for _, watched in islice(parts, share.numerator):
            val[rest[watched]] = True
    return Fold(np.flatnonzero(~test & ~val), np.flatnonzero(val), np.flatnonzero(test))


def check_leakage(cases: Sequence[Case], fold: Fold) -> None:
    """Refuse a split that has one patient (or identical pixels) on two sides.

    Raises:
        GateError: names how many and the first few, as hashes.
    """
    sides: dict[str, set[str]] = defaultdict(set)
    for side, indices in fold.sides().items():
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
    """Into how many equal parts patients must be cut so that a fraction is about one of them, or all but one."""
    return max(2, round(1 / fraction), round(1 / (1 - fraction)))


def _share(fraction: float, most: int) -> Fraction:
    """So many of so many parts, the nearest to a fraction; one at least, and not all, of `most` at most."""
    nearest = Fraction(fraction).limit_denominator(most)
    return min(max(nearest, Fraction(1, most)), 1 - Fraction(1, most))


def _patients_of(chosen: Indices, labels: npt.NDArray[np.str_], groups: npt.NDArray[np.str_]) -> dict[str, int]:
    """Label -> how many patients of the chosen cases have it."""
    return {str(name): len(set(groups[chosen][labels[chosen] == name])) for name in np.unique(labels[chosen])}


def _hold_out(
    chosen: Indices, labels: npt.NDArray[np.str_], groups: npt.NDArray[np.str_], fraction: float, seed: int, key: str
) -> tuple[Indices, Indices]:
    """(rest, part): the nearest to a fraction of the patients that parts with every class allow."""
    fewest = min(_patients_of(chosen, labels, groups).values(), default=0)
    share = _share(fraction, max(_parts(fraction), min(FINE, fewest)))
    parts = _stratified(chosen, labels, groups, share.denominator, seed, key)[: share.numerator]
    part = np.sort(np.concatenate([one for _, one in parts]))
    return np.setdiff1d(chosen, part), part


def _stratified(
    chosen: Indices, labels: npt.NDArray[np.str_], groups: npt.NDArray[np.str_], parts: int, seed: int, key: str
) -> list[tuple[Indices, Indices]]:
    """(rest, part) for each of `parts` patient-wise parts of the chosen cases, each with every class."""
    patients = _patients_of(chosen, labels, groups)
    fewest = min(patients, key=lambda name: patients[name])
    if patients[fewest] < parts:
        remedy = "Lower it" if key == "data.folds" else "Bring it nearer to 0.5"
        raise UsageError(
            f"{key}: saw {len(set(groups[chosen]))} patients, {patients[fewest]} of them with label {fewest!r}; "
            f"{parts} parts need at least {parts} of each label. {remedy}, or label more patients."
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
    train, val = _hold_out(rest, labels, groups, data.validation_fraction, seed + 1, "data.validation_fraction")
    return Fold(train, val, test)


def _of_sites(
    cases: Sequence[Case], names: Sequence[str], groups: npt.NDArray[np.str_], key: str
) -> npt.NDArray[np.bool_]:
    """Which cases are of these sites, or of a patient who was seen there too: that patient would leak."""
    sites = np.array([case.site for case in cases])
    unknown = sorted(set(names) - set(sites))
    if unknown:
        raise UsageError(f"{key}: no site {', '.join(unknown)}. Saw {', '.join(sorted(set(sites)))}.")
    found = np.isin(groups, groups[np.isin(sites, names)])
    if found.all():
        raise UsageError(
            f"{key}: nothing is left to train on. Leave at least one site in; and where each site numbers "
            "its patients from 1, make the ids differ: one id is one patient."
        )
    return found


def _towards_target(
    cases: Sequence[Case], data: DataConfig, labels: npt.NDArray[np.str_], groups: npt.NDArray[np.str_], seed: int
) -> Fold:
    """Source patients into train, val and test; labelled target patients into test and unlabelled training."""
    at_target = _of_sites(cases, data.target_sites, groups, "data.target_sites")
    labelled = np.array([case.label is not None for case in cases])
    source, judged = np.flatnonzero(~at_target & labelled), np.flatnonzero(at_target & labelled)
    rest, test = _hold_out(source, labels, groups, data.test_fraction, seed, "data.test_fraction")
    fewest = min(_patients_of(judged, labels, groups).values(), default=0)
    if fewest >= _parts(data.test_fraction):  # few labels are all for judging
        _, judged = _hold_out(judged, labels, groups, data.test_fraction, seed, "data.test_fraction")
    test = np.concatenate([test, judged])
    fold = _with_validation(rest, test, labels, groups, data, seed)
    # an unlabelled scan of a patient who is judged has been seen as well
    target = np.flatnonzero(at_target & ~np.isin(groups, groups[test]))
    if not len(target):
        raise UsageError(_nobody_to_adapt_to(len(set(groups[judged])), fewest, data.test_fraction))
    return replace(fold, target=target)


def _nobody_to_adapt_to(patients: int, fewest: int, fraction: float) -> str:
    """Why every target patient judges, and what helps: fewer parts where two patients of each label allow some."""
    nearer = "bring data.test_fraction nearer to 0.5, " if fewest > 1 else ""
    parts = _parts(fraction)
    return (
        f"data.target_sites: saw {patients} patients there, all labelled, of the rarest label {fewest}; a "
        f"data.test_fraction of {fraction:g} cuts them into {parts} parts, which need {parts} of each label. So all of "
        f"them judge, and nobody is left to adapt to. To have some, {nearer}empty the labels of a few patients, or add "
        "scans without labels."
    )


def _leave_sites_out(
    cases: Sequence[Case], data: DataConfig, labels: npt.NDArray[np.str_], groups: npt.NDArray[np.str_], seed: int
) -> Fold:
    out = _of_sites(cases, data.holdout_sites, groups, "data.holdout_sites")
    return _with_validation(np.flatnonzero(~out), np.flatnonzero(out), labels, groups, data, seed)


def _refuse_two_splits(data: DataConfig) -> None:
    settings = {"folds": data.folds, "holdout_sites": data.holdout_sites, "target_sites": data.target_sites}
    if asked := [f"data.{name}" for name, value in settings.items() if value]:
        raise UsageError(
            f"{', '.join(asked)}: the labels have a 'split' column, which says already who trains and who judges "
            "(target: unlabelled site). Leave out one or the other."
        )


def _given(cases: Sequence[Case]) -> Fold:
    names = Counter(case.split for case in cases)
    unknown = sorted(set(names) - {*SPLITS, "target"})
    if unknown or not all(names[name] for name in SPLITS):
        seen = ", ".join(f"{name or '(empty)'}: {count}" for name, count in sorted(names.items()))
        raise UsageError(
            f"column 'split': saw {seen}; each labelled row needs one of {', '.join(SPLITS)}, each used, or target."
        )
    if nameless := sum(case.label is None and case.split != "target" for case in cases):
        raise UsageError(
            f"column 'split': {nameless} cases without a label stand on other sides than target, and nothing is "
            "learned from them or judged there. Label them, or write target."
        )
    sides = {name: np.array([i for i, case in enumerate(cases) if case.split == name], np.intp) for name in names}
    return Fold(**sides)


def _check_classes(labels: npt.NDArray[np.str_], fold: Fold) -> None:
    wanted = set(labels) - {""}
    for side, indices in (("training", fold.train), ("validation", fold.val)):
        missing = wanted - set(labels[indices])
        if missing:
            raise UsageError(
                f"the {side} split has no case with label {', '.join(sorted(missing))}. Label more patients, or give "
                "a split column."
            )
