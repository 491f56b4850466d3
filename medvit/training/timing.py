"""How long a step takes on this machine, so that a long training is not started blindly."""

from __future__ import annotations

import time
from typing import NamedTuple

from medvit.config import Stage
from medvit.data.dataset import CaseDataset, collate
from medvit.objectives import Objective


class Timing(NamedTuple):
    """Seconds: to prepare one case once (features of a frozen backbone), and for one training step."""

    prepare_case: float
    step: float


def time_step(objective: Objective, dataset: CaseDataset, stage: Stage, batch_size: int) -> float:
    """Seconds of a training step on the first cases of a dataset, drawing included, after one to warm up."""
    objective.set_trainable(stage.trainable, stage.blocks)
    objective.train()
    took = 0.0
    for _ in range(2):
        began = time.perf_counter()
        batch = collate([dataset[index] for index in range(min(batch_size, len(dataset)))])
        # at the end, where an accelerated objective sees whole slices: no step costs more
        objective({**batch, "totals": objective.totals(batch)}, 1.0)["loss"].backward()
        took = time.perf_counter() - began
    return took
