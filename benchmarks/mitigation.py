"""What balanced sampling does for a site with few patients, and what it costs the other.

    python benchmarks/mitigation.py [--quick]

Phantom: nine of ten training patients are from one hospital, one from another whose kernel is sharp and noisy. The same
patients are learned from as they come (`shuffle`) and with every cell of label and site as often as any other
(`data.sampling=balanced data.balance=[label,site]`). Thresholds come from validation patients of the same mix (Youden's
J), groups are judged on as many patients of either site, and changes are paired by patient.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from adaptation_problems import PHANTOM_PX, PHANTOM_SLICES, Cases, normalised, phantom_cases, small_vit, together
from adaptation_runs import dataset_of, look
from goals import Goal

from medvit.config import ObjectiveConfig, Stage, TrainingConfig
from medvit.evaluation.bootstrap import PatientBootstrap
from medvit.evaluation.metrics import Floats, operating_point, weighted_auroc, weighted_rate
from medvit.io import phantom
from medvit.objectives import OBJECTIVES, Task
from medvit.training import fit
from medvit.training.loop import Run

SITES = (phantom.SITES[2], phantom.SITES[1])
COUNTS = {"trained": (324, 36), "validation": (108, 12), "judged": (200, 200)}
SEEDS = (0, 1, 2, 3)
EPOCHS = 24
ARMS = ("shuffle", "balanced")


def patients(part: int, counts: tuple[int, int], seed: int) -> Cases:
    """Of both sites, so many of each."""
    return together(
        *(
            phantom_cases(
                phantom.make_patients(count, 4000 + 20 * seed + 2 * part + number, sites=(site,)), (site,), number
            )
            for number, (count, site) in enumerate(zip(counts, SITES, strict=True))
        )
    )


def run(seed: int) -> list[dict[str, Any]]:
    """Judged patients as both arms score and call them."""
    learned, validation, judged = normalised(*(patients(part, n, seed) for part, n in enumerate(COUNTS.values())))
    found = [
        {"truth": bool(y), "site": int(s), "patient": f"{seed}/{i}"}
        for i, (y, s) in enumerate(zip(judged.labels, judged.sites, strict=True))
    ]
    for arm in ARMS:
        scores = {}
        classifier = small_vit(PHANTOM_PX, 8, 1, 2, "mean")()
        task = Task(tuple(np.bincount(learned.labels).tolist()))
        objective = OBJECTIVES["supervised"](classifier, ObjectiveConfig(), task)
        dataset = dataset_of(learned, learned.labels, 2, seed)
        dataset.strata = 2 * learned.sites + learned.labels if arm == "balanced" else None
        stage = Stage(epochs=EPOCHS, lr=1e-3, backbone_lr=1e-3)
        config = TrainingConfig(stages=(stage,), batch_size=12, select="last", device="cpu", seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            fit(objective, dataset, config, lambda: {"auroc": 0.5, "loss": 0.0}, Run(folder=Path(folder)))
        for name, cases in (("validation", validation), ("judged", judged)):
            scores[name] = look(classifier, cases, PHANTOM_SLICES)[0][:, 1].astype(np.float64)
        threshold = operating_point(validation.labels, scores["validation"])
        for row, score in zip(found, scores["judged"], strict=True):
            row[arm] = (float(score), bool(score >= threshold))
    return found


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Each figure in both arms, and its change with an interval; patients of all seeds."""
    truth, site = np.array([row["truth"] for row in rows]), np.array([row["site"] for row in rows])
    seed = np.array([row["patient"].split("/")[0] for row in rows])
    score = {arm: np.array([row[arm][0] for row in rows]) for arm in ARMS}
    called = {arm: np.array([row[arm][1] for row in rows]) for arm in ARMS}

    def rate(arm: str, label: bool, where: int, weights: Floats) -> Floats:
        return weighted_rate(called[arm], (truth == label) & (site == where), weights)

    def auroc(arm: str, where: int, weights: Floats) -> Floats:
        at: npt.NDArray[np.bool_] = site == where
        return weighted_auroc(truth[at], score[arm][at], weights[:, at], seed[at])

    def gap(arm: str, weights: Floats) -> Floats:
        return np.maximum(*(np.abs(rate(arm, y, 0, weights) - rate(arm, y, 1, weights)) for y in (True, False)))

    figures = {
        "AUROC, large site": lambda arm, weights: auroc(arm, 0, weights),
        "AUROC, small site": lambda arm, weights: auroc(arm, 1, weights),
        "TPR, large site": lambda arm, weights: rate(arm, True, 0, weights),
        "TPR, small site": lambda arm, weights: rate(arm, True, 1, weights),
        "FPR, large site": lambda arm, weights: rate(arm, False, 0, weights),
        "FPR, small site": lambda arm, weights: rate(arm, False, 1, weights),
        "equalized odds": gap,
    }
    bootstrap = PatientBootstrap(np.array([row["patient"] for row in rows]))
    everybody = np.ones((1, len(rows)))
    found = {}
    for name, of in figures.items():
        change = bootstrap.interval(lambda weights, of=of: of("balanced", weights) - of("shuffle", weights))
        found[name] = {arm: float(of(arm, everybody)[0]) for arm in ARMS} | {"change": asdict(change)}
    return found


def main() -> None:
    """All seeds, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of libraries
    rows = []
    for seed in SEEDS[:1] if arguments.quick else SEEDS:
        began = time.perf_counter()
        rows += run(seed)
        print(f"seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
    found = compare(rows)
    print(f"{len(rows)} judged patients\n| figure | shuffle | balanced | change |\n|---|---|---|---|")
    for name, one in found.items():
        change = one["change"]
        interval = f"{change['point']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
        print(f"| {name} | {one['shuffle']:.3f} | {one['balanced']:.3f} | {interval} |")
    goal = Goal("equalized odds, change", found["equalized odds"]["change"]["high"], -1, 0)
    print(f"\n{goal.what}, high end: {goal.figure:+.3f}, below 0{'' if goal.met else '  MISSED'}")
    result = {
        "name": "mitigation",
        "figure": goal.figure,
        "unit": "equalized odds, high end",
        "goal": 0,
        "met": goal.met,
    }
    print(json.dumps(result | {"detail": found}))


if __name__ == "__main__":
    main()
