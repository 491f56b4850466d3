"""What became of the way from the source sites to the target: told beside the result, never deciding it.

How alike the sites have become: what a fresh classifier still reads off the features, and how far they lie apart. The
discriminator of an adversarial training cannot be asked: at 50 % it may have collapsed, at 100 % the target may have
gained all the same. A probe that was no part of the training can (proxy A-distance, Ben-David et al. 2010).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medvit.data.splits import Fold
from medvit.inference import Model
from medvit.objectives.discrepancy import mmd2
from medvit.records import Prediction
from medvit.training import processes
from medvit.training.material import Floats, Labels, Material
from medvit.training.state import History

PARTS = 5

COSTLY = 0.1
"""Validation AUROC of the source sites that an adaptation does not lose unnoticed."""


class Probe(NamedTuple):
    """`accuracy` is balanced over source and target: 0.5 is chance, 1 is told apart; `mmd` is the squared distance."""

    accuracy: float
    mmd: float


def probe(source: npt.NDArray[np.float32], target: npt.NDArray[np.float32], groups: npt.NDArray[np.str_]) -> Probe:
    """Probe features of cases that were not trained on.

    Args:
        source: (N, D) study features.
        target: (M, D).
        groups: (N + M,) who belongs together: a patient is not on both sides of the probe's own split.

    Returns:
        NaN where there are too few patients to cross-validate.
    """
    values = np.concatenate([source, target])
    sides = np.repeat([0, 1], [len(source), len(target)])
    distance = float(mmd2(torch.from_numpy(source), torch.from_numpy(target)))
    parts = min(PARTS, *(len(set(groups[sides == side])) for side in (0, 1)))
    if parts < 2:
        return Probe(float("nan"), distance)
    reader = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    splitter = StratifiedGroupKFold(parts, shuffle=True, random_state=0)
    # drawn here: whether cross_val_predict takes groups depends on a global setting that other libraries change
    splits = list(splitter.split(values, sides, groups))
    guessed = cross_val_predict(reader, values, sides, cv=splits)
    return Probe(float(balanced_accuracy_score(sides, guessed)), distance)


def information(probabilities: npt.NDArray[np.float64]) -> float:
    """What predictions (N, K) tell without labels, 0..1: sure of each case, and not of the same class for all.

    Mutual information of case and class over log K: entropy of the mean less mean entropy (Bridle et al. 1991). With
    validation on the source it selects an epoch without a target label.
    """
    mean = probabilities.mean(axis=0)
    return float((_entropy(mean) - _entropy(probabilities).mean()) / np.log(probabilities.shape[1]))


def _entropy(probabilities: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    result: npt.NDArray[np.float64] = -(probabilities * np.log(np.clip(probabilities, 1e-12, 1))).sum(axis=-1)
    return result


class Adaptation(NamedTuple):
    """What became of the way from the source sites to the target; NaN where there are no labels to tell.

    Attributes:
        source: AUROC of the source sites' test cases.
        target: AUROC of the target's.
        oracle: the target's AUROC in the epoch that target labels would have chosen: a bound, never the result.
        oracle_epoch: which one; 0 where unknown.
        domain_probe: balanced accuracy of a fresh classifier of source and target features; 0.5 is chance.
        mmd: squared distance of the features.
        lost: validation AUROC of the sources in the best epoch less that of the kept one. Where the opponent was too
            strong, it took the classes along with the sites; this tells so without a label of the target.
    """

    source: float
    target: float
    oracle: float
    oracle_epoch: int
    domain_probe: float
    mmd: float
    lost: float


def judged_at_target(material: Material, fold: Fold) -> npt.NDArray[np.bool_]:
    """Which test cases are of a site that was trained on without labels only."""
    sites = {material.cases[index].site for index in fold.target} - {material.cases[index].site for index in fold.train}
    return np.array([material.cases[index].site in sites for index in fold.test], bool)


def measure(
    material: Material,
    model: Model,
    fold: Fold,
    predictions: Sequence[Prediction],
    history: History,
    *,
    score: Callable[[Labels, Floats], float],
) -> Adaptation:
    """What adaptation did, on cases that were not trained on (the target's training cases where none is held out)."""
    judged = judged_at_target(material, fold)
    labels, probabilities = material.table(predictions)
    scores = {row["epoch"]: row.get("val_oracle_auroc", math.nan) for row in history.rows}
    known = {epoch: value for epoch, value in scores.items() if not math.isnan(value)}
    best = max(known, key=lambda epoch: known[epoch], default=0)
    source, target = np.concatenate([fold.val, fold.test[~judged]]), fold.test[judged] if judged.any() else fold.target
    groups = np.array([material.cases[index].group for index in (*source, *target)])
    apart = probe(material.pooled(model, source), material.pooled(model, target), groups)
    at_source, at_target = (
        score(labels[side], probabilities[side]) if side.any() else math.nan for side in (~judged, judged)
    )
    return Adaptation(
        at_source, at_target, known.get(best, math.nan), best, apart.accuracy, apart.mmd, _lost_at_source(history)
    )


def _lost_at_source(history: History) -> float:
    validated: dict[int, float] = {row["epoch"]: row["val_auroc"] for row in history.rows}
    known = [value for value in validated.values() if not math.isnan(value)]
    return max(known, default=math.nan) - validated[history.best_epoch]


def told(found: Adaptation) -> str:
    """In one line, for people."""
    known = [
        f"AUROC {figure:.2f} {where}"
        for figure, where in ((found.target, "at the target"), (found.source, "at the sources"))
        if not math.isnan(figure)
    ]
    apart = "" if math.isnan(found.domain_probe) else f"a fresh probe tells them apart with {found.domain_probe:.2f}, "
    return ", ".join(known or ["no labelled target patient is judged"]) + f"; {apart}MMD {found.mmd:.3f}"


def write(found: Adaptation, path: Path) -> None:
    """As JSON, in which what is unknown is null."""
    if processes.first():
        figures = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found._asdict().items()}
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
