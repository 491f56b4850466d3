"""What a fit has done so far, beside weights: plain numbers, which a checkpoint keeps as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from medvit.records import UsageError

Metrics = dict[str, float]
Score = tuple[float, float]

WORST: Score = (-math.inf, -math.inf)


@dataclass
class History:
    """What a fit has seen: one row of metrics per epoch, and which epoch was best by validation.

    `best_epoch` counts from 1 over all stages as planned; 0 before any.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best_score: Score = WORST


@dataclass
class Position:
    """Where a fit stands between two optimizer steps.

    Attributes:
        epoch: under way, from 0 over all stages as planned; a stage that ends early leaves its others out.
        steps: done in it.
        cases: seen in it, by all processes.
        sums: over them, of each figure that is averaged over the epoch.
        skipped: steps in a row, up to here, that fp16 left out.
        stage_score: the best one in this stage.
        stale: epochs of this stage since then.
    """

    epoch: int = 0
    steps: int = 0
    cases: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    stage_score: Score = WORST
    stale: int = 0

    def add(self, cases: int, means: Mapping[str, float]) -> None:
        """Count a step: how many cases it took, and the mean over them of each figure."""
        self.steps += 1
        self.cases += cases
        for name, value in means.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * cases

    def means(self) -> Metrics:
        """Each figure averaged over the cases of the epoch so far."""
        return {name: value / self.cases for name, value in self.sums.items()}

    def enter(self, epoch: int) -> None:
        """Stand before the first step of an epoch."""
        self.epoch, self.steps, self.cases, self.sums = epoch, 0, 0, {}

    def enter_stage(self) -> None:
        """Nothing was judged in this stage so far."""
        self.stage_score, self.stale = WORST, 0

    def judge(self, score: Score) -> None:
        """Count an epoch whose score may be the stage's best."""
        if score > self.stage_score:
            self.stage_score, self.stale = score, 0
        else:
            self.stale += 1


def score_of(judged: Mapping[str, float], *, with_target: bool) -> Score:
    """What epochs are compared by: AUROC, then the lower loss; what is undefined is worse than anything.

    Args:
        judged: `auroc`, `loss` and, with target cases, `target_information`; what is missing is not defined.
        with_target: add how informative predictions on unlabelled target cases are.

    Raises:
        UsageError: that is asked for, and there are no target cases.
    """
    if with_target and "target_information" not in judged:
        raise UsageError("training.select=target judges by unlabelled target cases: name their data.target_sites")
    first = judged.get("auroc", math.nan) + (judged["target_information"] if with_target else 0.0)
    return _or_worst(first), _or_worst(-judged.get("loss", math.nan))


def _or_worst(value: float) -> float:
    return -math.inf if math.isnan(value) else value
