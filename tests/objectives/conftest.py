"""A classifier small enough for algebra: two numbers per slice, two layers, the mean slice, a linear head."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from medvit.config import ObjectiveConfig
from medvit.models.classifier import Output
from medvit.objectives import OBJECTIVES, Objective, Task


class Mlp(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.backbone = SimpleNamespace(width=width)
        self.encoder = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, width))
        self.head = nn.Linear(width, classes)

    def forward(self, values: Tensor, mask: Tensor) -> Output:
        weights = mask / mask.sum(dim=1, keepdim=True)
        pooled = torch.einsum("bs,bsd->bd", weights, self.encoder(values))
        return Output(self.head(pooled), weights, pooled)


MakeAdaptation = Callable[..., Objective]


@pytest.fixture
def adapt() -> MakeAdaptation:
    """Objective by name, in training mode; `dropout` is of the discriminator."""

    def make(
        name: str,
        *,
        width: int = 8,
        counts: tuple[int, ...] = (30, 10),
        domains: int = 3,
        dropout: float = 0.0,
        seed: int = 0,
        **settings: object,
    ) -> Objective:
        torch.manual_seed(seed)
        config = ObjectiveConfig(name=name, **settings)
        objective = OBJECTIVES[name](Mlp(width, len(counts)), config, Task(counts, domains))
        for module in objective.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        return objective

    return make


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Four labelled cases of two sites, three unlabelled of a third."""
    values = torch.randn(7, 2, 2, generator=torch.Generator().manual_seed(1))
    values[4:] += 1
    return {
        "input": values,
        "mask": torch.ones(7, 2, dtype=torch.bool),
        "label": torch.tensor([0, 1, 0, 0, -1, -1, -1]),
        "domain": torch.tensor([0, 0, 1, 1, 2, 2, 2]),
        "index": torch.arange(7),
    }
