"""A small sweep: each point of a named grid trained on one fold and judged on its validation cases, never on others.

For adaptation the table also tells how alike the sites have become: invariance can be bought with accuracy, and the
sweep of the strength shows at what price.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from sklearn.model_selection import ParameterGrid

from medvit.config import GRIDS, Config, override
from medvit.data.splits import Fold
from medvit.training import processes
from medvit.training.adaptation import probe
from medvit.training.experiment import Experiment


@dataclass(frozen=True)
class Point:
    """One combination and what came of it, on validation cases.

    Attributes:
        settings: config key -> value.
        auroc: of the epoch that was kept.
        loss: likewise, to break ties.
        best_epoch: counted from 1.
        domain_probe: balanced accuracy of telling source validation from target cases: 0.5 is chance, NaN unknown.
    """

    settings: Mapping[str, float]
    auroc: float
    loss: float
    best_epoch: int
    domain_probe: float


def sweep(experiment: Experiment, fold: Fold, grid: str) -> tuple[Config, tuple[Point, ...]]:
    """Train every point of a grid below `folder/sweep`, and write `sweep.csv`.

    Args:
        experiment: whose settings are varied.
        fold: its training and validation cases are used.
        grid: a name in `GRIDS`.

    Returns:
        The settings with the highest validation AUROC (then the lower loss), and all points in the grid's order.
    """
    combinations = list(ParameterGrid({key: list(values) for key, values in GRIDS[grid].items()}))
    configs = [override(experiment.config, settings) for settings in combinations]
    points = []
    for number, (settings, config) in enumerate(zip(combinations, configs, strict=True)):
        name = f"{grid} {number + 1}/{len(configs)}"
        points.append(_try(replace(experiment, config=config), fold, settings, name, f"{number:02d}"))
    if processes.first():
        _write(experiment.folder / "sweep.csv", points)
    best = max(range(len(points)), key=lambda number: (points[number].auroc, -points[number].loss))
    return configs[best], tuple(points)


def _try(experiment: Experiment, fold: Fold, settings: Mapping[str, float], name: str, folder: str) -> Point:
    model, history = experiment.fit_fold(fold, experiment.folder / "sweep" / folder, name)
    material, apart = experiment.material, float("nan")
    if len(fold.target):
        groups = np.array([material.cases[index].group for index in (*fold.val, *fold.target)])
        apart = probe(material.pooled(model, fold.val), material.pooled(model, fold.target), groups).accuracy
    row = next(row for row in history.rows if row["epoch"] == history.best_epoch)  # patience may have left some out
    return Point(settings, row["val_auroc"], row["val_loss"], history.best_epoch, apart)


def _write(path: Path, points: Sequence[Point]) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow((*points[0].settings, "val_auroc", "val_loss", "best_epoch", "domain_probe"))
        for point in points:
            figures = (f"{value:.4f}" for value in (point.auroc, point.loss))
            writer.writerow((*point.settings.values(), *figures, point.best_epoch, f"{point.domain_probe:.4f}"))
