"""Is test-time augmentation worth its cost? Contrast agent on real CT, the same models with and without views.

    python benchmarks/tta.py [--data FOLDER] [--quick]

Every held-out case of `siim_ct_100` is predicted by the model of its fold as it is and from several views (the defaults
of `inference.tta`; with fewer and more views; and with the identity for every view, which must change nothing). What
counts is the paired change of AUROC within folds, with patients resampled, over seeds of split and head; the cost is
the ratio of seconds, one case at a time, in alternation.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from contrast_folds import judged_cases
from goals import Goal

from medvit.config import TtaConfig
from medvit.evaluation.bootstrap import PatientBootstrap
from medvit.evaluation.metrics import Floats, weighted_auroc, weighted_brier
from medvit.inference import Judged
from medvit.records import Prediction

VIEWS: dict[str, TtaConfig] = {
    "identity, 5": TtaConfig(views=5, scale=(1, 1), crop=False, shift=0, rotate_deg=0, window_jitter=0),
    "3": TtaConfig(views=3),
    "5 (default)": TtaConfig(),
    "9": TtaConfig(views=9),
}


class Seen(NamedTuple):
    """Predictions of all cases of all seeds, and seconds for them."""

    predictions: list[Prediction]
    seconds: float


def predict(judged: Sequence[Judged], tta: TtaConfig | None) -> Seen:
    """All cases anew, by their own models."""
    found, began = [], time.perf_counter()
    for one in judged:
        found.append(one.model.with_views(tta).predict_slices(one.load(one.case), one.case))
    return Seen(found, time.perf_counter() - began)


def compare(judged: Sequence[Judged], runs: Sequence[int], plain: Seen, views: Seen) -> dict[str, Any]:
    """Paired changes; pairs are of one fold of one run, and a patient is one however many seeds judged them."""
    truth = np.array([one.case.label == list(one.prediction.probabilities)[-1] for one in judged])
    strata = np.array([f"{run}/{one.prediction.fold}" for run, one in zip(runs, judged, strict=True)])
    scores = [np.array([list(p.probabilities.values())[-1] for p in seen.predictions]) for seen in (plain, views)]
    bootstrap = PatientBootstrap(np.array([one.case.patient_id for one in judged]))

    def change(weights: Floats) -> Floats:
        before, after = (weighted_auroc(truth, score, weights, strata) for score in scores)
        return after - before

    def brier(weights: Floats) -> Floats:
        before, after = (weighted_brier(truth, score, weights) for score in scores)
        return after - before

    calls = [[p.predicted for p in seen.predictions] for seen in (plain, views)]
    changed = [a != b for a, b in zip(*calls, strict=True)]
    label = [one.case.label for one in judged]
    mended = sum(b == t for a, b, t in zip(*calls, label, strict=True) if a != b)
    return {
        "auroc": float(weighted_auroc(truth, scores[1], np.ones((1, len(truth))), strata)[0]),
        "change": asdict(bootstrap.interval(change)),
        "brier": asdict(bootstrap.interval(brier)),
        "calls changed": sum(changed),
        "to the right": mended,
        "cost": views.seconds / plain.seconds,
        "same bits": scores[0].tobytes() == scores[1].tobytes(),
    }


def main() -> None:
    """All seeds, all numbers of views, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="holds data/ and weights/ (default: MEDVIT_REAL_DATA)")
    parser.add_argument("--quick", action="store_true", help="one seed")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of libraries
    shared = arguments.data or Path(os.environ.get("MEDVIT_REAL_DATA", "."))
    judged, runs = [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in (0,) if arguments.quick else (0, 1, 2):
            some = judged_cases(shared, Path(folder), f"training.seed={seed}")
            judged, runs = [*judged, *some], [*runs, *[seed] * len(some)]
        plain = predict(judged, None)
        found = {name: compare(judged, runs, plain, predict(judged, tta)) for name, tta in VIEWS.items()}
    patients = len({one.case.patient_id for one in judged})
    print(f"{patients} patients, {len(judged)} predictions ({len(set(runs))} seeds); changes are paired")
    print(
        "| views | AUROC within folds | change | Brier score, change | calls changed (to the right) | seconds, ratio |"
    )
    print("|---|---|---|---|---|---|")
    for name, one in found.items():
        cells = [f"{one['auroc']:.3f}", *(_signed(one[figure]) for figure in ("change", "brier"))]
        cells += [f"{one['calls changed']} ({one['to the right']})", f"{one['cost']:.1f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")
    default = found["5 (default)"]
    goals = [
        Goal("identity views: bits that differ", float(not found["identity, 5"]["same bits"]), 0, 0),
        Goal("5 views: seconds, times one view", default["cost"], 0, 6),
        Goal("5 views: AUROC within folds, change", default["change"]["point"], 0, 1),
    ]
    print()
    for goal in goals:
        print(f"{goal.what:50}{goal.figure:8.3f}, {goal.low:g} to {goal.high:g}{'' if goal.met else '  MISSED'}")
    met = sum(goal.met for goal in goals)
    result = {"name": "tta", "figure": met, "unit": "goals met", "goal": len(goals), "met": met == len(goals)}
    print(json.dumps(result | {"detail": {"goals": [asdict(goal) for goal in goals], "views": found}}))


def _signed(change: dict[str, float]) -> str:
    return f"{change['point']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"


if __name__ == "__main__":
    main()
