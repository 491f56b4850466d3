"""What is rebuilt for each stage: the optimizer, the course of its rates, and the average of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from medvit.config import Stage, TrainingConfig
from medvit.objectives import Objective
from medvit.training.averaging import WeightAverage
from medvit.training.checkpoint import State, pack_optimizer, prefixed, under, unpack_optimizer
from medvit.training.optimizer import course, parameter_groups
from medvit.training.step import Figures, MicroBatch, gradient

RATES = {"head": "lr", "backbone": "lr_backbone", "other": "lr_other"}
"""What the rows of metrics call the learning rate of a parameter group."""


class StageTraining:
    """The moving parts of a stage.

    Args:
        fabric: device, precision, processes.
        objective: what is trained, at the size of the stage, and with what is trainable marked.
        stage: rates and their course.
        config: of the whole training.
        steps: optimizer steps of an epoch.

    Attributes:
        model: the objective, wrapped for device, precision and processes.
        optimizer: likewise.
    """

    def __init__(self, fabric: Fabric, objective: Objective, stage: Stage, config: TrainingConfig, steps: int) -> None:
        self.fabric, self.objective, self.clip_norm = fabric, objective, config.clip_norm
        self.precision = fabric.strategy.precision
        # fused takes a sixth of the time; not where a scaler has to unscale gradients before they are clipped
        self.bare = torch.optim.AdamW(parameter_groups(objective, stage), fused=not self.may_skip)
        self.peaks = [group["lr"] for group in self.bare.param_groups]
        self.factor = course(stage, steps * stage.epochs)
        self.model: Any
        self.optimizer: Any
        self.model, self.optimizer = fabric.setup(objective, self.bare)
        self.average = WeightAverage(objective, config.ema) if config.ema else None

    @property
    def may_skip(self) -> bool:
        """Whether steps with infinite gradients are left out by plan, as fp16's scaler does to find its scale."""
        return getattr(self.precision, "scaler", None) is not None

    def set_rates(self, step: int) -> None:
        """Rates of a step, from 0 over the stage."""
        for group, peak in zip(self.bare.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.factor(step)

    def rates(self) -> dict[str, float]:
        """The highest rate of head, of backbone, and of what else learns."""
        found: dict[str, float] = {}
        for group in self.bare.param_groups:
            name = RATES[group["name"]]
            found[name] = max(group["lr"], found.get(name, 0.0))
        return found

    def gradient(self, micro: Sequence[MicroBatch], *, due: bool) -> Figures:
        """Leave the clipped gradient of some batches in the parameters; `due`: this process wants a checkpoint."""
        return gradient(
            self.fabric, self.objective, self.model, self.optimizer, micro, clip_norm=self.clip_norm, due=due
        )

    def move(self, *, skip: bool) -> None:
        """Take the step that the gradients say.

        Args:
            skip: they are infinite, and the scaler will leave the step out.
        """
        self.optimizer.step()
        self.optimizer.zero_grad()
        if skip:
            return
        self.objective.after_step()
        if self.average:
            self.average.update()

    def averaged(self) -> AbstractContextManager[None]:
        """Within, the objective has the weights that are judged and kept."""
        return self.average.in_place() if self.average else nullcontext()

    def pack(self) -> tuple[dict[str, Tensor], State]:
        """Tensors and record for a checkpoint."""
        tensors, groups = pack_optimizer(self.bare)
        about: State = {"optimizer": groups, "scaler": self.precision.state_dict(), "averaged": 0}
        if self.average:
            tensors |= prefixed("average", self.average.average)
            about["averaged"] = self.average.steps
        return tensors, about

    def unpack(self, tensors: dict[str, Tensor], about: State) -> None:
        """Put back what `pack` took."""
        unpack_optimizer(self.bare, tensors, about["optimizer"])
        self.precision.load_state_dict(about["scaler"])
        if self.average:
            self.average.put(under("average", tensors), about["averaged"])
