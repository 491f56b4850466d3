"""What learning without labels has in common: slices and their views, heads that are thrown away, slow copies, masks.

The methods are `medvit.objectives.contrastive` (SimCLR, MoCo v3), `dino` and `mae`. Each trains the backbone alone:
pooling and head of the classifier get no gradient.

Micro-batches (`training.accumulate`) add up gradients, but each is compared within itself: accumulation makes a step
larger, not the set of negatives. Several processes do: what they encode is gathered before it is compared.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from medvit.models.backbone import Backbone
from medvit.models.classifier import CtClassifier
from medvit.objectives.gathering import gather_rows
from medvit.objectives.objective import Batch
from medvit.records import UsageError

Kind = TypeVar("Kind", bound=nn.Module)


class Slices(NamedTuple):
    """The real slices of a batch: `views` (N, V, C, H, W), `local` (N, L, C, h, w) or None, `patients` (N,)."""

    views: Tensor
    local: Tensor | None
    patients: Tensor


def slices_of(batch: Batch) -> Slices:
    """Without padding; a slice knows the patient of its case."""
    mask = batch["mask"]
    patients = batch["patient"][:, None].expand(mask.shape)[mask]
    return Slices(batch["input"][mask], batch["local"][mask] if "local" in batch else None, patients)


def encode_views(backbone: nn.Module, views: Tensor) -> Tensor:
    """Slices (N, V, C, H, W) of this process -> features (M, V, D) of all processes."""
    features: Tensor = backbone(views.flatten(0, 1))
    return gather_rows(features.view(*views.shape[:2], -1))


def train_backbone_only(classifier: CtClassifier) -> None:
    """Hold back what no label teaches: a parameter without gradient would stop training in several processes."""
    for part in (classifier.norm, classifier.pooling, classifier.head):
        part.requires_grad_(False)


def slow_backbone(backbone: Backbone) -> Backbone:
    """A `slow_copy` of what encodes slices, which rests: no dropout.

    Raises:
        UsageError: a model with running statistics, which a copy that rests never gathers.
    """
    if backbone.has_batch_norm:
        raise UsageError(
            f"model.name: {type(backbone.model).__name__} has BatchNorm, and the slow copy of objective.name mocov3 "
            "and dino would never know its statistics. Use a ViT, or objective.name=simclr."
        )
    return slow_copy(backbone)


def slow_copy(module: Kind) -> Kind:
    """A copy that no gradient trains: it only follows, by `follow`."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """Move the weights of a slow copy: `momentum` is the share of what it was. Running statistics stay its own."""
    for own, theirs in zip(slow.parameters(), fast.parameters(), strict=True):
        own.lerp_(theirs.to(own.dtype), 1 - momentum)


def cosine_momentum(start: float, progress: float) -> float:
    """Share of the past at a progress of 0..1: from `start` to 1 (BYOL, Grill et al. 2020, arXiv 2006.07733)."""
    return 1 - (1 - start) * (math.cos(math.pi * min(1.0, progress)) + 1) / 2


def mlp(widths: Sequence[int], *, last_norm: bool) -> nn.Sequential:
    """Linear layers with batch normalisation and ReLU between them: (N, widths[0]) -> (N, widths[-1]).

    Batch normalisation needs the whole batch: give it rows gathered from all processes.

    Args:
        widths: of the input, of each hidden layer, and of the output.
        last_norm: normalise the output too, without scale and shift (MoCo v3).
    """
    layers: list[nn.Module] = []
    for number, (wide, out) in enumerate(pairwise(widths), 2):
        inner = number < len(widths)
        layers.append(nn.Linear(wide, out, bias=not (inner or last_norm)))
        if inner:
            layers += [nn.BatchNorm1d(out), nn.ReLU()]
    if last_norm:
        layers.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*layers)
