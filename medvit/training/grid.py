"""A small sweep: the settings as they are and each point of a named grid, trained on one fold, judged on validation.

Validation at the sources alone would choose against adaptation, whose use is elsewhere: there the information of
predictions on the unlabelled target cases counts as well, as in training.select=target. The table also tells how alike
the sites have become: invariance can be bought with accuracy, and the sweep of the strength shows at what price.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from sklearn.model_selection import ParameterGrid

from medvit.config import GRIDS, Config, override, setting
from medvit.data.splits import Fold
from medvit.inference import Model
from medvit.training import processes
from medvit.training.adaptation import information, probe
from medvit.training.experiment import Experiment
from medvit.training.material import Material
from medvit.training.state import Score, score_of


@dataclass(frozen=True)
class Point:
    """One combination of settings and what came of it, on validation cases and on target cases without their labels.

    Attributes:
        settings: config key -> value.
        config: the experiment's, with these settings.
        auroc: of the epoch that was kept.
        loss: likewise, to break ties.
        best_epoch: counted from 1.
        domain_probe: balanced accuracy of telling source validation from target cases: 0.5 is chance, NaN unknown.
        target_information: of predictions on target cases, 0..1; NaN where there are none.
    """

    settings: Mapping[str, float]
    config: Config
    auroc: float
    loss: float
    best_epoch: int
    domain_probe: float
    target_information: float

    @property
    def score(self) -> Score:
        """What points are compared by; of an adaptation, what its unlabelled cases tell is part of it."""
        judged = {"auroc": self.auroc, "loss": self.loss, "target_information": self.target_information}
        return score_of(judged, with_target=self.config.objective.adapts)


def sweep(experiment: Experiment, fold: Fold, grid: str) -> tuple[Point, tuple[Point, ...]]:
    """Train the settings as they are and every point of a grid below `folder/sweep`, and write `sweep.csv`.

    Args:
        experiment: whose settings are varied.
        fold: its training and validation cases are used, and its target cases without their labels.
        grid: a name in `GRIDS`.

    Returns:
        The point with the highest validation AUROC (of an adaptation: AUROC + target information; then the lower loss),
        and all points: the settings as they are, then the others in the grid's order.
    """
    combinations = _combinations(experiment.config, GRIDS[grid])
    configs = [override(experiment.config, settings) for settings in combinations]
    points = []
    for number, (settings, config) in enumerate(zip(combinations, configs, strict=True)):
        name = f"{grid} {number + 1}/{len(configs)}"
        points.append(_try(replace(experiment, config=config), fold, settings, name, f"{number:02d}"))
    if processes.first():
        _write(experiment.folder / "sweep.csv", points)
    return max(points, key=lambda point: point.score), tuple(points)


def _combinations(config: Config, grid: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """The settings as they are, which a sweep must not replace by worse ones, then the others of the grid."""
    own = {key: setting(config, key) for key in sorted(grid)}  # the order of ParameterGrid
    return [own, *(point for point in ParameterGrid({k: list(v) for k, v in grid.items()}) if point != own)]


def _try(experiment: Experiment, fold: Fold, settings: Mapping[str, float], name: str, folder: str) -> Point:
    model, history = experiment.fit_fold(fold, experiment.folder / "sweep" / folder, name)
    row = next(row for row in history.rows if row["epoch"] == history.best_epoch)  # patience may have left some out
    at_target = _at_target(experiment.material, model, fold) if len(fold.target) else (float("nan"), float("nan"))
    return Point(settings, experiment.config, row["val_auroc"], row["val_loss"], history.best_epoch, *at_target)


def _at_target(material: Material, model: Model, fold: Fold) -> tuple[float, float]:
    """How well a fresh probe tells target from source validation cases, and how informative predictions on them are."""
    outputs = material.outputs(model, fold.target)
    _, blind = material.table(material.described(model, fold.target, outputs))
    groups = np.array([material.cases[index].group for index in (*fold.val, *fold.target)])
    pooled = np.stack([output.pooled for _, output in outputs])
    return probe(material.pooled(model, fold.val), pooled, groups).accuracy, information(blind)


def _write(path: Path, points: Sequence[Point]) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(
            (*points[0].settings, "val_auroc", "val_loss", "best_epoch", "domain_probe", "target_information")
        )
        for point in points:
            values = (point.auroc, point.loss, point.domain_probe, point.target_information)
            figures = [f"{value:.4f}" for value in values]
            writer.writerow((*point.settings.values(), *figures[:2], point.best_epoch, *figures[2:]))
