"""Device, precision and processes of a fit, by Lightning Fabric: alone, or one of several under torchrun."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from lightning_fabric.plugins.environments import TorchElasticEnvironment
from torch import Tensor

from medvit.config import TrainingConfig


class _ExactInputs(MixedPrecision):
    """Mixed precision that leaves inputs alone.

    Fabric's rounds all of a batch to 16 bits first, the normalisers of the loss included: to three digits in bfloat16.
    """

    def convert_input(self, data: Any) -> Any:
        """The same: autocast itself casts what an operation wants shorter."""
        return data


def make_fabric(config: TrainingConfig) -> Fabric:
    """Device, precision and, where torchrun has started several, the group of processes.

    Precision `auto` is 32-bit on CPUs without bf16 units and mixed where the hardware has it.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    on_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    precision: Any = config.precision
    if precision == "auto":
        precision = "32-true" if not on_gpu else "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    processes, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    plugins: list[Any] = [TorchElasticEnvironment()] if processes > 1 else []
    settings: dict[str, Any] = {"precision": precision}
    if precision != "32-true":
        device = "cuda" if on_gpu else "mps" if config.device == "mps" else "cpu"
        plugins, settings = [*plugins, _ExactInputs(precision, device)], {}
    fabric = Fabric(
        accelerator=config.device,
        devices=local,
        num_nodes=processes // local,
        strategy="ddp" if processes > 1 else "auto",
        plugins=plugins,
        **settings,
    )
    fabric.launch()
    return fabric


def averaged(fabric: Fabric, tensor: Tensor) -> Tensor:
    """A tensor averaged over the processes; every one of them gets the same."""
    reduced: Any = fabric.all_reduce(tensor, reduce_op="mean")
    result: Tensor = reduced
    return result


def summed(fabric: Fabric, values: Sequence[float]) -> list[float]:
    """Each value summed over the processes; every one of them gets the same."""
    if fabric.world_size == 1:
        return list(values)
    reduced: Any = fabric.all_reduce(torch.tensor(values, dtype=torch.float64, device=fabric.device), reduce_op="sum")
    result: list[float] = reduced.tolist()
    return result
