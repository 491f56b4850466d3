"""Gradients of an objective with and without compression, of the same batches: how far apart, and at what cost."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from medvit.models.compression import NONE, Compression, check_compression
from medvit.objectives import Objective
from medvit.objectives.acceleration import sparing
from medvit.objectives.objective import Batch
from medvit.training.gradient_error import (
    Floats,
    GradientError,
    Projection,
    cosine,
    squared_bias,
    squared_bias_error,
    total_variance,
)


def measure_errors(
    objective: Objective,
    steps: Iterable[Sequence[Batch]],
    compressions: Iterable[Compression],
    progress: float,
    fabric: Fabric,
    *,
    symmetric: bool = False,
    workers: int = 0,
) -> list[GradientError]:
    """Compare gradients of an objective at its present weights; it is left as it was.

    Every compression sees the same batches and begins with the same random numbers and the same state (a queue of
    negatives), so that only what is left out differs. They take turns: what else the machine does slows all alike. What
    is timed is drawing a step's batches, the same for all, and forward and backward, after a first round to warm up;
    the optimizer comes on top.

    Args:
        objective: not accelerated itself, on the device of `fabric`, at the size of the batches.
        steps: J, each with the micro-batches of one optimizer step, no case in two of them; drawn one by one.
        compressions: to compare with the uncompressed gradient, which always takes part.
        progress: 0..1, as told to the objective.
        fabric: device and precision.
        symmetric: other backbones of the objective, its teacher, see as little as the one that learns.
        workers: loader processes of the training; 0: it waits for each batch to be drawn.

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
    drawing: list[float] = []
    step = partial(_step, objective, progress=progress, fabric=fabric, symmetric=symmetric)
    with _left_as_it_was(objective):
        for number, batches in enumerate(_timed(steps, drawing)):
            for one in compared if number == 0 else ():
                step(batches, one, seed=number)
            for one in compared:
                seconds[one].append(step(batches, one, seed=number))
                gradients[one].append(project(_gradients(objective)))
    reference, drawn = np.stack(gradients[NONE]), float(np.median(drawing))
    took = {one: step_seconds(float(np.median(seconds[one])), drawn, workers) for one in compared}
    return [
        GradientError(
            progress=progress,
            compression=one,
            tokens_share=one.share(backbone.patch),
            bias2=squared_bias(own - reference),
            variance=total_variance(own),
            cost=took[one] / took[NONE],
            cosine=cosine(own.mean(axis=0), reference.mean(axis=0)),
            steps=len(own),
            bias2_error=squared_bias_error(own - reference),
        )
        for one, own in ((one, np.stack(gradients[one])) for one in compared)
    ]


def step_seconds(computed: float, drawn: float, workers: int) -> float:
    """Of a training step: what drawing its batches takes is a floor that no compression lowers.

    Args:
        computed: seconds of forward and backward.
        drawn: seconds of drawing, in one process.
        workers: that draw side by side, and beside the training; 0: one waits for the other.
    """
    return max(computed, drawn / workers) if workers else computed + drawn


def _timed(steps: Iterable[Sequence[Batch]], seconds: list[float]) -> Iterator[Sequence[Batch]]:
    """The steps; what drawing each has taken is added to `seconds`."""
    began = time.perf_counter()
    for step in steps:
        seconds.append(time.perf_counter() - began)
        yield step
        began = time.perf_counter()


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
