"""Does the distance from reference cases tell what the model was not made for, and does it flag as often as it says?

And does the drift test, which asks of a whole batch, ring when nothing has changed?

    python benchmarks/shift.py [--data FOLDER] [--quick]

Real CT: features of a pretrained ViT on slices of `siim_ct_100`; half of the patients are the reference, and against
the other half stand handwritten digits and the same slices seen through other windows. Phantom: a small ViT trained on
some patients, a threshold from others, and how many of a thousand more are flagged at 5 %; then the same model at other
scanners. Drift: nights of 30 patients against patients that the model did not learn from, and against those it did.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import tempfile
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from adaptation_problems import PHANTOM_PX, PHANTOM_SLICES, normalised, phantom_cases, small_vit
from adaptation_runs import dataset_of, look
from goals import Goal
from scipy import stats
from torch import Tensor

import medvit.io
from medvit.config import ModelConfig, ObjectiveConfig, Stage, TrainingConfig
from medvit.data.pipelines import prediction_transform, prepare_slices
from medvit.evaluation.drift import drift_test
from medvit.evaluation.metrics import auroc
from medvit.io import phantom
from medvit.models.backbone import normalisation
from medvit.models.classifier import build_classifier
from medvit.models.reference import SAMPLED, Kind, conformal_threshold, know
from medvit.objectives import OBJECTIVES, Task
from medvit.records import Preprocessing
from medvit.training import fit
from medvit.training.loop import Run

Features = npt.NDArray[np.float32]

KINDS: tuple[Kind, ...] = ("mahalanobis", "knn")
WINDOWS: dict[str, tuple[Any, ...]] = {
    "CT": ("lung", "soft_tissue", "bone"),
    "CT, brain windows": ((40.0, 120.0), (40.0, 80.0), (60.0, 60.0)),
    "CT, one window for all": ("soft_tissue",) * 3,
}
CT_PX = 126
SPLITS = 20
"""Ways to part the patients of `siim_ct_100`: a single one is luck."""

NIGHT, ALPHA = 30, 0.05
"""Patients of a batch, and the p below which the drift test rings."""

SHARE = 0.05
PATIENTS = {"trained": 240, "threshold": 1000, "judged": 1200}
OTHERS = {
    "one of them alone": phantom.SITES[0],
    "Harbour Hospital (sharp kernel, noise)": phantom.SITES[1],
    "out of calibration by 400 HU": replace(phantom.SITES[2], hu_offset=400.0),
    "table 20 mm lower": replace(phantom.SITES[2], table_mm=20.0),
}


# ---- real CT --------------------------------------------------------------------------------------------------------


def ct_features(shared: Path) -> tuple[dict[str, Features], npt.NDArray[np.str_]]:
    """Name -> features (N, D) of slices or digits, and the patient of each slice."""
    weights = shared / "weights" / "vit_small_patch14_dinov2.safetensors"
    config = ModelConfig(name="vit_small_patch14_dinov2.lvd142m", weights=str(weights))
    backbone = build_classifier(config, size=CT_PX, channels=3, classes=2)[0].backbone.eval()
    folder = shared / "data" / "siim_ct_100"
    with (folder / "manifest.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    slices = [prepare_slices(medvit.io.read(folder / row["path"]), Preprocessing(size=CT_PX)) for row in rows]
    hu = np.concatenate(slices).astype(np.float32)
    shown = {name: (hu, windows) for name, windows in WINDOWS.items()}
    shown["handwritten digits"] = (digits(shared, len(hu)), WINDOWS["CT"])
    mean, std = normalisation(backbone, 3)
    found = {}
    for name, (values, windows) in shown.items():
        transform = prediction_transform(Preprocessing(size=CT_PX, windows=windows), mean, std)
        with torch.inference_mode():
            pixels = torch.as_tensor(transform(values)).as_subclass(Tensor)
            found[name] = torch.cat([backbone(part) for part in pixels.split(32)]).numpy()
    return found, np.array([row["patient_id"] for row in rows])


def digits(shared: Path, count: int) -> npt.NDArray[np.float32]:
    """Handwritten digits as if they were CT: ink is bone, paper is air."""
    with np.load(shared / "data" / "digits" / "mnist_10k.npz") as stored:
        chosen = stored["images"][:: len(stored["images"]) // count][:count]
    return np.stack([cv2.resize(image, (CT_PX, CT_PX)) for image in chosen]).astype(np.float32) / 255 * 1400 - 1000


def judge_ct(shared: Path) -> tuple[list[Goal], dict[str, Any]]:
    """AUROC of the distance: held-out CT against what is no such CT; mean and smallest over splits of patients."""
    features, patients = ct_features(shared)
    people, told = np.unique(patients), dict[str, Any]()
    print(f"real CT: AUROC of held-out slices, {SPLITS} halvings of {len(people)} patients, mean (smallest)")
    print("| against | " + " | ".join(KINDS) + " |\n|---|---|---|")
    for name in list(features)[1:]:
        cells = []
        for kind in KINDS:
            scores = [_apart(features, name, patients, people, kind, seed) for seed in range(SPLITS)]
            cells.append(f"{np.mean(scores):.3f} ({np.min(scores):.3f})")
            told[f"{name}, {kind}"] = [float(np.mean(scores)), float(np.min(scores))]
        print(f"| {name} | " + " | ".join(cells) + " |")
    goals = [
        Goal(f"CT against {name}, Mahalanobis, mean AUROC", told[f"{name}, mahalanobis"][0], 0.95, 1)
        for name in ("handwritten digits", "CT, brain windows")
    ]
    return goals, told


def _apart(
    features: dict[str, Features],
    name: str,
    patients: npt.NDArray[np.str_],
    people: npt.NDArray[np.str_],
    kind: Kind,
    seed: int,
) -> float:
    known = np.isin(patients, np.random.default_rng(seed).permutation(people)[: len(people) // 2])
    reference = know(features["CT"][known], kind)
    own = reference.score(features["CT"][~known])
    other = reference.score(features[name] if name == "handwritten digits" else features[name][~known])
    return auroc(np.repeat([False, True], [len(own), len(other)]), np.concatenate([own, other]))


# ---- phantom --------------------------------------------------------------------------------------------------------


def judge_phantom(*, quick: bool) -> tuple[list[Goal], dict[str, Any]]:
    """Flag rate at a nominal 5 %, and at other scanners."""
    near = (phantom.SITES[0], phantom.SITES[2])
    sets = [
        phantom_cases(phantom.make_patients(count, 900 + number, sites=near), near, 0)
        for number, count in enumerate(PATIENTS.values())
    ]
    elsewhere = [phantom_cases(phantom.make_patients(200, 950, sites=(site,)), (site,), 0) for site in OTHERS.values()]
    trained, limit, judged, *others = normalised(*sets, *elsewhere)
    classifier = small_vit(PHANTOM_PX, 8, 1, 2, "mean")()
    task = Task(tuple(np.bincount(trained.labels).tolist()))
    objective = OBJECTIVES["supervised"](classifier, ObjectiveConfig(), task)
    stage = Stage(epochs=4 if quick else 24, lr=1e-3, backbone_lr=1e-3)
    config = TrainingConfig(stages=(stage,), batch_size=12, select="last", device="cpu")
    dataset = dataset_of(trained, trained.labels, 2, 0)
    with tempfile.TemporaryDirectory() as folder:
        fit(objective, dataset, config, lambda: {"auroc": 0.5, "loss": 0.0}, Run(folder=Path(folder)))
    features = [look(classifier, cases, PHANTOM_SLICES)[1] for cases in (trained, limit, judged, *others)]
    goals: list[Goal] = []
    told: dict[str, Any] = {}
    count, held_out = len(limit), len(judged)
    rank = int(np.ceil((count + 1) * (1 - SHARE)))
    # how many of the judged lie above the rank-th of the others, both drawn alike: beta-binomial
    low, high = stats.betabinom(held_out, count + 1 - rank, rank).ppf([0.025, 0.975]) / held_out
    print(f"\nphantom: share flagged at {SHARE:g}, threshold from {count} patients; expected {low:.3f} to {high:.3f}")
    print("| patients | " + " | ".join(KINDS) + " |\n|---|---|---|")
    rates: dict[Kind, list[float]] = {}
    for kind in KINDS:
        reference = know(features[0], kind)
        threshold = conformal_threshold(reference.score(features[1]), SHARE)
        rates[kind] = [float((reference.score(one) > threshold).mean()) for one in features[2:]]
        goals.append(
            Goal(f"phantom, {held_out} more patients, {kind}: share flagged", rates[kind][0], float(low), float(high))
        )
        told[f"phantom, {kind}"] = rates[kind]
    held_out_sample, learned_sample = features[1][:SAMPLED], features[0][:SAMPLED]
    alarms = {
        name: [_alarms(sample, one) for one in features[2:]]
        for name, sample in (("not learned from", held_out_sample), ("learned from", learned_sample))
    }
    for row, name in enumerate((f"{held_out} more of the same sites", *OTHERS)):
        print(f"| {name} | " + " | ".join(f"{rates[kind][row]:.3f}" for kind in KINDS) + " |")
    print(f"\ndrift: share of nights of {NIGHT} patients with p below {ALPHA:g}, against patients that were")
    print("| patients | nights | " + " | ".join(alarms) + " |\n|---|---|---|---|")
    for row, name in enumerate((f"{held_out} more of the same sites", *OTHERS)):
        nights = len(features[2 + row]) // NIGHT
        print(f"| {name} | {nights} | " + " | ".join(f"{rate[row]:.3f}" for rate in alarms.values()) + " |")
    nights = held_out // NIGHT
    low, high = stats.binom(nights, ALPHA).ppf([0.025, 0.975]) / nights
    quiet = alarms["not learned from"][0]
    goals.append(Goal(f"drift, {nights} nights of the same sites: share that ring", quiet, float(low), float(high)))
    return goals, told | {"drift": alarms}


def _alarms(sample: Features, features: Features) -> float:
    nights = [features[start : start + NIGHT] for start in range(0, len(features) - NIGHT + 1, NIGHT)]
    tests = [drift_test(sample, night, draws=999) for night in nights]
    return float(np.mean([one is not None and one.p < ALPHA for one in tests]))


def main() -> None:
    """Both parts, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="holds data/ and weights/ (default: MEDVIT_REAL_DATA)")
    parser.add_argument("--quick", action="store_true", help="few epochs on the phantom")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of libraries
    shared = arguments.data or Path(os.environ.get("MEDVIT_REAL_DATA", "."))
    goals: list[Goal] = []
    detail: dict[str, Any] = {}
    if (shared / "data").is_dir():
        goals, detail = judge_ct(shared)
    else:
        print("without --data or MEDVIT_REAL_DATA there is nothing for real CT")
    found, told = judge_phantom(quick=arguments.quick)
    goals, detail = goals + found, detail | told
    print()
    for goal in goals:
        print(f"{goal.what:70}{goal.figure:8.3f}, {goal.low:.3f} to {goal.high:.3f}{'' if goal.met else '  MISSED'}")
    met = sum(goal.met for goal in goals)
    result = {"name": "shift", "figure": met, "unit": "goals met", "goal": len(goals), "met": met == len(goals)}
    print(json.dumps(result | {"detail": {"goals": [asdict(goal) for goal in goals], **detail}}))


if __name__ == "__main__":
    main()
