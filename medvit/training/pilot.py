"""A short training that finds out how much may be left out of slices, and when.

Where the training stands after 0, 25, 50, 75 and 100 % of the pilot, gradients with and without compression are
compared on the same batches (`medvit.training.gradient_error`), and each is timed on this machine.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from medvit.config import Config
from medvit.data.dataset import CaseDataset, collate
from medvit.data.splits import Fold
from medvit.models.compression import NONE, Compression, check_compression
from medvit.objectives import Objective
from medvit.objectives.acceleration import sparing
from medvit.objectives.objective import Batch
from medvit.records import UsageError
from medvit.training.device import make_fabric
from medvit.training.experiment import Experiment
from medvit.training.feeding import Feeding
from medvit.training.gradient_error import (
    Floats,
    GradientError,
    Projection,
    cosine,
    squared_bias,
    squared_bias_error,
    total_variance,
)
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
    given = experiment.config.objective.acceleration
    symmetric = given is not None and given.symmetric
    fabric, done = make_fabric(config.training), count()

    def watch(objective: Objective, dataset: CaseDataset) -> None:
        epoch, classifier = next(done), objective.classifier
        if epoch == 0:
            objective.set_trainable(stages[0].trainable, stages[0].blocks)
        learns = any(parameter.requires_grad for parameter in classifier.backbone.parameters())
        if epoch in points and learns and config.model.trunk_learns:
            experiment.reporter.say(f"comparing gradients after {epoch} of {total} epochs")
            objective.to(fabric.device)
            batches = _first_steps(dataset, config, steps)
            compressions = default_compressions(config.sizes, classifier.backbone.patch)
            fitting = [one for one in compressions if objective.patches_vary or one.patch is None]
            found.extend(measure_errors(objective, batches, fitting, epoch / total, fabric, symmetric=symmetric))

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


def _first_steps(dataset: CaseDataset, config: Config, most: int) -> Iterator[list[dict[str, Tensor]]]:
    """Batches of the first whole steps of the first epoch.

    Their cases are all different ones, but for `data.sampling=balanced`, which draws rare ones again: then some of
    their scatter is taken for bias.
    """
    dataset.epoch = 0  # the loop sets its own before each
    groups = Feeding(dataset, config.training, rank=0, processes=1).groups(0)
    size = sum(map(len, groups[0]))
    whole = [group for group in groups if sum(map(len, group)) == size][:most]
    if len(whole) < FEWEST_STEPS:
        raise UsageError(
            f"comparing gradients needs {FEWEST_STEPS} steps of different cases, and an epoch has {len(whole)} whole "
            f"ones. Set training.batch_size (and accumulate) lower, or give more labelled cases."
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


def write_errors(errors: Sequence[GradientError], path: Path) -> None:
    """gradient_error.csv: a row for each compression at each point."""
    columns = ("tokens_share", "bias2", "bias2_error", "variance", "cost", "ca_mse", "cosine")
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("progress", "keep", "patch", *columns, "steps"))
        for error in errors:
            figures = (f"{getattr(error, column):.6g}" for column in columns)
            patch = error.compression.patch or ""
            writer.writerow((f"{error.progress:g}", error.compression.keep, patch, *figures, error.steps))


def measure_errors(
    objective: Objective,
    steps: Iterable[Sequence[Batch]],
    compressions: Iterable[Compression],
    progress: float,
    fabric: Fabric,
    *,
    symmetric: bool = False,
) -> list[GradientError]:
    """Compare gradients of an objective at its present weights; it is left as it was.

    Every compression sees the same batches and begins with the same random numbers and the same state (a queue of
    negatives), so that only what is left out differs. They take turns: what else the machine does slows all alike. What
    is timed is forward and backward, after a first round to warm up; loading and the optimizer come on top.

    Args:
        objective: not accelerated itself, on the device of `fabric`, at the size of the batches.
        steps: J, each with the micro-batches of one optimizer step, no case in two of them.
        compressions: to compare with the uncompressed gradient, which always takes part.
        progress: 0..1, as told to the objective.
        fabric: device and precision.
        symmetric: other backbones of the objective, its teacher, see as little as the one that learns.

    Raises:
        UsageError: the model cannot be compressed so.
        ValueError: fewer than two steps.
    """
    compared = list(dict.fromkeys([NONE, *compressions]))
    backbone, project = objective.classifier.backbone, Projection()
    for one in compared:
        check_compression(backbone.model, one, backbone.size)
    gradients: dict[Compression, list[Floats]] = {one: [] for one in compared}
    seconds: dict[Compression, list[float]] = {one: [] for one in compared}
    step = partial(_step, objective, progress=progress, fabric=fabric, symmetric=symmetric)
    with _left_as_it_was(objective):
        for number, batches in enumerate(steps):
            for one in compared if number == 0 else ():
                step(batches, one, seed=number)
            for one in compared:
                seconds[one].append(step(batches, one, seed=number))
                gradients[one].append(project(_gradients(objective)))
    reference, took = np.stack(gradients[NONE]), float(np.median(seconds[NONE]))
    return [
        GradientError(
            progress=progress,
            compression=one,
            tokens_share=one.share(backbone.patch),
            bias2=squared_bias(own - reference),
            variance=total_variance(own),
            cost=float(np.median(seconds[one])) / took,
            cosine=cosine(own.mean(axis=0), reference.mean(axis=0)),
            steps=len(own),
            bias2_error=squared_bias_error(own - reference),
        )
        for one, own in ((one, np.stack(gradients[one])) for one in compared)
    ]


def _step(
    objective: Objective,
    step: Sequence[Batch],
    compression: Compression,
    *,
    progress: float,
    fabric: Fabric,
    symmetric: bool,
    seed: int,
) -> float:
    """Leave the gradient of one step in the parameters; seconds that it took."""
    batches: Any = [fabric.to_device(batch) for batch in step]
    objective.zero_grad()
    torch.manual_seed(seed)
    with _buffers_put_back(objective), sparing(objective, compression, symmetric=symmetric):
        _wait_for(fabric)
        began = time.perf_counter()
        totals = torch.stack([objective.totals(batch) for batch in batches]).sum(dim=0)
        for batch in batches:
            with fabric.autocast():
                loss = objective({**batch, "totals": totals}, progress)["loss"]
            loss.backward()
        _wait_for(fabric)
        return time.perf_counter() - began


def _wait_for(fabric: Fabric) -> None:
    if fabric.device.type == "cuda":  # else only the launch of kernels would be timed
        torch.cuda.synchronize(fabric.device)


def _gradients(objective: Objective) -> list[Tensor]:
    return [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for parameter in objective.parameters()
        if parameter.requires_grad
    ]


@contextmanager
def _buffers_put_back(objective: Objective) -> Iterator[None]:
    """What a forward remembers (queue, centre, statistics) is forgotten again."""
    kept = {name: value.clone() for name, value in objective.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in objective.named_buffers():
                value.copy_(kept[name])


@contextmanager
def _left_as_it_was(objective: Objective) -> Iterator[None]:
    """Within, the objective trains; afterwards mode, gradients and random numbers are as before."""
    training = objective.training
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        objective.train()
        try:
            yield
        finally:
            objective.zero_grad()
            objective.train(training)
