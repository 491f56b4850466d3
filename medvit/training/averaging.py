"""Moving average of weights over the steps of a stage: smoother than the last ones, and often better judged.

After Polyak and Juditsky, https://doi.org/10.1137/0330046, with an exponential window whose decay warms up, so that an
average of few steps does not hang on where training began.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Averages what is trained of a module; what is frozen and what is counted (statistics) stays the module's own.

    Args:
        module: as it is at the beginning of a stage, on its device.
        decay: weight of the past, below 1; in the first steps (1 + t) / (10 + t), where that is less.

    Attributes:
        average: of each trained parameter, by name.
        steps: that it has seen.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self.average = {name: value.detach().clone() for name, value in self.trained.items()}
        self.decay, self.steps = decay, 0

    def update(self) -> None:
        """Take in the weights after a step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        with torch.no_grad():
            for name, value in self.trained.items():
                self.average[name].lerp_(value, 1 - decay)

    def put(self, average: dict[str, Tensor], steps: int) -> None:
        """Go on from an average that was kept."""
        for name, value in average.items():
            self.average[name].copy_(value)
        self.steps = steps

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the module has the averaged weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        with torch.no_grad():
            for name, value in self.trained.items():
                kept = value.clone()
                value.copy_(self.average[name])
                self.average[name].copy_(kept)
