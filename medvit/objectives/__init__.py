"""The ways to learn. An objective is an nn.Module that owns the model: `forward(batch, progress) -> {"loss", ...}`.

The loop wraps, checkpoints and moves the objective as one thing, and knows no method by name (DESIGN decision 4).
"""

from collections.abc import Callable, Sequence

from medvit.config import ObjectiveConfig
from medvit.models.classifier import CtClassifier
from medvit.objectives.supervised import Objective, Supervised

OBJECTIVES: dict[str, Callable[[CtClassifier, ObjectiveConfig, Sequence[int]], Objective]] = {
    "supervised": Supervised,
}
"""Name in the config -> (model, settings, training cases per class) -> objective."""
