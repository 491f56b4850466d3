"""The gradient of one optimizer step: micro-batches that add up to one large batch, however it was cut up.

Losses are sums over cases divided by normalisers of the whole step, over all its micro-batches and all processes, so
nothing is divided here. What is random in a forward depends on seed, epoch, number of the micro-batch and process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from medvit.objectives import Objective
from medvit.training.device import averaged, summed


@dataclass(frozen=True)
class MicroBatch:
    """This process's part of a batch, with what its forward needs.

    Attributes:
        batch: as `collate` makes it.
        progress: 0..1 over the whole training.
        seed: of all that is random.
    """

    batch: dict[str, Tensor]
    progress: float
    seed: int


@dataclass(frozen=True)
class Figures:
    """What a step tells, the same in every process.

    Attributes:
        losses: of each micro-batch, summing to that of the step.
        means: over the cases of the step, of `loss` and each further scalar of the objective.
        norm: of the gradient before clipping.
        due: whether a checkpoint is.
    """

    losses: list[float]
    means: dict[str, float]
    norm: float
    due: bool

    @property
    def finite(self) -> bool:
        """Whether the gradient is."""
        return math.isfinite(self.norm)


def seed_for(seed: int, epoch: int, number: int, rank: int) -> int:
    """Seed of a micro-batch; neighbouring places have unrelated ones."""
    return int(np.random.SeedSequence([seed, epoch, number, rank]).generate_state(1, np.uint64)[0])


def gradient(
    fabric: Fabric,
    objective: Objective,
    model: Any,
    optimizer: Any,
    micro: Sequence[MicroBatch],
    *,
    clip_norm: float,
    due: bool,
) -> Figures:
    """Leave the clipped gradient of a step in the parameters.

    Args:
        fabric: device, precision, processes.
        objective: what is trained.
        model: the same, as `fabric.setup` has wrapped it.
        optimizer: likewise.
        micro: the batches of the step.
        clip_norm: largest norm of the whole gradient.
        due: a checkpoint is, in the eyes of this process.
    """
    batches = [fabric.to_device(one.batch) for one in micro]
    totals = averaged(fabric, torch.stack([objective.totals(batch) for batch in batches]).sum(dim=0))
    results = []
    for number, (one, batch) in enumerate(zip(micro, batches, strict=True), 1):
        torch.manual_seed(one.seed)
        with fabric.no_backward_sync(model, enabled=number < len(micro)):
            result = model({**batch, "totals": totals}, one.progress)
            fabric.backward(result["loss"])
        results.append({name: value.detach() for name, value in result.items() if name != "logits"})
    norm: Any = fabric.clip_gradients(model, optimizer, max_norm=clip_norm, error_if_nonfinite=False)
    return _figures(fabric, results, [len(batch["index"]) for batch in batches], float(norm), due=due)


def _figures(
    fabric: Fabric, results: Sequence[dict[str, Tensor]], cases: Sequence[int], norm: float, *, due: bool
) -> Figures:
    """The figures of all processes, in one exchange."""
    names = ["loss", *sorted(results[0].keys() - {"loss"})]
    table = torch.stack([torch.stack([result[name].float() for name in names]) for result in results]).tolist()
    losses = [row[0] / fabric.world_size for row in table]
    sums = [
        math.fsum(row[column] * count for row, count in zip(table, cases, strict=True))
        for column in range(1, len(names))
    ]
    dues, total, *rest = summed(fabric, [float(due), float(sum(cases)), *losses, *sums])
    losses, sums = rest[: len(losses)], rest[len(losses) :]
    means = [math.fsum(losses), *(value / total for value in sums)]
    return Figures(losses, dict(zip(names, means, strict=True)), norm, dues > 0)
