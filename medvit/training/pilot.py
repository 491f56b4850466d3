"""A short training that finds out how much may be left out of slices, and when.

Where the training stands after 0, 25, 50, 75 and 100 % of the pilot, gradients with and without compression are
compared on the same batches (`medvit.training.gradient_measurement`), and each is timed on this machine.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from itertools import count

from torch import Tensor

from medvit.config import Config
from medvit.data.dataset import CaseDataset, collate
from medvit.data.splits import Fold
from medvit.models.compression import Compression
from medvit.objectives import Objective
from medvit.records import UsageError
from medvit.training.device import make_fabric
from medvit.training.experiment import Experiment
from medvit.training.feeding import Feeding
from medvit.training.gradient_error import GradientError
from medvit.training.gradient_measurement import measure_errors
from medvit.training.pretraining import Pretraining

POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the pilot, where errors are measured; each falls on the nearest end of an epoch."""

FEWEST_STEPS = 4
"""Below this, a squared bias is a throw of dice."""


def run_pilot(experiment: Experiment | Pretraining, fold: Fold, *, epochs: int, steps: int) -> list[GradientError]:
    """Train on one fold for a while, and measure on the way.

    Args:
        experiment: with the settings of the training; checkpoints go into `folder/pilot`. Where they are accelerated,
            only whether a teacher sees as little as its student is taken from that.
        fold: its training cases are used, and its validation cases for the rows of metrics.
        epochs: of the pilot, about: the stages share them in proportion, none with less than one.
        steps: optimizer steps to compare gradients of, at most; always the first ones of the first epoch.

    Returns:
        At each of the `POINTS` at which the backbone learns, a record of each of `default_compressions`.

    Raises:
        UsageError: the model cannot be compressed, the backbone learns at none of the points, or an epoch has fewer
            than four whole steps.
    """
    config = pilot_config(experiment.config, epochs)
    stages, found = config.training.stages, list[GradientError]()
    total = sum(stage.epochs for stage in stages)
    points = {round(point * total) for point in POINTS}
    symmetric = experiment.config.objective.symmetric
    fabric, done = make_fabric(config.training), count()

    def watch(objective: Objective, dataset: CaseDataset) -> None:
        epoch = next(done)
        if epoch == 0:  # nothing is set yet: a copy stands where the first stage will
            objective = copy.deepcopy(objective)
            objective.set_trainable(stages[0].trainable, stages[0].blocks)
            dataset.size = objective.set_size(stages[0].size or objective.classifier.backbone.size)
        classifier = objective.classifier
        learns = any(parameter.requires_grad for parameter in classifier.backbone.parameters())
        if epoch in points and learns and config.model.trunk_learns:
            experiment.reporter.say(f"comparing gradients after {epoch} of {total} epochs")
            objective.to(fabric.device)
            batches = first_steps(dataset, config, steps)
            # as they are asked for, which the config checks, and as the model takes them
            sizes = config.sizes | {classifier.backbone.nearest(px) for px in config.sizes}
            compressions = default_compressions(sizes, classifier.backbone.patch)
            fitting = [one for one in compressions if objective.patches_vary or one.patch is None]
            compare = partial(measure_errors, symmetric=symmetric, workers=config.data.workers)
            found.extend(compare(objective, batches, fitting, epoch / total, fabric))

    replace(experiment, config=config).fit_fold(fold, experiment.folder / "pilot", "pilot", watch)
    if not found:
        raise UsageError(
            "training.stages, model.tuning: the backbone is frozen wherever gradients were to be compared, and a "
            "frozen one is not accelerated. Give a stage with trainable=all or top, or more epochs."
        )
    return found


def pilot_config(config: Config, epochs: int) -> Config:
    """Nothing accelerated, no early end, and stages that share so many epochs, about, in proportion."""
    stages = config.training.stages
    share = epochs / sum(stage.epochs for stage in stages)
    scaled = tuple(stage.model_copy(update={"epochs": max(1, round(share * stage.epochs))}) for stage in stages)
    training = config.training.model_copy(update={"stages": scaled, "patience": 0, "select": "last"})
    objective = config.objective.model_copy(update={"acceleration": None})
    return config.model_copy(update={"training": training, "objective": objective})


def first_steps(dataset: CaseDataset, config: Config, most: int) -> Iterator[list[dict[str, Tensor]]]:
    """Batches of the first whole steps of the first epoch: as many micro-batches each, of nearly as many cases.

    Their cases are all different ones, but for `data.sampling=balanced`, which draws rare ones again: then some of
    their scatter is taken for bias.

    Raises:
        UsageError: there are fewer than four.
    """
    dataset.epoch = 0  # the loop sets its own before each
    groups = Feeding(dataset, config.training, rank=0, processes=1).groups(0)
    whole = [group for group in groups if len(group) == len(groups[0])][:most]
    if len(whole) < FEWEST_STEPS:
        raise UsageError(
            f"comparing gradients needs {FEWEST_STEPS} steps of different cases, and an epoch has {len(whole)} whole "
            f"ones. Set training.batch_size (and accumulate) lower, or give more cases."
        )
    return ([collate([dataset[index] for index in batch]) for batch in group] for group in whole)


def default_compressions(sizes: Collection[int], own: int) -> list[Compression]:
    """Token dropout, larger patches, and both.

    Args:
        sizes: of slices, px, that patches must divide.
        own: side of the model's own patch, px.
    """
    patches = [patch for patch in range(own + 1, 3 * own + 1) if not any(size % patch for size in sizes)]
    alone = [Compression(keep) for keep in (0.75, 0.5, 0.25)] + [Compression(patch=patch) for patch in patches]
    return alone + [Compression(0.5, patch) for patch in patches]
