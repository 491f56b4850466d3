"""How predictions hold when pictures get worse: AUROC against the severity of each corruption and attack.

A case is judged by the model that never learned from it, through the product's own path, without test-time
augmentation, once clean and once at every severity. What counts is the paired change: the same cases, the same patients
in every resample. Time is fixed beforehand: each curve gets a share of what is left, and takes as many cases as fit, in
one order for all curves: random, patients before second cases, labels in turn.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from medvit.config import EvaluationConfig, RobustnessConfig
from medvit.evaluation.attacks import ATTACKS, Attack
from medvit.evaluation.bootstrap import PatientBootstrap
from medvit.evaluation.curves import Curve, NotMeasured, Robustness, Scores, measure_level
from medvit.evaluation.physics import CORRUPTIONS, Corruption, Slices, corrupt, draws
from medvit.inference import Judged, Model
from medvit.records import Prediction, ScanError, UsageError

STRESSES: dict[str, Corruption | Attack] = {**CORRUPTIONS, **ATTACKS}
"""Name -> what is tried, in this order."""

SHARES = {"FGSM": 2, "PGD": 8}
"""Of the time, where any other curve gets 1. A case of PGD costs as much as twenty of a corruption: with equal shares
it would never have cases enough, and with as many cases as the others it would leave them little time."""

LEAST_CASES = 12
"""A curve of fewer says nothing: it is not begun when the time would not do for so many (or all, where fewer exist)."""

COST = {"FGSM": 3.0, "PGD": 21.0}
"""Of one case at one severity, in clean predictions, the prediction itself included; of a corruption up to `COSTLY`."""

COSTLY = 1.6


def measure_robustness(
    judged: Iterable[Judged], settings: EvaluationConfig, progress: Callable[[str], None] = lambda _: None
) -> Robustness:
    """Measure a curve for each of `STRESSES` that applies and fits into the time.

    Args:
        judged: cases; those without a label are left out.
        settings: caps and seed, draws and confidence.
        progress: called with the name of each of `STRESSES` when it is done.

    Raises:
        UsageError: `evaluation.robustness` is null.
    """
    if settings.robustness is None:
        raise UsageError("evaluation.robustness is null: give its settings, or do not measure robustness.")
    limits, began = settings.robustness, time.monotonic()
    labelled = [one for one in judged if one.case.label in one.model.info.classes]
    willing = [replace(one, model=_of_few_slices(one.model, limits.slices)) for one in labelled if not _refused(one)]
    study = _Study(in_order(willing, limits.seed)[: limits.cases], settings, limits)
    outcomes: list[Curve | NotMeasured] = []
    shares = {name: SHARES.get(name, 1) for name in STRESSES}
    for number, name in enumerate(STRESSES):
        left = 60 * limits.minutes - (time.monotonic() - began)
        outcomes.append(study.measure(name, left * shares[name] / sum([*shares.values()][number:]), left))
        progress(name)
    return Robustness(
        curves=tuple(one for one in outcomes if isinstance(one, Curve)),
        not_measured=tuple(one for one in outcomes if isinstance(one, NotMeasured)),
        available=len(willing),
        refused=len(labelled) - len(willing),
        case_cap=limits.cases,
        slices=limits.slices,
        minutes=limits.minutes,
        seconds=time.monotonic() - began,
        seed=limits.seed,
        draws=settings.bootstrap,
        confidence=settings.confidence,
    )


def in_order(judged: Sequence[Judged], seed: int) -> list[Judged]:
    """Random, but no second case of a patient before all others have one, and labels in turn: any beginning will do.

    Fold by fold, since pairs of one fold only are compared: a few cases of each would hold hardly any pair.
    """
    shuffled = [judged[index] for index in np.random.default_rng(seed).permutation(len(judged))]
    folds = dict.fromkeys(one.prediction.fold for one in shuffled)
    found = []
    for fold in folds:
        own = [one for one in shuffled if one.prediction.fold == fold]
        by_patient = _in_turn(own, [one.case.patient_id for one in own])
        found += _in_turn(by_patient, [one.case.label for one in by_patient])
    return found


def _in_turn(judged: Sequence[Judged], keys: Sequence[Hashable]) -> list[Judged]:
    """The first of each key, the second of each, and so on."""
    seen: Counter[Hashable] = Counter()
    turns = []
    for key in keys:
        turns.append(seen[key])
        seen[key] += 1
    return [judged[index] for index in np.argsort(turns, kind="stable")]


def why_not(name: str, model: Model, depth: int) -> str:
    """Why a corruption or attack cannot be had of a case of `depth` slices; empty where it can."""
    if name in ATTACKS and model.preprocessing.clahe is not None:
        return "CLAHE counts pixels and has no gradient"
    if name in CORRUPTIONS and CORRUPTIONS[name].across_slices and depth == 1:
        return "a case of one slice has no neighbouring slices"
    return ""


@dataclass
class _Study:
    """The chosen cases, in order, with their clean predictions as far as they were needed."""

    cases: Sequence[Judged]
    settings: EvaluationConfig
    limits: RobustnessConfig
    clean: dict[str, Prediction] = field(default_factory=dict)
    once: float | None = None

    def measure(self, name: str, share: float, left: float) -> Curve | NotMeasured:
        """The curve of as many cases as fit into `share` seconds, of the fewest that say something if `left` allow."""
        if self.cases and len({one.case.label for one in self.cases}) < 2:
            return NotMeasured(name, "all cases are of one class: AUROC is undefined")
        began, least = time.monotonic(), min(LEAST_CASES, len(self.cases))
        rows: list[tuple[Judged, list[Prediction]]] = []
        reasons = {"there is no labelled case"} if not self.cases else set[str]()
        for one in self.cases:
            slices = one.load(one.case)
            if reason := why_not(name, one.model, len(slices)):
                reasons.add(reason)
                continue
            if not rows and (needed := least * self._seconds(name, one, slices)) > left:
                return NotMeasured(name, f"{least} cases take about {needed:.0f} s, and {max(0, left):.0f} s were left")
            rows.append((one, self._predictions(one, slices, name)))
            each = (time.monotonic() - began) / len(rows)
            if len(rows) >= least and each * (len(rows) + 1) > share:
                break
        if not rows:
            return NotMeasured(name, "; ".join(sorted(reasons)))
        return self._curve(name, rows, time.monotonic() - began)

    def _seconds(self, name: str, one: Judged, slices: Slices) -> float:
        """That a case is expected to take, from one clean prediction."""
        began = time.monotonic()
        self._as_it_is(one, slices)
        if self.once is None:
            self.once = time.monotonic() - began
        return self.once * len(STRESSES[name].severities) * COST.get(name, COSTLY)

    def _as_it_is(self, one: Judged, slices: Slices) -> Prediction:
        if one.case.case_id not in self.clean:
            self.clean[one.case.case_id] = one.model.predict_slices(slices, one.case)
        return self.clean[one.case.case_id]

    def _predictions(self, one: Judged, slices: Slices, name: str) -> list[Prediction]:
        """Clean, and at each severity."""
        shown = (worsened(one, slices, name, severity, self.limits.seed) for severity in STRESSES[name].severities)
        return [self._as_it_is(one, slices), *(one.model.predict_slices(some, one.case) for some in shown)]

    def _curve(self, name: str, rows: Sequence[tuple[Judged, list[Prediction]]], seconds: float) -> Curve:
        patients = np.array([one.case.patient_id for one, _ in rows])
        folds = np.array([one.prediction.fold or 0 for one, _ in rows])  # scores of different models are not compared
        bootstrap = PatientBootstrap(patients, self.settings.bootstrap, self.settings.confidence, self.limits.seed)
        clean, *worse = zip(*(predictions for _, predictions in rows), strict=True)
        stress = STRESSES[name]
        return Curve(
            name,
            stress.unit,
            stress.imitates,
            cases=len(rows),
            patients=len(set(patients)),
            seconds=seconds,
            clean=Scores(clean, folds).auroc(bootstrap),
            levels=tuple(
                measure_level(severity, Scores(clean, folds), Scores(some, folds), bootstrap)
                for severity, some in zip(stress.severities, worse, strict=True)
            ),
        )


def worsened(one: Judged, slices: Slices, name: str, severity: float, seed: int) -> Slices:
    """The slices (S, size, size) that a prediction looks at, of (Z, size, size), after a corruption or an attack."""
    model, rng = one.model, draws(seed, one.case.case_id)
    chosen = model.encoder.choose(len(slices))
    windows = model.preprocessing.windows
    if name in ATTACKS:
        truth = model.info.classes.index(str(one.case.label))
        return ATTACKS[name].apply(model.encoder, slices[chosen], truth, severity, rng)
    if CORRUPTIONS[name].across_slices:
        return corrupt(name, slices, severity, rng, windows)[chosen]
    return corrupt(name, slices[chosen], severity, rng, windows)


def _of_few_slices(model: Model, most: int) -> Model:
    """The same model without test-time augmentation, looking at fewer slices: volumes take long."""
    plain = model.with_views(None)
    fewer = min(most, plain.encoder.preprocessing.predict_slices)
    preprocessing = plain.encoder.preprocessing.model_copy(update={"predict_slices": fewer})
    return replace(plain, encoder=replace(plain.encoder, preprocessing=preprocessing))


def _refused(one: Judged) -> bool:
    try:
        one.model.refuse(one.case)
    except ScanError:
        return True
    return False
