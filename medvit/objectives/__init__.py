"""The ways to learn. An objective is an nn.Module that owns the model: `forward(batch, progress) -> {"loss", ...}`.

The loop wraps, checkpoints and moves the objective as one thing, and knows no method by name (DESIGN decision 4).
"""

from collections.abc import Callable
from functools import partial

from medvit.config import ObjectiveConfig
from medvit.models.classifier import CtClassifier
from medvit.objectives.acceleration import Accelerated
from medvit.objectives.adaptation import Adaptation, Cdan, Dann, Mmd
from medvit.objectives.contrastive import MoCoV3, SimClr
from medvit.objectives.dino import Dino
from medvit.objectives.mae import Mae
from medvit.objectives.objective import Objective as Objective
from medvit.objectives.objective import Task as Task
from medvit.objectives.supervised import Supervised

OBJECTIVES: dict[str, Callable[[CtClassifier, ObjectiveConfig, Task], Objective]] = {
    "supervised": Supervised,
    "dann": partial(Adaptation, Dann),
    "cdan": partial(Adaptation, Cdan),
    "mmd": partial(Adaptation, Mmd),
    "simclr": SimClr,
    "mocov3": MoCoV3,
    "dino": Dino,
    "mae": Mae,
}
"""Name in the config -> (model, settings, task) -> objective."""


def build_objective(classifier: CtClassifier, config: ObjectiveConfig, task: Task) -> Objective:
    """The objective that the config names, accelerated where the config says so.

    Raises:
        UsageError: the task or the model does not allow it.
    """
    objective = OBJECTIVES[config.name](classifier, config, task)
    return objective if config.acceleration is None else Accelerated(objective, config.acceleration)
